"""Shuffling without a list: the i-th element of a random order, computed from i alone.

A Feistel network turns any keyed mixing function into a bijection: split a number into two halves, and in each round
replace (left, right) by (right, left xor mix(right, key)). Its domain is a power of four, so indices that land beyond
n are sent through again until they fall inside (cycle walking), which keeps it a bijection of 0..n-1. An epoch's
order thus needs no memory, no set-up and no state, resuming in the middle costs nothing, and the order depends on no
library's random generator, so that it stays the same over versions of numpy and torch.
"""
from __future__ import annotations

import numpy as np

ROUNDS = 6
_ODD = np.uint64(0x9E3779B97F4A7C15)              # 2^64 / golden ratio, the increment of splitmix64


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of a uint64 depends on every other afterwards."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*numbers: int) -> int:
    """One 64-bit key from several integers (a seed, an epoch, a purpose), each of which changes it wholly."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mix((key + _ODD) ^ np.uint64(number % (1 << 64)))
    return int(key[0])


def shuffled(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Elements number `index` (any shape, each in 0..n-1) of the order of 0..n-1 that `key` names; int64."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    bits, low = np.uint64(half), np.uint64((1 << half) - 1)
    keys = mix(np.uint64(key) + _ODD * np.arange(1, ROUNDS + 1, dtype=np.uint64))
    x = np.array(index, dtype=np.uint64, ndmin=1)
    walk = np.ones(x.shape, bool)
    while walk.any():
        left, right = x[walk] >> bits, x[walk] & low
        for round_key in keys:
            left, right = right, left ^ (mix(right + round_key) & low)
        x[walk] = (left << bits) | right
        walk &= x >= n
    return x.astype(np.int64).reshape(np.shape(index))

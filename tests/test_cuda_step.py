"""The decoding step for GPUs: its arithmetic on a CPU, its kernel in Triton's interpreter where Triton is installed,
the recorded graph where there is a GPU."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mindseed.infer.cuda import GraphStep
from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.infer.generate import generate_uncached
from mindseed.infer.paged_attention import gathered
from mindseed.infer.sample import Sampling
from mindseed.nn.attend import attend_oracle
from tests.tiny import kit, kit_model

CONFIGS = {"gqa": kit("gqa", "gqa"), "windows": kit("window", "gqa"), "no qk-norm, untied": kit(
    "no qk-norm", "no qk-norm", tied=False)}
PROMPTS = [[5, 6, 7], [1], [9] * 11, [4, 3, 2, 1, 8, 30, 31]]


def blocks(rows, groups, width, size, seed=0):
    """Keys, values, tables and lengths of rows that lie scattered in blocks."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 150, (rows,), generator=g)
    n = int(-(-lengths.max() // size))
    free = (torch.randperm(rows * n, generator=g) + 1).tolist()
    tables = torch.zeros(rows, n, dtype=torch.long)
    for row, length in zip(tables, lengths.tolist()):
        for j in range(-(-length // size)):
            row[j] = free.pop()
    keys, values = torch.randn(2, (rows * n + 1) * size, groups, width, generator=g)
    return keys, values, tables, lengths


@pytest.mark.parametrize("window", [None, 7])
def test_gathered_attention_equals_the_oracle(window):
    keys, values, tables, lengths = blocks(5, 2, 16, 4)
    q = torch.randn(5, 6, 16)
    got = gathered(q, keys, values, tables, lengths, 4, window, 0.3)
    for b, length in enumerate(lengths.tolist()):
        slots = [int(tables[b, i // 4]) * 4 + i % 4 for i in range(length)][-(window or length):]
        want = attend_oracle(q[None, None, b], keys[None, slots], values[None, slots],
                             torch.ones(1, 1, 1, len(slots), dtype=torch.bool), scale=0.3)
        torch.testing.assert_close(got[b], want[0, 0])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_decodes_as_the_oracle(name):
    model = kit_model(CONFIGS[name])
    engine = Engine(model, None, EngineConfig(block_size=4, max_seqs=4, fused=False))
    engine.runner.fused = GraphStep(model, engine.cache, record=False)
    greedy = Sampling(temperature=0)
    got = engine.generate([Request(prompt=p, sampling=greedy, max_new=12, stop_ids=()) for p in PROMPTS])
    want = generate_uncached(model, None, PROMPTS, sampling=greedy, max_new=12, stop_ids=())
    assert [done.ids for [done] in got] == [done.ids for done in want]


def test_new_weights_reach_the_step():
    one, two = kit_model(CONFIGS["gqa"]), kit_model(CONFIGS["gqa"], seed=5)
    engine = Engine(one, None, EngineConfig(block_size=4, max_seqs=4, fused=False))
    engine.runner.fused = GraphStep(one, engine.cache, record=False)
    engine.update_weights(two)
    greedy = Sampling(temperature=0)
    got = engine.generate([Request(prompt=p, sampling=greedy, max_new=12, stop_ids=()) for p in PROMPTS])
    want = generate_uncached(two, None, PROMPTS, sampling=greedy, max_new=12, stop_ids=())
    assert [done.ids for [done] in got] == [done.ids for done in want]


INTERPRETED = """
import sys, torch
sys.path.insert(0, ".")
from mindseed.infer.paged_attention import gathered, launched
from tests.test_cuda_step import blocks
for rows, H, G, K, size, window in [(3, 4, 2, 32, 16, None), (2, 8, 8, 24, 4, None), (5, 6, 2, 64, 16, 7)]:
    keys, values, tables, lengths = blocks(rows, G, K, size)
    q = torch.randn(rows, H, K)
    torch.testing.assert_close(launched(q, keys, values, tables, lengths, size, window, 0.2),
                               gathered(q, keys, values, tables, lengths, size, window, 0.2))
"""


def test_the_kernel_in_tritons_interpreter():
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_graphs_decode_as_the_oracle(name):
    model = kit_model(CONFIGS[name]).float().cuda()
    engine = Engine(model, None, EngineConfig(block_size=4, max_seqs=4))
    assert isinstance(engine.runner.fused, GraphStep)
    greedy = Sampling(temperature=0)
    asked = [Request(prompt=p, sampling=greedy, max_new=12, stop_ids=()) for p in PROMPTS]
    want = generate_uncached(model, None, PROMPTS, sampling=greedy, max_new=12, stop_ids=())
    for _ in range(2):
        assert [done.ids for [done] in engine.generate(asked)] == [done.ids for done in want]

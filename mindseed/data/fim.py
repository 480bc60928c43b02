"""Fill in the middle (2207.14255): a share of the texts is cut in three at random places and told in another order,

    <prefix> the beginning <suffix> the end <middle> the middle <eos>

so that a model that reads from left to right learns to write what belongs between two things. This is the order
prefix, suffix, middle; DeepSeek-V3 uses it on a tenth of its text, before packing, and loses nothing on ordinary text.
Cuts fall between characters, not tokens: an editor's cursor knows no tokens either. Where a text is cut follows from
its content and the seed.
"""
from __future__ import annotations

import hashlib
from typing import Any

from mindseed.base.errors import UserError
from mindseed.tokenizers.base import BUFFERS

QWEN_MARKERS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
OUR_MARKERS = BUFFERS[:3]                         # ids that our own vocabularies keep free


def markers(tokenizer: Any) -> tuple[int, int, int]:
    """Ids of the marks before the beginning, the end and the middle. UserError if the tokenizer has none to spare."""
    for names in (QWEN_MARKERS, OUR_MARKERS):
        if all(name in tokenizer.specials for name in names):
            return tuple(tokenizer.specials[name] for name in names)
    raise UserError(f"fill-in-the-middle needs the special tokens {', '.join(QWEN_MARKERS)} (or "
                    f"{', '.join(OUR_MARKERS)}), which this tokenizer does not have")


def chosen(text: str, rate: float, seed: int) -> tuple[str, str, str] | None:
    """(beginning, middle, end) if this text is among the share `rate` that is cut, else None."""
    digest = hashlib.blake2b(text.encode(), digest_size=24, key=b"fim" + str(seed).encode()).digest()
    draw, *cuts = (int.from_bytes(digest[i:i + 8], "big") / 2.0 ** 64 for i in (0, 8, 16))
    if draw >= rate:
        return None
    first, second = sorted(int(cut * (len(text) + 1)) for cut in cuts)
    return text[:first], text[first:second], text[second:]


def fim_ids(parts: tuple[list[int], list[int], list[int]], marks: tuple[int, int, int]) -> list[int]:
    """Token ids of (beginning, middle, end) in the order prefix, suffix, middle."""
    before, middle, after = parts
    return [marks[0], *before, marks[1], *after, marks[2], *middle]

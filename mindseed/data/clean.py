"""What is wrong with an answer that a model wrote, so that nobody should learn from it.

Small models stop in the middle, say nothing, or say the same for ever. A loop is found as a period: a text that equals
itself, moved by u characters, over a long stretch, repeats a unit of u characters there.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from mindseed.tokenizers.base import EOS, MARKUP

LONGEST_UNIT = 240                                # characters
REPEATS, LEAST = 4, 48                            # a loop is a unit this often, over at least so many characters


def fault(message: dict[str, Any], finish: str, *, tools: bool = False, longest: int | None = None) -> str:
    """Why an assistant's message is not to be learnt from, in a word or two; "" if it may. `longest` are characters."""
    content, reasoning = message.get("content") or "", message.get("reasoning_content") or ""
    calls = message.get("tool_calls") or []
    if finish != "stop":
        return "unfinished"
    if not content.strip() and not calls:
        return "empty"
    if calls and not tools or any(mark in content for mark in (*MARKUP, EOS)):
        return "stray tag"
    if longest is not None and len(content) + len(reasoning) > longest:
        return "too long"
    return "loop" if loops(content) or loops(reasoning) else ""


def loops(text: str) -> bool:
    """Whether a unit with a letter or a digit in it is said over and over; rules of tables and the like may be."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    for unit in range(1, min(LONGEST_UNIT, len(codes) // REPEATS) + 1):
        breaks = np.flatnonzero(codes[unit:] != codes[:-unit])
        edges = np.concatenate([[-1], breaks, [len(codes) - unit]])
        gaps = np.diff(edges) - 1                                                 # lengths of stretches that repeat
        for at in np.flatnonzero(gaps + unit >= max(REPEATS * unit, LEAST)):
            first = int(edges[at]) + 1
            if any(c.isalnum() for c in text[first:first + unit]):
                return True
    return False

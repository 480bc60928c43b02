"""Cut text into pieces that BPE may not merge across: words, single digits, runs of punctuation, white space.

Without the cut, merges would glue "dog." and "dog!" into tokens of their own, and training would have to count pairs
over whole documents instead of over a table of distinct words. Qwen's pattern is our default, read from left to right,
the first branch that fits wins:

    (?i:'s|'t|'re|'ve|'m|'ll|'d)      English contractions
    [^\\r\\n\\p{L}\\p{N}]?\\p{L}+     a run of letters (Chinese too) with the space or sign before it: " the", "(see"
    \\p{N}                            ONE digit: numbers of any length share ten tokens, so sums can be learnt
     ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*    punctuation and symbols, with the line end after them
    \\s*[\\r\\n]+ | \\s+(?!\\S) | \\s+    line ends; white space, leaving the last space to the next word

We keep Qwen's pattern to the letter because it travels: every reader of a Qwen model directory already cuts so. It
runs on the regex engine inside the Rust `tokenizers`, in training, in our Python encoder and in bulk alike: Python's
`re` has no \\p{L}, and any second engine (or Unicode version) would one day cut some text differently.
"""
from __future__ import annotations

import json
from typing import Any

from tokenizers import normalizers, pre_tokenizers

from mindseed.base.errors import UserError
from mindseed.tokenizers.base import require_unicode

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def by_pattern(pattern: str) -> dict[str, Any]:
    """One cutting step, in the words of tokenizer.json."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


class Splitter:
    """A sequence of cutting steps, each in the words of tokenizer.json; the pieces always join to the text.

    `nfc` composes characters first (Unicode NFC), as Qwen's own tokenizers do: then the pieces join to that.
    """

    def __init__(self, steps: tuple[dict[str, Any], ...] = (by_pattern(QWEN),), *, nfc: bool = False) -> None:
        self.steps = steps
        self.nfc = nfc
        self.rust = _pre_tokenizer(steps)
        self._nfc = normalizers.NFC()

    def __call__(self, text: str) -> list[str]:
        if self.nfc:
            text = self._nfc.normalize_str(text)
        try:
            return [piece for piece, _ in self.rust.pre_tokenize_str(text)] if self.steps else [text] * bool(text)
        except UnicodeEncodeError:
            require_unicode(text)
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.steps, self.nfc)


def _restore(steps: tuple[dict[str, Any], ...], nfc: bool) -> Splitter:
    return Splitter(steps, nfc=nfc)


def _pre_tokenizer(steps: tuple[dict[str, Any], ...]) -> pre_tokenizers.PreTokenizer:
    """The Rust object of the steps, made through its own JSON so that we need no constructor for each kind."""
    from tokenizers import Tokenizer

    shell = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []},
             "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}
    try:
        return Tokenizer.from_str(json.dumps(shell)).pre_tokenizer
    except Exception as error:                    # the library raises bare Exceptions for a pattern it cannot read
        raise UserError(f"the pre-tokenizer cannot be built: {error}") from None

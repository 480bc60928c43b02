"""Texts that were there before: the same, or nearly.

The same: equal once case, spacing and width of letters are made one, so only a hash is kept. Nearly: two texts as sets
of pieces of five characters, of which a share is common (Jaccard). MinHash estimates that share from the smallest hash
of each set under many permutations, and LSH finds the few texts worth comparing (Broder, 1997; datasketch does both).
"""
from __future__ import annotations

import hashlib
import unicodedata

from mindseed.base.errors import UserError
from mindseed.base.extras import install

PIECE = 5                                         # characters
PERMUTATIONS = 128


def normal(text: str) -> str:
    """What two spellings of one text have in common."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest(text: str) -> bytes:
    """Equal for equal texts, as `normal` sees them."""
    return hashlib.blake2b(normal(text).encode(errors="surrogatepass"), digest_size=16).digest()


class Seen:
    """`add(text)` says whether a text is new, and remembers it. With `near`, one that shares at least so much of its
    pieces with an earlier one is not."""

    def __init__(self, near: float = 0.0) -> None:
        if not 0 <= near <= 1:
            raise UserError(f"near={near} is a share, from above 0 to 1, or 0 for exact repetitions alone")
        self.exact: set[bytes] = set()
        self.near, self.index = near, None
        if near:
            try:
                from datasketch import MinHash, MinHashLSH
            except ImportError:
                raise UserError(f"finding near duplicates needs datasketch: {install('datasketch')}") from None
            self.MinHash, self.sketches = MinHash, []
            self.index = MinHashLSH(threshold=near, num_perm=PERMUTATIONS)

    def add(self, text: str) -> bool:
        key = digest(text)
        if key in self.exact:
            return False
        if self.index is not None:
            sketch = self.sketch(normal(text))
            if any(sketch.jaccard(self.sketches[i]) >= self.near for i in self.index.query(sketch)):
                return False
            self.index.insert(len(self.sketches), sketch)
            self.sketches.append(sketch)
        self.exact.add(key)
        return True

    def sketch(self, text: str):
        made = self.MinHash(num_perm=PERMUTATIONS, seed=1)
        made.update_batch([text[i:i + PIECE].encode(errors="surrogatepass")
                           for i in range(max(1, len(text) - PIECE + 1))])
        return made

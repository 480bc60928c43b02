"""Learning the merges of byte-pair encoding: count, merge the most frequent pair, repeat.

Done literally, each of thousands of merges would recount the corpus. Three ideas make it a matter of seconds:

1. Merges never cross the pieces that split.py cuts, so the corpus shrinks to a table {distinct piece: count}. Cutting
   is the only pass over the text; it streams, and worker processes share it.
2. After a merge only pairs beside the merged ones change. An index {pair: pieces that hold it} leads straight there.
3. The next most frequent pair comes from a heap. Counts of old pairs only fall, so a stale entry is too high, never
   too low: it is noticed when popped, corrected and pushed back (lazy invalidation).

And one trick for speed in pure Python: a piece is a `str` whose characters are its token ids, chr(id), so that finding
and merging a pair are C-speed `str.split` and `join`. (Ids pass through the surrogate range; such strings are never
encoded.)

The result depends only on the counts: not on the order of texts, nor on the number of workers. Among pairs of equal
count the one with the smallest ids (left, then right) wins, which is also the rule of the Rust `tokenizers` trainer:
on the same counts both learn the same merges, in the same order.
"""
from __future__ import annotations

import heapq
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import islice
from queue import SimpleQueue
from typing import BinaryIO, Callable, Iterable, Iterator

from mindseed.base.errors import UserError
from mindseed.tokenizers.base import MARKUP, SPECIALS
from mindseed.tokenizers.bpe import BPE, BYTE_ORDER
from mindseed.tokenizers.split import Splitter

CHUNK_CHARS = 1 << 20                             # text that travels to a worker at once
Progress = Callable[[str, int, int], None]        # (stage, done, total); total 0: not known


def train(texts: Iterable[str], *, vocab_size: int = 6400, specials: tuple[str, ...] = SPECIALS,
          visible: frozenset[str] = frozenset(MARKUP), splitter: Splitter | None = None, min_count: int = 2,
          workers: int = 1, progress: Progress | None = None) -> BPE:
    """A byte-level BPE of `vocab_size` tokens in all: `specials`, the 256 bytes, and what was learnt.

    Pairs seen fewer than `min_count` times are not merged, so a small corpus yields a smaller vocabulary (see the
    result's `vocab_size`). Memory grows with the distinct pieces: 0.6 GB for 20 MB, half Chinese, half English.
    """
    room = vocab_size - len(specials) - 256
    if room < 0:
        raise UserError(f"vocab_size {vocab_size} is too small: {len(specials)} special tokens and 256 bytes "
                        f"need {vocab_size - room}")
    splitter = splitter or Splitter()
    counts = count_pieces(texts, splitter, workers=workers, progress=progress)
    if not counts:
        raise UserError("there is no text to train the tokenizer on")
    merges = learn_merges(counts, room, first_id=len(specials), min_count=min_count, progress=progress)
    return BPE.from_merges(merges, specials=specials, visible=visible, splitter=splitter)


def learn_merges(counts: Counter[str], new_tokens: int, *, first_id: int = 0, min_count: int = 1,
                 progress: Progress | None = None) -> list[tuple[int, int]]:
    """Merges (left id, right id), the first learnt first, until they made `new_tokens` tokens.

    Ids are those of BPE.from_merges: the bytes in BYTE_ORDER from `first_id`, then new tokens in the order learnt.
    """
    to_char = bytes.maketrans(bytes(BYTE_ORDER), bytes(range(256)))       # byte -> its place in BYTE_ORDER
    shift = {i: chr(first_id + i) for i in range(256)}
    pieces: list[str] = []
    weights: list[int] = []                                               # how often the piece occurs
    for piece, count in counts.items():
        data = piece.encode()
        if len(data) > 1:
            pieces.append(data.translate(to_char).decode("latin-1").translate(shift))
            weights.append(count)

    pair_counts: dict[str, int] = defaultdict(int)                        # a pair is a str of two characters
    where: dict[str, list[int]] = defaultdict(list)                       # pair -> pieces; may hold outdated ones
    for i, (piece, weight) in enumerate(zip(pieces, weights)):
        for pair in map(str.__add__, piece, piece[1:]):
            pair_counts[pair] += weight
            where[pair].append(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]        # code points order pairs by their ids
    heapq.heapify(heap)

    spelled = {chr(first_id + i): bytes([b]) for i, b in enumerate(BYTE_ORDER)}
    known = {token: char for char, token in spelled.items()}
    merges: list[tuple[int, int]] = []
    made = 0
    while made < new_tokens and heap:
        count, pair = heapq.heappop(heap)
        if pair_counts.get(pair, 0) != -count:                            # stale: correct it and look again
            if pair_counts.get(pair, 0) > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        if -count < min_count:
            break
        left, right = pair
        token = spelled[left] + spelled[right]
        new = known.get(token)                                            # the same bytes by another way: same token
        if new is None:
            new = known[token] = chr(first_id + 256 + made)
            spelled[new] = token
            made += 1
        merges.append((ord(left), ord(right)))
        for grown in merge_pair(pair, new, pieces, weights, pair_counts, where):
            heapq.heappush(heap, (-pair_counts[grown], grown))
        if progress and made % 64 == 0:
            progress("merging pairs", made, new_tokens)
    return merges


def merge_pair(pair: str, new: str, pieces: list[str], weights: list[int], pair_counts: dict[str, int],
               where: dict[str, list[int]]) -> set[str]:
    """Replace `pair` by `new` in every piece, keep counts and index true, return the pairs that became more frequent.

    "x pair y" turns the pairs (x, left) and (right, y) into (x, new) and (new, y). Splitting a piece at the pair
    yields what stands between its occurrences: an empty part means that two of them touch.
    """
    left, right = pair
    grown: set[str] = set()
    last = -1
    for i in where.pop(pair):
        if i == last:                                                     # the piece holds the pair several times
            continue
        last = i
        parts = pieces[i].split(pair)
        if len(parts) == 1:                                               # an earlier merge took it away
            continue
        pieces[i] = new.join(parts)
        weight = weights[i]
        gains = []
        if before := parts[0]:
            pair_counts[before[-1] + left] -= weight
            gains.append(before[-1] + new)
        for part in islice(parts, 1, len(parts) - 1):                     # between two occurrences
            if part:
                pair_counts[right + part[0]] -= weight
                pair_counts[part[-1] + left] -= weight
                gains += (new + part[0], part[-1] + new)
            else:
                pair_counts[right + left] -= weight
                gains.append(new + new)
        if after := parts[-1]:
            pair_counts[right + after[0]] -= weight
            gains.append(new + after[0])
        for gain in gains:
            pair_counts[gain] += weight
            where[gain].append(i)
        grown.update(gains)
    pair_counts.pop(pair, None)
    return grown


# ------------------------------------------------------------------------------------------------ counting pieces

def count_pieces(texts: Iterable[str], splitter: Splitter, *, workers: int = 1,
                 progress: Progress | None = None) -> Counter[str]:
    """How often each piece occurs, over all texts, which are read as a stream in chunks of CHUNK_CHARS."""
    total: Counter[str] = Counter()
    done = 0
    with Crew(splitter, workers) as crew, closing(crew.map(chunks(texts))) as answers:
        for counts, chars in answers:
            total.update(counts)
            done += chars
            if progress:
                progress("counting pieces", done, 0)
    return total


def count_chunk(splitter: Splitter, texts: list[str]) -> tuple[Counter[str], int]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(splitter(text))
    return counts, sum(map(len, texts))


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk, chars = [], 0
    for text in texts:
        chunk.append(text)
        chars += len(text)
        if chars >= CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


class Crew:
    """Worker processes that cut chunks of text; none for `workers` 1, then it is done here.

    Each is a fresh interpreter spoken to through pipes, and a thread here waits for it. Unlike multiprocessing's
    spawned processes it never imports the caller's main script, so a script without `if __name__ == "__main__"`
    works too, and unlike forked ones it cannot inherit a lock that a thread of torch happens to hold.
    """

    def __init__(self, splitter: Splitter, workers: int) -> None:
        self.splitter = splitter
        self.workers = workers
        self.idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> Crew:
        if self.workers > 1:
            command = [sys.executable, "-c", "from mindseed.tokenizers.bpe_train import work; work()"]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
            for _ in range(self.workers):
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
                self.processes.append(process)
                self.idle.put(process)
                send(process.stdin, self.splitter)
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.stdin.close()                                         # the worker reads the end and leaves
            process.stdout.close()
            process.wait()

    def map(self, chunks: Iterable[list[str]]) -> Iterator[tuple[Counter[str], int]]:
        """Counts of each chunk, in whatever order they are ready; at most twice as many chunks are in flight as
        there are workers."""
        if self.workers <= 1:
            yield from (count_chunk(self.splitter, chunk) for chunk in chunks)
            return
        with ThreadPoolExecutor(self.workers) as threads:
            running: set[Future] = set()
            for chunk in chunks:
                running.add(threads.submit(self.ask, chunk))
                if len(running) >= 2 * self.workers:
                    ready, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in ready)
            yield from (future.result() for future in running)

    def ask(self, chunk: list[str]) -> tuple[Counter[str], int]:
        process = self.idle.get()
        try:
            send(process.stdin, chunk)
            answer = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise UserError(f"a worker of the tokenizer died (exit code {process.wait()}); its message is above. "
                            "If memory ran out, use fewer workers or fewer max_bytes") from error
        finally:
            self.idle.put(process)
        if isinstance(answer, UserError):
            raise answer
        return answer


def send(pipe: BinaryIO, value: object) -> None:
    pickle.dump(value, pipe)
    pipe.flush()


def work() -> None:
    """The life of a worker: read the splitter, then answer every chunk with its counts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)                          # Ctrl-C is the parent's business
    splitter = pickle.load(sys.stdin.buffer)
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: object = count_chunk(splitter, chunk)
        except UserError as error:
            answer = error
        send(sys.stdout.buffer, answer)

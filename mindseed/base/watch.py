"""No rank waits for ever: when one fails or falls silent, the others end too, and say why.

A collective operation waits for all ranks, and some networks do not notice that one is gone. So every rank has a thread
that writes a heartbeat to the store by which the ranks found each other, listens to that of its neighbour, and looks
whether anybody has left a last word there. Launchers do the same where there is one; this holds without them, and tells
the error where a launcher shows exit codes.
"""
from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as torch_dist

BEAT_S = 2.0
SILENCE_S = 45.0                                  # longer than any operation that holds Python's lock


class Watch(threading.Thread):
    """Started when a process group has been joined; `stop` ends it, with a last word if this rank has failed."""

    def __init__(self, rank: int, world: int, life: str) -> None:
        """`life` is a word that all ranks of this start have in common, and those of an earlier one had not: the store
        outlives a restart."""
        super().__init__(daemon=True, name="watch")
        self.rank, self.world, self.over = rank, world, threading.Event()
        store = torch_dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                    timeout=timedelta(seconds=SILENCE_S))
        self.store = torch_dist.PrefixStore(f"watch-{life}", store)
        self.store.add(f"beat-{rank}", 1)

    def run(self) -> None:
        neighbour, heard, count = (self.rank + 1) % self.world, time.monotonic(), -1
        while not self.over.wait(BEAT_S):
            try:
                self.store.add(f"beat-{self.rank}", 1)
                if self.store.check(["word"]):
                    self.end(self.store.get("word").decode())
                now = self.store.add(f"beat-{neighbour}", 0)
                if now != count or self.store.check([f"done-{neighbour}"]):
                    heard, count = time.monotonic(), now
            except RuntimeError as error:         # the store went with the rank, or the machine, that held it
                if not self.over.is_set():
                    self.end(f"rank 0, or the machine that began the run, is gone ({str(error).splitlines()[0]})")
            if time.monotonic() - heard > SILENCE_S:
                word = f"rank {neighbour} has not been heard of for {SILENCE_S:.0f} seconds"
                self.leave(word)
                self.end(word)

    def leave(self, word: str) -> None:
        """Tell all others why this rank ends; the first word stays."""
        if self.store.add("words", 1) == 1:
            self.store.set("word", word)

    def last_word(self) -> str | None:
        """Why a rank has failed, if it could say so; waits for it for a moment."""
        try:
            for _ in range(10):
                if self.store.check(["word"]):
                    return self.store.get("word").decode()
                time.sleep(BEAT_S / 10)
        except RuntimeError:
            return "rank 0, or the machine that began the run, is gone"
        return None

    def stop(self, word: str | None = None, *, well: bool = True) -> None:
        """`word`: why this rank has failed; `well`: it ends because its work is done."""
        self.over.set()
        try:
            if word is not None:
                self.leave(f"rank {self.rank} failed: {word}")
            self.store.set(f"done-{self.rank}", "1")
            if self.rank == 0:
                self.wait_for_others(well)
        except RuntimeError:
            pass                                  # nobody is left to be told
        self.join(2 * BEAT_S)

    def wait_for_others(self, well: bool) -> None:
        """The store may lie in this process, and who is still at work, or has not heard the last word, needs it."""
        others = [f"done-{rank}" for rank in range(1, self.world)]
        until = time.monotonic() + (SILENCE_S if well else 2 * BEAT_S)
        while not self.store.check(others) and time.monotonic() < until:
            if well and self.store.check(["word"]):                               # somebody has failed
                return
            time.sleep(0.02)

    def end(self, why: str) -> None:
        """End the process from here: its main thread waits for somebody who will not come."""
        if not self.over.is_set():
            print(f"error: {why}; rank {self.rank} ends as well", file=sys.stderr, flush=True)
            os._exit(1)

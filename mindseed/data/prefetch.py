"""Make the next batches while the model computes: a thread in front of any Source.

The stream and its state stay what they were: `state_dict` is that of the last batch handed out, not of the last one
made, so a checkpoint never skips what was waiting. A thread suffices, for filling a batch is copying in numpy.
"""
from __future__ import annotations

import queue
import threading
from typing import Any

from mindseed.core import Batch, Source


class Prefetch:
    """A Source that keeps up to `depth` batches of another one ready. What the other raises, it raises in turn."""

    def __init__(self, source: Source, depth: int = 2) -> None:
        self.source, self.depth = source, depth
        self._state = source.state_dict()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self) -> Batch:
        if self._thread is None:
            self._ready: queue.Queue = queue.Queue(self.depth)
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._fill, args=(self._ready, self._stop), daemon=True)
            self._thread.start()
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch, self._state = item
        return batch

    def _fill(self, ready: queue.Queue, stop: threading.Event) -> None:
        item: Any = None
        while not stop.is_set() and not isinstance(item, BaseException):
            try:
                item = next(self.source), self.source.state_dict()
            except BaseException as error:                # handed over, and raised where the batch is asked for
                item = error
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    pass

    def close(self) -> None:
        """Stop the thread and put the source back to the last batch handed out."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            self.source.load_state_dict(self._state)

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self.source.load_state_dict(state)
        self._state = self.source.state_dict()

    def __getattr__(self, name: str) -> Any:
        """Whatever else the source offers (describe, epoch, ...)."""
        return getattr(self.source, name)

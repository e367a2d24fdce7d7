"""Dynamic batching: requests wait in a queue, and a thread runs as many at once as fit a batch.

The thread never waits for a batch to fill. On an idle server a sample is run the moment it comes; on a busy one the
queue fills while the network runs, and batches grow by themselves. The runtime lets go of the interpreter while it
computes, so the event loop reads the next requests meanwhile.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from espalier.serving.errors import RequestError

Array = NDArray[np.float32]
Waiting = tuple[Array, "asyncio.Future[Array]"]
RETRY_AFTER_S = 1


class Batcher:
    """Runs samples (n, ...) through `run`, which takes and returns arrays of up to `max_batch` rows."""

    def __init__(self, run: Callable[[Array], Array], max_batch: int, queue: int) -> None:
        self.max_batch = max_batch
        self.queue = queue
        self.observe: Callable[[int], None] = lambda size: None  # told the size of every batch
        self._run = run
        self._waiting: deque[Waiting] = deque()
        self._num_waiting = 0  # samples
        self._changed = threading.Condition()
        self._stops = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Samples in the queue."""
        return self._num_waiting

    def submit(self, raw: Array) -> "asyncio.Future[Array]":
        """The rows of `run` for up to `max_batch` samples; a future that was cancelled is not run.

        Raises:
            RequestError: the queue is full.
        """
        future = self._loop.create_future()
        with self._changed:
            if self._num_waiting + len(raw) > self.queue:
                raise RequestError(
                    503, f"overloaded: {self._num_waiting} samples wait, {self.queue} may; try again later"
                )
            self._waiting.append((raw, future))
            self._num_waiting += len(raw)
            self._changed.notify()
        return future

    async def run(self, raw: Array) -> Array:
        """The same for any number of samples, in batches one after the other."""
        parts = [raw[start : start + self.max_batch] for start in range(0, len(raw), self.max_batch)]
        return np.concatenate([await self.submit(part) for part in parts])

    def stop(self) -> None:
        """End the thread after what it was given."""
        with self._changed:
            self._stops = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._stops:
                    self._changed.wait()
                batch = self._take()
                if not batch and self._stops:
                    return
            if not batch:
                continue
            try:
                outcome: Array | Exception = self._run(np.concatenate([raw for raw, _ in batch]))
            except Exception as error:
                outcome = error
            self._loop.call_soon_threadsafe(self._deliver, batch, outcome)

    def _take(self) -> list[Waiting]:
        """As much of the queue as fits a batch, less what nobody waits for any more."""
        batch: list[Waiting] = []
        size = 0
        while self._waiting and size + len(self._waiting[0][0]) <= self.max_batch:
            raw, future = self._waiting.popleft()
            self._num_waiting -= len(raw)
            if not future.done():
                batch.append((raw, future))
                size += len(raw)
        return batch

    def _deliver(self, batch: list[Waiting], outcome: Array | Exception) -> None:
        start = 0
        for raw, future in batch:
            stop = start + len(raw)
            if future.done():  # its client has gone, or would not wait
                pass
            elif isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome[start:stop])
            start = stop
        self.observe(start)

"""Dynamic batching: requests wait in a queue, and a thread runs as many at once as fit a batch.

A batch leaves as soon as the thread is free, it never waits to be full. On an idle server a sample is run the moment
it comes; on a busy one the queue fills while the network runs, and batches grow by themselves. The runtime lets go of
the interpreter while it computes, so the event loop reads the next requests meanwhile. Queue and batches belong to the
event loop alone, so nothing is locked.
"""

import asyncio
import contextlib
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from espalier.serving.errors import RequestError

Row = TypeVar("Row")
Array = NDArray[Any]
RETRY_AFTER_S = 1
LONG = 2  # times the queue: samples that requests of several batches may hold at once
STOP_S = 0.5  # for a batch to end by itself when the server stops, and again once it is interrupted
log = logging.getLogger("espalier.serving")


class Waiter(Protocol[Row]):
    """Receives the rows of one request; an asyncio future is a Waiter."""

    def done(self) -> bool:
        """Return whether the rows are not wanted any more."""

    def set_result(self, rows: list[Row], /) -> None:
        """Take the rows."""

    def set_exception(self, error: Exception, /) -> None:
        """Take the error in place of the rows."""


class Batcher(Generic[Row]):
    """Collects raw samples (n, ...) of requests and calls `run` on up to `max_batch` at once.

    `run` returns one row per sample.
    """

    def __init__(
        self,
        run: Callable[[Array], list[Row]],
        max_batch: int,
        queue: int,
        observe: Callable[[int], None],
        interrupt: Callable[[], None] = lambda: None,
        interrupt_after_s: float = math.inf,
        join: Callable[[Sequence[Array]], Array] = np.concatenate,
    ) -> None:
        """Take `observe`, which is told the size of every batch, and `interrupt`, which makes a slow `run` raise.

        `join` makes one array of those of several requests.
        """
        self.max_batch = max_batch
        self.queue = queue
        self.num_waiting = 0  # samples in the queue
        self._run = run
        self._observe = observe
        self._interrupt = interrupt
        self._join = join
        self._interrupt_after_s = interrupt_after_s
        self._timer: asyncio.TimerHandle | None = None  # of the present batch
        self._num_long = 0  # samples of requests that take several batches
        self._waiting: deque[tuple[Array, Waiter[Row]]] = deque()
        self._is_busy = False
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[list[tuple[Array, Waiter[Row]]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, raw: Array) -> "asyncio.Future[list[Row]]":
        """Queue up to `max_batch` samples and return a future of their rows; cancelled in time, they are not run.

        Raises:
            RequestError: the queue is full.
        """
        future: asyncio.Future[list[Row]] = self._loop.create_future()
        self.enqueue(raw, future)
        return future

    def enqueue(self, raw: Array, waiter: Waiter[Row]) -> None:
        """Queue up to `max_batch` samples; the waiter gets the rows or an error, unless it is done before.

        Raises:
            RequestError: the queue is full.
        """
        if self.num_waiting + len(raw) > self.queue:
            raise RequestError(503, f"overloaded: {self.num_waiting} samples wait of {self.queue} that may; try again")
        self._waiting.append((raw, waiter))
        self.num_waiting += len(raw)
        if not self._is_busy:
            self._is_busy = True
            self._loop.call_soon(self._dispatch)  # after the other requests that came at the same moment

    def rows(self, raw: Array) -> "asyncio.Future[list[Row]]":
        """Run any number of samples, batch after batch, and return a future of their rows.

        Raises:
            RequestError: requests of this kind hold too many samples already.
        """
        if self._num_long and self._num_long + len(raw) > LONG * self.queue:
            raise RequestError(503, f"overloaded: {self._num_long} samples of long requests wait; try again")
        self._num_long += len(raw)
        rows = self._loop.create_task(self._rows(raw))
        rows.add_done_callback(lambda _: self._release(len(raw)))
        return rows

    def stop(self) -> None:
        """End the thread after its present batch, which is interrupted if it takes too long."""
        self._jobs.put(None)
        self._thread.join(STOP_S)
        if self._thread.is_alive():
            self._interrupt()
            self._thread.join(STOP_S)

    async def _rows(self, raw: Array) -> list[Row]:
        parts = [raw[start : start + self.max_batch] for start in range(0, len(raw), self.max_batch)]
        return [row for part in parts for row in await self.submit(part)]

    def _release(self, num_samples: int) -> None:
        self._num_long -= num_samples

    def _dispatch(self) -> None:
        """Give the thread as much of the queue as fits a batch, without samples that nobody waits for any more."""
        batch = []
        size = 0
        while self._waiting and size + len(self._waiting[0][0]) <= self.max_batch:
            raw, waiter = self._waiting.popleft()
            self.num_waiting -= len(raw)
            if not waiter.done():
                batch.append((raw, waiter))
                size += len(raw)
        self._is_busy = bool(batch)
        if batch:
            if self._interrupt_after_s < math.inf:
                self._timer = self._loop.call_later(self._interrupt_after_s, self._give_up)
            self._jobs.put(batch)
            self._observe(size)

    def _give_up(self) -> None:
        """Interrupt the present batch, repeatedly until it ends: the thread may not have begun it."""
        self._interrupt()
        self._timer = self._loop.call_later(STOP_S, self._give_up)

    def _work(self) -> None:
        while (batch := self._jobs.get()) is not None:
            outcome: list[Row] | Exception
            try:
                outcome = self._run(self._join([raw for raw, _ in batch]))
            except Exception as error:
                outcome = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended meanwhile
                self._loop.call_soon_threadsafe(self._deliver, batch, outcome)

    def _deliver(self, batch: list[tuple[Array, Waiter[Row]]], outcome: list[Row] | Exception) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._dispatch()  # first of all: the thread works while the answers are written
        start = 0
        for raw, waiter in batch:
            stop = start + len(raw)
            try:
                if waiter.done():  # its client has gone, or would not wait
                    pass
                elif isinstance(outcome, Exception):
                    waiter.set_exception(outcome)
                else:
                    waiter.set_result(outcome[start:stop])
            except Exception as error:  # the others of the batch get their rows all the same
                log.error("an answer could not be delivered", exc_info=error)
            start = stop

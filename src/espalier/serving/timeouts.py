"""Wait for a result no longer than it is wanted: until the time limit, or until the client leaves."""

import asyncio
from typing import TypeVar

from espalier.serving.body import Receive
from espalier.serving.errors import ClientGoneError, RequestError

T = TypeVar("T")
WATCH_AFTER_S = 0.05  # most requests end before, and are spared the cost of being watched


async def patiently(outcome: "asyncio.Future[T]", receive: Receive, time_limit_s: float) -> T:
    """Wait for the result and return it; cancel it, which takes it out of the queue, if nobody wants it any more.

    Raises:
        RequestError: it took longer than `time_limit_s`.
        ClientGoneError: the client left.
    """
    watch = _Watch(outcome, receive, time_limit_s)
    timer = asyncio.get_running_loop().call_later(min(WATCH_AFTER_S, time_limit_s), watch.start)
    try:
        return await outcome
    except asyncio.CancelledError:
        if watch.reason:
            raise watch.reason from None
        raise
    finally:
        timer.cancel()
        if watch.task:
            watch.task.cancel()


def too_late(time_limit_s: float) -> RequestError:
    """Return the error for a client whose answer did not come in time."""
    return RequestError(504, f"no answer within {time_limit_s:g} s; the server is too busy")


class _Watch:
    def __init__(self, outcome: "asyncio.Future[T]", receive: Receive, time_limit_s: float) -> None:
        self.outcome, self.receive, self.time_limit_s = outcome, receive, time_limit_s
        self.reason: Exception | None = None
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            async with asyncio.timeout(self.time_limit_s):
                while (await self.receive())["type"] != "http.disconnect":
                    pass
            self.reason = ClientGoneError()
        except TimeoutError:
            self.reason = too_late(self.time_limit_s)
        self.outcome.cancel()

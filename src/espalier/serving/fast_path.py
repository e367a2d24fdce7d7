"""A faster way for small JSON requests to `/predict`, around the ASGI application.

uvicorn gives each request a task, an event, messages and lists of headers. An application that reads and writes piece
by piece needs them; here a whole body comes in and one answer goes out. `protocol.py` decides which requests come here,
and hands all others to the ordinary way before anything is answered.
"""

import asyncio
import time
from functools import cache
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from espalier.serving.app import GONE, App, Row
from espalier.serving.errors import RequestError
from espalier.serving.request_parsing import JSON
from espalier.serving.timeouts import too_late

ROUTE = "/predict"


class Quick:
    """A request that waits for its rows in the batcher; uvicorn treats it as a request cycle of its own."""

    message_event = asyncio.Event()  # uvicorn sets it to wake an application; here nobody waits
    response_started = response_complete = disconnected = False

    def __init__(self, protocol: Any, keep_alive: bool) -> None:
        """Take the connection as `protocol`; uvicorn sets `keep_alive` to False when it stops."""
        self.keep_alive = keep_alive
        self._protocol = protocol
        self._app: App = protocol.app
        self._began = time.perf_counter()
        self._timer: asyncio.TimerHandle | None = None

    def start(self, body: bytes) -> bool:
        """Read the samples and queue them; return False if the request must take the ordinary way."""
        loop = self._protocol.loop
        try:
            raw = self._app.intake.at_once(body)
            if raw is None or len(raw) > self._app.batcher.max_batch:
                return False
            self._app.batcher.enqueue(raw, self)
        except RequestError as error:
            loop.call_soon(self.set_exception, error)  # later: uvicorn expects no answer while it reads
            return True
        self._timer = loop.call_later(self._app.settings.time_limit_s, self._too_late)
        return True

    def done(self) -> bool:
        """Return whether nobody waits any more."""
        return self.response_complete or self.disconnected

    def set_result(self, rows: list[Row]) -> None:
        """Answer with predictions."""
        try:
            body = self._app.predictions(rows)
        except Exception as error:
            self.set_exception(error)
            return
        self._answer(200, body)
        self._app.metrics.latency(time.perf_counter() - self._began)

    def set_exception(self, error: Exception) -> None:
        """Answer with the error."""
        if not self.done():
            reply = self._app.failure(ROUTE, error)
            self._answer(reply.status, reply.body)

    def leave(self) -> None:
        """Note that the client has gone; the batcher drops what is not `done`."""
        if not self.done():
            self.disconnected = True
            self._app.metrics.count(ROUTE, GONE)
            self._stop_timer()

    def _too_late(self) -> None:
        self.set_exception(too_late(self._app.settings.time_limit_s))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _answer(self, status: int, body: bytes) -> None:
        protocol = self._protocol
        self.response_started = self.response_complete = True
        self._stop_timer()
        self._app.metrics.count(ROUTE, status)
        head = _head(status) + _lines(protocol.server_state.default_headers)
        if not self.keep_alive:
            head += b"connection: close\r\n"
        if protocol.transport.is_closing():  # the client has just reset it
            return
        protocol.transport.write(b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body))
        if not self.keep_alive:
            protocol.transport.close()
        protocol.on_response_complete()


@cache
def _head(status: int) -> bytes:
    return STATUS_LINE[status] + _lines(App.headers(ROUTE, status, JSON, "POST"))


def _lines(headers: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%s: %s\r\n" % header for header in headers])

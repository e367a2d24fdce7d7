"""HTTP/1.1 by uvicorn, two limits that it lacks, and the choice of the requests that take a shorter way.

The limits are of the size of a head and of the time that a request may take: a client that opens connections and then
sends nothing, or one byte a minute, or headers without end, would otherwise be served for ever. The shorter way is
that of `quick.py`, for requests that come in one piece with nothing unusual in their heads.
"""

import asyncio
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from espalier.serving.intake import JSON
from espalier.serving.quick import ROUTE, Quick

QUICK_URL, QUICK_TYPE = ROUTE.encode(), JSON.encode()
UNUSUAL = frozenset((b"content-encoding", b"expect", b"transfer-encoding", b"upgrade"))
MAX_HEAD_BYTES = 64_000  # of method, path and headers together; uvicorn hands on up to 256 kB at once


class Protocol(HttpToolsProtocol):
    """One connection to an `App`. A request must be whole within the time limit of its settings."""

    def __init__(self, *arguments: Any, **named: Any) -> None:  # uvicorn's, handed through
        super().__init__(*arguments, **named)
        self._head_bytes: int | None = 0  # None while no head is coming in
        self._is_whole = False  # the request that came last
        self._patience: asyncio.TimerHandle | None = None
        self._held: bytes | None = None  # body of a request that may be quick, while it is read
        self._quick: Quick | None = None  # the last one

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._be_patient()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_patience()
        if self._quick is not None:
            self._quick.leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._held is not None:  # the rest comes later
            self._take_ordinary_way()
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, f"the head of a request may have {MAX_HEAD_BYTES} bytes")
        if not self._is_whole and self._patience is None:
            self._be_patient()

    def eof_received(self) -> None:
        if not self._is_whole:
            self._refuse(400, "the request ends before it is whole")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._is_whole = False

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        if self._may_be_quick():
            self._held = b""
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._held is None:
            super().on_body(body)
        else:
            self._held += body

    def on_message_complete(self) -> None:
        if self._held is not None:
            quick = Quick(self, self.parser.should_keep_alive())
            if quick.start(self._held):
                self.cycle = self._quick = quick  # type: ignore[assignment]
                self._held = None
            else:
                self._take_ordinary_way()
        super().on_message_complete()
        self._is_whole = True
        if self._patience is not None:
            self._stop_patience()

    def shutdown(self) -> None:
        self.app.is_stopping = True  # /health says so
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request")

    def _may_be_quick(self) -> bool:
        """Whether the head is that of a usual request for a prediction, and no answer is outstanding before it."""
        if self.url != QUICK_URL or self.parser.get_method() != b"POST" or self.parser.get_http_version() != "1.1":
            return False
        if (self.cycle is not None and not self.cycle.response_complete) or self.flow.write_paused:
            return False
        kind = b""
        for name, value in self.headers:
            if name in UNUSUAL:
                return False
            if name == b"content-type":
                kind = value
        return kind == QUICK_TYPE and not self.transport.is_closing()

    def _take_ordinary_way(self) -> None:
        body, self._held = self._held, None
        super().on_headers_complete()
        if body:
            super().on_body(body)

    def _be_patient(self) -> None:
        limit_s = self.app.settings.time_limit_s
        self._patience = self.loop.call_later(limit_s, self._refuse, 408, f"no whole request within {limit_s:g} s")

    def _stop_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _refuse(self, status: int, message: str) -> None:
        """Answer without the application, and close; where it has answered already, only close."""
        if self.transport.is_closing():
            return
        if self._head_bytes is not None or self._held is not None or not self.cycle.response_started:
            body = orjson.dumps({"error": message})
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
            self.app.metrics.count("other", status)
        self._held = None
        self.transport.close()

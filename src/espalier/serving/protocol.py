"""HTTP/1.1 by uvicorn, and two limits that it lacks: of the size of a head, and of the time that a request may take.

A client that opens connections and then sends nothing, or one byte a minute, or headers without end, would otherwise
be served for ever.
"""

import asyncio
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES = 64_000  # of method, path and headers together; uvicorn hands on up to 256 kB at once


class Protocol(HttpToolsProtocol):
    """One connection to an `App`. A request must be whole within the time limit of its settings."""

    def __init__(self, *arguments: Any, **named: Any) -> None:  # uvicorn's, handed through
        super().__init__(*arguments, **named)
        self._head_bytes: int | None = 0  # None while no head is coming in
        self._is_whole = False  # the request that came last
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._be_patient()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_patience()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
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
        super().on_headers_complete()
        self._head_bytes = None

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_whole = True
        if self._patience is not None:
            self._stop_patience()

    def shutdown(self) -> None:
        self.app.is_stopping = True  # /health says so
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request")

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
        if self._head_bytes is not None or not self.cycle.response_started:
            body = orjson.dumps({"error": message})
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
            self.app.metrics.count("other", status)
        self.transport.close()

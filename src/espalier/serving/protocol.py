"""HTTP/1.1 by uvicorn, and two limits that it lacks: of the size of a head, and of the time that one may take.

A client that opens connections and then sends nothing, or one header a minute, or headers without end, would otherwise
be served for ever.
"""

import asyncio
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES = 64_000  # of method, path and headers together; uvicorn hands on up to 256 kB at once
HEAD_LIMIT_S = 30.0  # for a head to come, and for the rest of a body that was refused already


class Protocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **named: Any) -> None:  # uvicorn's, handed through
        super().__init__(*arguments, **named)
        self._head_bytes: int | None = 0  # None while no head is coming in
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._patience = self.loop.call_later(HEAD_LIMIT_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_patience()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, f"the head of a request may have {MAX_HEAD_BYTES} bytes")
        if self._patience is None and not self._is_serving:
            self._patience = self.loop.call_later(HEAD_LIMIT_S, self._give_up)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._head_bytes = None
        self._stop_patience()

    def shutdown(self) -> None:
        self.app.is_stopping = True  # /health says so
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request")

    @property
    def _is_serving(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _stop_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        if not self._is_serving:
            self._refuse(408, f"no whole request within {HEAD_LIMIT_S:g} s")

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        body = orjson.dumps({"error": message})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

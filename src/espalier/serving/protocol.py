"""HTTP/1.1 by uvicorn, with limits that it lacks, and a faster way for ordinary requests.

The limits are of the size of a head and of the time that a request may take to come and an answer to be read: a client
that opens connections and then sends nothing, or one byte a minute, or headers without end, would otherwise be served
for ever. A request must be meant for us, by its Host, and a client that has ended its side is answered all the same.
The faster way is that of `fast_path.py`, for requests that come in one piece with nothing unusual in their heads.
"""

import asyncio
from typing import Any, NoReturn

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from espalier.serving.fast_path import ROUTE, Quick
from espalier.serving.hosts import Hosts
from espalier.serving.request_parsing import JSON

QUICK_URL, QUICK_TYPE = ROUTE.encode(), JSON.encode()
UNUSUAL = frozenset((b"content-encoding", b"expect", b"transfer-encoding"))
MAX_HEAD_BYTES = 64_000  # of method, path and headers together; uvicorn hands on up to 256 kB at once
END = b"\r\n\r\n"  # of a head
LINGER_S = 1.0  # a connection is read on after a refusal: closed at once, it would be reset and the answer be lost
STOP_S = 0.2  # for requests that are on their way when the server stops
MAX_UNANSWERED = 100  # requests of a connection
TOO_LONG = f"the head of a request may have {MAX_HEAD_BYTES} bytes"
NO_TUNNEL = "this is no proxy: CONNECT is not allowed"


class RefusedError(Exception):
    """Stops the parsing of a request that has been refused already."""


class Protocol(HttpToolsProtocol):
    """One connection to an `App`. A request must be whole within the time limit of its settings."""

    def __init__(self, *arguments: Any, **named: Any) -> None:  # uvicorn's, handed through
        super().__init__(*arguments, **named)
        self._hosts: Hosts = self.app.hosts
        self._head_bytes: int | None = 0  # None while no head is coming in
        self._head_sum = 0  # the same, counted in what the parser has found
        self._is_open = False  # a request has begun that is not whole
        self._has_ended = False  # a request, in the piece that is parsed
        self._num_unanswered = 0  # requests that uvicorn or `Quick` has begun to answer
        self._is_counted = False  # the request that came last is one of them
        self._patience: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None  # runs while the client does not read its answer
        self._held: bytes | None = None  # body of a request that may be quick, while it is read
        self._quick: Quick | None = None  # the last one
        self._refusal: tuple[int, str] | None = None  # comes after the answers that are outstanding
        self._is_over = False  # what else comes is not read
        self._has_eof = False  # the client has ended its side
        self._is_last = False  # the server stops: a request is answered, and the connection closed

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._be_patient()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_patience()
        self.resume_writing()
        if self._quick is not None:
            self._quick.leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            return
        self._unset_keepalive_if_required()
        self._has_ended = False
        if self._head_bytes is not None or not self._is_open:  # else the piece begins with a body
            end = data.find(END)
            if (self._head_bytes or 0) + (len(data) if end < 0 else end) > MAX_HEAD_BYTES:
                self._refuse(431, TOO_LONG)
                return
        self._feed(data)
        if self._held is not None:  # the rest comes later
            self._take_ordinary_way()
        if self._is_open and self._head_bytes is not None and not self._has_ended:
            self._head_bytes += len(data)
        if self._patience is None and not self._is_over and (self._is_open or not self._num_unanswered):
            self._be_patient()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return True, which keeps the connection to the client open, while an answer is outstanding."""
        self._has_eof = True
        if self._is_open and not self._is_over:
            self._refuse(400, "the request ends before it is whole")
        if self._num_unanswered and not self._is_over:
            self.cycle.keep_alive = False
        return bool(self._num_unanswered)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._head_sum = 0
        self._is_open = True
        self._is_counted = False

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._head_sum += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._head_sum += len(name) + len(value) + 4
        if self._head_sum > MAX_HEAD_BYTES:
            self._stop_parsing(431, TOO_LONG)

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        if self.parser.should_upgrade():  # comes again, see `_feed`
            return
        if problem := self._hosts.problem(self.parser.get_http_version(), self.url, self.headers):
            self._stop_parsing(*problem)
        if self._may_be_quick():
            self._held = b""
        else:
            self._begin()

    def on_body(self, body: bytes) -> None:
        if self._held is None:
            super().on_body(body)
        else:
            self._held += body

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        if self._held is not None:
            quick = Quick(self, self.parser.should_keep_alive() and not self._is_last)
            if quick.start(self._held):
                self.cycle = self._quick = quick  # type: ignore[assignment]
                self._held = None
                self._num_unanswered += 1
                self._is_counted = True
            else:
                self._take_ordinary_way()
        super().on_message_complete()
        self._is_open, self._has_ended = False, True
        self._stop_patience()

    def on_response_complete(self) -> None:
        self._num_unanswered -= 1
        super().on_response_complete()
        if self._refusal is not None and not self._num_unanswered:
            self._answer(*self._refusal)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reading is None:
            self._reading = self.loop.call_later(self.app.settings.time_limit_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def shutdown(self) -> None:
        self.app.is_stopping = True  # /health says so
        self._is_last = True
        if self._num_unanswered:
            super().shutdown()
        else:
            self.loop.call_later(STOP_S, self._stop)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request")

    def _feed(self, data: bytes) -> None:
        pieces: list[bytes | memoryview] = [data]
        while pieces and not self._is_over:
            piece = pieces.pop(0)
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as upgrade:
                if self.parser.get_method() == b"CONNECT":
                    self._refuse(405, NO_TUNNEL)
                else:
                    pieces[:0] = [self._without_upgrade(), memoryview(piece)[upgrade.args[0] :]]
            except httptools.HttpParserError:
                if not self._is_over:  # it was the parser that stopped
                    self.send_400_response("")

    def _without_upgrade(self) -> bytes:
        """Return the head of a request without its wish for another protocol, which a server may ignore.

        A new parser reads it again, and the body behind it: the present one takes the body for the other protocol.
        """
        kept = [header for header in self.headers if header[0] not in (b"upgrade", b"connection")]
        wishes = b",".join(value.lower() for name, value in self.headers if name == b"connection")
        if b"close" in map(bytes.strip, wishes.split(b",")):
            kept.append((b"connection", b"close"))
        first = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return b"\r\n".join([first, *map(b": ".join, kept)]) + END

    def _may_be_quick(self) -> bool:
        """Return whether this is a usual prediction request and all earlier ones of the connection are answered."""
        if self.url != QUICK_URL or self.parser.get_method() != b"POST" or self.parser.get_http_version() != "1.1":
            return False
        if self._num_unanswered or self.flow.write_paused:
            return False
        kind = b""
        for name, value in self.headers:
            if name in UNUSUAL:
                return False
            if name == b"content-type":
                kind = value
        return kind == QUICK_TYPE and not self.transport.is_closing()

    def _begin(self) -> None:
        """Let uvicorn answer the request whose head has come."""
        if self._num_unanswered == MAX_UNANSWERED:
            self._stop_parsing(429, f"more than {MAX_UNANSWERED} requests before their answers")
        super().on_headers_complete()
        self._num_unanswered += 1
        self._is_counted = True
        if self._is_last:
            self.cycle.keep_alive = False

    def _take_ordinary_way(self) -> None:
        body, self._held = self._held, None
        self._begin()
        if body:
            super().on_body(body)

    def _be_patient(self) -> None:
        limit_s = self.app.settings.time_limit_s
        self._patience = self.loop.call_later(limit_s, self._refuse, 408, f"no whole request within {limit_s:g} s")

    def _stop_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _stop(self) -> None:
        """Close a connection without an open request, as the server stops."""
        if self._is_open and not self._is_over and not self._num_unanswered:
            self._refuse(503, "the server stops")
        elif not self._is_over and not self._num_unanswered:
            self.transport.close()

    def _stop_parsing(self, status: int, message: str) -> NoReturn:
        self._refuse(status, message)
        raise RefusedError

    def _refuse(self, status: int, message: str) -> None:
        """Refuse the incoming request without the application, after the answers before it, and close.

        If the application has begun to answer it, only close.
        """
        self._is_over = True
        self._held = None
        self._stop_patience()
        if self._is_counted and self._is_open:
            if self.pipeline and self.pipeline[0][0] is self.cycle:  # the last one stands first
                self.pipeline.popleft()
                self._num_unanswered -= 1
            elif self.cycle.response_started:
                self._close_soon()
                return
            else:  # its application waits for the rest, in vain
                self._num_unanswered -= 1
                self.cycle.disconnected = True
                self.cycle.message_event.set()
        if self._num_unanswered:
            self._refusal = status, message
        else:
            self._answer(status, message)

    def _answer(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        body = orjson.dumps({"error": message})
        head = [b"content-type: application/json", b"content-length: %d" % len(body), b"connection: close"]
        if status == 405:
            head.append(b"allow: GET, HEAD, POST")
        self.transport.write(STATUS_LINE[status] + b"\r\n".join(head) + END + body)
        self.app.metrics.count("other", status)
        self._close_soon()

    def _close_soon(self) -> None:
        """Close when the client does, or after `LINGER_S`."""
        if self._has_eof or self.transport.is_closing() or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self.flow.resume_reading()
        self._stop_patience()
        self._patience = self.loop.call_later(LINGER_S, self.transport.close)

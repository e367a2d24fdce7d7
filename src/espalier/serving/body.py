"""The body of a request, read within a limit of bytes, whatever the client claims; `protocol.py` limits its time."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from espalier.serving.errors import ClientGoneError, RequestError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
BODIES = 8  # of the largest allowed size, that may be held at once while they come in


class BodyReader:
    """Reads bodies of up to `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._held_bytes = 0  # of bodies that are not whole yet

    async def read(self, declared: bytes, receive: Receive) -> bytes:
        """The whole body; `declared` is the header `content-length`, empty where there is none.

        Raises:
            RequestError: it is too long (413), or too many others are coming in (503).
            ClientGoneError: the connection broke.
        """
        if declared and int(declared) > self.max_bytes:
            raise self._too_long(f"{int(declared)} bytes")
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body: bytes = message["body"]
        if message["more_body"]:
            return await self._rest(body, receive)
        if len(body) > self.max_bytes:
            raise self._too_long("more")
        return body

    async def _rest(self, start: bytes, receive: Receive) -> bytes:
        parts, size, more = [start], len(start), True
        self._held_bytes += size
        try:
            while more:
                if size > self.max_bytes:
                    raise self._too_long("more")
                if self._held_bytes > BODIES * self.max_bytes:
                    raise RequestError(503, "overloaded: too many long bodies come in at once; try again later")
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                part, more = message["body"], message["more_body"]
                parts.append(part)
                size += len(part)
                self._held_bytes += len(part)
            if size > self.max_bytes:
                raise self._too_long("more")
            return b"".join(parts)
        finally:
            self._held_bytes -= size

    def _too_long(self, given: str) -> RequestError:
        return RequestError(
            413, f"the body has {given}, a request may have {self.max_bytes}; send fewer samples at a time"
        )

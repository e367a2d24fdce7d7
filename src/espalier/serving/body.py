"""Read the body of a request within a limit of bytes, whatever the client claims; `protocol.py` limits its time."""

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from espalier.serving.errors import ClientGoneError, RequestError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
BODIES = 8  # of the largest allowed size, that may be held at once while they come in


class BodyReader:
    """Reads bodies of up to `max_bytes` each, and of `BODIES` times as much together."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._held_bytes = 0  # of bodies that come in, and of whole ones that are not samples yet

    @asynccontextmanager
    async def body(self, declared: bytes, receive: Receive) -> AsyncIterator[bytes]:
        """Read a whole body; it counts as held until the block ends.

        `declared` is the header `content-length`, empty if there is none.

        Raises:
            RequestError: it is too long (413), or too many others are held (503).
            ClientGoneError: the connection broke.
        """
        if declared and int(declared) > self.max_bytes:
            raise self._too_long(f"{int(declared)} bytes")
        parts: list[bytes] = []
        size, more = 0, True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                part, more = message["body"], message["more_body"]
                parts.append(part)
                size += len(part)
                self._held_bytes += len(part)
                if size > self.max_bytes:
                    raise self._too_long("more")
                if self._held_bytes > BODIES * self.max_bytes:
                    raise RequestError(503, "overloaded: too many long bodies come in at once; try again later")
            whole = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            yield whole
        finally:
            self._held_bytes -= size

    def _too_long(self, given: str) -> RequestError:
        return RequestError(
            413, f"the body has {given}, a request may have {self.max_bytes}; send fewer samples at a time"
        )

"""Turn a request into raw samples: content type, limits, and which work goes to a thread.

Letters: B batch.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from espalier.serving import inputs
from espalier.serving.body import BodyReader, Message, Receive
from espalier.serving.errors import RequestError
from espalier.serving.inputs import Raw
from espalier.serving.settings import Settings
from espalier.serving.timeouts import too_late
from espalier.spec import DataSpec

T = TypeVar("T")
JSON = "application/json"
FORM = "multipart/form-data"
TYPES = frozenset({JSON, FORM, *inputs.PICTURE_TYPES})
SMALL_BYTES = 100_000  # up to here JSON is parsed in a millisecond, and a detour through a thread takes longer
NUM_THREADS = 2


class Intake:
    """Reads the samples in requests, for a network of one spec."""

    def __init__(self, spec: DataSpec, settings: Settings) -> None:
        self.spec = spec
        self.most = settings.queue  # samples: a request with more could never be accepted
        self.time_limit_s = settings.time_limit_s
        self.max_bytes = int(settings.max_body_mb * 1e6)
        self._reader = BodyReader(self.max_bytes)
        # pictures have threads of their own, so that large ones do not hold up numbers
        self._turns = [asyncio.Semaphore(NUM_THREADS) for _ in range(2)]
        self._threads = [ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="intake") for _ in range(2)]

    async def samples(self, scope: Message, receive: Receive) -> Raw:
        """Return raw samples (B, *shape), whether they come as JSON, as a form or as a picture file.

        Raises:
            RequestError: the body is of another type, damaged, or too large.
            ClientGoneError: the connection broke.
        """
        kind = length = b""
        for name, value in scope["headers"]:
            if name == b"content-type":
                kind = value
            elif name == b"content-length":
                length = value
            elif name == b"content-encoding" and value.lower() != b"identity":
                raise RequestError(415, "the body is compressed; send it as it is, without content-encoding")
        mime = kind.partition(b";")[0].strip().lower().decode("latin-1")
        if mime not in TYPES:
            raise RequestError(415, f"content type {mime[:50]!r}; allowed are {', '.join(sorted(TYPES))}")
        async with self._reader.body(length, receive) as body:
            if mime == JSON and len(body) <= SMALL_BYTES:
                raw = self.at_once(body)
                if raw is not None:
                    return raw
            has_pictures = mime != JSON or body.count(b"{") > 1
            return await self.aside(self._parse, mime, kind, body, lane=int(has_pictures))

    def at_once(self, body: bytes) -> Raw | None:
        """Return raw samples of a JSON body that can be read in less than a millisecond, or None for another body.

        Raises:
            RequestError: the body is damaged, or holds too many samples.
        """
        if len(body) > min(SMALL_BYTES, self.max_bytes):
            return None
        items = inputs.from_json(body)
        inputs.require_count(len(items), self.most)
        return None if inputs.has_pictures(items) else inputs.arrays(self.spec, items)

    def stop(self) -> None:
        """Tell the threads to end after their present work, without waiting for them."""
        for threads in self._threads:
            threads.shutdown(wait=False, cancel_futures=True)

    async def aside(self, function: Callable[..., T], *arguments: Any, lane: int = 0) -> T:
        """Run a function in a thread, so that short requests do not wait for long ones.

        No more than `NUM_THREADS` results exist before they are taken: what waits is a body, not its objects.

        Raises:
            RequestError: it took longer than the time limit.
        """
        try:
            async with asyncio.timeout(self.time_limit_s), self._turns[lane]:
                return await asyncio.get_running_loop().run_in_executor(self._threads[lane], function, *arguments)
        except TimeoutError:
            raise too_late(self.time_limit_s) from None

    def _parse(self, mime: str, kind: bytes, body: bytes) -> Raw:
        if mime == FORM:
            return inputs.pictures(self.spec, inputs.form(kind, body, self.most))
        if mime != JSON:
            return inputs.pictures(self.spec, [body])
        inputs.require_parts(self.spec, body, self.most)
        items = inputs.from_json(body)
        inputs.require_count(len(items), self.most)
        return (inputs.mixed if inputs.has_pictures(items) else inputs.arrays)(self.spec, items)

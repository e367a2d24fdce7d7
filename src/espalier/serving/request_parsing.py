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
from espalier.serving.texts import Texts
from espalier.serving.timeouts import too_late
from espalier.spec import DataSpec

T = TypeVar("T")
JSON = "application/json"
FORM = "multipart/form-data"
TYPES = frozenset({JSON, FORM, *inputs.PICTURE_TYPES})
SMALL_BYTES = 100_000  # up to here JSON is parsed in a millisecond, and a detour through a thread takes longer
SMALL_TEXT_BYTES = 5_000  # and up to here texts are cut into tokens
NUM_THREADS = 2


class Intake:
    """Reads the samples in requests, for a network of one spec."""

    def __init__(self, spec: DataSpec, settings: Settings) -> None:
        self.spec = spec
        self.texts = Texts(spec) if spec.input.is_tokens else None
        self._small_bytes = SMALL_TEXT_BYTES if self.texts else SMALL_BYTES
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
        return await self._read(scope, receive, self._raw)

    async def text(self, scope: Message, receive: Receive) -> str:
        """Return the beginning of the only text of a request, as much as the network reads.

        Raises:
            RequestError: there are several, or the body is of another type, damaged, or too large.
            ClientGoneError: the connection broke.
        """
        assert self.texts is not None
        texts = await self._read(scope, receive, self.texts.read)
        require_one(len(texts))
        return texts[0]

    async def _read(self, scope: Message, receive: Receive, finish: Callable[[list[Any]], T]) -> T:
        """Return what `finish` makes of the items of a JSON body, or raw samples of a form or a picture file."""
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
            if mime == JSON and len(body) <= self._small_bytes:
                found = self._at_once(body, finish)
                if found is not None:
                    return found
            has_pictures = not self.texts and (mime != JSON or body.count(b"{") > 1)
            return await self.aside(self._parse, mime, kind, body, finish, lane=int(has_pictures))

    def at_once(self, body: bytes) -> Raw | None:
        """Return raw samples of a JSON body that can be read in less than a millisecond, or None for another body.

        Raises:
            RequestError: the body is damaged, or holds too many samples.
        """
        return self._at_once(body, self._raw)

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

    def _at_once(self, body: bytes, finish: Callable[[list[Any]], T]) -> T | None:
        if len(body) > min(self._small_bytes, self.max_bytes):
            return None
        items = inputs.from_json(body)
        inputs.require_count(len(items), self.most)
        return None if inputs.has_pictures(items) and not self.texts else finish(items)

    def _parse(self, mime: str, kind: bytes, body: bytes, finish: Callable[[list[Any]], Any]) -> Any:
        if mime == FORM:
            return inputs.pictures(self.spec, inputs.form(kind, body, self.most))
        if mime != JSON:
            return inputs.pictures(self.spec, [body])
        if self.texts:
            self.texts.require_parts(body, self.most)
        else:
            inputs.require_parts(self.spec, body, self.most)
        items = inputs.from_json(body)
        inputs.require_count(len(items), self.most)
        return finish(items)

    def _raw(self, items: list[Any]) -> Raw:
        if self.texts:
            return self.texts.ids(items)
        return (inputs.mixed if inputs.has_pictures(items) else inputs.arrays)(self.spec, items)


def require_one(num_samples: int) -> None:
    """Raise `RequestError` unless there is one sample."""
    if num_samples != 1:
        raise RequestError(422, f"{num_samples} samples in the request; /explain takes one")

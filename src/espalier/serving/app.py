"""The HTTP interface of a bundle, as an ASGI application: eight routes, and JSON for every answer and every error.

A dictionary is the router: a framework would cost more time per request than the network of a small picture.
Letters: B batch, K classes.
"""

import asyncio
import base64
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image

from espalier.serving import inputs, occlusion
from espalier.serving.batcher import RETRY_AFTER_S, Batcher
from espalier.serving.body import BodyReader, Message, Receive
from espalier.serving.metrics import CONTENT_TYPE, Metrics
from espalier.serving.predictor import Predictor
from espalier.serving.refused import ClientGone, Refused
from espalier.serving.settings import Settings

Scope = Message
Send = Callable[[Message], Awaitable[None]]
Array = NDArray[np.float32]

JSON = "application/json"
PAGE = {"/": ("index.html", "text/html"), "/style.css": ("style.css", "text/css"), "/script.js": ("script.js", "text/javascript")}
PUBLIC = ("name", "run", "data", "preprocessing", "precision", "sample_by_sample", "formats", "files", "versions")
DIGITS = 6  # of a probability
SMALL_BYTES = 100_000  # up to here JSON is parsed in a millisecond, and a detour through a thread takes longer
WATCH_AFTER_S = 0.05  # from when on a request is watched for its time limit and for a client that leaves
DECODERS = 2  # threads that decode pictures
GONE = 499  # how the metrics count clients that left
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'"),
)
log = logging.getLogger("espalier.serving")


class Reply(NamedTuple):
    """What a route answers."""

    status: int
    kind: str  # content type
    body: bytes


class App:
    """One worker: its network, its queue, its routes."""

    def __init__(self, settings: Settings, ready: str) -> None:
        """`ready` is printed once requests can be answered."""
        self.settings = settings
        self.is_stopping = False
        self._ready = ready
        self._reader = BodyReader(int(settings.max_body_mb * 1e6), settings.time_limit_s)
        self._threads = ThreadPoolExecutor(DECODERS, thread_name_prefix="decoder")
        self._routes: dict[str, tuple[str, Callable[[Scope, Receive], Awaitable[Reply]]]] = {
            "/predict": ("POST", self.predict),
            "/explain": ("POST", self.explain),
            "/health": ("GET", self.health),
            "/info": ("GET", self.info),
            "/metrics": ("GET", self.metrics_text),
            **{path: ("GET", partial(self.page, path)) for path in PAGE},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or start and stop."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        route = scope["path"]
        method, answer = self._routes.get(route, ("", None))
        retry: tuple[tuple[bytes, bytes], ...] = ()
        try:
            if answer is None:
                raise Refused(404, f"there is nothing here; the routes are {', '.join(self._routes)}")
            if scope["method"] != method and (scope["method"], method) != ("HEAD", "GET"):
                raise Refused(405, f"{route} takes {method}")
            reply = await answer(scope, receive)
        except Refused as refusal:
            reply = Reply(refusal.status, JSON, orjson.dumps({"error": refusal.message}))
            if refusal.status == 405:
                retry = ((b"allow", method.encode()),)
            if refusal.status == 503:
                retry = ((b"retry-after", str(RETRY_AFTER_S).encode()),)
        except ClientGone:
            self.metrics.count(route, GONE)
            return
        except Exception:
            log.exception("%s failed", route)
            reply = Reply(500, JSON, b'{"error":"the server failed; its log says why"}')
        self.metrics.count(route if answer else "other", reply.status)
        headers = [(b"content-type", reply.kind.encode()), (b"content-length", str(len(reply.body)).encode()), *HEADERS]
        await send({"type": "http.response.start", "status": reply.status, "headers": [*headers, *retry]})
        await send({"type": "http.response.body", "body": reply.body})

    async def predict(self, scope: Scope, receive: Receive) -> Reply:
        """Label and probabilities of each sample; of a regression its value."""
        raw = await self._samples(scope, receive)
        began = time.perf_counter()
        if len(raw) <= self.batcher.max_batch:
            outcome = self.batcher.submit(raw)
        else:
            outcome = asyncio.ensure_future(self.batcher.run(raw))
        values_BK = await self._patiently(outcome, receive)
        reply = Reply(200, JSON, orjson.dumps({"predictions": self._described(values_BK)}))
        self.metrics.latency(time.perf_counter() - began)
        return reply

    async def explain(self, scope: Scope, receive: Receive) -> Reply:
        """The prediction of one sample, and how far its output falls where a part of the sample is covered."""
        raw = await self._samples(scope, receive)
        if len(raw) != 1:
            raise Refused(422, f"{len(raw)} samples; /explain takes one")
        copies, masks = occlusion.covered(self.predictor.spec, raw[0])
        outcome = asyncio.ensure_future(self.batcher.run(np.concatenate([raw, copies])))
        values_NK = await self._patiently(outcome, receive)
        [prediction] = self._described(values_NK[:1])
        place = int(values_NK[0].argmax())
        heat = occlusion.heat(values_NK[0, place] - values_NK[1:, place], masks)
        rounded = np.round(heat.astype(np.float64), DIGITS).tolist()
        content = {"prediction": prediction, "heat_map": rounded, "image": self._seen(raw[0])}
        return Reply(200, JSON, orjson.dumps(content))

    async def health(self, scope: Scope, receive: Receive) -> Reply:
        """200 while it takes requests."""
        if self.is_stopping:
            raise Refused(503, "the server stops; it finishes what it has accepted")
        return Reply(200, JSON, b'{"status":"ok"}')

    async def info(self, scope: Scope, receive: Receive) -> Reply:
        """What is served: shapes, classes, files with their sha256, parity, versions; no path of this machine."""
        content = self.predictor.bundle.content
        limits = {"samples": self.settings.queue, "body_bytes": self._reader.max_bytes}
        return Reply(200, JSON, orjson.dumps({key: content.get(key) for key in PUBLIC} | {"limits": limits}))

    async def metrics_text(self, scope: Scope, receive: Receive) -> Reply:
        """Numbers for Prometheus."""
        return Reply(200, CONTENT_TYPE, self.metrics.text())

    async def page(self, path: str, scope: Scope, receive: Receive) -> Reply:
        """The web page."""
        _, kind = PAGE[path]
        return Reply(200, f"{kind}; charset=utf-8", self._page[path])

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self.predictor = Predictor(self.settings.bundle, self.settings.threads)
        self.batcher = Batcher(self.predictor.predict, self.settings.max_batch, self.settings.queue)
        self.metrics = Metrics(lambda: self.batcher.num_waiting)
        self.batcher.observe = self.metrics.batch
        folder = Path(__file__).parent / "page"
        self._page = {path: (folder / name).read_bytes() for path, (name, _) in PAGE.items()}
        await send({"type": "lifespan.startup.complete"})
        print(self._ready, flush=True)
        await receive()
        self.batcher.stop()
        self._threads.shutdown(cancel_futures=True)
        await send({"type": "lifespan.shutdown.complete"})

    async def _samples(self, scope: Scope, receive: Receive) -> Array:
        """Raw samples (B, *shape) of a request, in whichever form it brings them."""
        kind = length = b""
        for name, value in scope["headers"]:
            if name == b"content-type":
                kind = value
            elif name == b"content-length":
                length = value
            elif name == b"content-encoding" and value != b"identity":
                raise Refused(415, "a compressed body; send it as it is, without content-encoding")
        mime = kind.partition(b";")[0].strip().lower().decode("latin-1")
        if mime not in (JSON, "multipart/form-data") and mime not in inputs.PICTURE_TYPES:
            raise Refused(
                415, f"content type {mime[:50]!r}; allowed are {JSON}, multipart/form-data, image/png and image/jpeg"
            )
        body = await self._reader.read(length, receive)
        spec, most = self.predictor.spec, self.settings.queue
        if mime == JSON:
            items = inputs.from_json(body) if len(body) <= SMALL_BYTES else await self._aside(inputs.from_json, body)
            inputs.require_count(len(items), most)
            if inputs.has_pictures(items):
                return await self._aside(inputs.mixed, spec, items)
            if len(body) <= SMALL_BYTES:
                return inputs.arrays(spec, items)
            return await self._aside(inputs.arrays, spec, items)
        files = [body] if mime in inputs.PICTURE_TYPES else await self._aside(inputs.form, kind, body, most)
        return await self._aside(inputs.pictures, spec, files)

    async def _aside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run in a thread, so that short requests do not wait for long ones."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def _patiently(self, outcome: "asyncio.Future[Array]", receive: Receive) -> Array:
        """The outcome, unless it takes too long or the client leaves; finite, or refused."""
        watch = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._watch, outcome, receive)
        try:
            values_BK = await outcome
        finally:
            watch.cancel()
        if not np.isfinite(values_BK).all():
            raise Refused(422, "the network's output is not finite for this input; its numbers are out of all proportion")
        return values_BK

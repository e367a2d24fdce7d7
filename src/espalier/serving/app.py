"""The HTTP interface of a bundle, as an ASGI application: eight routes, and JSON for every answer and every error.

A dictionary is the router: a framework would cost more time per request than the network of a small picture.
Letters: B batch, K classes.
"""

import asyncio
import base64
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image

from espalier.data import tokens
from espalier.serving import occlusion
from espalier.serving.batcher import RETRY_AFTER_S, Batcher
from espalier.serving.body import Message, Receive
from espalier.serving.errors import ClientGoneError, RequestError
from espalier.serving.hosts import Hosts
from espalier.serving.metrics import CONTENT_TYPE, Metrics
from espalier.serving.predictor import Predictor
from espalier.serving.request_parsing import JSON, Intake, require_one
from espalier.serving.settings import Settings
from espalier.serving.timeouts import patiently

Scope = Message
Send = Callable[[Message], Awaitable[None]]
Array = NDArray[Any]

PAGE = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/script.js": ("script.js", "text/javascript"),
}
INTERRUPT_S = 0.1  # after the time limit, when nobody waits any more, a network that still computes is stopped
LEAVE_S = 2.0  # after the last answer, the process ends whatever still runs in it
SWITCH_S = 5e-5  # after which a thread gets the interpreter; with Python's 5 ms a batch waits for answers to be written
DIGITS = 9  # behind the point: float32 has no more
GONE = 499  # how the metrics count clients that left
NOT_SNIFFED = (b"x-content-type-options", b"nosniff")
PAGE_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'",
    ),
]
log = logging.getLogger("espalier.serving")
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # what is wrong with a form, its client is told


class Reply(NamedTuple):
    """The answer of a route: status, content type and body."""

    status: int
    kind: str  # content type
    body: bytes


Covered = tuple[NDArray[np.bool_], Array, dict[str, Any]]  # masks, the sample and its covered copies, what is shown


class Row(NamedTuple):
    """The answer of the network for one sample."""

    values: list[float]  # K probabilities, or the one value of a regression
    best: int  # place of the largest
    is_finite: bool


def leave_soon() -> None:
    """End the process with exit code 0 after `LEAVE_S`, whatever its threads do then."""

    def leave() -> None:
        time.sleep(LEAVE_S)
        os._exit(0)

    threading.Thread(target=leave, name="leave", daemon=True).start()


class App:
    """The application of one worker: its network, its queue, its routes."""

    def __init__(self, settings: Settings, ready: str, at_end: Callable[[], None] = lambda: None) -> None:
        """Take `ready`, the line printed once requests can be answered, and `at_end`, called when all of them are."""
        self.settings = settings
        self.hosts = Hosts(settings.host, settings.hosts)
        self.is_stopping = False
        self._ready = ready
        self._at_end = at_end
        self._routes: dict[str, tuple[str, Callable[[Scope, Receive], Awaitable[Reply]]]] = {
            "/predict": ("POST", self.predict),
            "/explain": ("POST", self.explain),
            "/health": ("GET", self.health),
            "/info": ("GET", self.info),
            "/metrics": ("GET", self.metrics_text),
            **{path: ("GET", partial(self.page, path)) for path in PAGE},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or handle the start or stop of the server."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        route = scope["path"]
        method, answer = self._routes.get(route, ("", None))
        try:
            if answer is None:
                raise RequestError(404, f"there is nothing here; the routes are {', '.join(self._routes)}")
            if scope["method"] != method and (scope["method"], method) != ("HEAD", "GET"):
                raise RequestError(405, f"{route} takes {method}")
            reply = await answer(scope, receive)
        except ClientGoneError:
            self.metrics.count(route, GONE)
            return
        except Exception as error:
            reply = self.failure(route, error)
        self.metrics.count(route if answer else "other", reply.status)
        headers = [(b"content-length", b"%d" % len(reply.body)), *self.headers(route, reply.status, reply.kind, method)]
        with contextlib.suppress(RuntimeError):  # of a transport that the client has just reset
            await send({"type": "http.response.start", "status": reply.status, "headers": headers})
            await send({"type": "http.response.body", "body": reply.body})

    @staticmethod
    def headers(route: str, status: int, kind: str, method: str) -> list[tuple[bytes, bytes]]:
        """Return the headers of an answer except its length; `kind` is its content type, `method` the one allowed."""
        headers = [(b"content-type", kind.encode()), NOT_SNIFFED]
        if status == 405:
            headers.append((b"allow", method.encode()))
        elif status == 503:
            headers.append((b"retry-after", b"%d" % RETRY_AFTER_S))
        elif route in PAGE:
            headers += PAGE_HEADERS
        return headers

    def failure(self, route: str, error: Exception) -> Reply:
        """Return the answer to an error; errors of the server itself go to its log."""
        if isinstance(error, RequestError):
            return Reply(error.status, JSON, orjson.dumps({"error": error.message}))
        log.error("%s failed", route, exc_info=error)
        return Reply(500, JSON, b'{"error":"the server failed; its log says why"}')

    async def predict(self, scope: Scope, receive: Receive) -> Reply:
        """Answer with label and probabilities of each sample, or with its value for a regression."""
        raw = await self.intake.samples(scope, receive)
        began = time.perf_counter()
        rows = await patiently(self._outcome(raw), receive, self.settings.time_limit_s)
        reply = Reply(200, JSON, self.predictions(rows))
        self.metrics.latency(time.perf_counter() - began)
        return reply

    def predictions(self, rows: list[Row]) -> bytes:
        """Return the body of an answer to /predict.

        Raises:
            RequestError: an output is not finite.
        """
        return orjson.dumps({"predictions": [self._described(row) for row in rows]})

    async def explain(self, scope: Scope, receive: Receive) -> Reply:
        """Answer with the prediction of one sample, and how far its output falls when a part of it is covered."""
        if self.intake.texts:
            masks, samples, shown = await self.intake.aside(self._covered_text, await self.intake.text(scope, receive))
        else:
            raw = await self.intake.samples(scope, receive)
            require_one(len(raw))
            masks, samples, shown = await self.intake.aside(self._covered, raw)
        row, *others = await patiently(self._outcome(samples), receive, self.settings.time_limit_s)
        prediction = self._described(row)
        drops = np.array([row.values[row.best] - other.values[row.best] for other in others], dtype=np.float32)
        heat = np.round(occlusion.heat(drops, masks).astype(np.float64), DIGITS).tolist()
        return Reply(200, JSON, orjson.dumps({"prediction": prediction, "heat_map": heat, **shown}))

    async def health(self, scope: Scope, receive: Receive) -> Reply:
        """Answer 200 while the server takes requests, 503 once it stops."""
        if self.is_stopping:
            raise RequestError(503, "the server stops; it finishes what it has accepted")
        return Reply(200, JSON, b'{"status":"ok"}')

    async def info(self, scope: Scope, receive: Receive) -> Reply:
        """Answer with what is served: shapes, classes, files with their sha256, parity, versions; no local path."""
        limits = {"samples": self.settings.queue, "body_bytes": self.intake.max_bytes}
        return Reply(200, JSON, orjson.dumps(self.predictor.public | {"limits": limits}))

    async def metrics_text(self, scope: Scope, receive: Receive) -> Reply:
        """Answer with the metrics in the format of Prometheus."""
        return Reply(200, CONTENT_TYPE, self.metrics.text())

    async def page(self, path: str, scope: Scope, receive: Receive) -> Reply:
        """Answer with the web page."""
        _, kind = PAGE[path]
        return Reply(200, f"{kind}; charset=utf-8", self._page[path])

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        sys.setswitchinterval(SWITCH_S)
        limit_s = self.settings.time_limit_s
        self.predictor = Predictor(self.settings.bundle, self.settings.threads, limit_s)
        self.intake = Intake(self.predictor.spec, self.settings)
        self.metrics = Metrics(lambda: self.batcher.num_waiting)
        self.batcher = Batcher(
            self._rows,
            self.settings.max_batch,
            self.settings.queue,
            self.metrics.batch,
            self.predictor.interrupt,
            limit_s + INTERRUPT_S,
            tokens.joined if self.intake.texts else np.concatenate,
        )
        folder = Path(__file__).parent / "page"
        self._page = {path: (folder / name).read_bytes() for path, (name, _) in PAGE.items()}
        await send({"type": "lifespan.startup.complete"})
        print(self._ready, flush=True)
        await receive()
        self._at_end()
        self.batcher.stop()
        self.intake.stop()
        await send({"type": "lifespan.shutdown.complete"})

    def _outcome(self, raw: Array) -> "asyncio.Future[list[Row]]":
        if len(raw) <= self.batcher.max_batch:
            return self.batcher.submit(raw)
        return self.batcher.rows(raw)

    def _covered(self, raw: Array) -> Covered:
        """Return what /explain needs for a sample (1, ...)."""
        copies, masks = occlusion.covered(self.predictor.spec, raw[0])
        return masks, np.concatenate([raw, copies]), {"image": self._picture(raw[0])}

    def _covered_text(self, text: str) -> Covered:
        """Return what /explain needs for a text."""
        assert self.intake.texts is not None
        ids = self.intake.texts.ids([text])
        copies, masks = occlusion.covered(self.predictor.spec, ids[0])
        words = self.intake.texts.pieces(text)
        num_read = min(len(words), self.intake.texts.longest)
        masks = masks[:num_read, :num_read]  # none of an empty text
        return (
            masks,
            np.concatenate([ids, copies[:num_read]]),
            {
                "tokens": words[: len(masks)],
                "num_not_covered": num_read - len(masks),
                "is_cut_off": len(words) > num_read,
            },
        )

    def _rows(self, raw: Array) -> list[Row]:
        """Return the rows of a batch, with everything done that can be done for a whole batch.

        This runs in the thread of the batcher.
        """
        values_BK = self.predictor.predict(raw)
        is_finite = np.logical_and.reduce(np.isfinite(values_BK), axis=1).tolist()
        values = np.round(values_BK.astype(np.float64), DIGITS).tolist()
        best = values_BK.argmax(axis=1).tolist()
        return [Row(*each) for each in zip(values, best, is_finite, strict=True)]

    def _described(self, row: Row) -> dict[str, Any]:
        """Return the JSON part for one sample.

        Raises:
            RequestError: the output is not finite.
        """
        if not row.is_finite:
            raise RequestError(422, "the network's output is not finite for this input; check the size of its numbers")
        return self.predictor.kind.reply(row.values, row.best)

    def _picture(self, raw: Array) -> str | None:
        """Return the picture that the network saw, as a PNG in base64; None if it is no picture."""
        spec = self.predictor.spec
        if not spec.is_image or spec.shape[0] not in (1, 3):
            return None
        pixels_HWC = np.clip(raw * (255 / spec.scale), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        file = BytesIO()
        Image.fromarray(pixels_HWC[..., 0] if spec.shape[0] == 1 else pixels_HWC).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

"""Requests per second of the server against its own network in a bare loop, plain FastAPI and LitServe.

One sample per request, 32 connections that each send the next request when the answer is there. Every server gets the
same bytes from the same load generator, which is a process of its own on the same machine. Rounds are interleaved:
what disturbs one disturbs all. LitServe takes part where it is installed.

    .venv/bin/python scripts/benchmarks/serving.py BUNDLE [--rounds 5] [--seconds 3] [--connections 32]
"""

import argparse
import asyncio
import importlib.util
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from espalier.export.preprocess import normalise
from espalier.serving.predictor import INPUT, OUTPUT, Predictor

try:
    import litserve
except ModuleNotFoundError:
    litserve = None

THREADS, MAX_BATCH = 1, 32  # as conf/task/serve.yaml
BARE = "bare loop"
WARM_UP_S = 1.0
NUM_DIFFERENT = 64  # requests, so that nothing can be cached


def raw_samples(predictor: Predictor) -> np.ndarray:
    """As many raw values as requests, in the range of the training data."""
    spec = predictor.spec
    return np.random.default_rng(0).integers(0, int(spec.scale) + 1, (NUM_DIFFERENT, *spec.shape))


def bare_loop(predictor: Predictor, seconds: float) -> dict[str, float]:
    """Return the session alone on batches that are ready and normalised: no request, no preprocessing, no softmax."""
    batches = np.split(normalise(predictor.spec, raw_samples(predictor)), NUM_DIFFERENT // MAX_BATCH)
    took, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        predictor._session.run([OUTPUT], {INPUT: batches[len(took) % len(batches)]})
        took.append(time.perf_counter() - began)
    return {"per_s": MAX_BATCH * len(took) / sum(took), "p50_ms": 0.0, "p99_ms": 0.0}


def serve_fastapi(bundle: Path, port: int) -> None:
    """Serve as a tutorial shows: a model class, a function, one call of the session per request."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    predictor = Predictor(bundle, THREADS)
    app = FastAPI()

    class Body(BaseModel):
        inputs: list[Any]

    @app.post("/predict")
    async def predict(body: Body) -> dict[str, Any]:
        probabilities_BK = predictor.predict(np.array(body.inputs, dtype=np.float32))
        names = predictor.spec.class_names
        return {"predictions": [described(names, row) for row in probabilities_BK]}

    uvicorn.run(app, port=port, log_level="error", access_log=False)


class LitServeApi(litserve.LitAPI if litserve else object):
    """The same steps in LitServe's words; at the top of the file, because its worker process pickles it."""

    def setup(self, device: str) -> None:
        self.predictor = Predictor(Path(sys.argv[1]), THREADS)

    def decode_request(self, request: dict[str, Any]) -> np.ndarray:
        return np.array(request["inputs"][0], dtype=np.float32)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.predictor.predict(x)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        return {"predictions": [described(self.predictor.spec.class_names, output)]}


def serve_litserve(bundle: Path, port: int) -> None:
    """Batching by LitServe."""
    server = litserve.LitServer(LitServeApi(max_batch_size=MAX_BATCH, batch_timeout=0.002), accelerator="cpu")
    server.run(port=port, host="127.0.0.1", log_level="error", generate_client_file=False)


def described(names: Sequence[str], row: np.ndarray) -> dict[str, Any]:
    """Return what a client reads."""
    best = int(row.argmax())
    probabilities = dict(zip(names, row.tolist(), strict=True))
    return {"label": names[best], "probability": float(row[best]), "probabilities": probabilities}


class Connection(asyncio.Protocol):
    """Sends a request, waits for the whole answer, sends the next."""

    def __init__(self, requests: list[bytes], until: float, took: list[float]) -> None:
        self.requests, self.until, self.took = requests, until, took
        self.done = asyncio.get_running_loop().create_future()
        self.number = id(self) // 16
        self.missing = 0  # bytes of the answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.send()

    def send(self) -> None:
        self.number += 1
        self.began = time.perf_counter()
        if self.began > self.until:
            self.transport.close()
            self.done.set_result(None)
            return
        self.transport.write(self.requests[self.number % len(self.requests)])

    def data_received(self, data: bytes) -> None:
        if not self.missing:
            head, _, body = data.partition(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"unexpected answer: {data[:300]!r}")
            at = head.lower().index(b"content-length: ") + 16
            self.missing = int(head[at:].partition(b"\r\n")[0]) - len(body)
        else:
            self.missing -= len(data)
        if not self.missing:
            self.took.append(time.perf_counter() - self.began)
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("closed by the server"))


async def load(port: int, connections: int, seconds: float, bodies: list[bytes]) -> dict[str, float]:
    """Return requests per second and latency under `connections` clients."""
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    requests = [head % len(body) + body for body in bodies]
    took: list[float] = []
    began = time.perf_counter()
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: Connection(requests, began + seconds, took), "127.0.0.1", port)
        for _ in range(connections)
    ]
    await asyncio.gather(*(protocol.done for _, protocol in made))
    passed = time.perf_counter() - began
    return {
        "per_s": len(took) / passed,
        "p50_ms": 1000 * float(np.percentile(took, 50)),
        "p99_ms": 1000 * float(np.percentile(took, 99)),
    }


def under_load(port: int, options: argparse.Namespace, seconds: float) -> dict[str, float]:
    """Return the same from a process of its own."""
    words = [sys.executable, __file__, str(options.bundle), "--load", str(port), "--seconds", str(seconds)]
    words += ["--connections", str(options.connections)]
    return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)


def start(engine: str, bundle: Path, port: int) -> subprocess.Popen:
    """Return a server that answers."""
    words = [sys.executable, __file__, str(bundle), "--serve", engine, "--port", str(port)]
    if engine == "espalier":
        words = [sys.executable, "-m", "espalier.serving", str(bundle), "--port", str(port)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)


def wait_for(port: int) -> None:
    """Return once something listens."""
    for _ in range(600):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit(f"nothing answers at port {port}")


def compare(options: argparse.Namespace) -> None:
    """Start every engine, load them in turn, print medians and ratios."""
    predictor = Predictor(options.bundle, THREADS)
    engines = ["espalier", *(name for name in ("fastapi", "litserve") if importlib.util.find_spec(name))]
    ports = {name: options.port + place for place, name in enumerate(engines)}
    servers = [start(name, options.bundle, port) for name, port in ports.items()]
    rounds: list[dict[str, dict[str, float]]] = []
    try:
        for port in ports.values():
            wait_for(port)
            under_load(port, options, WARM_UP_S)
        for _ in range(options.rounds):
            measured = {BARE: bare_loop(predictor, options.seconds / 2)}
            measured |= {name: under_load(port, options, options.seconds) for name, port in ports.items()}
            rounds.append(measured)
    finally:
        for server in servers:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:  # LitServe's worker outlives its server
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
    print(f"{'':10}  requests/s   p50 ms   p99 ms")
    for name in rounds[0]:
        per_s, p50, p99 = (
            statistics.median(each[name][key] for each in rounds) for key in ("per_s", "p50_ms", "p99_ms")
        )
        print(f"{name:10}  {per_s:10,.0f}   {p50:6.1f}   {p99:6.1f}")
    for other in [BARE, *engines[1:]]:
        ratios = [each["espalier"]["per_s"] / each[other]["per_s"] for each in rounds]
        print(f"espalier / {other}: {statistics.median(ratios):.2f}  (rounds: {min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    """Compare; or, in processes that this one starts, serve or make load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--serve", choices=["fastapi", "litserve"], help=argparse.SUPPRESS)
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        samples = raw_samples(Predictor(options.bundle, THREADS)).tolist()
        bodies = [json.dumps({"inputs": [sample]}).encode() for sample in samples]
        uvloop.install()
        print(json.dumps(asyncio.run(load(options.load, options.connections, options.seconds, bodies))))
    elif options.serve:
        {"fastapi": serve_fastapi, "litserve": serve_litserve}[options.serve](options.bundle, options.port)
    else:
        compare(options)


if __name__ == "__main__":
    main()

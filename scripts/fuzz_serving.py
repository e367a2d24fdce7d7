#!/usr/bin/env python3
"""Send a server thousands of damaged requests while good ones run, and see that it stands.

Starts the server on the bundle, then sends bad JSON, NaN, wrong shapes and types, deep nesting, oversized, truncated
and slow bodies, path traversal, wrong content types, damaged pictures and forms, decompression bombs and bytes that
are no HTTP. Every one must get a 4xx with a message; good requests meanwhile must all get the right probabilities;
memory after it all is compared with memory after a warm-up. Exit code 1 where something of that fails.

    .venv/bin/python scripts/fuzz_serving.py BUNDLE [--requests 10000] [--at-once 50]
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from espalier.serving.predictor import Predictor

TIME_LIMIT_S = 2.0  # of the server
MAX_BODY = 300_000  # bytes
ANSWER_WITHIN_S = 60.0
TOLERANCE = 1e-4  # of a probability: batches of other sizes round differently
GOOD_CLIENTS = 4
MAX_GROWTH = 0.05
HEAD = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: "
CHUNK = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
FIELD = b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n'
FORM = b"multipart/form-data; boundary=x"
BODIES = {  # that are no `{"inputs": [sample, ...]}`
    "bad JSON": (b"", b"{", b'{"inputs": [1,', b"[1 2]", b"\xff\xfe", b"inputs", b"\x00" * 999),
    "NaN": tuple(b'{"inputs": [[%s]]}' % word for word in (b"NaN", b"Infinity", b"-Infinity", b"1e999")),
    "no list": (b"1", b'"x"', b"null", b"[]", b'{"inputs": 1}', b'{"inputs": {}}', b'{"input": []}', b'{"inputs": []}'),
    "more keys": (b'{"inputs": [1], "path": "/etc/passwd"}', b'{"inputs": [1], "url": "http://localhost"}'),
    "wrong type": tuple(
        b'{"inputs": [%s]}' % word for word in (b'"7"', b"null", b"true", b'[["a"]]', b"{}", b'[{"a": 1}]')
    ),
    "paths, URLs": tuple(
        b'{"inputs": [{"%s": "%s"}]}' % (key, value)
        for key in (b"image", b"url", b"path")
        for value in (b"/etc/passwd", b"file:///etc/passwd", b"http://localhost/x")
    ),
    "deep nesting": tuple(b'{"inputs": %s%s}' % (b"[" * n, b"]" * n) for n in (40, 70, 900, 1023, 5000, 100_000)),
    "oversized, sent": (b" " * (MAX_BODY + 1),),
    "too many samples": (b'{"inputs": [%s0]}' % (b"0," * 5000),),
    "no base64": tuple(b'{"inputs": [{"image": "%s"}]}' % word for word in (b"\xc3\xa9", b"a", b"====", b"YWJj", b"")),
}
PATHS = (
    b"/../../etc/passwd",
    b"/%2e%2e/%2e%2e/etc/passwd",
    b"//etc/passwd",
    b"/page/..%2f..%2fbundle.json",
    b"/predict%00",
)
TYPES = (
    b"text/plain",
    b"application/x-www-form-urlencoded",
    b"application/x-python-pickle",
    b"image/tiff",
    b"",
    b"\xff",
)
NO_HTTP = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01",
    b"HELO x\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /predict HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    b"POST /predict HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
)
LONG_HEAD = b"GET /health HTTP/1.1\r\n" + b"".join(b"x-%d: %s\r\n" % (each, b"y" * 100) for each in range(1000))


class Malformed:
    """Damaged requests, drawn from a seed."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self.random = random.Random(seed)
        zeros = np.zeros(shape).tolist()
        self.good = json.dumps({"inputs": [zeros]}).encode()
        picture = BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32), dtype=np.uint8)).save(picture, "PNG")
        self.png = picture.getvalue()
        shapes = (zeros[:-1], [zeros], [*zeros, 0], 0, [], [[1, 2], [3]])
        huge = (b"1e39", b"-1e300", b"1" * 400, b"9" * 45)
        self.kinds: dict[str, Sequence[bytes]] = {
            **{name: [post(body) for body in bodies] for name, bodies in BODIES.items()},
            "wrong shape": [post(json.dumps({"inputs": [each]}).encode()) for each in shapes],
            "huge numbers": [post(self.good.replace(b"0.0", number, 1)) for number in huge],
            "oversized": [head(b"POST", b"/predict", MAX_BODY + more) for more in (1, 10**6, 10**15)],
            "oversized, chunks": [HEAD + b"application/json\r\ntransfer-encoding: chunked\r\n\r\n" + 6 * CHUNK],
            "path traversal": [head(method, path, 0) for method in (b"GET", b"POST") for path in PATHS],
            "wrong method": [head(method, b"/predict", 0) for method in (b"GET", b"PUT", b"DELETE", b"OPTIONS")],
            "wrong content type": [post(self.good, kind) for kind in TYPES],
            "no picture": [post(body, b"image/png") for body in (b"", b"x", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>")],
            "bomb": [post(bomb(side), b"image/png") for side in (5_000, 20_000, 60_000)],
            "bad form": [post(body, FORM) for body in (b"", b"--x", b"--x--\r\n", FIELD)] + [post(FIELD, FORM[:19])],
            "no HTTP": NO_HTTP,
            "long head": [LONG_HEAD],
        }
        # truncated: the client ends the request half way; slow: it stays connected and sends no more
        self.names = [*self.kinds, "damaged picture", "truncated"] * 4 + ["slow"]

    def draw(self) -> tuple[str, bytes, bool]:
        """Kind, bytes, and whether the client closes its side after them."""
        name = self.random.choice(self.names)
        if name in ("truncated", "slow"):
            whole = post(self.good)
            return name, whole[: self.random.randrange(10, len(whole) - 1)], name == "truncated"
        if name == "damaged picture":
            return name, post(self.damaged(), b"image/png"), False
        return name, self.random.choice(self.kinds[name]), False

    def damaged(self) -> bytes:
        """A picture cut short, or with a wrong byte in its head."""
        if self.random.random() < 0.5:
            return self.png[: self.random.randrange(len(self.png) // 2)]
        place = self.random.randrange(8)
        return self.png[:place] + bytes([self.png[place] ^ 0xFF]) + self.png[place + 1 :]


def head(method: bytes, path: bytes, length: int, kind: bytes = b"application/json") -> bytes:
    """First lines of a request."""
    return b"%s %s HTTP/1.1\r\nhost: x\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n" % (method, path, kind, length)


def post(body: bytes, kind: bytes = b"application/json") -> bytes:
    """A request for a prediction."""
    return head(b"POST", b"/predict", len(body), kind) + body


def bomb(side: int) -> bytes:
    """A PNG that claims side x side pixels in a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    size = side.to_bytes(4, "big") * 2
    data = zlib.compress(bytes(100_000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size + b"\x08\x00\x00\x00\x00")
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


async def ask(port: int, data: bytes, stops: bool) -> tuple[int, dict]:
    """Status and content of the answer; status 0 if there is none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        writer.write(data)
        try:
            await writer.drain()
            if stops:
                writer.write_eof()
        except ConnectionError:
            pass  # refused before all was sent; the answer may be there all the same
        first = await reader.readuntil(b"\r\n\r\n")
        status = int(first.split(b" ", 2)[1])
        length = int(re.search(rb"(?i)content-length: (\d+)", first)[1])
        return status, json.loads(await reader.readexactly(length))
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        return 0, {"error": repr(error)}
    finally:
        writer.close()


async def attack(port: int, malformed: Malformed, count: int, at_once: int, predictor: Predictor) -> list[str]:
    """What went wrong, in words; statuses are printed."""
    wrong: list[str] = []
    statuses: Counter[tuple[str, int]] = Counter()
    left = iter(range(count))

    async def bad_client() -> None:
        for _ in left:
            name, data, stops = malformed.draw()
            try:
                status, content = await asyncio.wait_for(ask(port, data, stops), ANSWER_WITHIN_S)
            except TimeoutError:
                status, content = 0, {"error": "no answer"}
            statuses[name, status] += 1
            if not (400 <= status < 500 and isinstance(content.get("error"), str) and content["error"]):
                wrong.append(f"{name}: {status} {content} for {data[:200]!r}")

    num_good = 0
    done = asyncio.Event()

    async def good_client(seed: int) -> None:
        nonlocal num_good
        draw = np.random.default_rng(seed)
        while not done.is_set():
            raw = draw.integers(0, int(predictor.spec.scale) + 1, (1, *predictor.spec.shape)).astype(np.float32)
            expected = predictor.predict(raw)[0]
            status, content = await ask(port, post(json.dumps({"inputs": raw.tolist()}).encode()), False)
            given = list(content["predictions"][0]["probabilities"].values()) if status == 200 else []
            if status != 200 or np.abs(np.array(given) - expected).max() > TOLERANCE:
                wrong.append(f"good request: {status} {content}")
            num_good += 1
            await asyncio.sleep(0.01)

    good = [asyncio.create_task(good_client(seed)) for seed in range(GOOD_CLIENTS)]
    await asyncio.gather(*(bad_client() for _ in range(at_once)))
    done.set()
    await asyncio.gather(*good)
    for name in dict.fromkeys(name for name, _ in statuses):
        found = ", ".join(f"{number} x {status}" for (kind, status), number in sorted(statuses.items()) if kind == name)
        print(f"  {name:22} {found}")
    print(f"  {num_good} good requests in between")
    return wrong


def memory_kb(process: int) -> int:
    """Resident memory."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1])


def main() -> int:
    """Exit code 1 where the server did not stand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--warm-up", type=int, default=1_000)
    parser.add_argument("--at-once", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    predictor = Predictor(options.bundle, threads=1)
    words = ["--port", "0", "--max-body-mb", str(MAX_BODY / 1e6), "--time-limit-s", str(TIME_LIMIT_S)]
    server = subprocess.Popen(
        [sys.executable, "-m", "espalier.serving", str(options.bundle), *words], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().strip().rpartition(":")[2])
        malformed = Malformed(predictor.spec.shape, options.seed)
        print("warm-up")
        wrong = asyncio.run(attack(port, malformed, options.warm_up, options.at_once, predictor))
        before = memory_kb(server.pid)
        print("attack")
        wrong += asyncio.run(attack(port, malformed, options.requests, options.at_once, predictor))
        after = memory_kb(server.pid)
        is_alive = server.poll() is None
    finally:
        server.terminate()
        code = server.wait(30)
    growth = after / before - 1
    print(f"memory {before:,} kB -> {after:,} kB ({growth:+.1%}); alive: {is_alive}; exit code {code}")
    print(f"not as they should be: {len(wrong)} answers")
    print(*wrong[:10], sep="\n")
    return int(bool(wrong) or not is_alive or code != 0 or growth >= MAX_GROWTH)


if __name__ == "__main__":
    sys.exit(main())

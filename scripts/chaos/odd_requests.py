"""Some seventy kinds of odd requests, for `requests.py`: what each sends, and what it must get."""

import base64
import json
import random
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image

MAX_BODY = 300_000  # bytes
HOST = b"host: localhost"
HEAD = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: "
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
    b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
)
LONG_HEAD = b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"".join(
    b"x-%d: %s\r\n" % (each, b"y" * 100) for each in range(1000)
)


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F")
FILES = ("PNG", "GIF", "WEBP", "BMP", "JPEG")
NOT_PICTURES = (b"", b"x", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>")
OTHERS = (b"evil.example", b"", b"\xff", b"a:b:c")  # in the header Host
REFUSED, ANSWERED, EITHER = range(400, 500), range(200, 201), (*range(200, 201), *range(400, 500))


class Shot(NamedTuple):
    """What a client sends, and how many answers of which status it waits for; with none it leaves at once."""

    pieces: tuple[bytes, ...]
    allowed: Sequence[int] = REFUSED
    num_answers: int = 1
    ends: bool = False  # its side of the connection, after the last piece
    pause_s: float = 0.0  # between pieces


class Odd:
    """Odd requests, drawn from a seed."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self.random = random.Random(seed)
        self.zeros = np.zeros(shape).tolist()
        self.good = json.dumps({"inputs": [self.zeros]}).encode()
        self.png = picture("L", "PNG")
        self.kinds: dict[str, Callable[[], Shot]] = {
            **{name: self._one_of(*map(post, bodies)) for name, bodies in BODIES.items()},
            **self._numbers(),
            **self._pictures(),
            **self._http(),
            **self._connections(),
        }
        self.names = [name for name in self.kinds for _ in range(1 if name in ("slow", "large picture") else 8)]

    def draw(self) -> tuple[str, Shot]:
        """Return a kind and one of its requests."""
        name = self.random.choice(self.names)
        return name, self.kinds[name]()

    def _one_of(self, *requests: bytes, allowed: Sequence[int] = REFUSED) -> Callable[[], Shot]:
        return lambda: Shot((self.random.choice(requests),), allowed)

    def _leaf(self, word: bytes) -> bytes:
        return post(self.good.replace(b"0.0", word, 1))

    def _numbers(self) -> dict[str, Callable[[], Shot]]:
        zeros = self.zeros
        shapes = (zeros[:-1], [zeros], [*zeros, 0], 0, [], [[1, 2], [3]])
        huge = (b"1e39", b"-1e300", b"1" * 400, b"9" * 45)
        bombs = [json.dumps({"inputs": [["a" * n, *[""] * (n // 3)]]}).encode() for n in (10_000, 40_000, 100_000)]
        empty = [b'{"inputs": [%s[]]}' % (b"[]," * n) for n in (1000, 90_000)]
        pairs = b'{"inputs": [{"image": "%s"}, {"a": 1}]}' % base64.b64encode(self.png)
        odd_text = [
            b'"\\ud800"',
            b'"\\u0000"',
            "\U0001f600".encode().join([b'"', b'"']),
            b'"' + b"\xc3\xa9" * 9999 + b'"',
        ]
        twice = b'{"inputs": 1, ' + self.good[1:]
        return {
            "wrong shape": self._one_of(*(post(json.dumps({"inputs": [each]}).encode()) for each in shapes)),
            "huge numbers": self._one_of(*map(self._leaf, huge)),
            "string bomb": self._one_of(*map(post, bombs)),
            "a long string inside": self._one_of(self._leaf(b'"' + b"a" * 200_000 + b'"')),
            "true and false": self._one_of(self._leaf(b"true"), self._leaf(b"false")),
            "null": self._one_of(self._leaf(b"null")),
            "ragged": self._one_of(self._leaf(b"0,0"), self._leaf(b"[0]"), self._leaf(b"[]")),
            "objects": self._one_of(self._leaf(b"{}"), self._leaf(b'{"image": "aaaa"}'), post(pairs)),
            "empty lists": self._one_of(*map(post, empty)),
            "odd text": self._one_of(*map(self._leaf, odd_text)),
            "a key twice": self._one_of(post(twice), allowed=EITHER),
            "a number too much": self._one_of(post(self.good.replace(b"0.0", b"0.0, 1", 1))),
            "explain of two": self._one_of(post(json.dumps({"inputs": [zeros] * 2}).encode(), route=b"/explain")),
            "explain": self._one_of(post(self.good, route=b"/explain"), allowed=ANSWERED),
        }

    def _pictures(self) -> dict[str, Callable[[], Shot]]:
        modes = [
            post(picture(mode, kind), b"image/png") for mode in MODES for kind in ("PNG", "GIF", "WEBP", "BMP", "JPEG")
        ]
        tiny = json.dumps({"inputs": [{"image": base64.b64encode(self.png).decode()}] * 50}).encode()
        files = b"".join(part(self.png) for _ in range(3)) + b"--x--\r\n"
        many = b"".join(part(b"x") for _ in range(300)) + b"--x--\r\n"
        no_end = part(self.png) + b"--x\r\n" * 1000
        odd_head = b"--x\r\ncontent-disposition: " + b"a" * 200_000 + b"\r\n\r\n1\r\n--x--\r\n"
        edges = b"\r\n--" * 50_000
        return {
            "no picture": self._one_of(
                *(post(body, b"image/png") for body in (b"", b"x", b"%!PS-Adobe-3.0 EPSF-3.0\n"))
            ),
            "bomb": self._one_of(*(post(bomb(side), b"image/png") for side in (5_000, 20_000, 60_000))),
            "large picture": self._one_of(post(picture("RGB", "PNG", 4_000), b"image/png"), allowed=ANSWERED),
            "odd modes": self._one_of(*modes, allowed=EITHER),
            "many small pictures": self._one_of(post(tiny), allowed=ANSWERED),
            "damaged picture": lambda: Shot((post(self._damaged(), b"image/png"),)),
            "form": self._one_of(post(files, FORM), allowed=ANSWERED),
            "bad form": self._one_of(
                *(post(body, FORM) for body in (b"", b"--x", b"--x--\r\n")), post(FIELD, FORM[:19])
            ),
            "form with a field": self._one_of(post(FIELD, FORM)),
            "form of many": self._one_of(post(many, FORM)),
            "form without end": self._one_of(post(no_end, FORM)),
            "form with an odd head": self._one_of(post(odd_head, FORM), post(edges, FORM)),
        }

    def _http(self) -> dict[str, Callable[[], Shot]]:
        good = post(self.good)
        url = [b"GET http://evil.example/info HTTP/1.1\r\nhost: localhost\r\n\r\n"]
        both = b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
        chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(self.good), self.good)
        chunked = HEAD + b"application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        methods = (b"GET", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE")
        return {
            "oversized": self._one_of(*(head(b"POST", b"/predict", MAX_BODY + more) for more in (1, 10**6, 10**15))),
            "oversized, chunks": self._one_of(chunked + 6 * CHUNK),
            "path traversal": self._one_of(*(head(method, path, 0) for method in (b"GET", b"POST") for path in PATHS)),
            "wrong method": self._one_of(*(head(method, b"/predict", 0) for method in methods)),
            "wrong content type": self._one_of(*(post(self.good, kind) for kind in TYPES)),
            "compressed": self._one_of(good.replace(HOST, HOST + b"\r\ncontent-encoding: gzip")),
            "no HTTP": self._one_of(*NO_HTTP),
            "long head": self._one_of(LONG_HEAD),
            "70 kB header": self._one_of(good.replace(HOST, HOST + b"\r\nx: " + b"y" * 70_000)),
            "10,000 headers": self._one_of(good.replace(HOST, HOST + b"\r\nx: yz" * 10_000)),
            "long path": self._one_of(head(b"GET", b"/" + b"x" * 70_000, 0)),
            "wrong host": self._one_of(
                *(good.replace(b"localhost", name) for name in (b"evil.example", b"", b"\xff", b"a:b:c"))
            ),
            "no host": self._one_of(good.replace(HOST + b"\r\n", b"")),
            "two hosts": self._one_of(good.replace(HOST, HOST + b"\r\n" + HOST)),
            "another's address": self._one_of(*url),
            "HTTP 0.9": self._one_of(b"GET /info\r\n\r\n"),
            "HTTP 2": self._one_of(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            "CONNECT": self._one_of(b"CONNECT localhost:443 HTTP/1.1\r\nhost: localhost:443\r\n\r\n"),
            "two lengths": self._one_of(HEAD + b"application/json\r\n" + both),
            "bad chunk": self._one_of(*(chunked + size + b"\r\n" for size in (b"-1", b"zz", b"f" * 20))),
            "chunks": self._one_of(chunked + chunks, allowed=ANSWERED),
            "h2c": self._one_of(upgraded(good, b"h2c"), allowed=ANSWERED),
            "websocket": self._one_of(upgraded(good, b"websocket"), allowed=ANSWERED),
        }

    def _connections(self) -> dict[str, Callable[[], Shot]]:
        good = post(self.good)

        def cut() -> bytes:
            return good[: self.random.randrange(10, len(good) - 1)]

        def bytewise() -> tuple[bytes, ...]:
            return *(bytes([each]) for each in good[:60]), good[60:]

        def halves() -> tuple[bytes, bytes]:
            place = self.random.randrange(10, len(good) - 1)
            return good[:place], good[place:]

        return {
            "half-closed": lambda: Shot((good,), ANSWERED, ends=True),
            "half-closed, several": lambda: Shot((good * 5,), ANSWERED, 5, ends=True),
            "pipelined": lambda: Shot((good * 20,), ANSWERED, 20),
            "pipelined, then no HTTP": lambda: Shot((good * 3 + NO_HTTP[1],), EITHER, 4),
            "pipelined, then cut off": lambda: Shot((good * 3 + cut(),), EITHER, 4, ends=True),
            "pipelined, 300": lambda: Shot((post(b"{}") * 300,), REFUSED, 1),
            "in two pieces": lambda: Shot(halves(), ANSWERED, pause_s=0.02),
            "byte by byte": lambda: Shot(bytewise(), ANSWERED, pause_s=1e-4),
            "truncated": lambda: Shot((cut(),), ends=True),
            "slow": lambda: Shot((cut(),)),
            "left in the middle": lambda: Shot((cut(),), num_answers=0),
            "left after it": lambda: Shot((good,), num_answers=0),
            "left at once": lambda: Shot((b"",), num_answers=0),
            "unread": lambda: Shot((good * 50,), ANSWERED, num_answers=0, pause_s=0.05),
        }

    def _damaged(self) -> bytes:
        """Return a picture cut short, or with a wrong byte in its head."""
        if self.random.random() < 0.5:
            return self.png[: self.random.randrange(len(self.png) // 2)]
        place = self.random.randrange(8)
        return self.png[:place] + bytes([self.png[place] ^ 0xFF]) + self.png[place + 1 :]


def head(method: bytes, path: bytes, length: int, kind: bytes = b"application/json") -> bytes:
    """First lines of a request."""
    first = b"%s %s HTTP/1.1\r\n" % (method, path)
    return first + HOST + b"\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n" % (kind, length)


def post(body: bytes, kind: bytes = b"application/json", route: bytes = b"/predict") -> bytes:
    """Return a request for a prediction."""
    return head(b"POST", route, len(body), kind) + body


def form(body: bytes) -> bytes:
    """Return a form."""
    return post(body, FORM)


def upgraded(request: bytes, protocol: bytes) -> bytes:
    """Return the request with a wish for another protocol."""
    wish = b"\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: %s\r\nhttp2-settings: AAMAAABkAAQ" % protocol
    return request.replace(HOST, HOST + wish)


def part(file: bytes) -> bytes:
    """Return a file of a form."""
    return b'--x\r\ncontent-disposition: form-data; name="f"; filename="../../x"\r\n\r\n' + file + b"\r\n"


def picture(mode: str, kind: str, side: int = 32) -> bytes:
    """Return a picture, noise above black; where a kind of file has no such mode, a PNG of grey."""
    pixels = np.zeros((side, side), dtype=np.uint8)
    pixels[:32, :32] = np.random.default_rng(0).integers(0, 256, (32, 32))
    file = BytesIO()
    try:
        Image.fromarray(pixels).convert(mode).save(file, kind)
    except (OSError, ValueError):
        return picture("L", "PNG")
    return file.getvalue()


def bomb(side: int) -> bytes:
    """Return a PNG that claims side x side pixels in a few bytes."""

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

"""`espalier serve`: an exported run over HTTP, in a process of its own, asked as a client would ask."""

import base64
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from conftest import Command, command
from espalier.composition import networks
from espalier.runs import checkpoint
from espalier.runs.run_folder import EVALUATED
from espalier.spec import DataSpec
from helpers.server import Server, bag_bundle, endless_bundle, linear_bundle, serving

QUICK = ("logger=[csv]", "callbacks=[checkpoint,monitor]")
SPEC = DataSpec.single("pictures", (1, 2, 2), scale=16.0, mean=(0.0,), std=(1.0,), class_names=("dark", "bright"))
WEIGHT = np.array([[0.0, 1.0]] * 4) - np.array([[0.5, 0.0]])  # the more light, the brighter
REQUESTS = Path(__file__).parents[1] / "scripts" / "chaos" / "requests.py"
DARK, BRIGHT = [[[0, 0], [0, 0]]], [[[16, 16], [16, 16]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where `latest` is an exported multilayer perceptron."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command(["train", "model=mlp", "trainer.max_epochs=4", *QUICK], folder).code == 0
        assert command(["export", "source=latest", *QUICK[:1]], folder).code == 0
    return folder


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[Server]:
    with serving(["-m", "espalier.cli", "serve", "source=latest", "task.port=0"], runs) as running:
        yield running


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linear_bundle(tmp_path_factory.mktemp("linear"), SPEC, WEIGHT)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server of `linear` writes to stderr."""
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.fixture(scope="module")
def linear(bundle: Path, log: Path) -> Iterator[Server]:
    """A server with a short time limit and a small body."""
    words = ["-m", "espalier.serving", str(bundle), "--port", "0", "--time-limit-s", "2", "--max-body-mb", "0.1"]
    with log.open("w") as file, serving([*words, "--queue", "64"], bundle, file.fileno()) as running:
        yield running


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of texts, in which every good and every bad word has two votes."""
    folder = bag_bundle(tmp_path_factory.mktemp("texts"))
    with serving(["-m", "espalier.serving", str(folder), "--port", "0", "--queue", "32"], folder) as running:
        yield running


def png(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_it_answers_what_the_trained_network_says_in_torch(server: Server, runs: Path) -> None:
    [trained] = runs.glob("logs/train/*")
    stored = checkpoint.load_run("source", str(trained), EVALUATED)
    raw = load_digits().data[:50].reshape(-1, 1, 8, 8)
    x = (torch.tensor(raw, dtype=torch.float32) / 16 - stored.spec.mean[0]) / stored.spec.std[0]
    with torch.no_grad():
        expected = networks.trained(stored).eval()(x).softmax(1)
    predictions = server.predict(raw)
    given = torch.tensor([list(each["probabilities"].values()) for each in predictions])
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)
    assert [each["label"] for each in predictions] == [str(int(best)) for best in expected.argmax(1)]
    assert all(each["probability"] == max(each["probabilities"].values()) for each in predictions)


def test_the_process_that_serves_has_no_torch_and_leaves_no_run_folder(server: Server, runs: Path) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    assert "onnxruntime" in maps.read_text()
    assert "libtorch" not in maps.read_text()
    assert not list(runs.glob("logs/serve/*"))


def test_a_picture_is_read_alike_as_array_base64_upload_and_form(linear: Server) -> None:
    pixels = np.array([[0, 255], [255, 255]])
    expected = linear.predict([[[[0, 16], [16, 16]]]])
    data = png(pixels)
    in_json = json.dumps({"inputs": [{"image": base64.b64encode(data).decode()}]})
    form = b'--x\r\ncontent-disposition: form-data; name="f"; filename="../../x"\r\n\r\n' + data + b"\r\n--x--\r\n"
    assert linear.ask("POST", "/predict", in_json) == (200, {"predictions": expected})
    assert linear.ask("POST", "/predict", data, "image/png") == (200, {"predictions": expected})
    assert linear.ask("POST", "/predict", form, "multipart/form-data; boundary=x") == (200, {"predictions": expected})


def test_explain_shows_the_sample_and_where_its_label_comes_from(server: Server) -> None:
    raw = load_digits().data[0].reshape(1, 8, 8)
    status, content = server.ask("POST", "/explain", json.dumps({"inputs": [raw.tolist()]}))
    assert status == 200
    assert [content["prediction"]] == server.predict([raw])
    seen = np.asarray(Image.open(BytesIO(base64.b64decode(content["image"]))))
    np.testing.assert_array_equal(seen, (raw[0] * 255 / 16).astype(np.uint8))
    assert np.array(content["heat_map"]).shape == (8, 8)
    assert np.ptp(content["heat_map"]) > 0


def test_explain_takes_one_sample(linear: Server) -> None:
    status, content = linear.ask("POST", "/explain", json.dumps({"inputs": [DARK, BRIGHT]}))
    assert (status, content) == (422, {"error": "2 samples in the request; /explain takes one"})


def test_texts_of_any_length_are_answered_in_one_request(reader: Server) -> None:
    texts = ["Good film!", {"text": "bad, BAD film"}, "", "good " * 3000]  # six words are read
    status, content = reader.ask("POST", "/predict", json.dumps({"inputs": texts}))
    assert (status, [each["label"] for each in content["predictions"]]) == (
        200,
        ["positive", "negative", "negative", "positive"],
    )
    odds = np.exp([2, -4, 0, 12])
    given = [each["probabilities"]["positive"] for each in content["predictions"]]
    np.testing.assert_allclose(given, odds / (1 + odds), atol=1e-6)


def test_explain_of_a_text_says_what_each_word_adds(reader: Server) -> None:
    status, content = reader.ask("POST", "/explain", json.dumps({"inputs": ["Bad film; bad plot, good end"]}))
    assert (status, content["prediction"]["label"]) == (200, "negative")
    assert content["tokens"] == ["bad", "film", ";", "bad", "plot", ","]
    whole, without = (np.exp(votes) / (1 + np.exp(votes)) for votes in (4, 2))
    drop = whole - without
    np.testing.assert_allclose(content["heat_map"], [drop, 0, 0, drop, 0, 0], atol=1e-6)
    assert (content["num_not_covered"], content["is_cut_off"]) == (0, True)


@pytest.mark.parametrize(
    ("sample", "told"),
    [(3, "a number"), (None, "null"), (["good"], "a list"), ({"image": "aGVsbG8="}, "an object of another form")],
)
@pytest.mark.parametrize("route", ["/predict", "/explain"])
def test_what_is_no_text_gets_422_in_one_line(reader: Server, route: str, sample: object, told: str) -> None:
    sentence = f'inputs[0]: {told}; each sample must be a text, or {{"text": "a text"}}'
    for padding in ("", " " * 10_000):  # a body that is read at once, and one that is read aside
        status, content = reader.ask("POST", route, padding + json.dumps({"inputs": [sample]}))
        assert (status, content) == (422, {"error": sentence})


def test_a_text_for_a_network_of_numbers_gets_422_in_one_line(linear: Server) -> None:
    status, content = linear.ask("POST", "/predict", json.dumps({"inputs": ["bright"]}))
    allowed = "each sample must be numbers of shape [1, 2, 2]"
    assert (status, content) == (422, {"error": f"inputs[0]: something that is no number; {allowed}"})


def test_the_largest_request_of_texts_is_answered_and_a_larger_one_refused(reader: Server) -> None:
    assert reader.ask("POST", "/predict", json.dumps({"inputs": ["good " * 1000] * 32}))[0] == 200
    assert reader.ask("POST", "/predict", json.dumps({"inputs": ["good"] * 33}))[0] == 413
    status, content = reader.ask("POST", "/predict", b'{"inputs": [' + b"[]," * 1_000_000 + b"0]}")
    assert (status, content) == (413, {"error": "the body has more parts than 32 texts; split it"})


def test_info_says_what_a_text_is_and_keeps_the_vocabulary(reader: Server) -> None:
    data = reader.ask("GET", "/info")[1]["data"]
    words = {"name": "tokens", "kind": "tokens", "shape": ["T"], "cut": "words", "num_known_tokens": 3}
    assert (data["inputs"], data["longest"]) == ([words], {"T": 6})


def test_info_describes_the_bundle_and_names_no_folder(server: Server, linear: Server, bundle: Path) -> None:
    status, content = server.ask("GET", "/info")
    assert status == 200
    assert content["data"]["class_names"] == list("0123456789")
    assert content["formats"]["onnx"]["parity"]["same_label"] == 1
    assert len(content["files"]["model.onnx"]["sha256"]) == 64
    assert str(bundle.parent) not in json.dumps(linear.ask("GET", "/info")[1])


def test_metrics_count_requests_by_status_and_the_samples_of_batches(bundle: Path) -> None:
    with serving(["-m", "espalier.serving", str(bundle), "--port", "0"], bundle) as fresh:
        fresh.predict([DARK, BRIGHT, DARK])
        fresh.ask("POST", "/predict", "{")
        fresh.ask("GET", "/made/up")
        lines = fresh.ask("GET", "/metrics")[1].splitlines()
    assert 'espalier_requests_total{route="/predict",status="200"} 1.0' in lines
    assert 'espalier_requests_total{route="/predict",status="400"} 1.0' in lines
    assert 'espalier_requests_total{route="other",status="404"} 1.0' in lines
    assert "espalier_batch_size_sum 3.0" in lines
    assert "espalier_predict_seconds_count 1.0" in lines


@pytest.mark.parametrize(
    ("method", "path", "status", "header"),
    [
        ("GET", "/health", 200, ("content-type", "application/json")),
        ("HEAD", "/health", 200, ("content-length", "15")),
        ("GET", "/", 200, ("content-type", "text/html; charset=utf-8")),
        ("GET", "/script.js", 200, ("content-type", "text/javascript; charset=utf-8")),
        ("GET", "/predict", 405, ("allow", "POST")),
        ("POST", "/health", 405, ("allow", "GET")),
        ("GET", "/../bundle.json", 404, ("content-type", "application/json")),
    ],
)
def test_routes(linear: Server, method: str, path: str, status: int, header: tuple[str, str]) -> None:
    given, headers, _ = linear.ask_all(method, path, None, "")
    assert (given, headers[header[0]]) == (status, header[1])


def test_the_page_may_load_nothing_from_elsewhere(linear: Server) -> None:
    _, headers, page = linear.ask_all("GET", "/", None, "")
    assert headers["content-security-policy"].startswith("default-src 'self';")
    assert "//" not in page.replace("<!doctype html>", "")


def test_a_body_beyond_the_limit_is_refused_whether_announced_or_not(linear: Server) -> None:
    status, content = linear.ask("POST", "/predict", b" " * 100_001)
    assert (status, content["error"][:30]) == (413, "the body has 100001 bytes, a r")
    with socket.create_connection(("127.0.0.1", linear.port), timeout=30) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
        client.sendall(b"transfer-encoding: chunked\r\n\r\n" + 2 * (b"10000\r\n" + b" " * 65536 + b"\r\n"))
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_more_samples_than_may_wait_are_refused_at_once(linear: Server) -> None:
    assert len(linear.predict([DARK] * 64)) == 64
    status, content = linear.ask("POST", "/predict", json.dumps({"inputs": [DARK] * 65}))
    assert (status, content["error"]) == (413, "65 samples in one request, at most 64 are allowed; split them")


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"POST /pre",
        b"POST /predict HTTP/1.1\r\nhost: localhost\r\n",
        b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b'content-length: 99\r\n\r\n{"inputs"',
    ],
    ids=["nothing", "a line", "a head", "a body"],
)
def test_a_client_that_is_too_slow_is_told_so(linear: Server, start: bytes) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", linear.port), timeout=30) as client:
        client.sendall(start)
        answer = client.recv(1000)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'{"error":"no whole request within 2 s"}' in answer
    assert 1.5 < time.monotonic() - began < 20


def post(body: bytes, *lines: bytes, version: bytes = b"1.1", kind: bytes = b"application/json") -> bytes:
    """A request for predictions as bytes, with more lines in its head."""
    head = [b"POST /predict HTTP/" + version, b"host: localhost", b"content-type: " + kind, *lines]
    return b"\r\n".join([*head, b"content-length: %d" % len(body), b"", body])


def statuses(answers: bytes) -> list[bytes]:
    """The status of each answer."""
    return re.findall(rb"HTTP/1\.1 (\d+) ", answers)


LAST = b"connection: close"
ASKED = json.dumps({"inputs": [BRIGHT]}).encode()
CHUNKED = b"\r\n".join([b"%x" % len(ASKED), ASKED, b"0", b"", b""])


@pytest.mark.parametrize(
    "parts",
    [
        (post(ASKED, LAST),),
        (post(ASKED, LAST)[:-5], ASKED[-5:]),
        (post(ASKED, LAST)[:20], post(ASKED, LAST)[20:]),
        (post(ASKED, LAST, kind=b"application/json; charset=utf-8"),),
        (post(ASKED, version=b"1.0"),),
        (
            b"POST /predict HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n" + CHUNKED,
        ),
    ],
    ids=["at once", "body in two parts", "head in two parts", "with a character set", "HTTP 1.0", "chunked"],
)
def test_a_request_is_answered_alike_however_it_comes(linear: Server, parts: tuple[bytes, ...]) -> None:
    with socket.create_connection(("127.0.0.1", linear.port), timeout=30) as client:
        for part in parts:
            client.sendall(part)
            time.sleep(0.05)
        with client.makefile("rb") as file:
            head, _, body = file.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert {b"content-type: application/json", b"x-content-type-options: nosniff"} <= set(head.splitlines())
    assert json.loads(body) == {"predictions": linear.predict([BRIGHT])}


def test_requests_that_come_before_their_answers_are_answered_in_order(linear: Server) -> None:
    wanted = [BRIGHT, DARK, BRIGHT, [[[1]]], DARK]
    bodies = [json.dumps({"inputs": [each]}).encode() for each in wanted]
    with socket.create_connection(("127.0.0.1", linear.port), timeout=30) as client:
        client.sendall(b"".join([*map(post, bodies[:-1]), post(bodies[-1], LAST)]))
        with client.makefile("rb") as file:
            answers = file.read().split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200", b"200", b"200", b"422", b"200"]
    labels = [json.loads(answer.partition(b"\r\n\r\n")[2]) for answer in answers]
    assert [each["predictions"][0]["label"] for each in labels if "error" not in each] == [
        "bright",
        "dark",
        "bright",
        "dark",
    ]


@pytest.mark.parametrize("route", [b"/predict", b"/explain"])
def test_a_client_that_has_ended_its_side_gets_its_answers(linear: Server, route: bytes) -> None:
    asked = post(ASKED).replace(b"/predict", route, 1)
    assert b'"label":"bright"' in linear.exchange(asked, ends=True)
    assert statuses(linear.exchange(asked + post(ASKED, b"expect: x") + asked, ends=True)) == [b"200"] * 3


def test_a_request_that_is_cut_off_is_told_so_after_the_answers_before_it(linear: Server) -> None:
    whole = post(ASKED)
    assert statuses(linear.exchange(whole[:-5], ends=True)) == [b"400"]
    assert statuses(linear.exchange(whole + whole + whole[:-5], ends=True)) == [b"200", b"200", b"400"]
    assert statuses(linear.exchange(whole + whole + b"no HTTP\r\n\r\n")) == [b"200", b"200", b"400"]


@pytest.mark.parametrize("wish", [b"h2c", b"websocket", b"TLS/1.0"])
def test_a_wish_for_another_protocol_is_ignored_and_the_body_is_read(linear: Server, wish: bytes) -> None:
    lines = b"connection: Upgrade, HTTP2-Settings, close", b"upgrade: " + wish, b"http2-settings: AAMAAABkAAQ"
    asked = post(ASKED, *lines)
    assert b'"label":"bright"' in linear.exchange(asked)
    assert b'"label":"bright"' in linear.exchange(asked[:30], asked[30:-5], asked[-5:])
    kept = post(ASKED, b"connection: upgrade", lines[1])
    assert statuses(linear.exchange(kept * 20 + asked)) == [b"200"] * 21


def test_connect_is_refused_and_leaves_nothing_in_the_log(linear: Server, log: Path) -> None:
    before = log.read_text()
    answer = linear.exchange(b"CONNECT localhost:443 HTTP/1.1\r\nhost: localhost:443\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"allow: GET, HEAD, POST\r\n" in answer
    assert log.read_text() == before


def head_of(*lines: bytes) -> bytes:
    return b"\r\n".join([b"GET /health HTTP/1.1", b"host: localhost", *lines, b"connection: close", b"", b""])


@pytest.mark.parametrize(
    "head",
    [
        head_of(b"x: " + b"y" * 70_000),
        head_of(*(b"x-%d: y" % number for number in range(10_000))),
        head_of().replace(b"/health", b"/" + b"x" * 70_000),
        head_of(*(b"x-%d: %s" % (number, b"y" * 1000) for number in range(200))),
    ],
    ids=["a long header", "many headers", "a long path", "200 kB"],
)
def test_a_head_beyond_the_limit_gets_431_however_it_comes(linear: Server, head: bytes) -> None:
    for pieces in ([head], [head[:50_000], head[50_000:]], [post(ASKED) + head]):
        assert statuses(linear.exchange(*pieces))[-1] == b"431"
    assert statuses(linear.exchange(head_of(b"x: " + b"y" * 60_000))) == [b"200"]


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ((b"Host: LOCALHOST:9",), b"200"),
        ((b"host: 127.0.0.1",), b"200"),
        ((b"host: [::1]:8000",), b"200"),
        ((b"host: evil.example",), b"421"),
        ((b"host: localhost.evil.example",), b"421"),
        ((b"host: localhost@evil.example",), b"421"),
        ((b"host: 10.0.0.1",), b"421"),
        ((b"host:",), b"421"),
        ((b"host: localhost", b"host: localhost"), b"400"),
        ((), b"400"),
    ],
)
def test_a_request_must_be_meant_for_us(linear: Server, lines: tuple[bytes, ...], status: bytes) -> None:
    for first in (b"GET /info HTTP/1.1", b"POST /predict HTTP/1.1\r\ncontent-type: application/json"):
        asked = b"\r\n".join([first, *lines, LAST, b"content-length: %d" % (len(ASKED) * (b"POST" in first)), b"", b""])
        assert statuses(linear.exchange(asked + ASKED * (b"POST" in first))) == [status]


def test_what_is_no_number_to_json_is_none_to_the_server(linear: Server) -> None:
    for word in ("true", "null", '"1"', "{}", "[1]", "NaN", "1e39"):
        status, content = linear.ask("POST", "/predict", f'{{"inputs": [[[[0, 0], [0, {word}]]]]}}')
        assert (status, bool(content["error"])) == (400 if word == "NaN" else 422, True)


def test_strings_in_place_of_numbers_cost_neither_memory_nor_time(linear: Server) -> None:
    bomb = json.dumps({"inputs": [["a" * 49_000, *[""] * 11_000]]}, separators=(",", ":"))
    before = peak_kb(linear)
    began = time.monotonic()
    assert linear.ask("POST", "/predict", bomb)[0] == 422
    assert time.monotonic() - began < 5  # it took 33 s and 4 GB
    assert peak_kb(linear) - before < 50_000


def peak_kb(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("needs /proc")
    return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])


def test_a_network_that_never_ends_costs_its_own_requests_alone(tmp_path: Path) -> None:
    folder = endless_bundle(tmp_path, SPEC)
    words = ["-m", "espalier.serving", str(folder), "--port", "0", "--time-limit-s", "1"]
    with (tmp_path / "log").open("w") as file, serving(words, tmp_path, file.fileno()) as running:
        assert running.ask("POST", "/predict", ASKED)[0] == 504
        assert running.predict([DARK])[0]["probability"] == 0.5  # it was interrupted
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as client:
            client.sendall(post(ASKED))
            time.sleep(0.2)
            began = time.monotonic()
            assert running.stop() == 0
            assert time.monotonic() - began < 10
            assert statuses(client.recv(1000)) == [b"504"]


def test_requests_on_their_way_when_it_stops_are_answered(bundle: Path) -> None:
    with serving(["-m", "espalier.serving", str(bundle), "--port", "0"], bundle) as running:
        clients = [socket.create_connection(("127.0.0.1", running.port), timeout=30) for _ in range(40)]
        running.predict([DARK])
        running.process.send_signal(signal.SIGTERM)
        for client in clients:
            client.sendall(post(ASKED))
        answers = [statuses(client.makefile("rb").read()) for client in clients]
        assert running.process.wait(30) == 0
    assert answers == [[b"200"]] * 40


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_what_it_accepted_is_answered(bundle: Path, number: int) -> None:
    body = json.dumps({"inputs": [BRIGHT]}).encode()
    head = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with serving(["-m", "espalier.serving", str(bundle), "--port", "0"], bundle) as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as client:
            client.sendall(head % len(body) + body[:5])
            while running.ask("GET", "/health")[0] != 200:
                pass
            running.process.send_signal(number)
            while not is_closed(running.port):
                time.sleep(0.05)
            client.sendall(body[5:])
            with client.makefile("rb") as answer:
                assert b'"label":"bright"' in answer.read()
        assert running.process.wait(30) == 0


def is_closed(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


def test_several_workers_share_the_port_and_add_up_their_numbers(bundle: Path) -> None:
    with serving(["-m", "espalier.serving", str(bundle), "--port", "0", "--workers", "2"], bundle) as running:
        for _ in range(20):
            assert running.predict([BRIGHT])[0]["label"] == "bright"
        text = running.ask("GET", "/metrics")[1]
        assert 'espalier_requests_total{route="/predict",status="200"} 20.0' in text.splitlines()
        assert running.stop() == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["task.port=70000"], "task.port=70000: should be less than or equal to 65535"),
        (["task.workers=0"], "task.workers=0: "),
        (["task.queue=8"], "task.queue=8: must hold at least one batch; task.max_batch=32"),
        (["task.host=192.0.2.1"], "task.host=192.0.2.1 task.port=8000: cannot listen there"),
        (["source=null"], "source=null: serve needs an exported RUN"),
    ],
)
def test_what_cannot_work_ends_in_one_line(espalier: Command, runs: Path, words: list[str], told: str) -> None:
    [exported] = runs.glob("logs/export/*")
    outcome = espalier("serve", f"source={exported}", *words)
    assert outcome.code == 2
    assert told in outcome.err
    assert "Traceback" not in outcome.err


def test_a_port_that_is_taken_is_named(espalier: Command, runs: Path) -> None:
    [exported] = runs.glob("logs/export/*")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = espalier("serve", f"source={exported}", f"task.port={port}")
    assert outcome.code == 2
    assert f"task.port={port}: cannot listen there: Address already in use" in outcome.err


def test_it_stands_odd_requests_while_it_answers_good_ones(bundle: Path) -> None:
    words = [sys.executable, str(REQUESTS), str(bundle), "--requests", "200", "--warm-up", "100"]
    ended = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    assert "0 x 5xx, 0 not as they should be" in ended.stdout
    growth = re.findall(r"growth (-?[\d.]+) MB", ended.stdout)
    assert float(growth[0]) < 200, ended.stdout  # not the seconds: other tests run beside this one

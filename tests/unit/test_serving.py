"""The parts of the server, each against values computed by hand."""

import asyncio
import base64
import json
import socket
import struct
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from omegaconf import OmegaConf
from onnx import helper
from PIL import Image

from espalier.config import conf_dir
from espalier.errors import ConfigError
from espalier.serving import inputs, occlusion, predictor
from espalier.serving.app import App, Row
from espalier.serving.batcher import Batcher
from espalier.serving.errors import ClientGoneError, RequestError
from espalier.serving.hosts import Hosts, require_names
from espalier.serving.predictor import Predictor
from espalier.serving.protocol import Protocol
from espalier.serving.settings import Settings
from espalier.serving.timeouts import patiently
from espalier.spec import DataSpec
from helpers.server import bundle_of, endless_bundle, linear_bundle

PICTURE = DataSpec.single("pictures", (1, 2, 2), scale=16.0, mean=(0.5,), std=(0.25,), class_names=("no", "yes"))
TABLE = DataSpec.single(
    "table", (3,), scale=1.0, mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 1.0), target_mean=10.0, target_std=2.0
)


def png(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_probabilities_are_the_softmax_of_the_normalised_input_times_the_matrix(tmp_path: Path) -> None:
    weight_NK = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    predictor = Predictor(linear_bundle(tmp_path, PICTURE, weight_NK), threads=1)
    raw = np.array([[[[16, 12], [0, 0]]]], dtype=np.float32)  # normalised: 2, 1, -2, -2; logits 2, 2
    np.testing.assert_allclose(predictor.predict(raw), [[0.5, 0.5]], atol=1e-6)
    raw[0, 0, 0, 1] = 8  # normalised 0, logits 2, 0
    odds = np.exp(2.0)
    np.testing.assert_allclose(predictor.predict(raw), [[odds / (odds + 1), 1 / (odds + 1)]], atol=1e-6)


@pytest.mark.parametrize("sample_by_sample", [False, True])
def test_a_regression_answers_in_the_unit_of_its_target(tmp_path: Path, sample_by_sample: bool) -> None:
    weight_NK = np.array([[1.0], [1.0], [0.0]])
    predictor = Predictor(linear_bundle(tmp_path, TABLE, weight_NK, sample_by_sample), threads=1)
    raw = np.array([[2, 4, 0], [1, 2, 3]], dtype=np.float32)  # normalised 1, 1, -3 and 0, 0, 0
    np.testing.assert_allclose(predictor.predict(raw), [[10 + 2 * 2], [10]], atol=1e-5)


def test_a_bundle_without_onnx_is_refused_by_name(tmp_path: Path) -> None:
    folder = linear_bundle(tmp_path, TABLE, np.zeros((3, 1)))
    content = json.loads((folder / "bundle.json").read_text())
    content["formats"] = {"openvino": {"files": ["model.onnx"]}}
    (folder / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"holds openvino.*task\.format"):
        Predictor(folder, threads=1)


def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    folder = linear_bundle(tmp_path, TABLE, np.zeros((3, 1)))
    (folder / "model.onnx").write_bytes(b"no network")
    with pytest.raises(ConfigError, match=r"model\.onnx was changed"):
        Predictor(folder, threads=1)


def changed(folder: Path, **values: object) -> Path:
    """The bundle with other values in its spec."""
    content = json.loads((folder / "bundle.json").read_text())
    content["data"] |= values
    (folder / "bundle.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"class_names": ["no", "yes", "more"]}, r"'logits' is .*\(batch, 3\)|answers a batch of 1 with \(1, 2\)"),
        ({"class_names": ["no", "no"]}, "two classes have the name 'no'"),
        ({"class_names": ["no", "\ud800"]}, "its description is wrong"),
        ({"class_names": [1, 2]}, "spec.class_names: no such value"),
        ({"class_names": "no"}, "spec.class_names: no such value"),
        ({"shape": [1, -2, 2]}, r"spec.shape: \(1, -2, 2\) is no shape"),
        ({"shape": [1, 2, 3]}, r"'input' is tensor\(float\) of .*the data has \(batch, 1, 2, 3\)"),
        ({"shape": []}, r"spec.shape: \(\) is no shape"),
        ({"shape": [10**6, 10**6, 10**6]}, "is no shape"),
        ({"mean": [0.5, 0.5]}, "spec.mean: 2 values for 1 channels"),
        ({"std": [0.0]}, "must be above 0"),
        ({"std": [1e-60]}, "must be above 0"),
        ({"scale": 0}, "must be above 0"),
        ({"mean": [1e300]}, "beyond 32 bits"),
        ({"scale": 10**400}, "its description is wrong"),
    ],
)
def test_a_bundle_that_cannot_answer_is_refused_in_one_line(tmp_path: Path, values: dict, told: str) -> None:
    folder = changed(linear_bundle(tmp_path, PICTURE, np.zeros((4, 2))), **values)
    with pytest.raises(ConfigError, match=told) as refused:
        Predictor(folder, threads=1)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("node", "names", "told"),
    [
        (("Identity", ["x"], ["logits"]), ("x", "logits"), "it has 'x' in place of 'input'"),
        (("Identity", ["input"], ["y"]), ("input", "y"), "it has 'y' in place of 'logits'"),
        (("Identity", ["input"], ["logits"]), ("input", "logits"), r"'logits' is .*, the data has \(batch, 1\)"),
        (
            ("Log", ["sum"], ["logits"]),
            ("input", "logits"),
            "its answer to the mean of the training data is not finite",
        ),
        (("Reshape", ["sum", "one"], ["logits"]), ("input", "logits"), "it does not answer a batch of 2: "),
    ],
)
def test_a_network_that_cannot_be_asked_is_refused(tmp_path: Path, node: tuple, names: tuple, told: str) -> None:
    total = helper.make_node("ReduceSum", [names[0], "side"], ["sum"], keepdims=1)
    values = {"side": np.array([1]), "one": np.array([1, 1])}
    folder = bundle_of(tmp_path, TABLE, [total, helper.make_node(*node)], values, names=names)
    with pytest.raises(ConfigError, match=f"the network cannot be served: {told}") as refused:
        Predictor(folder, threads=1)
    assert len(str(refused.value).splitlines()) == 1


def test_a_network_that_never_ends_is_refused_when_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "FIRST_S", 0.5)
    folder = endless_bundle(tmp_path, PICTURE)  # which answers the mean
    monkeypatch.setattr(predictor, "normalise", lambda spec, raw: np.ones_like(raw))
    with pytest.raises(ConfigError, match=r"it has not answered a sample within 0\.5 s"):
        Predictor(folder, threads=1, time_limit_s=0.5)


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"", 400, "not JSON"),
        (b'{"inputs": [NaN]}', 400, "not JSON"),
        (b'{"inputs": [1e999]}', 400, "not JSON"),
        (b"[1]", 422, '{"inputs": '),
        (b'{"inputs": 1}', 422, '{"inputs": '),
        (b'{"inputs": [1], "model": "/etc/passwd"}', 422, "other keys"),
        (
            b'{"inputs": [[[1, 2], [3, 4]]]}',
            422,
            r"inputs[0]: shape [2, 2]; each sample must be numbers of shape [1, 2, 2]",
        ),
        (b'{"inputs": [[[[1, 2], [3]]]]}', 422, "inputs[0]: rows of different lengths"),
        (b'{"inputs": [[[[1, 2], [3, 4]]], [[[1, 2], [3, "4"]]]]}', 422, "inputs[1]: something that is no number"),
        (b'{"inputs": [[[[1, 2], [3, null]]]]}', 422, "no number"),
        (b'{"inputs": [[[[true, true], [true, true]]]]}', 422, "no number"),
        (b'{"inputs": [[[[1, 2], [3, 1e39]]]]}', 422, "a number is beyond 3.4e+38"),
        (b'{"inputs": [[[[1, 2], [3, true]]]]}', 422, "inputs[0]: something that is no number"),
        (b'{"inputs": [[["' + b"a" * 99_000 + b'"' + b',""' * 9_000 + b"]]]}", 422, "inputs[0]: shape [1, 9001]"),
        (b'{"inputs": [[[[1, 2], [3, "' + b"a" * 99_000 + b'"]]]]}', 422, "inputs[0]: something that is no number"),
        (b'{"inputs": [[[[1, 2], [3, ' + b"9" * 400 + b"]]]]}", 400, "not JSON"),
        (b'{"inputs": [[[[1, 2], [3, 18446744073709551615]]], [[[1, 2], 3]]]}', 422, "inputs[1]: rows of different"),
        (b'{"inputs": ' + b"[" * 500 + b"]" * 500 + b"}", 422, "nested too deep"),
    ],
)
def test_what_is_no_sample_is_told_in_a_sentence(body: bytes, status: int, told: str) -> None:
    tracemalloc.start()
    with pytest.raises(RequestError) as refused:
        inputs.arrays(PICTURE, inputs.from_json(body))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000  # numpy would make 900 MB of strings
    tracemalloc.stop()
    assert refused.value.status == status
    assert told in refused.value.message


def test_a_body_of_more_parts_than_its_samples_have_is_refused_before_it_is_parsed() -> None:
    whole = json.dumps({"inputs": [[[[0, 1], [2, 3]]]] * 8}).encode()
    inputs.require_parts(PICTURE, whole, most=8)
    files = json.dumps({"inputs": [{"image": "aGVsbG8="}] * 8}).encode()
    inputs.require_parts(PICTURE, files, most=8)
    for body in (b'{"inputs": [%s[]]}' % (b"[]," * 50), b'{"inputs": [%s0]}' % (b"0," * 100), b"[" * 100):
        with pytest.raises(RequestError, match=r"more parts than 8 samples of shape \[1, 2, 2\]"):
            inputs.require_parts(PICTURE, body, most=8)


def test_a_picture_in_base64_is_the_array_that_it_shows() -> None:
    pixels = np.array([[0, 255], [255, 0]])
    item = {"image": base64.b64encode(png(pixels)).decode()}
    raw = inputs.mixed(PICTURE, [item, [[[0, 16], [16, 0]]]])
    np.testing.assert_allclose(raw[0], raw[1])


@pytest.mark.parametrize(
    ("item", "status", "told"),
    [
        ({"image": "?"}, 422, "inputs[0].image: not base64"),
        ({"image": "aGVsbG8="}, 422, "cannot be read"),
        ({"image": 5}, 422, "base64 of a picture file"),
        ({"url": "http://localhost"}, 422, "base64 of a picture file"),
        ({"image": base64.b64encode(png(np.zeros((4001, 4000)))).decode()}, 413, "more than 16000000 pixels"),
    ],
)
def test_what_is_no_picture_is_told_in_a_sentence(item: dict, status: int, told: str) -> None:
    with pytest.raises(RequestError) as refused:
        inputs.mixed(PICTURE, [item])
    assert refused.value.status == status
    assert told in refused.value.message


def test_pictures_share_one_limit_of_pixels() -> None:
    half = png(np.zeros((3000, 3000)))
    inputs.pictures(PICTURE, [half])
    with pytest.raises(RequestError, match="pixels in all"):
        inputs.pictures(PICTURE, [half, half])


def test_a_format_that_is_not_on_the_list_is_not_decoded() -> None:
    file = BytesIO()
    Image.new("L", (16, 16)).save(file, "ICO")
    with pytest.raises(RequestError, match="cannot be read: no picture of PNG"):
        inputs.pictures(PICTURE, [file.getvalue()])


def test_a_network_of_numbers_takes_no_pictures() -> None:
    with pytest.raises(RequestError, match=r"shape \[3\], not pictures"):
        inputs.pictures(TABLE, [png(np.zeros((2, 2)))])


def test_covering_a_feature_of_a_linear_function_costs_its_weight_times_its_distance_from_the_mean() -> None:
    raw, weight_F = np.array([3, 2, 1], dtype=np.float32), np.array([2.0, 5.0, -1.0])
    copies, masks = occlusion.covered(TABLE, raw)
    heat = occlusion.heat((raw @ weight_F - copies @ weight_F).astype(np.float32), masks)
    np.testing.assert_allclose(heat, (raw - np.array(TABLE.mean)) * weight_F, atol=1e-6)


def test_every_pixel_of_a_picture_is_covered_equally_often_and_set_to_the_mean() -> None:
    spec = DataSpec.single("pictures", (3, 16, 24), scale=255.0, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    copies, masks = occlusion.covered(spec, np.zeros(spec.shape, dtype=np.float32))
    assert set(masks.sum(axis=0).flat) == {4}
    for copy, mask in zip(copies, masks, strict=True):
        np.testing.assert_allclose(copy[:, mask].T, np.tile([25.5, 51.0, 76.5], (mask.sum(), 1)), rtol=1e-6)
        assert not copy[:, ~mask].any()


def test_the_heat_is_where_the_function_looks() -> None:
    spec = DataSpec.single("pictures", (1, 16, 16), scale=1.0, mean=(0.0,), std=(1.0,))
    raw = np.ones(spec.shape, dtype=np.float32)
    copies, masks = occlusion.covered(spec, raw)
    heat = occlusion.heat(raw[0, 12, 3] - copies[:, 0, 12, 3], masks)
    assert heat[12, 3] == heat.max() == 1
    assert heat[2, 12] == 0


class Held:
    """Doubles its input once it is let go; remembers the batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.go = threading.Event()

    def __call__(self, raw: np.ndarray) -> list[float]:
        self.sizes.append(len(raw))
        assert self.go.wait(30)
        return (2 * raw[:, 0]).tolist()


def sample(value: float) -> np.ndarray:
    return np.array([[value]], dtype=np.float32)


def test_requests_that_wait_for_a_busy_network_share_its_next_call() -> None:
    async def run() -> list[list[float]]:
        batcher = Batcher(held, max_batch=4, queue=10, observe=seen.append)
        outcomes = [batcher.submit(sample(0))]
        while not held.sizes:
            await asyncio.sleep(0.001)
        outcomes += [batcher.submit(sample(value)) for value in range(1, 7)]
        held.go.set()
        rows = await asyncio.gather(*outcomes)
        batcher.stop()
        return rows

    held, seen = Held(), list[int]()
    assert asyncio.run(run()) == [[2.0 * value] for value in range(7)]
    assert held.sizes == seen == [1, 4, 2]


def test_more_samples_than_may_wait_are_turned_away_and_the_rest_is_answered() -> None:
    async def run() -> None:
        batcher = Batcher(held, max_batch=2, queue=3, observe=lambda size: None)
        first = batcher.submit(sample(1))
        while not held.sizes:
            await asyncio.sleep(0.001)
        rest = [batcher.submit(sample(value)) for value in (2, 3, 4)]
        with pytest.raises(RequestError, match="overloaded: 3 samples wait of 3") as refused:
            batcher.submit(sample(5))
        assert refused.value.status == 503
        held.go.set()
        assert await asyncio.gather(first, *rest) == [[2.0], [4.0], [6.0], [8.0]]
        batcher.stop()

    held = Held()
    asyncio.run(run())


def test_what_nobody_waits_for_any_more_is_not_run() -> None:
    async def run() -> None:
        batcher = Batcher(held, max_batch=8, queue=8, observe=lambda size: None)
        first = batcher.submit(sample(1))
        while not held.sizes:
            await asyncio.sleep(0.001)
        left, stays = batcher.submit(sample(2)), batcher.submit(sample(3))
        left.cancel()
        held.go.set()
        assert await stays == [6.0]
        assert await first == [2.0]
        batcher.stop()

    held = Held()
    asyncio.run(run())
    assert held.sizes == [1, 1]


def test_a_request_of_many_samples_is_run_in_batches_and_answered_in_order() -> None:
    async def run() -> list[float]:
        batcher = Batcher(held, max_batch=4, queue=8, observe=lambda size: None)
        rows = await batcher.rows(np.arange(10, dtype=np.float32)[:, None])
        batcher.stop()
        return rows

    held = Held()
    held.go.set()
    assert asyncio.run(run()) == [2.0 * value for value in range(10)]
    assert held.sizes == [4, 4, 2]


def test_an_error_of_the_network_reaches_its_requests_and_the_next_one_is_answered() -> None:
    def fail_once(raw: np.ndarray) -> list[float]:
        if raw[0, 0] == 0:
            raise ValueError("zero")
        return raw[:, 0].tolist()

    async def run() -> None:
        batcher = Batcher(fail_once, max_batch=4, queue=8, observe=lambda size: None)
        with pytest.raises(ValueError, match="zero"):
            await batcher.submit(sample(0))
        assert await batcher.submit(sample(1)) == [1.0]
        batcher.stop()

    asyncio.run(run())


def test_a_waiter_that_raises_takes_nothing_from_the_others_of_its_batch() -> None:
    class Raising:
        def done(self) -> bool:
            return False

        def set_result(self, rows: list[float]) -> None:
            raise ValueError("cannot be delivered")

        set_exception = set_result

    async def run() -> list[float]:
        batcher = Batcher(held, max_batch=4, queue=8, observe=lambda size: None)
        batcher.enqueue(sample(1), Raising())
        row = batcher.submit(sample(2))
        held.go.set()
        rows = await asyncio.wait_for(row, 10)
        batcher.stop()
        return rows

    held = Held()
    assert asyncio.run(run()) == [4.0]
    assert held.sizes == [2]


def test_requests_of_several_batches_hold_no_more_than_twice_the_queue() -> None:
    async def run() -> None:
        batcher = Batcher(held, max_batch=2, queue=4, observe=lambda size: None)
        long = [batcher.rows(np.zeros((4, 1), dtype=np.float32)) for _ in range(2)]
        with pytest.raises(RequestError, match="overloaded: 8 samples of long requests wait"):
            batcher.rows(np.zeros((3, 1), dtype=np.float32))
        held.go.set()
        await asyncio.gather(*long)
        assert len(await batcher.rows(np.zeros((9, 1), dtype=np.float32))) == 9
        batcher.stop()

    held = Held()
    asyncio.run(run())


def test_names_of_hosts_are_judged_with_any_port_and_addresses_alone_where_all_are_listened_on() -> None:
    def status(host: bytes, bound: str = "127.0.0.1", allowed: tuple[str, ...] = ()) -> int:
        problem = Hosts(bound, allowed).problem("1.1", b"/", [(b"host", host)])
        return problem[0] if problem else 200

    assert [status(host) for host in (b"localhost:1", b"LOCALHOST", b"localhost.", b"127.0.0.1:80", b"[::1]")] == [
        200
    ] * 5
    assert [status(host) for host in (b"evil.example", b"", b"localhost:a", b"10.0.0.1", b"[::2]", b"a@localhost")] == [
        421
    ] * 6
    assert [status(b"10.0.0.1", bound) for bound in ("0.0.0.0", "::", "10.0.0.1", "192.0.2.1")] == [200, 200, 200, 421]
    assert [status(b"evil.example", "0.0.0.0"), status(b"[fe80::1]:8", "0.0.0.0")] == [421, 200]
    assert [status(b"a.example:80", allowed=("A.example",)), status(b"any", allowed=("*",))] == [200, 200]


@pytest.mark.parametrize("name", ["http://a.example", "a.example:80", "", "a b", "[::1]:80"])
def test_a_name_of_a_host_has_no_scheme_and_no_port(name: str) -> None:
    with pytest.raises(ConfigError, match="no name of a host"):
        require_names([name])
    require_names(["a.example", "[::1]", "*"])


def test_an_answer_that_takes_longer_than_its_limit_ends_with_504() -> None:
    async def run() -> None:
        never = asyncio.get_running_loop().create_future()
        with pytest.raises(RequestError, match=r"no answer within 0\.1 s") as refused:
            await patiently(never, asyncio.Queue().get, 0.1)
        assert refused.value.status == 504
        assert never.cancelled()

    asyncio.run(run())


def test_a_client_that_leaves_takes_its_request_along() -> None:
    async def run() -> None:
        never = asyncio.get_running_loop().create_future()
        messages: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        messages.put_nowait({"type": "http.disconnect"})
        with pytest.raises(ClientGoneError):
            await patiently(never, messages.get, 30)
        assert never.cancelled()

    asyncio.run(run())


def test_a_small_request_waits_no_longer_than_it_is_wanted(tmp_path: Path) -> None:
    """Over a socket, with a network that is let go when the test says so."""

    async def run() -> list[bytes]:
        config = uvicorn.Config(App(settings, ""), http=Protocol, loop="asyncio", lifespan="on", proxy_headers=False)
        config.load()
        server, app = uvicorn.Server(config), config.loaded_app
        server.lifespan = config.lifespan_class(config)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            await server.startup([listening])
            app.batcher._run = lambda raw: [Row(values, 0, True) for values in zip(held(raw), strict=True)]
            port = listening.getsockname()[1]
            late = await asyncio.open_connection("127.0.0.1", port)
            late[1].write(request)
            answer = await late[0].readuntil(b"}")
            gone = await asyncio.open_connection("127.0.0.1", port)
            gone[1].write(request)
            while not app.batcher.num_waiting:
                await asyncio.sleep(0.001)
            reset = struct.pack("ii", 1, 0)  # a connection that is only ended may still be read from
            gone[1].get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            gone[1].close()
            while (text := app.metrics.text()) and b'status="499"' not in text:
                await asyncio.sleep(0.001)
            held.go.set()
            late[1].write(request)
            answers = [answer, await late[0].readuntil(b"}]}"), text]
            late[1].close()
            await server.shutdown([listening])
        return answers

    spec = DataSpec.single("numbers", (1,), scale=1.0, mean=(0.0,), std=(1.0,), target_mean=0.0, target_std=1.0)
    folder = linear_bundle(tmp_path, spec, np.array([[1.0]]))
    settings = replace(Settings.from_words([str(folder)]), time_limit_s=0.5)
    request = (
        b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 16\r\n\r\n"
    )
    request += b'{"inputs":[[7]]}'
    held = Held()
    too_late, in_time, metrics = asyncio.run(asyncio.wait_for(run(), 30))
    assert too_late.startswith(b"HTTP/1.1 504 ")
    assert too_late.endswith(b'{"error":"no answer within 0.5 s; the server is too busy"}')
    assert in_time.endswith(b'{"predictions":[{"value":14.0}]}')
    assert b'espalier_requests_total{route="/predict",status="499"} 1.0' in metrics
    assert held.sizes == [1, 1]  # the one whose client had gone was not run


def test_the_command_line_of_the_process_has_the_values_of_the_yaml(tmp_path: Path) -> None:
    written = OmegaConf.to_container(OmegaConf.load(conf_dir.CONF / "task" / "serve.yaml"))
    assert isinstance(written, dict)
    del written["_target_"]
    assert Settings.from_words([str(tmp_path)]) == Settings(bundle=tmp_path, **written)


def test_settings_survive_the_way_through_a_command_line(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "with space", "::1", ["a.example", "*"], 0, 2, 3, 4, 5, 0.5, 1.5)
    assert Settings.from_words(settings.to_words()) == settings


@pytest.mark.parametrize(
    "words", [["--port", "70000"], ["--workers", "0"], ["--time-limit-s", "nan"], ["--queue", "3"]]
)
def test_a_wrong_command_line_ends_with_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        Settings.from_words(["bundle", *words])
    assert end.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_the_server_imports_what_the_container_file_installs_and_no_more() -> None:
    code = (
        "import sys, espalier.serving.__main__, espalier.serving.app, espalier.serving.protocol;"
        "print(*{name.partition('.')[0] for name, module in sys.modules.items()"
        " if 'site-packages' in (getattr(module, '__file__', None) or '')})"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    imported = {name for name in output.split() if not name.startswith("_")}  # those come with setuptools
    container = (Path(__file__).parents[2] / "scripts" / "serve.Dockerfile").read_text()
    names = {"pillow": "PIL", "python-multipart": "python_multipart", "prometheus-client": "prometheus_client"}
    [line] = [line for line in container.splitlines() if line.strip().startswith("onnxruntime ")]
    installed = {names.get(name, name) for name in line.split()}
    assert {"onnxruntime", "uvicorn"} <= imported
    assert imported <= installed | {"click", "h11"}  # which come with uvicorn

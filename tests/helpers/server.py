"""A bundle whose network is a matrix, so that its answers can be computed by hand, and a server to ask."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from espalier.export import bundle
from espalier.spec import DataSpec, Input, Target

WORDS = Input("tokens", "tokens", ("T",), vocabulary=("good", "bad", "film"))
TEXTS = DataSpec("reviews", (WORDS,), (Target("logits", "classes", ("negative", "positive")),), (("T", 6),))
VOTES = np.array([[0, 0], [0, 0], [0, 2], [2, 0], [0, 0]], dtype=np.float32)  # padding, unknown, good, bad, film


def linear_bundle(folder: Path, spec: DataSpec, weight_NK: np.ndarray, sample_by_sample: bool = False) -> Path:
    """A bundle whose logits are the flattened, normalised input times a matrix."""
    nodes = [helper.make_node("Flatten", ["input"], ["x"]), helper.make_node("MatMul", ["x", "w"], ["logits"])]
    return bundle_of(folder, spec, nodes, {"w": weight_NK.astype(np.float32)}, sample_by_sample)


def bag_bundle(
    folder: Path,
    spec: DataSpec = TEXTS,
    votes_VK: np.ndarray = VOTES,
    sample_by_sample: bool = False,
    length: int | str = "T",
) -> Path:
    """A bundle whose logits are the sum of what each token of a text says."""
    nodes = [
        helper.make_node("Gather", ["votes", "tokens"], ["each"]),
        helper.make_node("ReduceSum", ["each", "side"], ["logits"], keepdims=0),
    ]
    taken = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", length])
    values = {"votes": votes_VK.astype(np.float32), "side": np.array([1])}
    return bundle_of(folder, spec, nodes, values, sample_by_sample, taken=taken)


def endless_bundle(folder: Path, spec: DataSpec) -> Path:
    """A bundle whose network turns in a loop for ever where an input is above the mean, and answers zeros elsewhere."""
    nothing = helper.make_tensor_value_info("turned", TensorProto.FLOAT, None)
    turn = helper.make_graph(
        [
            helper.make_node("Identity", ["goes_on"], ["goes_on_then"]),
            helper.make_node("Add", ["x", "one"], ["turned"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        ],
        [helper.make_tensor_value_info("goes_on_then", TensorProto.BOOL, []), nothing],
        [numpy_helper.from_array(np.float32(1), "one")],
    )
    nodes = [
        helper.make_node("ReduceMax", ["input"], ["most"], keepdims=0),
        helper.make_node("Mul", ["most", "huge"], ["product"]),
        helper.make_node("Cast", ["product"], ["turns"], to=TensorProto.INT64),
        helper.make_node("Loop", ["turns", "true", "zero"], ["last"], body=turn),
        helper.make_node("Mul", ["last", "zero"], ["nothing"]),
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["zeros"]),
        helper.make_node("Add", ["zeros", "nothing"], ["logits"]),
    ]
    zeros = np.zeros((int(np.prod(spec.shape)), spec.num_outputs), dtype=np.float32)
    values = {"huge": np.float32(1e18), "true": np.bool_(True), "zero": np.float32(0), "w": zeros}
    return bundle_of(folder, spec, nodes, values)


def bundle_of(
    folder: Path,
    spec: DataSpec,
    nodes: Sequence[onnx.NodeProto],
    values: Mapping[str, Any],
    sample_by_sample: bool = False,
    names: tuple[str, str] = ("input", "logits"),
    taken: onnx.ValueInfoProto | None = None,
) -> Path:
    """A bundle of a graph from `input`, or what else is `taken`, to `logits`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [taken or helper.make_tensor_value_info(names[0], TensorProto.FLOAT, ["batch", *spec.shape])],
        [helper.make_tensor_value_info(names[1], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    draft = folder / "draft"
    draft.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), draft / "model.onnx"
    )
    return described(folder, draft, spec, sample_by_sample)


def described(folder: Path, draft: Path, spec: DataSpec, sample_by_sample: bool = False) -> Path:
    """A bundle of the file `model.onnx` in a draft."""
    content: dict[str, Any] = {
        "name": "linear",
        "data": spec.to_dict(),
        "sample_by_sample": sample_by_sample,
        "formats": {"onnx": {"files": ["model.onnx"], "runtime": "onnxruntime", "parity": None}},
        "config": {"secret": str(folder)},
    }
    bundle.write(draft, folder / "export", content)
    return folder / "export"


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port

    def ask(
        self, method: str, path: str, body: bytes | str | None = None, kind: str = "application/json"
    ) -> tuple[int, Any]:
        """Status and content of the answer."""
        status, _, content = self.ask_all(method, path, body, kind)
        return status, content

    def ask_all(
        self, method: str, path: str, body: bytes | str | None, kind: str
    ) -> tuple[int, http.client.HTTPMessage, Any]:
        """Status, headers and content of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"content-type": kind} if body is not None else {})
            answer = connection.getresponse()
            text = answer.read()
            is_json = answer.headers["content-type"] == "application/json"
            return answer.status, answer.headers, json.loads(text) if is_json and text else text.decode()
        finally:
            connection.close()

    def exchange(self, *pieces: bytes, ends: bool = False) -> bytes:
        """All that comes back over a connection to which the pieces are sent; `ends`: and closed on our side."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as client:
            for piece in pieces:
                client.sendall(piece)
                if len(pieces) > 1:
                    time.sleep(0.05)
            if ends:
                client.shutdown(socket.SHUT_WR)
            with client.makefile("rb") as file:
                return file.read()

    def predict(self, samples: Any) -> list[dict[str, Any]]:
        """The predictions of arrays."""
        status, content = self.ask("POST", "/predict", json.dumps({"inputs": np.asarray(samples).tolist()}))
        assert status == 200, content
        return content["predictions"]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def serving(words: Sequence[str], folder: Path, log: int | None = None) -> Iterator[Server]:
    """`python WORDS` in `folder`, from the moment it says that it serves until the end of the block.

    `log` is the descriptor for what it writes to stderr.
    """
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready.startswith("serving "), ready
        yield Server(process, int(ready.strip().rpartition(":")[2]))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()

"""A bundle whose network is a matrix, so that its answers can be computed by hand, and a server to ask."""

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from espalier.export import bundle
from espalier.spec import DataSpec


def linear_bundle(folder: Path, spec: DataSpec, weight_NK: np.ndarray, sample_by_sample: bool = False) -> Path:
    """A bundle whose logits are the flattened, normalised input times a matrix."""
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["input"], ["x"]), helper.make_node("MatMul", ["x", "w"], ["logits"])],
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *spec.shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", weight_NK.shape[1]])],
        [numpy_helper.from_array(weight_NK.astype(np.float32), "w")],
    )
    draft = folder / "draft"
    draft.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), draft / "model.onnx"
    )
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
def serving(words: Sequence[str], folder: Path) -> Iterator[Server]:
    """`python WORDS` in `folder`, from the moment it says that it serves until the end of the block."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
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

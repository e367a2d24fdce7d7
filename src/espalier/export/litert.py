"""A network for LiteRT, once TensorFlow Lite: one sample per call, as devices at hand run it.

litert-torch cannot follow a batch of unknown size through a view or an expansion, nor through int8 operators. Its
dependencies pin older packages than this one needs, so it is no extra; see INSTALL.
"""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from espalier.compression.base import Conversion
from espalier.compression.graph_module import CapturedNet
from espalier.config.ranges import Count
from espalier.errors import ConfigError
from espalier.export.formats import Format, converting, draft, require_package, require_precision, silent
from espalier.export.torch_export import program
from espalier.signature import example
from espalier.spec import DataSpec

INSTALL = "pip install litert-torch==0.10.0, then pip install 'typing-extensions>=4.16' 'pydantic>=2.13'"


class LiteRT(Format):
    """A network for LiteRT, which runs one sample per call."""

    runtime: ClassVar[str] = "litert"
    files: ClassVar[tuple[str, ...]] = ("model.tflite",)

    def require(self, key: str) -> None:
        """Raise `ConfigError` unless litert-torch is installed."""
        for package in ("litert_torch", "ai_edge_litert"):
            require_package(key, package, INSTALL)

    def write(self, model: nn.Module, spec: DataSpec, path: Path, conversion: Conversion | None = None) -> None:
        """Write the network for one sample at a time."""
        if isinstance(model, CapturedNet):
            raise ConfigError(
                "task.format=litert: litert-torch cannot convert the integers of a network that is quantized in torch; "
                "onnx, openvino and torch_export do"
            )
        require_precision("litert", model)
        with converting("litert"), draft(path) as target, silent():
            import litert_torch

            nameless = program(model, spec, max_batch=1).module()  # or the file names the classes of its layers
            litert_torch.convert(nameless, example(spec, 1)).export(str(target))

    def session(self, path: Path, threads: Count) -> Callable[..., Tensor]:
        return Session(path, threads)


class Session:
    """The file in LiteRT, on the CPU, sample by sample."""

    def __init__(self, path: Path, threads: Count) -> None:
        from ai_edge_litert.interpreter import Interpreter

        with silent():
            self._network = Interpreter(str(path), num_threads=threads)
            self._network.allocate_tensors()
        self._input = self._network.get_input_details()[0]["index"]
        self._output = self._network.get_output_details()[0]["index"]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.concatenate([self._run(sample) for sample in x.numpy(force=True)[:, None]]))

    def _run(self, sample: np.ndarray) -> np.ndarray:
        self._network.set_tensor(self._input, sample)
        self._network.invoke()
        logits: np.ndarray = self._network.get_tensor(self._output)
        return logits

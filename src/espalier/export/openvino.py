"""A network for OpenVINO, made from its ONNX file: Intel processors run its int8 layers in integers.

Only `read_model` is used: `convert_model` would report each conversion to the makers of OpenVINO.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.compression.base import Conversion
from espalier.config.ranges import Count
from espalier.export import onnx
from espalier.export.formats import Format, converting, draft, require_package, require_precision
from espalier.spec import DataSpec


class OpenVINO(Format):
    """An OpenVINO graph and its weights, made from the ONNX file."""

    runtime: ClassVar[str] = "openvino"
    files: ClassVar[tuple[str, ...]] = ("model.xml", "model.bin")
    precisions: ClassVar[Collection[str]] = ("fp32", "fp16")
    # Ranges that each call finds would be a chain of operators in float.
    conversions: ClassVar[Collection[str]] = ("weight_only",)

    def require(self, key: str) -> None:
        """Raise `ConfigError` unless openvino is installed."""
        require_package(key, "openvino", "pip install 'espalier[openvino]'")

    def write(self, model: nn.Module, spec: DataSpec, path: Path, conversion: Conversion | None = None) -> None:
        """Write graph (`.xml`) and weights (`.bin`, same name) for batches of any size."""
        require_precision("openvino", model)
        kept = conversion if conversion is not None and conversion.kind in self.conversions else None
        with converting("openvino"), TemporaryDirectory() as folder, draft(path) as target:
            import openvino

            source = Path(folder) / "model.onnx"
            onnx.write(model, spec, source, kept)
            network = openvino.Core().read_model(source)
            openvino.save_model(network, target, compress_to_fp16=False)

    def session(self, path: Path, threads: Count) -> Callable[..., Tensor]:
        return Session(path, threads)


class Session:
    """The files in OpenVINO, on the CPU, in the precision they have: left alone, OpenVINO rounds fp32 to bf16."""

    def __init__(self, path: Path, threads: Count) -> None:
        import openvino

        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        self._network = openvino.Core().compile_model(path, "CPU", options)

    def __call__(self, x: Tensor) -> Tensor:
        (logits,) = self._network(x.numpy(force=True), share_outputs=False).values()
        return torch.from_numpy(logits)

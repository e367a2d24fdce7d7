"""A network for phones and embedded devices: an ExecuTorch program whose layers XNNPACK runs.

Networks quantized with `target=executorch` run in integers; XNNPACK has no operators for those of other targets.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.compression.base import Conversion
from espalier.config.ranges import Count
from espalier.errors import ConfigError
from espalier.export.formats import DTYPES, Format, converting, draft, require_package, silent
from espalier.export.torch_export import program
from espalier.spec import DataSpec

MAX_BATCH = 256  # memory is planned beforehand, so there is a largest batch; sessions cut what is longer
NOT_LOWERED = "quantized_decomposed"  # operators that XNNPACK has taken in where it can


class ExecuTorch(Format):
    """A program for phones and embedded devices, whose layers XNNPACK runs."""

    runtime: ClassVar[str] = "executorch"
    files: ClassVar[tuple[str, ...]] = ("model.pte",)
    precisions: ClassVar[Collection[str]] = tuple(DTYPES)

    def require(self, key: str) -> None:
        """Raise `ConfigError` unless executorch is installed."""
        require_package(key, "executorch", "pip install 'espalier[executorch]'")

    def write(self, model: nn.Module, spec: DataSpec, path: Path, conversion: Conversion | None = None) -> None:
        """Write the program for batches of 1 to MAX_BATCH."""
        with converting("executorch"), draft(path) as target, silent():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            exported = program(model, spec, num_example=MAX_BATCH, max_batch=MAX_BATCH)
            lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            if any(NOT_LOWERED in str(node.target) for node in lowered.exported_program().graph.nodes):
                raise ConfigError(
                    "task.format=executorch: XNNPACK cannot run the integers of this network; quantize it with "
                    "target=executorch, as in compression.qat.target=executorch"
                )
            target.write_bytes(lowered.to_executorch().buffer)

    def session(self, path: Path, threads: Count) -> Callable[..., Tensor]:
        return Session(path, threads)


class Session:
    """The program in ExecuTorch, on the CPU. Its threads are those of the whole process: the last session sets them."""

    def __init__(self, path: Path, threads: Count) -> None:
        with silent():  # what it could not find out about the processor
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

            if portable_lib._threadpool_get_thread_count() != threads:
                portable_lib._unsafe_reset_threadpool(threads)
            self._program = Runtime.get().load_program(path)  # held, or the method points into freed memory
            self._forward = self._program.load_method("forward")

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([self._forward.execute([part.contiguous()])[0] for part in x.cpu().split(MAX_BATCH)])

"""A network as the program that torch.export captures: a `.pt2` file that needs torch and nothing else.

Weights lie in it as bytes and the program as JSON; its example input is pickled, in a form that loads with
`weights_only=True`. What torch would do with a hostile file is in `trust/torch_program.py`, which a session asks first.
"""

import io
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from espalier.compression.base import Conversion
from espalier.config.ranges import Count
from espalier.export.formats import DTYPES, Format, converting, draft, on_cpu
from espalier.signature import dynamic, example
from espalier.spec import DataSpec
from espalier.trust.torch_program import require_harmless


class TorchExport(Format):
    """The program that torch.export captures."""

    runtime: ClassVar[str] = "torch"
    files: ClassVar[tuple[str, ...]] = ("model.pt2",)
    precisions: ClassVar[Collection[str]] = tuple(DTYPES)
    place: ClassVar[int] = 1

    def write(self, model: nn.Module, spec: DataSpec, path: Path, conversion: Conversion | None = None) -> None:
        """Write the program for batches of any size; quantized values stay integers in the file, sums are float."""
        with converting("torch_export"), draft(path) as target:
            torch.export.save(program(model, spec), target)

    def session(self, path: Path, threads: Count) -> Callable[..., Tensor]:
        return Session(path, threads)


class Session:
    """The program in torch, on the CPU. Threads are those of the whole process, so they are set for each call.

    Raises:
        ConfigError: the file holds something that would run code of its author.
    """

    def __init__(self, path: Path, threads: Count) -> None:
        require_harmless(path)
        import torch.ao.quantization.fx._decomposed  # the operators of quantized networks

        self._program = torch.export.load(path).module()
        self._threads = threads

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        with torch_threads(self._threads):
            return self._program(*(x.cpu() for x in inputs))


def program(
    model: nn.Module, spec: DataSpec, num_example: Count = 2, max_batch: Count | None = None
) -> ExportedProgram:
    """Return the network as torch operators on batches of 1 to `max_batch`, without names of files, modules and lines.

    `num_example` is the size of the batch that torch follows through the network. It matters: torch remembers which
    kernel such a batch takes, and what executorch makes of a batch below 16 refuses 16 and more.
    """
    shapes = None if max_batch == 1 else dynamic(model, spec, max_batch)
    inputs = example(spec, min(num_example, max_batch or num_example))
    with torch.no_grad():
        exported = torch.export.export(on_cpu(model), inputs, dynamic_shapes=shapes)
    for part in exported.graph_module.modules():
        if isinstance(part, GraphModule):
            for node in part.graph.nodes:
                node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    return exported


def reloaded(exported: ExportedProgram) -> ExportedProgram:
    """Return the program after a round trip through a file, which makes it accept a batch of 1 as well."""
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    return torch.export.load(file)


@contextmanager
def torch_threads(num: Count) -> Iterator[None]:
    """Let torch use this many threads inside the block."""
    before = torch.get_num_threads()
    if num != before:
        torch.set_num_threads(num)
    try:
        yield
    finally:
        if num != before:
            torch.set_num_threads(before)

"""The model as a table when a fit starts: parts, output shapes, parameters, multiply-accumulates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from espalier.config.ranges import Count
from espalier.profiling.cost import FLOPS_PER_MAC, count_params, counting
from espalier.reporting import terminal
from espalier.reporting.report import si


@dataclass
class Part:
    """One line of the summary: a part of the model, its output shape and its cost."""

    name: str
    kind: str
    params: int
    macs: int = 0
    output_shape: tuple[int, ...] | None = None
    is_called: bool = False  # as a module; a graph may stand for it, which leaves its output and MACs unknown

    @property
    def cells(self) -> tuple[str, ...]:
        shape = "" if self.output_shape is None else " x ".join(map(str, self.output_shape))
        return (self.name, self.kind, shape, si(self.params), si(self.macs) if self.is_called else "")


def parts(model: nn.Module, sample: Sequence[Tensor], depth: int) -> list[Part]:
    """Return the model and its submodules down to `depth` levels, measured on one `sample` (batch 1).

    A submodule without children is listed at whichever level it stands. One without parameters that is never called is
    left out. A model that calls no submodule with parameters runs a captured graph; the only modules that it calls then
    are quantizers, which are left out as well.
    """
    found = {
        path: Part(path, module._get_name(), count_params(module))
        for path, module in model.named_modules()
        if path.count(".") < depth
    }
    handles = []
    with counting(model) as counter:
        for path, part in found.items():
            module = model.get_submodule(path)
            handles.append(module.register_forward_hook(_note_cost(part, counter)))
            handles.append(module.register_forward_pre_hook(_note_start(part, counter)))
        try:
            model(*sample)
        finally:
            for handle in handles:
                handle.remove()
    for part in found.values():
        part.macs //= FLOPS_PER_MAC
    whole, *inner = found.values()
    layers = [part for part in inner if part.params]
    if layers and not any(part.is_called for part in layers):
        return [whole, *layers]
    return [whole, *(part for part in inner if part.params or part.is_called)]


def _note_start(part: Part, counter: Any) -> Any:
    def hook(module: nn.Module, inputs: Any) -> None:
        part.macs -= counter.get_total_flops()

    return hook


def _note_cost(part: Part, counter: Any) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        part.macs += counter.get_total_flops()
        part.is_called = True
        if isinstance(output, Tensor):
            part.output_shape = tuple(output.shape[1:])

    return hook


class Summary(L.Callback):
    """Prints the parts of `learner.model` from the first rank, for inputs shaped like `learner.example_input_array`."""

    def __init__(self, depth: Count) -> None:
        self.depth = depth

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        model, sample = pl_module.model, pl_module.example_input_array
        assert isinstance(model, nn.Module)
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            name = type(model).__name__  # one rank alone cannot run it
            terminal.console().print(f"{name}: {si(count_params(model))} parameters")
            return
        assert isinstance(sample, tuple)
        like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))
        one = [x[:1].to(like) if x.is_floating_point() else x[:1].to(like.device) for x in sample]
        terminal.console().print(table(parts(model, one, self.depth)))


def table(lines: list[Part]) -> Table:
    """Return a table with one row per part and the whole model last."""
    whole, *children = lines
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_footer=True)
    total = ("total", *whole.cells[1:])
    for header, footer in zip(("part", "type", "output", "params", "MACs"), total, strict=True):
        grid.add_column(header, footer, justify="right" if header in {"params", "MACs"} else "left")
    for part in children:
        grid.add_row(*(Text(terminal.printable(cell)) for cell in part.cells))
    return grid

"""Run samples through a network and measure the cost: in torch, by a file of a bundle, or by a file written for it."""

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from espalier.errors import ConfigError
from espalier.export import deployed, formats
from espalier.export.bundle import Bundle
from espalier.export.deployed import Deployable, Predict
from espalier.profiling import cost
from espalier.spec import DataSpec

COUNTED = ("runtime", "params", "nonzero", "macs", "size_bytes")  # what a bundle says of each of its formats

Row = dict[str, Any]  # of a report


def choose(bundle: Bundle, wanted: str | None) -> str:
    """Return the format for `task.runtime`; None takes the first of the bundle that is no machine code.

    Raises:
        ConfigError: the bundle has no such format, or this machine no such runtime.
    """
    runnable = [name for name in formats.runnable() if name in bundle.formats]
    if not runnable:
        raise ConfigError(f"source={bundle.path}: holds {', '.join(bundle.formats)}, which nothing runs; export onnx")
    if wanted is not None and wanted not in runnable:
        raise ConfigError(
            f"task.runtime={wanted}: the bundle in {bundle.path} does not hold it, but {', '.join(runnable)}; "
            "choose one of these or export again"
        )
    harmless = [name for name in runnable if not formats.named(name).is_machine_code]
    if wanted is None and not harmless:
        raise ConfigError(
            f"source={bundle.path}: holds {' and '.join(runnable)} alone, machine code that runs as it is; "
            f"if you trust its author, say task.runtime={runnable[0]}"
        )
    chosen = wanted or harmless[0]
    formats.named(chosen).require("task.runtime")
    return chosen


def in_torch(network: nn.Module, strategy: Strategy) -> Predict:
    """Return the network as a trainer runs it, in its precision and on its device; it takes and gives CPU tensors."""
    plugin, device = strategy.precision_plugin, strategy.root_device
    network = plugin.convert_module(network.eval()).to(device)

    def predict(*inputs: Tensor) -> Tensor:
        with plugin.forward_context():
            return network(*(plugin.convert_input(x.to(device)) for x in inputs)).float().cpu()

    return predict


def of_bundle(bundle: Bundle, name: str, threads: int) -> tuple[Row, Predict]:
    """Return the recorded cost of one format of a bundle, and the network in that format, ready to run."""
    rows = [row for row in bundle.content["report"] if row["name"] == name]
    row = {"name": bundle.name, **{key: row[key] for row in rows for key in COUNTED if key in row}}
    return row, deployed.session(name, bundle.file(name), threads, bundle.sample_by_sample)


def of_network(network: Deployable, name: str, spec: DataSpec, folder: Path, threads: int) -> tuple[Row, Predict]:
    """Write a network into `folder` in one format; return its cost, and the network in that format, ready to run."""
    written = formats.named(name)
    path = folder / written.files[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    written.write(network.module, spec, path, network.conversion)
    row = {
        "runtime": written.runtime,
        **cost.counts(network.trained, spec),
        "size_bytes": sum(cost.size_bytes(folder / file) for file in written.files),
    }
    return row, deployed.session(name, path, threads, deployed.is_dynamic(network.conversion))

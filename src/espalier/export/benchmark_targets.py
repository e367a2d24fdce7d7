"""The candidates of a benchmark: a network in one runtime, in one precision, on a number of threads.

Letters: B batch, K outputs.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from espalier.compression.base import is_quantized
from espalier.config.plugins import OneOf
from espalier.config.ranges import Count
from espalier.errors import ConfigError
from espalier.export import deployed, formats
from espalier.export.bundle import Bundle
from espalier.export.deployed import Deployable, Predict
from espalier.profiling import cost, latency
from espalier.profiling.memory import Load, Prepare, on_example, peak_bytes, tensor_bytes
from espalier.spec import DataSpec, Entry

Precision = Literal["fp32", "bf16"]
IN_TORCH = ("eager", "compiled")  # the others are files
Runtime = Annotated[str, OneOf(lambda: [*IN_TORCH, *formats.runnable()])]
Choice = tuple["Network", Runtime, Precision]
NOT_IN_NAMES = re.compile(r"[^\w.+-]+")  # of folders
CPU = torch.device("cpu")  # where files run
FEW_CALLS = 100  # below, the 99th percentile is the slowest call or close to it


@dataclass(frozen=True)
class Network:
    """A source of the benchmark: a network in torch, or the files of a bundle."""

    name: str
    history: Sequence[Entry]
    spec: DataSpec
    bundle: Bundle | None  # files alone
    deployable: Deployable | None
    rebuild: Callable[[], nn.Module] | None  # makes the module of `deployable` again, in another process
    files: dict[tuple[str, str], Path] = field(default_factory=dict)  # of a runtime and a precision, once written

    def in_precision(self, form: Precision) -> nn.Module:
        """Return a copy of the shipped module in this precision."""
        assert self.deployable is not None
        return formats.in_precision(copy.deepcopy(self.deployable.module), form)


@dataclass(frozen=True)
class Candidate:
    """A network in a runtime, ready to be called and measured."""

    row: dict[str, Any]  # of the report; filled while measuring
    forward: Predict  # finished when it returns
    prepare: Prepare  # the same in another process
    device: torch.device  # where samples have to be


def plan(
    networks: Sequence[Network], runtimes: Sequence[Runtime], precision: Sequence[Precision]
) -> tuple[list[Choice], list[str]]:
    """Return what can be run, and a line for each choice of the user that cannot."""
    choices: list[Choice] = []
    notes: list[str] = []
    for choice in product(networks, dict.fromkeys(runtimes), dict.fromkeys(precision)):
        network, runtime, form = choice
        what = _title(choice)
        if network.bundle and runtime not in network.bundle.formats:
            notes.append(f"not run: {what}: the bundle holds {', '.join(network.bundle.formats)}")
        elif network.bundle and form != "fp32":
            notes.append(f"not run: {what}: a bundle has the precision that it was exported in")
        elif form != "fp32" and is_quantized(network.history):
            notes.append(f"not run: {what}: its numbers are integers")
        elif runtime not in IN_TORCH and form not in formats.named(runtime).precisions:
            notes.append(f"not run: {what}: the runtime lacks layers in it on a CPU")
        else:
            choices.append(choice)
            left = network.deployable.conversion if network.deployable else None
            if left and left.kind not in _conversions(runtime):
                notes.append(f"{what} computes in float: it has no operators for {left.kind}")
    return choices, notes


def _conversions(runtime: Runtime) -> Collection[str]:
    return () if runtime in IN_TORCH else formats.named(runtime).conversions


def _title(choice: Choice) -> str:
    network, runtime, form = choice
    return f"{network.name}, {runtime}" + ("" if form == "fp32" else f" in {form}")


def build(
    choices: Sequence[Choice], device: torch.device, folder: Path, batch_size: Count, threads: Count
) -> tuple[list[Candidate], list[str]]:
    """Return all candidates that can be called, and a line for each whose network cannot be written in its format.

    Raises:
        ConfigError: no candidate can be called.
    """
    ready: list[Candidate] = []
    notes: list[str] = []
    for choice in choices:
        try:
            ready.append(candidate(choice, device, folder, batch_size, threads))
        except ConfigError as error:
            notes.append(f"not run: {_title(choice)}: {str(error).partition(': ')[2]}")
    if not ready:
        raise ConfigError(*notes)
    return ready, notes


def candidate(choice: Choice, device: torch.device, folder: Path, batch_size: Count, threads: Count) -> Candidate:
    """Return a candidate ready to be called: a module on `device`, or a file on the CPU.

    The file is written below `folder` if it does not exist. Memory is measured with calls of `batch_size` samples.
    """
    if choice[1] in IN_TORCH:
        return _in_torch(choice, device, batch_size, threads)
    return _as_file(choice, folder, batch_size, threads)


def _in_torch(choice: Choice, device: torch.device, batch_size: Count, threads: Count) -> Candidate:
    network, runtime, form = choice
    assert network.rebuild is not None
    module = network.in_precision(form)
    row = {**_row(choice), "size_bytes": tensor_bytes(module)}
    prepare = partial(_prepare_module, network.rebuild, runtime, form, threads, network.spec, batch_size, device)
    return Candidate(row, on_device(module, runtime, device), prepare, device)


def _as_file(choice: Choice, folder: Path, batch_size: Count, threads: Count) -> Candidate:
    network, runtime, _ = choice
    written, path = formats.named(runtime), _file(choice, folder)
    row = {**_row(choice), "size_bytes": sum(cost.size_bytes(path.parent / file) for file in written.files)}
    is_dynamic = network.bundle.sample_by_sample if network.bundle else False
    if network.deployable:
        is_dynamic = deployed.is_dynamic(network.deployable.conversion)
    load = partial(deployed.session, runtime, path, threads, is_dynamic)
    return Candidate(row, load(), partial(on_example, load, network.spec, batch_size, CPU), CPU)


def _row(choice: Choice) -> dict[str, Any]:
    network, runtime, form = choice
    is_plain = network.name.startswith("fp32")  # nothing was done to it, so it is called after its precision
    name = network.name.replace("fp32", form, 1) if is_plain or form == "fp32" else f"{network.name} {form}"
    counted = cost.counts(network.deployable.trained, network.spec) if network.deployable else {}
    return {"name": f"{name}, {runtime}", "runtime": runtime, **counted}


def _file(choice: Choice, folder: Path) -> Path:
    network, runtime, form = choice
    if network.bundle:
        return network.bundle.file(runtime)
    if (runtime, form) not in network.files:
        assert network.deployable is not None
        written = formats.named(runtime)
        path = folder / NOT_IN_NAMES.sub("_", f"{network.name}_{form}_{runtime}") / written.files[0]
        written.write(network.in_precision(form), network.spec, path, network.deployable.conversion)
        network.files[runtime, form] = path
    return network.files[runtime, form]


def on_device(module: nn.Module, runtime: Runtime, device: torch.device) -> Predict:
    """Return the module on a device; a compiled one is compiled anew for each batch size."""
    module = module.to(device)
    compute: Predict = torch.compile(module, dynamic=False) if runtime == "compiled" else module

    def forward(*inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            logits_BK = compute(*inputs)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return logits_BK

    return forward


def _prepare_module(
    rebuild: Callable[[], nn.Module],
    runtime: Runtime,
    form: Precision,
    threads: Count,
    spec: DataSpec,
    batch_size: Count,
    device: torch.device,
) -> Load:
    """Rebuild the network and return what `memory.peak_bytes` counts: loading a copy of it and calling it."""
    torch.set_num_threads(threads)
    network = rebuild()
    return on_example(
        lambda: on_device(formats.in_precision(copy.deepcopy(network), form), runtime, device), spec, batch_size, device
    )


def time(
    candidates: Sequence[Candidate], samples: Sequence[Tensor], batches: Sequence[Count], rounds: Count
) -> Iterator[str]:
    """Fill latencies into the rows, with all candidates of a batch size in turns; yield remarks for the reader."""
    for candidate in candidates:
        candidate.row.update(speedup={}, latency_ms={}, samples_per_second={})
    for batch_size in dict.fromkeys(batches):
        inputs = deployed.repeated(samples, batch_size)
        calls = {
            str(place): partial(each.forward, *(x.to(each.device) for x in inputs))
            for place, each in enumerate(candidates)
        }
        compared = latency.compare(calls, rounds)
        for candidate, timed in zip(candidates, compared.values(), strict=True):
            candidate.row["speedup"][str(batch_size)] = 1 / timed.ratio
            candidate.row["latency_ms"][str(batch_size)] = timed.to_dict()
            candidate.row["samples_per_second"][str(batch_size)] = batch_size * timed.calls_per_second
        fewest = min(timed.num_calls for timed in compared.values())
        if fewest < FEW_CALLS:
            few = f"batch {batch_size}: {fewest} calls of the slowest candidate"
            yield f"{few}, so its p99 is about its slowest call; more: task.rounds"


def predictor(candidate: Candidate, batch_size: Count) -> Predict:
    """Return a function that gives logits on the CPU.

    Torch is called with the batch size that is timed, padded if need be: each size would be compiled anew.
    """
    if candidate.row["runtime"] not in IN_TORCH:
        return candidate.forward

    def predict(*inputs: Tensor) -> Tensor:
        padded = (torch.cat([x, x[:1].expand(batch_size - len(x), *x.shape[1:])]) for x in inputs)
        return candidate.forward(*(x.to(candidate.device) for x in padded))[: len(inputs[0])].cpu()

    return predict


def weigh(candidates: Sequence[Candidate], threads: Count) -> Iterator[str]:
    """Fill peak memory into the rows; yield remarks for the reader."""
    for candidate in candidates:
        try:
            candidate.row["peak_bytes"] = peak_bytes(candidate.prepare, threads)
        except RuntimeError as error:
            yield f"peak memory of {candidate.row['name']} was not measured: {error}"
    yield "peak memory: what loading and running add to a process of its own, at the largest batch size"
    if any(candidate.row["runtime"] == "compiled" for candidate in candidates):
        yield "peak memory of compiled includes the compiler, which works at the first call"

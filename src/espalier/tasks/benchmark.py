"""`espalier benchmark source=RUN[,RUN...]`: what networks cost to run, beside each other, in the runtimes they ship in.

Letters: B batch.
"""

import copy
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from espalier import checkpoint
from espalier.checkpoint import Checkpoint
from espalier.compression.base import Conversion, Stage, conversion, finalize, stage_of, without_teacher
from espalier.errors import ConfigError
from espalier.export import deployed, formats
from espalier.export.bundle import Bundle
from espalier.measure import comparison, cost, frontier, latency, provenance, report
from espalier.measure.memory import Load, Prepare, on_zeros, peak_bytes, tensor_bytes
from espalier.ranges import Count
from espalier.run import Run
from espalier.spec import Report

Runtime = Literal["eager", "compiled", "onnx", "torch_export", "aotinductor", "executorch", "litert", "openvino"]
Precision = Literal["fp32", "bf16"]
IN_TORCH = ("eager", "compiled")  # the others are files
MAX_COMPILED = 1024  # forms of one forward: networks, batch sizes, threads; after 8 torch would go on uncompiled
NOT_IN_NAMES = re.compile(r"[^\w.+-]+")  # of folders
CPU = torch.device("cpu")  # where files run
FEW_CALLS = 100  # below, the 99th percentile is the slowest call or close to it

Forward = Callable[[Tensor], Tensor]  # x (B, ...) to logits; finished when it returns


@dataclass(frozen=True)
class Network:
    """What one source has to offer: a network in torch, or the files of a bundle."""

    name: str
    source: Checkpoint | Bundle
    cost: dict[str, int]
    deployable: nn.Module | None  # None: files alone
    conversion: Conversion | None  # what is left for an exporter
    files: dict[tuple[str, str], Path] = field(default_factory=dict)  # of a runtime and a precision, once written

    @property
    def is_quantized(self) -> bool:
        return any(stage_of(entry["method"]) == Stage.QUANTIZE for entry in self.source.ledger)

    def sample_by_sample(self, runtime: str) -> bool:
        """Whether a file gives the activations of each call one range, so that samples disturb each other."""
        if isinstance(self.source, Bundle):
            return self.source.sample_by_sample
        return deployed.is_dynamic(self.conversion) and "dynamic" in formats.module(runtime).CONVERSIONS


@dataclass(frozen=True)
class Candidate:
    """One network in one runtime, in one precision, on a number of threads."""

    row: dict[str, Any]  # of the report; filled while measuring
    forward: Forward
    prepare: Prepare  # the same in another process
    sample_by_sample: bool


def benchmark(
    run: Run,
    runtimes: Sequence[Runtime],
    batches: Sequence[Count],
    threads: Sequence[Count],
    precision: Sequence[Precision],
    rounds: Count,
    score: bool,
    memory: bool,
) -> Report:
    """Latency, throughput and peak memory of each source in each runtime; candidates of a batch size take turns.

    Rows are compared with the first row on as many threads: the first source in the first runtime that it has.

    Raises:
        ConfigError: no source, an empty list, a package that is missing, or nothing that can be run.
    """
    if not run.sources:
        raise ConfigError("source=null: benchmark needs the RUN to time, or RUN,RUN,...; try source=latest")
    lists = {"runtimes": runtimes, "batches": batches, "threads": threads, "precision": precision}
    if empty := [name for name, values in lists.items() if not values]:
        raise ConfigError(*(f"task.{name}=[]: nothing to measure; name at least one" for name in empty))
    _require(run, runtimes)
    run.record()
    networks = list(_networks(run))
    plan, notes = _plan(networks, runtimes, precision)
    if not plan:
        raise ConfigError(f"task.runtimes=[{','.join(runtimes)}]: nothing to run; {'; '.join(notes)}")
    rows: list[dict[str, Any]] = []
    hardware = _hardware(run)  # before this process is part of the load
    with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED, fail_on_recompile_limit_hit=True):
        for count in dict.fromkeys(threads):
            torch.set_num_threads(count)
            candidates = [_candidate(run, *choice, count, max(batches)) for choice in plan]
            run.say(f"{len(candidates)} candidates take turns on {count} thread{'s' if count > 1 else ''}")
            notes += _measure(run, candidates, batches, rounds, score)
            if memory:
                run.say("peak memory: a process for each candidate")
                notes += _weigh(candidates, count)
            for row in (candidate.row for candidate in candidates):
                several = {"name": f"{row['name']}, {count} threads", "threads": count}
                rows.append(row | (several if len(threads) > 1 else {}))
    frontier.latency(rows, run.folder / "figures" / "latency.png")
    fastest = {batch: min(rows, key=lambda row: row["latency_ms"][batch]["p50"]) for batch in rows[0]["latency_ms"]}
    notes = [hardware, *_fastest(rows[0], fastest), *dict.fromkeys(notes)]
    return run.publish(rows, notes, {f"latency_{batch}": row["speedup"][batch] for batch, row in fastest.items()})


def _require(run: Run, runtimes: Sequence[Runtime]) -> None:
    """Raise `ConfigError` if a runtime that would be used is not installed."""
    for name in runtimes:
        if name not in IN_TORCH and any(
            isinstance(source, Checkpoint) or name in source.formats for source in run.sources
        ):
            formats.module(name).require(f"task.runtimes={name}")


def _networks(run: Run) -> Iterator[Network]:
    """Each source under a name of its own: what it went through, and its run where several went through the same."""
    names = [source.name if isinstance(source, Bundle) else deployed.name_of(source.ledger) for source in run.sources]
    folders = [_run_of(source) for source in run.sources]
    short = [comparison.name_of(folder) for folder in folders]
    for source, name, folder, its_run in zip(run.sources, names, folders, short, strict=True):
        if names.count(name) > 1:
            name = f"{name}, {its_run if short.count(its_run) == 1 else folder}"
        if isinstance(source, Bundle):
            yield Network(name, source, {}, None, None)
            continue
        trained, ledger = without_teacher(run.network(source), source.ledger)
        counted = cost.counts(trained, run.data.spec.shape)
        yield Network(name, source, counted, finalize(copy.deepcopy(trained), ledger), conversion(ledger))


def _run_of(source: Checkpoint | Bundle) -> Path:
    """The folder of RUN/checkpoints/best.ckpt, of RUN/export, or of a bundle that was moved."""
    if isinstance(source, Checkpoint):
        return source.path.parent.parent
    return source.path.parent if source.path.name == "export" else source.path


def _plan(
    networks: Sequence[Network], runtimes: Sequence[Runtime], precision: Sequence[Precision]
) -> tuple[list[tuple[Network, Runtime, Precision]], list[str]]:
    """What can be run, and a line for each thing that was asked for and cannot."""
    plan: list[tuple[Network, Runtime, Precision]] = []
    notes = []
    for network, runtime, form in product(networks, dict.fromkeys(runtimes), dict.fromkeys(precision)):
        what = f"{network.name}, {runtime}" + ("" if form == "fp32" else f" in {form}")
        kind = network.conversion.kind if network.conversion else None
        if isinstance(network.source, Bundle) and runtime not in network.source.formats:
            notes.append(f"not run: {what}: the bundle holds {', '.join(network.source.formats)}")
        elif isinstance(network.source, Bundle) and form != "fp32":
            notes.append(f"not run: {what}: a bundle has the precision that it was exported in")
        elif form != "fp32" and network.is_quantized:
            notes.append(f"not run: {what}: its numbers are integers")
        elif runtime not in IN_TORCH and form not in formats.module(runtime).PRECISIONS:
            notes.append(f"not run: {what}: the runtime lacks layers in it on a CPU")
        else:
            plan.append((network, runtime, form))
            if kind and isinstance(network.source, Checkpoint) and kind not in _conversions(runtime):
                notes.append(f"{what} computes in float: it has no operators for {kind}")
    return plan, notes


def _conversions(runtime: Runtime) -> Collection[str]:
    return () if runtime in IN_TORCH else formats.module(runtime).CONVERSIONS


def _candidate(
    run: Run, network: Network, runtime: Runtime, form: Precision, threads: Count, batch_size: Count
) -> Candidate:
    """Ready to be called; `batch_size` is that of the call whose memory is measured."""
    shape = (batch_size, *run.data.spec.shape)
    row: dict[str, Any] = {"name": f"{_named(network, form)}, {runtime}", "runtime": runtime, **network.cost}
    if runtime in IN_TORCH:
        assert network.deployable is not None
        module, device = formats.in_precision(copy.deepcopy(network.deployable), form), run.trainer.strategy.root_device
        bare = Run(run.cfg, run.words, run.folder, run.task)  # without what it has built: this one travels
        prepare: Prepare = partial(prepare_module, bare, network.source.path, runtime, form, threads, shape, device)
        row["size_bytes"] = tensor_bytes(module)
        return Candidate(row, on_device(module, runtime, device), prepare, False)
    written, path = formats.module(runtime), _file(run, network, runtime, form)
    row["size_bytes"] = sum(cost.size_bytes(path.parent / file) for file in written.FILES)
    assert written.Session is not None
    load = partial(written.Session, path, threads)
    return Candidate(row, load(), partial(on_zeros, load, shape, CPU), network.sample_by_sample(runtime))


def _named(network: Network, form: Precision) -> str:
    """The network in that precision; one through which nothing went is called after its precision."""
    is_plain = network.name.startswith("fp32")
    return network.name.replace("fp32", form, 1) if is_plain or form == "fp32" else f"{network.name} {form}"


def _file(run: Run, network: Network, runtime: Runtime, form: Precision) -> Path:
    """What the runtime opens: the file of a bundle, or one that is written when it is first asked for."""
    if isinstance(network.source, Bundle):
        return network.source.file(runtime)
    if (runtime, form) not in network.files:
        assert network.deployable is not None
        written, folder = formats.module(runtime), NOT_IN_NAMES.sub("_", f"{network.name}_{form}_{runtime}")
        path = run.folder / "export" / folder / written.FILES[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        module = formats.in_precision(copy.deepcopy(network.deployable), form)
        written.write(module, run.data.spec.shape, path, network.conversion)
        network.files[runtime, form] = path
    return network.files[runtime, form]


def _measure(
    run: Run, candidates: Sequence[Candidate], batches: Sequence[Count], rounds: Count, score: bool
) -> Iterator[str]:
    """Fill the rows; all candidates of a batch size take turns. Returns what a reader has to know of it."""
    x_B = next(iter(run.data.loader("test", is_whole=True))).x
    device = run.trainer.strategy.root_device
    for candidate in candidates:
        candidate.row.update(speedup={}, latency_ms={}, samples_per_second={})
        if score:
            run.say(f"{candidate.row['name']}: metrics of the test split")
            test = run.data.loader("test", batch_size=max(batches), is_whole=True)
            candidate.row["metrics"] = deployed.score(_predict(candidate, max(batches), device), run.learner, test)
    for batch_size in dict.fromkeys(batches):
        x = x_B.repeat(-(-batch_size // len(x_B)), *[1] * (x_B.ndim - 1))[:batch_size].contiguous()
        calls = {
            str(place): partial(each.forward, x.to(device) if each.row["runtime"] in IN_TORCH else x)
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


def _predict(candidate: Candidate, batch_size: Count, device: torch.device) -> Forward:
    """Logits on the CPU, by calls of the size that is timed: a compiled network is one per size."""
    if candidate.sample_by_sample:
        return deployed.one_by_one(candidate.forward)
    if candidate.row["runtime"] not in IN_TORCH:
        return candidate.forward

    def predict(x_B: Tensor) -> Tensor:
        padding = x_B[:1].expand(batch_size - len(x_B), *x_B.shape[1:])
        return candidate.forward(torch.cat([x_B, padding]).to(device))[: len(x_B)].cpu()

    return predict


def _weigh(candidates: Sequence[Candidate], threads: Count) -> Iterator[str]:
    """Fill in the peak memory. Returns what a reader has to know of it."""
    for candidate in candidates:
        try:
            candidate.row["peak_bytes"] = peak_bytes(candidate.prepare, threads)
        except RuntimeError as error:
            yield f"peak memory of {candidate.row['name']} was not measured: {error}"
    yield "peak memory: what loading and running add to a process of its own, at the largest batch size"
    if any(candidate.row["runtime"] == "compiled" for candidate in candidates):
        yield "peak memory of compiled includes the compiler, which works at the first call"


def on_device(module: nn.Module, runtime: Runtime, device: torch.device) -> Forward:
    """The module on a device; compiled anew for each batch size, as one does who serves a fixed one."""
    module = module.to(device)
    compute: Forward = torch.compile(module, dynamic=False) if runtime == "compiled" else module

    def forward(x_B: Tensor) -> Tensor:
        with torch.inference_mode():
            logits_BK = compute(x_B)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return logits_BK

    return forward


def prepare_module(
    run: Run,
    path: Path,
    runtime: Runtime,
    form: Precision,
    threads: Count,
    shape: tuple[int, ...],
    device: torch.device,
) -> Load:
    """For `memory.peak_bytes`: the network of a checkpoint is rebuilt before the count, and loaded as a copy in it."""
    torch.set_num_threads(threads)
    source = checkpoint.load("source", path)
    trained, ledger = without_teacher(run.network(source), source.ledger)
    network = finalize(trained, ledger)
    return on_zeros(
        lambda: on_device(formats.in_precision(copy.deepcopy(network), form), runtime, device), shape, device
    )


def _hardware(run: Run) -> str:
    """Where it was measured, and whether the machine had time for it."""
    found = provenance.hardware()
    cores, load = found["cores"], os.getloadavg()[0]
    device = run.trainer.strategy.root_device
    line = f"measured on {found['cpu']}, {cores} cores, load {load:.1f}"
    if device.type != "cpu":
        line += f"; {' and '.join(IN_TORCH)} on {', '.join(found['gpus']) or device.type}, files on the CPU"
    if load > cores:
        line += "; BUSY: more processes than cores, which interrupt long calls more than short ones; measure again"
    return line


def _fastest(first: dict[str, Any], fastest: dict[str, dict[str, Any]]) -> Iterator[str]:
    for batch, row in fastest.items():
        line = f"fastest at batch {batch}: {row['name']}, {report.number(row['samples_per_second'][batch])} samples/s"
        if row is not first:
            line += f", {row['speedup'][batch]:#.3g} times as fast as {first['name']}"
            line += " would be on as many" if "threads" in row else ""
        yield line

"""`espalier benchmark source=RUN[,RUN...]`: time networks side by side, in the runtimes they ship in."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from espalier.composition import networks
from espalier.config.ranges import Count
from espalier.errors import ConfigError
from espalier.export import benchmark_targets, deployed, formats
from espalier.export.benchmark_targets import IN_TORCH, Candidate, Network, Precision, Runtime
from espalier.export.bundle import Bundle
from espalier.reporting import comparison, pareto, provenance, report
from espalier.run import Run
from espalier.runs import checkpoint
from espalier.runs.checkpoint import Checkpoint
from espalier.runs.run_folder import RunFolder
from espalier.spec import Report

MAX_COMPILED = 1024  # forms of one forward: networks, batch sizes, threads; after 8 torch would go on uncompiled


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
    """Measure latency, throughput and peak memory of each source in each runtime, in turns.

    Rows are compared with the first row on as many threads: the first source in the first runtime that it has.

    Raises:
        ConfigError: no source, an empty list, a package that is missing, or nothing that can be run.
    """
    if not run.sources:
        raise ConfigError("source=null: benchmark needs the RUN to time, or RUN,RUN,...; try source=latest")
    lists = {"runtimes": runtimes, "batches": batches, "threads": threads, "precision": precision}
    if empty := [name for name, values in lists.items() if not values]:
        raise ConfigError(*(f"task.{name}=[]: nothing to measure; name at least one" for name in empty))
    require(run, runtimes)
    run.record()
    plan, notes = benchmark_targets.plan(list(sources(run)), runtimes, precision)
    if not plan:
        raise ConfigError(f"task.runtimes=[{','.join(runtimes)}]: nothing to run; {'; '.join(notes)}")
    rows: list[dict[str, Any]] = []
    device, files = run.trainer.strategy.root_device, run.folder / "export"
    hardware = describe_hardware(run)  # before this process is part of the load
    with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED, fail_on_recompile_limit_hit=True):
        for count in dict.fromkeys(threads):
            torch.set_num_threads(count)
            ready, failed = benchmark_targets.build(plan, device, files, max(batches), count)
            notes += failed
            run.say(f"{len(ready)} candidates take turns on {count} thread{'s' if count > 1 else ''}")
            notes += measure(run, ready, batches, rounds, score=score)
            if memory:
                run.say("peak memory: a process for each candidate")
                notes += benchmark_targets.weigh(ready, count)
            for row in (each.row for each in ready):
                several = {"name": f"{row['name']}, {count} threads", "threads": count}
                rows.append(row | (several if len(threads) > 1 else {}))
    pareto.latency(rows, run.folder / "figures" / "latency.png")
    fastest = {batch: min(rows, key=lambda row: row["latency_ms"][batch]["p50"]) for batch in rows[0]["latency_ms"]}
    notes = [hardware, *remarks(rows[0], fastest), *dict.fromkeys(notes)]
    return run.publish(rows, notes, {f"latency_{batch}": row["speedup"][batch] for batch, row in fastest.items()})


def require(run: Run, runtimes: Sequence[Runtime]) -> None:
    """Raise `ConfigError` if a runtime that would be used is not installed."""
    for name in runtimes:
        if name not in IN_TORCH and any(
            isinstance(source, Checkpoint) or name in source.formats for source in run.sources
        ):
            formats.named(name).require(f"task.runtimes={name}")


def sources(run: Run) -> Iterator[Network]:
    """Yield each source under a unique name: the methods that made it, and its run where the methods are the same."""
    names = [source.name if isinstance(source, Bundle) else deployed.name_of(source.history) for source in run.sources]
    folders = [RunFolder.of(source.path).path for source in run.sources]
    short = [comparison.name_of(folder) for folder in folders]
    spec = run.data.spec
    for source, name, folder, its_run in zip(run.sources, names, folders, short, strict=True):
        if names.count(name) > 1:
            name = f"{name}, {its_run if short.count(its_run) == 1 else folder}"
        if isinstance(source, Bundle):
            yield Network(name, source.history, spec, source, None, None)
        else:
            again = partial(rebuild, source.path)  # which travels to another process
            yield Network(name, source.history, spec, None, networks.deployable(source), again)


def rebuild(path: Path) -> nn.Module:
    """Return the shipped module of a checkpoint."""
    return networks.deployable(checkpoint.load("source", path)).module


def measure(
    run: Run, ready: Sequence[Candidate], batches: Sequence[Count], rounds: Count, *, score: bool
) -> Iterator[str]:
    """Fill test metrics and latencies into the rows; yield remarks for the reader."""
    if score:
        test = run.data.loader("test", batch_size=max(batches), is_whole=True)
        for each in ready:
            run.say(f"{each.row['name']}: metrics of the test split")
            each.row["metrics"] = deployed.score(benchmark_targets.predictor(each, max(batches)), run.learner, test)
    yield from benchmark_targets.time(ready, next(iter(run.data.loader("test", is_whole=True))).inputs, batches, rounds)


def describe_hardware(run: Run) -> str:
    """Say what hardware was used, and whether it was busy with other work."""
    found = provenance.hardware()
    cores, load = found["cores"], os.getloadavg()[0]
    device = run.trainer.strategy.root_device
    line = f"measured on {found['cpu']}, {cores} cores, load {load:.1f}"
    if device.type != "cpu":
        line += f"; {' and '.join(IN_TORCH)} on {', '.join(found['gpus']) or device.type}, files on the CPU"
    if load > cores:
        line += "; BUSY: more processes than cores, which interrupt long calls more than short ones; measure again"
    return line


def remarks(first: dict[str, Any], fastest: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Say which row is fastest at each batch size, and how much faster than the first."""
    for batch, row in fastest.items():
        line = f"fastest at batch {batch}: {row['name']}, {report.number(row['samples_per_second'][batch])} samples/s"
        if row is not first:
            line += f", {row['speedup'][batch]:#.3g} times as fast as {first['name']}"
            line += " would be on as many" if "threads" in row else ""
        yield line

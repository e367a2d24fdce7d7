"""`espalier export source=RUN task.format=[onnx,...]`: write a network for runtimes, check the files, make a bundle."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from espalier.composition import networks
from espalier.compression.base import is_quantized
from espalier.config.ranges import Count, Positive, Rate
from espalier.errors import ConfigError
from espalier.export import bundle, conclusions, deployed, formats, parity, preprocess
from espalier.export.deployed import Deployable
from espalier.profiling import cost
from espalier.reporting import provenance, report
from espalier.run import Run
from espalier.runs.run_folder import RunFolder
from espalier.spec import OUTPUT, Report


def export(
    run: Run,
    format: Sequence[formats.Name],
    precision: Literal["fp32", "bf16"],
    tolerance: Positive,
    agreement: Rate,
    allow_mismatch: bool,
    threads: Count,
) -> Report:
    """Write the deployable network in each format, compare each with torch on the test split, and make a bundle.

    A mismatch ends the task without a bundle, unless `allow_mismatch`; then the report is marked.

    Raises:
        ConfigError: no source, a package that is missing, a network that a format cannot hold, or a mismatch.
    """
    if run.source is None:
        raise ConfigError("source=null: export needs the trained RUN to export; try source=latest")
    if not format:
        raise ConfigError(f"task.format=[]: nothing to write; choose from {', '.join(formats.names())}")
    if len(set(format)) < len(format):
        raise ConfigError(f"task.format=[{','.join(format)}]: a format is listed twice; once is enough")
    for name in format:
        formats.named(name).require("task.format")
    target = run.folder / "export"
    if target.exists():  # without a bundle, for which `ownership.py` has looked
        raise ConfigError(f"hydra.run.dir={run.folder}: has a folder called export already; choose another folder")
    run.record()
    network = networks.deployable(run.source)
    gate = parity.Gate(precision == "fp32" and not is_quantized(network.history), tolerance, agreement)
    shipped = formats.in_precision(network.module, precision)
    counted = cost.counts(network.trained, run.data.spec)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    draft = run.folder / ".export.partial"
    draft.mkdir(parents=True, exist_ok=True)
    try:
        for name in format:
            row, remarks = write(run, name, network, shipped, draft, gate, threads)
            rows.append({"name": name, **row, **counted})
            notes += remarks
        mismatches = [note for note in notes if note.startswith(parity.MISMATCH)]
        if mismatches and not allow_mismatch:
            raise ConfigError(*mismatches, "no bundle was written; task.allow_mismatch=true writes it all the same")
        bundle.write(draft, target, describe(run, network, precision, rows))
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    run.say(f"bundle: {target}")
    return run.publish(rows, notes)


def write(
    run: Run, name: str, network: Deployable, shipped: nn.Module, draft: Path, gate: parity.Gate, threads: int
) -> tuple[dict[str, Any], list[str]]:
    """Write one format into `draft`; return its row of the report, and remarks for the user."""
    chosen = formats.named(name)
    run.say(f"writing {' and '.join(chosen.files)}")
    path = draft / chosen.files[0]
    chosen.write(shipped, run.data.spec, path, network.conversion)
    row: dict[str, Any] = {
        "runtime": chosen.runtime or "none",
        "metrics": {},
        "size_bytes": sum(cost.size_bytes(draft / file) for file in chosen.files),
    }
    if chosen.runtime is None:
        return row, [f"{name} holds weights alone: nothing runs it, so nothing was compared"]
    notes = list(conclusions.kept_in_float(name, network.conversion))
    predict = deployed.session(name, path, threads, deployed.is_dynamic(network.conversion))
    found = parity.compare(network.module, predict, run.learner, run.data.splits.test)
    row["metrics"] = found.to_metrics()
    row["parity"] = found.to_dict()
    problem = gate.problem(found)
    return row, [*notes, *([f"{parity.MISMATCH}: {name} {problem}"] if problem else [])]


def describe(run: Run, network: Deployable, precision: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of `bundle.json` without the files: what a server needs, and where the network comes from."""
    assert run.source is not None
    collected = provenance.collect()
    content = {
        "name": deployed.name_of(network.history),
        "run": RunFolder.of(run.source.path).path.name,
        "data": run.data.spec.to_dict(),
        "preprocessing": preprocess.stated(run.data.spec),
        "input": run.data.spec.inputs[0].name,
        "output": OUTPUT,
        "precision": precision,
        "sample_by_sample": deployed.is_dynamic(network.conversion),
        "formats": {
            row["name"]: {
                "runtime": row["runtime"],
                "files": list(formats.named(row["name"]).files),
                "parity": row.get("parity"),
            }
            for row in rows
        },
        "compression": network.history,
        "config": {group: run.source.config[group] for group in ("data", "model", "learner")},
        "report": list(rows),
        "versions": {"python": collected["python"], **collected["packages"]},
    }
    plain: dict[str, Any] = report.finite(content)
    return plain

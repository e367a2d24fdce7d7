"""Networks measured as they are deployed: the exported file, run by its runtime, on every sample of a split."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compression.base import Conversion, conversion, finalize, without_teacher
from espalier.data.loaders import Batch
from espalier.export import formats, onnx
from espalier.learners.learner import Learner
from espalier.profiling import cost, latency
from espalier.signature import example
from espalier.spec import DataSpec, Entry

RUNTIME = "onnxruntime"
ROUNDS = 15  # of interleaved latency measurement
Predict = Callable[..., Tensor]  # the inputs, (B, ...) each, to the network's output


@dataclass(frozen=True)
class Deployable:
    """A trained network, and the form in which it is shipped."""

    trained: nn.Module  # masks and quantizers in place: what parameters, zeros and MACs are counted in
    history: list[Entry]  # without a teacher
    module: nn.Module  # masks folded, quantizers converted: what is exported
    conversion: Conversion | None  # what is left for the exporter


@dataclass(frozen=True)
class Artifact:
    """An exported file, with the network that it was made from."""

    name: str
    trained: nn.Module  # masks and quantizers in place: what parameters, zeros and MACs are counted in
    converted: nn.Module  # what was exported
    conversion: Conversion | None  # what the exporter did beyond it
    path: Path
    runtime: str = RUNTIME

    @property
    def size_bytes(self) -> int:
        return cost.size_bytes(self.path)


def name_of(history: Iterable[Entry]) -> str:
    """Return the methods that a network went through, as in tables: `prune_channels+qat`, or `fp32` if none."""
    return "+".join(str(entry["method"]) for entry in history) or "fp32"


def deployable(trained: nn.Module, history: Sequence[Entry]) -> Deployable:
    """Return the deployable form of a network, in evaluation mode; `trained` loses its teacher, nothing else."""
    trained, kept = without_teacher(trained, history)
    return Deployable(trained.eval(), kept, finalize(copy.deepcopy(trained), kept).eval(), conversion(kept))


def export(name: str, trained: nn.Module, history: Sequence[Entry], spec: DataSpec, path: Path) -> Artifact:
    """Write the deployable form of a trained network to `path`."""
    network = deployable(trained, history)
    onnx.write(network.module, spec, path, network.conversion)
    return Artifact(name, network.trained, network.module, network.conversion, path)


def measure(
    artifacts: Sequence[Artifact], learner: Learner, test: Iterable[Batch], batches: Sequence[int], threads: int
) -> list[dict[str, Any]]:
    """Return one row of the report per artifact; latencies are measured in turns, so that noise hits all alike."""
    sessions = [onnx.Session(artifact.path, threads) for artifact in artifacts]
    rows: list[dict[str, Any]] = [
        {
            "name": artifact.name,
            "runtime": artifact.runtime,
            "metrics": score(predictor(artifact, session), learner, test),
            **cost.counts(artifact.trained, learner.spec),
            "size_bytes": artifact.size_bytes,
            "latency_ms": {},
        }
        for artifact, session in zip(artifacts, sessions, strict=True)
    ]
    for batch_size in batches:
        inputs = repeated(next(iter(test)).inputs, batch_size)
        calls = {str(place): partial(session, *inputs) for place, session in enumerate(sessions)}
        for row, timed in zip(rows, latency.compare(calls, rounds=ROUNDS).values(), strict=True):
            row["latency_ms"][str(batch_size)] = timed.to_dict()
    return rows


def predictor(artifact: Artifact, session: onnx.Session) -> Predict:
    """Return the session as a function, called sample by sample if the network needs that."""
    return one_by_one(session) if is_dynamic(artifact.conversion) else session


def session(name: str, path: Path, threads: int, is_dynamic: bool) -> Predict:
    """Open a file of a format in its runtime; call it sample by sample if the network needs that."""
    chosen = formats.named(name)
    opened = chosen.session(path, threads)
    return one_by_one(opened) if is_dynamic and "dynamic" in chosen.conversions else opened


def is_dynamic(conversion: Conversion | None) -> bool:
    """Return whether ONNX Runtime takes the range of activations over a whole call, so that its samples interact."""
    return conversion is not None and conversion.kind == "dynamic"


def one_by_one(session: Predict) -> Predict:
    """Return the same function, called with one sample at a time."""
    return lambda *inputs: torch.cat([session(*sample) for sample in zip(*(x.split(1) for x in inputs), strict=True)])


def score(predict: Predict, learner: Learner, test: Iterable[Batch]) -> dict[str, float]:
    """Return the learner's test metrics of any function from samples to outputs, in this process alone."""
    metrics = learner.new_metrics("test")
    for metric in metrics.values():
        metric.distributed_available_fn = lambda: False  # or it waits for the other ranks of the fit, which are gone
    with torch.no_grad():
        for batch in test:
            metrics.update(learner.predict(predict(*batch.inputs).float()), batch.y)
    return {name: float(value) for name, value in metrics.compute().items() if value.ndim == 0}


def ratios(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Return how many times smaller and faster it is, in size, parameters, non-zeros, MACs and latency per batch."""
    found = {
        name: before[key] / max(after[key], 1)
        for name, key in (("size", "size_bytes"), ("params", "params"), ("nonzero", "nonzero"), ("macs", "macs"))
    }
    for batch_size, timed in before["latency_ms"].items():
        found[f"latency_{batch_size}"] = timed["p50"] / after["latency_ms"][batch_size]["p50"]
    return found


def latency_ms(model: nn.Module, spec: DataSpec) -> float:
    """Return the median latency in milliseconds of one sample of a float network in ONNX Runtime on one thread."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.write(model, spec, path)
        call = partial(onnx.Session(path, threads=1), *example(spec, 1))
        return latency.compare({"model": call}, rounds=5)["model"].p50


def repeated(inputs: Sequence[Tensor], num: int) -> tuple[Tensor, ...]:
    """Return `num` samples: those of a batch, over and over."""
    return tuple(x.repeat(-(-num // len(x)), *[1] * (x.ndim - 1))[:num].contiguous() for x in inputs)

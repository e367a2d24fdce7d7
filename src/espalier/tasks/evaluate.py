"""`espalier evaluate source=RUN`: what a trained run, or a bundle of it, does on a split, and where it errs."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from espalier.checkpoint import Checkpoint
from espalier.compression.base import Entry, Stage, conversion, finalize, stage_of
from espalier.data.loaders import Batch, Samples
from espalier.errors import ConfigError
from espalier.export import deployed, formats, verdict
from espalier.export.bundle import Bundle
from espalier.export.deployed import Predict
from espalier.measure import attacks, corruptions, cost, diagnosis, prediction_files
from espalier.measure import predictions as answers
from espalier.measure.attacks import Loss
from espalier.measure.predictions import Predictions
from espalier.measure.robustness import harmed, renormalised, require_applicable
from espalier.ranges import Count, Positive
from espalier.run import Run, is_first_rank
from espalier.spec import Report

Split = Literal["train", "val", "test"]
Format = Literal["onnx", "torch_export", "aotinductor", "executorch", "litert", "openvino"]
Runtime = Literal["torch", "onnx", "torch_export", "aotinductor", "executorch", "litert", "openvino"]
Harm = Literal["noise", "blur", "contrast", "brightness", "rotation", "fgsm", "pgd"]
COUNTED = ("runtime", "params", "nonzero", "macs", "size_bytes")  # what a bundle says of each of its formats
TORCH = "torch"
PER_CLASS = "per_class.csv"
ERRORS = "errors.csv"


def evaluate(
    run: Run,
    split: Split,
    runtime: Runtime | None,
    robustness: Sequence[Harm],
    epsilon: Positive | None,
    predictions: Literal["csv", "parquet"] | None,
    threads: Count,
) -> Report | None:
    """Measure the source on a split, in torch or as exported; metrics are named `test/...` or `val/...` as in training.

    `runtime` None is torch for a checkpoint, and the first format of a bundle. `epsilon` is the largest change of a
    value by an attack at severity 5. Ranks other than the first return None.

    Raises:
        ConfigError: no source, or something that it, its data or this machine does not have.
    """
    chosen = checked_runtime(run, runtime, robustness)
    prediction_files.require_writer("task.predictions", predictions)
    run.record()
    metrics = run.measure(split) if chosen == TORCH else {}
    if not is_first_rank():
        return None
    row, predict = in_torch(run) if chosen == TORCH else as_exported(run, chosen, threads)
    found = answers.collect(predict, source_of(run).spec, batches(run, split))
    is_as_trained = run.data.spec == source_of(run).spec  # else `run.measure` has normalised in another way
    row["metrics"] = metrics if metrics and is_as_trained else score(run, split, found)
    notes = list(diagnose(run, split, found))
    if chosen != TORCH:
        notes += verdict.kept_in_float(chosen, conversion(source_of(run).ledger))
    rows = [row]
    if robustness:
        harms = harm(run, split, predict, robustness, epsilon, row)
        notes += remarks(run, split, harms, row, chosen)
        rows = [*harms, row]  # the last row is what a sweep compares
    if predictions:
        notes.append(f"predictions: {prediction_files.write(found, predictions, run.folder).name}")
    report = run.publish(rows, notes)
    if found.spec.num_classes:
        Console(highlight=False).print(answers.class_table(answers.per_class(found)))
    return report


def checked_runtime(run: Run, runtime: str | None, robustness: Sequence[Harm]) -> str:
    """Where the network shall run, once nothing stands against it."""
    if run.source is None and run.bundle is None:
        raise ConfigError("source=null: evaluate needs the RUN or the bundle to measure; try source=latest")
    if len(set(robustness)) < len(robustness):
        raise ConfigError(f"task.robustness=[{','.join(robustness)}]: one is listed twice; once is enough")
    require_applicable("task.robustness", robustness, source_of(run).spec)
    attacking = [name for name in robustness if name in attacks.NAMES]
    if run.bundle is not None and attacking:
        raise ConfigError(
            f"task.robustness=[{','.join(attacking)}]: an attack follows the gradient of the network in torch, which a "
            "bundle does not hold; give the trained RUN as source, with task.runtime=onnx"
        )
    if run.bundle is not None:
        return format_in(run.bundle, runtime)
    chosen = runtime or TORCH
    if chosen != TORCH:
        formats.module(chosen).require("task.runtime")
    return chosen


def format_in(bundle: Bundle, runtime: str | None) -> str:
    """The format of a bundle that has this name, or its first one that a runtime runs.

    Raises:
        ConfigError: it has no such format, or this machine no such runtime.
    """
    runnable = [name for name in bundle.formats if formats.module(name).Session is not None]
    if not runnable:
        raise ConfigError(f"source={bundle.path}: holds {', '.join(bundle.formats)}, which nothing runs; export onnx")
    if runtime is not None and runtime not in runnable:
        raise ConfigError(
            f"task.runtime={runtime}: the bundle in {bundle.path} does not hold it, but {', '.join(runnable)}; "
            "choose one of these or export again"
        )
    chosen = runtime or runnable[0]
    formats.module(chosen).require("task.runtime")
    return chosen


def source_of(run: Run) -> Checkpoint | Bundle:
    """What is measured. Its spec is that of training; the data at hand may have other statistics."""
    source = run.source or run.bundle
    assert source is not None
    return source


def batches(run: Run, split: Split) -> Iterator[Batch]:
    """The whole split, normalised for the network, on the CPU."""
    return renormalised(run.data.loader(split, is_whole=True), run.data.spec, source_of(run).spec)


def in_torch(run: Run) -> tuple[dict[str, Any], Predict]:
    """The row of the report without its metrics, and the network as it was trained, in this process alone."""
    assert run.source is not None
    network = run.network(run.source).eval()
    plugin = run.trainer.strategy.precision_plugin  # answers shall be those of `run.measure`
    device = run.trainer.strategy.root_device
    network = plugin.convert_module(network).to(device)

    def predict(x: Tensor) -> Tensor:
        with plugin.forward_context():
            return network(plugin.convert_input(x.to(device))).float().cpu()

    return run.cost(run.source.path), predict


def as_exported(run: Run, name: str, threads: int) -> tuple[dict[str, Any], Predict]:
    """The same of a file: one of the bundle, or one that is written below `export/` of this run."""
    module = formats.module(name)
    if run.bundle is not None:
        return row_of(run.bundle, name), session_of(run.bundle, name, threads)
    assert run.source is not None
    network = run.deployable(run.source)
    folder = run.folder / "export"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / module.FILES[0]
    module.write(network.module, run.source.spec.shape, path, network.conversion)
    row = {
        "name": run.cost(None)["name"],
        "runtime": module.RUNTIME,
        **cost.counts(network.trained, run.source.spec.shape),
        "size_bytes": sum(cost.size_bytes(folder / file) for file in module.FILES),
    }
    return row, deployed.session(name, path, threads, deployed.is_dynamic(network.conversion))


def row_of(bundle: Bundle, name: str) -> dict[str, Any]:
    """What a bundle says of the cost of one of its formats, as a row of the report."""
    rows = [row for row in bundle.content["report"] if row["name"] == name]
    return {"name": bundle.name, **{key: row[key] for row in rows for key in COUNTED if key in row}}


def session_of(bundle: Bundle, name: str, threads: int) -> Predict:
    """A format of a bundle, ready to run; sample by sample where it has to be."""
    return deployed.session(name, bundle.file(name), threads, bundle.sample_by_sample)


def score(run: Run, split: Split, found: Predictions) -> dict[str, float]:
    """The learner's metrics of these answers; its tables are left where `run.publish` looks for them."""
    metrics = run.learner.new_metrics("test")
    for metric in metrics.values():
        metric.distributed_available_fn = lambda: False  # no other rank has answers
    metrics.update(found.output if found.spec.num_classes else found.predicted, found.y)
    run.learner.measured["test"] = values = metrics.compute()
    return {name.replace("test/", f"{split}/"): float(value) for name, value in values.items() if value.ndim == 0}


def diagnose(run: Run, split: Split, found: Predictions) -> Iterator[str]:
    """Draw and write down where the network errs; what a reader must know, in words."""
    figures = run.folder / "figures"
    if not found.spec.num_classes:
        diagnosis.residuals(found.predicted, found.y, figures / "residuals.png")
        return
    scores = answers.per_class(found)
    prediction_files.write_classes(scores, run.folder / PER_CLASS)
    diagnosis.reliability(answers.calibration(found), figures / "calibration.png")
    weakest = answers.worst(scores)[0]
    yield (
        f"weakest class: {weakest.name}, precision {weakest.precision:.4f}, recall {weakest.recall:.4f}; "
        f"all in {PER_CLASS}"
    )
    place_E = answers.confident_errors(found, diagnosis.MAX_ERRORS)
    num_wrong = int((found.predicted != found.y).sum())
    if not num_wrong:
        yield f"no error among {len(found):,} samples"
        return
    wrong = answers.columns(found, probabilities=False)
    index_E, true_E, predicted_E, probability_E = (cells[place_E.numpy()].tolist() for cells in wrong.values())
    raw = raw_samples(run, split, index_E)
    if found.spec.is_image:
        drawn = figures / "errors.png"
        diagnosis.errors(raw.float() / run.data.spec.scale, true_E, predicted_E, probability_E, drawn)
    else:
        drawn = run.folder / ERRORS
        header = [*wrong, *(f"x{place}" for place in range(raw.shape[1]))]
        lines = zip(index_E, true_E, predicted_E, probability_E, raw.tolist(), strict=True)
        prediction_files.write_csv(drawn, header, ([*cells, *features] for *cells, features in lines))
    yield (
        f"{num_wrong:,} of {len(found):,} samples wrong; most confident: sample {index_E[0]}, {true_E[0]} taken for "
        f"{predicted_E[0]} with {probability_E[0]:.4f}; see {drawn.name}"
    )


def raw_samples(run: Run, split: Split, indices: list[int]) -> Tensor:
    """Raw values of a few samples of a split."""
    data = getattr(run.data.splits, split)
    return data.x[indices] if isinstance(data, Samples) else data.__getitems__(indices).x


def harm(
    run: Run, split: Split, predict: Predict, names: Sequence[Harm], epsilon: float | None, clean: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row per kind of harm: the learner's metric at each severity and its mean; and all of them as a figure."""
    metric = run.learner.monitor.partition("/")[2]
    loss = loss_in_torch(run) if set(names) & set(attacks.NAMES) else None
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[float]] = {}
    for name in names:
        run.say(f"robustness: {name}")
        values = []
        for severity in corruptions.SEVERITIES:
            bad = harmed(batches(run, split), name, severity, source_of(run).spec, run.cfg.seed, epsilon, loss)
            values.append(deployed.score(predict, run.learner, bad)[f"test/{metric}"])
        curves[name] = values
        by_severity = {f"{split}/severity {severity}": value for severity, value in enumerate(values, start=1)}
        mean = {f"{split}/mean": sum(values) / len(values)}
        rows.append({"name": name, "runtime": clean["runtime"], "metrics": {**by_severity, **mean}})
    figure = run.folder / "figures" / "robustness.png"
    diagnosis.robustness(clean["metrics"][f"{split}/{metric}"], curves, metric, figure)
    return rows


def loss_in_torch(run: Run) -> Loss:
    """The loss whose gradient attacks follow: of the float network, as rounding has none."""
    assert run.source is not None
    if is_quantized(run.source.ledger):
        network = finalize(*run.float_network(run.source))
    else:
        network = run.deployable(run.source).module
    is_measured = run.trainer.state.finished  # else the trainer has never looked for its device
    device = run.trainer.strategy.root_device if is_measured else torch.device("cpu")
    network = network.to(device)
    return lambda x, y_B: run.learner.loss(network(x.to(device)).cpu(), y_B)


def is_quantized(ledger: Iterable[Entry]) -> bool:
    """Whether a step of the way was a quantization."""
    return any(stage_of(entry["method"]) == Stage.QUANTIZE for entry in ledger)


def remarks(
    run: Run, split: Split, harms: Sequence[dict[str, Any]], clean: dict[str, Any], runtime: str
) -> Iterator[str]:
    """What the rows of `harm` say, and how the attacks knew what to do."""
    metric = run.learner.monitor.replace("val/", f"{split}/")
    names = [row["name"] for row in harms]
    pick = min if run.learner.mode == "max" else max
    weakest = pick(harms, key=lambda row: row["metrics"][f"{split}/mean"])
    yield (
        f"under {', '.join(names)} the table shows {metric}; weakest under {weakest['name']}: "
        f"{weakest['metrics'][f'{split}/severity 5']:.4g} at severity 5, {clean['metrics'][metric]:.4g} unharmed"
    )
    if run.source is not None and set(names) & set(attacks.NAMES):
        if is_quantized(run.source.ledger):
            yield "attacks are transferred: they follow the gradient of the float network, as rounding has none"
        elif runtime != TORCH:
            yield "attacks follow the gradient of the network in torch"

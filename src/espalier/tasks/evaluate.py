"""`espalier evaluate source=RUN`: measure a trained run, or a bundle of it, on a split, and show its errors."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch

from espalier.composition import networks
from espalier.compression.base import conversion, finalize, is_quantized
from espalier.config.plugins import OneOf
from espalier.config.ranges import Count, Positive
from espalier.data.module import Split
from espalier.errors import ConfigError
from espalier.evaluation import prediction_files
from espalier.evaluation import predictions as answers
from espalier.export import conclusions, deployed, formats, runtimes
from espalier.export.deployed import Predict
from espalier.export.runtimes import Row
from espalier.reporting import error_figures, terminal
from espalier.robustness import base as harms
from espalier.robustness import curves
from espalier.robustness.base import Loss
from espalier.run import Run
from espalier.spec import Report
from espalier.strategies.collective import is_first_rank
from espalier.targets.predictions import Predictions

TORCH = "torch"
Runtime = Annotated[str, OneOf(lambda: [TORCH, *formats.runnable()])]


def evaluate(
    run: Run,
    split: Split,
    runtime: Runtime | None,
    robustness: Sequence[harms.Name],
    epsilon: Positive | None,
    predictions: Literal["csv", "parquet"] | None,
    threads: Count,
) -> Report:
    """Measure the source on a split, in torch or as exported; metrics are named `test/...` or `val/...` as in training.

    `runtime` None is torch for a checkpoint, and for a bundle what `predictors.choose` takes. `epsilon` is the largest
    change of a value by an attack at severity 5. Ranks other than the first report no row.

    Raises:
        ConfigError: no source, or something that it, its data or this machine does not have.
    """
    chosen = checked_runtime(run, runtime, robustness)
    prediction_files.require_writer("task.predictions", predictions)
    run.record()
    metrics = run.measure(split) if chosen == TORCH else {}
    if not is_first_rank():
        return run.publish([], ())
    row, predict = prepared(run, chosen, threads)
    found = answers.collect(predict, run.data.spec, run.data.loader(split, is_whole=True))
    row["metrics"] = metrics or score(run, split, found)
    notes = list(found.kind.report_errors(found, lambda index_B: run.data.raw(split, index_B).x, run.folder))
    if chosen != TORCH:
        notes += conclusions.kept_in_float(chosen, conversion(run.sources[0].history))
    rows = [row]
    if robustness:
        harmed, remarks = harm(run, split, chosen, predict, robustness, epsilon, row)
        rows = [*harmed, row]  # the last row is what a sweep compares
        notes += remarks
    if predictions:
        notes.append(f"predictions: {prediction_files.write(found, predictions, run.folder).name}")
    report = run.publish(rows, notes)
    if table := found.kind.table(found):
        terminal.console().print(table)
    return report


def checked_runtime(run: Run, runtime: str | None, names: Sequence[str]) -> str:
    """Return the runtime in which the network is evaluated.

    Raises:
        ConfigError: no source, a corruption that does not fit the data, an attack on a bundle, or a missing runtime.
    """
    if not run.sources:
        raise ConfigError("source=null: evaluate needs the RUN or the bundle to measure; try source=latest")
    harms.require_applicable("task.robustness", names, run.sources[0].spec)
    attacking = harms.attacks(names)
    if run.bundle is not None and attacking:
        raise ConfigError(
            f"task.robustness=[{','.join(attacking)}]: an attack follows the gradient of the network in torch, which a "
            "bundle does not hold; give the trained RUN as source, with task.runtime=onnx"
        )
    if run.bundle is not None:
        return runtimes.choose(run.bundle, runtime)
    chosen = runtime or TORCH
    if chosen != TORCH:
        formats.named(chosen).require("task.runtime")
    return chosen


def prepared(run: Run, runtime: str, threads: Count) -> tuple[Row, Predict]:
    """Return the row of the report without its metrics, and the network in its runtime, in this process alone."""
    if run.bundle is not None:
        return runtimes.of_bundle(run.bundle, runtime, threads)
    assert run.source is not None
    if runtime == TORCH:
        return run.cost(run.source.path), runtimes.in_torch(networks.trained(run.source), run.trainer.strategy)
    network = networks.deployable(run.source)
    row, predict = runtimes.of_network(network, runtime, run.data.spec, run.folder / "export", threads)
    return {"name": run.cost(None)["name"], **row}, predict


def score(run: Run, split: Split, found: Predictions) -> dict[str, float]:
    """Return the learner's metrics of these answers; its tables are left where `run.publish` looks for them."""
    run.learner.measured["test"] = values = answers.score(found, run.learner)
    return {name.replace("test/", f"{split}/"): float(value) for name, value in values.items() if value.ndim == 0}


def harm(
    run: Run, split: Split, runtime: str, predict: Predict, names: Sequence[str], epsilon: float | None, clean: Row
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row per kind of harm, what they say and how the attacks knew what to do; and all of them as a figure."""
    metric, spec = run.learner.monitor.partition("/")[2], run.data.spec
    is_attacked = bool(harms.attacks(names))
    loss = loss_in_torch(run) if is_attacked else None
    batches = run.data.loader(split, is_whole=True)
    measured: dict[str, list[float]] = {}
    for name in names:
        run.say(f"robustness: {name}")
        measured[name] = [
            deployed.score(predict, run.learner, harmed)[f"test/{metric}"]
            for harmed in curves.severities(batches, name, spec, run.cfg.seed, epsilon, loss)
        ]
    unharmed = clean["metrics"][f"{split}/{metric}"]
    error_figures.robustness(unharmed, measured, metric, run.folder / "figures" / "robustness.png")
    notes = [curves.summary(measured, f"{split}/{metric}", unharmed, run.learner.mode)]
    if is_attacked and is_quantized(run.sources[0].history):
        notes.append("attacks are transferred: they follow the gradient of the float network, as rounding has none")
    elif is_attacked and runtime != TORCH:
        notes.append("attacks follow the gradient of the network in torch")
    return curves.rows(measured, split, clean["runtime"]), notes


def loss_in_torch(run: Run) -> Loss:
    """Return the loss whose gradient attacks follow; it is that of the float network, as rounding has no gradient."""
    assert run.source is not None
    if is_quantized(run.source.history):
        network = finalize(*networks.in_float(run.source))
    else:
        network = networks.deployable(run.source).module
    is_measured = run.trainer.state.finished  # else the trainer has never looked for its device
    device = run.trainer.strategy.root_device if is_measured else torch.device("cpu")
    network = network.to(device)
    return lambda x, y_B: run.learner.loss(network(x.to(device)).cpu(), y_B)

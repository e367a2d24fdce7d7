"""Predictions of a network: collected from the batches of a split, and measured with its learner's metrics."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from espalier.data.loaders import Batch
from espalier.errors import ConfigError
from espalier.learners.learner import Learner
from espalier.spec import DataSpec
from espalier.targets.predictions import Predictions, join


def collect(predict: Callable[[Tensor], Tensor], spec: DataSpec, batches: Iterable[Batch]) -> Predictions:
    """Return the answers to all samples; `predict` takes x (B, ...) on the CPU and returns the network's output there.

    Raises:
        ConfigError: there is no sample.
    """
    with torch.no_grad():
        parts = [Predictions(spec, batch.index, batch.y, predict(*batch.inputs).float()) for batch in batches]
    if not parts:
        raise ConfigError(f"task.split: {spec.name} has no sample there, so there is nothing to measure")
    return join(parts)


def score(found: Predictions, learner: Learner) -> dict[str, Tensor]:
    """Return the learner's test metrics of these answers, tables among them, in this process alone."""
    metrics = learner.new_metrics("test")
    for metric in metrics.values():
        metric.distributed_available_fn = lambda: False  # no other rank has answers
    metrics.update(learner.predict(found.output), found.y)
    return metrics.compute()

"""A loss and metrics of the user's own: what they must be before a training takes them. Letters: B batch, K classes."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

FORBIDDEN = "/."  # in the name of a metric, which stands after `val/` and in keys


def require_loss(loss: nn.Module, output: Tensor, y: Tensor) -> nn.Module:
    """Return the loss, once it has made one number of an output and its targets.

    Raises:
        ValueError: it is no module, has weights of its own, or gives something other than a mean.
    """
    name = f"loss={type(loss).__name__}"
    if not isinstance(loss, nn.Module):
        raise ValueError(f"{name}: must be a class of nn.Module, called with the output and the targets")
    if any(True for _ in loss.parameters()):
        raise ValueError(f"{name}: has weights of its own, which no optimizer would train; put them into the model")
    if getattr(loss, "reduction", "mean") != "mean":
        raise ValueError(f"{name}: must be the mean over the batch; set its reduction to mean")
    try:
        value = loss(output.requires_grad_(), y)
    except Exception as error:  # whatever somebody's code stumbles on
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}: does not take an output of shape {tuple(output.shape)} and targets of {tuple(y.shape)}: {reason}"
        ) from error
    if not isinstance(value, Tensor) or value.ndim != 0 or not value.requires_grad:
        raise ValueError(f"{name}: must give one number with a gradient, the mean over the batch")
    return loss


def require_metrics(metrics: Mapping[str, Metric], known: Mapping[str, object]) -> dict[str, Metric]:
    """Return fresh copies of the user's metrics.

    Raises:
        ValueError: one is none of torchmetrics, or has a name that is taken or cannot be one.
    """
    for name, metric in metrics.items():
        if not isinstance(metric, Metric):
            raise ValueError(f"metrics.{name}: must be a Metric of torchmetrics, not {type(metric).__name__}")
        if name in known or not name or set(name) & set(FORBIDDEN):
            raise ValueError(f"metrics.{name}: choose another name, without / and ., than {', '.join(known)}")
    return {name: deepcopy(metric) for name, metric in metrics.items()}


class MeanLoss(MeanMetric):
    """The mean of a loss over samples, from its mean over each batch."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self._loss = (loss,)  # of the learner, not a part of this metric

    def update(self, output: Tensor, y: Tensor) -> None:  # type: ignore[override]
        with torch.no_grad():
            super().update(self._loss[0](output, y), weight=len(y))

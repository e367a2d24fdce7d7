"""Regression of one number per sample. Letters: B batch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection, R2Score
from torchmetrics.utilities import dim_zero_cat

from espalier.learners import own
from espalier.learners.learner import Learner, Split
from espalier.spec import DataSpec

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}


class Pairs(Metric):
    """Every (prediction, target), shape (N, 2), for the scatter plot."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("pairs", default=[], dist_reduce_fx="cat")

    def update(self, predicted_B: Tensor, y_B: Tensor) -> None:
        self.pairs.append(torch.stack((predicted_B, y_B), dim=1))  # type: ignore[union-attr, operator]

    def compute(self) -> Tensor:
        return dim_zero_cat(self.pairs)  # type: ignore[arg-type]


class Regressor(Learner):
    """The model predicts (y - target_mean) / target_std, which the loss compares; metrics are in the unit of y."""

    monitor = "val/rmse"
    mode = "min"
    train_statistics = ("loss",)

    def __init__(
        self,
        model: nn.Module,
        spec: DataSpec,
        optimizer: partial[torch.optim.Optimizer],
        scheduler: partial[Any],
        seed: int,
        loss: Literal["mse", "mae", "huber"] | nn.Module,
        channels_last: bool,
        compile: bool,
        metrics: Mapping[str, Metric] | None,
    ) -> None:
        if spec.num_classes:
            raise ValueError(f"data {spec.name} has classes as targets, not numbers; use learner=classifier")
        super().__init__(model, spec, optimizer, scheduler, seed, channels_last, compile, metrics)
        self.loss_function: Callable[[Tensor, Tensor], Tensor] = (
            LOSSES[loss] if isinstance(loss, str) else own.require_loss(loss, torch.zeros(2), torch.zeros(2))
        )

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return self.loss_function(output.squeeze(1), (y - self.spec.target_mean) / self.spec.target_std)

    def sums(self, output: Tensor, y: Tensor, loss: Tensor) -> Tensor:
        samples = torch.full_like(loss, len(y), dtype=torch.float32)  # half precision counts to 256
        return torch.stack((loss * samples, samples))

    def predict(self, output: Tensor) -> Tensor:
        return output.squeeze(1) * self.spec.target_std + self.spec.target_mean

    def new_metrics(self, split: Split) -> MetricCollection:
        metrics: dict[str, Metric | MetricCollection] = {
            "rmse": MeanSquaredError(squared=False),
            "mae": MeanAbsoluteError(),
            "r2": R2Score(),
        }
        if split == "test":
            metrics["pairs_N2"] = Pairs()
        metrics |= own.require_metrics(self.own_metrics, metrics)
        return MetricCollection(metrics, prefix=f"{split}/", compute_groups=False)

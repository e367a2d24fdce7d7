"""Regression of one number per sample. Letters: B batch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from espalier.learners import own
from espalier.learners.learner import Learner
from espalier.spec import DataSpec
from espalier.targets.numbers import Numbers

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}


class Regressor(Learner):
    """A learner of (y - target_mean) / target_std, which the loss compares; metrics are in the unit of y."""

    takes = Numbers

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
        super().__init__(model, spec, optimizer, scheduler, seed, channels_last, compile, metrics)
        self.loss_function: Callable[[Tensor, Tensor], Tensor] = (
            LOSSES[loss] if isinstance(loss, str) else own.require_loss(loss, torch.zeros(2), torch.zeros(2))
        )

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return self.loss_function(output.squeeze(1), (y - self.spec.target_mean) / self.spec.target_std)

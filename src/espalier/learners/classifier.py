"""Classification with cross entropy. Letters: B batch, K classes."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from espalier.config.ranges import Rate
from espalier.data.loaders import Batch
from espalier.learners import own
from espalier.learners.learner import Learner, Split
from espalier.spec import DataSpec
from espalier.strategies.collective import SumOverRanks
from espalier.targets.classes import Classes


class Classifier(Learner):
    """A learner of one class per sample; soft targets (B, K), as mixup and cutmix make them, are allowed.

    `class_weights` scale each class's loss: `balanced` means num_samples / (num_classes * class_count), which
    gives every class the same total weight (King and Zeng 2001). The loss of a batch is divided by the weights of its
    samples, and so by those of the global batch where several processes train.

    `loss` takes the place of cross entropy: called with logits (B, K) and targets, it gives the mean over the batch.
    """

    takes = Classes

    def __init__(
        self,
        model: nn.Module,
        spec: DataSpec,
        optimizer: partial[torch.optim.Optimizer],
        scheduler: partial[Any],
        seed: int,
        label_smoothing: Rate,
        class_weights: Literal["balanced"] | Sequence[float] | None,
        channels_last: bool,
        compile: bool,
        loss: nn.Module | None,
        metrics: Mapping[str, Metric] | None,
    ) -> None:
        if loss is not None and (label_smoothing or class_weights is not None):
            raise ValueError(
                "loss takes the place of cross entropy; set label_smoothing to 0 and class_weights to null"
            )
        self._own = () if loss is None else (own.require_loss(loss, torch.zeros(2, spec.num_classes), _two_classes()),)
        super().__init__(model, spec, optimizer, scheduler, seed, channels_last, compile, metrics)
        self.loss_module = loss  # a part of the learner, so that its buffers follow to the device
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", _class_weights(class_weights, spec), persistent=False)
        self._ddp_params_and_buffers_to_ignore = ["class_weights"]  # DDP would send it in every step
        self._weight: SumOverRanks | None = None  # of all samples of this step, where several processes weigh them

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.class_weights is not None and not self.guard.is_alone:
            weight_K = cast(Tensor, self.class_weights).float()
            # torch divides the loss of soft targets by their number, which is that of all ranks.
            self._weight = SumOverRanks(weight_K[batch.y].sum()) if batch.y.ndim == 1 else None
        return super().training_step(batch, batch_idx)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        if self._own:
            return self._own[0](output, y)
        return self._cross_entropy(output, y, "mean")

    def training_loss(self, output: Tensor, y: Tensor) -> Tensor:
        if self._weight is None:
            return self.loss(output, y)
        return self._cross_entropy(output, y, "sum") * (dist.get_world_size() / self._weight.get())

    def _cross_entropy(self, output: Tensor, y: Tensor, reduction: str) -> Tensor:
        weight_K = cast("Tensor | None", self.class_weights)
        return F.cross_entropy(output, y, weight_K, reduction=reduction, label_smoothing=self.label_smoothing)

    def usual_metrics(self, split: Split) -> dict[str, Metric | MetricCollection]:
        metrics = super().usual_metrics(split)
        return {**metrics, "loss": own.MeanLoss(self._own[0])} if self._own else metrics


def _two_classes() -> Tensor:
    return torch.zeros(2, dtype=torch.long)


def _class_weights(weights: str | Sequence[float] | None, spec: DataSpec) -> Tensor | None:
    if weights is None:
        return None
    if isinstance(weights, str):
        counts_K = torch.tensor(spec.class_counts, dtype=torch.float32)
        return counts_K.sum() / (len(counts_K) * counts_K.clamp(min=1))
    if len(weights) != spec.num_classes:
        raise ValueError(f"class_weights has {len(weights)} numbers, data {spec.name} has {spec.num_classes} classes")
    return torch.tensor(list(weights), dtype=torch.float32)

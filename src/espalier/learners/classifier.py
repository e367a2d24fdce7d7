"""Classification with cross entropy. Letters: B batch, K classes."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from espalier.config.ranges import Rate
from espalier.data.loaders import Batch
from espalier.learners import own
from espalier.learners.learner import Learner, Split
from espalier.spec import DataSpec
from espalier.strategies.collective import SumOverRanks


class CrossEntropy(MeanMetric):
    """Mean cross entropy of logits (B, K) and classes (B,), in nats."""

    def update(self, logits_BK: Tensor, y_B: Tensor) -> None:  # type: ignore[override]
        super().update(F.cross_entropy(logits_BK, y_B, reduction="none"))


class Classifier(Learner):
    """One class per sample. Soft targets (B, K), as mixup and cutmix make them, train like hard ones.

    `class_weights` scale each class's loss: `balanced` means num_samples / (num_classes * class_count), which
    gives every class the same total weight (King and Zeng 2001). The loss of a batch is divided by the weights of its
    samples, and so by those of the global batch where several processes train.

    `loss` takes the place of cross entropy: called with logits (B, K) and targets, it gives the mean over the batch.
    """

    monitor = "val/accuracy"
    mode = "max"
    train_statistics = ("loss", "accuracy")

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
        if not spec.num_classes:
            raise ValueError(f"data {spec.name} has numbers as targets, not classes; use learner=regressor")
        self.num_classes = spec.num_classes
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

    def sums(self, output: Tensor, y: Tensor, loss: Tensor) -> Tensor:
        y_B = y if y.ndim == 1 else y.argmax(1)
        num_correct = (output.argmax(1) == y_B).sum()
        samples = torch.full_like(loss, len(y), dtype=torch.float32)  # half precision counts to 256
        return torch.stack((loss * samples, num_correct.to(torch.float32), samples))

    def new_metrics(self, split: Split) -> MetricCollection:
        metrics: dict[str, Metric | MetricCollection] = {
            "loss": own.MeanLoss(self._own[0]) if self._own else CrossEntropy(),
            "accuracy": MulticlassAccuracy(self.num_classes, average="micro", validate_args=False),
            "f1": MulticlassF1Score(self.num_classes, average="macro", validate_args=False),
            "calibration_error": MulticlassCalibrationError(self.num_classes, n_bins=15, validate_args=False),
        }
        if self.num_classes > 5:
            metrics["top5_accuracy"] = MulticlassAccuracy(
                self.num_classes, average="micro", top_k=5, validate_args=False
            )
        if split == "test":
            metrics["confusion_KK"] = MulticlassConfusionMatrix(self.num_classes, validate_args=False)
        metrics |= own.require_metrics(self.own_metrics, metrics)
        return MetricCollection(metrics, prefix=f"{split}/", compute_groups=False)


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

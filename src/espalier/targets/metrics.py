"""Metrics and distances that torchmetrics lacks. Letters: N samples, K classes, M bins."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.utilities import dim_zero_cat

NUM_BINS = 15  # of a calibration curve, as in Guo et al. 2017


def distillation(student_NK: Tensor, teacher_NK: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) of softened logits, mean over the batch, in nats; scalar.

    Scaled by temperature**2 so gradients keep their size as it changes
    (Hinton et al. 2015, section 2, arxiv.org/abs/1503.02531).
    """
    ours_NK = F.log_softmax(student_NK / temperature, dim=1)
    theirs_NK = F.log_softmax(teacher_NK / temperature, dim=1)
    return F.kl_div(ours_NK, theirs_NK, reduction="batchmean", log_target=True) * temperature**2


class CrossEntropy(MeanMetric):
    """Mean cross entropy of logits (N, K) and classes (N,), in nats."""

    def update(self, logits_NK: Tensor, y_N: Tensor) -> None:  # type: ignore[override]
        super().update(F.cross_entropy(logits_NK, y_N, reduction="none"))


class Pairs(Metric):
    """Every (prediction, target), shape (N, 2), for the scatter plot."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("pairs", default=[], dist_reduce_fx="cat")

    def update(self, predicted_N: Tensor, y_N: Tensor) -> None:
        self.pairs.append(torch.stack((predicted_N, y_N), dim=1))  # type: ignore[union-attr, operator]

    def compute(self) -> Tensor:
        return dim_zero_cat(self.pairs)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy in bins of equal width; a bin without samples has NaN for both."""

    count: Tensor  # (M,): samples of each bin
    confidence: Tensor  # (M,): their mean probability of the predicted class
    accuracy: Tensor  # (M,): the share of them that is right

    @property
    def error(self) -> Tensor:
        """Return the expected calibration error, scalar: |accuracy - confidence|, each bin weighed by its samples."""
        gap_M = (self.accuracy - self.confidence).abs().nan_to_num()
        return (gap_M * self.count).sum() / self.count.sum()


def calibration(logits_NK: Tensor, y_N: Tensor) -> Calibration:
    """Sort answers into bins by the probability of the predicted class.

    Guo et al. 2017, section 2, arxiv.org/abs/1706.04599.
    """
    return _calibration(_bin_sums(logits_NK, y_N))


class CalibrationError(Metric):
    """The error of `calibration`, from three sums per bin, however many samples there are."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("bins", default=torch.zeros(3, NUM_BINS), dist_reduce_fx="sum")

    def update(self, logits_NK: Tensor, y_N: Tensor) -> None:
        self.bins += _bin_sums(logits_NK, y_N)  # type: ignore[operator]

    def compute(self) -> Tensor:
        return _calibration(self.bins).error  # type: ignore[arg-type]


def _bin_sums(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """Return per bin how many samples it has, their confidence and how many are right, as sums; (3, M)."""
    confidence_N, predicted_N = logits_NK.float().softmax(dim=1).max(dim=1)
    bin_N = (confidence_N * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1  # a bin ends with its upper border
    is_in_NM = F.one_hot(bin_N, NUM_BINS).float()
    columns = (torch.ones_like(confidence_N), confidence_N, (predicted_N == y_N).float())
    return torch.stack([(is_in_NM * each_N[:, None]).sum(0) for each_N in columns])  # no matmul, which TF32 rounds


def _calibration(sums_3M: Tensor) -> Calibration:
    count_M, confidence_M, right_M = sums_3M
    return Calibration(count_M.long(), confidence_M / count_M, right_M / count_M)

"""What a network answered, sample by sample: collected once, then counted and ranked.

Letters: N samples, K classes, B samples of a batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from espalier.data.loaders import Batch
from espalier.errors import ConfigError
from espalier.learners.learner import Learner
from espalier.reporting import terminal
from espalier.spec import DataSpec

NUM_BINS = 15  # of a calibration curve, as in Guo et al. 2017 and in the metric `calibration_error`
MAX_CLASSES = 20  # in the printed table; of more, the worst WORST_CLASSES
WORST_CLASSES = 10


@dataclass(frozen=True)
class Predictions:
    """The answers to some samples of a split, in the order of `index`."""

    spec: DataSpec
    index: Tensor  # (N,): of the sample in its split
    y: Tensor  # (N,): classes, or numbers of a regression
    output: Tensor  # logits, (N, K); of a regression (N, 1), not yet in the unit of the target

    @property
    def probability(self) -> Tensor:
        """Of each class, shape (N, K)."""
        return self.output.softmax(dim=1)

    @property
    def predicted(self) -> Tensor:
        """The class with the highest probability, shape (N,); of a regression the number, in the unit of the target."""
        if self.spec.num_classes:
            return self.output.argmax(dim=1)
        return self.output.squeeze(1) * self.spec.target_std + self.spec.target_mean

    @property
    def confidence(self) -> Tensor:
        """Probability of the predicted class, shape (N,)."""
        return self.probability.amax(dim=1)

    def __len__(self) -> int:
        return len(self.y)

    def rows(self, start: int, stop: int) -> "Predictions":
        """Those from `start` up to `stop`."""
        part = slice(start, stop)
        return Predictions(self.spec, self.index[part], self.y[part], self.output[part])


def collect(predict: Callable[[Tensor], Tensor], spec: DataSpec, batches: Iterable[Batch]) -> Predictions:
    """Return the answers to all samples; `predict` takes x (B, ...) on the CPU and returns the network's output there.

    Raises:
        ConfigError: there is no sample.
    """
    with torch.no_grad():
        parts = [Predictions(spec, batch.index, batch.y, predict(batch.x).float()) for batch in batches]
    if not parts:
        raise ConfigError(f"task.split: {spec.name} has no sample there, so there is nothing to measure")
    return join(parts)


def join(parts: Sequence[Predictions]) -> Predictions:
    """One after the other; at least one."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*((part.index, part.y, part.output) for part in parts), strict=True)
    return Predictions(parts[0].spec, *(torch.cat(values) for values in columns))


def score(found: Predictions, learner: Learner) -> dict[str, Tensor]:
    """Return the learner's test metrics of these answers, tables among them, in this process alone."""
    metrics = learner.new_metrics("test")
    for metric in metrics.values():
        metric.distributed_available_fn = lambda: False  # no other rank has answers
    metrics.update(learner.predict(found.output), found.y)
    return metrics.compute()


@dataclass(frozen=True)
class ClassScore:
    """How one class fares; a share is 0 where nothing could be divided."""

    name: str
    precision: float  # of what was given this label, how much is right
    recall: float  # of the samples of this class, how many were found
    f1: float
    support: int  # samples of this class


def per_class(found: Predictions) -> list[ClassScore]:
    """One score per class, in the order of the classes."""
    num_classes = found.spec.num_classes
    predicted_N = found.predicted
    support_K = found.y.bincount(minlength=num_classes)
    given_K = predicted_N.bincount(minlength=num_classes)
    right_K = found.y[predicted_N == found.y].bincount(minlength=num_classes)
    counts = zip(right_K.tolist(), given_K.tolist(), support_K.tolist(), strict=True)
    return [
        ClassScore(name, right / max(given, 1), right / max(support, 1), 2 * right / max(given + support, 1), support)
        for name, (right, given, support) in zip(found.spec.class_names, counts, strict=True)
    ]


def worst(scores: Sequence[ClassScore]) -> list[ClassScore]:
    """Classes that have samples, the lowest F1 first."""
    return sorted((score for score in scores if score.support), key=lambda score: score.f1)


def class_table(scores: Sequence[ClassScore]) -> Table:
    """All classes; of more than `MAX_CLASSES` the worst."""
    is_short = len(scores) <= MAX_CLASSES
    shown = list(scores) if is_short else worst(scores)[:WORST_CLASSES]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    grid.add_column("class" if is_short else f"worst {len(shown)} of {len(scores)} classes", style="bold")
    for name in ("precision", "recall", "F1", "samples"):
        grid.add_column(name, justify="right")
    for score in shown:
        shares = (f"{share:.4f}" for share in (score.precision, score.recall, score.f1))
        grid.add_row(Text(terminal.printable(score.name)), *shares, f"{score.support:,}")
    return grid


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy in bins of equal width; a bin without samples has NaN for both."""

    count: Tensor  # (K,): samples of each bin
    confidence: Tensor  # (K,): their mean probability of the predicted class
    accuracy: Tensor  # (K,): the share of them that is right

    @property
    def error(self) -> float:
        """Expected calibration error: |accuracy - confidence|, each bin weighed by its samples."""
        gap_K = (self.accuracy - self.confidence).abs().nan_to_num()
        return float((gap_K * self.count).sum() / self.count.sum())


def calibration(found: Predictions) -> Calibration:
    """Guo et al. 2017, section 2, arxiv.org/abs/1706.04599."""
    confidence_N = found.confidence.double()
    is_right_N = (found.predicted == found.y).double()
    bin_N = (confidence_N * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1  # a bin ends with its upper border
    count_K = bin_N.bincount(minlength=NUM_BINS)
    sums = (bin_N.bincount(weights=each_N, minlength=NUM_BINS) for each_N in (confidence_N, is_right_N))
    confidence_K, accuracy_K = (total_K / count_K for total_K in sums)
    return Calibration(count_K, confidence_K, accuracy_K)


def confident_errors(found: Predictions, limit: int) -> Tensor:
    """Places in `found` of at most `limit` wrong answers, the most confident first."""
    place_E = (found.predicted != found.y).nonzero().flatten()
    order_E = found.confidence[place_E].argsort(descending=True, stable=True)
    return place_E[order_E][:limit]


def columns(found: Predictions, probabilities: bool) -> dict[str, NDArray[Any]]:
    """By name: index, true, predicted; for classes their names, the probability of the predicted one, and, if wanted,
    `p_NAME` for each class.
    """
    index_N, y_N, predicted_N = (values.numpy() for values in (found.index, found.y, found.predicted))
    if not found.spec.num_classes:
        return {"index": index_N, "true": y_N, "predicted": predicted_N}
    names = np.array(found.spec.class_names, dtype=object)
    table = {"index": index_N, "true": names[y_N], "predicted": names[predicted_N]}
    table["probability"] = found.confidence.numpy()
    if probabilities:
        shares_KN = found.probability.T.contiguous().numpy()
        table |= {f"p_{name}": share_N for name, share_N in zip(names, shares_KN, strict=True)}
    return table

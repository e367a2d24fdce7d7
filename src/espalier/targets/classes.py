"""One class per sample. Letters: N samples, K classes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from espalier.targets.kind import Judged, Raw, TargetKind

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor
    from torchmetrics import Metric, MetricCollection

    from espalier.targets.predictions import Predictions

CONFUSION = "confusion_KK"  # a metric of a test
MAX_EASY = 5  # classes; with so few, the true one among the five most probable ones says nothing


class Classes(TargetKind):
    """The network gives a logit per class; the answer is the class with the largest."""

    word = "classes"
    learner = "classifier"
    monitor = "val/accuracy"
    mode = "max"
    statistics = ("loss", "accuracy")
    has_probabilities = True

    @property
    def said(self) -> str:
        return f"{self.spec.num_classes} classes"

    @property
    def groups(self) -> tuple[str, ...]:
        return self.spec.class_names

    def answer(self, output_NK: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the probability of each class, (N, K)."""
        with np.errstate(invalid="ignore"):  # what is not finite is told to the client
            weights_NK = np.exp(output_NK - output_NK.max(axis=1, keepdims=True))
            return weights_NK / weights_NK.sum(axis=1, keepdims=True)

    def reply(self, values: Sequence[float], best: int) -> dict[str, Any]:
        names = self.spec.class_names
        return {
            "label": names[best],
            "probability": values[best],
            "probabilities": dict(zip(names, values, strict=True)),
        }

    def true(self, y_N: NDArray[Any]) -> NDArray[Any]:
        return self._names[y_N]

    def columns(self, output_NK: NDArray[np.float32], *, is_full: bool) -> dict[str, NDArray[Any]]:
        """Return `predicted`, its `probability`, and, if wanted, `p_NAME` for each class."""
        answer_NK = self.answer(output_NK)
        table = {"predicted": self._names[output_NK.argmax(axis=1)], "probability": answer_NK.max(axis=1)}
        if is_full:
            shares_KN = np.ascontiguousarray(answer_NK.T)
            table |= {f"p_{name}": share_N for name, share_N in zip(self._names, shares_KN, strict=True)}
        return table

    def score(self, parts: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> dict[str, float]:
        num, right = 0, 0
        for true, predicted in parts:
            num, right = num + len(true), right + int((true == predicted).sum())
        return {"accuracy": right / num}

    def predicted(self, output: "Tensor") -> "Tensor":
        return output.argmax(dim=1)

    def measured(self, output: "Tensor") -> "Tensor":
        return output

    def sums(self, output: "Tensor", y: "Tensor", loss: "Tensor") -> "Tensor":
        import torch

        y_N = y if y.ndim == 1 else y.argmax(1)
        num_correct = (output.argmax(1) == y_N).sum()
        samples = torch.full_like(loss, len(y), dtype=torch.float32)  # half precision counts to 256
        return torch.stack((loss * samples, num_correct.to(torch.float32), samples))

    def metrics(self, split: str) -> "dict[str, Metric | MetricCollection]":
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

        from espalier.targets.metrics import CalibrationError, CrossEntropy

        num = self.spec.num_classes
        metrics: dict[str, Metric | MetricCollection] = {
            "loss": CrossEntropy(),
            "accuracy": MulticlassAccuracy(num, average="micro", validate_args=False),
            "f1": MulticlassF1Score(num, average="macro", validate_args=False),
            "calibration_error": CalibrationError(),
        }
        if num > MAX_EASY:
            metrics["top5_accuracy"] = MulticlassAccuracy(num, average="micro", top_k=5, validate_args=False)
        if split == "test":
            metrics[CONFUSION] = MulticlassConfusionMatrix(num, validate_args=False)
        return metrics

    def num_same(self, ours_NK: "Tensor", theirs_NK: "Tensor") -> int:
        return int((ours_NK.argmax(1) == theirs_NK.argmax(1)).sum())

    def distance(self, student_NK: "Tensor", teacher_NK: "Tensor", temperature: float) -> "Tensor":
        from espalier.targets.metrics import distillation

        return distillation(student_NK, teacher_NK, temperature)

    def draw(self, tables: Mapping[str, "Tensor"], folder: Path) -> None:
        from espalier.reporting import figures

        if CONFUSION in tables:
            figures.confusion_matrix(tables[CONFUSION], self.spec.class_names, folder / "confusion.png")

    def report_errors(self, found: "Predictions", raw: Raw, folder: Path) -> Iterator[str]:
        """Draw calibration and the most confident errors, and write every class; say which fares worst."""
        from espalier.targets import class_report

        return class_report.describe(found, raw, folder)

    def table(self, found: "Predictions") -> "Table":
        from espalier.targets import class_report

        return class_report.class_table(class_report.per_class(found))

    def judge(self, output_NK: "Tensor", y_N: "Tensor") -> Judged:
        return Judged(y_N, output_NK.argmax(1) != y_N, output_NK.softmax(dim=1).amax(dim=1))

    def explained(self, output_NK: "Tensor", y_N: "Tensor", which: Literal["predicted", "label"]) -> "Tensor":
        return y_N if which == "label" else self.predicted(output_NK)

    def named(self, which: Literal["predicted", "label"]) -> str:
        return {"predicted": "the predicted class", "label": "the true class"}[which]

    def caption(self, output_K: "Tensor", y: "Tensor") -> str:
        from espalier.reporting.lettering import short

        probability, says = output_K.softmax(dim=0).max(dim=0)
        names = [short(self.spec.class_names[int(each)]) for each in (y, says)]
        return f"true {names[0]}\nsays {names[1]}\nat {float(probability):.1%}"

    def titled(self, group: int) -> str:
        from espalier.reporting.lettering import short

        return f"true class {short(self.spec.class_names[group])}"

    @property
    def _names(self) -> NDArray[Any]:
        return np.array(self.spec.class_names, dtype=object)

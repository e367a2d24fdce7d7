"""One number per sample. Letters: N samples."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from espalier.targets.kind import Judged, Raw, TargetKind

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric, MetricCollection

    from espalier.targets.predictions import Predictions

PAIRS = "pairs_N2"  # a metric of a test


class Numbers(TargetKind):
    """The network gives (y - target_mean) / target_std; the answer is y, in its unit."""

    word = "numbers"
    learner = "regressor"
    monitor = "val/rmse"
    mode = "min"
    statistics = ("loss",)
    has_probabilities = False

    @property
    def said(self) -> str:
        return "one number"

    @property
    def groups(self) -> tuple[str, ...]:
        return ("output",)

    def answer(self, output_NK: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the value in the unit of the target, (N, 1)."""
        return output_NK * np.float32(self.spec.target_std) + np.float32(self.spec.target_mean)

    def reply(self, values: Sequence[float], best: int) -> dict[str, Any]:
        return {"value": values[0]}

    def true(self, y_N: NDArray[Any]) -> NDArray[Any]:
        return y_N

    def columns(self, output_NK: NDArray[np.float32], *, is_full: bool) -> dict[str, NDArray[Any]]:
        """Return `predicted` alone."""
        return {"predicted": self.answer(output_NK)[:, 0]}

    def score(self, parts: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> dict[str, float]:
        num, squares, sizes = 0, 0.0, 0.0
        for true, predicted in parts:
            error = predicted.astype(np.float64) - true
            num += len(true)
            squares, sizes = squares + float((error**2).sum()), sizes + float(np.abs(error).sum())
        return {"rmse": math.sqrt(squares / num), "mae": sizes / num}

    def predicted(self, output: "Tensor") -> "Tensor":
        return output.squeeze(1) * self.spec.target_std + self.spec.target_mean

    def measured(self, output: "Tensor") -> "Tensor":
        return self.predicted(output)

    def sums(self, output: "Tensor", y: "Tensor", loss: "Tensor") -> "Tensor":
        import torch

        samples = torch.full_like(loss, len(y), dtype=torch.float32)  # half precision counts to 256
        return torch.stack((loss * samples, samples))

    def metrics(self, split: str) -> "dict[str, Metric | MetricCollection]":
        from torchmetrics import MeanAbsoluteError, MeanSquaredError, R2Score

        from espalier.targets.metrics import Pairs

        metrics: dict[str, Metric | MetricCollection] = {
            "rmse": MeanSquaredError(squared=False),
            "mae": MeanAbsoluteError(),
            "r2": R2Score(),
        }
        if split == "test":
            metrics[PAIRS] = Pairs()
        return metrics

    def num_same(self, ours_NK: "Tensor", theirs_NK: "Tensor") -> int:
        return len(ours_NK)

    def distance(self, student_NK: "Tensor", teacher_NK: "Tensor", temperature: float) -> "Tensor":
        """Return the squared error to the teacher."""
        from torch.nn.functional import mse_loss

        return mse_loss(student_NK, teacher_NK)

    def draw(self, tables: Mapping[str, "Tensor"], folder: Path) -> None:
        from espalier.reporting import figures

        if PAIRS in tables:
            predicted_N, true_N = tables[PAIRS].unbind(1)
            figures.predicted_vs_true(predicted_N, true_N, folder / "predictions.png")

    def report_errors(self, found: "Predictions", raw: Raw, folder: Path) -> Iterator[str]:
        """Draw the residuals."""
        from espalier.reporting import error_figures

        error_figures.residuals(found.predicted, found.y, folder / "figures" / "residuals.png")
        return iter(())

    def table(self, found: "Predictions") -> None:
        return None

    def judge(self, output_NK: "Tensor", y_N: "Tensor") -> Judged:
        """Call the worse half wrong; the best of the good and the worst of the bad are the confident ones."""
        import torch

        error_N = (self.predicted(output_NK) - y_N).abs()
        is_wrong_N = error_N > error_N.median()
        group_N = torch.zeros(len(error_N), dtype=torch.long)
        return Judged(group_N, is_wrong_N, torch.where(is_wrong_N, error_N, -error_N))

    def explained(self, output_NK: "Tensor", y_N: "Tensor", which: Literal["predicted", "label"]) -> "Tensor":
        import torch

        return torch.zeros(len(y_N), dtype=torch.long)

    def named(self, which: Literal["predicted", "label"]) -> str:
        return "the output"

    def caption(self, output_K: "Tensor", y: "Tensor") -> str:
        return f"true {float(y):.4g}\nsays {float(self.predicted(output_K[None])):.4g}"

    def titled(self, group: int) -> str:
        return "output"

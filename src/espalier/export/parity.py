"""Check that an exported file gives the same answers as the network that it was made from.

Both sides get the same raw samples. One side is that of training: torch normalises, the network answers. The other is
that of the server: numpy normalises, a runtime answers.
"""

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import torch

from espalier.data.loaders import Reader, Samples
from espalier.data.module import pick
from espalier.data.transforms import NormaliseAll
from espalier.export.deployed import Predict
from espalier.export.preprocess import prepared
from espalier.learners.learner import Learner

BATCH_SIZE = 64
MISMATCH = "MISMATCH"  # opens the remark about a format that does not pass
METRIC_EPS = 1e-4  # a metric is a sum of float32 values in another order


@dataclass(frozen=True)
class Parity:
    """The differences between two forms of a network on `num_samples` samples."""

    num_samples: int
    max_difference: float  # of a logit
    same_label: float  # share of samples with equal arg-max; 1.0 for a regression
    metric: str
    eager: float  # the metric of the network in torch
    exported: float  # and of the file in its runtime

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, as bundles store them; a difference that is not a number becomes null."""
        return {**asdict(self), "max_difference": self.max_difference if isfinite(self.max_difference) else None}

    def to_metrics(self) -> dict[str, float]:
        """Return the differences under the names of the report."""
        return {self.metric: self.exported, "same label": self.same_label, "max difference": self.max_difference}


@dataclass(frozen=True)
class Gate:
    """The largest differences from its network with which an exported file is accepted."""

    is_exact: bool  # float32 all through: only rounding may differ
    tolerance: float  # of a logit, where exact
    agreement: float  # least share of equal labels, or of the metric of a regression, where numbers are rounded

    def problem(self, found: Parity) -> str | None:
        """Return which limit is exceeded, in words, or None."""
        least = 1.0 if self.is_exact else self.agreement
        if not isfinite(found.max_difference):
            return "answers with numbers that are not finite"
        if self.is_exact and found.max_difference > self.tolerance:
            return f"differs from torch by {found.max_difference:.2g}, more than task.tolerance={self.tolerance:g}"
        if found.same_label < least:
            num_other = round((1 - found.same_label) * found.num_samples)
            return f"gives {num_other} of {found.num_samples} samples another label ({least:.1%} must agree)"
        of_labels = 1 - found.same_label  # what labels that may differ move an accuracy by
        if abs(found.exported - found.eager) > max((1 - least) * abs(found.eager), of_labels) + METRIC_EPS:
            return f"changes {found.metric} from {found.eager:.4f} to {found.exported:.4f}"
        return None


def compare(eager: Predict, exported: Predict, learner: Learner, samples: Samples | Reader) -> Parity:
    """Run both networks on every raw sample; both take normalised inputs, (B, ...) each, on the CPU."""
    spec, metric = learner.spec, learner.monitor.replace("val/", "test/")
    metrics = [learner.new_metrics("test"), learner.new_metrics("test")]
    in_torch = NormaliseAll(spec, torch.device("cpu"))
    difference, num_same, num_samples = torch.zeros(()), 0, 0
    with torch.no_grad():
        for index_B in torch.arange(len(samples)).split(BATCH_SIZE):
            raw = pick(samples, index_B)
            ours_BK = eager(*in_torch(raw.inputs)).float()
            theirs_BK = exported(*(map(torch.from_numpy, prepared(spec, [x.numpy() for x in raw.inputs])))).float()
            difference = torch.maximum(difference, (ours_BK - theirs_BK).abs().max())  # unlike max(), it keeps a NaN
            num_same += learner.kind.num_same(ours_BK, theirs_BK)
            num_samples += len(raw)
            for values, output_BK in zip(metrics, (ours_BK, theirs_BK), strict=True):
                values.update(learner.predict(output_BK), raw.y)
    of_eager, of_exported = (float(values.compute()[metric]) for values in metrics)
    return Parity(num_samples, float(difference), num_same / num_samples, metric, of_eager, of_exported)

"""The result of `predict`. Letters: N samples, K classes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espalier.errors import EspalierError
from espalier.spec import DataSpec


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers to N samples, in their order."""

    labels: list[str]  # the most probable class of each; empty for a regression
    probabilities: NDArray[np.float32]  # (N, K), classes in the order of `spec.class_names`; (N, 0) for a regression
    values: NDArray[np.float32]  # (N,), in the unit of the target; (0,) for classes

    def __len__(self) -> int:
        return len(self.probabilities)


def answers(spec: DataSpec, found: NDArray[np.float32]) -> Answers:
    """Name the classes of probabilities (N, K), or hand on the values (N, 1) of a regression.

    Raises:
        EspalierError: a number is not finite.
    """
    if not (is_finite := np.isfinite(found).all(axis=1)).all():
        raise EspalierError(
            f"predict: the network's output is not finite for sample {int(is_finite.argmin())}; "
            "check the size of its numbers"
        )
    if not spec.num_classes:
        return Answers([], found[:, :0], found[:, 0])
    labels = [spec.class_names[place] for place in found.argmax(axis=1)]
    return Answers(labels, found, np.empty(0, dtype=np.float32))

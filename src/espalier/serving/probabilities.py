"""From what a network says to what a user reads: probabilities, or a value in the unit of the target."""

import numpy as np
from numpy.typing import NDArray

from espalier.spec import DataSpec


def of_logits(spec: DataSpec, logits_BK: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return probabilities (B, K); for a regression the value (B, 1) in the target's unit."""
    if not spec.num_classes:
        return logits_BK * np.float32(spec.target_std) + np.float32(spec.target_mean)
    with np.errstate(invalid="ignore"):  # what is not finite is told to the client
        weights_BK = np.exp(logits_BK - logits_BK.max(axis=1, keepdims=True))
        return weights_BK / weights_BK.sum(axis=1, keepdims=True)

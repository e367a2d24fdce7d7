"""SHAP: Shapley values, by permutations of the pieces of a sample.

Lundberg and Lee 2017, arXiv 1705.07874; permutations after Strumbelj and Kononenko 2014,
doi.org/10.1007/s10115-013-0679-x. A piece that is switched off takes the value that it has in each of several training
samples, and the outputs are averaged; so the method needs no gradients and knows no baseline.
Letters: N samples, R combinations, P pieces.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from espalier.errors import require
from espalier.explain.base import EXTRA, Explainer, Setting, pieces, scores, spread

NUM_BACKGROUND = 8  # training samples that stand in for what is switched off; cost grows with it


class SHAP(Explainer):
    """Switches pieces off in random orders."""

    package: ClassVar[str] = "shap"

    def explain(self, model: nn.Module, x: Tensor, target: int, setting: Setting) -> Tensor:
        """Return a map that adds up to the output of x minus the mean output of the background, exactly."""
        piece = pieces(x.shape, setting.patch)
        num_pieces = int(piece.max()) + 1
        background_N = setting.background[:NUM_BACKGROUND]
        rows_at_once = max(1, setting.batch_size // len(background_N))

        def value(is_on_QP: NDArray[Any]) -> NDArray[Any]:
            values = []
            for is_on_RP in torch.from_numpy(np.asarray(is_on_QP) > 0).split(rows_at_once):
                is_on = is_on_RP.to(x.device)[:, piece].view(-1, 1, *[1] * (x.ndim - piece.ndim), *piece.shape)
                mixed = torch.where(is_on, x, background_N).flatten(0, 1)
                values.append(scores(model, mixed, target, setting.batch_size).view(len(is_on), -1).mean(dim=1))
            return torch.cat(values).double().cpu().numpy()

        with _numpy_state():
            explainer = require(self.package, EXTRA).explainers.Permutation(
                value, np.zeros((1, num_pieces)), seed=setting.seed % 2**32
            )
            found = explainer(
                np.ones((1, num_pieces)),
                max_evals=max(setting.evaluations, 2 * num_pieces + 1),
                silent=True,
            )
        return spread(torch.from_numpy(found.values[0]), piece)

    def reference(self, model: nn.Module, target: int, setting: Setting) -> float:
        """Return the mean output of the background."""
        return float(scores(model, setting.background[:NUM_BACKGROUND], target, setting.batch_size).mean())


@contextmanager
def _numpy_state() -> Iterator[None]:
    """Restore numpy's global random state after the block, as the explainer seeds it."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)

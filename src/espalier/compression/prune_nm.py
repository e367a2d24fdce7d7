"""N:M pruning: of each M consecutive weights N stay, a pattern for which some hardware has faster kernels (2:4).

Once, by magnitude, then training goes on: Mishra et al. 2021, arXiv 2104.08378, section 4. Consecutive means along the
input channels, at the same position of a kernel, as cuSPARSELt reads a convolution: the inner dimension of the product.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from espalier.compression import masks
from espalier.compression.base import Compression, Stage
from espalier.config.ranges import Count, Share
from espalier.errors import ConfigError
from espalier.spec import Entry


def keep_nm(weight: Tensor, n: int, m: int) -> Tensor:
    """Return a boolean mask that keeps the `n` largest magnitudes of each `m` consecutive ones along dimension 1."""
    groups = weight.abs().movedim(1, -1).unflatten(-1, (-1, m))
    order = groups.argsort(stable=True)  # ties fall in index order, so every rank agrees
    mask = torch.ones_like(order, dtype=torch.bool).scatter(-1, order[..., : m - n], False)
    return mask.flatten(-2).movedim(-1, 1)


class PruneNM(masks.KeepMasks, Compression):
    """Keeps `n` of each `m` weights from the share `start` of the run on, and trains them.

    Layers whose number of input channels is no multiple of `m` stay dense: a first layer, as a rule. What is zero
    already stays so, and counts. Only checkpoints from then on compete for the best.
    """

    stage: ClassVar[Stage] = Stage.MASK

    def __init__(self, n: Count, m: Count, start: Share, skip: Sequence[str]) -> None:
        super().__init__()
        if n >= m:
            raise ConfigError(f"compression.prune_nm.n={n}: must be below m={m}, or nothing is pruned")
        self.n = n
        self.m = m
        self.start = start
        self.skip = skip
        self.is_done = False  # whether the masks are set

    def require(self, model: nn.Module) -> None:
        masks.require_prunable(model, self.skip, self.method)
        if not any(map(self.fits, masks.prunable(model, self.skip).values())):
            raise ConfigError(
                f"compression.prune_nm.m={self.m}: no layer has a multiple of that many input channels; "
                "use compression=[prune_magnitude]"
            )

    def fits(self, weight: Tensor) -> bool:
        """Return whether the number of inputs of this layer is a multiple of `m`."""
        return weight.shape[1] % self.m == 0

    def apply(self, model: nn.Module) -> tuple[nn.Module, Entry]:
        weights = masks.prunable(model, self.skip)
        names = [name for name, weight in weights.items() if self.fits(weight)]
        masks.attach(model, names)
        return model, {"names": names, "dense": [name for name in weights if name not in names]}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        masks.require_whole_run(trainer, self.method)
        self.pairs = [self.masked[name] for name in masks.latest(self.history, self.method)["names"]]
        self.due = masks.step_at(self.start, trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.is_done or trainer.global_step < self.due:
            return
        self.is_done = True
        keeps = [keep_nm(masks.magnitude(weight, mask), self.n, self.m) for weight, mask in self.pairs]
        if masks.prune(self.pairs, keeps):
            masks.forget_best(trainer)

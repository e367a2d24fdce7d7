"""Magnitude pruning: the smallest weights become zero, a few more at a time, while the others go on training.

The criterion of Han et al. 2015, arXiv 1506.02626, and the schedule of Zhu and Gupta 2017, arXiv 1710.01878.
With `rewind` it finds a lottery ticket: Frankle and Carbin 2019, arXiv 1803.03635.
"""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor, nn

from espalier.callbacks.ema import EMA
from espalier.compression import masks
from espalier.compression.base import Compression, Stage
from espalier.config.ranges import Count, Rate, Share
from espalier.errors import ConfigError
from espalier.spec import Entry

log = logging.getLogger(__name__)


def keep_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Return a boolean mask that keeps the largest magnitudes; exactly `round(sparsity * n)` entries are False."""
    drop = round(sparsity * weight.numel())
    order = weight.abs().flatten().argsort(stable=True)  # ties fall in index order, so every rank agrees
    mask = torch.ones_like(order, dtype=torch.bool)
    mask[order[:drop]] = False
    return mask.view_as(weight)


def keep_masks(weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Return a mask per weight, with all entries ranked together, so that some weights lose more than others."""
    mask = keep_mask(torch.cat([weight.flatten() for weight in weights]), sparsity)
    parts = mask.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


def sparsity_at(step: int, first: int, last: int, initial: float, final: float) -> float:
    """Return the sparsity at a step: a cubic from `initial` at step `first` to `final` at `last`, steep at first.

    Zhu and Gupta 2017, equation 1.
    """
    if step >= last:
        return final
    if step <= first:
        return initial
    return final + (initial - final) * (1 - (step - first) / (last - first)) ** 3


class PruneMagnitude(masks.KeepMasks, Compression):
    """Grows the share of zeros to `sparsity` between the shares `start` and `end` of the run, and trains the rest.

    A network that has zeros already keeps them: they count, and the schedule starts from their share.
    `rewind` sets what is kept back to the parameters of the first step once the masks are final, and empties the
    optimizer; the learning rate does not go back. Only checkpoints from then on compete for the best.
    """

    stage: ClassVar[Stage] = Stage.MASK

    def __init__(
        self,
        sparsity: Rate,
        scope: Literal["global", "layer"],
        start: Share,
        end: Share,
        every_n_steps: Count,
        skip: Sequence[str],
        rewind: bool,
    ) -> None:
        super().__init__()
        if start > end:
            raise ConfigError(f"compression.prune_magnitude.start={start}: must not be above end={end}")
        self.sparsity = sparsity
        self.scope = scope
        self.start = start
        self.end = end
        self.every_n_steps = every_n_steps
        self.skip = skip
        self.rewind = rewind
        self.is_done = False  # whether the masks are final
        self.ticket: dict[str, Tensor] = {}  # parameters at the first step, until they are rewound to

    def require(self, model: nn.Module) -> None:
        masks.require_prunable(model, self.skip, self.method)

    def apply(self, model: nn.Module) -> tuple[nn.Module, Entry]:
        names = list(masks.prunable(model, self.skip))
        masks.attach(model, names)
        pairs = masks.masked(model)
        mask = torch.cat([pairs[name][1].flatten() for name in names])
        initial = masks.sparsity([mask])
        if round(initial * mask.numel()) > round(self.sparsity * mask.numel()):
            raise ConfigError(
                f"compression.prune_magnitude.sparsity={self.sparsity}: the source has {initial:.4f} already; "
                "ask for more"
            )
        return model, {"names": names, "initial": initial}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        masks.require_whole_run(trainer, self.method)
        if self.rewind and any(isinstance(callback, EMA) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ConfigError("compression.prune_magnitude.rewind=true: an average cannot go back; drop callbacks.ema")
        entry = masks.latest(self.history, self.method)
        self.pairs = {name: self.masked[name] for name in entry["names"]}
        self.initial = entry["initial"]
        self.first, self.last = masks.step_at(self.start, trainer), masks.step_at(self.end, trainer)
        if self.rewind and trainer.global_step == 0:
            self.ticket = {name: value.detach().clone() for name, value in pl_module.named_parameters()}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        is_due = step >= self.last or (step > self.first and (step - self.first) % self.every_n_steps == 0)
        if self.is_done or not is_due:
            return
        keeps = self.keeps(sparsity_at(step, self.first, self.last, self.initial, self.sparsity))
        self.is_done = step >= self.last
        if self.is_done and self.ticket:
            self._rewind(pl_module, trainer.optimizers)
        has_changed = masks.prune(self.pairs.values(), keeps)
        if self.is_done and has_changed:
            masks.forget_best(trainer)
            if trainer.is_global_zero:
                self._warn_of_empty_layers()

    def keeps(self, sparsity: float) -> list[Tensor]:
        """Return the masks that give the present weights this sparsity."""
        ranked = [masks.magnitude(weight, mask) for weight, mask in self.pairs.values()]
        if self.scope == "global":
            return keep_masks(ranked, sparsity)
        return [keep_mask(weight, sparsity) for weight in ranked]

    @torch.no_grad()
    def _rewind(self, learner: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for name, parameter in learner.named_parameters():
            parameter.copy_(self.ticket[name])
        for optimizer in optimizers:
            optimizer.state.clear()
        self.ticket = {}

    def _warn_of_empty_layers(self) -> None:
        empty = [name for name, (_, mask) in self.pairs.items() if not mask.any()]
        if empty:  # weights that start small, such as those of a head, go first in a short run
            remedy = "start from a trained source, skip that layer, or use scope=layer"
            log.warning("compression.prune_magnitude: nothing is left of %s; %s", ", ".join(empty), remedy)

    def state_dict(self) -> dict[str, Any]:
        return {"ticket": self.ticket} if self.ticket else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ticket = state_dict["ticket"]

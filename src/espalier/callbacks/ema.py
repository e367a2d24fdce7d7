"""Exponential moving average of the weights: measured and kept, while training goes on with the raw ones.

Polyak and Juditsky 1992 (doi.org/10.1137/0330046); the decay that grows with the step is the one of TensorFlow's
ExponentialMovingAverage. Lightning's own WeightAveraging waits for the device once a step, copies the whole learner
with its metrics, and also averages masks and counters, which are not numbers between which one may average.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from espalier.config.ranges import Count, Rate
from espalier.errors import ConfigError


def decay_at(step: int, decay: float) -> float:
    """Return `decay`, but at most (1 + step) / (10 + step), so that the average soon forgets the random start."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update(average: list[Tensor], current: list[Tensor], decay: float) -> None:
    """Set `average` to `decay * average + (1 - decay) * current` in place, all tensors at once."""
    torch._foreach_lerp_(average, current, 1 - decay)


def averaged_names(module: nn.Module) -> list[str]:
    """Return the names that are averaged: parameters and batch-norm statistics; other buffers stay as they are."""
    stored = module.state_dict().keys()
    statistics = [
        name
        for name, _ in module.named_buffers(remove_duplicate=False)
        if name.rpartition(".")[2] in ("running_mean", "running_var")
    ]
    parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]  # tied: both names
    return [name for name in parameters + statistics if name in stored]


class EMA(L.Callback):
    """Averages the weights: validation, test and checkpoints use the average, training goes on with the raw weights.

    The learner holds the raw weights while it trains, the average while it is validated and after training. A bool
    buffer `weight_mask` beside `weight` masks the average too, or zeros set just now would not be zeros in it.
    The average of a network in 16 bits has 32: in bfloat16 it would stand still, as its steps are below its precision.
    """

    def __init__(self, decay: Rate, every_n_steps: Count) -> None:
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.step = 0  # optimizer step of the last update
        self.shows_average = False  # whether the learner holds the average, and `raw` what it trains
        self.names: list[str] = []
        self.held: list[Tensor] = []  # the learner's own tensors
        self.average: list[Tensor] = []  # float32, or what is wider
        self.raw: list[Tensor] = []  # while the learner holds the average
        self.is_wider = False  # the average, than the weights
        self.masks: dict[int, Tensor] = {}  # by place in `names`
        self.restored: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ConfigError("callbacks.ema: needs whole weights on each device; use strategy=ddp, or drop ema")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = pl_module.state_dict()
        self.names = averaged_names(pl_module)
        self.held = [state[name] for name in self.names]
        averages = self.restored or state
        wide = [torch.promote_types(tensor.dtype, torch.float32) for tensor in self.held]
        self.average = [
            averages[name].to(state[name].device, dtype, copy=True)
            for name, dtype in zip(self.names, wide, strict=True)
        ]
        self.raw = []
        self.is_wider = wide != [tensor.dtype for tensor in self.held]
        masks = {place: state.get(f"{name}_mask") for place, name in enumerate(self.names)}
        self.masks = {place: mask for place, mask in masks.items() if mask is not None and mask.dtype == torch.bool}
        if not self.restored:
            self.step = trainer.global_step
        self.restored = {}
        self.shows_average = False
        self._catch_up(trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._catch_up(trainer.global_step)

    def _catch_up(self, step: int) -> None:
        """Update once per optimizer step, also if a checkpoint was written between the step and its update."""
        if step > self.step and step % self.every_n_steps == 0:
            current = [tensor.float() for tensor in self.held] if self.is_wider else self.held
            update(self.average, current, decay_at(step, self.decay))
        self.step = step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show(average=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._show(average=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show(average=True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.held, self.average, self.raw = [], [], []  # the learner keeps the average; the raw weights are done with

    @torch.no_grad()
    def _show(self, *, average: bool) -> None:
        if self.held and average != self.shows_average:
            self._mask_average()
            if average:
                self.raw = [tensor.clone() for tensor in self.held]
            torch._foreach_copy_(self.held, self.average if average else self.raw)
            if not average:
                self.raw = []
            self.shows_average = average

    @torch.no_grad()
    def _mask_average(self) -> None:
        if self.masks and not self.shows_average:  # what is shown has been masked before
            torch._foreach_mul_([self.average[place] for place in self.masks], list(self.masks.values()))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the average under the plain names, and the raw weights under `ema`."""
        if not self.held:
            return
        self._mask_average()
        state = checkpoint["state_dict"]
        raw = self.raw if self.shows_average else [state[name] for name in self.names]
        checkpoint["state_dict"] = {**state, **dict(zip(self.names, self.average, strict=True))}
        checkpoint["ema"] = {"raw": dict(zip(self.names, raw, strict=True)), "step": self.step}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the raw weights back into a learner that resumes training, and keep the average that Lightning loaded."""
        if trainer.state.fn != TrainerFn.FITTING or "ema" not in checkpoint:
            return
        raw = checkpoint["ema"]["raw"]
        self.restored = {name: checkpoint["state_dict"][name].clone() for name in raw}
        self.step = checkpoint["ema"]["step"]
        pl_module.load_state_dict({**pl_module.state_dict(), **raw})

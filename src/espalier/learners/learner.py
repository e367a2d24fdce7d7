"""What every learner shares: one training step without host synchronisation, metrics once per epoch, the optimizer.

Letters: B batch, K classes.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric, MetricCollection

from espalier.data.loaders import Batch
from espalier.errors import ConfigError
from espalier.learners import own
from espalier.learners.exact_training import ExactTraining
from espalier.learners.position import require_validation
from espalier.optim.build import build_optimizer, build_scheduler
from espalier.seeding import seed_step
from espalier.signature import example
from espalier.spec import DataSpec
from espalier.targets.kind import TargetKind
from espalier.targets.kinds import kind_of

Split = Literal["val", "test"]


class Learner(ExactTraining):
    """A model with its loss, metrics and optimizer.

    Training statistics are sums in one tensor on the device, read once per epoch; `self.log` and torchmetrics would
    cost more than the step of a small network (docs/benchmarks.md).
    """

    takes: ClassVar[type[TargetKind]]

    def __init__(
        self,
        model: nn.Module,
        spec: DataSpec,
        optimizer: partial[torch.optim.Optimizer],
        scheduler: partial[Any],
        seed: int,
        channels_last: bool,
        compile: bool,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        self.kind = kind_of(spec)
        if not isinstance(self.kind, self.takes):
            raise ValueError(
                f"data {spec.name} has {self.kind.word} as targets, not {self.takes.word}; "
                f"use learner={self.kind.learner}"
            )
        super().__init__(len(self.train_statistics))
        self.own_metrics = dict(metrics or {})  # copied for each split
        self.model = model
        self.spec = spec
        self.optimizer_factory = optimizer
        self.scheduler_factory = scheduler
        self.seed = seed
        self.channels_last = channels_last and spec.is_image
        self.compiles = compile
        self.input_dtype: torch.dtype | None = None  # of a network in 16 bits; see precision.py
        self.metrics = nn.ModuleDict({split: self.new_metrics(split) for split in ("val", "test")})
        self.example_input_array = example(spec, 2)
        self.measured: dict[Split, dict[str, Tensor]] = {}  # of the last pass over a split, tables included

    @property
    def monitor(self) -> str:
        """Return the validation metric that decides which checkpoint is best."""
        return self.kind.monitor

    @property
    def mode(self) -> Literal["min", "max"]:
        """Say which value of `monitor` is best."""
        return self.kind.mode

    @property
    def train_statistics(self) -> tuple[str, ...]:
        """Return the names of `sums`, each over the samples of an epoch."""
        return self.kind.statistics

    @abstractmethod
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the loss, mean over the batch, scalar."""

    def sums(self, output: Tensor, y: Tensor, loss: Tensor) -> Tensor:
        """Return a number per name in `train_statistics`, summed over the batch, then the batch size; (S + 1,)."""
        return self.kind.sums(output, y, loss)

    def usual_metrics(self, split: Split) -> dict[str, Metric | MetricCollection]:
        """Return fresh metrics by name, without those that `learner.metrics` adds."""
        return self.kind.metrics(split)

    def new_metrics(self, split: Split) -> MetricCollection:
        """Return fresh metrics, prefixed `split/`, to be updated with (`predict(output)`, y)."""
        metrics = self.usual_metrics(split)
        metrics |= own.require_metrics(self.own_metrics, metrics)
        return MetricCollection(metrics, prefix=f"{split}/", compute_groups=False)

    def predict(self, output: Tensor) -> Tensor:
        """Return what the metrics compare with y: the model's output in the unit of the target."""
        return self.kind.measured(output)

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.channels_last:
            inputs = tuple([x.contiguous(memory_format=torch.channels_last) for x in inputs])
        if self.input_dtype is None:
            return self.model(*inputs)
        return self.model(*(x.to(self.input_dtype) if x.is_floating_point() else x for x in inputs)).float()

    def setup(self, stage: str) -> None:
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compiles:
            self.model.compile()  # in place: torch.compile(model) would rename the state dict

    def configure_model(self) -> None:
        """Shard the model where the strategy asks for it (FSDP2); else nothing."""
        mesh = self.device_mesh
        if mesh is None or hasattr(self.model, "set_requires_gradient_sync"):
            return
        from torch.distributed.fsdp import fully_shard

        for block in self.model.children():
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.optimizer_factory, self.model)
        total_steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(total_steps):
            raise ConfigError("trainer.max_epochs=-1: a schedule needs an end; set trainer.max_steps as well")
        schedule = build_scheduler(self.scheduler_factory, optimizer, int(total_steps), self.monitor, self.mode)
        is_plateau = isinstance(schedule["scheduler"], ReduceLROnPlateau)
        require_validation(self.trainer, int(total_steps), "scheduler=plateau" if is_plateau else None)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_train_epoch_start(self) -> None:
        self._epoch, self._rank = self.current_epoch, self.global_rank

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, (y,), self.guard.index = batch
        seed_step(self.seed, self._epoch, batch_idx, self._rank)
        output = self.forward(*inputs)
        loss = self.objective(inputs, output, y)
        self.last_loss = loss.detach()
        with torch.no_grad():
            self.train_sums.add_(self.sums(output, y, self.last_loss))
        return loss

    def objective(self, inputs: Sequence[Tensor], output: Tensor, y: Tensor) -> Tensor:
        """Return what training minimises, scalar; a distillation puts a teacher beside the loss."""
        return self.training_loss(output, y)

    def training_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return this process's part of the loss: over all processes its mean is `loss` of their batches together."""
        return self.loss(output, y)

    def on_train_epoch_end(self) -> None:
        *sums, samples = self.total_train_sums().unbind()
        if not samples:
            return
        means = {f"train/{name}": value / samples for name, value in zip(self.train_statistics, sums, strict=True)}
        self.log_dict(means, logger=False)  # Lightning would hand them to loggers after the epoch's checkpoint
        values = {name: value.item() for name, value in means.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics({**values, "epoch": self.current_epoch}, step=self.global_step - 1)
        self.train_sums.zero_()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure("test", batch)

    def _measure(self, split: Split, batch: Batch) -> None:
        if len(batch.index):  # the last batch of a rank may be empty
            self._metrics(split).update(self.predict(self.forward(*batch.inputs).float()), batch.y)

    def _metrics(self, split: Split) -> MetricCollection:
        return self.metrics[split]  # type: ignore[return-value]

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")
        plain = {name: value.item() for name, value in self.measured["val"].items() if value.ndim == 0}
        self.validation = {"step": self.global_step, "monitor": self.monitor, "metrics": plain}
        schedule = self.lr_schedulers()
        if isinstance(schedule, ReduceLROnPlateau):
            schedule.step(self.measured["val"][self.monitor])

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _log_metrics(self, split: Split) -> None:
        metrics = self._metrics(split)
        values = metrics.compute()
        metrics.reset()
        self.measured[split] = values
        self.log_dict({name: value for name, value in values.items() if value.ndim == 0})

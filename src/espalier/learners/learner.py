"""What every learner shares: one training step without host synchronisation, metrics once per epoch, the optimizer.

Letters: B batch, K classes.
"""

import math
from abc import abstractmethod
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import clip_grads_with_norm_
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MetricCollection

from espalier.config.overrides import typed
from espalier.data.loaders import Batch
from espalier.errors import ConfigError, StoppedError
from espalier.learners.divergence import Guard, gradient_norm
from espalier.learners.position import ends_here, is_between_steps, require_validation, settle
from espalier.optim.build import build_optimizer, build_scheduler
from espalier.processes import global_batch
from espalier.processes.stop_signal import Interrupt
from espalier.runs.run_folder import RunFolder
from espalier.seeding import seed_step
from espalier.spec import DataSpec
from espalier.strategies.collective import Question

Split = Literal["val", "test"]
NOTHING_SAVED = "nothing is saved, as callbacks has no checkpoint"


class Learner(L.LightningModule):
    """A model with its loss, metrics and optimizer.

    Training statistics are sums in one tensor on the device, read once per epoch; `self.log` and torchmetrics would
    cost more than the step of a small network (docs/benchmarks.md).
    """

    monitor: ClassVar[str]  # the validation metric that decides which checkpoint is best
    mode: ClassVar[Literal["min", "max"]]
    train_statistics: ClassVar[tuple[str, ...]]  # names of the sums, each over the samples of an epoch

    def __init__(
        self,
        model: nn.Module,
        spec: DataSpec,
        optimizer: partial[torch.optim.Optimizer],
        scheduler: partial[Any],
        seed: int,
        channels_last: bool,
        compile: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.optimizer_factory = optimizer
        self.scheduler_factory = scheduler
        self.seed = seed
        self.channels_last = channels_last and spec.is_image
        self.compiles = compile
        self.input_dtype: torch.dtype | None = None  # of a network in 16 bits; see precision.py
        self.metrics = nn.ModuleDict({split: self.new_metrics(split) for split in ("val", "test")})
        self.train_sums = torch.zeros(len(self.train_statistics) + 1)  # no buffer: DDP gives all ranks the first one's
        self.example_input_array = torch.zeros(2, *spec.shape)
        self.last_loss: Tensor | None = None
        self.guard = Guard()
        self.interrupt = Interrupt()
        self.signalled = Question()  # whether any of several processes has been
        self.measured: dict[Split, dict[str, Tensor]] = {}  # of the last pass over a split, tables included
        self.num_val_batches = 0  # of a validation before this process, which need not validate again
        self.validation: dict[str, Any] | None = None  # the last one: step, what decides which is best, and all metrics

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":  # set forty times a step by Lightning; Module would search its parameters for it
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    @abstractmethod
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean over the batch, scalar."""

    @abstractmethod
    def sums(self, output: Tensor, y: Tensor, loss: Tensor) -> Tensor:
        """One number per name in `train_statistics`, summed over the batch, then the batch size; shape (S + 1,)."""

    @abstractmethod
    def new_metrics(self, split: Split) -> MetricCollection:
        """Fresh metrics, prefixed `split/`, to be updated with (output, y)."""

    def predict(self, output: Tensor) -> Tensor:
        """What the metrics compare with y: the model's output in the unit of the target."""
        return output

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last) if self.channels_last else x
        return self.model(x) if self.input_dtype is None else self.model(x.to(self.input_dtype)).float()

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

    def on_train_start(self) -> None:
        self.guard.is_alone, self.guard.lags = self.trainer.world_size == 1, self.device.type != "cpu"
        self.guard.step = self.global_step
        self.train_sums = self.train_sums.to(self.device)
        self.interrupt.listen()
        self._scales = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        self.on_train_epoch_start()  # Lightning skips that hook where a run resumes in mid-epoch
        if self.validation:  # what callbacks look at when an epoch ends that has none of its own
            last = {name: torch.tensor(value) for name, value in self.validation["metrics"].items()}
            self.trainer._logger_connector._callback_metrics.update(last)

    def on_train_epoch_start(self) -> None:
        self._epoch, self._rank = self.current_epoch, self.global_rank

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y, self.guard.index = batch
        seed_step(self.seed, self._epoch, batch_idx, self._rank)
        output = self.forward(x)
        loss = self.objective(x, output, y)
        self.last_loss = loss.detach()
        with torch.no_grad():
            self.train_sums.add_(self.sums(output, y, self.last_loss))
        return loss

    def objective(self, x: Tensor, output: Tensor, y: Tensor) -> Tensor:
        """What training minimises, scalar; a distillation puts a teacher beside the loss."""
        return self.training_loss(output, y)

    def training_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return this process's part of the loss: over all processes its mean is `loss` of their batches together."""
        return self.loss(output, y)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise `DivergedError` if this step, or on an accelerator the one before, is not finite."""
        assert self.last_loss is not None
        loss = self.last_loss.float()
        if self._scales:
            loss = norm = self.trainer.strategy.reduce(loss, reduce_op="mean")
        else:
            norm = self.guard.norm = gradient_norm(optimizer)
        self.guard.look(loss, norm, optimizer.param_groups[0]["lr"])

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by the norm that the guard has looked at, which Lightning would compute once more."""
        if self.guard.norm is None or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            clip_grads_with_norm_(parameters, gradient_clip_val, self.guard.norm)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Raise `StoppedError` if a signal has come to any process, once a resumed run can go on from here.

        Several processes are told at one step of what had come until the step before.
        """
        if self.guard.is_alone and not self.interrupt.number:
            return
        if is_between_steps(self.trainer) and not ends_here(self.trainer) and self._is_asked_to_stop(waits=False):
            self._stop()

    def on_validation_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Raise `StoppedError`, as after a step; the resumed run validates from the first batch on."""
        if self.guard.is_alone and not self.interrupt.number:
            return
        is_last_batch = self.trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch
        if is_between_steps(self.trainer) and self._is_asked_to_stop(waits=is_last_batch):  # no other step may come
            self._stop()

    def on_train_end(self) -> None:
        """Raise `StoppedError` if a signal came when nothing was left to train; the resumed run measures it.

        Nothing is on its way any more when the processes part.
        """
        if (self.interrupt.number or not self.guard.is_alone) and self._is_asked_to_stop(waits=True):
            self._stop()

    def _is_asked_to_stop(self, *, waits: bool) -> bool:
        return self.guard.is_alone or self.signalled.ask(bool(self.interrupt.number), self.device, waits=waits)

    def _stop(self) -> None:
        last = self.save_last()
        saved = f"go on with: espalier train {typed('resume', RunFolder.of(last).path)}" if last else NOTHING_SAVED
        raise StoppedError(f"stopped by {self.interrupt.name} after step {self.trainer.global_step}; {saved}")

    def save_last(self) -> Path | None:
        """Save what a run resumes from; its file in the folder of the first rank, None where no callback keeps any."""
        if self.trainer.checkpoint_callback is None:
            return None
        last: Path = self.trainer.strategy.broadcast(RunFolder(Path(self.trainer.default_root_dir)).last)
        self.trainer.save_checkpoint(last)
        self.trainer.strategy.checkpoint_io.teardown()  # what is written in the background is waited for
        return last

    def on_train_epoch_end(self) -> None:
        *sums, samples = self._total_train_sums().unbind()
        if not samples:
            return
        means = {f"train/{name}": value / samples for name, value in zip(self.train_statistics, sums, strict=True)}
        self.log_dict(means, logger=False)  # Lightning would hand them to loggers after the epoch's checkpoint
        values = {name: value.item() for name, value in means.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics({**values, "epoch": self.current_epoch}, step=self.global_step - 1)
        self.train_sums.zero_()

    def _total_train_sums(self) -> Tensor:
        return self.trainer.strategy.reduce(self.train_sums.clone(), reduce_op="sum")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.guard.settle()
        for logger in self.trainer.loggers:  # their rows reach the disk before what resumes after them
            logger.save()
        settle(checkpoint, self.trainer)
        checkpoint["is_between_steps"] = is_between_steps(self.trainer) or ends_here(self.trainer)
        checkpoint["has_stopped"] = self.trainer.should_stop  # early, or by a limit of time
        checkpoint["validation"] = self.validation
        checkpoint["guard"] = self.guard.state_dict()
        # Of the running epoch, a row for each rank, so that a resumed one reports whole, and adds in the same order.
        gathered: Any = self.all_gather(self.train_sums)
        checkpoint["train_sums"] = gathered.view(-1, len(self.train_sums))
        if batch_size := getattr(self.trainer.datamodule, "batch_size", None):  # type: ignore[attr-defined]
            checkpoint[global_batch.RECORD] = self._split(batch_size)

    def _split(self, batch_size: int) -> dict[str, int]:
        trainer = self.trainer
        every = trainer.val_check_batch
        split = global_batch.Split(
            num_devices=trainer.world_size,
            batch_size=batch_size,
            accumulate=trainer.accumulate_grad_batches,
            num_batches=int(trainer.num_training_batches),
            val_check_batch=int(every) if every and math.isfinite(every) else 0,
            num_val_batches=int(sum(trainer.num_val_batches)) or self.num_val_batches,
        )
        return asdict(split)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.trainer.should_stop = bool(checkpoint.get("has_stopped"))
            self.validation = checkpoint.get("validation")
        if batch_size := getattr(self.trainer.datamodule, "batch_size", None):  # type: ignore[attr-defined]
            before = global_batch.of(checkpoint)
            if before and before.samples == self.trainer.world_size * batch_size:
                self.num_val_batches = before.num_val_batches
            global_batch.translate(checkpoint, self.trainer.world_size, batch_size)
        if "guard" in checkpoint:
            self.guard.load_state_dict(checkpoint["guard"])
        if "train_sums" in checkpoint:
            rows = checkpoint["train_sums"].view(-1, len(self.train_sums))
            if len(rows) != self.trainer.world_size:
                rows = pad(rows.sum(0, keepdim=True), (0, 0, 0, self.trainer.world_size - 1))  # all to the first
            self.train_sums = rows[self.global_rank].clone()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure("test", batch)

    def _measure(self, split: Split, batch: Batch) -> None:
        if len(batch.y):  # the last batch of a rank may be empty
            self._metrics(split).update(self.predict(self.forward(batch.x).float()), batch.y)

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

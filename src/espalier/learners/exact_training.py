"""Make Lightning's loop exact: it stops where a run can resume, saves all that it owes, takes no broken step."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils import clip_grads_with_norm_

from espalier.config.overrides import typed
from espalier.data.loaders import Batch
from espalier.errors import StoppedError
from espalier.learners.divergence import Guard, gradient_norm
from espalier.learners.position import ends_here, is_between_steps, settle
from espalier.processes import global_batch
from espalier.processes.stop_signal import Interrupt
from espalier.runs.run_folder import RunFolder
from espalier.strategies.collective import Question

NOTHING_SAVED = "nothing is saved, as callbacks has no checkpoint"


class ExactTraining(L.LightningModule):
    """The part of a learner that knows about signals, checkpoints and steps that are not finite; no science."""

    def __init__(self, num_statistics: int) -> None:
        super().__init__()
        self.train_sums = torch.zeros(num_statistics + 1)  # no buffer: DDP gives all ranks the first one's
        self.last_loss: Tensor | None = None
        self.guard = Guard()
        self.interrupt = Interrupt()
        self.signalled = Question()  # whether any of several processes has been
        self.num_val_batches = 0  # by the checkpoint that this goes on from; nothing may be left to train
        self.validation: dict[str, Any] | None = None  # the last one: step, what decides which is best, and all metrics

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":  # set forty times a step by Lightning; Module would search its parameters for it
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def on_train_start(self) -> None:
        self.guard.is_alone, self.guard.lags = self.trainer.world_size == 1, self.device.type != "cpu"
        self.guard.step = self.global_step
        self.train_sums = self.train_sums.to(self.device)
        self.interrupt.listen()
        if self.trainer.enable_validation:  # Lightning counts its batches before the first one alone
            self.trainer.fit_loop.epoch_loop.val_loop.setup_data()
        self._scales = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        self.on_train_epoch_start()  # Lightning skips that hook where a run resumes in mid-epoch
        if self.validation:  # what callbacks look at when an epoch ends that has none of its own
            last = {name: torch.tensor(value) for name, value in self.validation["metrics"].items()}
            self.trainer._logger_connector._callback_metrics.update(last)

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

    def total_train_sums(self) -> Tensor:
        """Return the sums of the running epoch over all processes."""
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

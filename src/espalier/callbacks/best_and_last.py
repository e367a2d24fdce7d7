"""Checkpoints: the best by the learner's metric, and the last, which a run resumes from."""

import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from espalier.learners.collective import Question
from espalier.ranges import Count, Positive
from espalier.storage import Mirror


class BestAndLast(ModelCheckpoint):
    """Lightning's, but `save_last` keeps its word, and `last.ckpt` can be written within an epoch.

    Lightning 2.6.6 writes `last.ckpt` only where a better checkpoint was written as well: a run that was killed late
    would go back to its best epoch. Its `every_n_train_steps` excludes `every_n_epochs`, and saves between two batches
    of one optimizer step, where nothing resumes exactly.
    """

    def __init__(
        self,
        dirpath: Path,
        monitor: str,
        mode: Literal["min", "max"],
        filename: str,
        save_top_k: int,
        save_last: bool,
        every_n_epochs: Count,
        every_n_steps: Count | None,
        every_n_minutes: Positive | None,
        asynchronous: bool,
        mirror: str | None,
        auto_insert_metric_name: bool,
        enable_version_counter: bool,
    ) -> None:
        if not save_last and (every_n_steps or every_n_minutes):
            raise ValueError("every_n_steps and every_n_minutes write last.ckpt, so they need save_last=true")
        super().__init__(
            dirpath,
            filename,
            monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            every_n_epochs=every_n_epochs,
            auto_insert_metric_name=auto_insert_metric_name,
            enable_version_counter=enable_version_counter,
        )
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.asynchronous = asynchronous
        self.mirror = Mirror(mirror) if mirror else None
        self._saved_at = time.monotonic()
        self._late = Question()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        checkpoint_io: Any = trainer.strategy.checkpoint_io
        checkpoint_io.is_asynchronous, checkpoint_io.mirror = self.asynchronous, self.mirror

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before loggers look at the files: what is written in the background is on disk."""
        self._late.settle()
        trainer.strategy.checkpoint_io.teardown()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the place of Lightning's. The last batch of an epoch has validation and the epoch's checkpoint next."""
        if self.every_n_steps is None and self.every_n_minutes is None:
            return
        is_between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch
        if is_between_steps and (self._is_at_step(trainer.global_step) or self._is_late(trainer)):
            before = self._last_global_step_saved
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved = before  # or a validation after this step could not save the best

    def _is_at_step(self, step: int) -> bool:
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def _is_late(self, trainer: L.Trainer) -> bool:
        """By the clock of the first rank; several are told in the next step."""
        if self.every_n_minutes is None:
            return False
        is_late = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        if trainer.world_size == 1:
            return is_late
        return self._late.ask(is_late and trainer.is_global_zero, trainer.strategy.root_device, waits=False)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        saved, path = Path(self._last_checkpoint_saved), Path(filepath)
        if self._last_global_step_saved != trainer.global_step or saved.parent != path.parent:
            super()._save_checkpoint(trainer, filepath)
        elif trainer.is_global_zero:  # the last is the best
            checkpoint_io: Any = trainer.strategy.checkpoint_io
            checkpoint_io.save_again(saved, path)
        self._saved_at = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._catch_up(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._catch_up(trainer)

    def _catch_up(self, trainer: L.Trainer) -> None:
        """Save the last checkpoint, unless this step was saved already."""
        is_due = self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if is_due and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

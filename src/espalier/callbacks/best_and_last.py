"""Checkpoints: the best by the learner's metric, and the last, which a run resumes from."""

from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from espalier.ranges import Count


class BestAndLast(ModelCheckpoint):
    """Lightning's, but `save_last` keeps its word.

    Lightning 2.6.6 writes `last.ckpt` only where a better checkpoint was written as well: a run that was killed late
    would go back to its best epoch.
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
        auto_insert_metric_name: bool,
        enable_version_counter: bool,
    ) -> None:
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

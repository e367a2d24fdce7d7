"""Checkpoints: the best by the learner's metric, and the last, which a run resumes from."""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from espalier.config.ranges import Count, Positive
from espalier.learners.position import ends_here, is_between_steps
from espalier.runs import run_folder
from espalier.runs.storage import Mirror
from espalier.strategies.collective import Question

log = logging.getLogger(__name__)


class BestAndLast(ModelCheckpoint):
    """Keeps the best checkpoint and the last one, which a killed run resumes from.

    Lightning's ModelCheckpoint (2.6.6) has four faults that are mended here. It writes `last.ckpt` only when a better
    checkpoint is written as well, so a run that was killed late would go back to its best epoch. Its
    `every_n_train_steps` excludes `every_n_epochs`, and saves between two batches of one optimizer step, where nothing
    resumes exactly. It takes the metric of an earlier validation for that of the present weights. It forgets the best
    if the folder has moved.

    Within an epoch the best and the last are written after a validation, else when the epoch ends, in this order: the
    best, the record of which it is, the last; only then are those deleted that were replaced. A kill in between repeats
    the validation.
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
        self._has_metric = False  # a validation is over, and the end of its epoch comes next
        self._owes_last = False  # after a validation between two batches of one step
        self._judged = -1  # the step that was last compared with the best
        self._twin: str | None = None  # the file that holds what is saved now
        self._position = (-1, -1)  # step and epochs of the last checkpoint
        self._replaced: list[str] = []  # to be removed once the last checkpoint knows of it
        self._late = Question()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        checkpoint_io: Any = trainer.strategy.checkpoint_io
        checkpoint_io.is_asynchronous, checkpoint_io.mirror = self.asynchronous, self.mirror
        if self.save_last:  # always the one name that a run resumes from
            self.last_model_path = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the record agree with the folder: forget files that were deleted, finish what a crash interrupted."""
        super().on_train_start(trainer, pl_module)
        if gone := [path for path in self.best_k_models if not self.file_exists(path, trainer)]:
            self._forget(gone)
        self._clear(trainer)
        self._record(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait until checkpoints that are written in the background are on disk, before loggers look for the files."""
        self._late.settle()
        trainer.strategy.checkpoint_io.teardown()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between two steps if a checkpoint is due, in place of Lightning's method.

        After the last batch of an epoch the hooks for validation and epoch save.
        """
        if self.every_n_steps is None and self.every_n_minutes is None and not self._owes_last:
            return
        if not is_between_steps(trainer) or ends_here(trainer):
            return
        if self._owes_last or self._is_at_step(trainer.global_step) or self._is_late(trainer):
            self._save(trainer, has_metric=False)

    def _is_at_step(self, step: int) -> bool:
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def _is_late(self, trainer: L.Trainer) -> bool:
        """Return whether `every_n_minutes` have passed by the first rank's clock; other ranks learn it a step later."""
        if self.every_n_minutes is None:
            return False
        is_late = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        if trainer.world_size == 1:
            return is_late
        return self._late.ask(is_late and trainer.is_global_zero, trainer.strategy.root_device, waits=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after a validation within an epoch; at the end of an epoch or training, `on_train_epoch_end` saves."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if ends_here(trainer):
            self._has_metric = True
        elif self._is_due(trainer):
            self._owes_last = not is_between_steps(trainer)
            self._save(trainer, has_metric=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_due(trainer):
            self._save(trainer, has_metric=self._has_metric)
        self._has_metric = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step of a training, whether or not a checkpoint is due then."""
        if self._position != _position(trainer):
            self._save(trainer, has_metric=False)

    def _is_due(self, trainer: L.Trainer) -> bool:
        return self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0

    def _save(self, trainer: L.Trainer, *, has_metric: bool) -> None:
        """Save the best, if these weights were validated and are good enough; then the last, unless it has to wait."""
        candidates = self._monitor_candidates(trainer)
        self._twin = None
        if has_metric and self._judged != trainer.global_step:
            self._judged = trainer.global_step
            self._save_topk_checkpoint(trainer, candidates)
        if self._owes_last and not is_between_steps(trainer):
            return
        self._owes_last = False
        if self.save_last:
            self._save_last_checkpoint(trainer, candidates)
            self._position = _position(trainer)
        self._clear(trainer)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if self._twin is None or Path(self._twin).parent != Path(filepath).parent:
            super()._save_checkpoint(trainer, filepath)
            self._twin = filepath
        elif trainer.is_global_zero:  # the last is the best
            checkpoint_io: Any = trainer.strategy.checkpoint_io
            checkpoint_io.save_again(Path(self._twin), Path(filepath))
        self._saved_at = time.monotonic()

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._save_checkpoint(trainer, self.last_model_path)

    def _update_best_and_save(self, current: Tensor, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if len(self.best_k_models) == self.save_top_k:
            self._replaced.append(self.kth_best_model_path)
        super()._update_best_and_save(current, trainer, monitor_candidates)
        self._record(trainer)

    def _get_metric_interpolated_filepath_name(
        self, monitor_candidates: dict[str, Tensor], trainer: L.Trainer, del_filepath: str | None = None
    ) -> str:
        """Return a file name that none of the other best checkpoints has; any other file of this name is replaced."""
        path, version = self.format_checkpoint_name(monitor_candidates), self.STARTING_VERSION
        while path in self.best_k_models:
            path = self.format_checkpoint_name(monitor_candidates, ver=version)
            version += 1
        return path

    def _record(self, trainer: L.Trainer) -> None:
        """Write down beside the checkpoints which of them is the best."""
        if trainer.is_global_zero and self.save_top_k != 0:
            checkpoint_io: Any = trainer.strategy.checkpoint_io
            checkpoint_io.record_best(Path(str(self.dirpath)), self._name(self.best_model_path) or None)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Mark a replaced file for deletion.

        It is deleted once the last checkpoint, which a run resumes from, knows that it was replaced.
        """
        if filepath not in self._replaced:
            self._replaced.append(filepath)

    def _clear(self, trainer: L.Trainer) -> None:
        """Delete the replaced files; checkpoints hold the list of them as well, in case of a crash before."""
        if self._replaced:
            self._record(trainer)
        for path in self._replaced:
            is_kept = path in (*self.best_k_models, self.last_model_path)
            if not is_kept and self._should_remove_checkpoint(trainer, path, ""):
                trainer.strategy.remove_checkpoint(path)
        self._replaced = []

    def _forget(self, gone: Sequence[str]) -> None:
        """Drop from the best those files that are not in the folder any more."""
        kept = {path: score for path, score in self.best_k_models.items() if path not in gone}
        if self.best_model_path in gone and run_folder.best_in(Path(str(self.dirpath))) is None:
            log.warning("%s: not there any more; the best is chosen among those to come", self.best_model_path)
        worst_first = sorted(kept, key=lambda path: float(kept[path]), reverse=self.mode == "min")
        self.best_k_models = kept
        self.kth_best_model_path, self.best_model_path = (worst_first[0], worst_first[-1]) if kept else ("", "")
        self.best_model_score = kept.get(self.best_model_path)

    def state_dict(self) -> dict[str, Any]:
        """Return Lightning's state with file names in place of paths, so that the folder may move."""
        state = super().state_dict()
        paths = {key: self._name(state[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        return {
            **state,
            **paths,
            "dirpath": "",
            "best_k_models": {self._name(path): score for path, score in self.best_k_models.items()},
            "replaced": [self._name(path) for path in self._replaced],
            "judged": self._judged,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; paths are taken as names in the present folder."""

        def path(name: str) -> str:
            own = Path(name).name if Path(name).is_absolute() else name  # older checkpoints have paths
            return str(Path(str(self.dirpath)) / own) if own else ""

        self.best_model_path = path(state_dict["best_model_path"])
        self.kth_best_model_path = path(state_dict["kth_best_model_path"])
        self.best_model_score, self.kth_value = state_dict["best_model_score"], state_dict["kth_value"]
        self.current_score = state_dict["current_score"]
        self.best_k_models = {path(name): score for name, score in state_dict["best_k_models"].items()}
        self._replaced = [path(name) for name in state_dict.get("replaced", [])]
        self._judged = state_dict.get("judged", -1)

    def _name(self, path: str) -> str:
        return os.path.relpath(path, str(self.dirpath)) if path else ""


def _position(trainer: L.Trainer) -> tuple[int, int]:
    epochs: Any = trainer.fit_loop.epoch_progress.total
    return trainer.global_step, epochs.processed

"""Record where a training stood when a checkpoint was written, and resume from exactly there.

Lightning guesses this from counters. It leaves out a validation that was due, begins a finished epoch again if
`max_steps` is set, and never ends an epoch whose last step `max_steps` had reached. Here a checkpoint says what is
done, so that everything else is done, once.
"""

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from espalier.errors import ConfigError


class EpochLoop(_TrainingEpochLoop):
    """Lightning's training loop over an epoch, which first does the validation that a checkpoint owes."""

    @property
    def owes_validation(self) -> bool:
        """Return whether a validation was due, or had begun, in the checkpoint that this restarts from."""
        counts = self.val_loop.batch_progress.total
        return self.val_loop.restarted_mid_evaluation or counts.ready > counts.completed

    @property
    def done(self) -> bool:
        return not (self._restarting and self.owes_validation) and super().done

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        return (self._restarting and self.owes_validation) or super()._should_check_val_fx(data_fetcher)


class FitLoop(_FitLoop):
    """Lightning's loop over epochs, which begins the next epoch after a finished one, and ends each epoch once."""

    def __init__(self, trainer: L.Trainer) -> None:
        before = trainer.fit_loop
        super().__init__(trainer, before.min_epochs, before.max_epochs)
        self.epoch_loop: EpochLoop = EpochLoop(trainer, before.min_steps, before.max_steps)

    @property
    def restarting(self) -> bool:
        return self._restarting

    @restarting.setter
    def restarting(self, restarting: bool) -> None:
        epochs: Any = self.epoch_progress.current
        is_begun = epochs.ready != epochs.processed or epochs.started != epochs.processed
        _Loop.restarting.fset(self, restarting and is_begun)  # type: ignore[attr-defined]

    @property
    def done(self) -> bool:
        return not (self.restarting and self.epoch_loop.owes_validation) and super().done

    def run(self) -> None:
        super().run()
        counts: Any
        for counts in (self.epoch_progress.current, self.epoch_progress.total):
            counts.completed = counts.processed  # also where nothing was left to do

    def reset(self) -> None:
        super().reset()
        self.epoch_loop.val_loop.batch_progress.total.reset_on_restart()  # or the one owed would be counted twice


def ends_here(trainer: L.Trainer) -> bool:
    """Return whether the present batch is the last of its epoch or of the training."""
    loop = trainer.fit_loop
    is_at_limit = 0 <= loop.max_steps <= trainer.global_step
    return trainer.is_last_batch or is_at_limit or (trainer.should_stop and loop._can_stop_early)


def is_between_steps(trainer: L.Trainer) -> bool:
    """Return whether the present batch's optimizer step is done; else its gradients are in no checkpoint."""
    return trainer.is_last_batch or (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0


def settle(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Say in a checkpoint that is about to be written what is done: this batch, and its validation if it is over."""
    state, loop = checkpoint["loops"]["fit_loop"], trainer.fit_loop.epoch_loop
    epochs = state["epoch_progress"]
    if 0 < epochs["current"]["ready"] == epochs["current"]["completed"]:  # after the end of an epoch as at its end
        checkpoint["epoch"] -= 1
        for counts in epochs.values():
            counts["completed"] -= 1
    batches, clocked = state["epoch_loop.batch_progress"], _is_clocked(trainer)
    seen = state["epoch_loop.val_loop.batch_progress"]
    is_counted = 0  # as a step that was logged; Lightning counts it after the validation
    if batches["current"]["processed"] > batches["current"]["completed"]:  # the hooks at its end are running
        for counts in (batches["current"], batches["total"]):
            counts["completed"] = counts["processed"]
        if not clocked and trainer.fit_loop._data_fetcher and loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            _owe(seen, begun=0)
        else:
            is_counted = not loop._should_accumulate()
    elif trainer.validating and not 0 < seen["current"]["completed"] == seen["current"]["ready"]:
        _owe(seen, begun=seen["current"]["completed"])
    elif trainer.validating:
        is_counted = clocked  # after others Lightning leaves out what comes before the next batch, except for the count
    state["epoch_loop.state_dict"]["_batches_that_stepped"] += is_counted


def _owe(seen: dict[str, Any], begun: int) -> None:
    """Mark a validation as started and not done, with which Lightning validates from the first batch on."""
    done = seen["total"]["completed"] - begun
    seen["total"] = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
    seen["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    seen["is_last_batch"] = False


def require_validation(trainer: L.Trainer, num_steps: int, follows: str | None) -> None:
    """Raise `ConfigError` if no validation takes place in so many steps, and something `follows` what it measures."""
    early = any(isinstance(each, EarlyStopping) and each.monitor.startswith("val/") for each in trainer.callbacks)  # type: ignore[attr-defined]
    waiting = follows or ("callbacks.early_stopping" if early else None)
    if waiting is None or _validates(trainer, num_steps):
        return
    why = f"trainer.check_val_every_n_epoch={trainer.check_val_every_n_epoch} and {num_steps} steps in all"
    why = why if trainer.limit_val_batches else "trainer.limit_val_batches=0"
    raise ConfigError(f"{waiting}: follows the validation, and with {why} none takes place; validate, or drop it")


def _validates(trainer: L.Trainer, num_steps: int) -> bool:
    if not trainer.enable_validation:
        return False
    if _is_clocked(trainer):
        return True
    trainer.fit_loop.setup_data()  # where max_steps alone decides Lightning has not counted batches yet
    num_batches, accumulated = int(trainer.fit_loop.max_batches), trainer.accumulate_grad_batches
    num_epochs, rest = divmod(num_steps, math.ceil(num_batches / accumulated))
    needed = trainer.val_check_batch or 1
    if trainer.check_val_every_n_epoch is None:
        return num_epochs * num_batches + rest * accumulated >= needed
    is_cut_short = num_epochs + 1 == trainer.check_val_every_n_epoch and rest * accumulated >= needed
    return num_epochs >= trainer.check_val_every_n_epoch or is_cut_short


def _is_clocked(trainer: Any) -> bool:
    """Return whether validations come by the clock, so that nobody knows which batch has the next one."""
    return trainer._val_check_time_interval is not None


def epochs_begun(checkpoint: Mapping[str, Any]) -> int:
    """Return how many epochs the training had begun when it wrote this; a finished one counts as well."""
    counts = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    return max(int(counts["ready"]), int(counts["processed"]))


def finished(checkpoint: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many epochs the training that wrote this had ended, and how many steps these took.

    One that `max_steps` has cut is among them: what goes on begins the next one.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epochs = loops["epoch_progress"]["current"]
    is_begun = epochs["ready"] != epochs["processed"] or epochs["started"] != epochs["processed"]
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["current"]["completed"]
    return int(epochs["processed"]), int(checkpoint["global_step"]) - int(steps) * is_begun

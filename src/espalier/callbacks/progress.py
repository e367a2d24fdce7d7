"""Progress on the terminal: a line per finished epoch and, on a real terminal, a live bar.

The bar follows the clock, not the step: between two redraws a step costs two Python calls and waits for no device.
"""

from time import monotonic
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from espalier.config.ranges import Positive
from espalier.reporting import terminal
from espalier.reporting.report import duration


class Progress(L.Callback):
    """Prints a line per epoch and shows a live bar, from the first rank alone; a file or a pipe gets only the lines.

    It reads `learner.last_loss`, a scalar on the device, and only when it redraws.
    """

    def __init__(self, refreshes_per_second: Positive) -> None:
        self.interval = 1 / refreshes_per_second
        self.console = terminal.console(soft_wrap=True)
        self.is_shown = True
        self.bar: RichProgress | None = None  # present while a loop runs on a terminal
        self.due = 0.0  # when to redraw
        self.finished_epoch: int | None = None  # its line is printed when its last metrics are in
        self.epoch_started = self.phase_started = 0.0
        self.has_validated = False  # since the last line

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.is_shown = trainer.is_global_zero

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin_epoch(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._print_epoch(trainer)
        self._begin_epoch(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar is not None and monotonic() >= self.due:
            self._redraw(batch_idx + 1, getattr(pl_module, "last_loss", None))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.finished_epoch = trainer.current_epoch

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._print_epoch(trainer)
        self._close()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin_phase("validation", sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.bar is not None and monotonic() >= self.due:
            self._redraw(batch_idx + 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.has_validated = not trainer.sanity_checking
        if trainer.state.fn != TrainerFn.FITTING:
            self._close()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin_phase("test", sum(trainer.num_test_batches))

    on_test_batch_end = on_validation_batch_end

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._print_epoch(trainer)
        self._close()  # or the terminal keeps a hidden cursor

    def _begin_epoch(self, trainer: L.Trainer) -> None:
        self.epoch_started = monotonic()
        self._begin_phase(_epoch_name(trainer, trainer.current_epoch), trainer.num_training_batches)

    def _begin_phase(self, name: str, total: float) -> None:
        if not self.is_shown or not self.console.is_terminal:
            return
        if self.bar is None:
            self.bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                console=self.console,
                auto_refresh=False,
                transient=True,
            )
            self.bar.add_task(name, status="")
        self.phase_started = monotonic()
        [task] = self.bar.task_ids
        self.bar.reset(task, total=total if total < float("inf") else None, description=name, status="")
        self.bar.start()  # nothing where it runs already

    def _redraw(self, done: int, loss: Any = None) -> None:
        assert self.bar is not None
        now = monotonic()
        self.due = now + self.interval
        status = f"{done / max(now - self.phase_started, 1e-9):.3g} batches/s"
        if loss is not None:
            status = f"loss {float(loss):.4g}  {status}"
        [task] = self.bar.task_ids
        self.bar.update(task, completed=done, status=status, refresh=True)

    def _print_epoch(self, trainer: L.Trainer) -> None:
        """Print the line of the finished epoch; late, because Lightning collects its last metrics after all hooks.

        Validation values are left out if the epoch had no validation, because Lightning keeps those of an earlier one.
        """
        if self.finished_epoch is None or not self.is_shown:
            return
        measured = trainer.callback_metrics
        of_validation = ("val/loss", getattr(trainer.lightning_module, "monitor", None))
        shown = ("train/loss", *(of_validation if self.has_validated else ()))
        words = [f"{name} {float(measured[name]):.4g}" for name in shown if name in measured]
        seconds = duration(monotonic() - self.epoch_started)
        self.console.print("  ".join([_epoch_name(trainer, self.finished_epoch), *words, seconds]))
        self.finished_epoch, self.has_validated = None, False

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _epoch_name(trainer: L.Trainer, epoch: int) -> str:
    """Return the name of an epoch, such as `epoch  3/20`; epochs are counted from 1."""
    last = trainer.max_epochs
    if last is None or last < 0:
        return f"epoch {epoch + 1}"
    return f"epoch {epoch + 1}/{last}"

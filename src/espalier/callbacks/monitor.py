"""Learning rate and throughput, without a synchronisation and with few Python calls per step."""

from collections.abc import Iterable
from time import perf_counter
from typing import Any

import lightning as L
import torch


class Monitor(L.Callback):
    """Logs `lr`, `samples_per_second` and `data_wait_share` every `trainer.log_every_n_steps` steps.

    Throughput is that of all devices together, without validation. The wait for data is measured around the loader's
    `next`, which no hook of Lightning's surrounds; the loop's two methods there are wrapped while training runs.
    """

    def __init__(self) -> None:
        self.samples = 0  # trained on so far, on all devices, earlier parts of a resumed run included
        self.seconds = 0.0  # spent on them until `started`
        self.started: float | None = None  # of the present stretch of training; None outside, or in validation
        self.train_seconds = 0.0  # wall clock of the fit, validation and checkpoints included
        self.fit_started: float | None = None
        self.waited = 0.0  # seconds, in this window of `log_every_n_steps`
        self.fetch_started = 0.0
        self.window = (0, 0.0)  # samples and seconds at its start
        self.logged_step = 0

    @property
    def samples_per_second(self) -> float:
        """Return the mean speed of all training so far; 0 before the first step."""
        return self.samples / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.fit_started = self.started = perf_counter()
        self.window, self.waited = (self.samples, self.seconds), 0.0
        self.logged_step = trainer.global_step
        loop = trainer.fit_loop.epoch_loop
        before, after = loop._on_before_fetch, loop._on_after_fetch

        def on_before_fetch() -> None:
            self.fetch_started = perf_counter()
            before()

        def on_after_fetch() -> None:
            after()
            self.waited += perf_counter() - self.fetch_started

        loop.__dict__.update(_on_before_fetch=on_before_fetch, _on_after_fetch=on_after_fetch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += batch.y.shape[0] * trainer.world_size
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0 and step != self.logged_step:  # type: ignore[attr-defined]
            self.logged_step = step
            self._log(trainer, step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.fit_started is not None:
            self.started = perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # kernels may still run
        self._stop(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop(trainer)

    def state_dict(self) -> dict[str, Any]:
        self._advance()
        return {"samples": self.samples, "seconds": self.seconds, "train_seconds": self.train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples = state_dict["samples"]
        self.seconds = state_dict["seconds"]
        self.train_seconds = state_dict["train_seconds"]

    def _log(self, trainer: L.Trainer, step: int) -> None:
        self._advance()
        samples, seconds = self.samples - self.window[0], self.seconds - self.window[1]
        metrics = {
            "lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "samples_per_second": samples / seconds,
            "data_wait_share": min(self.waited / seconds, 1.0),
        }
        self.window, self.waited = (self.samples, self.seconds), 0.0
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _advance(self) -> None:
        """Add the time since the last call to the clocks of training and of the whole fit."""
        now = perf_counter()
        if self.started is not None:
            self.seconds += now - self.started
            self.started = now
        if self.fit_started is not None:
            self.train_seconds += now - self.fit_started
            self.fit_started = now

    def _pause(self) -> None:
        self._advance()
        self.started = None

    def _stop(self, trainer: L.Trainer) -> None:
        self._pause()
        self.fit_started = None
        for name in ("_on_before_fetch", "_on_after_fetch"):
            trainer.fit_loop.epoch_loop.__dict__.pop(name, None)


def speed(callbacks: Iterable[L.Callback]) -> dict[str, float]:
    """Return seconds and throughput of the training so far; empty without the monitor."""
    for callback in callbacks:
        if isinstance(callback, Monitor):
            return {"seconds": callback.train_seconds, "samples_per_second": callback.samples_per_second}
    return {}

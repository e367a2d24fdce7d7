"""A wrapper that keeps a broken logger from stopping a training: it is switched off with one line."""

import logging
from collections.abc import Callable
from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from espalier.errors import EspalierError
from espalier.runs.storage import DISK_IS_FULL

log = logging.getLogger(__name__)


class Guarded(Logger):
    """Passes every call on to a Lightning logger, until one call raises.

    Errors that the user can mend (`ConfigError`: a missing extra; a full disk) and a `KeyboardInterrupt` still end the
    run.
    """

    def __init__(self, factory: Callable[[], Logger]) -> None:
        super().__init__()
        self.inner: Logger | None = None
        self.label = "logger"
        self.is_on = True
        self.inner = self._attempt(factory)
        if self.inner is not None:
            self.label = type(self.inner).__name__

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """Return the action's result, or None if it fails or this logger is off."""
        if not self.is_on:
            return None
        try:
            return action()
        except EspalierError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
                raise
            self.is_on = False
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("%s is switched off, the run goes on: %s", self.label, reason)
            return None

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the inner logger, guarded; return None if it has no such method."""
        return self._attempt(lambda: getattr(self.inner, method, _nothing)(*args, **kwargs))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.call("log_metrics", metrics, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.call("log_hyperparams", params, *args, **kwargs)

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        self.call("log_graph", model, input_array)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        self.call("after_save_checkpoint", checkpoint_callback)

    def save(self) -> None:
        self.call("save")

    def finalize(self, status: str) -> None:
        """End the inner logger; after a failed run ignore a full disk, which was reported already."""
        try:
            self.call("finalize", status)
        except OSError:
            if status != "failed":
                raise

    def close(self) -> None:
        """End the logging of the run; Lightning's `finalize` comes after each fit and each test."""
        self.call("close")

    @property
    def experiment(self) -> Any:
        """Return the inner logger's experiment, or one that ignores every call once this logger is off."""
        experiment = self._attempt(lambda: getattr(self.inner, "experiment", None))
        return _DummyExperiment() if experiment is None else experiment

    @property
    def name(self) -> str | None:
        return self._attempt(lambda: self.inner and self.inner.name)

    @property
    def version(self) -> int | str | None:
        return self._attempt(lambda: self.inner and self.inner.version)

    @property
    def save_dir(self) -> str | None:
        return self._attempt(lambda: self.inner and self.inner.save_dir)

    @property
    def root_dir(self) -> str | None:
        return self._attempt(lambda: self.inner and self.inner.root_dir)

    @property
    def log_dir(self) -> str | None:
        return self._attempt(lambda: self.inner and self.inner.log_dir)


def guarded(factory: Callable[[], Logger]) -> Guarded:
    """Return the logger that `factory` builds, unable to stop a run, even if `factory` fails."""
    return Guarded(factory)


def _nothing(*_: Any, **__: Any) -> None:
    return None

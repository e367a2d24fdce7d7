"""Weights & Biases: one W&B run per run folder, offline unless a key is set, quiet, with the final report."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, WandbLogger

from espalier.errors import ConfigError
from espalier.loggers.fault_tolerant import Guarded
from espalier.spec import Report

INIT_SECONDS = 30.0  # then a server that does not answer is given up
MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")  # as wandb knows them
FIGURES = "figures/*.png"  # in the run folder


class WandbLog(WandbLogger):
    """Logs to Weights & Biases from one run folder.

    Goes online if `WANDB_API_KEY` is set; `WANDB_MODE` (online, offline, disabled) has the last word. An offline run
    can be sent later: `wandb sync RUN/wandb/offline-run-*`. `log_model` stores the best checkpoint as an artifact.
    """

    def __init__(self, folder: Path, run_name: str, project: str, log_model: bool) -> None:
        self.folder = folder
        _finish_other_run(run_id(folder))
        super().__init__(
            name=run_name,
            project=project,
            save_dir=folder,
            id=run_id(folder),
            log_model=log_model,
            mode=mode(),
            settings=_settings(),
        )
        self._wandb_init.pop("anonymous", None)  # gone from wandb 0.31, which warns about it

    @property
    def experiment(self) -> Any:
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self.folder.mkdir(parents=True, exist_ok=True)  # or wandb writes to a temporary folder
        return super().experiment

    @rank_zero_only
    def log_report(self, report: Report) -> None:
        """Log the rows as a table, the figures as images, the last row and all ratios as the summary."""
        import wandb

        rows = [_flat(row) for row in report.rows]
        columns: list[str | int] = list(dict.fromkeys(key for row in rows for key in row))
        data = [[row.get(str(column)) for column in columns] for row in rows]
        summary = {f"report/{key}": value for key, value in (rows[-1] if rows else {}).items()}
        summary |= {f"ratio/{name}": value for name, value in report.ratios.items()}
        self.experiment.summary.update(summary)
        pictures = {f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted(self.folder.glob(FIGURES))}
        self.experiment.log({"report": wandb.Table(columns=columns, data=data), **pictures})

    @rank_zero_only
    def close(self) -> None:
        """End the W&B run; the next trial of this process starts its own."""
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None


def log_report(logger: Logger, report: Report) -> None:
    """Give the report to a logger that can keep one (W&B); others are skipped, and no error stops the run."""
    if isinstance(logger, Guarded):
        logger.call("log_report", report)
    elif isinstance(logger, WandbLog):
        logger.log_report(report)


def mode() -> str:
    """Return `WANDB_MODE`; if it is not set, `online` where there is a key for wandb.

    The mode is passed explicitly because wandb itself reads the variable only once.

    Raises:
        ConfigError: wandb has no such mode.
    """
    said = os.environ.get("WANDB_MODE")
    if said and said not in MODES:
        raise ConfigError(f"WANDB_MODE={said}: no such mode of W&B; it is one of {', '.join(MODES[:3])}, or unset")
    return said or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def run_id(folder: Path) -> str:
    """Return an id that depends on the folder alone, so that a resumed run is the same W&B run."""
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    return f"{re.sub(r'[^0-9A-Za-z_-]', '-', folder.name)}-{digest[:8]}"


def _settings() -> Any:
    """Return settings that print nothing and store no code, git state or command line; `provenance.json` has those."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_meta=True,
        x_save_requirements=False,
        init_timeout=INIT_SECONDS,
    )


def _finish_other_run(own_id: str) -> None:
    """Finish a W&B run that an earlier trial of this process left open; Lightning would write into it."""
    import wandb

    if wandb.run is not None and wandb.run.id != own_id:
        wandb.finish()


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn `{"latency_ms": {"1": {"p50": 2}}}` into `{"latency_ms/1/p50": 2}`; metrics keep their own names."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= _flat(value, "" if key == "metrics" else f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

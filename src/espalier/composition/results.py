"""Write what a run leaves in its folder: configuration and provenance, figures, and the report."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from torch import Tensor

from espalier.config import redaction
from espalier.config.conf_dir import TRAINS
from espalier.loggers.wandb_log import log_report
from espalier.reporting import figures, provenance, report, terminal
from espalier.spec import Report
from espalier.targets.kind import TargetKind

PROVENANCE = "provenance.json"
PROFILE = "profile"  # in the names of a profiler's files


def record(folder: Path, config: Mapping[str, Any], words: Sequence[str], *, is_resumed: bool) -> None:
    """Write down how a run was made: config, overrides, provenance."""
    folder.mkdir(parents=True, exist_ok=True)
    if not is_resumed:
        (folder / "metrics.csv").unlink(missing_ok=True)  # of a run that ended before its first checkpoint
    OmegaConf.save(OmegaConf.create(dict(config)), folder / "config.yaml")
    if not (is_resumed and (folder / "overrides.yaml").exists()):  # the words that made the run, not those that go on
        OmegaConf.save(OmegaConf.create(redaction.scrub_words(words)), folder / "overrides.yaml")
    (folder / PROVENANCE).write_text(json.dumps(provenance.collect(), indent=2) + "\n")


def draw(done: Report, folder: Path, tables: Mapping[str, Tensor], kind: TargetKind | None) -> None:
    """Draw the figures of a report; `tables` are metrics of a test by name, of a target of this kind."""
    (folder / "figures").mkdir(exist_ok=True)
    if (folder / "metrics.csv").exists() and done.task in TRAINS:
        figures.curves(folder / "metrics.csv", folder / "figures" / "curves.png")
    if done.task == "compress":
        figures.trade_off(done.rows, folder / "figures" / "trade_off.png")
    if kind:
        kind.draw(tables, folder / "figures")


def publish(done: Report, folder: Path, loggers: Iterable[Logger], data: str) -> None:
    """Give a report to the loggers, write it to the folder, and show its table to the user."""
    for logger in loggers:
        log_report(logger, done)
    stored = folder / PROVENANCE  # of tasks that train
    origin = json.loads(stored.read_text()) if stored.exists() else provenance.collect()
    made = provenance.paragraph(origin, data, datetime.now().astimezone())
    report.write(done, folder, made)  # last: a folder with a report is a finished run
    console = terminal.console()
    console.print(report.table(done, console.width))
    for profile in sorted(folder.glob(f"*-{PROFILE}.txt")):
        terminal.say(f"profile: {profile}")
    terminal.say(f"report: {folder / report.MARKDOWN_NAME}")

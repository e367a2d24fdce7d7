"""Predictions of a whole split in parquet shards of equal size: find missing ones, fill them, score all.

A shard appears when it is whole, and `manifest.json` says what decides every number in it, so a killed run goes on
and shards of something else are never mixed in.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from espalier.data.loaders import Loader
from espalier.errors import ConfigError
from espalier.evaluation import prediction_files
from espalier.evaluation.predictions import collect
from espalier.reporting import terminal
from espalier.spec import DataSpec
from espalier.targets.kind import TargetKind
from espalier.targets.predictions import Predictions, join

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shards:
    """The files that hold `num_rows` rows, `size` in each but the last."""

    folder: Path
    num_rows: int
    size: int

    @property
    def starts(self) -> range:
        """Return the first row of each shard, which identifies it."""
        return range(0, self.num_rows, self.size)

    def path(self, start: int) -> Path:
        return self.folder / f"part-{start // self.size:05d}.parquet"

    def rows_in(self, start: int) -> int:
        """Return the number of rows of a whole shard."""
        return min(start + self.size, self.num_rows) - start

    def missing(self) -> list[int]:
        """Return the shards that are missing or not whole."""
        return [start for start in self.starts if prediction_files.num_rows(self.path(start)) != self.rows_in(start)]

    def score(self, kind: TargetKind) -> dict[str, float]:
        """Return the metrics of this kind of target over all rows."""
        return prediction_files.score([self.path(start) for start in self.starts], kind)


def require_same(manifest: dict[str, Any], folder: Path) -> None:
    """Raise `ConfigError` if the folder holds predictions that were made of something else."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        stored = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        differing = [key for key, value in manifest.items() if stored.get(key) != value]
    except (OSError, ValueError, AttributeError):
        differing = [MANIFEST]
    if differing:
        raise ConfigError(
            f"hydra.run.dir={folder.parent}: holds predictions of another {', '.join(differing)}; choose another folder"
        )


def answered(
    predict: Callable[[Tensor], Tensor], spec: DataSpec, split: Callable[[], Loader], missing: Sequence[int], size: int
) -> Iterator[tuple[int, Predictions]]:
    """Yield each missing shard with its predictions; neighbouring shards are read together.

    `split` opens the split at its beginning.
    """
    shards: Iterator[Predictions] = iter(())
    expected = -1
    for start in missing:
        if start != expected:
            shards = _consecutive(predict, spec, split(), start, size)
        yield start, next(shards)
        expected = start + size


def _consecutive(
    predict: Callable[[Tensor], Tensor], spec: DataSpec, loader: Loader, start: int, size: int
) -> Iterator[Predictions]:
    """Yield the shards from row `start` to the end of the split; the last may be smaller."""
    loader.load_state_dict({"epoch": 0, "num_batches": start // loader.sampler.batch_size})
    held: list[Predictions] = []
    for batch in loader:
        fresh = collect(predict, spec, [batch])
        held.append(fresh.rows(max(0, start - int(fresh.index[0])), len(fresh)))
        while sum(map(len, held)) >= size:
            joined = join(held)
            yield joined.rows(0, size)
            held = [joined.rows(size, len(joined))]
    if sum(map(len, held)):
        yield join(held)


@contextmanager
def progress(num_rows: int, done: int) -> Iterator[Callable[[int], None]]:
    """Yield a bar on a terminal, nothing elsewhere; the function that it gives is told how many rows are written."""
    console = terminal.console()
    parts = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*parts, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=num_rows, completed=done)
        yield lambda num: bar.advance(task, num)

"""`espalier predict source=EXPORT data=...`: what a bundle answers to every sample of a data set, in parquet shards.

A shard appears when it is whole. Killed and started again in the same folder, the task writes the shards that are
missing; `manifest.json` keeps shards of another bundle, data set or size out.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from espalier.errors import ConfigError
from espalier.export.bundle import FILE, sha256
from espalier.export.deployed import Predict
from espalier.measure import prediction_files
from espalier.measure.predictions import Predictions, collect, columns, join
from espalier.measure.robustness import renormalised
from espalier.ranges import Count
from espalier.run import Run
from espalier.spec import Report
from espalier.tasks.evaluate import Format, Split, format_in, row_of, session_of

FOLDER = "predictions"  # in the run folder
MANIFEST = "manifest.json"
NOT_THE_DATA = ("batch_size", "num_workers", "in_memory", "augment")  # knobs that change no sample of a split


def predict(
    run: Run, split: Split, runtime: Format | None, shard_size: Count, probabilities: bool, threads: Count
) -> Report:
    """Run the bundle on a whole split; write `predictions/part-00000.parquet` and so on, `shard_size` rows in each.

    `runtime` None is the first format of the bundle; `probabilities` adds a column per class.

    Raises:
        ConfigError: no bundle, data that does not fit it, or a folder that holds other predictions.
    """
    if run.bundle is None:
        raise ConfigError("source=null: predict needs an exported bundle; make one: espalier export source=RUN")
    prediction_files.require_writer("task", "parquet")
    chosen = format_in(run.bundle, runtime)
    folder, num_rows = run.folder / FOLDER, len(getattr(run.data.splits, split))
    manifest = describe(run, split, chosen) | {"rows": num_rows, "shard_size": shard_size, "per_class": probabilities}
    require_same(manifest, folder)
    run.record()
    prediction_files.write_json(folder / MANIFEST, manifest)

    ends = {start: min(start + shard_size, num_rows) for start in range(0, num_rows, shard_size)}
    shards = {start: folder / f"part-{place:05d}.parquet" for place, start in enumerate(ends)}
    missing = [start for start, path in shards.items() if prediction_files.num_rows(path) != ends[start] - start]
    session, begun = session_of(run.bundle, chosen, threads), perf_counter()
    with progress(num_rows, done=num_rows - sum(ends[start] - start for start in missing)) as advance:
        for start, found in answered(run, split, session, missing, shard_size):
            prediction_files.write_parquet(shards[start], columns(found, probabilities))
            advance(len(found))
    seconds = perf_counter() - begun

    scores = prediction_files.score(list(shards.values()), is_regression=not run.bundle.spec.num_classes)
    row = row_of(run.bundle, chosen)
    row["metrics"] = {f"{split}/{name}": value for name, value in scores.items()}
    row["rows"] = num_rows
    if missing:
        num_new = sum(ends[start] - start for start in missing)
        row |= {"seconds": seconds, "samples_per_second": num_new / seconds}
    there = len(shards) - len(missing)
    notes = [f"{there} of {len(shards)} shards were there already; time is that of the rest"] if there else []
    return run.publish([row], [*notes, f"{len(shards)} shards in {FOLDER}/"])


def describe(run: Run, split: Split, runtime: str) -> dict[str, Any]:
    """What decides every number in a shard."""
    assert run.bundle is not None
    data = {str(key): str(value) for key, value in run.cfg.data.items() if key not in NOT_THE_DATA}
    return {
        "bundle_sha256": sha256(run.bundle.path / FILE),  # which holds the sha256 of every other file
        "runtime": runtime,
        "data": {"name": run.data.spec.name, **data},
        "split": split,
    }


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
    run: Run, split: Split, session: Predict, missing: Sequence[int], shard_size: int
) -> Iterator[tuple[int, Predictions]]:
    """Each missing shard, by its first row, with its answers; neighbours are read in one go."""
    shards: Iterator[Predictions] = iter(())
    expected = -1
    for start in missing:
        if start != expected:
            shards = consecutive(run, split, session, start, shard_size)
        yield start, next(shards)
        expected = start + shard_size


def consecutive(run: Run, split: Split, session: Predict, start: int, shard_size: int) -> Iterator[Predictions]:
    """Shards from the row `start` on to the end of the split; the last may be smaller."""
    assert run.bundle is not None
    loader = run.data.loader(split, is_whole=True)
    loader.load_state_dict({"epoch": 0, "num_batches": start // run.data.batch_size})
    held: list[Predictions] = []
    for batch in renormalised(loader, run.data.spec, run.bundle.spec):
        fresh = collect(session, run.bundle.spec, [batch])
        held.append(fresh.rows(max(0, start - int(fresh.index[0])), len(fresh)))
        while sum(map(len, held)) >= shard_size:
            joined = join(held)
            yield joined.rows(0, shard_size)
            held = [joined.rows(shard_size, len(joined))]
    if sum(map(len, held)):
        yield join(held)


@contextmanager
def progress(num_rows: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; the function that it gives is told how many rows are written."""
    console = Console()
    parts = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*parts, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=num_rows, completed=done)
        yield lambda num: bar.advance(task, num)

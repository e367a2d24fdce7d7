"""`espalier predict source=EXPORT data=...`: write the predictions of a bundle for a data set, in parquet shards.

Killed and started again in the same folder, it writes the shards that are missing.
"""

from functools import partial
from time import perf_counter
from typing import Any

from espalier.config.ranges import Count
from espalier.data.module import Split
from espalier.errors import ConfigError
from espalier.evaluation import prediction_files
from espalier.evaluation.shards import MANIFEST, Shards, answered, progress, require_same
from espalier.export import formats, runtimes
from espalier.export.bundle import FILE
from espalier.run import Run
from espalier.runs.files import sha256
from espalier.runs.run_folder import NOT_THE_DATA
from espalier.spec import Report
from espalier.targets.kinds import kind_of

FOLDER = "predictions"  # in the run folder


def predict(
    run: Run, split: Split, runtime: formats.Runnable | None, shard_size: Count, probabilities: bool, threads: Count
) -> Report:
    """Run the bundle on a whole split; write `predictions/part-00000.parquet` and so on, `shard_size` rows in each.

    `runtime` None is what `predictors.choose` takes; `probabilities` adds a column per class.

    Raises:
        ConfigError: no bundle, data that does not fit it, or a folder that holds other predictions.
    """
    if run.bundle is None:
        raise ConfigError("source=null: predict needs an exported bundle; make one: espalier export source=RUN")
    prediction_files.require_writer("task", "parquet")
    chosen = runtimes.choose(run.bundle, runtime)
    shards = Shards(run.folder / FOLDER, len(getattr(run.data.splits, split)), shard_size)
    made_of = {"rows": shards.num_rows, "shard_size": shard_size, "per_class": probabilities}
    manifest = describe(run, split, chosen) | made_of
    require_same(manifest, shards.folder)
    run.record()
    prediction_files.write_json(shards.folder / MANIFEST, manifest)

    missing = shards.missing()
    num_new = sum(map(shards.rows_in, missing))
    row, session = runtimes.of_bundle(run.bundle, chosen, threads)
    opened, begun = partial(run.data.loader, split, is_whole=True), perf_counter()
    with progress(shards.num_rows, done=shards.num_rows - num_new) as advance:
        for start, found in answered(session, run.data.spec, opened, missing, shard_size):
            prediction_files.write_parquet(shards.path(start), found.columns(is_full=probabilities))
            advance(len(found))
    seconds = perf_counter() - begun

    scores = shards.score(kind_of(run.data.spec))
    row |= {"metrics": {f"{split}/{name}": value for name, value in scores.items()}, "rows": shards.num_rows}
    if missing:
        row |= {"seconds": seconds, "samples_per_second": num_new / seconds}
    num_shards = len(shards.starts)
    there = num_shards - len(missing)
    notes = [f"{there} of {num_shards} shards were there already; time is that of the rest"] if there else []
    return run.publish([row], [*notes, f"{num_shards} shards in {FOLDER}/"])


def describe(run: Run, split: Split, runtime: str) -> dict[str, Any]:
    """Return everything that decides the numbers in a shard, to tell whether earlier shards may be kept."""
    assert run.bundle is not None
    data = {str(key): str(value) for key, value in run.cfg.data.items() if key not in NOT_THE_DATA}
    return {
        "bundle_sha256": sha256(run.bundle.path / FILE),  # which holds the sha256 of every other file
        "runtime": runtime,
        "data": {"name": run.data.spec.name, **data},
        "split": split,
    }

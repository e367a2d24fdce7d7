"""Predictions and tables as files: CSV, parquet, JSON. A crash leaves no file, or a whole one."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from espalier.errors import ConfigError, require
from espalier.runs import files
from espalier.targets.kind import TargetKind
from espalier.targets.predictions import Predictions


def require_writer(key: str, kind: str | None) -> None:
    """Raise `ConfigError`, which starts with `key`, if a file of this kind cannot be written here."""
    if kind == "parquet":
        try:
            require("pyarrow", "parquet")
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None


def write(found: Predictions, kind: Literal["csv", "parquet"], folder: Path) -> Path:
    """Write one line per sample to `predictions.csv` or `predictions.parquet`; return the path."""
    target, table = folder / f"predictions.{kind}", found.columns(is_full=True)
    if kind == "parquet":
        write_parquet(target, table)
    else:
        files.write_csv(target, table, zip(*(cells.tolist() for cells in table.values()), strict=True))
    return target


def write_parquet(target: Path, table: Mapping[str, NDArray[Any]]) -> None:
    """Write a table in typed columns."""
    import pyarrow as pa
    from pyarrow import parquet

    with files.replaced(target) as draft:
        parquet.write_table(pa.table({name: pa.array(cells) for name, cells in table.items()}), draft)


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Write plain values as indented JSON."""
    with files.replaced(target) as draft:
        draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def num_rows(path: Path) -> int:
    """Return the number of rows of a parquet file; 0 if it is missing or cannot be read."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return int(parquet.read_metadata(path).num_rows)
    except (OSError, pa.ArrowInvalid):
        return 0


def score(paths: Sequence[Path], kind: TargetKind) -> dict[str, float]:
    """Return the metrics of this kind of target over the rows of all parquet files."""
    from pyarrow import parquet

    def parts() -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        for path in paths:
            table = parquet.read_table(path, columns=["true", "predicted"])
            true, predicted = (table[name].to_numpy(zero_copy_only=False) for name in ("true", "predicted"))
            yield true, predicted

    return kind.score(parts())

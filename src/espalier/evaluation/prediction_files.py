"""Predictions and tables as files: CSV, parquet, JSON. A crash leaves no file, or a whole one."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from espalier.errors import ConfigError, require
from espalier.evaluation.predictions import ClassScore, Predictions, columns
from espalier.runs import files

SIGNIFICANT = ".6g"  # digits of a number in a CSV file


def require_writer(key: str, kind: str | None) -> None:
    """Raise `ConfigError`, which starts with `key`, if a file of this kind cannot be written here."""
    if kind == "parquet":
        try:
            require("pyarrow", "parquet")
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None


def write(found: Predictions, kind: Literal["csv", "parquet"], folder: Path) -> Path:
    """One line per sample, in `predictions.csv` or `predictions.parquet`."""
    target, table = folder / f"predictions.{kind}", columns(found, probabilities=True)
    if kind == "parquet":
        write_parquet(target, table)
    else:
        write_csv(target, table, zip(*(cells.tolist() for cells in table.values()), strict=True))
    return target


def write_classes(scores: Sequence[ClassScore], target: Path) -> None:
    """Every class, as CSV."""
    header = ("class", "precision", "recall", "f1", "support")
    rows = ([each.name, each.precision, each.recall, each.f1, each.support] for each in scores)
    write_csv(target, header, rows)


def write_csv(target: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a table of words and numbers."""
    with files.replaced(target) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            writer.writerow([format(cell, SIGNIFICANT) if isinstance(cell, float) else cell for cell in row])


def write_parquet(target: Path, table: Mapping[str, NDArray[Any]]) -> None:
    """Write a table in typed columns."""
    import pyarrow as pa
    from pyarrow import parquet

    with files.replaced(target) as draft:
        parquet.write_table(pa.table({name: pa.array(cells) for name, cells in table.items()}), draft)


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Plain values, readable."""
    with files.replaced(target) as draft:
        draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def num_rows(path: Path) -> int:
    """Rows of a parquet file; 0 where there is none, or none that can be read."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return int(parquet.read_metadata(path).num_rows)
    except (OSError, pa.ArrowInvalid):
        return 0


def score(paths: Sequence[Path], *, is_regression: bool) -> dict[str, float]:
    """Accuracy, or root mean square and mean absolute error, of the rows of parquet files together."""
    from pyarrow import parquet

    num, right, squares, sizes = 0, 0, 0.0, 0.0
    for path in paths:
        table = parquet.read_table(path, columns=["true", "predicted"])
        true, predicted = (table[name].to_numpy(zero_copy_only=False) for name in ("true", "predicted"))
        num += len(true)
        if is_regression:
            error = predicted.astype(np.float64) - true
            squares, sizes = squares + float((error**2).sum()), sizes + float(np.abs(error).sum())
        else:
            right += int((true == predicted).sum())
    return {"rmse": math.sqrt(squares / num), "mae": sizes / num} if is_regression else {"accuracy": right / num}

"""Pictures in tables that `datasets` reads: parquet files, a data set of the hub, a folder with metadata.

Needs the extra `hub`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from espalier.data.pictures import File
from espalier.errors import ConfigError, require
from espalier.runs.storage import DISK_IS_FULL


@dataclass(frozen=True)
class Table:
    """Rows of one split, each a picture and a label."""

    rows: Any  # datasets.Dataset
    split: str
    image_column: str
    label_column: str

    def __len__(self) -> int:
        return len(self.rows)

    def labels(self) -> list[Any]:
        """Return the label column, without touching an image."""
        return list(self.rows.with_format(None).select_columns([self.label_column])[:][self.label_column])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the declared classes, which the labels number; empty if the data set declares none."""
        return tuple(getattr(self.rows.features[self.label_column], "names", None) or ())

    def require_columns(self) -> None:
        """Raise `ConfigError` unless the table has both columns."""
        columns = self.rows.column_names
        for column, key in ((self.label_column, "data.label_column"), (self.image_column, "data.image_column")):
            if column not in columns:
                near = _nearest(column, columns)
                raise ConfigError(f"{key}={column}: no such column{near}; there are {', '.join(columns)}")

    def pictures(self, places: Sequence[int]) -> "Files":
        """Return the image column of these rows; plain bytes are taken as image files."""
        kind = require("datasets", "hub").Image
        alone = self.rows.select_columns([self.image_column])
        try:
            encoded = alone.cast_column(self.image_column, kind(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            found = self.rows.features[self.image_column]
            raise ConfigError(f"data.image_column={self.image_column}: holds no images but {found}") from error
        return Files(encoded, self.split, self.image_column, places)


@dataclass(frozen=True)
class Files:
    """Picture files out of a table, read when they are asked for."""

    rows: Any
    split: str
    column: str
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, indices: Sequence[int]) -> list[File | None]:
        """Return the content of a file, or its path if the table holds no more; None if it holds neither."""
        cells = self.rows[[self.places[index] for index in indices]][self.column] if len(indices) else []
        return [_content(cell) for cell in cells]

    def name(self, index: int) -> str:
        """Return the name of the picture for messages."""
        row = self.places[index]
        path = (self.rows[row][self.column] or {}).get("path")
        return f"{self.split} row {row}" + (f" ({os.path.basename(path)})" if path else "")  # noqa: PTH119

    def marks(self, indices: Sequence[int]) -> list[str]:
        """Return row and name of each file; only the column of names is read, not the contents."""
        compute = require("pyarrow.compute", "hub")
        rows = [self.places[index] for index in indices]
        paths = compute.struct_field(self.rows.data.column(self.column), "path").take(rows).to_pylist()
        return [f"{row} {os.path.basename(path or '')}" for row, path in zip(rows, paths, strict=True)]  # noqa: PTH119


def open_table(path: str, subset: str | None, image_column: str, label_column: str) -> Mapping[str, Table]:
    """Return all official splits of a local folder, a parquet file or a data set of the hub, by their names.

    Raises:
        ConfigError: there is no data set at `path`, here or on the hub, or the cache cannot be written.
    """
    local = Path(path).expanduser()
    if not local.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1 or local.suffix == ".parquet"):
        raise ConfigError(f"data.path={path}: no such file or folder; give a folder, a parquet file or a hub id")
    datasets = require("datasets", "hub")
    _require_cache("HF_DATASETS_CACHE", Path(datasets.config.HF_DATASETS_CACHE))
    try:
        if local.is_file():
            official = datasets.load_dataset("parquet", data_files=str(local))
        else:
            official = datasets.load_dataset(str(local) if local.exists() else path, subset)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
            raise
        reason = str(error).partition("\n")[0]
        where = "holds no data set" if local.exists() else "is neither a folder here nor to be had from the hub"
        raise ConfigError(f"data.path={path}: {where} ({reason}); give a folder, a parquet file or a hub id") from error
    return {str(name): Table(rows, str(name), image_column, label_column) for name, rows in official.items()}


def choose(official: Mapping[str, Any], name: str, key: str) -> Any:
    """Return the split of that name, or raise `ConfigError` that lists the splits there are."""
    if name not in official:
        raise ConfigError(f"{key}={name}: no such split{_nearest(name, official)}; there are {', '.join(official)}")
    return official[name]


def _content(cell: Any) -> File | None:
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        return None
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    path = str(cell["path"])
    if "://" not in path:
        return path
    from datasets.utils.file_utils import xopen  # inside an archive, or on the hub

    with xopen(path, "rb") as file:
        return bytes(file.read())


def _require_cache(name: str, folder: Path) -> None:
    """Raise `ConfigError` unless the cache folder can be written to; `datasets` would blame the data."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            raise
        variable = next((each for each in (name, "HF_HOME", "XDG_CACHE_HOME") if each in os.environ), None)
        said = f"{variable}={os.environ[variable]}" if variable else "HF_HOME is not set"
        raise ConfigError(
            f"{said}: the cache of datasets, {folder}, cannot be written: {error.strerror}; "
            "set HF_HOME to a folder that can"
        ) from error


def _nearest(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""

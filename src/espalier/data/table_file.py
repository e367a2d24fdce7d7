"""Tables that users bring: CSV, TSV and JSON lines, read as text, each column by its name."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from espalier.config.hints import nearest
from espalier.errors import ConfigError

SEPARATORS = ",;\t|"
SUFFIXES = {".csv", ".tsv", ".txt", ".jsonl"}
MISSING = {"", "na", "n/a", "nan", "null", "none"}  # of a cell, in any case
SHOWN = 60  # letters of a line in a message


@dataclass(frozen=True)
class Rows:
    """The cells of a table as text, row by row."""

    path: Path
    names: tuple[str, ...]
    cells: list[list[str]]

    def __len__(self) -> int:
        return len(self.cells)

    def require(self, key: str, name: str) -> None:
        """Raise `ConfigError`, which starts with `key`, if there is no such column."""
        if name not in self.names:
            raise ConfigError(
                f"{key}={name}: {self.path.name} has no such column{nearest(name, self.names)}; it has "
                f"{', '.join(self.names)}"
            )

    def column(self, name: str) -> list[str]:
        """Return the cells of a column."""
        place = self.names.index(name)
        return [row[place] for row in self.cells]

    def without_empty(self, names: Sequence[str]) -> "Rows":
        """Return the rows that have something in each of these columns.

        Raises:
            ConfigError: no row has.
        """
        places = [self.names.index(name) for name in names]
        kept = [row for row in self.cells if all(row[place].strip().lower() not in MISSING for place in places)]
        if not kept:
            raise ConfigError(f"data.path={self.path}: no row has something in {' and in '.join(names)}")
        return Rows(self.path, self.names, kept)

    def numbers(self, name: str) -> list[float] | None:
        """Return the cells of a column as numbers; None if one is none."""
        values = self.column(name)
        return [float(value) for value in values] if all(map(self.is_number, values)) else None

    @staticmethod
    def is_number(value: str) -> bool:
        """Return whether a cell holds a finite number."""
        try:
            return isfinite(float(value)) and "_" not in value
        except ValueError:
            return False


def read(key: str, path: Path) -> Rows:
    """Return the rows of a file; the separator is found in its first line, a byte order mark is left out.

    Raises:
        ConfigError: there is no such file, it is no UTF-8 text, no table, empty, or a line has another number of cells.
    """
    said = f"{key}={path}"
    if not path.is_file():
        raise ConfigError(f"{said}: no such file")
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"{said}: takes {', '.join(sorted(SUFFIXES))}, not {path.suffix or 'a file without an ending'}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{said}: byte {error.start} is no UTF-8; save the file as UTF-8") from None
    if "\x00" in text:
        raise ConfigError(f"{said}: holds bytes of zero, so it is no text; save the file as UTF-8")
    return _json_lines(said, path, text) if path.suffix.lower() == ".jsonl" else _separated(said, path, text)


def _separated(said: str, path: Path, text: str) -> Rows:
    head = text.lstrip().partition("\n")[0]
    separator = "\t" if path.suffix.lower() == ".tsv" else max(SEPARATORS, key=head.count)
    csv.field_size_limit(2**31 - 1)  # a text may be long
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header, *rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)] or [(0, [])]
    except csv.Error as error:
        raise ConfigError(f"{said}: line {reader.line_num} is no row of a table, {error}") from None
    names = tuple(name.strip() for name in header[1])
    _require_names(said, names)
    for line, row in rows:
        if len(row) != len(names):
            raise ConfigError(
                f"{said}: line {line} has {len(row)} cells and the header {len(names)}; put quotes around text that "
                f"holds {separator!r}"
            )
    return _some(said, path, names, [row for _, row in rows])


def _json_lines(said: str, path: Path, text: str) -> Rows:
    rows: list[dict[str, object]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{said}: line {number} is no JSON, {error}") from None
        if not isinstance(row, dict) or any(isinstance(value, dict | list) for value in row.values()):
            raise ConfigError(f"{said}: line {number} is no object of plain values: {line[:SHOWN]}")
        rows.append(row)
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    _require_names(said, names)
    return _some(said, path, names, [[_cell(row.get(name)) for name in names] for row in rows])


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def _require_names(said: str, names: Sequence[str]) -> None:
    if not names:
        raise ConfigError(f"{said}: is empty")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError(f"{said}: two columns are called {twice[0]!r}; give each its own name")


def _some(said: str, path: Path, names: tuple[str, ...], cells: list[list[str]]) -> Rows:
    if not cells:
        raise ConfigError(f"{said}: has names of columns, but no row")
    return Rows(path, names, cells)

"""`metrics.csv`: one row per step that logged anything, in plain text, still right after a crash and a resume.

Lightning's CSVLogger deletes the earlier rows when a run resumes, and writes one row per call.
"""

import csv
import io
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from espalier.runs import files

NAME = "metrics.csv"
Row = dict[str, str]


class CsvLog(Logger):
    """Appends to `<folder>/metrics.csv`; metrics of the same step share a row.

    Rows of an earlier process stay up to the step that this run resumes at, or else up to the first step that it logs.
    Later rows were trained after that checkpoint, and will be logged again.
    """

    def __init__(self, folder: Path, run_name: str, resumed_step: int | None = None) -> None:
        super().__init__()
        self.resumed_step = resumed_step
        self.folder = folder
        self.run_name = run_name
        self.file = folder / NAME
        self.columns = ["step"]
        self.rows: dict[int, Row] = {}  # by step, sorted
        self.is_open = False
        self.num_saved = 0  # rows that are on disk as they stand here; 0: write the whole file

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep the metrics for the row of `step`; the next `save` writes them."""
        at = step if step is not None else next(reversed(self.rows), 0)
        if not self.is_open:
            self._open(at if self.resumed_step is None else self.resumed_step)
        last = next(reversed(self.rows), at)
        is_saved = at in self.rows and len(self.rows) == self.num_saved
        row = self.rows.setdefault(at, {"step": str(at)})
        if at < last:  # Lightning counts validation one step behind its epoch
            self.rows = dict(sorted(self.rows.items()))
        if is_saved or at < last:
            self.num_saved = 0
        for name, value in metrics.items():
            if name not in self.columns:
                self.columns.append(name)
                self.num_saved = 0
            if name != "epoch" or name not in row:  # a test after training counts one epoch more at the same step
                row[name] = _text(value)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run folder holds `config.yaml`."""

    @rank_zero_only
    def save(self) -> None:
        """Bring the file up to date: append rows, or rewrite it if an earlier row or the header has changed.

        A kill at any moment keeps each row that was there: it belongs to a checkpoint.
        """
        if not self.is_open:
            return
        num_saved, self.num_saved = self.num_saved, 0  # a disk that is full takes half a line
        lines = [self._line(row) for row in islice(self.rows.values(), num_saved, None)]
        if num_saved:
            with self.file.open("ab") as file:
                file.writelines(lines)
        else:
            with files.replaced(self.file) as draft:
                draft.write_bytes(self._line({name: name for name in self.columns}) + b"".join(lines))
        self.num_saved = len(self.rows)

    def _open(self, step: int) -> None:
        """Read the rows of an earlier process up to `step`."""
        self.is_open = True
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            return
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a crash may have cut the last one
        reader = csv.DictReader(whole)
        self.columns = list(reader.fieldnames or self.columns)
        for row in reader:
            if int(row["step"]) <= step:
                self.rows[int(row["step"])] = {name: text for name, text in row.items() if text}

    def _line(self, row: Row) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([row.get(name, "") for name in self.columns])
        return text.getvalue().encode()

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return self.run_name

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def log_dir(self) -> str:
        return str(self.folder)


def _text(value: Any) -> str:
    """Write a number with enough digits to read the same number back."""
    return repr(value) if isinstance(value, float) else str(value)

"""Files that appear whole or not at all, and their hashes."""

import csv
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

SIGNIFICANT = ".6g"  # digits of a number in a CSV file


@contextmanager
def replaced(target: Path, *, by_several: bool = False) -> Iterator[Path]:
    """Yield a hidden path beside `target`, which replaces it once the content is on disk; an error changes nothing.

    The name is always the same, so what a kill left is overwritten. With `by_several`, processes that write at once
    have a name each.

    Raises:
        OSError: it cannot be written; `target` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.partial") if by_several else draft_of(target)
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Replace a file by this text, or leave it as it was; characters that UTF-8 cannot encode are escaped."""
    with replaced(target) as draft:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_csv(target: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a table of words and numbers."""
    with replaced(target) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            writer.writerow([format(cell, SIGNIFICANT) if isinstance(cell, float) else cell for cell in row])


def draft_of(target: Path) -> Path:
    """Return the hidden path under which a file is written."""
    return target.with_name(f".{target.name}.partial")


def sync(file: BinaryIO) -> None:
    """Wait until the content of the file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """Return the hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Write a checkpoint to a disk or a bucket whole, and recognise a damaged one.

A file is written under a hidden name in its own folder, synced and renamed, so a crash leaves the old one or the new
one. `SHA256SUMS` beside the files holds the hash of each; `sha256sum -c SHA256SUMS` checks them by hand. While a new
file replaces an old one, the new list lies beside the old list, so at every moment one of them has the file's hash.
"""

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from espalier.errors import ConfigError
from espalier.runs import files
from espalier.runs.files import draft_of, sha256, sync
from espalier.runs.run_folder import BEST, LAST, PREVIOUS

SUMS = "SHA256SUMS"
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Folder:
    """A folder of checkpoints that no process but this one writes."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        names, known = _recorded(path)
        found = {name: sha256(path / name) for name in names if (path / name).exists()}
        self.sums = {name: value for name, value in found.items() if value in known}  # what is whole

    def write(self, content: Any, name: str, keep: str | None = None) -> None:
        """Save with `torch.save`, all or nothing; a whole file that was there is kept under the name `keep`.

        Raises:
            OSError: there is not enough room, or no permission; what was there before is whole.
        """
        target, draft = (
            self.path / name,
            draft_of(self.path / name),
        )
        _require_room(content, target)
        try:
            with draft.open("wb") as file:
                hashed = _Hashed(file)
                torch.save(content, hashed)  # type: ignore[arg-type]  # it asks for no more than write and flush
                sync(file)
            self._move_in(target, hashed.sha256.hexdigest(), keep)
        except RuntimeError as error:  # torch's own, where a write of its archive fails
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        finally:
            draft.unlink(missing_ok=True)

    def link(self, source: str, name: str, keep: str | None = None) -> None:
        """Give a file that was written here another name as well, as if it were written once more.

        Raises:
            OSError: as in `write`.
        """
        draft = draft_of(self.path / name)
        try:
            _link(self.path / source, draft)
            self._move_in(self.path / name, self.sums[source], keep)
        finally:
            draft.unlink(missing_ok=True)

    def record_best(self, name: str | None) -> None:
        """Record which file is the best, all or nothing; None means that there is none any more."""
        record = self.path / BEST
        draft_of(record).unlink(missing_ok=True)  # what a kill left
        if name is None:
            record.unlink(missing_ok=True)
        elif not record.is_file() or record.read_text(encoding="utf-8") != f"{name}\n":
            with draft_of(record).open("wb") as file:
                file.write(f"{name}\n".encode())
                sync(file)
            draft_of(record).replace(record)

    def _move_in(self, target: Path, sha256: str, keep: str | None) -> None:
        """Rename the new file into place; its hash is on disk before, and the new list in place after."""
        if keep and target.name in self.sums and target.exists():
            kept = self.path / keep
            try:
                _link(target, draft_of(kept))
                draft_of(kept).replace(kept)
            finally:
                draft_of(kept).unlink(missing_ok=True)  # it is left where both are one file already
            self.sums[keep] = self.sums[target.name]
        self.sums = {name: value for name, value in self.sums.items() if (self.path / name).exists()}
        self.sums[target.name] = sha256
        lines = "".join(f"{value}  {name}\n" for name, value in sorted(self.sums.items()))
        sums = self.path / SUMS
        try:
            with draft_of(sums).open("wb") as file:
                file.write(lines.encode())
                sync(file)
        except OSError:
            draft_of(sums).unlink(missing_ok=True)
            raise
        draft_of(target).replace(target)
        draft_of(sums).replace(sums)
        if os.name == "posix":  # Windows cannot open a folder
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file of a folder of checkpoints, then its line in the list."""
    path.unlink(missing_ok=True)
    sums = path.with_name(SUMS)
    if sums.is_file():
        listed = sums.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in listed if line.rstrip("\n").partition("  ")[2] != path.name]
        if kept != listed:
            with files.replaced(sums) as draft:
                draft.write_text("".join(kept), encoding="utf-8")


def is_damaged(path: Path) -> bool:
    """Return whether the file differs from its recorded hash; a file without one counts as undamaged."""
    names, known = _recorded(path.parent)
    return path.name in names and sha256(path) not in known


def snapshot(content: Any) -> Any:
    """Return a copy on the CPU, which training cannot change any more."""
    return tree_map_only(Tensor, lambda value: value.detach().to("cpu", copy=True), content)


class Mirror:
    """A remote folder with copies of what is saved, anywhere that fsspec reaches (`s3://`, `gs://`, `file://`, ...)."""

    def __init__(self, address: str) -> None:
        """Raise `ConfigError` if nothing handles such an address, or the package that does is missing."""
        try:
            self.files, self.root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"callbacks.checkpoint.mirror={address}: {error}") from error

    def copy(self, path: Path) -> None:
        """Copy a file and record its hash; a `last.ckpt` that is there already becomes the previous one.

        The list holds the hashes of the files that are there, and while a file is replaced that of the next one too. So
        after an interruption, or if a file never arrived, what is there can be checked.

        Raises:
            Exception: an error of the file system.
        """
        self.files.makedirs(self.root, exist_ok=True)
        there, draft = f"{self.root}/{path.name}", f"{self.root}/{draft_of(path).name}"
        if not path.exists():  # there is no best any more
            self.remove(path.name)
            return
        listed = self._list()
        replaced = {path.name, PREVIOUS} if path.name == LAST else {path.name}
        if path.name == LAST and self.files.exists(there):
            self.files.copy(there, f"{self.root}/{PREVIOUS}")
        new = {(name, value) for name, value in _lines(path.with_name(SUMS).read_text("utf-8")) if name == path.name}
        if path.name == LAST:
            new |= {(PREVIOUS, value) for name, value in listed if name == LAST}
        self.files.put_file(str(path), draft)
        self._write_list(listed | new)
        self.files.mv(draft, there)
        self._write_list({(name, value) for name, value in listed if name not in replaced} | new)

    def remove(self, name: str) -> None:
        """Delete a file that was replaced, and its line in the list; raise as `copy` does."""
        if self.files.exists(f"{self.root}/{name}"):
            self.files.rm(f"{self.root}/{name}")
        listed = self._list()
        kept = {line for line in listed if line[0] != name}
        if kept != listed:
            self._write_list(kept)

    def _list(self) -> set[tuple[str, str]]:
        try:
            return set(_lines(self.files.cat_file(f"{self.root}/{SUMS}").decode()))
        except FileNotFoundError:
            return set()

    def _write_list(self, listed: set[tuple[str, str]]) -> None:
        draft = f"{self.root}/.{SUMS}.partial"
        self.files.pipe_file(draft, "".join(f"{value}  {name}\n" for name, value in sorted(listed)).encode())
        self.files.mv(draft, f"{self.root}/{SUMS}")


def _lines(text: str) -> list[tuple[str, str]]:
    """Return the pairs (name, hash) of a list."""
    return [(line.partition("  ")[2], line.partition("  ")[0]) for line in text.splitlines()]


def _recorded(folder: Path) -> tuple[set[str], set[str]]:
    """Return the names and hashes in the list of the folder, and in the draft of a list that a crash left."""
    files = [file for file in (folder / SUMS, draft_of(folder / SUMS)) if file.is_file()]
    lines = [line for file in files for line in _lines(file.read_text(encoding="utf-8"))]
    return {name for name, _ in lines}, {value for _, value in lines}


class _Hashed:
    """A file that hashes what is written to it, so that it need not be read again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, part: bytes) -> int:
        self.sha256.update(part)
        return self.file.write(part)

    def flush(self) -> None:
        self.file.flush()


def _require_room(content: Any, target: Path) -> None:
    """Raise an error before the first byte is written if the disk has too little room."""
    storages = {leaf.untyped_storage().data_ptr(): leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)}
    needed = sum(leaf.untyped_storage().nbytes() for leaf in storages.values())
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free", str(target))


def _link(path: Path, draft: Path) -> None:
    """Give the file a second name."""
    draft.unlink(missing_ok=True)
    try:
        draft.hardlink_to(path)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, draft)
        with draft.open("rb+") as file:
            sync(file)

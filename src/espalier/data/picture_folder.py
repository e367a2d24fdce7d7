"""A folder of pictures with one subfolder per class: finds its splits and classes, and reports what it leaves out.

Folders decide, names of files never do. A class may have folders of its own, links are followed, and a folder called
`train` is a split only if it holds folders of classes; otherwise it is a class.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from espalier.errors import CONTROL, ConfigError

SUFFIXES = frozenset(
    {
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".ico", ".jp2", ".j2k", ".jpx"),
    }
)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # labels that `datasets` reads beside pictures
SYSTEM = frozenset({"thumbs.db", "desktop.ini", "__macosx", "__pycache__"})  # left by systems, meant by nobody
WORDS = {  # of split folders, in any case
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
NUM_NAMED = 3  # examples of what was left out


@dataclass(frozen=True)
class Part:
    """The pictures of one split: files, and the class that each file's folder stands for."""

    root: str
    paths: list[str]
    class_of: list[str]
    class_names: tuple[str, ...]  # of all splits

    def __len__(self) -> int:
        return len(self.paths)

    def labels(self) -> list[str]:
        """Return the class of each picture."""
        return self.class_of

    def pictures(self, places: Sequence[int]) -> "Files":
        """Return the files at these positions, in this order."""
        return Files(self.root, [self.paths[place] for place in places])


@dataclass(frozen=True)
class Files:
    """Picture files on a disk."""

    root: str
    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Sequence[int]) -> list[str]:
        return [self.paths[index] for index in indices]

    def name(self, index: int) -> str:
        """Return the name of the picture for messages."""
        return shown(os.path.relpath(self.paths[index], self.root))

    def marks(self, indices: Sequence[int]) -> list[str]:
        """Return name and size of each file."""
        paths = self[indices]
        return [f"{os.path.basename(path)} {os.path.getsize(path)}" for path in paths]  # noqa: PTH119, PTH202


@dataclass(frozen=True)
class PictureFolder:
    """The content of a folder: its splits, and the files that are left out, by reason."""

    parts: Mapping[str, Part]
    left_out: Mapping[str, list[str]]

    def remarks(self) -> list[str]:
        """Say what was left out, one remark for each reason."""
        return [f"{len(names)} {reason} ({some(names)})" for reason, names in self.left_out.items()]


def find(root: str) -> PictureFolder | None:
    """Return the content of a folder of pictures; None if it has no picture, or if tables or metadata describe them.

    Raises:
        ConfigError: there are fewer than two classes, or it is unclear which folders are splits.
    """
    if _has_tables(Path(root)):
        return None
    left_out: dict[str, list[str]] = {}
    top = _scan(root, root, (), left_out)
    if top.is_empty:
        return None
    top = _unwrapped(top)
    if not top.folders:
        raise ConfigError(
            f"data.path={shown(root)}: {len(top.files)} pictures but no class folders; put those of each class into a "
            "folder of its own, CLASS/1.png"
        )
    splits = _splits(root, top)
    holders = splits or {"train": top}
    stray = [*(top.files if splits else []), *(path for folder in holders.values() for path in folder.files)]
    if stray:
        left_out["beside the class folders"] = [shown(os.path.relpath(path, root)) for path in stray]
    if splits:
        taken = [folder.path for folder in splits.values()]
        unused = [name for name, folder in top.folders.items() if _unwrapped(folder).path not in taken]
        left_out |= {"in no split": [shown(name) for name in unused]} if unused else {}
    classes = tuple(sorted({name for folder in holders.values() for name in folder.folders}))
    if len(classes) < 2:
        raise ConfigError(
            f"data.path={shown(root)}: one class folder alone, {shown(classes[0])}; a classifier needs two"
        )
    parts = {split: _part(root, folder, classes) for split, folder in holders.items()}
    return PictureFolder(parts, left_out)


def shown(name: str) -> str:
    """Return a path as printable text on one line, without control characters or broken letters."""
    return CONTROL.sub("?", os.fsencode(name).decode("utf-8", "replace")).replace("\n", "?")


def some(names: Sequence[str], most: int = NUM_NAMED) -> str:
    """Return the first names as text, and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


@dataclass
class _Folder:
    """A folder with its pictures and its subfolders; subfolders without a picture are left out."""

    path: str
    files: list[str] = field(default_factory=list)
    folders: "dict[str, _Folder]" = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return not self.files and not self.folders

    def pictures(self) -> Iterator[str]:
        """Yield the paths of all pictures in this folder and below."""
        yield from self.files
        for folder in self.folders.values():
            yield from folder.pictures()


def _has_tables(root: Path) -> bool:
    """Return whether `datasets` should read the folder: it has parquet files, metadata or a card that declares data."""
    if any((folder / name).is_file() for folder in (root, *_subfolders(root)) for name in METADATA):
        return True
    card = root / "README.md"
    if card.is_file() and re.search(r"\A---\n(?:.*\n)*?(?:configs|dataset_info):", card.read_text(errors="replace")):
        return True
    return any(file.suffix == ".parquet" for folder in (root, root / "data") for file in _files(folder))


def _subfolders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _scan(path: str, root: str, above: tuple[tuple[int, int], ...], left_out: dict[str, list[str]]) -> _Folder:
    """Return the folder with everything below; note in `left_out` what is ignored, by reason.

    `above` holds device and inode of the folders above, so that a link to one of them is not followed forever.
    """
    here = Path(path).stat()
    above = (*above, (here.st_dev, here.st_ino))
    found = _Folder(path)
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"data.path={shown(root)}: {shown(path)} cannot be listed: {error.strerror}") from error
    for entry in entries:
        reason = None
        is_picture = Path(entry.name).suffix.lower() in SUFFIXES
        if entry.name.lower() in SYSTEM or (entry.name.startswith(".") and not (is_picture or entry.is_dir())):
            continue
        if entry.name.startswith("."):
            reason = "hidden"
        elif entry.is_dir():
            inner = entry.stat()
            if (inner.st_dev, inner.st_ino) in above:
                reason = "links to a folder above"
            else:
                _require_text(root, entry)
                folder = _scan(entry.path, root, above, left_out)
                if folder.is_empty:
                    reason = "folders without a picture"
                else:
                    found.folders[entry.name] = folder
        elif is_picture and entry.is_file():
            found.files.append(entry.path)
        else:
            reason = "that are no picture by their name" if entry.is_file() else "that are no file"
        if reason:
            left_out.setdefault(reason, []).append(shown(os.path.relpath(entry.path, root)))
    return found


def _require_text(root: str, entry: os.DirEntry[str]) -> None:
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"data.path={shown(root)}: the folder {shown(entry.path)} has a name that is no UTF-8; rename it"
        ) from None


def _unwrapped(folder: _Folder) -> _Folder:
    """Return the folder itself, or its only subfolder if an archive has added one."""
    while not folder.files and len(folder.folders) == 1:
        [(name, inner)] = folder.folders.items()
        if inner.files or not inner.folders or name.casefold() in WORDS:
            break
        folder = inner
    return folder


def _splits(root: str, top: _Folder) -> dict[str, _Folder]:
    """Return the folders that are splits, by the split, and others with the same classes, by their own name.

    The result is empty if there are none.

    Raises:
        ConfigError: folders have the names of splits but hold no classes.
    """
    candidates = {name: _unwrapped(folder) for name, folder in top.folders.items() if folder.folders}
    of_split: dict[str, list[str]] = {}
    for name in candidates:
        if split := _split_of(name):
            of_split.setdefault(split, []).append(name)
    for split, names in of_split.items():
        exact = [name for name in names if name.casefold() in WORDS]
        of_split[split] = exact or names
    if all(name.casefold() in WORDS for name in top.folders) and "train" not in of_split:
        flat = [name for name in top.folders if name not in candidates and WORDS[name.casefold()] == "train"]
        if flat or not candidates:
            raise ConfigError(
                f"data.path={shown(root)}: no class folders in {' and '.join(map(shown, flat or top.folders))}; put "
                "the pictures of each class into a folder of its own, train/CLASS/1.png"
            )
        return {split: candidates[names[0]] for split, names in of_split.items()}
    trains = of_split.get("train", [])
    if not trains:
        return {}
    classes = set(candidates[trains[0]].folders)
    related = [name for name, folder in candidates.items() if name not in trains and classes & set(folder.folders)]
    unrelated = [name for name in top.folders if name not in (*trains, *related) and name.casefold() not in WORDS]
    if unrelated and not related:
        return {}  # a class called train that has folders of its own, beside other classes
    for split, names in of_split.items():
        if len(names) > 1:
            raise ConfigError(
                f"data.path={shown(root)}: {' and '.join(map(shown, names))} could both be the {split} split; "
                "rename all but one"
            )
    splits = {split: candidates[name] for split, [name] in of_split.items()}
    taken = [folder.path for folder in splits.values()]
    return splits | {name: candidates[name] for name in related if candidates[name].path not in taken}


def _split_of(name: str) -> str | None:
    """Return the split that a folder is named after, by its whole name or by a word in it."""
    whole = name.casefold()
    words = [whole, *re.split(r"[-._ 0-9]+", whole)]
    return next((WORDS[word] for word in words if word in WORDS), None)


def _part(root: str, folder: _Folder, classes: tuple[str, ...]) -> Part:
    pairs = sorted((path, name) for name, inner in folder.folders.items() for path in inner.pictures())
    return Part(root, [path for path, _ in pairs], [name for _, name in pairs], classes)

"""A bundle: exported networks in a folder, with everything that is needed to use them in `bundle.json`.

Standard library only, so that a server reads it without torch. Nothing in a bundle is executed: the description is
JSON, every file is named there with its sha256, and no name may leave the folder.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.errors import ConfigError
from espalier.spec import DataSpec

SCHEMA = 1
FILE = "bundle.json"


@dataclass(frozen=True)
class Bundle:
    """An exported network on disk, whole and unchanged since it was written."""

    path: Path  # the folder
    content: Mapping[str, Any]  # of bundle.json

    @property
    def said(self) -> str:
        """The folder, for the line that a user sees."""
        return str(self.path)

    @property
    def name(self) -> str:
        """What the network has been through, such as `prune_channels+qat`."""
        return str(self.content["name"])

    @property
    def spec(self) -> DataSpec:
        """Sizes, class names and the preprocessing: model input is `(raw / scale - mean) / std`."""
        return DataSpec.from_dict(self.content["data"])

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of data, model and learner that the network was trained with."""
        return dict(self.content["config"])

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """How the network was compressed; see `compression/base.py`."""
        return [dict(entry) for entry in self.content["compression"]]

    @property
    def sample_by_sample(self) -> bool:
        """Whether samples must be run one per call, because the runtime gives each call one range of values."""
        return bool(self.content["sample_by_sample"])

    @property
    def formats(self) -> list[str]:
        """The formats that it holds, such as `onnx`."""
        return list(self.content["formats"])

    def file(self, name: str) -> Path:
        """The file that a runtime opens for one of `formats`."""
        return self.path / self.content["formats"][name]["files"][0]


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(draft: Path, target: Path, content: Mapping[str, Any]) -> None:
    """Describe the files of the folder `draft` in its `bundle.json`, then rename it to `target`, which must not exist.

    A crash leaves no `target`, or a whole one.
    """
    names = sorted(path.name for path in draft.iterdir())
    files = {name: {"sha256": sha256(draft / name), "size_bytes": (draft / name).stat().st_size} for name in names}
    text = json.dumps({"schema": SCHEMA, **content, "files": files}, indent=2, ensure_ascii=False, allow_nan=False)
    with (draft / FILE).open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.rename(target)


def read(key: str, folder: Path) -> Bundle:
    """The bundle in a folder, every file compared with its sha256.

    Raises:
        ConfigError: something is missing, changed, or of another version; the message starts with `key`.
    """
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        version, files = content["schema"], content["files"]
        named = [name for each in content["formats"].values() for name in each["files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{key}={folder}: {FILE} is missing or damaged; espalier export writes one") from error
    if version != SCHEMA:
        raise ConfigError(f"{key}={folder}: a bundle of version {version}, not {SCHEMA}; export it again")
    for name in {*named, *files}:
        if Path(name).name != name or name not in files:
            raise ConfigError(f"{key}={folder}: {FILE} names {name!r}, which is no file of the bundle")
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise ConfigError(f"{key}={folder}: {name} is missing; export it again")
        if sha256(path) != files[name]["sha256"]:
            raise ConfigError(f"{key}={folder}: {name} was changed after the export (sha256); export it again")
    return Bundle(folder, content)

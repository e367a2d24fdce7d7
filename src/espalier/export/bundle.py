"""A bundle: exported networks in a folder, with everything that is needed to use them in `bundle.json`.

Standard library only, so that a server reads it without torch. Nothing in a bundle is executed: the description is
JSON, every file is named there with its sha256, and no name may leave the folder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.config import conf_dir
from espalier.errors import ConfigError
from espalier.runs.files import sha256, sync
from espalier.spec import DataSpec

SCHEMA = 1
FILE = "bundle.json"
MAX_BYTES = 50_000_000  # of it


@dataclass(frozen=True)
class Bundle:
    """An exported network on disk, whole and unchanged since it was written."""

    path: Path  # the folder
    content: Mapping[str, Any]  # of bundle.json

    @property
    def said(self) -> str:
        """Return the folder as the user reads it."""
        return str(self.path)

    @property
    def name(self) -> str:
        """Return the methods that made the network, such as `prune_channels+qat`."""
        return str(self.content["name"])

    @property
    def spec(self) -> DataSpec:
        """Return sizes, class names and the preprocessing: model input is `(raw / scale - mean) / std`."""
        return DataSpec.from_dict(self.content["data"])

    @property
    def config(self) -> dict[str, Any]:
        """Return the configuration of data, model and learner that the network was trained with."""
        return conf_dir.completed(self.content["config"])

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return the steps by which the network was compressed; see `compression/base.py`."""
        return [dict(entry) for entry in self.content["compression"]]

    @property
    def sample_by_sample(self) -> bool:
        """Return whether samples must be run one per call, because the runtime gives each call one range of values."""
        return bool(self.content["sample_by_sample"])

    @property
    def formats(self) -> list[str]:
        """Return the names of the formats in the bundle, such as `onnx`."""
        return list(self.content["formats"])

    def file(self, name: str) -> Path:
        """Return the file that a runtime opens for one of `formats`."""
        return self.path / self.content["formats"][name]["files"][0]


def write(draft: Path, target: Path, content: Mapping[str, Any]) -> None:
    """Describe the files of the folder `draft` in its `bundle.json`, then rename it to `target`, which must not exist.

    A crash leaves no `target`, or a whole one.
    """
    names = sorted(path.name for path in draft.iterdir())
    files = {name: {"sha256": sha256(draft / name), "size_bytes": (draft / name).stat().st_size} for name in names}
    text = json.dumps({"schema": SCHEMA, **content, "files": files}, indent=2, ensure_ascii=False, allow_nan=False)
    with (draft / FILE).open("wb") as file:
        file.write(f"{text}\n".encode())
        sync(file)
    draft.rename(target)


def read(key: str, folder: Path) -> Bundle:
    """Return the bundle in a folder, after every file was compared with its sha256.

    No other file may lie there: a network can name files beside it, whose change nobody would notice.

    Raises:
        ConfigError: a file is missing, changed, unexpected, or of another version; the message starts with `key`.
    """
    try:
        content = _parsed(folder / FILE)
        version, files = content["schema"], content["files"]
        lists = [each["files"] for each in content["formats"].values()]
        named = [name for each in lists for name in each]
        digests = {name: each["sha256"] for name, each in files.items()}
        kinds = (dict, content["data"]), (bool, content["sample_by_sample"]), *((list, each) for each in lists)
        if not all(lists) or not all(isinstance(value, kind) for kind, value in kinds):
            raise ValueError
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
        if sha256(path) != digests[name]:
            raise ConfigError(f"{key}={folder}: {name} was changed after the export (sha256); export it again")
    for name in sorted({path.name for path in folder.iterdir()} - {FILE, *files}):
        raise ConfigError(f"{key}={folder}: {name!r} is no file of the bundle; a network might read it; move it away")
    return Bundle(folder, content)


def _parsed(path: Path) -> dict[str, Any]:
    """Return the content of a `bundle.json`.

    Raises:
        ValueError: it is a link, no file, too long, or not of the form that `write` writes.
    """
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise ValueError
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    if not isinstance(content, dict):
        raise ValueError
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")

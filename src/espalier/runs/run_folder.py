"""Runs on disk: what lies in a run folder, and which folder or checkpoint `RUN` means.

Standard library and omegaconf only, so a misspelt RUN is answered before torch is imported.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from espalier.config.home import at_home
from espalier.errors import ConfigError

LOGS = Path("logs")
CHECKPOINTS = "checkpoints"  # the folder of them in that of a run
CHANGES = re.compile(r"\$\{(?!oc\.env:)")  # from start to start, or with other words than those of the folder
LAST = "last.ckpt"  # what a run resumes from
PREVIOUS = "previous.ckpt"  # the one before it, should it be damaged
BEST = "BEST"  # the file that names the best checkpoint beside it; in a list of names: that checkpoint
MAX_NAME = 200  # bytes of it that are read
UNRECORDED = "best.ckpt"  # what it is called where nothing names it
RESUMED = (LAST, PREVIOUS)
COMPRESSED = "compressed.ckpt"  # the best one after the methods that work on a trained network
EVALUATED = (COMPRESSED, BEST, *RESUMED)  # what `source=FOLDER` means, in this order
BUNDLE = Path("export", "bundle.json")  # in the folder of a run that exported
TAKES_SEVERAL = ("benchmark", "report")  # tasks whose source may be RUN,RUN,...
TAKES_BUNDLE = ("predict", "serve")  # tasks that need an exported bundle
NOT_THE_DATA = ("batch_size", "num_workers", "in_memory", "augment")  # knobs of data that change no sample of a split
READS_BUNDLE = ("benchmark", "evaluate")  # tasks that take one as well as a checkpoint


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; the names of what lies in it stand here alone."""

    path: Path

    @classmethod
    def of(cls, path: Path) -> "RunFolder":
        """Return the folder that a file of a run or an exported bundle belongs to; another folder is itself."""
        if path.is_dir():
            is_bundle = path.name == BUNDLE.parent.name and (path / BUNDLE.name).is_file()
            return cls(path.parent if is_bundle else path)
        return cls(path.parent.parent if path.parent.name == CHECKPOINTS else path.parent)

    @property
    def report(self) -> Path:
        """What it measured; written last."""
        return self.path / "report.json"

    @property
    def config(self) -> Path:
        """The configuration that it was made of."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def last(self) -> Path:
        """What it resumes from."""
        return self.checkpoints / LAST

    @property
    def compressed(self) -> Path:
        """Its best checkpoint after the methods that work on a trained network."""
        return self.checkpoints / COMPRESSED

    @property
    def can_go_on(self) -> bool:
        """Whether it holds a checkpoint to resume from."""
        return any((self.checkpoints / name).is_file() for name in RESUMED)


def split(source: str) -> list[str]:
    """Return the RUNs of `A,B,C`; a path that exists is one, commas and all."""
    pieces, found = source.split(","), []
    while pieces:
        ends = [end for end in range(len(pieces), 1, -1) if Path(at_home(",".join(pieces[:end]))).exists()]
        end = ends[0] if ends else 1
        found.append(",".join(pieces[:end]))
        pieces = pieces[end:]
    return found


def find(key: str, run: str, holds: str | Path = CHECKPOINTS) -> Path:
    """Return the run folder or checkpoint that `run` names; `latest` is the newest finished run in which `holds` lies.

    `best` is the finished training below `logs/` with the best validation metric.

    Raises:
        ConfigError: there is none; the message starts with `key`.
    """
    if run == "latest":
        finished = [report.parent for report in LOGS.rglob("report.json") if (report.parent / holds).exists()]
        if not finished:
            verb = "export source=RUN" if holds == BUNDLE else "train"
            raise ConfigError(f"{key}=latest: no finished run below {LOGS.resolve()}; start one with: espalier {verb}")
        return max(finished, key=lambda folder: (folder / "report.json").stat().st_mtime)
    if run == "best":
        return _best(key, holds)
    if "://" in run:
        raise ConfigError(f"{key}={run}: an address; only source=ADDRESS, of a checkpoint file, is fetched")
    path = Path(at_home(run))
    if not path.exists():
        raise ConfigError(f"{key}={run}: no such run folder or checkpoint file")
    if key == "resume" and path.is_file() and path.resolve().parent.name != CHECKPOINTS:
        raise ConfigError(
            f"{key}={run}: lies in no run folder, where alone a run goes on; start a new one from it with source="
        )
    return path


def from_here(folder: Path) -> Path:
    """Return the folder as a line names it: from the current one on, where it lies below."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _best(key: str, holds: str | Path) -> Path:
    from espalier.runs import listing  # which reads the folders that are named here

    if key == "resume":
        raise ConfigError(f"{key}=best: a finished training starts another by source=best; to go on, name the RUN")
    if holds == BUNDLE:
        raise ConfigError(f"{key}=best: a training, no bundle; say espalier export source=best, then {key}=latest")
    return listing.best(key, LOGS)


def begun(words: Sequence[str]) -> Path | None:
    """Return what `resume=auto` stands for: the folder of `hydra.run.dir` if it can go on, None if all begins there.

    Raises:
        ConfigError: the words name no such folder, or make it of other things than the environment.
    """
    from omegaconf import OmegaConf  # here, as listing runs takes neither it nor Hydra
    from omegaconf.errors import OmegaConfBaseException

    from espalier.config.overrides import unquoted

    folders = [word.partition("=")[2] for word in words if word.startswith("hydra.run.dir=")]
    if not folders:
        raise ConfigError("resume=auto: needs a folder that is the same each time; add hydra.run.dir=FOLDER")
    said = unquoted(folders[-1])
    if CHANGES.search(said):
        raise ConfigError(f"resume=auto: needs a folder that is the same each time, not hydra.run.dir={said}")
    try:
        folder = Path(at_home(OmegaConf.create({"folder": said}).folder))
    except OmegaConfBaseException as error:
        raise ConfigError(f"hydra.run.dir={said}: {str(error).splitlines()[0]}") from error
    return folder if RunFolder(folder).can_go_on else None


def bundle_in(path: Path) -> Path | None:
    """Return the folder of the bundle that a path stands for: itself, or that of a run that exported; else None."""
    return next((file.parent for file in (path / BUNDLE.name, path / BUNDLE) if file.is_file()), None)


def best_in(checkpoints: Path) -> Path | None:
    """Return the best checkpoint of a folder, as recorded when it was saved; None where none is known."""
    record = checkpoints / BEST
    named = Path(record.read_bytes()[:MAX_NAME].decode(errors="replace").strip() if record.is_file() else UNRECORDED)
    inside = named.name if named.is_absolute() or ".." in named.parts else named
    return next((path for path in (checkpoints / inside, checkpoints / UNRECORDED) if path.is_file()), None)


def checkpoint_in(key: str, path: Path, names: Sequence[str]) -> Path:
    """Return the first of `names` among the checkpoints of a run folder; a file stands for itself.

    Raises:
        ConfigError: the folder holds none of them.
    """
    if path.is_file():
        return path
    checkpoints = RunFolder(path).checkpoints
    for name in names:
        found = best_in(checkpoints) if name == BEST else checkpoints / name
        if found is not None and found.exists():
            return found
    known = " or ".join(f"{CHECKPOINTS}/{UNRECORDED if name == BEST else name}" for name in names)
    raise ConfigError(f"{key}={path}: holds no checkpoint ({known})")

"""Find the folder, checkpoint or bundle that a RUN on the command line names.

Standard library alone, so a misspelt one is answered at once.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from espalier.config.home import at_home
from espalier.errors import ConfigError
from espalier.runs import listing
from espalier.runs.run_folder import BEST, BUNDLE, CHECKPOINTS, LOGS, UNRECORDED, RunFolder, best_in

CHANGES = re.compile(r"\$\{(?!oc\.env:)")  # from start to start, or with other words than those of the folder


def split(source: str) -> list[str]:
    """Return the RUNs of `A,B,C`; a path that exists is one RUN, even with commas in it."""
    pieces, found = source.split(","), []
    while pieces:
        ends = [end for end in range(len(pieces), 1, -1) if Path(at_home(",".join(pieces[:end]))).exists()]
        end = ends[0] if ends else 1
        found.append(",".join(pieces[:end]))
        pieces = pieces[end:]
    return found


def find(key: str, run: str, holds: str | Path = CHECKPOINTS) -> Path:
    """Return the run folder or checkpoint that `run` names; `latest` is the newest finished run with a file `holds`.

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


def _best(key: str, holds: str | Path) -> Path:
    if key == "resume":
        raise ConfigError(f"{key}=best: a finished training starts another by source=best; to go on, name the RUN")
    if holds == BUNDLE:
        raise ConfigError(f"{key}=best: a training, no bundle; say espalier export source=best, then {key}=latest")
    return listing.best(key, LOGS)


def begun(said: str) -> Path | None:
    """Return the folder to resume for `resume=auto`, or None if the run is new.

    That is the folder that `said`, the value of `hydra.run.dir`, names, if it can be resumed.

    Raises:
        ConfigError: it names no folder, or builds its name from more than the environment.
    """
    from omegaconf import OmegaConf  # here, as listing runs takes neither it nor Hydra
    from omegaconf.errors import OmegaConfBaseException

    if not said:
        raise ConfigError("resume=auto: needs a folder that is the same each time; add hydra.run.dir=FOLDER")
    if CHANGES.search(said):
        raise ConfigError(f"resume=auto: needs a folder that is the same each time, not hydra.run.dir={said}")
    try:
        folder = Path(at_home(OmegaConf.create({"folder": said}).folder))
    except OmegaConfBaseException as error:
        raise ConfigError(f"hydra.run.dir={said}: {str(error).splitlines()[0]}") from error
    return folder if RunFolder(folder).can_go_on else None


def bundle_in(path: Path) -> Path | None:
    """Return the folder of the bundle at a path: the path itself, or that in a run that exported; else None."""
    return next((file.parent for file in (path / BUNDLE.name, path / BUNDLE) if file.is_file()), None)


def checkpoint_in(key: str, path: Path, names: Sequence[str]) -> Path:
    """Return the first of `names` among the checkpoints of a run folder; the path of a file is returned as it is.

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

"""Runs on disk: which folder or checkpoint `RUN` means, and what a run inherits from the one it starts from.

Standard library and omegaconf only, so a misspelt RUN is answered before torch is imported.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from espalier import secret
from espalier.config import RunConfig
from espalier.errors import ConfigError
from espalier.overrides import FORCED, at_home, parse, unquoted

LOGS = Path("logs")
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
READS_BUNDLE = ("benchmark", "evaluate")  # tasks that take one as well as a checkpoint
BATCHES = ("accumulate_grad_batches", "limit_train_batches", "limit_val_batches", "val_check_interval")  # may follow
WITHOUT_EFFECT = ("profiler", "detect_anomaly", "log_every_n_steps")  # knobs of the trainer that change no weight
BUNDLED = ("experiment", "debug")  # groups that change others
DEVICES = ("accelerator", "devices", "num_nodes", "strategy", "sync_batchnorm")  # of the trainer: what strategy= sets
NETWORK = ("data", "model", "learner")  # what decides which weights fit
METHODS = ("optimizer", "scheduler", "compression", "callbacks", "logger")  # what else a resumed run keeps as it was


def split(source: str) -> list[str]:
    """The RUNs of `A,B,C`; a path that exists is one, commas and all."""
    pieces, found = source.split(","), []
    while pieces:
        ends = [end for end in range(len(pieces), 1, -1) if Path(at_home(",".join(pieces[:end]))).exists()]
        end = ends[0] if ends else 1
        found.append(",".join(pieces[:end]))
        pieces = pieces[end:]
    return found


def find(key: str, run: str, holds: str | Path = "checkpoints") -> Path:
    """The run folder or checkpoint file that `run` names; `latest` is the newest finished run in which `holds` lies.

    Raises:
        ConfigError: there is none; the message starts with `key`.
    """
    if run == "latest":
        finished = [report.parent for report in LOGS.rglob("report.json") if (report.parent / holds).exists()]
        if not finished:
            verb = "export source=RUN" if holds == BUNDLE else "train"
            raise ConfigError(f"{key}=latest: no finished run below {LOGS.resolve()}; start one with: espalier {verb}")
        return max(finished, key=lambda folder: (folder / "report.json").stat().st_mtime)
    if "://" in run:
        raise ConfigError(f"{key}={run}: an address; only source=ADDRESS, of a checkpoint file, is fetched")
    path = Path(at_home(run))
    if not path.exists():
        raise ConfigError(f"{key}={run}: no such run folder or checkpoint file")
    if key == "resume" and path.is_file() and path.resolve().parent.name != "checkpoints":
        raise ConfigError(
            f"{key}={run}: lies in no run folder, where alone a run goes on; start a new one from it with source="
        )
    return path


def from_here(folder: Path) -> Path:
    """Return the folder as a line names it: from the current one on, where it lies below."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def begun(words: Sequence[str]) -> Path | None:
    """What `resume=auto` stands for: the folder of `hydra.run.dir` if it can be resumed, None if all begins there.

    Raises:
        ConfigError: the words name no such folder, or make it of other things than the environment.
    """
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
    return folder if any((folder / "checkpoints" / name).is_file() for name in RESUMED) else None


def bundle_in(path: Path) -> Path | None:
    """The folder of the bundle that a path stands for: itself, or that of a run that exported; None if neither."""
    return next((file.parent for file in (path / BUNDLE.name, path / BUNDLE) if file.is_file()), None)


def best_in(checkpoints: Path) -> Path | None:
    """The best checkpoint of a folder, as recorded when it was saved; None where none is known."""
    record = checkpoints / BEST
    named = Path(record.read_bytes()[:MAX_NAME].decode(errors="replace").strip() if record.is_file() else UNRECORDED)
    inside = named.name if named.is_absolute() or ".." in named.parts else named
    return next((path for path in (checkpoints / inside, checkpoints / UNRECORDED) if path.is_file()), None)


def checkpoint_in(key: str, path: Path, names: Sequence[str]) -> Path:
    """The first of `names` among the checkpoints of a run folder; a file stands for itself.

    Raises:
        ConfigError: the folder holds none of them.
    """
    if path.is_file():
        return path
    checkpoints = path / "checkpoints"
    for name in names:
        found = best_in(checkpoints) if name == BEST else checkpoints / name
        if found is not None and found.exists():
            return found
    known = " or ".join(f"checkpoints/{UNRECORDED if name == BEST else name}" for name in names)
    raise ConfigError(f"{key}={path}: holds no checkpoint ({known})")


def from_source(
    cfg: DictConfig, stored: Mapping[str, Any], words: Sequence[str], *, may_change: Sequence[str]
) -> DictConfig:
    """`cfg` with data, model and learner of the source; knobs of the data stay open.

    Groups in `may_change` (warm start, transfer learning) may be others if the command line, or an experiment, says so.

    Raises:
        ConfigError: the command line changes one of them although the source decides it.
    """
    overrides = parse(words)
    chosen = {_group(word) for word in overrides if "." not in word.key_or_group}
    fixed = [
        f"{_said(word)}: {_group(word)} comes from source and cannot change; drop it, or train a new run"
        for word in overrides
        if _group(word) in NETWORK
        and not _is_hidden(stored, word)
        and not (word.key_or_group.startswith(("data.", "data/")) or _group(word) in may_change)
    ]
    if fixed:
        raise ConfigError(*fixed)
    result = cfg.copy()
    with open_dict(result):
        for group in NETWORK:
            if not (group in may_change and {group, "experiment"} & chosen):
                result[group] = stored[group]
                for word in overrides:
                    if word.key_or_group.startswith(f"{group}."):
                        _apply(result, word)
        if "data/augment" in {word.key_or_group for word in overrides}:
            result.data.augment = cfg.data.augment
    return result


def from_resumed(cfg: DictConfig, stored: Mapping[str, Any], words: Sequence[str]) -> DictConfig:
    """The stored config of a run that goes on; of the command line only the trainer and stored secrets may differ.

    Raises:
        ConfigError: another word asks for something that the run was not configured with.
    """
    try:
        result: DictConfig = OmegaConf.merge(OmegaConf.structured(RunConfig), dict(stored))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"resume={cfg.resume}: its configuration is wrong: {str(error).splitlines()[0]}") from error
    problems = []
    overrides = parse(words)
    for word in sorted(overrides, key=lambda word: _group(word) != "strategy"):
        group = _group(word)
        if group == "strategy":
            result.trainer.update({name: cfg.trainer[name] for name in DEVICES})
        elif word.key_or_group.startswith("trainer.") or _is_hidden(stored, word):
            _apply(result, word)
        elif group in stored and group not in ("task", "resume", "requeue") and _differs(cfg, stored, word, group):
            problems.append(
                f"{_said(word)}: resume continues the run as it was configured and {group} differs; "
                "drop it, or start a new run with source="
            )
    own = ("seed", *METHODS, "trainer")
    groups = own if stored.get("source") else (*NETWORK, *own)  # a source had the say about the others
    differing = ", ".join(group for group in groups if _plain(cfg[group]) != _plain(result[group]))
    problems += [
        f"{_said(word)}: resume continues the run as it was configured and {differing} would differ; "
        "drop it, or start a new run with source="
        for word in overrides
        if word.key_or_group in BUNDLED and differing
    ]
    if problems:
        raise ConfigError(*problems)
    result.resume, result.requeue = cfg.resume, cfg.requeue
    return result


def _differs(cfg: DictConfig, stored: Mapping[str, Any], word: Override, group: str) -> bool:
    """Whether this word asks for something else than the run has: its whole group, or the one value it sets."""
    if _plain(cfg[group]) == stored[group]:
        return False
    if "." not in word.key_or_group or word.is_delete():
        return True
    changed = OmegaConf.create(dict(stored))
    _apply(changed, word)
    return _plain(changed[group]) != stored[group]


def changes(stored: Mapping[str, Any], cfg: DictConfig, but: Sequence[str] = ()) -> list[str]:
    """What a run that goes on does otherwise than before, such as `trainer.precision 32-true -> bf16-mixed`."""
    before, now = stored["trainer"], _plain(cfg.trainer)
    names = [name for name in {**before, **now} if name not in (*WITHOUT_EFFECT, *but)]
    return [
        f"trainer.{name} {_told(before.get(name))} -> {_told(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _told(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _said(word: Override) -> str:
    return str(word.input_line).removeprefix(FORCED)


def _group(word: Override) -> str:
    return word.key_or_group.partition(".")[0].partition("/")[0]


def _is_hidden(stored: Mapping[str, Any], word: Override) -> bool:
    """Whether this key was stored without its value, because that is a secret."""
    return OmegaConf.select(OmegaConf.create(dict(stored)), word.key_or_group) == secret.HIDDEN


def _plain(node: Any) -> Any:
    """As a run stores it."""
    return secret.scrub_tree(OmegaConf.to_container(node, resolve=True)) if OmegaConf.is_config(node) else node


def _apply(cfg: DictConfig, word: Override) -> None:
    with open_dict(cfg):
        if word.is_delete():
            parent, _, name = word.key_or_group.rpartition(".")
            OmegaConf.select(cfg, parent).pop(name, None)
        else:
            OmegaConf.update(cfg, word.key_or_group, word.value(), force_add=True)

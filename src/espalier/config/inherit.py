"""Take over the configuration of the run that this one starts from or resumes, and refuse words that contradict it."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from espalier.config import redaction
from espalier.config.compose import RunConfig
from espalier.config.overrides import FORCED
from espalier.errors import ConfigError

BATCHES = ("accumulate_grad_batches", "limit_train_batches", "limit_val_batches", "val_check_interval")  # may follow
WITHOUT_EFFECT = ("profiler", "detect_anomaly", "log_every_n_steps")  # settings of the trainer that change no weight
BUNDLED = ("experiment", "debug")  # groups that change others
DEVICES = ("accelerator", "devices", "num_nodes", "strategy", "sync_batchnorm")  # of the trainer: what strategy= sets
NETWORK = ("data", "model", "learner")  # what decides which weights fit
METHODS = ("optimizer", "scheduler", "compression", "callbacks", "logger")  # what else a resumed run keeps as it was


def from_source(
    cfg: DictConfig, stored: Mapping[str, Any], overrides: Sequence[Override], *, may_change: Sequence[str]
) -> DictConfig:
    """Return `cfg` with data, model and learner of the source; settings of the data may still be changed.

    A group in `may_change` (warm start, transfer learning) may differ if the command line or an experiment says so.

    Raises:
        ConfigError: the command line changes a group that the source decides.
    """
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


def from_resumed(cfg: DictConfig, stored: Mapping[str, Any], overrides: Sequence[Override]) -> DictConfig:
    """Return the stored config of a run that resumes; only the trainer and stored secrets may differ from it.

    Raises:
        ConfigError: another word asks for something that the run was not configured with.
    """
    try:
        result: DictConfig = OmegaConf.merge(OmegaConf.structured(RunConfig), dict(stored))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"resume={cfg.resume}: its configuration is wrong: {str(error).splitlines()[0]}") from error
    problems = []
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
    """Return whether this word asks for another value, or another option of a group, than the run has."""
    if _plain(cfg[group]) == stored[group]:
        return False
    if "." not in word.key_or_group or word.is_delete():
        return True
    changed = OmegaConf.create(dict(stored))
    _apply(changed, word)
    return _plain(changed[group]) != stored[group]


def changes(stored: Mapping[str, Any], cfg: DictConfig, but: Sequence[str] = ()) -> list[str]:
    """Return what a resumed run does otherwise than before, such as `trainer.precision 32-true -> bf16-mixed`."""
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
    """Return whether this key was stored without its value, because the value is a secret."""
    return OmegaConf.select(OmegaConf.create(dict(stored)), word.key_or_group) == redaction.HIDDEN


def _plain(node: Any) -> Any:
    """Return a config node in plain types, without secrets, as a run stores it."""
    return redaction.scrub_tree(OmegaConf.to_container(node, resolve=True)) if OmegaConf.is_config(node) else node


def _apply(cfg: DictConfig, word: Override) -> None:
    with open_dict(cfg):
        if word.is_delete():
            parent, _, name = word.key_or_group.rpartition(".")
            OmegaConf.select(cfg, parent).pop(name, None)
        else:
            OmegaConf.update(cfg, word.key_or_group, word.value(), force_add=True)

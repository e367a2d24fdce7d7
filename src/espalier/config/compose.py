"""Turn command-line words into a configuration, or into one clear line per problem.

`compose` turns overrides into a config; `diagnose` explains the overrides that do not compose. Nothing here imports
torch: a misspelt word is answered in under a second.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from espalier.config.conf_dir import CONF, groups
from espalier.config.hints import PLUGINS, advice, keys, missing_plugin, names_in, nearest
from espalier.config.overrides import malformed, parse
from espalier.errors import ConfigError

NOT_COMPOSED = (HydraException, OmegaConfBaseException, ValueError)  # what composing raises


@dataclass
class RunConfig:
    """The top level of a configuration, which has these keys and no others."""

    seed: int = 0
    source: str | None = None
    resume: str | None = None
    requeue: bool = False
    no_result: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    learner: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    compression: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(name="schema", node=RunConfig)
OmegaConf.register_new_resolver("short_id", lambda: secrets.token_hex(3), use_cache=True, replace=True)


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """Return the configuration that these command-line words describe.

    Raises:
        ConfigError: one line per override that does not fit.
    """
    try:
        return _compose(overrides)
    except NOT_COMPOSED as error:
        raise ConfigError(*diagnose(overrides, error)) from error


def _compose(overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="espalier"):
        return hydra_compose("config", list(overrides))


def diagnose(overrides: Sequence[str], error: Exception) -> list[str]:
    """Return one line for each override that does not compose with the valid ones before it."""
    good: list[str] = []
    problems: list[str] = []
    for text in sorted(overrides, key=lambda text: "." in text.partition("=")[0]):  # groups decide which keys exist
        group, _, option = text.partition("=")
        if option in groups().get(group, []):
            good.append(text)
            continue
        try:
            _compose([*good, text])
            good.append(text)
        except NOT_COMPOSED as why:
            problems.append(_explain(text, good, why))
    return problems or [str(error).splitlines()[0]]


def _explain(text: str, good: Sequence[str], why: Exception) -> str:
    if isinstance(why, OverrideParseException):
        return malformed(text)
    [override] = parse([text])
    key = str(override.key_or_group)
    if isinstance(why, MissingConfigException) and key in PLUGINS:
        return f"{text}: {missing_plugin(key, str(override.value()))}"
    if isinstance(why, MissingConfigException) and key in groups():
        options = groups()[key]
        missing = (why.missing_cfg_file or "").removeprefix(f"{key}/")
        hint = nearest(missing, options)
        return f"{key}={missing or override.value()}: no such option{hint}; {key} can be {', '.join(options)}"
    if override.is_sweep_override():
        listed = f"; say {key}=[{text.partition('=')[2]}] for a list" if "," in text and "(" not in text else ""
        return f"{text}: several values are several runs, which -m starts{listed}"
    if key in groups() and override.value() is None:
        return f"{text}: null is no option; {key} can be {', '.join(groups()[key])}"
    cfg = _compose(good)
    if key not in {*groups(), *keys(cfg)}:
        return _no_such_key(key, cfg, good)
    if "." in key and (group := key.replace(".", "/")) in groups():
        return f"{text}: {key} is filled by options; say {group}={text.partition('=')[2]}"
    return f"{text}: {_first_sentence(why)}"


def _no_such_key(key: str, cfg: DictConfig, good: Sequence[str]) -> str:
    """Return the line for a key that this configuration lacks, with what was probably meant."""
    parent, _, last = key.rpartition(".")
    known = [*groups(), *keys(cfg)]
    if not parent:
        return f"{key}: no such key{nearest(key, known)}"
    node = OmegaConf.select(cfg, parent)
    beside = [str(name) for name in node if not str(name).startswith("_")] if OmegaConf.is_dict(node) else []
    option = _option_of(parent, good)
    if hint := advice(key, [f"{parent}.{name}" for name in beside]):
        return f"{key}: no such key{f' in {option}' if option and hint.endswith(' it') else ''}{hint}"
    same = [name for name in known if name.rpartition(".")[2] == last]
    close = same or get_close_matches(key, known, n=1, cutoff=0.8)
    if close:
        return f"{key}: no such key; did you mean {close[0]}?"
    return f"{key}: no such key; {option or parent} has {', '.join(beside) or names_in(parent) or 'none'}"


def _option_of(group: str, good: Sequence[str]) -> str:
    """Return the chosen option of a group as `data=digits`; empty if `group` is no group with one option."""
    if group not in groups():
        return ""
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="espalier"):
        chosen: Mapping[str, Any] = hydra_compose("config", list(good), return_hydra_config=True).hydra.runtime.choices
    return f"{group}={chosen[group]}" if group in chosen else ""


def _first_sentence(error: BaseException) -> str:
    """Return the innermost reason of an error: Hydra wraps the messages of OmegaConf."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0]

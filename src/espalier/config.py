"""From command-line words to a configuration that can be built, or to one clear line per problem.

`compose` turns overrides into a config; what it cannot compose, `diagnose` explains. Nothing here imports torch:
a misspelt word is answered in under a second.
"""

import os
import re
import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from espalier.catalog import CONF, groups, package
from espalier.errors import ConfigError

NOT_COMPOSED = (HydraException, OmegaConfBaseException, ValueError)  # what composing raises
TEXTS = ("source", "resume", "hydra.run.dir", "hydra.sweep.dir")  # keys whose value is text, quoted or not
WITH_MEANING = ("", "null", "auto", "latest")  # values of those keys that name no path
PLUGINS = {  # of Hydra, by what chooses them; each is a package of its own
    "hydra/launcher": {
        "joblib": "hydra-joblib-launcher",
        "ray": "hydra-ray-launcher",
        "rq": "hydra-rq-launcher",
        "submitit_local": "hydra-submitit-launcher",
        "submitit_slurm": "hydra-submitit-launcher",
    },
    "hydra/sweeper": {
        "ax": "hydra-ax-sweeper",
        "nevergrad": "hydra-nevergrad-sweeper",
        "optuna": "hydra-optuna-sweeper",
    },
}
INSTEAD = {  # keys that Lightning once had, or that others have, and what to say here
    "trainer.auto_lr_find": "try several: -m optimizer.lr=1e-3,3e-3,1e-2",
    "trainer.auto_scale_batch_size": "try several: -m data.batch_size=64,128,256",
    "trainer.gpus": "say strategy=gpu, or strategy=ddp with trainer.devices=2",
    "trainer.tpu_cores": "TPUs are not supported",
    "trainer.resume_from_checkpoint": "say resume=RUN",
    "trainer.weights_save_path": "say hydra.run.dir=FOLDER",
}


@dataclass
class RunConfig:
    """The closed top level of a configuration."""

    seed: int = 0
    source: str | None = None
    resume: str | None = None
    requeue: bool = False
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
    """The configuration that these command-line words describe.

    Raises:
        ConfigError: one line per override that does not fit.
    """
    try:
        return _compose(overrides)
    except NOT_COMPOSED as error:
        raise ConfigError(*diagnose(overrides, error)) from error


def quoted(text: str) -> str:
    """Return the value of an override that Hydra reads as exactly this text."""
    safe = re.sub(r"(\\*)\$\{", lambda found: rf"{found[1] * 2}\${{", text)  # or it would be an interpolation
    return str(QuotedString(safe, Quote.single).with_quotes())


def unquoted(value: str) -> str:
    """Return the text that the value of an override stands for: what is in its quotes, or the value as it is."""
    if len(value) < 2 or value[0] not in "'\"" or value[0] != value[-1]:
        return value
    try:
        parsed = OverridesParser.create().parse_override(f"key={value}").value()
    except HydraException:
        return value
    return re.sub(r"(\\+)\$\{", lambda found: f"{found[1][len(found[1]) // 2 + 1 :]}${{", str(parsed))


def at_home(path: str) -> str:
    """Return the path with its `~` replaced, which a shell does at the beginning of a word alone."""
    return os.path.expanduser(path)  # noqa: PTH111  Path's raises for ~nobody


def folder_word(key: str, value: str) -> str:
    """Return `KEY=VALUE` of a folder as Hydra reads it; `~` is the home, and `${...}` stays an interpolation."""
    if value in WITH_MEANING:
        return f"{key}={value}"
    if "${" not in value:
        return f"{key}={quoted(at_home(unquoted(value)))}"
    value = at_home(value)
    try:
        OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException:
        return f"{key}={QuotedString(value, Quote.single).with_quotes()}"
    return f"{key}={value}"


def typed(key: str, value: object) -> str:
    """Return `KEY=VALUE` as one types it into a shell, whatever text the value is."""
    text = str(value)
    is_plain = key in TEXTS and unquoted(text) == text and "${" not in text and text not in WITH_MEANING
    return shlex.quote(f"{key}={text if is_plain else quoted(text)}")


def _compose(overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="espalier"):
        return hydra_compose("config", list(overrides))


def diagnose(overrides: Sequence[str], error: Exception) -> list[str]:
    """One line for each override that does not compose with the good ones before it."""
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
        return _malformed(text)
    override = OverridesParser.create().parse_override(text)
    key = str(override.key_or_group)
    if isinstance(why, MissingConfigException) and key in PLUGINS:
        return f"{text}: {_missing_plugin(key, str(override.value()))}"
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


def _malformed(text: str) -> str:
    """Say what is wrong with a word that Hydra cannot parse, and how to quote it if that is all it lacks."""
    key, equals, value = text.partition("=")
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={quoted(value)}") if equals else None
    except HydraException:
        parsed = None
    hint = f"; if {value} is a text, quote it: {shlex.quote(f'{key}={quoted(value)}')}" if parsed else ""
    return f"{text}: not of the form KEY=VALUE{hint}"


def _missing_plugin(key: str, option: str) -> str:
    if option in PLUGINS[key]:
        return f"{option} is not installed; run: pip install {PLUGINS[key][option]}"
    return f"no such option; {key} can be basic, or with a package of Hydra's {', '.join(PLUGINS[key])}"


def _no_such_key(key: str, cfg: DictConfig, good: Sequence[str]) -> str:
    """What is meant by a key that this configuration does not have, as far as that can be told."""
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
    return f"{key}: no such key; {option or parent} has {', '.join(beside) or _names_in(parent) or 'none'}"


def advice(key: str, names: Sequence[str]) -> str:
    """`; did you mean X?` where a name is close to the last part of `key`; else which options have this key."""
    if key in INSTEAD:
        return f"; {INSTEAD[key]}"
    by_last = {name.rpartition(".")[2]: name for name in names}
    if close := get_close_matches(key.rpartition(".")[2], list(by_last), n=1, cutoff=0.6):
        return f"; did you mean {by_last[close[0]]}?"
    holders = _options_with(key)
    if not holders:
        return ""
    group, is_list = holders[0].group, holders[0].is_list
    options = [each.option for each in holders if each.group == group]
    said = " and ".join(filter(None, (", ".join(options[:-1]), options[-1])))
    return f"; {group}=[{said}] has it" if is_list else f"; {group}={said} {'have' if len(options) > 1 else 'has'} it"


def _names_in(parent: str) -> str:
    """What an option of a list has, which is not chosen: `compression.qat`."""
    group, _, option = parent.rpartition(".")
    group = group.replace(".", "/")
    own = _own_keys(group, option) if option in groups().get(group, []) else set()
    names = sorted(name.removeprefix(f"{option}.") for name in own if name.startswith(f"{option}."))
    return ", ".join(name for name in names if not name.startswith("_"))


@dataclass(frozen=True)
class _Holder:
    """An option that has a key; one of a list stands under its own name."""

    group: str
    option: str
    is_list: bool


def _options_with(key: str) -> list[_Holder]:
    found = []
    for group, options in groups().items():
        for option in options:
            where = package(group, option)
            if where == "_global_" or not key.startswith(f"{where}."):
                continue
            own = _own_keys(group, option)
            if key.removeprefix(f"{where}.") in own:
                found.append(_Holder(group, option, is_list=option in own))
    return found


def _own_keys(group: str, option: str) -> set[str]:
    """Of an option's file, and of those that it builds on."""
    cfg = OmegaConf.load(CONF / group / f"{option}.yaml")
    assert isinstance(cfg, DictConfig)
    bases = [base for base in cfg.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    return set(keys(cfg)).union(*(_own_keys(group, base) for base in bases))


def _option_of(group: str, good: Sequence[str]) -> str:
    """`data=digits`: the choice of a group; empty where it is none of one option."""
    if group not in groups():
        return ""
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="espalier"):
        chosen: Mapping[str, Any] = hydra_compose("config", list(good), return_hydra_config=True).hydra.runtime.choices
    return f"{group}={chosen[group]}" if group in chosen else ""


def _first_sentence(error: BaseException) -> str:
    """The innermost reason: Hydra wraps what OmegaConf has to say."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0]


def nearest(word: str, names: Sequence[str]) -> str:
    """`; did you mean X?`, or nothing where no name is close."""
    last = word.rpartition(".")[2]
    by_last = {name.rpartition(".")[2]: name for name in names}
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    close = close or [by_last[name] for name in get_close_matches(last, list(by_last), n=1, cutoff=0.6)]
    return f"; did you mean {close[0]}?" if close else ""


def keys(node: Any, where: str = "") -> Iterator[str]:
    """Every key of a composed config by its dotted name, parents first."""
    for name in node:
        key = f"{where}{name}"
        yield key
        if OmegaConf.is_dict(node) and not OmegaConf.is_missing(node, name) and OmegaConf.is_dict(node[name]):
            yield from keys(node[name], f"{key}.")


def parse(overrides: Sequence[str]) -> list[Override]:
    """Command-line words as Hydra reads them.

    Raises:
        ConfigError: a word is not KEY=VALUE.
    """
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise ConfigError(_malformed(str(error.override))) from error


def check_lists(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` if a list of options names one twice: Hydra would take it once, without a word."""
    problems = []
    for word in parse(overrides):
        value = word.value()
        if word.key_or_group in groups() and isinstance(value, list):
            problems += [
                f"{word.input_line}: {name} is listed {value.count(name)} times; once is enough"
                for name in dict.fromkeys(map(str, value))
                if value.count(name) > 1
            ]
    if problems:
        raise ConfigError(*problems)


def trials(overrides: Sequence[str]) -> list[list[str]]:
    """For each value of each swept word, one list of plain overrides that contains it; no full product.

    Raises:
        ConfigError: a word stands for values that nobody can list, or is swept twice.
    """
    parsed = parse(overrides)
    searches = any(str(word.key_or_group) == "hydra/sweeper" and word.value() != "basic" for word in parsed)
    choices = [_choices(word, searches) if word.is_sweep_override() else None for word in parsed]
    swept = [str(word.key_or_group) for word, choice in zip(parsed, choices, strict=True) if choice]
    if twice := [key for key in dict.fromkeys(swept) if swept.count(key) > 1]:
        raise ConfigError(*(f"{key}: swept {swept.count(key)} times; list its values once" for key in twice))
    plain = [
        f"{word.get_key_element()}={choice[0]}" if choice else str(word.input_line)
        for word, choice in zip(parsed, choices, strict=True)
    ]
    found = [plain]
    for place, (word, choice) in enumerate(zip(parsed, choices, strict=True)):
        for value in (choice or [])[1:]:
            found.append([*plain[:place], f"{word.get_key_element()}={value}", *plain[place + 1 :]])
    return found


def _choices(word: Override, searches: bool) -> list[str]:
    """The values of a swept word; of an interval its ends, where a sweeper that searches will choose between them."""
    value = word.value()
    if isinstance(value, IntervalSweep):
        if searches:
            return [f"{value.start:g}", f"{value.end:g}"]
        raise ConfigError(
            f"{word.input_line}: an interval holds no values to try one by one; "
            f"list them, such as {word.key_or_group}=1,2,3 or range(1,10,3)"
        )
    if isinstance(value, Glob):
        options = groups().get(str(word.key_or_group), [])
        chosen = value.filter(options)
        if chosen:
            return chosen
        raise ConfigError(
            f"{word.input_line}: matches no option of {word.key_or_group}; {', '.join(options) or 'none'}"
        )
    values = list(word.sweep_string_iterator())
    if not values:
        raise ConfigError(f"{word.input_line}: no value at all")
    return values

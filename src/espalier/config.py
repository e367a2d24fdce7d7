"""From command-line words to a configuration that can be built, or to one clear line per problem.

`compose` turns overrides into a config; what it cannot compose, `diagnose` explains. Nothing here imports torch:
a misspelt word is answered in under a second.
"""

import os
import re
import secrets
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from espalier.catalog import CONF, groups
from espalier.errors import ConfigError

NOT_COMPOSED = (HydraException, OmegaConfBaseException, ValueError)  # what composing raises
TEXTS = ("source", "resume", "hydra.run.dir", "hydra.sweep.dir")  # keys whose value is text, quoted or not
WITH_MEANING = ("", "null", "auto", "latest")  # values of those keys that name no path


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
    if isinstance(why, MissingConfigException) and key in groups():
        options = groups()[key]
        missing = (why.missing_cfg_file or "").removeprefix(f"{key}/")
        hint = nearest(missing, options)
        return f"{key}={missing or override.value()}: no such option{hint}; {key} can be {', '.join(options)}"
    if key in groups() and override.value() is None:
        return f"{text}: null is no option; {key} can be {', '.join(groups()[key])}"
    known = [*groups(), *keys(_compose(good))]
    if key not in known:
        return f"{key}: no such key{nearest(key, known)}"
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
    """For each value of each swept word, one list of plain overrides that contains it; no full product."""
    parsed = parse(overrides)
    choices = [list(word.sweep_string_iterator()) if word.is_sweep_override() else None for word in parsed]
    plain = [
        f"{word.get_key_element()}={choice[0]}" if choice else str(word.input_line)
        for word, choice in zip(parsed, choices, strict=True)
    ]
    found = [plain]
    for place, (word, choice) in enumerate(zip(parsed, choices, strict=True)):
        for value in (choice or [])[1:]:
            found.append([*plain[:place], f"{word.get_key_element()}={value}", *plain[place + 1 :]])
    return found

"""The words of a command line, `KEY=VALUE`: how Hydra reads them, and how to quote a text for it."""

import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException

from espalier.config.conf_dir import groups
from espalier.config.home import at_home
from espalier.errors import ConfigError

TEXTS = ("source", "resume", "hydra.run.dir", "hydra.sweep.dir")  # keys whose value is text, quoted or not
FORCED = "++"  # before a key: of Hydra, for one that need not be there
WITH_MEANING = ("", "null", "auto", "latest", "best")  # values of those keys that name no path


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


def retyped(word: str) -> str:
    """Return a word that Hydra has read as one types it into a shell."""
    key, value = pair(word)
    return typed(key, unquoted(value)) if key in TEXTS else shlex.quote(word)


def pair(word: str) -> tuple[str, str]:
    """Return key and value of a word as they are written, whether or not Hydra can read it; `++KEY` is KEY."""
    key, _, value = word.partition("=")
    return key.lstrip("+"), value


def parse(overrides: Sequence[str]) -> list[Override]:
    """Return command-line words as Hydra reads them.

    Raises:
        ConfigError: a word is not KEY=VALUE.
    """
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise ConfigError(malformed(str(error.override))) from error


def open_to_any(overrides: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the words, those for keys in these groups as `++KEY=VALUE`, so that composing accepts any key.

    Another run decides which options they have, not the defaults of this one; `inherit.py` and `check.py` judge them.
    """
    chosen = {key for key, _ in map(pair, overrides)}
    prefixes = tuple(f"{name}." for name in names if not {name, "experiment"} & chosen)
    return [f"{FORCED}{word}" if word.startswith(prefixes) and "=" in word else word for word in overrides]


def malformed(text: str) -> str:
    """Say what is wrong with a word that Hydra cannot parse, and how to quote it if that is all it lacks."""
    key, equals, value = text.partition("=")
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={quoted(value)}") if equals else None
    except HydraException:
        parsed = None
    hint = f"; if {value} is a text, quote it: {shlex.quote(f'{key}={quoted(value)}')}" if parsed else ""
    return f"{text}: not of the form KEY=VALUE{hint}"


def check_lists(overrides: Sequence[Override]) -> None:
    """Raise `ConfigError` if a list of options names one twice: Hydra would take it once, without a word."""
    problems = []
    for word in overrides:
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
    """Return, for each value of each swept word, one list of plain overrides that contains it; no full product.

    Raises:
        ConfigError: the values of a word cannot be listed, or a word is swept twice.
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
    """Return the values of a swept word; of an interval its ends, where a sweeper will choose between them."""
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

"""Keep secrets out of everything that is written: texts, command lines and configurations.

A secret is the value of an environment variable whose name speaks of one, the value of a configuration key that does,
the password or signature in an address, and what has the form of a well-known token. Standard library only.
"""

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import TracebackType
from typing import Any
from urllib.parse import quote

from espalier.config.conf_dir import CONF
from espalier.errors import ConfigError

HIDDEN = "***"
MIN_LENGTH = 8  # of a value in the environment: to hide each `1` or `true` would spoil every text
VARIABLE = re.compile(
    r"(?i)(?:^|_)(?:[a-z0-9]*(?:key|token|secret|password|passwd|passphrase)|keys|secrets|credentials?|auth|pass|pwd)"
    r"(?:_|$)"
)
IS_PASSWORD = re.compile(r"(?i)pass|pwd|secret|credential")  # such a variable may hold a word; others name a method
ORDINARY = re.compile(r"(?:[a-z]{1,12}|[A-Z]{1,12}|[A-Z][a-z]{1,11})(?:[-_. ](?:[a-z]{1,12}|[A-Z]{1,12}))*")
IN_TEXTS = ("pad", "bos", "eos", "unk", "cls", "class", "sep", "mask", "special", "start", "end", "image")  # tokens
NAME = (  # of a key; narrower than that of a variable, as `key` and `pad_token` are harmless in a configuration
    r"(?<![\w-])[\w-]*(?:(?:api|access|secret|private|account|auth|signing|encryption|license)[_-]?key"
    rf"|secrets?|password|passwd|passphrase|credentials?|{''.join(rf'(?<!{word}_)' for word in IN_TEXTS)}token)"
)
HARMLESS = r"(?:\$\{|\*\*\*|\?\?\?|(?:null|none|true|false|-?[\d.]{1,7})(?![^\s,}\]&;'\"]))"  # says no secret by itself
KEY = re.compile(rf"(?i){NAME}$")
FLAG = re.compile(rf"(?i)(?=-){NAME}$")
NO_SECRET = re.compile(rf"(?i)$|{HARMLESS}")
ASSIGNED = re.compile(  # NAME=value, 'NAME': value, {NAME: value}; not `NAME: what is wrong with it`
    rf"(?i)((?:{NAME}['\"]?\s*=|['\"]{NAME}['\"]\s*:|(?<=[{{,])\s*{NAME}\s*:)\s*)(?!['\"]?{HARMLESS})"
    r"('[^']*'|\"[^\"]*\"|[^\s,}\]&]*[^\s,}\]&:])"
)
RANDOM = r"(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{20,}"  # letters and digits in one piece, as no name has them
TOKEN = re.compile(  # as their services document them
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"  # AWS
    r"|AIza[\w-]{35}(?![\w-])"  # Google
    rf"|sk-[\w-]{{0,40}}?{RANDOM}[\w-]*"  # OpenAI, Anthropic and others
    r"|[sr]k_live_[A-Za-z0-9]{16,}"  # Stripe
    r"|hf_[A-Za-z0-9]{16,}|gh[oprsu]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{16,}"
    r"|wandb_v\d_\w{16,})"
)
FORMS = (
    (ASSIGNED, rf"\g<1>{HIDDEN}"),
    (re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"), HIDDEN),  # user and password of an address
    (re.compile(r"(?i)(?<![a-z])((?:https?|ftps?|davs?)://)[^\s/@:?#'\"]+(?=@)"), rf"\g<1>{HIDDEN}"),  # a user alone
    (
        re.compile(r"(?<!abfs://)(?<!abfss://)(?<!wasb://)(?<!wasbs://)(?<=://)(?=[a-z_-]*[\dA-Z])[\w-]{20,}(?=@)"),
        HIDDEN,
    ),
    (
        re.compile(r"(?i)([?&](?:[\w-]*signature|sig|(?:api_?)?key|code|auth)=)[^&\s'\"]+"),
        rf"\g<1>{HIDDEN}",
    ),  # presigned
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/-]{16,}=*"), rf"\g<1>{HIDDEN}"),
    (TOKEN, HIDDEN),
)
RUNS = ("source", "resume")  # may be a presigned address, which becomes a path before anything is written

_format_warning = warnings.formatwarning


def scrub(text: str) -> str:
    """Return the text with every secret replaced by `***`."""
    for value in _in_environment():
        text = text.replace(value, HIDDEN)
    for form, safe in FORMS:
        text = form.sub(safe, text)
    return text


def scrub_words(words: Sequence[str]) -> list[str]:
    """Return a command line with every secret hidden, the word after a flag such as `--password` too."""
    before = ["", *words]
    return [
        HIDDEN if FLAG.match(flag) and not word.startswith("-") else scrub(word)
        for flag, word in zip(before, words, strict=False)
    ]


def scrub_tree(tree: Any, key: str = "") -> Any:
    """Return a configuration of plain types with every secret hidden; `key` is the name that it stands under."""
    if isinstance(tree, Mapping):
        return {name: scrub_tree(value, str(name)) for name, value in tree.items()}
    if isinstance(tree, list):
        return [scrub_tree(value, key) for value in tree]
    if KEY.match(key) and tree is not None and not NO_SECRET.match(str(tree)):
        return HIDDEN
    return scrub(tree) if isinstance(tree, str) else tree


def refuse(words: Sequence[str]) -> None:
    """Raise `ConfigError` if a word of the command line contains a secret; the name of a variable is no secret."""
    told = [key for key, _, _ in (word.partition("=") for word in words if scrub(word) != word) if key not in RUNS]
    if told:
        raise ConfigError(*(_advice(key, "the history of the shell") for key in told))


def refuse_written(tree: Any) -> None:
    """Raise `ConfigError` if a configuration contains a secret before its interpolations are resolved."""
    safe = dict(_leaves(scrub_tree(tree)))
    told = [key for key, value in _leaves(tree) if str(value) != str(safe[key]) and key not in RUNS]  # NaN is not NaN
    if told:
        raise ConfigError(*(_advice(key, "every copy of its file") for key in told))


def require_told(tree: Any, where: str) -> None:
    """Raise `ConfigError` if `tree`, which stands under the key `where`, was stored without the secrets it needs."""
    hidden = [key for key, value in _leaves(tree, where) if value == HIDDEN]
    if hidden:
        raise ConfigError(
            *(
                f"{key}: a secret, which no run stores; say again where it is: '+{key}=${{oc.env:NAME}}'"
                for key in hidden
            )
        )


def watch_output() -> None:
    """Hide secrets in all log records, warnings and the last traceback of this process from now on.

    Records are changed when they are made, because Hydra and other libraries add handlers later.
    """
    logging.setLogRecordFactory(_record)
    warnings.formatwarning = _warning
    sys.excepthook = _ending


def _in_environment() -> list[str]:
    """Return the secret values of the environment, longest first.

    Each line of a value counts, both as it is and as an address quotes it.
    """
    values = {
        line
        for name, value in os.environ.items()
        if VARIABLE.search(name) and not _is_harmless(name, value)
        for line in value.split("\n")
        if len(line.strip()) >= MIN_LENGTH
    }
    return sorted({form for value in values for form in (value, quote(value, safe=""))}, key=len, reverse=True)


def _is_harmless(name: str, value: str) -> bool:
    """Return whether a value is a path that exists (`PWD`), or a common word, as in `AUTH_METHOD=kerberos`.

    If a word of our own options were hidden, every configuration would be spoilt.
    """
    if os.path.exists(value):  # noqa: PTH110  Path.exists raises for a long one
        return True
    return ORDINARY.fullmatch(value) is not None and (not IS_PASSWORD.search(name) or value.lower() in _own_words())


@cache
def _own_words() -> frozenset[str]:
    """Return every word of `conf/` in lower case."""
    return frozenset(
        word for file in CONF.rglob("*.yaml") for word in re.findall(r"\w+", file.read_text(encoding="utf-8").lower())
    )


def _leaves(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping | list):
        parts = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for name, value in parts:
            yield from _leaves(value, f"{where}.{name}" if where else str(name))
    else:
        yield where, tree


def _advice(key: str, keeper: str) -> str:
    return f"{key}: holds a secret, which {keeper} keeps; set it in the environment and say '{key}=${{oc.env:NAME}}'"


def _record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    try:
        message = record.getMessage()
    except (TypeError, ValueError):
        return record  # its handler says that message and arguments do not fit
    if (safe := scrub(message)) != message:
        record.msg, record.args = safe, None
    if record.exc_info and record.exc_info[0]:
        record.exc_text = scrub("".join(traceback.format_exception(*record.exc_info))).rstrip("\n")
    return record


def _warning(*args: Any, **kwargs: Any) -> str:
    return scrub(_format_warning(*args, **kwargs))


def _ending(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(scrub("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

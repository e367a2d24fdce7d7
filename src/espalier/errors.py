"""Errors that end a run, each with the exit code that a shell or a scheduler sees."""

import re
from importlib import import_module
from types import ModuleType

CONTROL = re.compile(  # would speak to the terminal, break a line, turn the reading direction, or cannot be encoded
    r"[\0-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class EspalierError(Exception):
    """Ends a run with one line on stderr and `exit_code`."""

    exit_code = 1


class ConfigError(EspalierError):
    """A configuration or input that can never work; one problem per line, each naming its key."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__(CONTROL.sub("?", "\n".join(problems)))


class DivergedError(EspalierError):
    """A training whose loss or gradient is not finite; the weights in its checkpoints are finite."""

    exit_code = 4


class StoppedError(EspalierError):
    """A training that was stopped from outside and has saved its state; EX_TEMPFAIL of sysexits.h: try again later."""

    exit_code = 75


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package and return it.

    Raises:
        ConfigError: it is not installed; the message names the extra that brings it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ConfigError(f"{error.name} is not installed; run: pip install -e '.[{extra}]'") from None

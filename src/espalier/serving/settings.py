"""The settings of a server, on the command line of its process and in its workers."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """The settings of `conf/task/serve.yaml`, except the bundle."""

    bundle: Path
    host: str
    hosts: list[str]  # further names that may ask, beside those of `hosts.py`
    port: int
    workers: int
    threads: int
    max_batch: int
    queue: int
    max_body_mb: float
    time_limit_s: float

    def to_words(self) -> list[str]:
        """Return the command line that `from_words` reads."""
        first, *settings = fields(self)
        words = [str(getattr(self, first.name))]
        for setting in settings:
            value = getattr(self, setting.name)
            given = value if isinstance(value, list) else [value]
            words += [f"--{setting.name.replace('_', '-')}", *map(str, given)] if given else []
        return words

    @classmethod
    def from_words(cls, words: Sequence[str]) -> "Settings":
        """Read a command line; a wrong one ends the process with exit code 2 and the reason.

        A container starts in this way, without YAML: here the settings have the defaults of `conf/task/serve.yaml`.
        """
        parser = argparse.ArgumentParser("python -m espalier.serving", description="Serve an exported bundle over HTTP")
        parser.add_argument("bundle", type=Path, help="folder that holds bundle.json")
        parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every one")
        parser.add_argument("--hosts", nargs="+", default=[], help="further names in the header Host; '*' allows all")
        parser.add_argument("--port", type=Within(0, 65_535), default=8000, help="0 takes a free one")
        parser.add_argument("--workers", type=Within(1, 1024), default=1, help="processes")
        parser.add_argument("--threads", type=Within(1, 1024), default=1, help="of ONNX Runtime in each process")
        parser.add_argument("--max-batch", type=Within(1, 65_536), default=32, help="samples of one call")
        parser.add_argument("--queue", type=Within(1, 1_000_000), default=256, help="samples that may wait")
        parser.add_argument("--max-body-mb", type=_positive, default=8.0, help="of a request, in 10^6 bytes")
        parser.add_argument("--time-limit-s", type=_positive, default=30.0, help="for a body to come, for an answer")
        settings = cls(**vars(parser.parse_args(words)))
        if settings.queue < settings.max_batch:
            parser.error(f"--queue {settings.queue}: must hold at least one batch, --max-batch {settings.max_batch}")
        return settings


class Within:
    """A type for argparse: whole numbers of a range; its error message names the range."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most
        self.__name__ = f"whole number from {least} to {most}"

    def __call__(self, word: str) -> int:
        number = int(word)
        if not self.least <= number <= self.most:
            raise ValueError
        return number


def _positive(word: str) -> float:
    number = float(word)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


_positive.__name__ = "number above 0"

"""Copy a checkpoint from an address to this machine before anything reads it.

The address names one file. It is fetched anew each time, into the same place, through fsspec. From then on it is a file
like any other: `archive.py` and `torch.load(weights_only=True)` judge it.
"""

import hashlib
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import fsspec
from fsspec.callbacks import Callback

from espalier.config import redaction
from espalier.errors import ConfigError
from espalier.runs import files, run_folder
from espalier.runs.storage import SUMS

SCHEMES = ("https", "http", "s3", "gs", "az", "abfs", "hf", "file")
FETCHED = run_folder.LOGS / "fetched"
MAX_BYTES = 16 * 2**30
MAX_SUMS_BYTES = 2**20
PATIENCE = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)  # seconds; fsspec gives up after 5 minutes


def fetch(key: str, url: str, max_bytes: int = MAX_BYTES) -> Path:
    """Copy the file at `url` to this machine, whole, with the list of hashes beside it, if there is one.

    Raises:
        ConfigError: it cannot be fetched, or is larger than `max_bytes`; the message starts with `key`.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES or "::" in url:
        raise ConfigError(f"{key}={url}: not fetched, an address starts with one of {', '.join(SCHEMES)}")
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(urlsplit(f"//{rest}").path).name).lstrip(".") or "checkpoint"
    target = FETCHED / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(url, target, max_bytes)
    except Exception as error:  # of whatever library reaches it
        raise ConfigError(f"{key}={url}: not fetched, {_reason(error)}") from error
    sums = target.with_name(SUMS)
    sums.unlink(missing_ok=True)
    try:
        _copy(f"{url.rpartition('/')[0]}/{SUMS}", sums, MAX_SUMS_BYTES)
    except Exception:  # most places have none
        sums.unlink(missing_ok=True)
    print(f"fetched {redaction.scrub(url)}: {target.stat().st_size / 1e6:.1f} MB, as {target}", flush=True)
    return target


class TooLargeError(Exception):
    """A file with more bytes than are allowed."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"it is larger than {max_bytes / 1e9:.1f} GB")


class _Limit(Callback):
    """Watches the progress of a copy, and ends it once it is too large."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self.max_bytes = max_bytes
        self.seen = 0

    def set_size(self, size: int | None) -> None:
        self.seen = size or 0
        self.relative_update(0)
        self.seen = 0

    def relative_update(self, inc: int = 1) -> None:
        self.seen += inc
        if self.seen > self.max_bytes:
            raise TooLargeError(self.max_bytes)


def _copy(url: str, target: Path, max_bytes: int) -> None:
    """Copy the file at `url` whole, or leave nothing; raise `TooLargeError` if it has more than `max_bytes`."""
    options: dict[str, Any] = {"skip_instance_cache": True}
    if url.startswith("http"):
        options |= {"client_kwargs": {"timeout": PATIENCE, "trust_env": True}}
    system, place = fsspec.core.url_to_fs(url, **options)
    with files.replaced(target, by_several=True) as draft:
        system.get_file(place, str(draft), callback=_Limit(max_bytes))
        if draft.stat().st_size > max_bytes:  # a library that reports nothing
            raise TooLargeError(max_bytes)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "nothing is there"
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError):
        return "it was cut off; try again"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"{error.host} is out of reach: {error.os_error.strerror or error.os_error}"
    return f"{(str(error).splitlines() or [''])[0] or type(error).__name__}"

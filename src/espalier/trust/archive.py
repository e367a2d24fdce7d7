"""Check that a file is an archive as `torch.save` writes it, before `torch.load` opens it.

Such an archive is a zip whose members are stored uncompressed, below one folder. Everything else is refused: members
whose names leave the folder, that share bytes or expand, and a directory that two readers would understand in two ways.
Only the directory is read here. `weights_only=True` refuses what runs code.
"""

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile

from espalier.errors import ConfigError

UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # makes torch read every file as if it came with weights_only=False
START = b"PK\x03\x04"  # of a file that torch does not read in its old way, a pickle after a pickle
END = struct.Struct("<4s4H2LH")  # appnote 4.3.16, without a comment
WIDE_END = struct.Struct("<4sQ2H2L4Q")  # 4.3.14, of files beyond 4 GiB
WIDE_LOCATOR = struct.Struct("<4sLQL")  # 4.3.15
MAX_MEMBERS = 500_000  # tensors
MAX_PICKLE_BYTES = 256 * 2**20  # of data.pkl, which holds no tensor: 200 bytes for each
PART = re.compile(r"(?!\.{1,2}$)[^\\:\0-\x1f]+")  # of a name


def refuse_unsafe_loading() -> None:
    """Raise `ConfigError` if the environment tells torch to run whatever a checkpoint holds."""
    value = os.environ.get(UNSAFE, "")
    if value.lower() in ("1", "y", "yes", "true"):  # as torch reads it
        raise ConfigError(f"{UNSAFE}={value}: makes torch run code out of checkpoints; unset it")


def require_safe(key: str, path: Path) -> None:
    """Raise `ConfigError` unless the file is an archive as `torch.save` writes it; the message starts with `key`."""
    try:
        problem = next(_problems(path), None)
    except (OSError, ValueError, BadZipFile, NotImplementedError, struct.error) as error:
        raise ConfigError(
            f"{key}={path}: damaged, or no archive; a bare pickle may run code and is not read"
        ) from error
    if problem:
        raise ConfigError(f"{key}={path}: not opened, {problem}; torch.save writes no such file")


def _problems(path: Path) -> Iterator[str]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(START)) != START:
            raise BadZipFile
        file.seek(max(0, size - END.size - WIDE_LOCATOR.size - WIDE_END.size))
        start = _start_of_directory(file.read(), size)
    with ZipFile(path) as archive:
        members = archive.infolist()
        if start is None or start != archive.start_dir:
            yield "its directory is ambiguous"
    if len(members) > MAX_MEMBERS:
        yield f"it has {len(members)} members, more than {MAX_MEMBERS}"
    names = [member.filename for member in members]
    if len(set(names)) < len(names) or len({name.partition("/")[0] for name in names}) != 1:
        yield "two members have one name, or they lie below two folders"
    for member in members:
        if not all(map(PART.fullmatch, member.filename.split("/"))) or member.filename != member.orig_filename:
            yield f"a member is called {member.filename[:80]!r}"
        if member.compress_type != ZIP_STORED or member.compress_size != member.file_size:
            yield f"{member.filename[:80]!r} is compressed to {member.compress_size} of {member.file_size} bytes"
        if member.filename.endswith("/data.pkl") and member.file_size > MAX_PICKLE_BYTES:
            yield f"its data.pkl has {member.file_size / 1e6:.0f} MB"
    if sum(member.file_size for member in members) > size:
        yield "its members share their bytes"


def _start_of_directory(tail: bytes, size: int) -> int | None:
    """Return the byte where all readers find the directory of the archive, or None if readers may differ."""
    end = tail[-END.size :]
    signature, *_, offset, comment = END.unpack(end)
    if signature != b"PK\x05\x06" or comment:
        return None
    locator = tail[-END.size - WIDE_LOCATOR.size : -END.size]
    if locator[:4] != b"PK\x06\x07":
        return int(offset)
    wide = size - END.size - WIDE_LOCATOR.size - WIDE_END.size  # Python looks here, torch where the locator points
    _, _, position, _ = WIDE_LOCATOR.unpack(locator)
    signature, *_, offset = WIDE_END.unpack(tail[: WIDE_END.size])
    return int(offset) if signature == b"PK\x06\x06" and position == wide else None

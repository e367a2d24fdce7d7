"""What is not equal to the last bit in the folders of two runs, but for clocks and the folders' names."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CLOCKS = {"samples_per_second", "data_wait_share"}
MONITOR = "callbacks/Monitor"  # whose state is times
BEST = "checkpoints/BEST"  # which of them it is
REPLACED = "replaced"  # files that go once this checkpoint is written; whether they are still there is compared
SET_ASIDE = "previous.ckpt"  # the last but one, which a stop saves as well
MAX_SHOWN = 8


def differences(folder: Path, other: Path) -> list[str]:
    """Checkpoints, all that is in them; rows of `metrics.csv`; networks and remarks of the report."""
    found = [name for name, read in (("metrics.csv", rows), ("report", measured)) if read(folder) != read(other)]
    found += [BEST] if best(folder) != best(other) else []
    ours, theirs = _names(folder), _names(other)
    found += [f"{name}: only in {folder.name}" for name in sorted(ours - theirs)]
    found += [f"{name}: only in {other.name}" for name in sorted(theirs - ours)]
    for name in sorted(ours & theirs):
        now, then = (dict(leaves(checkpoint(each, name), each)) for each in (folder, other))
        paths = [path for path in now.keys() | then.keys() if not _same(now.get(path), then.get(path))]
        found += [f"{name}{path}" for path in sorted(paths)]
    return found


def shown(found: list[str]) -> str:
    """Return the differences in a line: how many there are of each part, and the first."""
    parts = Counter("/".join(path.split("/")[:2]) for path in found)
    first = {part: next(path for path in found if path.startswith(part)) for part in parts}
    lines = [first[part] if number == 1 else f"{part} {number} times" for part, number in parts.items()]
    return ", ".join(lines[:MAX_SHOWN]) + (f" and {len(lines) - MAX_SHOWN} more" if len(lines) > MAX_SHOWN else "")


def rows(folder: Path) -> list[dict[str, str]]:
    """`metrics.csv` without clocks."""
    with (folder / "metrics.csv").open() as file:
        return [{name: text for name, text in row.items() if name not in CLOCKS} for row in csv.DictReader(file)]


def measured(folder: Path) -> list[Any]:
    """Return what the report says of each network, without clocks."""
    report = json.loads((folder / "report.json").read_text())
    networks = [{key: row.get(key) for key in ("name", "metrics", "params", "nonzero")} for row in report["rows"]]
    return [*networks, *(report["notes"] if report["task"] == "train" else ())]  # others have latencies in them


def best(folder: Path) -> str | None:
    """Which checkpoint is recorded as the best; None where none is."""
    return (folder / BEST).read_text() if (folder / BEST).exists() else None


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    """Return what is in it."""
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def leaves(node: Any, folder: Path, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested checkpoint by its path; the folder's own name reads `RUN`."""
    if isinstance(node, dict):
        for key, child in node.items():
            if MONITOR not in f"{where}/{key}" and key != REPLACED:
                yield from leaves(child, folder, f"{where}/{str(key).replace(str(folder), 'RUN')}")
    elif isinstance(node, list | tuple):
        for number, child in enumerate(node):
            yield from leaves(child, folder, f"{where}/{number}")
    else:
        yield where, node.replace(str(folder), "RUN") if isinstance(node, str) else node


def _names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("*.ckpt")} - {SET_ASIDE}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and (one == other or (one != one and other != other))

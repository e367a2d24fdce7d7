"""What lies in `conf/`: groups, options, their opening comments. Standard library only, so it is quick."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGED = Path(__file__).parents[1] / "conf"  # inside a wheel
CONF = PACKAGED if PACKAGED.is_dir() else Path(__file__).parents[3] / "conf"
TRAINS = ("train", "compress")  # the tasks that train: they take a recipe, and are stopped, resumed and requeued

ADDED = {"data": {"espalier.data.hub_images.HubImages": {"background": "black", "broken": "refuse"}}}  # see `completed`


def groups() -> dict[str, list[str]]:
    """Every config group with its options, nested groups by their path (`data/augment`)."""
    found: dict[str, list[str]] = {}
    for file in sorted(CONF.rglob("*/*.yaml"), key=lambda file: (file.parent, file.stem)):
        found.setdefault(file.parent.relative_to(CONF).as_posix(), []).append(file.stem)
    return found


def summary(group: str, option: str) -> str:
    """The first comment of an option's file, which says in one line what the option is."""
    for line in (CONF / group / f"{option}.yaml").read_text().splitlines():
        if line.startswith("#") and not line.startswith("# @package"):
            return line.removeprefix("#").strip()
    return ""


def package(group: str, option: str) -> str:
    """Return where the keys of an option stand: `data.augment`; `_global_` is the top."""
    first = (CONF / group / f"{option}.yaml").read_text().partition("\n")[0]
    return first.removeprefix("# @package ").strip() if first.startswith("# @package") else group.replace("/", ".")


def knobs(group: str, option: str) -> list[str]:
    """The lines of an option's file that a user can override, comments included."""
    lines = (CONF / group / f"{option}.yaml").read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("#", "_target_", "_partial_"))]


def defaults() -> dict[str, str]:
    """The option that each group starts with, as `config.yaml` lists them."""
    chosen: dict[str, str] = {}
    for line in (CONF / "config.yaml").read_text().splitlines():
        entry, _, _ = line.strip().removeprefix("- ").partition(" #")
        group, colon, option = entry.partition(": ")
        if line.startswith("  - ") and colon:
            chosen[group] = option.strip()
    return chosen


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with the knobs that its options have got since, at the value they had in effect."""
    result = dict(config)
    for group, added in ADDED.items():
        node = result.get(group)
        if isinstance(node, Mapping) and (values := added.get(str(node.get("_target_")))):
            result[group] = {**values, **node}
    return result

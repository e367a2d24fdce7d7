"""The files of `conf/`: groups, options, their opening comments. Standard library only, so it is quick."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGED = Path(__file__).parents[1] / "conf"  # inside a wheel
CONF = PACKAGED if PACKAGED.is_dir() else Path(__file__).parents[3] / "conf"
TRAINS = ("train", "compress")  # the tasks that train: they take a recipe, and are stopped, resumed and requeued

ADDED: dict[str, dict[str, dict[str, Any]]] = {  # see `completed`
    "data": {"espalier.data.hub_images.HubImages": {"background": "black", "broken": "refuse"}},
    "learner": {
        "espalier.learners.classifier.Classifier": {"loss": None, "metrics": {}},
        "espalier.learners.regressor.Regressor": {"metrics": {}},
    },
}

MOVED = {  # modules of targets, by the names that configurations of version 0.1 hold
    "espalier.callbacks.csv_log": "espalier.loggers.csv_log",
    "espalier.callbacks.idle_profiler": "espalier.profiling.idle_profiler",
    "espalier.callbacks.mlflow_log": "espalier.loggers.mlflow_log",
    "espalier.callbacks.tensorboard_log": "espalier.loggers.tensorboard_log",
    "espalier.callbacks.wandb_log": "espalier.loggers.wandb_log",
    "espalier.learners.replication": "espalier.strategies.ddp",
    "espalier.learners.sharding": "espalier.strategies.fsdp",
}


def groups() -> dict[str, list[str]]:
    """Return every config group with its options; nested groups are named by their path (`data/augment`)."""
    found: dict[str, list[str]] = {}
    for file in sorted(CONF.rglob("*/*.yaml"), key=lambda file: (file.parent, file.stem)):
        found.setdefault(file.parent.relative_to(CONF).as_posix(), []).append(file.stem)
    return found


def summary(group: str, option: str) -> str:
    """Return the first comment of an option's file, which says in one line what the option is."""
    for line in (CONF / group / f"{option}.yaml").read_text().splitlines():
        if line.startswith("#") and not line.startswith("# @package"):
            return line.removeprefix("#").strip()
    return ""


def package(group: str, option: str) -> str:
    """Return where the keys of an option stand, such as `data.augment`; `_global_` is the top."""
    first = (CONF / group / f"{option}.yaml").read_text().partition("\n")[0]
    return first.removeprefix("# @package ").strip() if first.startswith("# @package") else group.replace("/", ".")


def settings(group: str, option: str) -> list[str]:
    """Return the lines of an option's file that a user can override, comments included."""
    lines = (CONF / group / f"{option}.yaml").read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("#", "_target_", "_partial_"))]


def defaults() -> dict[str, str]:
    """Return the default option of each group, as `config.yaml` lists them."""
    chosen: dict[str, str] = {}
    for line in (CONF / "config.yaml").read_text().splitlines():
        entry, _, _ = line.strip().removeprefix("- ").partition(" #")
        group, colon, option = entry.partition(": ")
        if line.startswith("  - ") and colon:
            chosen[group] = option.strip()
    return chosen


def _moved(node: Any) -> Any:
    """Return a stored node with the present names of targets that have moved since."""
    if isinstance(node, Mapping):
        return {key: _renamed(value) if key == "_target_" else _moved(value) for key, value in node.items()}
    return [_moved(each) for each in node] if isinstance(node, list) else node


def _renamed(target: Any) -> Any:
    module, _, name = str(target).rpartition(".")
    return f"{MOVED[module]}.{name}" if module in MOVED else target


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored configuration brought up to date: moved targets renamed, new settings of its options added."""
    result = _moved(config)
    for group, added in ADDED.items():
        node = result.get(group)
        if isinstance(node, Mapping) and (values := added.get(str(node.get("_target_")))):
            result[group] = {**values, **node}
    return result

"""From a `_target_` in a configuration to the object it names, and whether that object takes the arguments beside it.

A signature is the schema: names, types and ranges are compared before anything is built. This is the first place that
imports torch and Lightning, after the configuration has composed.
"""

import inspect
import json
import pkgutil
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from espalier.config import nearest
from espalier.errors import ConfigError
from espalier.ranges import Count, Index, NonNegative, Positive, Rate

# Arguments that the program itself supplies, so that no size or path is configured twice.
SUPPLIED: dict[str, frozenset[str]] = {
    "data": frozenset({"seed"}),
    "model": frozenset({"input_shape", "num_outputs"}),
    "learner": frozenset({"model", "spec", "optimizer", "scheduler", "seed"}),
    "optimizer": frozenset({"params"}),
    "scheduler": frozenset({"optimizer", "step", "total_steps", "mode"}),
    "compression": frozenset({"spec", "seed", "samples", "loss", "latency_ms", "network"}),
    "callbacks": frozenset({"monitor", "mode", "dirpath"}),
    "logger": frozenset({"folder", "run_name", "resumed_step"}),
    "trainer": frozenset({"callbacks", "logger", "plugins", "default_root_dir", "enable_checkpointing"}),
    "task": frozenset({"run"}),
}
# Ranges of arguments that belong to other libraries, whose signatures state a type at most.
RANGES: dict[str, Any] = {
    "lr": Positive,
    "weight_decay": NonNegative,
    "momentum": Rate,
    "accumulate_grad_batches": Count,
    "log_every_n_steps": Count,
    "num_nodes": Count,
    "gradient_clip_val": NonNegative | None,
    "patience": Index,
}
KEYWORDS = frozenset({"_target_", "_partial_", "_convert_", "_recursive_", "_args_"})
# A config that came out of a checkpoint is untrusted, and nothing else is ever built from it. A name that ends with a
# dot is a package: of the classes that are defined there, those with one of the bases `BASES`.
TRUSTED_TARGETS: dict[str, tuple[str, ...]] = {
    "data": ("espalier.data.",),
    "model": ("espalier.models.",),
    "learner": ("espalier.learners.",),
    "optimizer": ("espalier.optim.", "torch.optim."),
    "scheduler": ("espalier.optim.schedules.", "torch.optim.lr_scheduler."),
    "compression": ("espalier.compression.",),
    "callbacks": (
        "espalier.callbacks.",
        "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
        "lightning.pytorch.callbacks.gradient_accumulation_scheduler.GradientAccumulationScheduler",
        "lightning.pytorch.callbacks.lr_monitor.LearningRateMonitor",
        "lightning.pytorch.callbacks.stochastic_weight_avg.StochasticWeightAveraging",
        "lightning.pytorch.callbacks.timer.Timer",
    ),
    "logger": ("espalier.callbacks.", "espalier.callbacks.tensorboard_log.tensorboard"),
    "trainer": (
        "lightning.pytorch.trainer.trainer.Trainer",
        "lightning.pytorch.strategies.ddp.DDPStrategy",
        "lightning.pytorch.strategies.fsdp.FSDPStrategy",
        "espalier.learners.replication.Replicated",
        "espalier.learners.sharding.FullyShardedData",
        "espalier.callbacks.idle_profiler.IdleProfiler",
    ),
    "task": ("espalier.tasks.train.train", "espalier.tasks.compress.compress"),
}
BASES: dict[str, tuple[str, ...]] = {
    "data": ("lightning.pytorch.core.datamodule.LightningDataModule", "espalier.data.augment.Augmentation"),
    "model": ("torch.nn.modules.module.Module",),
    "learner": ("lightning.pytorch.core.module.LightningModule",),
    "optimizer": ("torch.optim.optimizer.Optimizer",),
    "scheduler": ("torch.optim.lr_scheduler.LRScheduler",),
    "compression": ("lightning.pytorch.callbacks.callback.Callback",),
    "callbacks": ("lightning.pytorch.callbacks.callback.Callback",),
    "logger": ("lightning.fabric.loggers.logger.Logger",),
}
PURE = "espalier.optim.schedules."  # its functions are trusted like classes: numbers in, a number out
PARTIAL = ("optimizer", "scheduler")  # groups whose objects get their last arguments later
WRITES = ("callbacks", "logger", "trainer")  # groups whose objects write files
PLACE = re.compile(r".*(://|::)|[/~\\]|[A-Za-z]:[/\\]|(.*[/\\])?\.\.([/\\]|$)", re.DOTALL)  # not below the run


def check(cfg: DictConfig, *, untrusted: bool = False, said: DictConfig | None = None) -> None:
    """Raise `ConfigError` with one line for everything in `cfg` that cannot be built; build nothing.

    Every `_target_` must resolve, accept its keys, and get values of the types and ranges its signature states.
    `untrusted` configs, those that came out of a checkpoint, may name only `TRUSTED_TARGETS`, interpolate nothing, and
    write to no place that the user has not `said` too.
    """
    plain = OmegaConf.to_container(cfg, resolve=not untrusted)
    assert isinstance(plain, dict)
    if untrusted:
        suspicions = (problem for group, node in plain.items() for problem in _suspicions(node, str(group), said))
        if problem := next(suspicions, None):  # one is enough; its author may have thought of thousands
            raise ConfigError(" ".join(problem.split()))
    problems = [problem for group, node in plain.items() for problem in _problems(node, str(group))]
    problems += [f"{where}._target_: missing, so there is nothing to build" for where in _without_target(plain)]
    if problems:
        raise ConfigError(*problems)


def _suspicions(node: Any, where: str, said: DictConfig | None) -> Iterator[str]:
    """What a configuration out of a checkpoint may not ask for."""
    group = where.partition(".")[0]
    shown = f"{where}={str(node)[:80]}"
    if isinstance(node, list):
        for place, child in enumerate(node):
            yield from _suspicions(child, f"{where}[{place}]", said)
    if isinstance(node, str) and "${" in node:
        yield f"{shown}: a checkpoint may not interpolate"
    elif isinstance(node, str) and group in WRITES and PLACE.match(node) and _of_user(said, where) != node:
        yield f"{shown}: a place that no checkpoint chooses; if you mean it, say it again: {shown}"
    if not isinstance(node, dict):
        return
    for key, child in node.items():
        if str(key).startswith("_") and key != "_target_" and not (key == "_partial_" and where in PARTIAL):
            yield f"{where}.{str(key)[:80]}: a checkpoint may not change how it is built"
        yield from _suspicions(child, f"{where}.{key}", said)
    if "_target_" in node and not _is_trusted(node["_target_"], group):
        name = str(node["_target_"])[:80]
        yield f"{where}._target_={name}: not built from a checkpoint; see TRUSTED_TARGETS in targets.py"


def _of_user(said: DictConfig | None, where: str) -> Any:
    try:
        return None if said is None else OmegaConf.select(said, where)
    except OmegaConfBaseException:  # a key of the checkpoint that is no key of ours
        return None


def _is_trusted(name: Any, group: str) -> bool:
    """Whether `name` is one of `TRUSTED_TARGETS`, and where it is an alias what it stands for is one too."""
    names = TRUSTED_TARGETS.get(group, ())
    if not isinstance(name, str) or not all(map(str.isidentifier, name.split("."))):
        return False
    if not any(name == each or (each.endswith(".") and name.startswith(each)) for each in names):
        return False
    try:
        target = locate(name)
    except ConfigError:
        return True  # which `_problems` explains
    home, own = str(getattr(target, "__module__", "")), str(getattr(target, "__qualname__", ""))
    full = f"{home}.{own}"
    if full in names:
        return True
    if "." in own or not any(each.endswith(".") and full.startswith(each) for each in names):
        return False
    if not inspect.isclass(target):
        return full.startswith(PURE) and not own.startswith("_")
    bases = {f"{base.__module__}.{base.__qualname__}" for base in target.__mro__}
    return not bases.isdisjoint(BASES[group])


def _without_target(plain: Mapping[Any, Any]) -> Iterator[str]:
    for group in filter(plain.__contains__, SUPPLIED):
        parts = {group: plain[group]}
        if group in ("compression", "callbacks", "logger") and isinstance(plain[group], dict):
            parts = {f"{group}.{name}": node for name, node in parts[group].items()}
        yield from (where for where, node in parts.items() if not isinstance(node, dict) or "_target_" not in node)


def _problems(node: Any, where: str) -> Iterator[str]:
    if isinstance(node, list):
        for place, child in enumerate(node):
            yield from _problems(child, f"{where}[{place}]")
    if not isinstance(node, dict):
        return
    for key, child in node.items():
        yield from _problems(child, f"{where}.{key}")
    if "_target_" not in node:
        return
    try:
        target = locate(str(node["_target_"]))
    except ConfigError as error:
        yield f"{where}._target_={node['_target_']}: {error}"
        return
    if not callable(target):
        yield f"{where}._target_={node['_target_']}: neither a class nor a function, so there is nothing to build"
        return
    yield from _argument_problems(target, node, where)


def _argument_problems(target: Any, node: Mapping[str, Any], where: str) -> Iterator[str]:
    supplied = SUPPLIED.get(where.partition(".")[0], frozenset())
    parameters = inspect.signature(target).parameters
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in node.items():
        if key in KEYWORDS:
            continue
        if key in supplied:
            yield f"{where}.{key}={value}: comes from the run itself and cannot be set"
        elif value == "???":
            yield f"{where}.{key}: needs a value, there is no default; say {where}.{key}=VALUE"
        elif key not in parameters and not open_ended:
            names = [name for name in parameters if name not in supplied]
            yield f"{where}.{key}: no such key{nearest(key, names)}; {node['_target_']} takes {', '.join(names)}"
        elif not _contains_target(value):
            reason = _mismatch(value, hints.get(key, Any)) or _mismatch(value, RANGES.get(key, Any))
            if reason:
                yield f"{where}.{key}={'null' if value is None else value}: {reason}"
    if node.get("_partial_"):
        return
    for name, parameter in parameters.items():
        optional = parameter.default is not parameter.empty or parameter.kind.name.startswith("VAR")
        if not optional and name not in node and name not in supplied:
            yield f"{where}.{name}: missing; {node['_target_']} needs it"


def _contains_target(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(map(_contains_target, value.values()))
    return isinstance(value, list) and any(map(_contains_target, value))


def _mismatch(value: Any, annotation: Any) -> str | None:
    """Why `value` is not of this type or outside its range, or None; YAML lists stand for any sequence."""
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUserError):
        return None
    try:
        adapter.validate_json(json.dumps(value), strict=True)  # in JSON a list may be a tuple; "3" is no number
    except ValidationError as error:
        reasons = dict.fromkeys(
            str(problem["msg"]) for problem in error.errors() if "instance of" not in problem["msg"]
        )
        return (
            " or ".join(reasons).lower().replace("input should be", "should be").replace("a valid array", "a list")
            or "wrong type"
        )
    return None


def locate(target: str) -> Any:
    """The object that a dotted name stands for.

    Raises:
        ConfigError: nothing has that name; the message offers the nearest one that exists.
    """
    parts = target.split(".")
    for split in range(len(parts), 0, -1):
        name = ".".join(parts[:split])
        try:
            found = import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise ConfigError(f"needs the package {error.name}, which is not installed") from error
            continue
        for attribute in parts[split:]:
            if not hasattr(found, attribute):
                names = [word for word in dir(found) if not word.startswith("_")]
                raise ConfigError(f"nothing has this name{_nearest_in(found, attribute, names)}")
            found = getattr(found, attribute)
        return found
    raise ConfigError(f"there is no package {parts[0]}")


def _nearest_in(owner: Any, attribute: str, names: list[str]) -> str:
    names += [module.name for module in pkgutil.iter_modules(getattr(owner, "__path__", []))]
    close = get_close_matches(attribute, names, n=1, cutoff=0.5)
    return f"; did you mean {owner.__name__}.{close[0]}?" if close else ""

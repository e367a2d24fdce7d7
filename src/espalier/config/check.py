"""Find the object that a `_target_` names, and check the arguments beside it against its signature.

A signature is the schema: names, types and ranges are compared before anything is built. This is the first place that
imports torch and Lightning, after the configuration has composed.
"""

import inspect
import json
import math
import pkgutil
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated, Any, get_type_hints

from annotated_types import Gt, Le, Lt
from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from espalier.config.hints import advice
from espalier.config.ranges import INT64, Count, Index, Limit, NonNegative, Positive, Rate, Share
from espalier.errors import ConfigError

# Arguments that the program itself supplies, so that no size or path is configured twice.
SUPPLIED: dict[str, frozenset[str]] = {
    "data": frozenset({"seed"}),
    "model": frozenset({"input_shape", "inputs", "num_outputs"}),
    "learner": frozenset({"model", "spec", "optimizer", "scheduler", "seed"}),
    "optimizer": frozenset({"params"}),
    "scheduler": frozenset({"optimizer", "step", "total_steps", "mode"}),
    "compression": frozenset({"spec", "seed", "samples", "loss", "latency_ms", "network"}),
    "callbacks": frozenset({"monitor", "mode", "dirpath"}),
    "logger": frozenset({"folder", "run_name", "resumed_step"}),
    "trainer": frozenset({"callbacks", "logger", "plugins", "default_root_dir", "enable_checkpointing"}),
    "task": frozenset({"run"}),
}
# Of these arguments a user may choose one in place of the run; null leaves it to the run.
MAY_CHOOSE = {"lightning.pytorch.callbacks.early_stopping.EarlyStopping": frozenset({"monitor"})}
# Ranges of arguments that belong to other libraries, whose signatures state a type at most.
Batches = Index | Share | None  # how many, or which share of them
PartShare = Annotated[float, Gt(0), Le(1)]
Momentum = Annotated[float, Gt(0), Lt(1)]
RANGES: dict[str, Any] = {
    "callbacks.min_delta": NonNegative,
    "callbacks.patience": Index,
    "callbacks.save_top_k": Limit,
    "optimizer.betas": tuple[Rate, Rate],
    "optimizer.eps": NonNegative | tuple[NonNegative | None, NonNegative] | None,
    "optimizer.lr": Positive,
    "optimizer.momentum": Rate,
    "optimizer.weight_decay": NonNegative,
    "scheduler.cooldown": Index,
    "scheduler.factor": Momentum,
    "scheduler.patience": Index,
    "trainer.accumulate_grad_batches": Count,
    "trainer.check_val_every_n_epoch": Count | None,
    "trainer.gradient_clip_val": NonNegative | None,
    "trainer.limit_test_batches": Batches,
    "trainer.limit_train_batches": Batches,
    "trainer.limit_val_batches": Batches,
    "trainer.log_every_n_steps": Count,
    "trainer.max_epochs": Limit | None,
    "trainer.max_steps": Limit,
    "trainer.num_nodes": Count,
    "trainer.overfit_batches": Batches,
    "trainer.val_check_interval": Count | PartShare | None,
}
# Callbacks of Lightning that cannot do here what they promise, with what can. By name: to import them takes seconds.
UNFIT: dict[str, str] = {
    "BackboneFinetuning": "no learner here has a backbone; use source=RUN with a smaller optimizer.lr",
    "BatchSizeFinder": "data.batch_size decides order and schedule; try several: -m data.batch_size=64,128,256",
    "GradientAccumulationScheduler": "a schedule needs the number of steps; use trainer.accumulate_grad_batches",
    "LearningRateFinder": "the schedule takes its rate from optimizer.lr; try several: -m optimizer.lr=1e-3,3e-3,1e-2",
    "ModelSummary": "callbacks=[summary] takes its place",
    "ProgressBar": "callbacks=[progress] takes its place",
    "StochasticWeightAveraging": "its average would be in no checkpoint; use callbacks=[default,ema]",
}
KEYWORDS = frozenset({"_target_", "_partial_", "_convert_", "_recursive_", "_args_"})


def check(cfg: DictConfig) -> None:
    """Raise `ConfigError` with one line for everything in `cfg` that cannot be built; build nothing.

    Every `_target_` must resolve, accept its keys, and get values of the types and ranges that its signature states.
    """
    check_plain(OmegaConf.to_container(cfg, resolve=True))


def check_plain(plain: Any) -> None:
    """Raise `ConfigError` as `check` does, for a configuration in plain types."""
    assert isinstance(plain, dict)
    problems = [problem for group, node in plain.items() for problem in _problems(node, str(group))]
    told = {problem.partition("=")[0] for problem in problems}
    problems += [line for where, line in _wrong_values(plain) if where not in told]
    problems += [f"{where}._target_: missing, so there is nothing to build" for where in _without_target(plain)]
    if problems:
        raise ConfigError(*problems)


def _without_target(plain: Mapping[Any, Any]) -> Iterator[str]:
    for group in filter(plain.__contains__, SUPPLIED):
        parts = {group: plain[group]}
        if group in ("compression", "callbacks", "logger") and isinstance(plain[group], dict):
            parts = {f"{group}.{name}": node for name, node in parts[group].items()}
        yield from (where for where, node in parts.items() if not isinstance(node, dict) or "_target_" not in node)


def _wrong_values(node: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield the key and the line of each value that no checkpoint can store or no part can use."""
    if isinstance(node, dict):
        for key, child in node.items():
            if not isinstance(key, str):
                yield where, f"{where}={node}: the key {key} has to be a word, as in '{key}': {child}"
            yield from _wrong_values(child, f"{where}.{key}".lstrip("."))
    elif isinstance(node, list):
        for place, child in enumerate(node):
            yield from _wrong_values(child, f"{where}[{place}]")
    elif isinstance(node, int) and abs(node) > INT64:
        yield where, f"{where}={node}: should be between -{INT64} and {INT64}"
    elif isinstance(node, float) and math.isnan(node):
        yield where, f"{where}={node}: should be a number"


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
    if where.startswith("callbacks.") and (advice := _unfit(target)):
        yield f"{where}: {target.__name__} does not fit: {advice}"
        return
    yield from _argument_problems(target, node, where)


def _unfit(target: Any) -> str | None:
    """Return what to use in place of a callback of Lightning that does not work here, or None."""
    bases = [base for base in getattr(target, "__mro__", ()) if base.__module__.startswith("lightning.")]
    return next((UNFIT[base.__name__] for base in bases if base.__name__ in UNFIT), None)


def _argument_problems(target: Any, node: Mapping[str, Any], where: str) -> Iterator[str]:
    group = where.partition(".")[0]
    supplied = SUPPLIED.get(group, frozenset())
    may_choose = MAY_CHOOSE.get(str(node["_target_"]), frozenset())
    parameters = inspect.signature(target).parameters
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in node.items():
        if key in KEYWORDS or (key in may_choose and value is None):
            continue
        if key in supplied - may_choose:
            yield f"{where}.{key}={value}: comes from the run itself and cannot be set"
        elif value == "???":
            yield f"{where}.{key}: needs a value, there is no default; say {where}.{key}=VALUE"
        elif key not in parameters and not open_ended:
            names = [name for name in parameters if name not in supplied]
            hint = advice(f"{where}.{key}", names)
            yield f"{where}.{key}: no such key{hint}; {node['_target_']} takes {', '.join(names)}"
        elif not _contains_target(value):
            reason = _mismatch(value, hints.get(key, Any)) or _mismatch(value, RANGES.get(f"{group}.{key}", Any))
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
    """Return why `value` is not of this type or outside its range, or None; a YAML list may stand for any sequence."""
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
        ).replace("less than inf", "finite")
    return None


def locate(target: str) -> Any:
    """Return the object that a dotted name stands for.

    Raises:
        ConfigError: nothing has that name; the message offers the nearest name that exists.
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

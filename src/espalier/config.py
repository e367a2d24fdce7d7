"""From command-line words to a configuration that can be built, or to one clear line per problem.

`compose` turns overrides into a config; what it cannot compose, `diagnose` explains. `check` then compares every
`_target_` with its signature. Torch and Lightning are imported by `check` alone, after the config has composed.
"""

import inspect
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from espalier.catalog import CONF, groups
from espalier.errors import ConfigError
from espalier.ranges import Count, Index, NonNegative, Positive, Rate

# Arguments that the program itself supplies, so that no size or path is configured twice.
SUPPLIED: dict[str, frozenset[str]] = {
    "data": frozenset({"seed"}),
    "model": frozenset({"input_shape", "num_outputs"}),
    "learner": frozenset({"model", "spec", "optimizer", "scheduler", "seed"}),
    "optimizer": frozenset({"params"}),
    "scheduler": frozenset({"optimizer", "step", "total_steps", "mode"}),
    "callbacks": frozenset({"monitor", "mode", "dirpath"}),
    "logger": frozenset({"folder", "run_name"}),
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
NOT_COMPOSED = (HydraException, OmegaConfBaseException, ValueError)  # what composing raises
KEYWORDS = frozenset({"_target_", "_partial_", "_convert_", "_recursive_", "_args_"})
# A config that came out of a checkpoint is untrusted: nothing else is ever built from it.
TRUSTED_TARGETS = (
    "espalier.",
    "torch.optim.",
    "lightning.pytorch.trainer.trainer.Trainer",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.strategies.",
)


@dataclass
class RunConfig:
    """The closed top level of a configuration."""

    seed: int = 0
    source: str | None = None
    resume: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    learner: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(name="schema", node=RunConfig)
OmegaConf.register_new_resolver("short_id", lambda: secrets.token_hex(3), use_cache=True, replace=True)


def compose(overrides: Sequence[str] = (), *, with_hydra: bool = False) -> DictConfig:
    """The configuration that these command-line words describe.

    Raises:
        ConfigError: one line per override that does not fit.
    """
    try:
        return _compose(overrides, with_hydra)
    except NOT_COMPOSED as error:
        raise ConfigError(*diagnose(overrides, error)) from error


def _compose(overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="espalier"):
        return hydra_compose("config", list(overrides), return_hydra_config=with_hydra)


def diagnose(overrides: Sequence[str], error: Exception) -> list[str]:
    """One line for each override that does not compose with the good ones before it."""
    good: list[str] = []
    problems: list[str] = []
    for text in sorted(overrides, key=lambda text: "." in text.partition("=")[0]):  # groups decide which keys exist
        try:
            _compose([*good, text])
            good.append(text)
        except NOT_COMPOSED as why:
            problems.append(_explain(text, good, why))
    return problems or [str(error).splitlines()[0]]


def _explain(text: str, good: Sequence[str], why: Exception) -> str:
    if isinstance(why, OverrideParseException):
        return f"{text}: not of the form KEY=VALUE"
    override = OverridesParser.create().parse_override(text)
    key = str(override.key_or_group)
    if isinstance(why, MissingConfigException) and key in groups():
        options = groups()[key]
        missing = (why.missing_cfg_file or "").removeprefix(f"{key}/")
        hint = nearest(missing, options)
        return f"{key}={missing or override.value()}: no such option{hint}; {key} can be {', '.join(options)}"
    if key in groups() and override.value() is None:
        return f"{text}: null is no option; {key} can be {', '.join(groups()[key])}"
    known = [*groups(), *keys(_compose(good))]
    if key not in known:
        return f"{key}: no such key{nearest(key, known)}"
    return f"{text}: {_first_sentence(why)}"


def _first_sentence(error: BaseException) -> str:
    """The innermost reason: Hydra wraps what OmegaConf has to say."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0]


def nearest(word: str, names: Sequence[str]) -> str:
    """`; did you mean X?`, or nothing where no name is close."""
    last = word.rpartition(".")[2]
    by_last = {name.rpartition(".")[2]: name for name in names}
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    close = close or [by_last[name] for name in get_close_matches(last, list(by_last), n=1, cutoff=0.6)]
    return f"; did you mean {close[0]}?" if close else ""


def keys(node: Any, where: str = "") -> Iterator[str]:
    """Every key of a composed config by its dotted name, parents first."""
    for name in node:
        key = f"{where}{name}"
        yield key
        if OmegaConf.is_dict(node) and not OmegaConf.is_missing(node, name) and OmegaConf.is_dict(node[name]):
            yield from keys(node[name], f"{key}.")


def parse(overrides: Sequence[str]) -> list[Override]:
    """Command-line words as Hydra reads them.

    Raises:
        ConfigError: a word is not KEY=VALUE.
    """
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise ConfigError(f"{error.override}: not of the form KEY=VALUE") from error


def trials(overrides: Sequence[str]) -> list[list[str]]:
    """For each value of each swept word, one list of plain overrides that contains it; no full product."""
    parsed = parse(overrides)
    choices = [list(word.sweep_string_iterator()) if word.is_sweep_override() else None for word in parsed]
    if any(choice is None and word.is_sweep_override() for choice, word in zip(choices, parsed, strict=True)):
        raise AssertionError("every sweep lists its values")
    plain = [
        f"{word.get_key_element()}={choice[0]}" if choice else str(word.input_line)
        for word, choice in zip(parsed, choices, strict=True)
    ]
    found = [plain]
    for place, (word, choice) in enumerate(zip(parsed, choices, strict=True)):
        for value in (choice or [])[1:]:
            found.append([*plain[:place], f"{word.get_key_element()}={value}", *plain[place + 1 :]])
    return found


def check(cfg: DictConfig, *, untrusted: bool = False) -> None:
    """Raise `ConfigError` with one line for everything in `cfg` that cannot be built; build nothing.

    Every `_target_` must resolve, accept its keys, and get values of the types and ranges its signature states.
    `untrusted` configs, those that came out of a checkpoint, may name only `TRUSTED_TARGETS` and interpolate nothing.
    """
    plain = OmegaConf.to_container(cfg, resolve=not untrusted)
    assert isinstance(plain, dict)
    problems = [problem for group, node in plain.items() for problem in _problems(node, str(group), untrusted)]
    problems += [f"{where}._target_: missing, so there is nothing to build" for where in _without_target(plain)]
    if problems:
        raise ConfigError(*problems)


def _without_target(plain: Mapping[Any, Any]) -> Iterator[str]:
    for group in filter(plain.__contains__, SUPPLIED):
        parts = {group: plain[group]}
        if group in ("callbacks", "logger"):
            parts = {f"{group}.{name}": node for name, node in plain[group].items()}
        yield from (where for where, node in parts.items() if not isinstance(node, dict) or "_target_" not in node)


def _problems(node: Any, where: str, untrusted: bool) -> Iterator[str]:
    if isinstance(node, list):
        for place, child in enumerate(node):
            yield from _problems(child, f"{where}[{place}]", untrusted)
    if untrusted and isinstance(node, str) and "${" in node:
        yield f"{where}={node}: a checkpoint may not interpolate"
    if not isinstance(node, dict):
        return
    for key, child in node.items():
        yield from _problems(child, f"{where}.{key}", untrusted)
    if "_target_" not in node:
        return
    if untrusted and not str(node["_target_"]).startswith(TRUSTED_TARGETS):
        yield f"{where}._target_={node['_target_']}: not built from a checkpoint; see TRUSTED_TARGETS in config.py"
        return
    try:
        target = locate(str(node["_target_"]))
    except ConfigError as error:
        yield f"{where}._target_={node['_target_']}: {error}"
        return
    if not callable(target):
        yield f"{where}._target_={node['_target_']}: neither a class nor a function, so there is nothing to build"
        return
    if untrusted and not f"{target.__module__}.{target.__qualname__}".startswith(TRUSTED_TARGETS):
        yield f"{where}._target_={node['_target_']}: borrowed from {target.__module__}; not built from a checkpoint"
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
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUserError):
        return None
    try:
        adapter.validate_json(_json(value), strict=True)  # in strict JSON mode a list is a tuple, and "3" is no number
    except ValidationError as error:
        reasons = dict.fromkeys(
            str(problem["msg"]) for problem in error.errors() if "instance of" not in problem["msg"]
        )
        return (
            " or ".join(reasons).lower().replace("input should be", "should be").replace("a valid array", "a list")
            or "wrong type"
        )
    return None


def _json(value: Any) -> str:
    import json

    return json.dumps(value)


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
    import pkgutil

    names += [module.name for module in pkgutil.iter_modules(getattr(owner, "__path__", []))]
    close = get_close_matches(attribute, names, n=1, cutoff=0.5)
    return f"; did you mean {owner.__name__}.{close[0]}?" if close else ""

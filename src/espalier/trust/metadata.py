"""Check that what a checkpoint says about itself is plain values, of bounded size and of the expected types.

`torch.load` has kept code out. The rest may still do harm: nest without end, name files to be deleted, or be of types
that the next line of code does not expect. Nothing here is built or imported from a name; `targets.py` judges those.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espalier.config.overrides import typed
from espalier.errors import ConfigError
from espalier.spec import DataSpec

MAX_DEPTH = 64
MAX_PARTS = 5_000_000  # of a whole checkpoint
MAX_WORDS = 100_000  # of configuration and history
MAX_TEXT = 100_000  # letters of one text in them
INSTANTIATOR = "_instantiator"  # under hyper_parameters: Lightning imports and calls what it names
OF_CALLBACK = ("best_model_path", "last_model_path", "kth_best_model_path")  # files that may be deleted later
STATE = {
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
LEAVES = re.compile(r".*::|\w[\w+.-]*://|(.*[\\/])?\.\.([\\/]|$)", re.DOTALL)


def require_credible(key: str, path: Path, content: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if the metadata of a checkpoint, read from `path`, are not as espalier writes them.

    `content` has the entries `espalier`, a dictionary, and `state_dict`; the message starts with `key`.
    """
    _require(key, path, _problems(content, path.stat().st_size))


def require_described(key: str, path: Path, config: Any, spec: Any, history: Any) -> None:
    """Raise `ConfigError` if the metadata of a bundle are not as espalier writes them; `path` is its folder."""
    _require(key, path, _problems_of_words(config, spec, history))


def _require(key: str, path: Path, problems: Iterator[str]) -> None:
    try:
        problem = next(problems, None)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{key}={path}: not used, its description is wrong: {_first_line(error)}") from error
    if problem:
        raise ConfigError(f"{key}={path}: not used, {problem}")


def require_state(key: str, path: Path, content: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if the checkpoint holds no state of a training that can be resumed."""
    wrong = [name for name, kind in STATE.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise ConfigError(
            f"{key}={path}: holds no {wrong[0]}, so nothing goes on from it; start anew with {typed('source', path)}"
        )


def _problems(content: Mapping[str, Any], size_bytes: int) -> Iterator[str]:
    for part in _parts(content, MAX_PARTS):
        if isinstance(part, Tensor) and (part.layout != torch.strided or part.nbytes > size_bytes):
            yield "it holds a tensor that is larger than the file"
    described = content["espalier"]
    yield from _problems_of_words(described["config"], described["spec"], described.get("compression", []))
    weights = content["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        yield "its state_dict is no dictionary of names"
    if not all(isinstance(value, Tensor) for value in weights.values()):
        yield "its state_dict holds more than tensors"
    parameters = content.get("hyper_parameters")
    if isinstance(parameters, dict) and INSTANTIATOR in parameters:
        yield f"it names {INSTANTIATOR}, a function to be called, which espalier never writes"
    if not _is_validation(content.get("validation")):
        yield "what it says of its validation is no metric"
    callbacks = content.get("callbacks", {})
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        yield from (
            f"it names the file {name[:80]!r}, outside of its folder" for name in _files(state) if _leaves(name)
        )


def _problems_of_words(config: Any, spec: Any, history: Any) -> Iterator[str]:
    if not isinstance(config, dict) or not _is_plain(config):
        yield "its configuration is no tree of plain values"
    if not isinstance(history, list) or not _is_plain(history) or not all(map(_is_entry, history)):
        yield "its history of compression is no list of methods"
    DataSpec.from_dict(spec)


def _parts(tree: Any, limit: int) -> Iterator[Any]:
    """Yield everything in nested dictionaries, lists and tuples.

    Raises:
        ValueError: it is too deep or too large, as a structure that contains itself is.
    """
    level, depth = [tree], 0
    while level:
        yield from level
        limit, depth = limit - len(level), depth + 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        below: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                below += [*part.keys(), *part.values()]
            elif isinstance(part, list | tuple | set | frozenset):
                below += part
            if len(below) > limit:
                raise ValueError("more parts than any checkpoint has")
        level = below


def _is_plain(tree: Any) -> bool:
    return all(
        part is None
        or isinstance(part, bool | float | list | tuple)
        or (isinstance(part, int) and abs(part) < 2**63)
        or (isinstance(part, str) and len(part) <= MAX_TEXT)
        or (isinstance(part, dict) and all(isinstance(name, str) for name in part))
        for part in _parts(tree, MAX_WORDS)
    )


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("method"), str) and entry["method"].isidentifier()


def _is_validation(said: Any) -> bool:
    if said is None:
        return True
    if not isinstance(said, dict) or not isinstance(said.get("step"), int) or not isinstance(said.get("metrics"), dict):
        return False
    is_named = isinstance(said.get("monitor"), str) and said["monitor"] in said["metrics"]
    return is_named and all(isinstance(value, float) for value in said["metrics"].values())


def _files(state: Any) -> Iterator[str]:
    """Yield the file names in the state of a callback that keeps checkpoints."""
    if isinstance(state, dict):
        models = state.get("best_k_models")
        replaced = state.get("replaced")
        names = [*(state.get(name) for name in OF_CALLBACK), *(models if isinstance(models, dict) else ())]
        names += replaced if isinstance(replaced, list) else []
        yield from (name for name in names if isinstance(name, str))


def _leaves(name: str) -> bool:
    """Return whether the name leads out of the run folder; Lightning would delete the file that it names."""
    return LEAVES.match(name) is not None


def _first_line(error: Exception) -> str:
    missing = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
    return (missing.splitlines() or [type(error).__name__])[0][:200]

"""The one way to plug something in: a file in a package, which holds one class that keeps the contract of the package.

The contract is an abstract class on `Plugin`. A file is found by listing the folder, and its name is the name that
users type; what its class lacks is said when the file is imported.
"""

import inspect
from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from types import FunctionType, ModuleType
from typing import Any, ClassVar, Literal, TypeVar, get_origin

from pydantic import GetCoreSchemaHandler

from espalier.errors import ConfigError

Kind = TypeVar("Kind", bound="Plugin")


class Plugin(ABC):  # noqa: B024, its contracts have abstract methods
    """The base of a contract: members have to define its abstract methods and the `ClassVar`s that have no value.

    A class that declares an abstract method of its own is a contract, or a part of one, and may be incomplete.
    """

    guide: ClassVar[str] = "docs/forking.md"  # the page that shows how to add a member

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if any(map(_is_abstract, vars(cls).values())):
            return
        name = f"{cls.__module__}.{cls.__qualname__}"
        if missing := list(dict.fromkeys(_missing(cls))):
            raise ConfigError(f"{name} has no {' and no '.join(missing)}; see {cls.guide}")
        for method, given, wanted in _mismatches(cls):
            raise ConfigError(f"{name}.{method} takes {given}, not {wanted}; see {cls.guide}")


def _is_abstract(value: Any) -> bool:
    return bool(getattr(value, "__isabstractmethod__", False))


def _contracts(cls: type[Plugin]) -> Iterator[type[Plugin]]:
    """Return the contracts that `cls` inherits from, the most general first."""
    yield from (base for base in reversed(cls.__mro__[1:]) if issubclass(base, Plugin))


def _is_class_variable(annotation: Any) -> bool:
    origin: Any = get_origin(annotation)
    return origin is ClassVar


def _missing(cls: type[Plugin]) -> Iterator[str]:
    for base in _contracts(cls):
        named = [name for name, kind in inspect.get_annotations(base).items() if _is_class_variable(kind)]
        yield from (name for name in named if not hasattr(cls, name))
        methods = [name for name, value in vars(base).items() if _is_abstract(value)]
        yield from (name for name in methods if _is_abstract(getattr(cls, name)))


def _mismatches(cls: type[Plugin]) -> Iterator[tuple[str, str, str]]:
    """Yield the methods that cannot be called as the contract says, with the arguments of both."""
    for base in _contracts(cls):
        for name, value in vars(base).items():
            is_method = isinstance(value, FunctionType | staticmethod) and not name.startswith("_")
            if not is_method or name not in vars(cls):
                continue
            wanted, given = inspect.signature(getattr(base, name)), inspect.signature(getattr(cls, name))
            try:
                given.bind(*wanted.parameters)
            except TypeError:
                yield name, _arguments(given), _arguments(wanted)


def _arguments(signature: inspect.Signature) -> str:
    return f"({', '.join(signature.parameters)})"


def files(package: ModuleType) -> list[str]:
    """Return the names of the files of a package, in alphabetical order."""
    return sorted(found.name for found in iter_modules(package.__path__))


def member(package: ModuleType, contract: type[Kind], name: str) -> type[Kind] | None:
    """Return the plugin class in the file `name` of a package, or None if there is no such file or class.

    Raises:
        ConfigError: the class is incomplete, there are several, or a package that the file imports is missing.
    """
    if name not in files(package):
        return None
    path = f"{package.__name__}.{name}"
    try:
        file = import_module(path)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{path}: needs the package {error.name}, which is not installed; import it inside the methods that use it"
        ) from error
    own = {kind for kind in vars(file).values() if _is_member(kind, contract) and kind.__module__ == path}
    if len(own) > 1:
        raise ConfigError(
            f"{path}: holds {' and '.join(sorted(kind.__name__ for kind in own))}; give each a file of its own"
        )
    return own.pop() if own else None


def _is_member(value: Any, contract: type[Plugin]) -> bool:
    return isinstance(value, type) and issubclass(value, contract) and not inspect.isabstract(value)


def members(package: ModuleType, contract: type[Kind]) -> dict[str, type[Kind]]:
    """Return the plugin classes of all files of a package, by the names of the files."""
    found = {name: member(package, contract, name) for name in files(package)}
    return {name: kind for name, kind in found.items() if kind is not None}


@dataclass(frozen=True)
class OneOf:
    """A type for a setting that takes one of the names known at run time: `Annotated[str, OneOf(names)]`."""

    names: Callable[[], Sequence[str]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler.generate_schema(Literal[tuple(self.names())])

"""The contract of compression methods, the order in which they compose, and the history of applied steps.

A method is one file of this package, which holds one subclass of `Compression`. `replay` and `finalize` are static, so
that a checkpoint is read without its data, its teacher or the library that chose the channels. An entry of the history
is `{"method": file name, ...}` with plain values, so a checkpoint can hold it. `docs/compression_methods.md` shows how
to add one.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Literal

import lightning as L
from torch import nn

from espalier import compression
from espalier.config import plugins
from espalier.config.hints import nearest
from espalier.data.loaders import Batch
from espalier.errors import ConfigError
from espalier.spec import Entry

Samples = Callable[[int], Batch]  # that many training samples, not augmented, the same on each rank and each call


class Stage(IntEnum):
    """The place of a method in a recipe; a later stage builds on the result of an earlier one."""

    STRUCTURE = 0  # fewer channels, factorised layers: other shapes
    MASK = 1  # zeros that stay zero
    DISTILL = 2  # another loss
    QUANTIZE = 3  # other numbers


@dataclass(frozen=True)
class Conversion:
    """Says how a runtime's own tool quantizes the exported float graph, where torch cannot express the operators."""

    kind: Literal["dynamic", "weight_only"]  # activations quantized at run time, or not at all
    bits: int  # of a weight
    block: int = 0  # weights that share a scale; 0: one scale per output channel
    skip: tuple[str, ...] = ()  # modules that stay float


class Compression(L.Callback, plugins.Plugin):
    """One method of a recipe, as a callback of the fit that carries it out.

    `setup` changes the structure, before the optimizer is built and before DDP wraps the network: on the first rank,
    and by `replay` on the others, which get their weights from the first one when DDP wraps. A resumed run replays its
    history instead, so nothing is chosen twice.
    """

    guide: ClassVar[str] = "docs/compression_methods.md"
    stage: ClassVar[Stage]  # the place of the method in a recipe
    trains: ClassVar[bool] = True  # False: applied to the trained network, after the fit
    history: list[Entry]  # of the run, which sets it
    is_applied = False  # a resumed run has replayed it already

    @property
    def method(self) -> str:
        """Return the name of the file and of the option, such as `prune_channels`."""
        return type(self).__module__.rpartition(".")[2]

    def require(self, model: nn.Module) -> None:
        """Raise `ConfigError` if this method has nothing to do on this network; called before anything is written."""

    @abstractmethod
    def apply(self, model: nn.Module) -> tuple[nn.Module, Entry]:
        """Change the network; return the new module, and the plain values from which `replay` repeats the change.

        Called once, on the CPU; `method` is added to the entry by the caller.
        """

    @staticmethod
    @abstractmethod
    def replay(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
        """Give a fresh network the structure of the compressed one, in place or not; the caller loads weights next."""

    @staticmethod
    @abstractmethod
    def finalize(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
        """Return the deployable network: masks folded, adapters gone, quantizers converted."""

    @staticmethod
    def conversion(entry: Mapping[str, Any]) -> Conversion | None:
        """Return the quantization that the exporter has to do, or None."""
        return None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self.is_applied or not self.trains:
            return
        is_first, model = trainer.is_global_zero, pl_module.model
        assert isinstance(model, nn.Module)
        entry: Entry = {}
        problem = None
        if is_first:
            try:
                model, entry = self.apply_to(model)
            except ConfigError as error:
                problem = str(error)
        entry, problem = trainer.strategy.broadcast((entry, problem))
        if problem:  # on every rank, so that none waits for the first
            raise ConfigError(problem)
        pl_module.model = model if is_first else replay(model, [entry])
        self.history.append(entry)
        self.is_applied = True

    def apply_to(self, model: nn.Module) -> tuple[nn.Module, Entry]:
        """Return the result of `apply`, with the method's name added to the history entry."""
        model, entry = self.apply(model)
        return model, {"method": self.method, **entry}


def require_modules(names: Iterable[str], model: nn.Module, key: str) -> None:
    """Raise `ConfigError` if a name is not that of a module of this network."""
    modules = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in modules:
            raise ConfigError(f"{key}={name}: no module of this network{nearest(name, modules)}")


def is_inside(path: str, names: Iterable[str]) -> bool:
    """Return whether a module is one of these or a part of one."""
    return any(path == name or path.startswith(f"{name}.") for name in names)


def replay(model: nn.Module, history: Iterable[Mapping[str, Any]]) -> nn.Module:
    """Return a fresh model with the structure that the history describes; the caller loads weights next.

    Raises:
        ConfigError: the history names a method that this version does not have, or belongs to another architecture.
    """
    for entry in history:
        try:
            model = method_named(str(entry["method"])).replay(model, entry)
        except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"compression {entry.get('method')}: does not fit this architecture ({reason})"
            ) from error
    return model


def finalize(model: nn.Module, history: Iterable[Mapping[str, Any]]) -> nn.Module:
    """Return the deployable network, in evaluation mode."""
    model.eval()
    for entry in history:
        model = method_named(str(entry["method"])).finalize(model, entry)
    return model.eval()


def without_teacher(model: nn.Module, history: Iterable[Entry]) -> tuple[nn.Module, list[Entry]]:
    """Return the history without distillations, which leave nothing in a network but its weights."""
    kept: list[Entry] = []
    for entry in history:
        if stage_of(entry["method"]) == Stage.DISTILL:
            model = method_named(entry["method"]).finalize(model, entry)
        else:
            kept.append(entry)
    return model, kept


def check_recipe(recipe: Sequence[str], history: Iterable[Mapping[str, Any]]) -> None:
    """Raise `ConfigError` unless the methods may follow each other, and the methods of the source, in this order."""
    words = f"compression=[{','.join(recipe)}]"
    stages = {method: stage_of(method) for method in recipe}
    right = sorted(recipe, key=stages.__getitem__)
    if list(recipe) != right:
        raise ConfigError(
            f"{words}: structure comes first, then masks, distillation and quantization; "
            f"say compression=[{','.join(right)}]"
        )
    for stage in (Stage.MASK, Stage.DISTILL, Stage.QUANTIZE):
        rivals = [method for method in recipe if stages[method] == stage]
        if len(rivals) > 1:
            raise ConfigError(f"{words}: {' and '.join(rivals)} exclude each other; choose one")
    done = {str(entry["method"]): stage_of(str(entry["method"])) for entry in history}
    limit, latest = max(
        ((stage, method) for method, stage in done.items() if stage != Stage.DISTILL), default=(Stage.STRUCTURE, "")
    )
    late = [method for method in recipe if stages[method] < limit or stages[method] == limit == Stage.QUANTIZE]
    if late:
        raise ConfigError(
            f"{words}: source went through {latest} already and {late[0]} has its place before that; "
            "start from the run that this source came from"
        )


def methods() -> list[str]:
    """Return the names of all methods, in the order of their stages."""
    found = plugins.members(compression, Compression)  # type: ignore[type-abstract]
    return sorted(found, key=lambda name: found[name].stage)


def stage_of(method: str) -> Stage:
    """Return the place of a method in a recipe."""
    return method_named(method).stage


def is_quantized(history: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether one of the steps was a quantization."""
    return any(stage_of(str(entry["method"])) == Stage.QUANTIZE for entry in history)


def conversion(history: Iterable[Mapping[str, Any]]) -> Conversion | None:
    """Return the quantization that the exporter has to do for this network, or None if `finalize` did everything."""
    for entry in history:
        if (found := method_named(str(entry["method"])).conversion(entry)) is not None:
            return found
    return None


def method_named(name: str) -> type[Compression]:
    """Return the class of a method.

    The name may come out of a checkpoint, so only files of this package are imported.

    Raises:
        ConfigError: there is no such method, or its class is incomplete.
    """
    found = plugins.member(compression, Compression, name)  # type: ignore[type-abstract]
    if found is None:
        raise ConfigError(f"compression {name}: no such method in this version of espalier")
    return found

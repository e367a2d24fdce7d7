"""What every method of explanation promises.

A method is one file of this package. It explains one sample at a time, so that its map depends on nothing but the
network, the sample, the class and the setting, and the perturbed copies of that sample make the batches:

    PACKAGE                                     the module it computes with, of the extra `explain`
    BY_DEFAULT                                  whether it is among those that nobody named
    explain(model, x, target, setting) -> map   how much each value of x added to output `target` of the network
    prepare(model, x, setting) -> Setting       optional: what has to be known of a network; ConfigError: does not fit
    reference(model, target, setting) -> float  optional: what the map's sum and this add up to is the output

x has the shape of one sample and lies on the device of the model, which is in evaluation mode. A map is (H, W) for
images, summed over channels, and (F,) for tables. Letters: N samples, C channels, H height, W width, F features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from espalier import explain
from espalier.config.hints import nearest
from espalier.data.transforms import Normalise
from espalier.errors import ConfigError, require
from espalier.spec import DataSpec

EXTRA = "explain"
PIECES_PER_SIDE = 8  # of an image: 64 pieces are few enough for shap and lime and still show a shape


@dataclass(frozen=True)
class Setting:
    """The choices of a user, and what the data contribute."""

    baseline: Tensor  # of the shape of a sample: what a value becomes when it is taken away
    background: Tensor  # (N, *shape): training samples
    patch: int  # pixels a side of what is taken away together; a table always loses one feature at a time
    layer: str | None  # of grad_cam; None: chosen by `prepare`
    steps: int  # on the path of integrated_gradients
    copies: int  # noisy ones, of smooth_grad
    noise: float  # of smooth_grad: standard deviation as a share of the range of the sample
    evaluations: int  # perturbed samples of shap and lime
    batch_size: int  # of one forward pass
    seed: int


def methods() -> list[str]:
    """Names of all methods, those of the default first."""
    names = [module.name for module in iter_modules(explain.__path__)]
    found = [name for name in names if hasattr(_file_of(name), "BY_DEFAULT")]
    return sorted(found, key=lambda name: (not is_default(name), name))


def chosen(names: Sequence[str] | None) -> list[str]:
    """Return these methods, each once; of None those of the default.

    Raises:
        ConfigError: one is no method, or its package is not installed.
    """
    found = [name for name in methods() if is_default(name)] if names is None else list(dict.fromkeys(names))
    check(found)
    return found


def check(names: Sequence[str]) -> None:
    """Raise `ConfigError` unless all of these are methods whose packages are installed."""
    key = f"task.method=[{','.join(names)}]"
    if not names:
        raise ConfigError(f"{key}: nothing to do; name some of {', '.join(methods())}")
    for name in names:
        if name not in methods():
            near = nearest(name, methods())
            raise ConfigError(f"{key}: no method {name}{near}; there are {', '.join(methods())}")
        try:
            require(_file_of(name).PACKAGE, EXTRA)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None


def is_default(name: str) -> bool:
    """Whether the method is used where nobody named one."""
    return bool(_file_of(name).BY_DEFAULT)


def prepare(name: str, model: nn.Module, x: Tensor, setting: Setting) -> Setting:
    """Return the setting with what the method has to know of this network.

    Raises:
        ConfigError: the method does not fit it.
    """
    of_method = getattr(_file_of(name), "prepare", None)
    return setting if of_method is None else of_method(model, x, setting)


def fitting(
    names: Sequence[str], model: nn.Module, x: Tensor, setting: Setting, must_fit: bool
) -> tuple[dict[str, Setting], list[str]]:
    """Each method that fits the network with what it has to know of it; remarks on those that do not fit.

    Raises:
        ConfigError: a method does not fit although it must.
    """
    settings: dict[str, Setting] = {}
    notes = []
    for name in names:
        try:
            settings[name] = prepare(name, model, x, setting)
        except ConfigError as error:
            if must_fit:
                raise
            notes.append(f"{name} left out: {str(error).partition(': ')[2]}")
    return settings, notes + [f"{name} looks at {each.layer}" for name, each in settings.items() if each != setting]


def attribute(name: str, model: nn.Module, x: Tensor, target: int, setting: Setting) -> Tensor:
    """Return the map of one sample, float32 on the CPU."""
    explain_one: Callable[[nn.Module, Tensor, int, Setting], Tensor] = _file_of(name).explain
    return explain_one(model, x, target, setting).detach().float().cpu()


def reference(name: str, model: nn.Module, target: int, setting: Setting) -> float | None:
    """Return the output that the sum of a map starts from; None for a method that promises no sum."""
    of_method = getattr(_file_of(name), "reference", None)
    return None if of_method is None else float(of_method(model, target, setting))


@torch.no_grad()
def scores(model: nn.Module, x_N: Tensor, target: int, batch_size: int) -> Tensor:
    """Output `target` of the network for samples (N, *shape); (N,)."""
    return torch.cat([model(x_B)[:, target] for x_B in x_N.split(batch_size)])


def by_position(attribution: Tensor) -> Tensor:
    """(C, H, W) summed over channels, so that the total stays what it was; features as they are."""
    return attribution.sum(dim=0) if attribution.ndim == 3 else attribution


def default_patch(shape: Sequence[int]) -> int:
    """Return an eighth of the longer side of an image, at least one pixel; 1 for a table."""
    return max(1, -(-max(shape[1:]) // PIECES_PER_SIDE)) if len(shape) == 3 else 1


def piece_width(spec: DataSpec, patch: int | None) -> int:
    """Pixels a side of what is taken away together.

    Raises:
        ConfigError: more than the image has, or no image.
    """
    if patch is None:
        return default_patch(spec.shape)
    if not spec.is_image:
        raise ConfigError(f"task.patch={patch}: {spec.name} is a table and loses one feature at a time; say null")
    if patch > min(spec.shape[1:]):
        raise ConfigError(f"task.patch={patch}: images are {spec.shape[1]} x {spec.shape[2]} pixels; choose fewer")
    return patch


def without_content(spec: DataSpec, baseline: Literal["mean", "zero"]) -> Tensor:
    """Return a normalised sample: raw zeros, or the mean of the training samples, which is 0 by definition."""
    mean = torch.zeros(spec.shape)
    return mean if baseline == "mean" else Normalise(spec, torch.device("cpu"))(mean)


def pieces(shape: Sequence[int], patch: int) -> Tensor:
    """Which piece each position belongs to, counted from 0: squares of an image (H, W), one piece per feature (F,)."""
    if len(shape) != 3:
        return torch.arange(shape[0])
    height, width = shape[1:]
    row_H, column_W = torch.arange(height) // patch, torch.arange(width) // patch
    return row_H[:, None] * (int(column_W[-1]) + 1) + column_W


def spread(value_P: Tensor, piece: Tensor) -> Tensor:
    """Return a map from one value per piece: each position gets an equal part, so that the total stays."""
    size_P = piece.flatten().bincount()
    return (value_P / size_P)[piece]


@cache
def _file_of(name: str) -> ModuleType:
    return import_module(f"{explain.__name__}.{name}")

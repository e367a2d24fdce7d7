"""The contract of explanation methods.

A method is one file of this package, which holds one subclass of `Explainer`. It explains one sample at a time, so that
its map depends on nothing but the network, the sample, the class and the setting. The perturbed copies of that sample
make the batches.

x has the shape of one sample and lies on the device of the model, which is in evaluation mode. A map is (H, W) for
images, summed over channels, and (F,) for tables. Letters: N samples, C channels, H height, W width, F features.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier import explain
from espalier.config import plugins
from espalier.config.hints import nearest
from espalier.data.transforms import Normalise
from espalier.errors import ConfigError, require
from espalier.spec import DataSpec

EXTRA = "explain"
PIECES_PER_SIDE = 8  # of an image: 64 pieces are few enough for shap and lime and still show a shape


@dataclass(frozen=True)
class Setting:
    """The settings of a method: the choices of the user, and values taken from the data."""

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


class Explainer(plugins.Plugin):
    """A method of explanation; it has no state, so it is made anew for each call."""

    guide: ClassVar[str] = "docs/explanation.md"
    package: ClassVar[str] = "torch"  # the module it computes with, of the extra `explain`
    by_default: ClassVar[bool] = False  # whether it is among those that nobody named

    @abstractmethod
    def explain(self, model: nn.Module, x: Tensor, target: int, setting: Setting) -> Tensor:
        """Return how much each position of x added to output `target` of the network: (H, W) or (F,)."""

    def prepare(self, model: nn.Module, x: Tensor, setting: Setting) -> Setting:
        """Return the setting with what the method needs to know of the network, such as a layer.

        Raises:
            ConfigError: the method does not fit the network.
        """
        return setting

    def reference(self, model: nn.Module, target: int, setting: Setting) -> float | None:
        """Return the value that the sum of a map has to be added to for the output; None if maps have no such sum."""
        return None


def methods() -> list[str]:
    """Return the names of all methods, those that run by default first."""
    found = plugins.members(explain, Explainer)  # type: ignore[type-abstract]
    return sorted(found, key=lambda name: (not found[name].by_default, name))


def method_named(name: str) -> Explainer:
    """Return a method.

    Raises:
        ConfigError: there is no such method, or its class is incomplete.
    """
    found = plugins.member(explain, Explainer, name)  # type: ignore[type-abstract]
    if found is None:
        raise ConfigError(f"task.method=[{name}]: no method {name}{nearest(name, methods())}")
    return found()


def chosen(names: Sequence[str] | None) -> list[str]:
    """Return the named methods, each once, or the default ones for None.

    Raises:
        ConfigError: a name is no method, or its package is not installed.
    """
    defaults = (name for name in methods() if method_named(name).by_default)
    found = list(dict.fromkeys(defaults if names is None else names))
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
            require(method_named(name).package, EXTRA)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None


def fitting(
    names: Sequence[str], model: nn.Module, x: Tensor, setting: Setting, must_fit: bool
) -> tuple[dict[str, Setting], list[str]]:
    """Return the settings of each method that fits the network, and a remark on each that does not.

    Raises:
        ConfigError: a method does not fit and `must_fit` is true.
    """
    settings: dict[str, Setting] = {}
    notes = []
    for name in names:
        try:
            settings[name] = method_named(name).prepare(model, x, setting)
        except ConfigError as error:
            if must_fit:
                raise
            notes.append(f"{name} left out: {str(error).partition(': ')[2]}")
    return settings, notes + [f"{name} looks at {each.layer}" for name, each in settings.items() if each != setting]


def attribute(name: str, model: nn.Module, x: Tensor, target: int, setting: Setting) -> Tensor:
    """Return the map of one sample, float32 on the CPU."""
    return method_named(name).explain(model, x, target, setting).detach().float().cpu()


@torch.no_grad()
def scores(model: nn.Module, x_N: Tensor, target: int, batch_size: int) -> Tensor:
    """Return output `target` of the network for samples (N, *shape); shape (N,)."""
    return torch.cat([model(x_B)[:, target] for x_B in x_N.split(batch_size)])


def by_position(attribution: Tensor) -> Tensor:
    """Return an attribution (C, H, W) summed over channels, which keeps the total; that of features stays as it is."""
    return attribution.sum(dim=0) if attribution.ndim == 3 else attribution


def require_explained(spec: DataSpec) -> None:
    """Raise `ConfigError` if the methods know no maps of such samples."""
    if not spec.is_plain:
        kinds = " and ".join(each.kind for each in spec.inputs)
        raise ConfigError(
            f"data {spec.name}: samples are {kinds}, and explain makes maps of images and tables alone; "
            "for texts ask a server: espalier serve source=BUNDLE, /explain"
        )


def default_patch(shape: Sequence[int]) -> int:
    """Return an eighth of the longer side of an image, at least one pixel; 1 for a table."""
    return max(1, -(-max(shape[1:]) // PIECES_PER_SIDE)) if len(shape) == 3 else 1


def piece_width(spec: DataSpec, patch: int | None) -> int:
    """Return the side in pixels of the square that is removed at once; for a table, the default.

    Raises:
        ConfigError: `patch` is larger than the image, or the data are a table.
    """
    if patch is None:
        return default_patch(spec.shape)
    if not spec.is_image:
        raise ConfigError(f"task.patch={patch}: {spec.name} is a table and loses one feature at a time; say null")
    if patch > min(spec.shape[1:]):
        raise ConfigError(f"task.patch={patch}: images are {spec.shape[1]} x {spec.shape[2]} pixels; choose fewer")
    return patch


def without_content(spec: DataSpec, baseline: Literal["mean", "zero"]) -> Tensor:
    """Return the baseline: raw zeros, normalised, or the mean of the training samples, which is 0 when normalised."""
    mean = torch.zeros(spec.shape)
    return mean if baseline == "mean" else Normalise(spec, torch.device("cpu"))(mean)


def pieces(shape: Sequence[int], patch: int) -> Tensor:
    """Return the number of the piece that each position is in: squares of an image (H, W), single features (F,)."""
    if len(shape) != 3:
        return torch.arange(shape[0])
    height, width = shape[1:]
    row_H, column_W = torch.arange(height) // patch, torch.arange(width) // patch
    return row_H[:, None] * (int(column_W[-1]) + 1) + column_W


def spread(value_P: Tensor, piece: Tensor) -> Tensor:
    """Return a map from one value per piece: each position of a piece gets an equal part of its value."""
    size_P = piece.flatten().bincount()
    return (value_P / size_P)[piece]

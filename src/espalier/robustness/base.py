"""What every harm to samples promises: a corruption, which happens by chance, or an attack, which is made on purpose.

A harm is one file of this package, which holds one subclass of `Corruption` or of `Attack`. It is a pure function of a
batch, a severity from 1 to 5 and the setting; what is random is keyed by the seed and the index of the sample, so that
a sample is harmed alike in any batch. Images are pixels in [0, 1]; features of tables count in standard deviations of
the training samples, from their mean. `docs/evaluation.md` shows how to add one.
Letters: B batch, C channels, H height, W width.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from espalier import robustness
from espalier.config import plugins
from espalier.config.plugins import OneOf
from espalier.data.loaders import Batch
from espalier.errors import ConfigError
from espalier.spec import DataSpec

Loss = Callable[[Tensor, Tensor], Tensor]  # samples (B, ...) and targets (B,) to a scalar
Range = tuple[float, float]  # what a value may be

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE = 64  # pixels of the shorter side; below, CIFAR-10-C's strengths stand for ImageNet-C's
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of an attack's largest change, per severity: 1, 2, 4, 8 and 16 of 255


@dataclass(frozen=True)
class Kind:
    """The limits and the usual change of a kind of samples, in the unit in which they are harmed."""

    limits: Range  # of a value
    epsilon: float  # the largest change of a value by an attack, where nobody says another


KINDS = {
    # 16 levels of 8 bits are the largest change of Kurakin et al. 2016, arxiv.org/abs/1611.01236
    "images": Kind(limits=(0.0, 1.0), epsilon=16 / 255),
    "tables": Kind(limits=(-float("inf"), float("inf")), epsilon=0.5),  # no benchmark states any
}


@dataclass(frozen=True)
class Setting:
    """Everything that is the same for all batches."""

    kind: str  # of the samples, of `KINDS`
    seed: int
    largest: float | None = None  # change of a value by an attack at severity 5; None: the usual one
    loss: Loss | None = None  # of the network, for attacks alone

    @property
    def limits(self) -> Range:
        return KINDS[self.kind].limits

    def epsilon(self, severity: int) -> float:
        """Return the change that an attack may make at a severity from 1 to 5."""
        return (KINDS[self.kind].epsilon if self.largest is None else self.largest) * SHARES[severity - 1]


class Harm(plugins.Plugin):
    """A way to make samples worse; it holds nothing, so it is made anew for each call."""

    guide: ClassVar[str] = "docs/evaluation.md"
    applies_to: ClassVar[Collection[str]]  # of `KINDS`: samples to which it does something sensible

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if unknown := [kind for kind in getattr(cls, "applies_to", ()) if kind not in KINDS]:
            name = f"{cls.__module__}.{cls.__qualname__}"
            raise ConfigError(f"{name}.applies_to holds {unknown[0]}, not {' or '.join(KINDS)}; see {cls.guide}")

    @abstractmethod
    def harm(self, batch: Batch, severity: int, setting: Setting) -> Tensor:
        """Return the samples made worse, in the shape and within the limits that they have."""


class Corruption(Harm):
    """A harm that happens to samples by chance, outside the laboratory."""

    @abstractmethod
    def corrupt(self, x: Tensor, index_B: Tensor, severity: int, setting: Setting) -> Tensor:
        """Return the samples (B, ...) made worse, within `setting.limits`; a higher severity changes them more."""

    def harm(self, batch: Batch, severity: int, setting: Setting) -> Tensor:
        return self.corrupt(batch.x, batch.index, severity, setting)


class Attack(Harm):
    """The change within a largest one per value (L-infinity) by which a network errs, found along its gradient."""

    applies_to: ClassVar[Collection[str]] = tuple(KINDS)

    @abstractmethod
    def attack(self, loss: Loss, batch: Batch, epsilon: float, setting: Setting) -> Tensor:
        """Return samples with a higher loss, no value further than `epsilon` away or outside of `setting.limits`."""

    def harm(self, batch: Batch, severity: int, setting: Setting) -> Tensor:
        assert setting.loss is not None
        return self.attack(setting.loss, batch, setting.epsilon(severity), setting)


def names() -> list[str]:
    """Return the names of all harms, attacks last."""
    found = plugins.members(robustness, Harm)  # type: ignore[type-abstract]
    return sorted(found, key=lambda name: (issubclass(found[name], Attack), name))


def named(name: str) -> Harm:
    """Return a harm.

    Raises:
        ConfigError: there is no such harm, or its class is incomplete.
    """
    found = plugins.member(robustness, Harm, name)  # type: ignore[type-abstract]
    if found is None:
        raise ConfigError(f"task.robustness=[{name}]: no such harm; there are {', '.join(names())}")
    return found()


Name = Annotated[str, OneOf(names)]  # of a harm, as a setting


def attacks(chosen: Sequence[str]) -> list[str]:
    """Return those of these names that are attacks."""
    return [name for name in chosen if isinstance(named(name), Attack)]


def kind_of(spec: DataSpec) -> str:
    """Return which of `KINDS` the samples are, or another word where nothing can be harmed so."""
    if not spec.is_plain:
        return " and ".join(each.kind for each in spec.inputs)
    return "images" if spec.is_image else "tables"


def require_applicable(key: str, chosen: Sequence[str], spec: DataSpec) -> None:
    """Raise `ConfigError` if one of these does nothing sensible to such samples, or is there twice."""
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"{key}=[{','.join(chosen)}]: one is listed twice; once is enough")
    kind = kind_of(spec)
    if wrong := [name for name in chosen if kind not in named(name).applies_to]:
        able = ", ".join(name for name in names() if kind in named(name).applies_to) or "nothing yet, so say []"
        raise ConfigError(
            f"{key}=[{','.join(wrong)}]: {spec.name} holds {kind}, which cannot be harmed so; {kind} take {able}"
        )


def strength(x_BCHW: Tensor, severity: int, small: Sequence[float], large: Sequence[float]) -> float:
    """Return one of five numbers, for images of this size: CIFAR-10-C's are `small`, ImageNet-C's `large`.

    Hendrycks and Dietterich 2019, arxiv.org/abs/1903.12261; their code has the numbers, in make_cifar_c.py and
    make_imagenet_c.py of github.com/hendrycks/robustness.
    """
    return (small if is_small(x_BCHW) else large)[severity - 1]


def is_small(x_BCHW: Tensor) -> bool:
    """Return whether images have the size of CIFAR-10-C rather than of ImageNet-C."""
    return min(x_BCHW.shape[2:]) < SMALL_SIDE


def gradient(loss: Loss, x: Tensor, y_B: Tensor) -> Tensor:
    """Return the gradient of the loss with respect to the samples."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(loss(x, y_B), x)
    return found

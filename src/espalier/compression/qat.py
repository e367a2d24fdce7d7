"""Quantization-aware training: the network trains with its values rounded, so that it learns to do with 8 bits.

Jacob et al. 2017, arXiv 1712.05877. Rounding passes gradients on as if it were not there (Bengio et al. 2013, arXiv
1308.3432). Networks with convolutions are captured as a graph and get fixed ranges for all values (torchao PT2E).
Where only linear layers can be quantized, activations get their range at run time: nothing has to be observed, and the
modules stay what they are.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.compression.base import Compression, Conversion, Stage, is_inside, require_modules
from espalier.compression.graph_module import CapturedNet, capture
from espalier.compression.quantized_graph import convert, prepare
from espalier.compression.quantizer import MIN_SCALE, Target, make_quantizer
from espalier.config.ranges import Share
from espalier.errors import ConfigError
from espalier.signature import of_entry, to_entry
from espalier.spec import DataSpec, Entry

Mode = Literal["static", "dynamic"]  # ranges of activations: fixed beforehand, or found at run time

BITS = 8
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class EightBits(Compression):
    """The common part of `qat` and `ptq`, which differ in when the ranges are found."""

    stage: ClassVar[Stage] = Stage.QUANTIZE

    @abstractmethod
    def apply(self, model: nn.Module) -> tuple[nn.Module, Entry]:
        """Change the network, as `Compression.apply` does."""

    @staticmethod
    def replay(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
        """Return the network that rounds: a `CapturedNet` if its ranges are fixed beforehand."""
        if entry["mode"] == "static":
            return prepare(capture(model, of_entry(entry)), make_quantizer(entry["target"], entry["skip"]))
        for _, layer in layers(model, entry["skip"]):
            if type(layer) is nn.Linear:  # subclasses belong to modules that do not call them
                layer.__class__ = RoundedLinear
        return model

    @staticmethod
    def finalize(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
        """Return a network of integers if ranges are fixed, or of plain linear layers if the runtime quantizes."""
        if isinstance(model, CapturedNet):
            return convert(model)
        for layer in model.modules():
            if type(layer) is RoundedLinear:
                layer.__class__ = nn.Linear  # type: ignore[assignment]
        return model

    @staticmethod
    def conversion(entry: Mapping[str, Any]) -> Conversion | None:
        """Leave quantization to ONNX Runtime's own tool if ranges are found at run time."""
        return Conversion("dynamic", BITS, skip=tuple(entry["skip"])) if entry["mode"] == "dynamic" else None


class QAT(EightBits):
    """Rounds weights and activations from the first step on.

    Ranges follow the values until the share `observe` of the run, batch-norm statistics until the share `statistics`;
    then the network trains as it will be deployed.
    """

    def __init__(self, target: Target, observe: Share, statistics: Share, skip: Sequence[str], spec: DataSpec) -> None:
        self.target = target
        self.observe = observe
        self.statistics = statistics
        self.skip = tuple(skip)
        self.spec = spec

    def require(self, model: nn.Module) -> None:
        check_skip(model, self.method, self.skip)

    def apply(self, model: nn.Module) -> tuple[nn.Module, Entry]:
        mode = natural_mode(model, self.target)
        entry = make_entry(mode, self.target, self.skip, self.spec)
        return self.replay(model, entry), entry

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total_steps = trainer.estimated_stepping_batches
        self.observed_steps = self.observe * total_steps
        self.counted_steps = self.statistics * total_steps

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        model = pl_module.model
        if isinstance(model, CapturedNet):
            step = trainer.global_step
            model.frozen_observers = step >= self.observed_steps
            model.frozen_statistics = step >= self.counted_steps


class RoundedLinear(nn.Linear):
    """A linear layer that computes with 8-bit values; it is the same object as before, with its names and masks."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(round_inputs(x), round_weight(self.weight), self.bias)


def round_inputs(x_BX: Tensor) -> Tensor:
    """Return inputs rounded, each sample to 256 equally spaced values from its minimum to its maximum, 0 among them.

    ONNX Runtime does the same with a batch of one (operator DynamicQuantizeLinear).
    """
    low_B, high_B = x_BX.detach().float().flatten(1).aminmax(dim=1)
    low_B, high_B = low_B.clamp(max=0), high_B.clamp(min=0)
    scale_B = ((high_B - low_B) / 255).clamp(min=MIN_SCALE)
    zero_B = (-low_B / scale_B).round().int()
    return torch.fake_quantize_per_channel_affine(x_BX, scale_B, zero_B, 0, 0, 255)


def round_weight(weight_NK: Tensor) -> Tensor:
    """Return weights rounded, each row to 255 equally spaced values between minus and plus its largest magnitude."""
    scale_N = (weight_NK.detach().float().abs().amax(1) / 127).clamp(min=MIN_SCALE)
    zero_N = torch.zeros_like(scale_N, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight_NK, scale_N, zero_N, 0, -127, 127)


def natural_mode(model: nn.Module, target: Target) -> Mode:
    """Return `dynamic` for ONNX Runtime and a network whose only convolutions cut images into patches, or `static`."""
    return "static" if target != "onnxruntime" or any(map(_overlaps, model.modules())) else "dynamic"


def make_entry(mode: Mode, target: Target, skip: Sequence[str], spec: DataSpec) -> Entry:
    """Return all that `replay` needs, in plain values."""
    return {"mode": mode, "target": target, "skip": list(skip), **to_entry(spec)}


def check_skip(model: nn.Module, method: str, skip: Sequence[str]) -> None:
    """Raise `ConfigError` if a name in `skip` is no module, or if `skip` leaves nothing to quantize."""
    require_modules(skip, model, f"compression.{method}.skip")
    if not any(layers(model, skip)):
        raise ConfigError(
            f"compression.{method}.skip={','.join(skip)}: no linear layer or convolution is left to quantize"
        )


def layers(model: nn.Module, skip: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield linear layers and convolutions with their names, without those in the modules named `skip`."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)) and not is_inside(name, skip):
            yield name, module


def _overlaps(module: nn.Module) -> bool:
    """Return whether the module is a convolution that does more than apply a linear layer to separate patches."""
    return isinstance(module, CONVOLUTIONS) and (module.kernel_size != module.stride or max(module.kernel_size) == 1)

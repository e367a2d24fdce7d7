"""Weight-only quantization: 8 or 4 bits for the weights of linear layers, each block of a row with a scale of its own.

Each weight takes the nearest value of a grid: the baseline of Frantar et al. 2022, arXiv 2210.17323. The grid is the
one of ONNX Runtime's MatMulNBits, which keeps the weights packed in memory and decodes them as it multiplies, after it
has rounded the activations to 8 bits, block by block. torchao has the same idea, but what it makes exports as float
arithmetic on decoded weights, without such a kernel.

Where it is slower than float in the same runtime, on one thread of a Xeon with VNNI, 8 bits in blocks of 32: one sample
takes an MLP of width 64 1.3 times as long, a ViT of width 64 1.2 times, of width 192 1.1 times; of width 512 both take
about half as long. In batches of 32 narrow networks take 1.2 to 1.9 times as long and wide ones gain nothing. Integer
activations, the dynamic kind of `ptq`, are as fast or faster in all of these; only 4 bits are smaller.
Letters: N output features, K input features, J blocks of a row, B weights of a block.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.compression.base import Compression, Conversion, Stage, is_inside, require_modules
from espalier.errors import ConfigError
from espalier.profiling.cost import count_params
from espalier.spec import Entry

MIN_SHARE = 0.1  # of the parameters; a convolutional network's head is less, and the file would be as large as before


def encode(weight_NK: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Return codes (N, J, B) in [0, 2**bits) and scales (N, J) of a weight (N, K) cut into J blocks of B inputs.

    A last block that is not full is padded with zeros. A weight is `(code - 2**(bits - 1)) * scale`. The scale makes
    the largest magnitude of a block the lowest code, so encoding what was decoded gives the same codes and scales.
    """
    half = 2 ** (bits - 1)
    blocks_NJB = F.pad(weight_NK, (0, -weight_NK.shape[1] % block)).unflatten(1, (-1, block))
    largest_NJ1 = blocks_NJB.gather(2, blocks_NJB.abs().argmax(2, keepdim=True))
    scale_NJ1 = largest_NJ1 / -half
    steps_NJB = torch.where(scale_NJ1 == 0, 0, blocks_NJB / scale_NJ1).round().clamp(-half, half - 1)
    return (steps_NJB + half).to(torch.uint8), scale_NJ1.squeeze(2)


def decode(codes_NJB: Tensor, scale_NJ: Tensor, bits: int, num_inputs: int) -> Tensor:
    """Return the weights (N, K) that codes and scales of `encode` stand for."""
    steps_NJB = codes_NJB.to(scale_NJ.dtype) - 2 ** (bits - 1)
    return (steps_NJB * scale_NJ[:, :, None]).flatten(1)[:, :num_inputs]


class WeightOnly(Compression):
    """Rounds the weights of linear layers to the values that will be deployed; trains nothing, changes nothing else."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    trains: ClassVar[bool] = False

    def __init__(self, bits: Literal[4, 8], block: Literal[16, 32, 64, 128, 256], skip: Sequence[str]) -> None:
        super().__init__()
        self.bits = bits
        self.block = block
        self.skip = skip

    def require(self, model: nn.Module) -> None:
        require_modules(self.skip, model, "compression.weight_only.skip")
        num_weights = sum(layer.weight.numel() for layer in linear_layers(model, self.skip).values())
        num_params = count_params(model)
        if num_weights < MIN_SHARE * num_params:
            raise ConfigError(
                f"compression.weight_only.skip={list(self.skip)}: linear layers outside it hold "
                f"{num_weights / max(num_params, 1):.1%} of the parameters, less than {MIN_SHARE:.0%}; "
                "use compression=[ptq], or skip fewer"
            )

    @torch.no_grad()
    def apply(self, model: nn.Module) -> tuple[nn.Module, Entry]:
        for layer in linear_layers(model, self.skip).values():
            codes_NJB, scale_NJ = encode(layer.weight, self.bits, self.block)
            layer.weight.copy_(decode(codes_NJB, scale_NJ, self.bits, layer.in_features))
        return model, {"bits": self.bits, "block": self.block, "skip": list(self.skip)}

    @staticmethod
    def replay(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
        """Return the network itself; the rounded weights come with the checkpoint."""
        return model

    @staticmethod
    def finalize(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
        """Return the network with its rounded weights, in float: the exporter packs them."""
        return model

    @staticmethod
    def conversion(entry: Mapping[str, Any]) -> Conversion:
        """Have the exporter pack the weights of linear layers."""
        return Conversion("weight_only", entry["bits"], entry["block"], tuple(entry["skip"]))


def linear_layers(model: nn.Module, skip: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the linear layers by name, outside the modules in `skip`."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        if not is_inside(name, skip)
    }

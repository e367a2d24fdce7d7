"""Post-training quantization: 8 bits without training; the ranges of values come from a few training samples.

Where ranges are fixed, a range is the one that loses least of the histogram of the values seen, in mean square
(Krishnamoorthi 2018, arXiv 1806.08342, section 3.1; the search is torchao's). The network is the one that `qat` trains,
so the two differ in nothing but the training.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from espalier.compression.base import Samples
from espalier.compression.graph_module import CapturedNet
from espalier.compression.qat import EightBits, check_skip, layers, make_entry, natural_mode
from espalier.compression.quantized_graph import calibrate
from espalier.compression.quantizer import Target
from espalier.config.ranges import Count
from espalier.errors import ConfigError
from espalier.profiling.cost import count_params
from espalier.spec import DataSpec, Entry

MIN_LINEAR = 0.5  # of the parameters; a CNN with 16 % in linear layers gets 1.13 times smaller and no faster


class PTQ(EightBits):
    """Quantizes the trained network; `num_samples` samples calibrate the ranges of activations that are fixed."""

    trains: ClassVar[bool] = False

    def __init__(
        self,
        mode: Literal["auto", "static", "dynamic"],
        target: Target,
        num_samples: Count,
        skip: Sequence[str],
        spec: DataSpec,
        samples: Samples,
    ) -> None:
        self.mode = mode
        self.target = target
        self.num_samples = num_samples
        self.skip = tuple(skip)
        self.spec = spec
        self.samples = samples

    def require(self, model: nn.Module) -> None:
        check_skip(model, self.method, self.skip)
        if self.mode == "dynamic" and (share := linear_share(model, self.skip)) < MIN_LINEAR:
            raise ConfigError(
                f"compression.ptq.mode=dynamic: quantizes linear layers alone, and they hold {share:.1%} of the "
                f"parameters, less than {MIN_LINEAR:.0%}; use mode=static, which quantizes convolutions too"
            )

    def apply(self, model: nn.Module) -> tuple[nn.Module, Entry]:
        mode = natural_mode(model, self.target) if self.mode == "auto" else self.mode
        entry = make_entry(mode, self.target, self.skip, self.spec)
        model = self.replay(model, entry)
        if isinstance(model, CapturedNet):
            calibrate(model, self.samples(self.num_samples).inputs)
        return model, entry


def linear_share(model: nn.Module, skip: Sequence[str]) -> float:
    """Return the share of parameters that linear layers hold, among all layers and convolutions outside of `skip`."""
    sizes = {layer: count_params(layer) for _, layer in layers(model, skip)}
    return sum(size for layer, size in sizes.items() if isinstance(layer, nn.Linear)) / sum(sizes.values())

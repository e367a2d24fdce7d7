"""Low rank: a linear layer or convolution becomes two thinner ones, by a truncated singular value decomposition.

A matrix: Eckart and Young 1936, doi.org/10.1007/BF02288367. A convolution of k x l pixels becomes one of k x 1 and one
of 1 x l: Jaderberg et al. 2014, arXiv 1405.3866, scheme 2; closed form of Tai et al. 2015, arXiv 1511.06067, theorem 1.
At half the parameters of a trained ResNet-20 that loses 0.35 of the squared weights; k x l and then 1 x 1 (Zhang et al.
2015, arXiv 1505.06798) loses 0.39 and is no faster in ONNX Runtime.
Letters: O output and I input channels, K and L height and width of the kernel, R rank.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.nn.utils import skip_init

from espalier.compression.base import Compression, Stage, is_inside, require_modules
from espalier.config.ranges import Count
from espalier.errors import ConfigError
from espalier.profiling.cost import count_params
from espalier.spec import Entry

GRID = 1000  # shares of energy that the search for a budget of parameters tells apart

KeptShare = Annotated[float, Gt(0), Le(1)]
Layer = nn.Linear | nn.Conv2d


class LowRank(Compression):
    """Factorises, once before training, each layer that gets cheaper by it; the last layer stays whole.

    `keep` is the share of the singular values of each layer, of their squares (energy), or of all parameters of the
    network, which then get the same share of energy in each layer.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE

    def __init__(
        self, budget: Literal["rank", "energy", "params"], keep: KeptShare, round_to: Count, skip: Sequence[str]
    ) -> None:
        super().__init__()
        self.budget = budget
        self.keep = keep
        self.round_to = round_to
        self.skip = skip

    def require(self, model: nn.Module) -> None:
        require_modules(self.skip, model, "compression.low_rank.skip")
        if not factorisable(model, self.skip):
            raise ConfigError(
                f"compression.low_rank.skip={list(self.skip)}: leaves no linear or convolutional layer but the last; "
                "skip fewer, or use a deeper network"
            )

    def apply(self, model: nn.Module) -> tuple[nn.Module, Entry]:
        ranks = self._ranks(model)
        if not ranks:
            raise ConfigError(
                f"compression.low_rank.keep={self.keep}: no layer gets cheaper; use a smaller keep or round_to"
            )
        for path, rank in ranks.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, Layer)
            model.set_submodule(path, factorise(layer, rank))
        return model, {"ranks": ranks}

    @staticmethod
    def replay(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
        """Factorise the same layers; the caller loads their weights."""
        for path, rank in entry["ranks"].items():
            layer = model.get_submodule(path)
            if not isinstance(layer, Layer):
                raise ValueError(f"{path} is a {type(layer).__name__}, which cannot be factorised")
            model.set_submodule(path, two_layers(layer, rank))
        return model

    @staticmethod
    def finalize(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
        """Return the network itself: its layers are deployed as they are."""
        return model

    def _ranks(self, model: nn.Module) -> dict[str, int]:
        """Return the rank of each layer that will be factorised."""
        layers = factorisable(model, self.skip)
        spectra = {path: torch.linalg.svdvals(matrix(layer.weight.detach().double())) for path, layer in layers.items()}

        def ranks(energy: float) -> dict[str, int]:
            return self._cheaper(layers, {path: rank_of(spectrum, energy) for path, spectrum in spectra.items()})

        if self.budget == "rank":
            return self._cheaper(layers, {path: ceil(self.keep * len(values)) for path, values in spectra.items()})
        if self.budget == "energy":
            return ranks(self.keep)
        total = count_params(model)

        def share(energy: float) -> float:
            saved = (layers[path].weight.numel() - params(layers[path], rank) for path, rank in ranks(energy).items())
            return 1 - sum(saved) / total

        step = bisect_left(range(GRID + 1), True, key=lambda step: share(step / GRID) > self.keep) - 1
        if step < 0:
            raise ConfigError(
                f"compression.low_rank.keep={self.keep}: at least {share(0):.3f} of the parameters stay with these "
                "settings; use a larger keep, a smaller round_to, or skip fewer"
            )
        return ranks(step / GRID)

    def _cheaper(self, layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> dict[str, int]:
        """Return ranks rounded up to multiples of `round_to`, without the layers that would not become cheaper."""
        rounded = {path: self.round_to * ceil(max(1, rank) / self.round_to) for path, rank in ranks.items()}
        return {path: rank for path, rank in rounded.items() if is_cheaper(layers[path], rank)}


def factorisable(model: nn.Module, skip: Sequence[str]) -> dict[str, Layer]:
    """Return the linear layers and ungrouped convolutions by path, outside of `skip` and without the last layer."""
    kinds = (nn.Linear, nn.Conv2d)  # not subclasses: their forward may be another
    layers = {path: module for path, module in model.named_modules() if type(module) in kinds}
    last = next(reversed(layers), None)
    return {
        path: layer
        for path, layer in layers.items()
        if isinstance(layer, Layer) and path != last and getattr(layer, "groups", 1) == 1 and not is_inside(path, skip)
    }


def matrix(weight: Tensor) -> Tensor:
    """Return a weight (O, I) or (O, I, K, L) as a matrix (I * K, O * L), whose rank is that of the two layers."""
    weight_OIKL = weight.reshape(*weight.shape[:2], *(weight.shape[2:] or (1, 1)))
    return weight_OIKL.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def rank_of(spectrum: Tensor, energy: float) -> int:
    """Return the smallest number of singular values whose squares sum to the share `energy` of all; at least 1."""
    shares = spectrum.square().cumsum(0)
    return min(len(shares), 1 + int((shares < energy * shares[-1]).sum()))


@torch.no_grad()
def factorise(layer: Layer, rank: int) -> nn.Sequential:
    """Return two layers whose product is the best approximation of `layer` of this rank; exact at full rank.

    Each gets the square root of the singular values, so that both train at the same pace.
    """
    left, values, right = torch.linalg.svd(matrix(layer.weight.double()), full_matrices=False)
    root_R = values[:rank].sqrt()
    reduce_RIK, expand_ROL = (left[:, :rank] * root_R).T, root_R[:, None] * right[:rank]
    expand_ORL = expand_ROL.unflatten(1, (len(layer.weight), -1)).transpose(0, 1)
    layers = two_layers(layer, rank)
    weights = layers.state_dict()  # the tensors themselves
    weights["reduce.weight"].copy_(reduce_RIK.reshape(weights["reduce.weight"].shape))
    weights["expand.weight"].copy_(expand_ORL.reshape(weights["expand.weight"].shape))
    if layer.bias is not None:
        weights["expand.bias"].copy_(layer.bias)
    return layers.requires_grad_(layer.weight.requires_grad)


def two_layers(layer: Layer, rank: int) -> nn.Sequential:
    """Return `reduce` to `rank` channels followed by `expand` to the outputs of `layer`; weights are not set."""
    place = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    has_bias = layer.bias is not None
    reduce: nn.Module
    expand: nn.Module
    if isinstance(layer, nn.Linear):
        reduce = skip_init(nn.Linear, layer.in_features, rank, bias=False, **place)
        expand = skip_init(nn.Linear, rank, layer.out_features, bias=has_bias, **place)
    else:
        down, across = _axis(layer, 0), _axis(layer, 1)
        if layer.kernel_size[1] == 1:  # a stride across, if any, skips work in the first layer already
            down = {name: getattr(layer, name) for name in down}
            across = {"kernel_size": 1}
        place["padding_mode"] = layer.padding_mode
        reduce = skip_init(nn.Conv2d, layer.in_channels, rank, bias=False, **down, **place)
        expand = skip_init(nn.Conv2d, rank, layer.out_channels, bias=has_bias, **across, **place)
    return nn.Sequential(OrderedDict(reduce=reduce, expand=expand)).train(layer.training)


def params(layer: Layer, rank: int) -> int:
    """Return the number of weights of both layers, without bias."""
    return rank * sum(matrix(layer.weight).shape)


def is_cheaper(layer: Layer, rank: int) -> bool:
    """Return whether both layers together have fewer weights and fewer multiplications than `layer`."""
    rows, columns = matrix(layer.weight).shape
    stride = layer.stride[1] if isinstance(layer, nn.Conv2d) and layer.kernel_size[1] > 1 else 1
    return rank * (rows * stride + columns) < layer.weight.numel()  # the first layer sees the whole width


def _axis(layer: nn.Conv2d, axis: int) -> dict[str, Any]:
    """Return the arguments of a convolution that works along one axis as the original, and not along the other."""
    values: dict[str, Any] = {}
    for name, idle in {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}.items():
        value = getattr(layer, name)
        if isinstance(value, str):  # padding "same" or "valid"
            values[name] = value
        else:
            values[name] = (value[0], idle) if axis == 0 else (idle, value[1])
    return values

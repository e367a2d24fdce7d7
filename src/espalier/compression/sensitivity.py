"""Measure how much the loss grows when one layer at a time is pruned or quantized.

After Han et al. 2015, arXiv 1506.02626, figure 6. Nothing is trained, so the ranking is what counts, not the size.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from rich.progress import track
from torch import Tensor, nn

from espalier.compression.prune_magnitude import keep_mask
from espalier.data.loaders import Batch

NUM_SAMPLES = 1024  # of the training split; the ranking of layers settles far below
CHUNK = 128  # samples per forward pass
HALF = 0.5  # sparsity of a layer that is pruned in a scan
EPS = 1e-12  # smallest scale: a layer of zeros stays a layer of zeros

Disturb = Callable[[nn.Module], AbstractContextManager[None]]


@torch.no_grad()
def scan(
    model: nn.Module, samples: Batch, loss: Callable[[Tensor, Tensor], Tensor], disturb: Disturb
) -> dict[str, float]:
    """Return how much the mean loss grows when `disturb` is applied to one layer alone; the most sensitive layer first.

    The model is set to evaluation mode; its weights are unchanged afterwards.
    """
    model.eval()
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear)
    }
    undisturbed = _mean_loss(model, samples, loss)
    growth: dict[str, float] = {}
    for name, layer in track(layers.items(), "sensitivity", transient=True):
        with disturb(layer):
            growth[name] = _mean_loss(model, samples, loss) - undisturbed
    return dict(sorted(growth.items(), key=lambda part: -part[1]))


@contextmanager
def pruned(layer: nn.Module) -> Iterator[None]:
    """Set the smaller half of the layer's weights to zero inside the block."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    before = weight.detach().clone()
    weight.mul_(keep_mask(weight, HALF))
    try:
        yield
    finally:
        weight.copy_(before)


@contextmanager
def quantized(layer: nn.Module) -> Iterator[None]:
    """Round the layer inside the block as int8 runtimes do: weights per output channel, inputs per tensor."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    before = weight.detach().clone()
    weight.copy_(round_weight(weight))
    handle = layer.register_forward_pre_hook(lambda _, inputs: (_round_input(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
        weight.copy_(before)


def round_weight(weight: Tensor) -> Tensor:
    """Return weights rounded to 255 equally spaced values between minus and plus the largest of an output channel."""
    scale = (weight.abs().flatten(1).amax(1) / 127).clamp(min=EPS).view(-1, *[1] * (weight.ndim - 1))
    return (weight / scale).round() * scale


def _round_input(x: Tensor) -> Tensor:
    """Return values rounded to 256 equally spaced ones between the smallest and the largest, zero among them."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=EPS)
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def _mean_loss(model: nn.Module, samples: Batch, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    parts = samples.split(CHUNK)
    total = sum(float(loss(model(*part.inputs), part.y)) * len(part.y) for part in parts)
    return total / len(samples.y)

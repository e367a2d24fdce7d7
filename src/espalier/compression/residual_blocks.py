"""Residual blocks as a whole: which of them can go, and what misses them least."""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from espalier.compression.base import is_inside
from espalier.models.blocks import Residual


def removable(model: nn.Module, skip: Sequence[str]) -> list[str]:
    """Residual blocks that still are a map of the right shape without their branch, and hold nothing of `skip`."""
    return [
        path
        for path, block in model.named_modules()
        if isinstance(block, Residual) and isinstance(block.shortcut, nn.Identity)
        if not is_inside(path, skip) and not any(is_inside(name, [path]) for name in skip)
    ]


def least_missed(model: nn.Module, blocks: Sequence[str], num: int, loss: Callable[[nn.Module], float]) -> list[str]:
    """`num` blocks, one after the other that whose absence raises the loss least, in the order of the network."""
    trial = copy.deepcopy(model).eval()
    left = list(blocks)
    for _ in range(num):
        losses = {path: loss(drop(copy.deepcopy(trial), {path: True})) for path in left}
        first = min(left, key=losses.__getitem__)
        drop(trial, {first: True})
        left.remove(first)
    return [path for path in blocks if path not in left]


def drop(model: nn.Module, blocks: Mapping[str, bool]) -> nn.Module:
    """Leave of each residual block its activation, or not even that where the value is False; in place."""
    for path, keeps_activation in blocks.items():
        block = model.get_submodule(path)
        if not isinstance(block, Residual):
            raise ValueError(f"{path} is no residual block")
        model.set_submodule(path, block.act if keeps_activation else nn.Identity())
    return model


def needed_activations(model: nn.Module, blocks: Sequence[str], x: Tensor) -> dict[str, bool]:
    """Say whether the activation that is left of a block does anything: no ReLU does of what a ReLU returned."""
    trial = drop(copy.deepcopy(model).eval(), dict.fromkeys(blocks, True))
    outputs: list[Tensor] = []  # of ReLUs; kept alive, so that no other tensor is taken for one of them
    needed: dict[nn.Module, bool] = {}

    def see(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        needed[module] = not any(args[0] is seen for seen in outputs)
        outputs.append(output)

    for module in trial.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(see)
    with torch.no_grad():
        trial(x)
    left = {path: trial.get_submodule(path) for path in blocks}
    return {path: needed.get(module, not isinstance(module, nn.Identity)) for path, module in left.items()}

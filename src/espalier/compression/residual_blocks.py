"""Removal of whole residual blocks: which can go, and which are missed least."""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from espalier.compression.base import is_inside
from espalier.models.blocks import Residual


def removable(model: nn.Module, skip: Sequence[str]) -> list[str]:
    """Return the paths of residual blocks with an identity as shortcut and nothing of `skip` in them."""
    return [
        path
        for path, block in model.named_modules()
        if isinstance(block, Residual) and isinstance(block.shortcut, nn.Identity)
        if not is_inside(path, skip) and not any(is_inside(name, [path]) for name in skip)
    ]


def least_missed(model: nn.Module, blocks: Sequence[str], num: int, loss: Callable[[nn.Module], float]) -> list[str]:
    """Return `num` blocks in the order of the network, chosen one by one: next goes what raises the loss least."""
    trial = copy.deepcopy(model).eval()
    left = list(blocks)
    for _ in range(num):
        losses = {path: loss(drop(copy.deepcopy(trial), {path: True})) for path in left}
        first = min(left, key=losses.__getitem__)
        drop(trial, {first: True})
        left.remove(first)
    return [path for path in blocks if path not in left]


def drop(model: nn.Module, blocks: Mapping[str, bool]) -> nn.Module:
    """Replace residual blocks, in place, by their activation alone, or by nothing if the value is False."""
    for path, keeps_activation in blocks.items():
        block = model.get_submodule(path)
        if not isinstance(block, Residual):
            raise ValueError(f"{path} is no residual block")
        model.set_submodule(path, block.act if keeps_activation else nn.Identity())
    return model


def needed_activations(model: nn.Module, blocks: Sequence[str], inputs: Sequence[Tensor]) -> dict[str, bool]:
    """Return whether the activation left of each block changes anything: a ReLU after a ReLU does not."""
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
        trial(*inputs)
    left = {path: trial.get_submodule(path) for path in blocks}
    return {path: needed.get(module, not isinstance(module, nn.Identity)) for path, module in left.items()}

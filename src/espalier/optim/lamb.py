"""LAMB: Adam whose step in each layer is as long as the layer's weights, for very large batches.

You et al. 2020, algorithm 2 with phi the identity, arxiv.org/abs/1904.00962.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from espalier.config.ranges import NonNegative, Positive, Rate
from espalier.optim.groupwise import Groupwise


class Lamb(Groupwise):
    """Adam whose step is scaled by |w| / |update| for each matrix and kernel.

    Biases and norms take the plain Adam step: the authors' BERT training leaves them out as well, and the length of
    a bias, zero at first, says nothing about its layer.
    """

    def __init__(
        self, params: ParamsT, lr: Positive, betas: tuple[Rate, Rate], eps: Positive, weight_decay: NonNegative
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        means, squares, steps = self.running(params, "mean"), self.running(params, "square"), self.counted(params)
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)

        counts = [float(step) for step in steps]
        scales = torch._foreach_div(squares, [1 - beta2**count for count in counts])
        torch._foreach_sqrt_(scales)
        torch._foreach_add_(scales, group["eps"])
        updates = torch._foreach_div(means, [1 - beta1**count for count in counts])
        torch._foreach_div_(updates, scales)
        torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        for param, update in zip(params, updates, strict=True):
            if param.ndim >= 2:
                update.mul_(trust_ratio(param, update))
        torch._foreach_add_(params, updates, alpha=-group["lr"])


def trust_ratio(weight: Tensor, update: Tensor) -> Tensor:
    """Return |weight| / |update| in the L2 norm, 1 where either is zero; scalar, on the device."""
    weight_norm, update_norm = weight.norm(), update.norm()
    return torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)

"""Lion: every weight moves by the same length, in the direction of a momentum's sign.

Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, algorithm 2, arxiv.org/abs/2302.06675.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from espalier.config.ranges import NonNegative, Positive, Rate
from espalier.optim.groupwise import Groupwise


class Lion(Groupwise):
    """Moves each weight by the sign of a momentum; has half the state of Adam.

    It wants a learning rate 3 to 10 times smaller than Adam, and a weight decay as many times larger.
    """

    def __init__(self, params: ParamsT, lr: Positive, betas: tuple[Rate, Rate], weight_decay: NonNegative) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        look, keep = group["betas"]
        momenta = self.running(params, "momentum")
        directions = torch._foreach_lerp(momenta, grads, 1 - look)
        torch._foreach_sign_(directions)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, directions, alpha=-group["lr"])
        torch._foreach_lerp_(momenta, grads, 1 - keep)

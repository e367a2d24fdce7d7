"""Muon: the momentum of a hidden matrix is made orthogonal before it is applied; AdamW moves everything else.

Jordan et al. 2024, kellerjordan.github.io/posts/muon. The update is scaled to the typical length of one by AdamW
(Liu et al. 2025, section 2.2, arxiv.org/abs/2502.16982), so one learning rate and one weight decay serve both.

Letters: N matrices of one shape, R rows, C columns.
"""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from espalier.config.ranges import Count, NonNegative, Positive, Rate
from espalier.optim.groups import as_groups, split
from espalier.optim.groupwise import Groupwise

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al.: steep at 0, so small singular values reach 0.7..1.2 in 5 rounds
ADAMW_RMS = 0.2  # Liu et al.: root mean square of a typical AdamW update


class Muon(Groupwise):
    """Makes the momentum of hidden matrices orthogonal; kernels count as matrices (out, in * height * width).

    Each parameter group needs a flag `hidden`; `parameter_groups` makes such groups.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Positive,
        momentum: Rate,
        rounds: Count,
        betas: tuple[Rate, Rate],
        eps: Positive,
        weight_decay: NonNegative,
    ) -> None:
        settings = {"momentum": momentum, "rounds": rounds, "betas": betas, "eps": eps}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **settings})
        for group in self.param_groups:
            if not isinstance(group.get("hidden"), bool):
                raise ValueError("each group needs hidden=True or hidden=False; use Muon.parameter_groups(model, ...)")

    @staticmethod
    def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Return three groups: hidden matrices; first and last matrix in order of registration; the rest, undecayed.

        The first and the last layer meet data and classes, whose axes have a meaning: they are left to AdamW.
        """
        matrices, exempt = split(model)
        edges = matrices[:1] + matrices[1:][-1:]
        return as_groups(
            [
                (matrices[1:-1], {"hidden": True, "weight_decay": weight_decay}),
                (edges, {"hidden": False, "weight_decay": weight_decay}),
                (exempt, {"hidden": False, "weight_decay": 0.0}),
            ]
        )

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        if group["hidden"]:
            self._update_hidden(params, grads, group)
        else:
            self._update_others(params, grads, group)

    def _update_hidden(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        momenta = self.running(params, "momentum")
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        directions = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's look ahead
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        same_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for param, direction in zip(params, directions, strict=True):
            same_shape[param.shape].append((param, direction.flatten(1)))
        for pairs in same_shape.values():
            updates_NRC = orthogonal(torch.stack([direction for _, direction in pairs]), group["rounds"])
            scale = ADAMW_RMS * math.sqrt(max(updates_NRC.shape[1:]))
            for (param, _), update in zip(pairs, updates_NRC, strict=True):
                param.add_(update.view_as(param), alpha=-group["lr"] * scale)

    def _update_others(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads,
            self.running(params, "mean"),
            self.running(params, "square"),
            [],
            self.counted(params),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonal(matrix_NRC: Tensor, rounds: int) -> Tensor:
    """Return about U V^T of each matrix U S V^T: after 5 rounds the singular values lie between 0.7 and 1.2.

    A Newton-Schulz iteration needs matrix products alone; it runs in bfloat16 on a GPU.
    """
    low = matrix_NRC.bfloat16() if matrix_NRC.is_cuda else matrix_NRC.float()
    x = low.mT if low.shape[1] > low.shape[2] else low
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # a zero matrix stays zero
    a, b, c = QUINTIC
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.mT if low.shape[1] > low.shape[2] else x
    return x.to(matrix_NRC.dtype)

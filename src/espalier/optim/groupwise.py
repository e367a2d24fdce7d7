"""The common part of the optimizers: the closure, the loop over groups, state that is created when first needed."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Groupwise(Optimizer):
    """An optimizer whose step updates one parameter group after the other; state holds tensors only."""

    @abstractmethod
    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        """Move `params` in place, given their gradients and the settings of their group."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self.update(params, [param.grad for param in params], group)
        return loss

    def running(self, params: list[Tensor], name: str) -> list[Tensor]:
        """Return the running average `name` of each parameter, zero at first."""
        for param in params:
            if name not in self.state[param]:
                self.state[param][name] = torch.zeros_like(param)
        return [self.state[param][name] for param in params]

    def counted(self, params: list[Tensor]) -> list[Tensor]:
        """Return the number of updates of each parameter so far, kept on the CPU under the name torch expects."""
        for param in params:
            self.state[param].setdefault("step", torch.zeros(()))
        return [self.state[param]["step"] for param in params]

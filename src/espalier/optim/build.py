"""Build the optimizer of a model and its schedule from the partial that a configuration describes."""

import inspect
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adafactor, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from espalier.optim.groups import parameter_groups, trainable


def build_optimizer(factory: partial[Optimizer], model: nn.Module) -> Optimizer:
    """Return the optimizer over the trainable parameters of `model`, with weight decay on matrices and kernels alone.

    An optimizer class that treats parameters differently brings its own `parameter_groups` (see `muon.py`).
    `fused: true` falls back to the plain loop where torch has no fused kernel for a parameter.

    Raises:
        ValueError: nothing in the model is trainable, or torch's Adafactor would meet sharded parameters.
    """
    parameters = [parameter for _, parameter in trainable(model)]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient; unfreeze one, or use the task evaluate")
    if factory.func is Adafactor and any(hasattr(parameter, "device_mesh") for parameter in parameters):
        raise ValueError("optimizer=adafactor cannot step on sharded parameters; use optimizer=adamw or strategy=ddp")
    grouping = getattr(factory.func, "parameter_groups", parameter_groups)
    groups = grouping(model, _weight_decay(factory))
    if not factory.keywords.get("fused"):
        return factory(groups)
    if not _has_fused_kernel(factory, parameters):
        return factory(groups, fused=False)
    optimizer = factory(groups)
    # Torch offers to unscale float16 gradients inside the fused kernel. Lightning then refuses to clip gradients, for
    # bfloat16 too, where nothing is scaled. Declined: gradients are unscaled before clipping, as for all others.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def require_step(factory: partial[Optimizer], model: nn.Module) -> None:
    """Build the optimizer and try what would else fail in the first step.

    Raises:
        ValueError: the optimizer cannot be built, or does not take the sparse gradients of an embedding.
    """
    build_optimizer(factory, model)
    tables = [one for one in model.modules() if isinstance(one, nn.Embedding | nn.EmbeddingBag) and one.sparse]
    if not tables:
        return
    probe: nn.Module = nn.Embedding.from_pretrained(torch.zeros(2, 2), freeze=False, sparse=True)
    if len(trainable(model)) > len(tables):
        probe = nn.Sequential(probe, nn.LayerNorm(2))
    probe(torch.tensor([0])).sum().backward()
    try:
        build_optimizer(factory, probe).step()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{reason}; the model has an embedding with sparse gradients, which optimizer=sgd takes; "
            "or build it with sparse=False"
        ) from error


def build_scheduler(
    factory: partial[Any], optimizer: Optimizer, total_steps: int, monitor: str, mode: Literal["min", "max"]
) -> dict[str, Any]:
    """Return Lightning's `lr_scheduler` entry: a function of the step, or torch's `ReduceLROnPlateau` of `monitor`.

    Raises:
        ValueError: the schedule's settings contradict each other.
    """
    if factory.func is ReduceLROnPlateau:
        plateau = factory(optimizer, mode=mode)  # the learner steps it after a validation, Lightning never does
        return {"scheduler": plateau, "interval": "epoch", "frequency": sys.maxsize, "monitor": monitor}

    schedule = partial(factory.func, **factory.keywords)  # Hydra's own partial checks each call, for 2 ms per step

    def factor(step: int) -> float:  # a plain function: LambdaLR stores the state of any other callable
        return schedule(step, total_steps)

    return {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}


def _weight_decay(factory: partial[Optimizer]) -> float:
    """Return the configured weight decay, else the optimizer's default, else 0."""
    setting = inspect.signature(factory).parameters.get("weight_decay")
    return 0.0 if setting is None or setting.default is setting.empty else setting.default


def _has_fused_kernel(factory: partial[Optimizer], parameters: Iterable[Tensor]) -> bool:
    """Return whether the fused kernel works for all parameters: their device, type and sharding."""
    smallest_last = sorted(parameters, key=Tensor.numel, reverse=True)
    for parameter in {(type(one), one.device, one.dtype): one for one in smallest_last}.values():
        probe = torch.zeros_like(parameter, requires_grad=True)
        probe.grad = torch.zeros_like(parameter)
        try:
            factory([probe]).step()
        except RuntimeError:
            return False
    return True

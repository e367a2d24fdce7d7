"""Choose the parameters under weight decay: matrices and kernels that multiply activations, and nothing else."""

from typing import Any

from torch import nn

Named = list[tuple[str, nn.Parameter]]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return every trainable parameter once: the decayed group, then the rest with weight decay 0; no group is empty.

    Without weight decay there is one group, because each group costs an optimizer kernel per step.
    """
    if not weight_decay:
        return as_groups([(trainable(model), {"weight_decay": 0.0})])
    decayed, exempt = split(model)
    return as_groups([(decayed, {"weight_decay": weight_decay}), (exempt, {"weight_decay": 0.0})])


def split(model: nn.Module) -> tuple[Named, Named]:
    """Return the (decayed, exempt) trainable parameters, in the order of registration.

    Decayed are parameters of two or more dimensions that their module calls a weight: `weight` of linear and
    convolution layers, `in_proj_weight` of attention. Exempt are biases, norms and everything else that is added to or
    scales a signal: class tokens, position embeddings, layer scales, and the lookup tables of `nn.Embedding`. Shrinking
    those moves a signal towards zero without making the function simpler.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    decayed: Named = []
    exempt: Named = []
    for name, parameter in trainable(model):
        is_weight = parameter.ndim >= 2 and "weight" in name.rpartition(".")[2] and id(parameter) not in tables
        (decayed if is_weight else exempt).append((name, parameter))
    return decayed, exempt


def trainable(model: nn.Module) -> Named:
    """Return the named parameters that require a gradient; a tied parameter counts once, under its first name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def as_groups(parts: list[tuple[Named, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return an optimizer group for each part that holds parameters, with the settings of the part."""
    return [{"params": [parameter for _, parameter in named], **settings} for named, settings in parts if named]

"""Masks: bool buffers beside the weights that they hold at zero.

`conv.weight` has `conv.weight_mask` beside it, False where the weight is zero and stays zero. The weight itself holds
the zeros, under its plain name: neither a forward pass nor an exporter or a quantizer needs to know of the mask.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from torch import Tensor, nn

from espalier.compression.base import is_inside, require_modules
from espalier.errors import ConfigError

SUFFIX = "_mask"

Masked = dict[str, tuple[nn.Parameter, Tensor]]  # the name of a parameter: that parameter and its mask


def prunable(model: nn.Module, skip: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return kernels and matrices by name, outside the modules in `skip`; no biases, norms or position embeddings.

    They are told by name, not by the type of the module: a captured network has plain containers instead of layers.
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] == "weight" and parameter.ndim >= 2
        if not is_inside(name, skip)
    }


def require_prunable(model: nn.Module, skip: Sequence[str], method: str) -> None:
    """Raise `ConfigError` if `skip` names something that is no module, or leaves nothing to prune."""
    require_modules(skip, model, f"compression.{method}.skip")
    if not prunable(model, skip):
        raise ConfigError(f"compression.{method}.skip={list(skip)}: leaves no layer to prune; skip fewer")


def attach(model: nn.Module, names: Iterable[str]) -> None:
    """Give each of these parameters a mask that keeps everything, unless it has a mask already."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf + SUFFIX not in dict(module.named_buffers(recurse=False)):
            mask = torch.ones_like(module.get_parameter(leaf), dtype=torch.bool, requires_grad=False)
            module.register_buffer(leaf + SUFFIX, mask)


def masked(model: nn.Module) -> Masked:
    """Return every parameter that has a mask, whichever method made the mask."""
    parameters = dict(model.named_parameters())
    masks = {name.removesuffix(SUFFIX): mask for name, mask in model.named_buffers() if name.endswith(SUFFIX)}
    return {name: (parameters[name], mask) for name, mask in masks.items() if name in parameters}


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Write the zeros into the weights for good, and remove the masks."""
    for name, (weight, mask) in masked(model).items():
        weight.masked_fill_(~mask, 0)  # not -0.0, which a product may leave: equal, but harder to compress
        path, _, leaf = name.rpartition(".")
        delattr(model.get_submodule(path), leaf + SUFFIX)


def sparsity(tensors: Iterable[Tensor]) -> float:
    """Return the share of entries that are zero or False, counted over all tensors together."""
    tensors = list(tensors)
    return 1 - sum(int(tensor.count_nonzero()) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)


def magnitude(weight: Tensor, mask: Tensor) -> Tensor:
    """Return the absolute values by which a weight is ranked; masked entries rank below others that are zero."""
    return weight.detach().abs().clamp(min=torch.finfo(weight.dtype).tiny) * mask


@torch.no_grad()
def prune(pairs: Iterable[tuple[nn.Parameter, Tensor]], keeps: Iterable[Tensor]) -> bool:
    """Mask the entries that are False in `keeps`, besides those masked already; return whether any entry is new."""
    changes = []
    for (weight, mask), keep in zip(pairs, keeps, strict=True):
        changes.append((mask & ~keep).any())
        mask &= keep
        weight.mul_(mask)
    return bool(torch.stack(changes).any())


class KeepMasks(L.Callback):
    """Keeps masked weights at zero after every step, whatever the momentum and decay of the optimizer make of them.

    Their gradients are zero before the norm is clipped: as if the product of weight and mask were trained.
    """

    def __init__(self) -> None:
        self.masked: Masked = {}

    @staticmethod
    def replay(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
        """Attach masks that keep everything; the caller loads those of a checkpoint into them."""
        attach(model, entry["names"])
        return model

    @staticmethod
    def finalize(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
        """Return the network with its zeros, without masks."""
        fold(model)
        return model

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module.model, nn.Module)
        self.masked = masked(pl_module.model)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        _multiply([(weight.grad, mask) for weight, mask in self.masked.values() if weight.grad is not None])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _multiply(list(self.masked.values()))


@torch.no_grad()
def _multiply(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    if pairs:
        tensors, masks = zip(*pairs, strict=True)
        torch._foreach_mul_(tensors, masks)


def require_whole_run(trainer: L.Trainer, method: str) -> None:
    """Raise `ConfigError` if something may end the run before its last step, and so before all zeros are set."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping | Timer):
            cause = "trainer.max_time" if isinstance(callback, Timer) else "callbacks.early_stopping"
            raise ConfigError(f"{cause}: may end the run before compression.{method} is done; use trainer.max_epochs")


def step_at(share: float, trainer: L.Trainer) -> int:
    """Return the step at this share of the run, at most the last one, so that at least one step follows."""
    total_steps = int(trainer.estimated_stepping_batches)
    return min(round(share * total_steps), total_steps - 1)


def forget_best(trainer: L.Trainer) -> None:
    """Let only later checkpoints compete for the best; delete earlier ones, with fewer zeros, unless all are kept."""
    for keeper in trainer.checkpoint_callbacks:
        if not isinstance(keeper, ModelCheckpoint) or not keeper.best_k_models:
            continue
        if keeper.save_top_k > 0:
            for path in keeper.best_k_models:
                keeper._remove_checkpoint(trainer, path)
        keeper.best_k_models = {}
        keeper.best_model_path = keeper.kth_best_model_path = ""
        keeper.best_model_score = None


def latest(history: Sequence[Mapping[str, Any]], method: str) -> Mapping[str, Any]:
    """Return the last entry of this method in the history."""
    return next(entry for entry in reversed(history) if entry["method"] == method)

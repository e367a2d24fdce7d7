"""Count what a network costs: parameters, non-zeros, multiply-accumulates, bytes.

Wall-clock time is not here: it needs repetition and a spread.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from espalier.signature import example
from espalier.spec import DataSpec

FLOPS_PER_MAC = 2  # one multiplication, one addition


def count_params(model: nn.Module) -> int:
    """Return the number of values in all parameters; a shared parameter counts once, a buffer not at all."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_nonzero(model: nn.Module) -> int:
    """Return the number of values in all parameters that are not exactly zero."""
    return sum(int(torch.count_nonzero(parameter)) for parameter in model.parameters())


def count_macs(model: nn.Module, spec: DataSpec) -> int:
    """Return the multiply-accumulates of one forward pass of one sample, in evaluation mode.

    Matrix products, convolutions and attention count, as in the literature; biases, norms and activations do not.
    The model keeps its training flags, its buffers and its device; no random number is drawn.
    """
    with counting(model) as counter:
        model(*example(spec, 1, _device(model), _dtype(model)))
    return counter.get_total_flops() // FLOPS_PER_MAC


def counts(model: nn.Module, spec: DataSpec) -> dict[str, int]:
    """Return parameters, non-zeros and multiply-accumulates, by the names they have in a report."""
    return {
        "params": count_params(model),
        "nonzero": count_nonzero(model),
        "macs": count_macs(model, spec),
    }


@contextmanager
def counting(model: nn.Module) -> Iterator[FlopCounterMode]:
    """Set evaluation mode without gradients, and count every operation inside the block; restore all afterwards.

    Compiled code is opaque to the counter. Fused kernels for attention and recurrent layers have no FLOP formula in
    torch 2.13 and would count as zero, so their unfused forms run here.
    """
    with ExitStack() as stack:
        stack.callback(_restore_training, [(module, module.training) for module in model.modules()])
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            for library in (torch.backends.mkldnn, torch.backends.cudnn):
                stack.callback(setattr, library, "enabled", library.enabled)
                setattr(library, "enabled", False)  # noqa: B010, a property of the module: mypy sees a function
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        model.eval()
        yield stack.enter_context(FlopCounterMode(display=False))


def size_bytes(path: Path) -> int:
    """Return the bytes on disk of a file, or of all files below a folder; a link counts as the file that it points to.

    Raises:
        FileNotFoundError: the path does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, so it has no size")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _restore_training(was_training: list[tuple[nn.Module, bool]]) -> None:
    """Restore the training flag of each module, so that a frozen batch norm inside a training model stays frozen."""
    for module, training in was_training:
        module.training = training


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _dtype(model: nn.Module) -> torch.dtype:
    floating = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(floating, torch.get_default_dtype())

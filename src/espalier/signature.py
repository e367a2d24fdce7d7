"""What a network is called with: examples of its inputs, and which of their axes may differ."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from espalier.spec import UNKNOWN, DataSpec, of_shape

LENGTH = 8  # of an example along an axis that has no size of its own; at most the longest


def example(
    spec: DataSpec, num: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Return the arguments of `forward` for `num` samples: zeros, or for tokens the unknown one, as zero pads."""
    lengths = dict(spec.longest)
    return tuple(
        torch.full(
            (num, *(min(LENGTH, lengths[axis]) if isinstance(axis, str) else axis for axis in each.shape)),
            UNKNOWN if each.is_tokens else 0,
            dtype=torch.int64 if each.is_tokens else dtype,
            device=device,
        )
        for each in spec.inputs
    )


def dynamic(model: nn.Module, spec: DataSpec, max_batch: int | None = None) -> tuple[Any, ...]:
    """Return the axes that may differ, for each argument of `forward`: the batch, and every axis that is a letter.

    One letter is one length. The inputs are one argument of a `forward(self, *inputs)`.
    """
    batch = Dim("batch", min=1, max=max_batch)
    letters = {letter: Dim(letter, min=1, max=most) for letter, most in spec.longest}
    axes = tuple(
        {0: batch, **{place: letters[axis] for place, axis in enumerate(each.shape, 1) if isinstance(axis, str)}}
        for each in spec.inputs
    )
    arguments = inspect.signature(model.forward).parameters.values()
    return (axes,) if any(each.kind is each.VAR_POSITIONAL for each in arguments) else axes


def to_entry(spec: DataSpec) -> dict[str, Any]:
    """Return what the record of a method keeps of the inputs: the shape of a plain one, else all of them."""
    return {"input_shape": list(spec.shape)} if spec.is_plain else {"spec": spec.to_dict()}


def of_entry(entry: Mapping[str, Any]) -> DataSpec:
    """Return the spec of which `to_entry` made a record."""
    return DataSpec.from_dict(entry["spec"]) if "spec" in entry else of_shape(entry["input_shape"])

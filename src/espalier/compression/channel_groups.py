"""Find which channels depend on each other, cut channels out, and give a fresh network the same sizes.

A checkpoint of a smaller network must bring its sizes, or its weights do not fit; and it must bring them without the
library that chose them. Only what changed is kept, axis by axis: a network with another head, after transfer learning,
takes the same entry.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import lcm
from typing import Any, Literal

import torch
from torch import Tensor, nn

from espalier.compression.base import is_inside
from espalier.models.blocks import Attention
from espalier.signature import example
from espalier.spec import DataSpec

Sizes = dict[str, int | list[int]]  # numbers of a module, and the shapes of its tensors
Role = Literal["makes", "scales", "reads"]
Differences = dict[str, Sizes]  # per path of a module

SAME = -1  # an axis of a tensor that kept its size
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Part:
    """The inputs or outputs of one module, and the channel of the group that each position belongs to."""

    path: str
    side: str  # "out", "in", "heads", or the name of a parameter that belongs to no layer
    role: Role  # what the module does to the channels
    numbers: tuple[str, ...]  # attributes that count the positions
    tensors: dict[str, int]  # the axis of each parameter and buffer that runs over the positions
    positions: Tensor
    channels: Tensor  # as many as positions, each below the group's num_channels


@dataclass(frozen=True)
class Group:
    """Channels that can only be kept or removed together, in all their parts."""

    parts: list[Part]
    num_channels: int
    num_blocks: int  # of consecutive channels, which must stay equally long: the groups of a norm or a convolution
    is_heads: bool


def coupled(model: nn.Module, spec: DataSpec, skip: Sequence[str]) -> list[Group]:
    """Return the channels that can be removed, in groups that go together, then the heads of each attention layer.

    Left out are the outputs of the network, the outputs of modules in `skip`, and channels that pass through layers of
    an unknown kind.
    """
    from torch_pruning import DependencyGraph  # only where channels are chosen, never where a checkpoint is read

    traced = deepcopy(model).eval().requires_grad_(True)
    with torch.enable_grad():
        graph = DependencyGraph().build_dependency(traced, example(spec, 2), verbose=False)
    heads = {path: _heads(path, module) for path, module in traced.named_modules() if isinstance(module, Attention)}
    inside_attention = {(part.path, part.side) for group in heads.values() for part in group.parts}
    paths: dict[Any, str] = {module: path for path, module in traced.named_modules()}
    paths.update({parameter: name for name, parameter in traced.named_parameters()})

    def stays(node: Any, path: str, side: str) -> bool:
        is_last_or_skipped = side == "out" and (not node.outputs or is_inside(path, skip))
        return is_last_or_skipped or (path, side) in inside_attention

    groups = [_group(found, traced, paths, stays) for found in graph.get_all_groups()]
    groups += [group for path, group in heads.items() if group.num_channels > 1 and not is_inside(path, skip)]
    return [group for group in groups if group is not None]


@torch.no_grad()
def cut(model: nn.Module, groups: Sequence[Group], gone: Sequence[Tensor]) -> nn.Module:
    """Remove these channels of each group, in place; all other weights stay as they are."""
    positions: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    parts: dict[tuple[str, str], Part] = {}
    for group, channels in zip(groups, gone, strict=True):
        for part in group.parts if len(channels) else ():
            positions[part.path, part.side].append(part.positions[torch.isin(part.channels, channels)])
            parts[part.path, part.side] = part  # of several groups where channels are concatenated
    for key, part in parts.items():
        _cut_part(model.get_submodule(part.path), part, torch.cat(positions[key]))
    return model


def differences(before: nn.Module, after: nn.Module) -> Differences:
    """Return the entry by which `reshape` gives `before` the sizes of `after`: changed numbers and axes by module.

    Both have the same modules. `{"conv": {"out_channels": 8, "weight": [8, -1, -1, -1]}}` is a convolution with another
    number of output channels.
    """
    found: Differences = {}
    for path, new in after.named_modules():
        old_numbers, old_tensors = _numbers(before.get_submodule(path)), _tensors(before.get_submodule(path))
        sizes: Sizes = {name: value for name, value in _numbers(new).items() if value != old_numbers[name]}
        for name, tensor in _tensors(new).items():
            axes = list(zip(old_tensors[name].shape, tensor.shape, strict=True))
            if any(old != now for old, now in axes):
                sizes[name] = [SAME if old == now else now for old, now in axes]
        if sizes:
            found[path] = sizes
    return found


def reshape(model: nn.Module, differences: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Give modules the sizes of an entry, in place; changed tensors become zeros, for the caller to load.

    Raises:
        ValueError or AttributeError: the entry is of another network.
    """
    for path, sizes in differences.items():
        module = model.get_submodule(path)
        numbers, tensors = _numbers(module), _tensors(module)
        for name, size in sizes.items():
            if name in tensors:
                _resize(module, name, tensors[name], size)
            elif name in numbers and isinstance(size, list) == isinstance(numbers[name], list):
                setattr(module, name, type(getattr(module, name))(size))
            else:
                raise ValueError(f"{path}.{name} is no size of a {type(module).__name__}")
    return model


def _group(
    found: Any, model: nn.Module, paths: Mapping[Any, str], stays: Callable[[Any, str, str], bool]
) -> Group | None:
    """Return the group, or None if a part of it must stay or is of a kind that cannot be cut."""
    parts: list[Part] = []
    for item in found:
        node, side = item.dep.target, "in" if item.dep.handler.__name__ == "prune_in_channels" else "out"
        path = paths.get(node.module, "")  # nothing: an operation
        if stays(node, path, side):
            return None
        if path:
            positions, channels = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
            part = _part(model, path, side, node.pruning_dim, positions, channels)
            if part is None:
                return None
            parts.append(part)
    num_channels, num_blocks = len(found[0].idxs), lcm(*(_num_blocks(model.get_submodule(part.path)) for part in parts))
    return Group(parts, num_channels, num_blocks, is_heads=False) if num_channels % num_blocks == 0 else None


def _part(model: nn.Module, path: str, side: str, axis: int, positions: Tensor, channels: Tensor) -> Part | None:
    """Return the part, or None for a layer of a kind that cannot be cut."""
    numbers: tuple[str, ...]
    if path in dict(model.named_parameters()):
        parent, _, name = path.rpartition(".")
        is_norm = isinstance(model.get_submodule(parent), nn.RMSNorm)  # no layer to torch-pruning
        numbers = ("normalized_shape",) if is_norm else ()
        return Part(parent, name, "scales" if is_norm else "makes", numbers, {name: axis}, positions, channels)
    module = model.get_submodule(path)
    numbers = _counts(module, side)
    if not numbers:
        return None
    if _num_blocks(module) > 1:  # blocks of channels that come from several places cannot stay equally long
        everything = torch.arange(getattr(module, numbers[0]))
        if not (positions.equal(everything) and channels.equal(everything)):
            return None
    if side == "in":
        return Part(path, side, "reads", numbers, {"weight": 1}, positions, channels)
    axes = {name: 0 for name, tensor in _tensors(module).items() if tensor.ndim}
    return Part(path, side, "scales" if isinstance(module, NORMS) else "makes", numbers, axes, positions, channels)


def _counts(module: nn.Module, side: str) -> tuple[str, ...]:
    """Return the attributes that count the channels on one side; empty for an unknown kind of layer."""
    if isinstance(module, nn.Linear):
        return (f"{side}_features",)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups == 1 or module.groups < module.out_channels:
            return (f"{side}_channels",)
        return ("in_channels", "out_channels", "groups") if module.in_channels == module.out_channels else ()
    if isinstance(module, NORMS) and not (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1):
        return tuple(name for name in ("num_features", "num_channels", "normalized_shape") if hasattr(module, name))
    return ()


def _num_blocks(module: nn.Module) -> int:
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    groups = getattr(module, "groups", 1)
    return 1 if groups == getattr(module, "out_channels", 1) else groups  # depthwise: a channel is on its own


def _heads(path: str, attention: Attention) -> Group:
    """Return a group whose channels are heads: rows of queries, keys and values, and columns of the projection."""

    def linears(name: str) -> list[str]:  # more than one where the layer is factorised
        parts = attention.get_submodule(name).named_modules(prefix=f"{path}.{name}")
        return [path for path, module in parts if isinstance(module, nn.Linear)]

    num_heads, width = attention.num_heads, attention.head_width
    rows, columns, heads = (torch.arange(num) for num in (3 * num_heads * width, num_heads * width, num_heads))
    parts = [
        Part(
            linears("qkv")[-1],
            "out",
            "makes",
            ("out_features",),
            {"weight": 0, "bias": 0},
            rows,
            rows // width % num_heads,
        ),
        Part(linears("proj")[0], "in", "reads", ("in_features",), {"weight": 1}, columns, columns // width),
        Part(path, "heads", "makes", ("num_heads",), {}, heads, heads),
    ]
    return Group(parts, num_heads, 1, is_heads=True)


def _cut_part(module: nn.Module, part: Part, gone: Tensor) -> None:
    for name, axis in part.tensors.items():
        tensor: Tensor = getattr(module, name)
        stays = torch.ones(tensor.shape[axis], dtype=torch.bool)
        stays[gone[gone < len(stays)]] = False  # a grouped convolution has one group's inputs: alike in all groups
        _set_tensor(module, name, tensor.index_select(axis, stays.nonzero().flatten().to(tensor.device)))
    for name in part.numbers:
        number = getattr(module, name)
        setattr(module, name, (number[0] - len(gone),) if isinstance(number, tuple) else number - len(gone))


def _resize(module: nn.Module, name: str, tensor: Tensor, sizes: list[int]) -> None:
    if len(sizes) != tensor.ndim:
        raise ValueError(f"{name} has {tensor.ndim} axes, not {len(sizes)}")
    shape = [old if new == SAME else new for old, new in zip(tensor.shape, sizes, strict=True)]
    _set_tensor(module, name, torch.zeros(shape, dtype=tensor.dtype, device=tensor.device))


def _set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)


def _numbers(module: nn.Module) -> Sizes:
    """Return the module's own integers and tuples of integers, such as channels, features, groups and heads."""
    numbers: Sizes = {}
    for name, value in vars(module).items():
        if isinstance(value, int) and not isinstance(value, bool):
            numbers[name] = value
        elif isinstance(value, tuple) and all(isinstance(number, int) for number in value):
            numbers[name] = list(value)
    return numbers


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}

"""Structured pruning: channels, attention heads and whole residual branches go, so any runtime has less to do.

Which axes of which tensors hold the same channels is found by torch-pruning (DepGraph: Fang et al. 2023, arXiv
2301.12900); ranking and cutting are done here, and a checkpoint needs neither. Criteria:
    l1, l2      norm of the weights that make a channel (Li et al. 2016, arXiv 1608.08710)
    group_l2    of all weights that make, scale or read it (DepGraph, section 3.3)
    bn_scale    of the norm behind it (Liu et al. 2017, arXiv 1708.06519)
    taylor      first-order change of the loss without it, squared (Molchanov et al. 2019, arXiv 1906.10771, eq. 8)
"""

import copy
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from math import lcm
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor, nn

from espalier import seeding
from espalier.compression.base import Compression, Samples, Stage, require_modules
from espalier.compression.channel_groups import Group, Role, coupled, cut, differences, reshape
from espalier.compression.residual_blocks import drop, least_missed, needed_activations, removable
from espalier.config.ranges import Count, Rate
from espalier.data.loaders import Batch
from espalier.errors import ConfigError
from espalier.profiling.cost import count_macs
from espalier.spec import DataSpec, Entry

NUM_SAMPLES = 512  # for losses and gradients
CHUNK = 64  # samples in one forward pass
GRID = 256  # ratios that the search for a budget tells apart
RANDOM_STREAM = 11  # keeps random scores apart from other users of the seed

Loss = Callable[[Tensor, Tensor], Tensor]
Magnitude = Literal["l1", "l2", "group_l2", "bn_scale"]
Criterion = Literal[Magnitude, "taylor", "random"]
MAGNITUDES: dict[Magnitude, tuple[Callable[[Tensor], Tensor], tuple[Role, ...]]] = {
    "l1": (torch.abs, ("makes",)),
    "l2": (torch.square, ("makes",)),
    "group_l2": (torch.square, ("makes", "scales", "reads")),
    "bn_scale": (torch.abs, ("scales",)),
}
Factor = Annotated[float, Gt(1)]


class PruneChannels(Compression):
    """Removes residual branches, then channels and heads, once before training; the network's outputs all stay.

    With `budget=ratio` each layer loses the share `ratio`, or all layers together where `is_global`. With macs or
    latency the smallest ratio is taken that makes the network `speedup` times cheaper than it was.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE

    def __init__(
        self,
        criterion: Criterion,
        budget: Literal["ratio", "macs", "latency"],
        ratio: Rate,
        speedup: Factor,
        is_global: bool,
        round_to: Count,
        drop_branches: Rate,
        skip: Sequence[str],
        spec: DataSpec,
        seed: int,
        samples: Samples,
        loss: Loss,
        latency_ms: Callable[[nn.Module], float],
    ) -> None:
        super().__init__()
        self.criterion: Criterion = criterion
        self.budget = budget
        self.ratio = ratio
        self.speedup = speedup
        self.is_global = is_global
        self.round_to = round_to
        self.drop_branches = drop_branches
        self.skip = skip
        self.spec = spec
        self.seed = seed
        self.samples = samples
        self.loss = loss
        self.latency_ms = latency_ms

    def require(self, model: nn.Module) -> None:
        require_modules(self.skip, model, "compression.prune_channels.skip")
        groups = coupled(model, self.spec, self.skip)
        if not groups:
            raise ConfigError(
                f"compression.prune_channels.skip={list(self.skip)}: leaves no channels that may go; "
                "skip fewer, or use compression=[low_rank]"
            )
        units = [torch.zeros(group.num_channels // group.num_blocks) for group in groups]
        half = cut(copy.deepcopy(model), groups, least(groups, units, ratio=0.5, round_to=1, is_global=False))
        try:
            count_macs(half, self.spec)
        except RuntimeError as error:
            raise ConfigError(
                f"compression.prune_channels.skip={list(self.skip)}: this network cannot run with fewer channels "
                f"everywhere ({str(error).splitlines()[0]}); skip the modules whose outputs must all stay"
            ) from error
        if self.criterion == "bn_scale" and not any(part.role == "scales" for group in groups for part in group.parts):
            raise ConfigError(
                "compression.prune_channels.criterion=bn_scale: no norm with a learnt scale; use criterion=group_l2"
            )
        if self.drop_branches and not removable(model, self.skip):
            raise ConfigError(
                f"compression.prune_channels.drop_branches={self.drop_branches}: no residual block has an identity "
                "for a shortcut; use drop_branches=0"
            )

    def apply(self, model: nn.Module) -> tuple[nn.Module, Entry]:
        limit = 0.0 if self.budget == "ratio" else self._cost(model) / self.speedup
        dropped = self._branches_to_drop(model)
        drop(model, dropped)
        before = copy.deepcopy(model)
        groups, scores = self._ranked(before)
        ratio = self.ratio if self.budget == "ratio" else self._ratio_within(limit, before, groups, scores)
        cut(model, groups, self._least(groups, scores, ratio))
        sizes = differences(before, model)
        if not sizes and not dropped:
            raise ConfigError(
                f"compression.prune_channels.ratio={ratio:.3g}: removes nothing where each layer keeps a multiple of "
                f"round_to={self.round_to} channels; use a larger ratio or a smaller round_to"
            )
        return model, {"dropped": dropped, "sizes": sizes}

    @staticmethod
    def replay(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
        """Remove the same branches and give the same sizes; the caller loads weights next."""
        return reshape(drop(model, entry["dropped"]), entry["sizes"])

    @staticmethod
    def finalize(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
        """Return the network itself: it is smaller already."""
        return model

    def _branches_to_drop(self, model: nn.Module) -> dict[str, bool]:
        paths = removable(model, self.skip)
        if not self.drop_branches:
            return {}
        batch = self.samples(NUM_SAMPLES)
        num = max(1, round(self.drop_branches * len(paths)))
        paths = least_missed(model, paths, num, lambda trial: mean_loss(trial, batch, self.loss))
        return needed_activations(model, paths, [x[:1] for x in batch.inputs])

    def _ranked(self, model: nn.Module) -> tuple[list[Group], list[Tensor]]:
        """Return the groups that the criterion can compare, with the score of each unit of channels."""
        groups = coupled(model, self.spec, self.skip)
        if self.criterion == "bn_scale":
            groups = [group for group in groups if any(part.role == "scales" for part in group.parts)]
        if self.criterion == "random":
            streams = [seeding.generator(self.seed, RANDOM_STREAM, place) for place in range(len(groups))]
            scores = [torch.rand(group.num_channels, generator=g) for group, g in zip(groups, streams, strict=True)]
        elif self.criterion == "taylor":
            scores = taylor_scores(model, groups, self.samples(NUM_SAMPLES), self.loss)
        else:
            scores = weight_scores(model, groups, self.criterion)
        return groups, [score.view(group.num_blocks, -1).sum(0) for group, score in zip(groups, scores, strict=True)]

    def _least(self, groups: Sequence[Group], scores: Sequence[Tensor], ratio: float) -> list[Tensor]:
        return least(groups, scores, ratio, self.round_to, self.is_global)

    def _ratio_within(self, limit: float, model: nn.Module, groups: Sequence[Group], scores: Sequence[Tensor]) -> float:
        """Return the smallest ratio at which the network costs at most `limit`."""

        def cost(step: int) -> float:
            return self._cost(cut(copy.deepcopy(model), groups, self._least(groups, scores, step / GRID)))

        step = bisect_left(range(GRID), True, key=lambda step: cost(step) <= limit)
        if step == GRID:
            most = self.speedup * limit / cost(GRID - 1)
            raise ConfigError(
                f"compression.prune_channels.speedup={self.speedup:g}: at most {most:.3g} of {self.budget} with these "
                "settings; use a smaller speedup or round_to, or a larger drop_branches"
            )
        return step / GRID

    def _cost(self, model: nn.Module) -> float:
        if self.budget == "macs":
            return count_macs(model, self.spec)
        return self.latency_ms(copy.deepcopy(model).eval())


@torch.no_grad()
def weight_scores(model: nn.Module, groups: Sequence[Group], criterion: Magnitude) -> list[Tensor]:
    """Return how much each channel of each group matters by its weights alone; no score is negative."""
    measure, roles = MAGNITUDES[criterion]
    measured = {name: measure(weight) for name, weight in _weights(model).items()}
    return [channel_sums(group, measured, roles) for group in groups]


def taylor_scores(model: nn.Module, groups: Sequence[Group], batch: Batch, loss: Loss) -> list[Tensor]:
    """Return a score per channel of each group: the squared first-order change of the loss if nothing reads it.

    The scores of minibatches are averaged, weighted by their size.
    """
    trial = copy.deepcopy(model).eval().requires_grad_(True)
    weights = _weights(trial)
    scores = [torch.zeros(group.num_channels) for group in groups]
    for part in batch.split(CHUNK):
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                loss(trial(*part.inputs), part.y), list(weights.values()), materialize_grads=True
            )
        pairs = zip(weights.items(), gradients, strict=True)
        changes = {name: weight.detach() * gradient for (name, weight), gradient in pairs}
        for score, group in zip(scores, groups, strict=True):
            score += channel_sums(group, changes, ("reads",)).square() * (len(part.y) / len(batch.y))
    return scores


def channel_sums(group: Group, tensors: Mapping[str, Tensor], roles: Sequence[Role]) -> Tensor:
    """Return per channel the sum over all tensors that have one of the `roles` in the group; shape (num_channels,)."""
    sums = torch.zeros(group.num_channels)
    for part in group.parts:
        for name, axis in part.tensors.items() if part.role in roles else ():
            tensor = tensors.get(f"{part.path}.{name}")
            if tensor is not None:
                inside = part.positions < tensor.shape[axis]  # a grouped convolution has the inputs of one group
                rows = tensor[..., None].movedim(axis, 0)[part.positions[inside]].flatten(1)
                sums.index_add_(0, part.channels[inside], rows.sum(1))
    return sums


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if name.rpartition(".")[2] == "weight"}


def least(
    groups: Sequence[Group], scores: Sequence[Tensor], ratio: float, round_to: int, is_global: bool
) -> list[Tensor]:
    """Return the channels of each group to remove; `scores` has one value per unit, the channels at one place."""
    shares = global_shares(scores, ratio) if is_global and scores else [ratio] * len(scores)
    gone = []
    for group, score, share in zip(groups, scores, shares, strict=True):
        step = 1 if group.is_heads else lcm(round_to, group.num_blocks) // group.num_blocks
        units = lowest(score, share, step)
        gone.append((units + len(score) * torch.arange(group.num_blocks)[:, None]).flatten())
    return gone


def lowest(scores: Tensor, share: float, step: int) -> Tensor:
    """Return the positions of the lowest scores, about `share` of them.

    What stays is a multiple of `step`, at least `step` itself.
    """
    num = len(scores)
    keep = max(step, step * round((1 - share) * num / step))
    return scores.argsort(stable=True)[: max(0, num - keep)]  # ties fall in index order


def global_shares(scores: Sequence[Tensor], ratio: float) -> list[float]:
    """Return the share of each group among the lowest `ratio` of all scores, each divided by its group's mean."""
    flat = torch.cat([score / score.mean().clamp(min=torch.finfo(score.dtype).tiny) for score in scores])
    is_low = torch.zeros(len(flat))
    is_low[flat.argsort(stable=True)[: round(ratio * len(flat))]] = 1
    return [float(part.mean()) for part in is_low.split([len(score) for score in scores])]


@torch.no_grad()
def mean_loss(model: nn.Module, batch: Batch, loss: Loss) -> float:
    """Return the mean loss over the samples; the mode of the model is not changed."""
    return sum(float(loss(model(*part.inputs), part.y)) * len(part.y) for part in batch.split(CHUNK)) / len(batch.y)

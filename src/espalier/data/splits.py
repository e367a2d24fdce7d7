"""Fixed splits of labelled samples, and the statistics of a training split.

Splits depend on the labels alone, never on the seed of a run: runs with other seeds train and test on the same samples.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from espalier import seeding
from espalier.errors import ConfigError

SPLIT_SEED = 1997  # any constant; another one would move samples between training and test
CHUNK = 4096  # samples converted to float64 at a time
MIN_STD = 1e-8  # a constant channel or feature is only centred, not divided by (nearly) zero


def stratified(label_N: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """Return sample indices for each share, then for the rest: disjoint, sorted, each class divided in the same shares.

    Give all samples one label to split without strata.

    Raises:
        ConfigError: a part would be empty.
    """
    parts: list[list[Tensor]] = [[] for _ in range(len(shares) + 1)]
    classes, counts = label_N.unique(return_counts=True)
    members = label_N.argsort(stable=True).split(counts.tolist())
    for number, member_M in enumerate(members):
        order = torch.randperm(len(member_M), generator=seeding.generator(SPLIT_SEED, number))
        sizes = [round(share * len(member_M)) for share in shares]
        if sum(sizes) >= len(member_M):  # a class of a few samples stays in the rest, that is in training
            sizes = [0] * len(shares)
        for part, chosen in zip(parts, order.split([*sizes, len(member_M) - sum(sizes)]), strict=True):
            part.append(member_M[chosen])
    split = [torch.cat(part).sort().values for part in parts]
    if any(len(part) == 0 for part in split):
        raise ConfigError(
            f"shares {list(shares)} of {len(label_N)} samples in {len(classes)} classes leave a split empty; "
            "choose larger shares, or give more samples"
        )
    return split


def statistics(x: Tensor, scale: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of `x / scale` per channel or feature (dimension 1).

    A standard deviation of 0 becomes 1.
    """
    mean_C = torch.stack([part.sum(dim=0) for part in _columns(x, scale)]).sum(dim=0) / _values_per_channel(x)
    squares = [(part - mean_C).square().sum(dim=0) for part in _columns(x, scale)]
    std_C = (torch.stack(squares).sum(dim=0) / _values_per_channel(x)).sqrt()
    return tuple(mean_C.tolist()), tuple(torch.where(std_C > MIN_STD, std_C, 1.0).tolist())


def require_finite(values: Tensor, what: str) -> None:
    """Raise `ConfigError` if a value is NaN or infinite; dimension 0 is the sample, dimension 1 channel or feature."""
    if not values.is_floating_point() or values.isfinite().all():
        return
    bad = (~values.isfinite()).nonzero()
    where = f"sample {int(bad[0, 0])}" + (f", feature {int(bad[0, 1])}" if values.ndim > 1 else "")
    num_samples = len(bad[:, 0].unique())
    raise ConfigError(
        f"data: {num_samples} of {len(values)} {what} are NaN or infinite, the first in {where}; fill or remove them"
    )


def constant(x: Tensor) -> list[int]:
    """Return channels or features (dimension 1) that are equal in all samples; 8-bit values may differ by one step."""
    column = x.movedim(1, 0).flatten(1)
    low, high = column.aminmax(dim=1)
    if x.dtype == torch.uint8:
        return (high.int() - low.int() <= 1).nonzero().flatten().tolist()
    return (high == low).nonzero().flatten().tolist()


def _columns(x: Tensor, scale: float) -> Iterator[Tensor]:
    """Yield scaled values in float64, one column per channel, in chunks."""
    for part in x.split(CHUNK):
        yield part.double().div_(scale).movedim(1, -1).reshape(-1, x.shape[1])


def _values_per_channel(x: Tensor) -> int:
    return x.numel() // x.shape[1]

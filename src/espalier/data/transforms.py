"""Turn raw values into model input on the device: scale, augment, normalise."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from espalier import seeding
from espalier.data.augment import Augmentation
from espalier.data.loaders import Batch
from espalier.spec import DataSpec, Input

AUGMENT_STREAM = 2  # keeps the numbers of the augmentations apart from other users of (seed, epoch, sample)


class Normalise:
    """Computes `(raw / scale - mean) / std` in float32, for any batch shape."""

    def __init__(self, spec: DataSpec | Input, device: torch.device) -> None:
        shape = (len(spec.mean), *[1] * (len(spec.shape) - 1))
        self.scale = spec.scale
        self.mean = torch.tensor(spec.mean, device=device).view(shape)
        self.std = torch.tensor(spec.std, device=device).view(shape)

    def __call__(self, raw: Tensor) -> Tensor:
        return self.of_scaled(raw.float() / self.scale)

    def of_scaled(self, scaled: Tensor) -> Tensor:
        """Return values normalised that are divided by `scale` already."""
        return (scaled - self.mean) / self.std


class NormaliseAll:
    """`Normalise` for each input of a sample; tokens stay as they are."""

    def __init__(self, spec: DataSpec, device: torch.device) -> None:
        self.each = [None if one.is_tokens else Normalise(one, device) for one in spec.inputs]

    def __call__(self, raw: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple([x if one is None else one(x) for one, x in zip(self.each, raw, strict=True)])


class Prepare:
    """Finishes the batches of one split: scales, augments in order with mixing last, and normalises.

    The random numbers of a sample depend on (seed, epoch, its index) and on the augmentations listed before, so they
    are the same in any batch and on any rank. What mixes samples also depends on the neighbour in the batch.
    """

    def __init__(self, spec: DataSpec, augment: Sequence[Augmentation], seed: int, device: torch.device) -> None:
        self.normalise_all = NormaliseAll(spec, device)
        self.normalise = Normalise(spec, device) if augment else None
        self.augment = sorted(augment, key=lambda one: one.mixes)
        self.draws = [one.num_draws for one in self.augment]
        self.seed = seed
        self.num_classes_to_mix = spec.num_classes if any(one.mixes for one in augment) else 0

    def __call__(self, raw: Batch, epoch: int) -> Batch:
        if self.normalise is None:
            return raw._replace(inputs=self.normalise_all(raw.inputs))
        x, y, index_B = raw.x.float() / self.normalise.scale, raw.y, raw.index
        if self.num_classes_to_mix:
            y = F.one_hot(y, self.num_classes_to_mix).float()
        u_BN = seeding.uniform(self.seed, epoch, index_B, sum(self.draws), AUGMENT_STREAM)
        for augmentation, own_BN in zip(self.augment, u_BN.split(self.draws, dim=1), strict=True):
            x, y = augmentation(x, y, own_BN)
        return Batch.single(self.normalise.of_scaled(x), y, index_B)

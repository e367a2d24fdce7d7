"""Made-up images of any shape and number, for benchmarks and tests: a smooth pattern per class under noise.

The images do not depend on the run's seed. A network can learn them; how well says nothing about real data.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from espalier import seeding
from espalier.config.ranges import Count, Share
from espalier.data.augment import Augmentation
from espalier.data.loaders import Samples
from espalier.data.module import DataModule, Splits, class_counts
from espalier.data.splits import statistics
from espalier.spec import DataSpec

IMAGE_SEED = 1849
COARSE = 4  # patterns are enlarged from 4x4, so that they survive a shift by a pixel
CHUNK = 1024  # images generated at a time
MAX_VALUE = 255


class SyntheticImages(DataModule):
    """8-bit images that are `1 - noise` parts pattern of the class and `noise` parts random; classes take turns."""

    def __init__(
        self,
        num_classes: Count,
        channels: Count,
        height: Count,
        width: Count,
        num_train: Count,
        num_val: Count,
        num_test: Count,
        noise: Share,
        batch_size: Count,
        augment: dict[str, Augmentation],
        seed: int,
    ) -> None:
        super().__init__(batch_size, seed, augment)
        self.num_classes = num_classes
        self.shape = (channels, height, width)
        self.sizes = (num_train, num_val, num_test)
        self.noise = noise

    def load(self) -> Splits:
        train, val, test = (self._images(number, size) for number, size in enumerate(self.sizes))
        mean, std = statistics(train.x, MAX_VALUE)
        spec = DataSpec.single(
            name="synthetic_images",
            shape=self.shape,
            scale=float(MAX_VALUE),
            mean=mean,
            std=std,
            class_names=tuple(str(number) for number in range(self.num_classes)),
            class_counts=class_counts(train.y, self.num_classes),
        )
        return Splits(spec, train, val, test)

    def _images(self, split: int, num: int) -> Samples:
        """Return the images of split number `split`, from a generator of its own."""
        generator = seeding.generator(IMAGE_SEED, split + 1)
        pattern_KCHW = self._patterns()
        y = torch.arange(num) % self.num_classes
        x = torch.empty(num, *self.shape, dtype=torch.uint8)
        for part, label in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            random = torch.randint(MAX_VALUE + 1, part.shape, generator=generator, dtype=torch.uint8)
            part.copy_((1 - self.noise) * pattern_KCHW[label] + self.noise * random)
        return Samples(x, y)

    def _patterns(self) -> Tensor:
        """Return one float image per class, (K, C, H, W)."""
        generator = seeding.generator(IMAGE_SEED, 0)
        coarse = torch.rand(self.num_classes, self.shape[0], COARSE, COARSE, generator=generator)
        return F.interpolate(coarse, size=self.shape[1:], mode="bilinear", align_corners=False) * MAX_VALUE

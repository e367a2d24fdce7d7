"""Handwritten digits: 1,797 real 8x8 images in 10 classes that scikit-learn ships, so no network is needed.

The test set of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository
1998, doi.org/10.24432/C50P49. It has no official split; ours is 64 / 16 / 20 %, stratified.
"""

import torch
from sklearn.datasets import load_digits

from espalier.config.ranges import Count
from espalier.data.augment import Augmentation
from espalier.data.loaders import Samples
from espalier.data.module import DataModule, Splits, class_counts
from espalier.data.splits import statistics, stratified
from espalier.spec import DataSpec

TEST_SHARE = 0.20
VAL_SHARE = 0.16
MAX_VALUE = 16.0  # a pixel counts the ink in a 4x4 block of a bitmap


class Digits(DataModule):
    """Images (1, 8, 8) with raw values 0 to 16."""

    def __init__(self, batch_size: Count, augment: dict[str, Augmentation], seed: int) -> None:
        super().__init__(batch_size, seed, augment)

    def load(self) -> Splits:
        pixels, labels = load_digits(return_X_y=True)
        x, y = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8), torch.from_numpy(labels).long()
        test, val, train = (Samples(x[part], y[part]) for part in stratified(y, [TEST_SHARE, VAL_SHARE]))
        mean, std = statistics(train.x, MAX_VALUE)
        spec = DataSpec.single(
            name="digits",
            shape=(1, 8, 8),
            scale=MAX_VALUE,
            mean=mean,
            std=std,
            class_names=tuple("0123456789"),
            class_counts=class_counts(train.y, 10),
        )
        return Splits(spec, train, val, test)

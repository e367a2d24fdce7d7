"""Breast cancer diagnosis: 569 real patients, 30 measurements of cell nuclei, malignant or benign.

Wolberg, Mangasarian, Street and Street, Breast Cancer Wisconsin (Diagnostic), UCI Machine Learning Repository 1993,
doi.org/10.24432/C5DW2B. It has no official split; ours is 64 / 16 / 20 %, stratified.
"""

import torch
from sklearn.datasets import load_breast_cancer

from espalier.config.ranges import Count
from espalier.data.loaders import Samples
from espalier.data.module import DataModule, Splits, class_counts
from espalier.data.splits import statistics, stratified
from espalier.spec import DataSpec

TEST_SHARE = 0.20
VAL_SHARE = 0.16


class BreastCancer(DataModule):
    """569 samples of 30 features in their own units, each feature normalised on its own."""

    def __init__(self, batch_size: Count, seed: int) -> None:
        super().__init__(batch_size, seed, augment={})

    def load(self) -> Splits:
        table = load_breast_cancer()
        x, y = torch.from_numpy(table.data).float(), torch.from_numpy(table.target).long()
        test, val, train = (Samples(x[part], y[part]) for part in stratified(y, [TEST_SHARE, VAL_SHARE]))
        mean, std = statistics(train.x, scale=1.0)
        spec = DataSpec.single(
            name="breast_cancer",
            shape=(x.shape[1],),
            scale=1.0,
            mean=mean,
            std=std,
            class_names=tuple(str(name) for name in table.target_names),
            class_counts=class_counts(train.y, 2),
        )
        return Splits(spec, train, val, test)

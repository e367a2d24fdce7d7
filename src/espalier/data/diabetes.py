"""Diabetes progression: 442 real patients, 10 measurements, a score of the disease one year later (25 to 346).

Efron, Hastie, Johnstone and Tibshirani 2004, Least Angle Regression, doi.org/10.1214/009053604000000067. It has no
official split; ours is 64 / 16 / 20 %. Measurements are raw: scikit-learn scales its own with the test patients.
"""

import torch
from sklearn.datasets import load_diabetes

from espalier.config.ranges import Count
from espalier.data.loaders import Samples
from espalier.data.module import DataModule, Splits
from espalier.data.splits import statistics, stratified
from espalier.spec import DataSpec

TEST_SHARE = 0.20
VAL_SHARE = 0.16


class Diabetes(DataModule):
    """442 samples for regression; targets keep their unit, and the spec holds mean and spread of training targets."""

    def __init__(self, batch_size: Count, seed: int) -> None:
        super().__init__(batch_size, seed, augment={})

    def load(self) -> Splits:
        table = load_diabetes(scaled=False)
        x, y = torch.from_numpy(table.data).float(), torch.from_numpy(table.target).float()
        parts = stratified(torch.zeros(len(y)), [TEST_SHARE, VAL_SHARE])
        test, val, train = (Samples(x[part], y[part]) for part in parts)
        mean, std = statistics(train.x, scale=1.0)
        (target_mean,), (target_std,) = statistics(train.y[:, None], scale=1.0)
        spec = DataSpec.single(
            name="diabetes",
            shape=(x.shape[1],),
            scale=1.0,
            mean=mean,
            std=std,
            target_mean=target_mean,
            target_std=target_std,
        )
        return Splits(spec, train, val, test)

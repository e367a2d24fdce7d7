"""Losses and metrics of the user's own: what they compute, what is refused, what a checkpoint may name."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassRecall

from espalier.config import conf_dir
from espalier.errors import ConfigError
from espalier.learners.classifier import Classifier
from espalier.learners.regressor import Regressor
from espalier.optim.schedules import constant
from espalier.spec import DataSpec
from espalier.trust.targets import check_stored

CLASSES = DataSpec.single("noise", (3,), 1.0, (0.0,), (1.0,), ("a", "b", "c"))
NUMBERS = DataSpec.single("numbers", (3,), 1.0, (0.0,), (1.0,), target_mean=10.0, target_std=2.0)
KNOBS: dict[str, Any] = {
    "optimizer": partial(torch.optim.SGD, lr=0.1),
    "scheduler": partial(constant),
    "seed": 0,
    "channels_last": False,
    "compile": False,
    "loss": None,
    "metrics": None,
}


def classifier(**changes: Any) -> Classifier:
    return Classifier(nn.Identity(), CLASSES, **{**KNOBS, "label_smoothing": 0.0, "class_weights": None, **changes})


def regressor(**changes: Any) -> Regressor:
    return Regressor(nn.Identity(), NUMBERS, **{**KNOBS, "loss": "mse", **changes})


class Margin(nn.Module):
    def forward(self, logits_BK: Tensor, y_B: Tensor) -> Tensor:
        return F.multi_margin_loss(logits_BK, y_B)


class Learnt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Each(nn.Module):
    def forward(self, logits_BK: Tensor, y_B: Tensor) -> Tensor:
        return F.cross_entropy(logits_BK, y_B, reduction="none")


def test_a_loss_of_ones_own_takes_the_place_of_cross_entropy():
    logits_BK, y_B = torch.tensor([[2.0, 1.5, 0.0], [0.0, 3.0, 0.0]]), torch.tensor([0, 1])
    learner = classifier(loss=Margin())
    # Of the first sample max(0, 1 - 2 + 1.5) = 0.5 among three classes; of the second nothing.
    assert float(learner.loss(logits_BK, y_B)) == pytest.approx((0.5 / 3 + 0) / 2)


def test_the_validation_loss_is_the_mean_of_that_loss_over_all_samples():
    metrics = classifier(loss=Margin()).new_metrics("val")
    logits_BK, y_B = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    for part in (slice(0, 4), slice(4, 5)):  # batches of different sizes
        metrics.update(logits_BK[part], y_B[part])
    expected = float(F.multi_margin_loss(logits_BK, y_B))
    assert float(metrics.compute()["val/loss"]) == pytest.approx(expected)


def test_a_loss_of_a_regression_sees_standardised_numbers():
    learner = regressor(loss=nn.HuberLoss(delta=1.0))
    output_B1, y_B = torch.tensor([[0.5], [4.0]]), torch.tensor([10.0, 12.0])  # standardised: 0 and 1
    assert float(learner.loss(output_B1, y_B)) == pytest.approx((0.5 * 0.5**2 + (3.0 - 0.5)) / 2)


def test_a_metric_of_ones_own_stands_beside_the_others_and_is_fresh_in_each_split():
    learner = classifier(metrics={"recall": MulticlassRecall(3)})
    logits_BK, y_B = torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 1, 1, 2])
    val, test = learner.new_metrics("val"), learner.new_metrics("test")
    val.update(logits_BK, y_B)
    assert float(val.compute()["val/recall"]) == pytest.approx((1 + 0.5 + 1) / 3)
    test.update(logits_BK[:1], y_B[:1])
    assert float(test.compute()["test/recall"]) == 1


@pytest.mark.parametrize(
    ("learner", "changes", "told"),
    [
        (classifier, {"loss": Learnt()}, "loss=Learnt: has weights of its own"),
        (classifier, {"loss": Each()}, "loss=Each: must give one number with a gradient"),
        (classifier, {"loss": nn.CrossEntropyLoss(reduction="sum")}, "must be the mean over the batch; set its reduc"),
        (classifier, {"loss": nn.CosineEmbeddingLoss()}, "loss=CosineEmbeddingLoss: does not take an output of shape"),
        (classifier, {"loss": 3}, "loss=int: must be a class of nn.Module"),
        (classifier, {"loss": Margin(), "label_smoothing": 0.1}, "takes the place of cross entropy; set label_smooth"),
        (classifier, {"loss": Margin(), "class_weights": "balanced"}, "takes the place of cross entropy"),
        (classifier, {"metrics": {"accuracy": MeanMetric()}}, "metrics.accuracy: choose another name"),
        (classifier, {"metrics": {"confusion_KK": MeanMetric()}}, "metrics.confusion_KK: choose another name"),
        (classifier, {"metrics": {"a/b": MeanMetric()}}, "metrics.a/b: choose another name"),
        (regressor, {"metrics": {"f": nn.Identity()}}, "metrics.f: must be a Metric of torchmetrics, not Identity"),
        (regressor, {"loss": Learnt()}, "loss=Learnt: has weights of its own"),
    ],
)
def test_what_cannot_be_a_loss_or_a_metric_is_refused_when_it_is_built(learner: Any, changes: Any, told: str):
    with pytest.raises(ValueError, match=told):
        learner(**changes)


@pytest.mark.parametrize(
    ("key", "target", "is_allowed"),
    [
        ("loss", {"_target_": "torch.nn.HuberLoss"}, True),
        ("loss", {"_target_": "torch.nn.modules.loss.HuberLoss"}, True),
        ("loss", {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}, False),
        ("loss", {"_target_": "os.system", "command": "true"}, False),
        ("loss", {"_target_": "torch.nn.modules.loss.Tensor"}, False),
        ("metrics", {"f": {"_target_": "torchmetrics.classification.MulticlassRecall", "num_classes": 3}}, True),
        ("metrics", {"f": {"_target_": "torchmetrics.text.BERTScore"}}, False),
        ("metrics", {"f": {"_target_": "torch.nn.HuberLoss"}}, False),
    ],
)
def test_a_checkpoint_names_only_trusted_losses_and_metrics(key: str, target: dict[str, Any], is_allowed: bool):
    node = {"_target_": "espalier.learners.regressor.Regressor", "loss": "mse", "metrics": {}, "channels_last": False}
    cfg = OmegaConf.create({"learner": {**node, "compile": False, key: target}})
    if is_allowed:
        check_stored(cfg)
        return
    with pytest.raises(ConfigError, match=rf"learner\.{key}.*not built from a checkpoint"):
        check_stored(cfg)


def test_a_learner_that_was_stored_before_has_neither():
    stored = {"learner": {"_target_": "espalier.learners.classifier.Classifier", "label_smoothing": 0.0}}
    assert conf_dir.completed(stored)["learner"] == {**stored["learner"], "loss": None, "metrics": {}}

"""Losses and metrics of the learners, against scikit-learn and formulas, and what one training step does."""

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor, nn
from torch.utils.data import DataLoader

from espalier.data.digits import Digits
from espalier.data.loaders import Batch
from espalier.learners.classifier import Classifier
from espalier.learners.divergence import gradient_norm
from espalier.learners.learner import Learner
from espalier.learners.regressor import Regressor
from espalier.optim.schedules import constant
from espalier.spec import DataSpec
from espalier.strategies.precision import HalfNetwork

NUM_CLASSES = 7
COUNTS = (10, 20, 30, 40, 50, 60, 70)


def spec(**changes: Any) -> DataSpec:
    whole = {"name": "toy", "shape": (5,), "scale": 1.0, "mean": (0.0,) * 5, "std": (1.0,) * 5}
    return DataSpec.single(**(whole | changes))


CLASSES = spec(class_names=tuple("abcdefg"), class_counts=COUNTS)
NUMBERS = spec(target_mean=30.0, target_std=4.0)
SGD = partial(torch.optim.SGD, lr=0.1)


def classifier(model: nn.Module | None = None, data: DataSpec = CLASSES, **changes: Any) -> Classifier:
    knobs = {"optimizer": SGD, "scheduler": partial(constant), "seed": 0, "label_smoothing": 0.0}
    knobs |= {"class_weights": None, "channels_last": False, "compile": False, "loss": None, "metrics": None}
    return Classifier(model or nn.Identity(), data, **(knobs | changes))


def regressor(model: nn.Module | None = None, loss: str = "mse") -> Regressor:
    knobs = {"optimizer": SGD, "scheduler": partial(constant), "seed": 0, "channels_last": False, "compile": False}
    knobs["metrics"] = None
    return Regressor(model or nn.Identity(), NUMBERS, loss=loss, **knobs)


def measured(learner: Learner, split: str, output: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Metrics of one pass over the data in unequal batches; the model is the identity, so x is its output."""
    for x_B, y_B in zip(output.split(23), y.split(23), strict=True):
        learner._measure(split, Batch.single(x_B, y_B, torch.arange(len(y_B))))
    learner._measure(split, Batch.single(output[:0], y[:0], torch.arange(0)))  # a rank that has run out of samples
    return learner._metrics(split).compute()


@pytest.fixture
def logits_and_classes() -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(0)
    y_B = torch.randint(NUM_CLASSES, (150,), generator=dice)
    return torch.randn(150, NUM_CLASSES, generator=dice) + 1.5 * nn.functional.one_hot(y_B, NUM_CLASSES), y_B


def test_metrics_of_a_classifier_are_those_of_scikit_learn(logits_and_classes: tuple[Tensor, Tensor]):
    logits_BK, y_B = logits_and_classes
    probability_BK, predicted_B = logits_BK.double().softmax(1), logits_BK.argmax(1)
    values = measured(classifier(), "test", logits_BK, y_B)
    labels = list(range(NUM_CLASSES))
    expected = {
        "test/loss": sk.log_loss(y_B, probability_BK, labels=labels),
        "test/accuracy": sk.accuracy_score(y_B, predicted_B),
        "test/f1": sk.f1_score(y_B, predicted_B, average="macro"),
        "test/top5_accuracy": sk.top_k_accuracy_score(y_B, logits_BK, k=5, labels=labels),
    }
    assert {name: float(values[name]) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert values["test/confusion_KK"].tolist() == sk.confusion_matrix(y_B, predicted_B).tolist()


def test_calibration_error_is_the_mean_gap_between_confidence_and_accuracy(logits_and_classes: tuple[Tensor, Tensor]):
    logits_BK, y_B = logits_and_classes
    confidence_B, predicted_B = logits_BK.softmax(1).max(1)
    bin_B = (confidence_B * 15).ceil().long() - 1  # 15 bins of equal width, closed on the right
    gap = 0.0
    for number in range(15):
        member_B = bin_B == number
        if member_B.any():
            accuracy = (predicted_B == y_B)[member_B].double().mean()
            gap += float(member_B.double().mean() * (accuracy - confidence_B[member_B].mean()).abs())
    assert float(measured(classifier(), "val", logits_BK, y_B)["val/calibration_error"]) == pytest.approx(gap, rel=1e-5)


def test_metrics_start_afresh_after_an_epoch(logits_and_classes: tuple[Tensor, Tensor], monkeypatch):
    learner = classifier()
    monkeypatch.setattr(learner, "log_dict", lambda values: None)
    monkeypatch.setattr(learner, "lr_schedulers", lambda: None)
    logits_BK, y_B = logits_and_classes
    first = measured(learner, "val", logits_BK, y_B)
    learner.on_validation_epoch_end()
    assert measured(learner, "val", logits_BK, y_B) == first
    assert learner.measured["val"] == first


def test_two_classes_have_no_top_5():
    learner = classifier(data=spec(class_names=("yes", "no"), class_counts=(5, 5)))
    assert "val/top5_accuracy" not in measured(learner, "val", torch.eye(2), torch.tensor([0, 1]))


def test_balanced_weights_give_each_class_the_same_total():
    learner = classifier(class_weights="balanced")
    assert learner.class_weights.tolist() == pytest.approx([sum(COUNTS) / (NUM_CLASSES * count) for count in COUNTS])
    totals = learner.class_weights * torch.tensor(COUNTS)
    assert totals.tolist() == pytest.approx([sum(COUNTS) / NUM_CLASSES] * NUM_CLASSES)


def test_the_loss_weighs_and_smooths_as_the_formula_says(logits_and_classes: tuple[Tensor, Tensor]):
    logits_BK, y_B = logits_and_classes
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    learner = classifier(class_weights=weights, label_smoothing=0.1)
    log_BK, weight_K = logits_BK.double().log_softmax(1), torch.tensor(weights).double()
    own_B, chosen_B = log_BK[torch.arange(len(y_B)), y_B], weight_K[y_B]
    hard = -(chosen_B * own_B).sum()
    even = -(weight_K * log_BK).sum() / NUM_CLASSES
    expected = float((0.9 * hard + 0.1 * even) / chosen_B.sum())
    assert float(learner.loss(logits_BK, y_B)) == pytest.approx(expected, rel=1e-5)


def test_soft_targets_train_like_hard_ones(logits_and_classes: tuple[Tensor, Tensor]):
    logits_BK, y_B = logits_and_classes
    learner, soft_BK = classifier(), nn.functional.one_hot(y_B, NUM_CLASSES).float()
    hard, soft = learner.loss(logits_BK, y_B), learner.loss(logits_BK, soft_BK)
    assert float(hard) == pytest.approx(float(soft), rel=1e-6)
    assert torch.allclose(learner.sums(logits_BK, y_B, hard), learner.sums(logits_BK, soft_BK, soft))


@pytest.mark.parametrize(("weights", "reason"), [([1.0, 2.0], "2 numbers.*7 classes"), (None, "learner=regressor")])
def test_a_classifier_refuses_what_does_not_fit_the_data(weights, reason):
    with pytest.raises(ValueError, match=reason):
        classifier(data=CLASSES if weights else NUMBERS, class_weights=weights)


def test_a_regressor_refuses_classes():
    with pytest.raises(ValueError, match="learner=classifier"):
        Regressor(
            nn.Identity(), CLASSES, SGD, partial(constant), 0, "mse", channels_last=False, compile=False, metrics=None
        )


def test_metrics_of_a_regressor_are_in_the_unit_of_the_target():
    dice = torch.Generator().manual_seed(0)
    output_B1 = torch.randn(90, 1, generator=dice)
    y_B = 30 + 4 * output_B1[:, 0] + torch.randn(90, generator=dice)
    predicted_B = output_B1[:, 0] * 4 + 30
    values = measured(regressor(), "test", output_B1, y_B)
    expected = {
        "test/rmse": sk.root_mean_squared_error(y_B, predicted_B),
        "test/mae": sk.mean_absolute_error(y_B, predicted_B),
        "test/r2": sk.r2_score(y_B, predicted_B),
    }
    assert {name: float(values[name]) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(values["test/pairs_N2"], torch.stack((predicted_B, y_B), dim=1))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("mse", (0.25 + 4.0) / 2), ("mae", (0.5 + 2.0) / 2), ("huber", (0.5 * 0.25 + (2.0 - 0.5)) / 2)],
)
def test_the_loss_of_a_regressor_is_that_of_standardised_targets(loss: str, expected: float):
    y_B = torch.tensor([34.0, 22.0])  # standardised: 1 and -2
    output_B1 = torch.tensor([[1.5], [0.0]])  # off by 0.5 and 2
    assert float(regressor(loss=loss).loss(output_B1, y_B)) == pytest.approx(expected)


class Watched(Classifier):
    """Keeps the loss of each batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses = [*getattr(self, "losses", []), float(loss.detach())]
        return loss


def fit(
    batch_size: int, num_batches: int, accumulate: int, kind: type[Classifier] = Classifier, **knobs_of_trainer: Any
) -> L.Trainer:
    """Two epochs of one linear layer on digits, plain SGD, in keyed order."""
    torch.manual_seed(0)
    data = Digits(batch_size, augment={}, seed=0)
    knobs = {"label_smoothing": 0.0, "class_weights": None, "channels_last": False, "compile": False}
    knobs |= {"loss": None, "metrics": None}
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    learner = kind(model, data.spec, SGD, partial(constant), seed=0, **knobs)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        limit_train_batches=num_batches,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **quiet,
        **knobs_of_trainer,
    )
    trainer.fit(learner, data)
    return trainer


def test_train_loss_is_the_mean_of_the_losses_of_the_last_epoch():
    trainer = fit(64, num_batches=6, accumulate=1, kind=Watched)
    losses = trainer.lightning_module.losses
    assert len(losses) == 12
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(sum(losses[6:]) / 6, rel=1e-5)


def test_accumulating_two_batches_is_a_batch_of_twice_the_size():
    halves, whole = fit(32, num_batches=12, accumulate=2), fit(64, num_batches=6, accumulate=1)
    assert halves.global_step == whole.global_step == 12
    weights = [trainer.lightning_module.state_dict() for trainer in (halves, whole)]
    for name in ("model.1.weight", "model.1.bias"):
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)
    assert float(halves.callback_metrics["train/loss"]) == pytest.approx(float(whole.callback_metrics["train/loss"]))


class ClippedTwice(Classifier):
    """By Lightning, which takes the norm of the gradients again."""

    configure_gradient_clipping = L.LightningModule.configure_gradient_clipping


@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
def test_gradients_are_clipped_as_by_lightning(algorithm: str | None):
    words = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    ours, theirs, free = (
        trained.lightning_module.state_dict()
        for trained in (fit(64, 6, 1, **words), fit(64, 6, 1, ClippedTwice, **words), fit(64, 6, 1))
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert not torch.allclose(ours["model.1.weight"], free["model.1.weight"])


def test_the_norm_of_the_gradients_is_taken_once_a_step(monkeypatch: pytest.MonkeyPatch):
    whole, count = torch._foreach_norm, 0

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return whole(*args)

    monkeypatch.setattr(torch, "_foreach_norm", counted)
    assert fit(64, 6, 1, gradient_clip_val=0.01).global_step == count == 12


def test_a_step_draws_the_same_random_numbers_wherever_it_is_run():
    dropping = classifier(nn.Dropout(0.5)).train()
    dropping._epoch, dropping._rank = 3, 0
    x_BK, y_B = torch.randn(40, NUM_CLASSES), torch.zeros(40, dtype=torch.int64)
    batch = Batch.single(x_BK, y_B, torch.arange(40))
    first = dropping.training_step(batch, 11)
    torch.rand(5)  # someone else draws
    assert torch.equal(dropping.training_step(batch, 11), first)
    assert not torch.equal(dropping.training_step(batch, 12), first)
    dropping._rank = 1
    assert not torch.equal(dropping.training_step(batch, 11), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_of_an_epoch_count_every_sample_in_any_precision(dtype: torch.dtype):
    y_B = torch.zeros(301, dtype=torch.long)
    output_BK = nn.functional.one_hot(y_B, NUM_CLASSES).to(dtype)
    loss = torch.tensor(2.0, dtype=dtype)
    assert classifier().sums(output_BK, y_B, loss).tolist() == [602.0, 301.0, 301.0]
    assert regressor().sums(output_BK, y_B, loss).tolist() == [602.0, 301.0]


def test_a_network_in_16_bits_is_measured_in_32():
    plugin = HalfNetwork("bf16-true")
    learner = classifier(nn.Linear(5, NUM_CLASSES), class_weights="balanced")
    weights_K = learner.class_weights.clone()
    weight, bias = learner.model.weight.detach().clone(), learner.model.bias.detach().clone()
    plugin.convert_module(learner)
    x, y_B = torch.randn(301, 5), torch.randint(NUM_CLASSES, (301,))
    half = torch.bfloat16
    output_BK = nn.functional.linear(x.to(half), weight.to(half), bias.to(half)).float()
    assert torch.equal(learner(x), output_BK)
    assert torch.equal(learner.class_weights, weights_K)
    expected = sk.log_loss(y_B, output_BK.double().softmax(1).detach(), labels=list(range(NUM_CLASSES)))
    values = measured(learner, "val", x, y_B)
    assert float(values["val/loss"].detach()) == pytest.approx(expected, rel=1e-5)


def test_a_target_is_not_rounded_to_16_bits():
    batch = Batch.single(torch.ones(1, 5), torch.tensor([347.0]), torch.tensor([0]))
    assert HalfNetwork("bf16-true").convert_input(batch).y.item() == 347.0


def norm_of(*gradients: Tensor) -> Tensor:
    parameters = [nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return gradient_norm(torch.optim.SGD(parameters, lr=0.1))


def test_the_norm_of_gradients_in_16_bits_has_32():
    norm = norm_of(torch.ones(301, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16))
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(303**0.5, rel=1e-6)


def test_the_norm_of_sparse_gradients_is_that_of_the_same_dense_ones():
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[1, 3, 1]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), (9, 2)
    )
    dense = torch.tensor([7.0, 8.0])
    assert float(norm_of(sparse, dense)) == pytest.approx(float(norm_of(sparse.to_dense(), dense)), rel=1e-6)


class Table(nn.Module):
    """An embedding of five numbers, each 0 or 1."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(2, 8, mode="sum", sparse=sparse)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table((x > 0).long()))


def test_sparse_gradients_train_as_dense_ones_do():
    weights = []
    for sparse in (True, False):
        torch.manual_seed(0)
        learner = classifier(Table(sparse))
        dice = torch.Generator().manual_seed(0)
        x_NF, y_N = torch.randn(4, 16, 5, generator=dice), torch.randint(NUM_CLASSES, (4, 16), generator=dice)
        batches = [Batch.single(x, y, torch.arange(16)) for x, y in zip(x_NF, y_N, strict=True)]
        trainer = L.Trainer(
            **{"max_epochs": 1, "logger": False, "enable_checkpointing": False, "gradient_clip_val": 0.1},
            **{"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"},
        )
        trainer.fit(learner, DataLoader(batches, batch_size=None))
        weights.append(learner.model.table.weight.detach())
    torch.testing.assert_close(*weights)

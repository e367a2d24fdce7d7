"""Distillation: losses against closed forms, and what a fit with a teacher trains, stores and leaves behind."""

import copy
import io
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.compression import base
from espalier.compression.distill import Distill, attention_loss, decoupled, feature_loss
from espalier.compression.graph_module import capture
from espalier.data.digits import Digits
from espalier.data.mixing import Mixup
from espalier.errors import ConfigError
from espalier.learners.classifier import Classifier
from espalier.learners.learner import Learner
from espalier.learners.regressor import Regressor
from espalier.models.mlp import MLP
from espalier.models.resnet import ResNet
from espalier.models.vit import ViT
from espalier.optim.schedules import constant
from espalier.spec import DataSpec, of_shape
from espalier.targets.metrics import distillation

SHAPE = (1, 8, 8)
SPEC = DataSpec.single("toy", SHAPE, 1.0, (0.0,), (1.0,), tuple("0123456789"), (10,) * 10)
NUMBERS = DataSpec.single("toy", (5,), 1.0, (0.0,) * 5, (1.0,) * 5, target_mean=30.0, target_std=4.0)
KNOBS: dict[str, Any] = {
    "teacher": "source",
    "weight": 0.9,
    "soft_loss": "logits",
    "temperature": 4.0,
    "alpha": 1.0,
    "beta": 8.0,
    "features": [],
    "feature_weight": 0.1,
    "attention": [],
    "attention_weight": 1.0,
}
BOTH = {"features": ["stages.0", "stages.2"], "attention": ["stages.1"]}


def resnet(width: int, seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(SHAPE, 10, 8, "cifar", None, width, "relu", "batch", 0.0)


def vit(width: int) -> ViT:
    torch.manual_seed(0)
    return ViT(SHAPE, 10, 2, width, 1, 2, 2, "token", "gelu", "layer", 0.0)


def distill(teacher: nn.Module, spec: DataSpec = SPEC, seed: int = 0, **changes: Any) -> Distill:
    frozen = copy.deepcopy(teacher).eval().requires_grad_(False)
    method = Distill(**(KNOBS | changes), spec=spec, seed=seed, network=lambda key, run: frozen)
    method.history = []
    return method


def classifier(model: nn.Module, lr: float = 0.05) -> Classifier:
    sgd = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    knobs = {
        "label_smoothing": 0.1,
        "class_weights": None,
        "channels_last": False,
        "compile": False,
        "loss": None,
        "metrics": None,
    }
    return Classifier(model, SPEC, sgd, partial(constant), seed=0, **knobs)


def fit(learner: Learner, *callbacks: L.Callback, steps: int = 6, augment: Mapping[str, Any] = {}) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(learner, Digits(64, augment=dict(augment), seed=0))
    return trainer


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    """Of a student and a teacher, and the classes."""
    dice = torch.Generator().manual_seed(0)
    student_BK, teacher_BK = torch.randn(2, 50, 7, generator=dice, dtype=torch.float64).mul(3).unbind()
    return student_BK, teacher_BK, torch.randint(7, (50,), generator=dice)


def test_distillation_is_the_divergence_of_softened_probabilities_on_paper():
    student_BK = torch.tensor([[0.0, 0.0]])
    teacher_BK = torch.tensor([[2 * math.log(3.0), 0.0]])  # at temperature 2: probabilities 3/4 and 1/4
    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert float(distillation(student_BK, teacher_BK, 2.0)) == pytest.approx(expected)


def test_gradients_keep_their_size_as_the_temperature_grows():
    student_BK = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    teacher_BK = torch.tensor([[0.5, 0.5, -1.0]], dtype=torch.float64)
    (slope_BK,) = torch.autograd.grad(distillation(student_BK, teacher_BK, 1e4), student_BK)
    centred = lambda z_BK: z_BK - z_BK.mean(1, keepdim=True)  # noqa: E731
    limit_BK = (centred(student_BK) - centred(teacher_BK)) / 3  # Hinton et al. 2015, equation 4, times T squared
    assert torch.allclose(slope_BK, limit_BK, rtol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_with_the_teachers_own_doubt_is_distillation(
    logits: tuple[Tensor, Tensor, Tensor], temperature: float
):
    student_BK, teacher_BK, y_B = logits
    total = 0.0
    for student_1K, teacher_1K, y_1 in zip(student_BK.split(1), teacher_BK.split(1), y_B.split(1), strict=True):
        sure = float((teacher_1K / temperature).softmax(1)[0, y_1])
        total += float(decoupled(student_1K, teacher_1K, y_1, temperature, 1.0, 1 - sure))  # paper, equation 7
    assert total / 50 == pytest.approx(float(distillation(student_BK, teacher_BK, temperature)), rel=1e-10)


def test_decoupled_parts_are_those_of_the_formula(logits: tuple[Tensor, Tensor, Tensor]):
    student_BK, teacher_BK, y_B = logits
    p_BK, q_BK = (teacher_BK / 2).softmax(1), (student_BK / 2).softmax(1)
    target = others = 0.0
    for p_K, q_K, y in zip(p_BK.tolist(), q_BK.tolist(), y_B.tolist(), strict=True):
        p, q = p_K.pop(y), q_K.pop(y)
        target += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        others += sum(a / (1 - p) * math.log(a / (1 - p) / (b / (1 - q))) for a, b in zip(p_K, q_K, strict=True))
    assert float(decoupled(student_BK, teacher_BK, y_B, 2.0, 1.0, 0.0)) == pytest.approx(4 * target / 50)
    assert float(decoupled(student_BK, teacher_BK, y_B, 2.0, 0.0, 1.0)) == pytest.approx(4 * others / 50)


def test_the_larger_part_of_a_mixed_target_is_the_target(logits: tuple[Tensor, Tensor, Tensor]):
    student_BK, teacher_BK, y_B = logits
    mixed_BK = 0.7 * F.one_hot(y_B, 7) + 0.3 * F.one_hot(y_B.roll(1), 7)
    hard = decoupled(student_BK, teacher_BK, y_B, 4.0, 1.0, 8.0)
    assert torch.equal(decoupled(student_BK, teacher_BK, mixed_BK, 4.0, 1.0, 8.0), hard)


def test_decoupled_stays_finite_where_the_teacher_is_certain():
    student_BK = torch.tensor([[0.0, 80.0, -80.0]], requires_grad=True)
    loss = decoupled(student_BK, torch.tensor([[200.0, -200.0, 0.0]]), torch.tensor([0]), 1.0, 1.0, 8.0)
    (slope_BK,) = torch.autograd.grad(loss, student_BK)
    assert loss.isfinite()
    assert slope_BK.isfinite().all()


def test_attention_compares_directions_of_squared_activations():
    student_BCHW = torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]])  # energy (1, 0), on the unit circle the same
    teacher_BCHW = torch.tensor([[[[3**0.5, 2.0]]]])  # energy (3, 4), on the unit circle (0.6, 0.8)
    expected = (1 - 0.6) ** 2 + 0.8**2
    assert float(attention_loss(student_BCHW, teacher_BCHW)) == pytest.approx(expected)
    assert float(attention_loss(student_BCHW, 7 * student_BCHW)) == pytest.approx(0.0)


def test_attention_of_tokens_is_that_of_a_map_with_one_row():
    dice = torch.Generator().manual_seed(0)
    student_BND, teacher_BND = torch.randn(3, 5, 4, generator=dice), torch.randn(3, 5, 6, generator=dice)
    maps = [tokens_BND.transpose(1, 2)[:, :, None] for tokens_BND in (student_BND, teacher_BND)]
    torch.testing.assert_close(attention_loss(student_BND, teacher_BND), attention_loss(*maps))


@pytest.mark.parametrize("factor", [2, 0.5])
def test_attention_takes_maps_of_another_resolution(factor: float):
    student_BCHW = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    student_BCHW = student_BCHW[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)  # in blocks of 2 x 2
    teacher_BCHW = F.interpolate(student_BCHW, scale_factor=factor, mode="nearest")
    assert float(attention_loss(student_BCHW, teacher_BCHW)) == pytest.approx(0.0, abs=1e-12)


def layers(model: ResNet, x_BCHW: Tensor) -> list[Tensor]:
    """The outputs of the three stages, then the logits."""
    outputs = [model.stem(x_BCHW)]
    for stage in model.stages:
        outputs.append(stage(outputs[-1]))
    return [*outputs[1:], model.head(model.pool(outputs[-1]))]


@pytest.mark.parametrize("is_captured", [False, True])
def test_the_objective_is_the_weighted_sum_written_out(is_captured: bool):
    teacher, student = resnet(8, seed=1).eval(), resnet(4).eval()
    method = distill(teacher, weight=0.6, feature_weight=0.3, attention_weight=5.0, **BOTH)
    student, _ = method.apply_to(student)
    learner = classifier(capture(student, of_shape(SHAPE)) if is_captured else student)
    dice = torch.Generator().manual_seed(3)
    x_BCHW, y_B = torch.randn(6, *SHAPE, generator=dice), torch.randint(10, (6,), generator=dice)
    method.on_fit_start(L.Trainer(logger=False), learner)
    value = learner.objective([x_BCHW], learner.eval()(x_BCHW), y_B)
    ours, theirs = layers(student, x_BCHW), layers(teacher, x_BCHW)
    soft_BK = (theirs[-1] / 4).softmax(1)
    expected = 0.4 * learner.loss(ours[-1], y_B)
    expected += 0.6 * 16 * F.kl_div((ours[-1] / 4).log_softmax(1), soft_BK, reduction="batchmean")
    for stage in (0, 2):
        adapted_BCHW = student.adapters[f"stages__{stage}"](ours[stage])
        expected += 0.3 * (adapted_BCHW - theirs[stage]).square().mean()
    expected += 5 * attention_loss(ours[1], theirs[1])
    torch.testing.assert_close(value, expected)
    method.teardown(L.Trainer(logger=False), learner, "fit")
    assert not getattr(learner.model, "watched", {})


def test_looking_at_the_layers_leaves_the_network_as_it_was():
    model = resnet(4)
    model.stem.eval()
    before = copy.deepcopy(model)
    distill(resnet(8), **BOTH).require(model)
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_regression_learns_from_the_square_of_the_distance_to_the_teacher():
    teacher, student = (MLP((5,), 1, [width], "relu", "none", 0.0) for width in (8, 4))
    knobs = {"loss": "mae", "metrics": None, "channels_last": False, "compile": False}
    learner = Regressor(student, NUMBERS, partial(torch.optim.SGD, lr=0.1), partial(constant), seed=0, **knobs)
    method = distill(teacher, NUMBERS, weight=0.25)
    method.on_fit_start(L.Trainer(logger=False), learner)
    x_BD, y_B = torch.randn(6, 5), 30 + 4 * torch.randn(6)
    output_B1 = learner(x_BD)
    to_label = (output_B1[:, 0] - (y_B - 30) / 4).abs().mean()
    to_teacher = (output_B1 - teacher(x_BD)).square().mean()
    torch.testing.assert_close(learner.objective([x_BD], output_B1, y_B), 0.75 * to_label + 0.25 * to_teacher)


def test_a_student_comes_closer_to_its_teacher_than_labels_bring_it():
    teacher = classifier(resnet(8, seed=1))
    fit(teacher, steps=60)
    x_BCHW = torch.cat([batch.x for batch in teacher.trainer.datamodule.val_dataloader()])
    distances = []
    for callbacks in ([], [distill(teacher.model, weight=1.0)]):
        student = classifier(resnet(4))
        fit(student, *callbacks, steps=60)
        with torch.no_grad():
            distances.append(float(distillation(student.model.eval()(x_BCHW), teacher.model.eval()(x_BCHW), 1.0)))
    by_labels, by_teacher = distances
    assert by_teacher < 0.7 * by_labels


@pytest.mark.parametrize("mixing", [{}, {"mixup": Mixup(1.0, 1.0)}])
@pytest.mark.parametrize("soft_loss", ["logits", "decoupled"])
def test_two_runs_are_equal_to_the_last_bit(soft_loss: str, mixing: dict[str, Any]):
    states = []
    for noise in (0, 1):
        learner, method = classifier(resnet(4)), distill(resnet(8, seed=1), soft_loss=soft_loss, **BOTH)
        torch.manual_seed(noise)
        fit(learner, method, augment=mixing)
        states.append(learner.model.state_dict())
    assert all(value.isfinite().all() for value in states[0].values())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_first_adapters_depend_on_the_seed_and_draw_from_no_global_generator():
    methods = [distill(resnet(8), seed=seed, **BOTH) for seed in (0, 1, 0)]
    students = [resnet(4) for _ in methods]
    before = torch.get_rng_state()
    first, other, again = (
        method.apply_to(student)[0].adapters["stages__0"].weight
        for method, student in zip(methods, students, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_adapters_learn_and_the_teacher_does_not():
    learner, method = classifier(resnet(4)), distill(resnet(8, seed=1), **BOTH)
    start = copy.deepcopy(method.teacher.state_dict())
    adapters = distill(resnet(8, seed=1), **BOTH).apply_to(resnet(4))[0].adapters.state_dict()
    trainer = fit(learner, method)
    trained = learner.model.adapters.state_dict()
    assert trained.keys() == {f"stages__{stage}.{part}" for stage in (0, 2) for part in ("weight", "bias")}
    assert not any(torch.equal(trained[name], value) for name, value in adapters.items())
    assert all(torch.equal(method.teacher.state_dict()[name], value) for name, value in start.items())
    optimized = {id(weight) for group in trainer.optimizers[0].param_groups for weight in group["params"]}
    assert optimized == {id(weight) for weight in learner.model.parameters()}


def test_a_checkpoint_holds_no_teacher_and_is_replayed_to_the_last_bit():
    learner, method = classifier(resnet(4)), distill(resnet(8, seed=1), **BOTH)
    fit(learner, method)
    file = io.BytesIO()
    torch.save({"state_dict": learner.state_dict(), "compression": method.history}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    weights = {name.removeprefix("model."): value for name, value in stored["state_dict"].items()}
    extra = {f"adapters.stages__{stage}.{part}" for stage in (0, 2) for part in ("weight", "bias")}
    assert weights.keys() == resnet(4).state_dict().keys() | extra
    twin = base.replay(resnet(4, seed=5), stored["compression"])
    twin.load_state_dict(weights)
    x_BCHW = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    deployable = base.finalize(twin, stored["compression"])
    assert torch.equal(deployable(x_BCHW), learner.model.eval()(x_BCHW))
    assert deployable.state_dict().keys() == resnet(4).state_dict().keys()


class Fails(L.Callback):
    """Ends the fit in its second step."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("for the test")


@pytest.mark.parametrize("fails", [False, True])
def test_after_the_fit_no_hook_and_no_objective_is_left(fails: bool):
    learner, method = classifier(resnet(4)), distill(resnet(8, seed=1), **BOTH)
    if fails:
        with pytest.raises(RuntimeError, match="for the test"):
            fit(learner, method, Fails())
    else:
        fit(learner, method)
    modules = [*learner.model.modules(), *method.teacher.modules()]
    assert not any(module._forward_hooks for module in modules)
    assert "objective" not in vars(learner)


def test_layers_of_one_width_are_compared_without_an_adapter():
    method = distill(resnet(4, seed=1), **BOTH)
    model, entry = method.apply_to(resnet(4))
    assert entry == {"method": "distill", "adapters": {}}
    assert model.state_dict().keys() == resnet(4).state_dict().keys()


def test_tokens_are_compared_through_a_linear_adapter():
    learner = classifier(vit(8))
    method = distill(vit(12), features=["layers.0"], attention=["layers.1"])
    fit(learner, method, steps=2)
    assert method.history == [{"method": "distill", "adapters": {"layers.0": [8, 12, "linear"]}}]
    assert feature_loss(learner.model.adapters["layers__0"](torch.zeros(1, 17, 8)), torch.zeros(1, 17, 12)).isfinite()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"features": ["stage.2"]}, r"features=stage.2: no module of this network; did you mean stages.2\?"),
        ({"attention": ["stages.2.1"]}, "attention=stages.2.1: no module of the teacher"),
        ({"features": ["stages.1"]}, "features=stages.1: gives 8 x 4 x 4 here and 8 x 8 x 8 in the teacher"),
        ({"attention": ["head"]}, "attention=head: gives 10 here"),
        ({"weight": 0.0}, "weight=0.0: leaves the teacher nothing to say"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_training(changes: dict[str, Any], reason: str):
    student = ResNet(SHAPE, 10, [1, 1, 2], "cifar", None, 4, "relu", "batch", 0.0)
    teacher = resnet(8)
    teacher.stages[1] = nn.Sequential(nn.Conv2d(8, 8, 1))  # does not halve the resolution
    teacher.stages[2] = nn.Sequential(nn.Conv2d(8, 32, 1))
    with pytest.raises(ConfigError, match=rf"compression\.distill\.{reason}"):
        distill(teacher, **changes).require(student)


def test_a_regression_has_no_classes_to_take_apart():
    with pytest.raises(ConfigError, match=r"soft_loss=decoupled: .* toy has none; use logits"):
        distill(nn.Linear(5, 1), NUMBERS, soft_loss="decoupled")

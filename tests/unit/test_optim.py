import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.plugins.precision import MixedPrecision
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from espalier.optim.build import build_optimizer, require_step
from espalier.optim.groups import parameter_groups
from espalier.optim.lamb import Lamb
from espalier.optim.lion import Lion
from espalier.optim.muon import Muon, orthogonal

CONF = Path(__file__).parents[2] / "conf" / "optimizer"
OPTIMIZERS = sorted(file.stem for file in CONF.glob("*.yaml"))


def option(name: str, **changes: Any) -> partial[torch.optim.Optimizer]:
    return instantiate(OmegaConf.load(CONF / f"{name}.yaml"), _convert_="all", **changes)


class Net(nn.Module):
    """One of each kind of parameter: kernels, matrices, norms, biases, a table, a token, an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.table = nn.Embedding(5, 8)
        self.stem = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Conv2d(4, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.norm(self.stem(x)).relu()).flatten(2).mT  # (B, 4, 8)
        x = x + self.token + self.table.weight[:4]
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


DECAYED = ["stem.weight", "body.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]


def net() -> Net:
    torch.manual_seed(3)
    return Net()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step % 2)
        x, y = torch.randn(16, 1, 6, 6), torch.randint(3, (16,))
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def names_of(params: list[Tensor], model: nn.Module) -> list[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for parameter in params]


def test_the_promised_optimizers_are_there():
    assert " ".join(OPTIMIZERS) == "adafactor adam adamw lamb lion momentum muon nesterov rmsprop sgd"


# Parameter groups


def test_only_matrices_and_kernels_decay():
    model = net()
    decayed, exempt = parameter_groups(model, 0.1)
    assert names_of(decayed["params"], model) == DECAYED
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = net()
    model.body.weight.requires_grad_(False)
    grouped = [name for group in parameter_groups(model, 0.1) for name in names_of(group["params"], model)]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters() if name != "body.weight")


def test_a_tied_weight_is_optimized_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    (group,) = parameter_groups(model, 0.1)
    assert group["params"] == [model[0].weight]


def test_without_weight_decay_there_is_one_group():
    assert len(parameter_groups(net(), 0.0)) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_reaches_the_matrices_of_every_optimizer_and_nothing_else(name):
    model = net()
    optimizer = build_optimizer(option(name, weight_decay=0.125), model)
    decay = {
        parameter: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in names_of(group["params"], model)
    }
    assert decay == {name: 0.125 if name in DECAYED else 0.0 for name, _ in model.named_parameters()}


def test_an_unset_weight_decay_still_spares_norms_and_biases():
    decayed, exempt = build_optimizer(partial(torch.optim.AdamW, lr=0.1), net()).param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.01, 0.0)  # torch's default


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="requires a gradient"):
        build_optimizer(option("adamw"), net().requires_grad_(False))


# Fused kernels


def test_fused_kernels_are_used_where_torch_has_them():
    fused = {name for name in OPTIMIZERS if build_optimizer(option(name), net()).defaults.get("fused")}
    assert fused == {"sgd", "momentum", "nesterov", "adam", "adamw"}


def test_parameters_without_a_fused_kernel_fall_back_to_the_plain_loop():
    model = nn.Linear(2, 2, dtype=torch.complex64)
    optimizer = build_optimizer(option("adam"), model)
    before = model.weight.detach().clone()
    model(torch.ones(1, 2, dtype=torch.complex64)).abs().sum().backward()
    optimizer.step()
    assert optimizer.defaults["fused"] is False
    assert not torch.equal(model.weight, before)


def test_gradients_of_a_fused_optimizer_can_be_clipped_under_bfloat16():
    model = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(option("adamw"), model)
    precision = MixedPrecision("bf16-mixed", "cpu")
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    precision.clip_gradients(optimizer, clip_val=1.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.8]]))


# Steps


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(name):
    model = net()
    losses = train(model, build_optimizer(option(name), model), range(30))
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_is_bit_equal_to_an_unbroken_one(name):
    unbroken = net()
    train(unbroken, build_optimizer(option(name), unbroken), range(10))

    first = net()
    optimizer = build_optimizer(option(name), first)
    train(first, optimizer, range(5))
    stored = through_a_file({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    second = Net()
    second.load_state_dict(stored["model"])
    optimizer = build_optimizer(option(name), second)
    optimizer.load_state_dict(stored["optimizer"])
    train(second, optimizer, range(5, 10))

    for name, value in unbroken.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def first_steps(optimizer_class: type[torch.optim.Optimizer], grads: list[list[float]], **settings: Any) -> Tensor:
    """Where the weight (3, 4) ends after steps with these gradients."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = optimizer_class([weight], **settings)
    for grad in grads:
        weight.grad = torch.tensor([grad])
        optimizer.step()
    return weight.detach()[0]


def test_lion_takes_two_steps_computed_by_hand():
    end = first_steps(Lion, [[1.0, -2.0], [-0.05, 0.5]], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    # step 1: sign (1, -1); weights (3, 4) * 0.95 - 0.1 * sign = (2.75, 3.9); momentum (0.01, -0.02)
    # step 2: 0.9 * momentum + 0.1 * grad = (0.004, 0.032), sign (1, 1); (2.75, 3.9) * 0.95 - 0.1
    torch.testing.assert_close(end, torch.tensor([2.5125, 3.605]))


def test_the_first_step_of_lamb_is_lr_times_the_length_of_the_weight():
    end = first_steps(Lamb, [[10.0, -1.0]], lr=0.1, betas=(0.9, 0.999), eps=1e-12, weight_decay=0.0)
    # corrected mean / root mean square = sign = (1, -1) of length sqrt 2; weight of length 5: 0.1 * 5 / sqrt 2 each
    torch.testing.assert_close(end, torch.tensor([3.0 - 0.5 / math.sqrt(2), 4.0 + 0.5 / math.sqrt(2)]))


def test_lamb_adds_the_decayed_weight_before_it_measures_the_update():
    end = first_steps(Lamb, [[10.0, -1.0]], lr=0.1, betas=(0.9, 0.999), eps=1e-12, weight_decay=0.5)
    update = torch.tensor([1.0 + 0.5 * 3.0, -1.0 + 0.5 * 4.0])
    torch.testing.assert_close(end, torch.tensor([3.0, 4.0]) - 0.1 * 5.0 * update / update.norm())


def test_lamb_moves_biases_as_adam_does():
    start = [torch.tensor([0.5, -2.0]), torch.tensor([1.0, 3.0, 1.0])]
    ends = []
    for optimizer_class, extra in ((Lamb, {"weight_decay": 0.0}), (torch.optim.Adam, {})):
        biases = [nn.Parameter(bias.clone()) for bias in start]
        optimizer = optimizer_class(biases, lr=0.1, betas=(0.9, 0.999), eps=1e-8, **extra)
        for step in range(3):
            for bias in biases:
                bias.grad = torch.arange(len(bias)) - 0.7 * step
            optimizer.step()
        ends.append(torch.cat(biases).detach())
    torch.testing.assert_close(ends[0], ends[1])


def quintic(singular: float) -> float:
    for _ in range(5):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    return singular


def muon(groups: list[dict[str, Any]], momentum: float = 0.95) -> Muon:
    return Muon(groups, lr=0.1, momentum=momentum, rounds=5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)


def test_the_first_step_of_muon_on_a_diagonal_gradient_follows_the_quintic():
    weight = nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.tensor([[3.0, 0.0, 0.0], [0.0, -4.0, 0.0]])
    muon([{"params": [weight], "hidden": True}]).step()
    scale = 0.1 * 0.2 * math.sqrt(3)  # lr, AdamW's size, longer side
    expected = torch.full((2, 3), 0.95)  # 1 - lr * weight decay
    expected[0, 0] -= scale * quintic(0.6)  # singular values over their Frobenius norm: 3 / 5 and 4 / 5
    expected[1, 1] += scale * quintic(0.8)
    torch.testing.assert_close(weight.detach(), expected)


def test_muon_agrees_with_torchs_own_on_a_matrix_within_bfloat16():
    torch.manual_seed(0)
    start, grads = torch.randn(6, 4), torch.randn(3, 6, 4)
    ends = []
    for settings in (None, {"lr": 0.1, "momentum": 0.95, "weight_decay": 0.5, "adjust_lr_fn": "match_rms_adamw"}):
        weight = nn.Parameter(start.clone())
        optimizer = torch.optim.Muon([weight], **settings) if settings else muon([{"params": [weight], "hidden": True}])
        for grad in grads:
            weight.grad = grad.clone()
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(ends[0], ends[1], atol=0.01, rtol=0)


def test_muon_moves_everything_else_as_adamw_does():
    ends = []
    for name in ("muon", "adamw"):
        bias = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.5}
        optimizer = (
            muon([{"params": [bias], "hidden": False}]) if name == "muon" else torch.optim.AdamW([bias], **settings)
        )
        for step in range(4):
            bias.grad = torch.tensor([1.0, 0.1 * step, -0.3])
            optimizer.step()
        ends.append(bias.detach())
    torch.testing.assert_close(ends[0], ends[1])


def test_muon_takes_the_matrices_between_the_first_and_the_last():
    model = net()
    hidden, edges, rest = build_optimizer(option("muon"), model).param_groups
    assert [group["hidden"] for group in (hidden, edges, rest)] == [True, False, False]
    assert names_of(hidden["params"], model) == DECAYED[1:-1]
    assert names_of(edges["params"], model) == [DECAYED[0], DECAYED[-1]]


def test_muon_without_marked_groups_is_refused():
    with pytest.raises(ValueError, match="hidden=True"):
        muon([{"params": [nn.Parameter(torch.ones(2, 2))]}])


@pytest.mark.parametrize("shape", [(3, 5, 9), (3, 9, 5)])
def test_orthogonal_matrices_have_singular_values_near_one_and_keep_their_directions(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.mT @ orthogonal(matrix, rounds=5) @ vt.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.65
    assert values.max() < 1.25
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_an_optimizer_that_takes_sparse_gradients_passes(name: str):
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    require_step(partial(torch.optim.SGD, lr=0.1, momentum=0.9 if name == "momentum" else 0.0, weight_decay=0.1), model)
    require_step(partial(torch.optim.SparseAdam, lr=0.1), nn.Embedding(5, 3, sparse=True))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SparseAdam])
def test_an_optimizer_that_does_not_take_all_gradients_of_a_model_is_refused(kind: type[torch.optim.Optimizer]):
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"optimizer=sgd takes; or build it with sparse=False"):
        require_step(partial(kind, lr=0.1), model)
    assert torch.equal(torch.get_rng_state(), state)
    require_step(partial(torch.optim.AdamW, lr=0.1), nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)))

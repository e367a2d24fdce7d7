"""Smaller networks: channels, heads and branches that go, factorised layers, and the same sizes on a fresh network."""

import copy
import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.compression import base, channel_groups, low_rank, prune_channels, residual_blocks
from espalier.compression.low_rank import LowRank
from espalier.compression.prune_channels import PruneChannels
from espalier.data.loaders import Batch
from espalier.errors import ConfigError
from espalier.models.blocks import Attention, Residual
from espalier.models.cnn import CNN
from espalier.models.densenet import DenseNet
from espalier.models.mlp import MLP
from espalier.models.resnet import ResNet
from espalier.models.vit import ViT
from espalier.profiling.cost import count_macs, count_params
from espalier.spec import DataSpec, of_shape

SHAPE = (1, 8, 8)

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(SHAPE, 10, 8, "cifar", None, 8, "relu", "batch", 0.0),
    "bottleneck": lambda: ResNet(SHAPE, 10, [2, 1], "cifar", "bottleneck", 8, "relu", "none", 0.0),
    "cnn": lambda: CNN(SHAPE, 10, [8, 16], [16], 2, "relu", "batch", 0.1),
    "densenet": lambda: DenseNet(SHAPE, 10, [2, 2], "cifar", 4, 0.5, "relu", "batch", 0.0),
    "vit": lambda: ViT(SHAPE, 10, 4, 16, 2, 4, 2, "token", "gelu", "rms", 0.0),
    "mlp": lambda: MLP(SHAPE, 10, [32, 16], "relu", "batch", 0.0),
}


def network(name: str) -> nn.Module:
    """With weights and statistics as after training: no two channels alike."""
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=draw)
        for key, buffer in model.named_buffers():
            if "running" in key:
                buffer.uniform_(0.5, 1.5, generator=draw)
    return model


def samples(num: int) -> Batch:
    draw = torch.Generator().manual_seed(0)
    index = torch.arange(num)
    return Batch.single(torch.randn(num, *SHAPE, generator=draw), torch.randint(10, (num,), generator=draw), index)


def pruner(latency_ms: Callable[[nn.Module], float] = lambda model: 1.0, **knobs: Any) -> PruneChannels:
    usual: dict[str, Any] = {
        "criterion": "group_l2",
        "budget": "ratio",
        "ratio": 0.5,
        "speedup": 2.0,
        "is_global": False,
        "round_to": 1,
        "drop_branches": 0.0,
        "skip": [],
    }
    spec = DataSpec.single("noise", SHAPE, 1.0, (0.0,), (1.0,), tuple("abcdefghij"))
    return PruneChannels(
        **{**usual, **knobs}, spec=spec, seed=0, samples=samples, loss=F.cross_entropy, latency_ms=latency_ms
    )


def stored(model: nn.Module, history: list[base.Entry]) -> dict[str, Any]:
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save({"history": history, "state_dict": model.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def silence(model: nn.Module, groups: list[channel_groups.Group], dead: list[Tensor]) -> None:
    """Let those channels be zero for every input, by the weights that make and scale them."""
    with torch.no_grad():
        for group, channels in zip(groups, dead, strict=True):
            for part in group.parts:
                for name, axis in part.tensors.items():
                    tensor = getattr(model.get_submodule(part.path), name)
                    if part.role != "reads" and isinstance(tensor, nn.Parameter):
                        tensor.movedim(axis, 0)[part.positions[torch.isin(part.channels, channels)]] = 0


def every_other(group: channel_groups.Group) -> Tensor:
    return torch.arange(0, group.num_channels, 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_says_the_same_without_the_channels_that_said_nothing(name: str):
    model = network(name)
    skip = ["patches"] if name == "vit" else []  # the norms of a transformer would see fewer features
    groups = channel_groups.coupled(model, of_shape(SHAPE), skip)
    assert groups
    silence(model, groups, [every_other(group) for group in groups])
    x = samples(7).x
    before, macs = model(x), count_macs(model, of_shape(SHAPE))
    model, _ = pruner(criterion="l2", skip=skip).apply(model)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(x[:1]), before[:1], atol=1e-5, rtol=1e-5)
    assert count_macs(model, of_shape(SHAPE)) < macs / 1.9


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("recipe", ["prune", "prune,factorise", "factorise,prune"])
def test_a_fresh_network_takes_the_sizes_and_weights_without_torch_pruning(
    name: str, recipe: str, monkeypatch: pytest.MonkeyPatch
):
    model = network(name)
    history = []
    for step in recipe.split(","):
        drop_branches = 0.5 if name in ("resnet", "bottleneck", "vit") else 0.0
        method = pruner(drop_branches=drop_branches) if step == "prune" else LowRank("rank", 0.3, 1, [])
        method.require(model)
        model, entry = method.apply_to(model)
        history.append(entry)
    checkpoint = stored(model, history)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    fresh = base.replay(NETWORKS[name](), checkpoint["history"])
    fresh.load_state_dict(checkpoint["state_dict"], strict=True)
    deployed = base.finalize(fresh, checkpoint["history"])
    x = samples(7).x
    assert torch.equal(deployed(x), model(x))
    assert repr(deployed) == repr(model)


def test_only_what_changed_is_written_down():
    before = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 4, 10))
    after = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 4, 10))
    statistics = {"weight": [6], "bias": [6], "running_mean": [6], "running_var": [6]}
    assert channel_groups.differences(before, after) == {
        "0": {"out_channels": 6, "weight": [6, -1, -1, -1], "bias": [6]},
        "1": {"num_features": 6, **statistics},
        "3": {"in_features": 24, "weight": [-1, 24]},
    }
    assert repr(channel_groups.reshape(before, channel_groups.differences(before, after))) == repr(after)


def test_the_sizes_fit_a_network_with_another_head():
    _, entry = pruner().apply_to(network("resnet"))
    other = base.replay(ResNet(SHAPE, 3, 8, "cifar", None, 8, "relu", "batch", 0.0), [entry])
    assert other(samples(2).x).shape == (2, 3)
    assert other.head.in_features == 16


@pytest.mark.parametrize(
    "method", [pruner(), pruner(drop_branches=0.5), LowRank("rank", 0.3, 1, [])], ids=["channels", "branches", "ranks"]
)
def test_the_ledger_of_another_architecture_is_refused(method: base.Compression):
    _, entry = method.apply_to(network("resnet"))
    with pytest.raises(ConfigError, match="does not fit this architecture"):
        base.replay(NETWORKS["mlp"](), [entry])


def test_a_magnitude_counts_the_weights_that_its_criterion_names():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
        model[1].weight.copy_(torch.tensor([-0.5, 2.0]))
        model[2].weight.copy_(torch.tensor([[4.0, -1.0]]))
    groups = channel_groups.coupled(model, of_shape((2,)), [])
    expected = {"l1": [3, 3], "l2": [5, 9], "bn_scale": [0.5, 2], "group_l2": [5 + 0.25 + 16, 9 + 4 + 1]}
    for criterion, scores in expected.items():
        (found,) = prune_channels.weight_scores(model, groups, criterion)
        assert found.tolist() == scores


def test_taylor_is_the_squared_change_where_the_loss_is_linear():
    model = MLP(SHAPE, 10, [4], "relu", "none", 0.0)
    batch = samples(32)
    loss = lambda output, y: output.sum(1).mean()  # noqa: E731
    (scores,) = prune_channels.taylor_scores(model, channel_groups.coupled(model, of_shape(SHAPE), []), batch, loss)
    for channel in range(4):
        without = copy.deepcopy(model)
        with torch.no_grad():
            without.head.weight[:, channel] = 0
            change = loss(model(batch.x), batch.y) - loss(without(batch.x), batch.y)
        torch.testing.assert_close(scores[channel], change**2)


@pytest.mark.parametrize(
    ("share", "step", "gone"),
    [(0.5, 1, [1, 3, 5]), (0.5, 4, [1, 3]), (0.9, 4, [1, 3]), (0.9, 1, [1, 3, 5, 0, 2]), (0.1, 2, []), (0.5, 8, [])],
)
def test_the_lowest_scores_go_and_a_multiple_of_the_step_stays(share: float, step: int, gone: list[int]):
    scores = torch.tensor([3.0, 0.0, 4.0, 1.0, 5.0, 2.0])
    assert prune_channels.lowest(scores, share, step).tolist() == gone


def test_a_global_ranking_compares_scores_relative_to_their_layer():
    scores = [torch.tensor([0.1, 0.2, 2.7]), torch.tensor([90.0, 100.0, 110.0])]
    assert prune_channels.global_shares(scores, 1 / 3) == pytest.approx([2 / 3, 0])


def test_every_group_of_a_norm_loses_as_many_channels():
    model = ResNet(SHAPE, 10, [1], "cifar", None, 16, "relu", "group", 0.0)
    conv = model.stages[0][0].branch.conv1.conv
    with torch.no_grad():
        conv.weight.copy_(torch.arange(1.0, 17)[:, None, None, None].expand_as(conv.weight))  # the last matter most
    kept = conv.weight[[2, 3, 6, 7, 10, 11, 14, 15]].clone()  # two of each four in a group
    model, _ = pruner(criterion="l1").apply(model)
    inner = model.stages[0][0].branch.conv1
    assert torch.equal(inner.conv.weight[:, 0], kept[:, 0])
    assert (inner.norm.num_groups, inner.norm.num_channels) == (4, 8)


def test_heads_go_whole():
    model, _ = pruner(ratio=0.4, skip=["patches"]).apply(network("vit"))
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    assert [(a.num_heads, a.head_width, a.qkv.out_features, a.proj.in_features) for a in attentions] == [
        (2, 4, 24, 8)
    ] * 2


def test_outputs_and_skipped_modules_keep_their_size():
    model, _ = pruner(skip=["stem"]).apply(network("resnet"))
    assert model.head.out_features == 10
    assert model.stem.conv.conv.out_channels == 8
    assert model.stages[0][0].branch.conv1.conv.out_channels == 4


@pytest.mark.parametrize("is_global", [False, True])
def test_a_budget_of_macs_is_met_with_little_to_spare(is_global: bool):
    model = network("resnet")
    macs = count_macs(model, of_shape(SHAPE))
    model, _ = pruner(budget="macs", speedup=3.0, is_global=is_global).apply(model)
    assert 3 <= macs / count_macs(model, of_shape(SHAPE)) < 4


def test_a_budget_of_latency_goes_by_what_was_measured():
    model = network("mlp")
    params = count_params(model)
    model, _ = pruner(latency_ms=count_params, budget="latency", speedup=3.0).apply(model)
    assert 3 <= params / count_params(model) < 3.5


def test_a_budget_out_of_reach_says_what_can_be_had():
    with pytest.raises(ConfigError, match=r"speedup=1000: at most [\d.]+ of macs"):
        pruner(budget="macs", speedup=1000.0, round_to=8).apply(network("resnet"))


def test_a_branch_that_adds_nothing_goes_first_and_takes_its_activation_along():
    model = ResNet(SHAPE, 10, [3], "cifar", None, 8, "relu", "batch", 0.0).eval()
    nn.init.zeros_(model.stages[0][1].branch.conv2.norm.weight)
    x = samples(5).x
    before = model(x).detach()
    method = pruner(ratio=0.0, drop_branches=0.3)
    method.samples, method.loss = lambda num: Batch.single(x, before, torch.arange(5)), F.mse_loss
    model, entry = method.apply(model)
    assert entry["dropped"] == {"stages.0.1": False}
    assert torch.equal(model(x), before)
    assert isinstance(model.stages[0][1], nn.Identity)


def test_an_activation_stays_where_it_does_something():
    gelu = ResNet(SHAPE, 10, [2], "cifar", None, 8, "gelu", "batch", 0.0).eval()
    assert residual_blocks.needed_activations(gelu, ["stages.0.1"], [samples(1).x]) == {"stages.0.1": True}
    pooled = ResNet((1, 32, 32), 10, [1], "imagenet", "basic", 8, "relu", "batch", 0.0).eval()
    assert residual_blocks.needed_activations(pooled, ["stages.0.0"], [torch.zeros(1, 1, 32, 32)]) == {
        "stages.0.0": True
    }


def test_branches_with_a_shortcut_that_changes_the_shape_stay():
    model = network("resnet")
    assert [path for path, module in model.named_modules() if isinstance(module, Residual)] == [
        "stages.0.0",
        "stages.1.0",
        "stages.2.0",
    ]
    assert residual_blocks.removable(model, []) == ["stages.0.0"]
    assert residual_blocks.removable(model, ["stages.0"]) == []
    assert residual_blocks.removable(model, ["stages.0.0.branch.conv1"]) == []


@pytest.mark.parametrize("criterion", ["random", "taylor"])
def test_the_same_channels_are_chosen_again_and_no_random_state_moves(criterion: str):
    torch.manual_seed(5)
    model = network("resnet")
    state = torch.random.get_rng_state()
    (first, entry), (second, again) = (pruner(criterion=criterion).apply(copy.deepcopy(model)) for _ in range(2))
    assert entry == again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    LowRank("rank", 0.3, 1, []).apply(model)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("resnet", pruner(skip=["stages.0.0.branch.conv"]), r"skip=stages.0.0.branch.conv: no module .*did you mean"),
        ("resnet", LowRank("rank", 0.3, 1, ["haed"]), r"low_rank.skip=haed: no module .*did you mean head\?"),
        ("mlp", pruner(skip=["layers"]), "leaves no channels that may go"),
        ("bottleneck", pruner(criterion="bn_scale"), "no norm with a learnt scale; use criterion=group_l2"),
        ("cnn", pruner(drop_branches=0.5), "no residual block has an identity for a shortcut"),
        ("mlp", LowRank("rank", 0.3, 1, ["layers"]), "leaves no linear or convolutional layer but the last"),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(name: str, method: base.Compression, message: str):
    with pytest.raises(ConfigError, match=message):
        method.require(network(name))


def test_a_network_that_counts_on_its_channels_is_refused():
    class Reader(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self[0](x).mean())  # the input has as many features as the first layer

    fixed = Reader(nn.Flatten(), nn.Linear(64, 8), nn.Unflatten(1, (8, 1)), nn.Flatten(), nn.Linear(8, 10))
    with pytest.raises(ConfigError, match="cannot run with fewer channels everywhere"):
        pruner().require(fixed)


@pytest.mark.parametrize(
    ("method", "message"),
    [(pruner(round_to=64), "removes nothing"), (LowRank("rank", 1.0, 1, []), "no layer gets cheaper")],
)
def test_what_changes_nothing_is_an_error(method: base.Compression, message: str):
    with pytest.raises(ConfigError, match=message):
        method.apply(network("resnet"))


def test_a_linear_layer_becomes_its_best_approximation_of_that_rank():
    layer = nn.Linear(7, 5)
    left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    reduce, expand = low_rank.factorise(layer, 2)
    product = (expand.weight @ reduce.weight).detach()
    torch.testing.assert_close(product, left[:, :2] @ values[:2].diag() @ right[:2])
    lost = (layer.weight.detach() - product).square().sum()
    torch.testing.assert_close(lost, values[2:].square().sum())  # Eckart and Young
    assert reduce.bias is None
    assert torch.equal(expand.bias, layer.bias)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, (3, 5), stride=(1, 2), padding=(0, 2), dilation=(2, 1), bias=False),
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(3, 4, 1, stride=2),
        nn.Conv2d(3, 4, (3, 1), stride=2, padding=(1, 0)),
        nn.Conv2d(3, 4, (1, 3), stride=2, padding=1),
    ],
)
def test_a_convolution_of_full_rank_is_the_same_function(conv: nn.Conv2d):
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    full = min(low_rank.matrix(conv.weight).shape)
    torch.testing.assert_close(low_rank.factorise(conv, full)(x), conv(x), atol=1e-5, rtol=1e-5)


def test_a_separable_kernel_needs_one_channel():
    conv = nn.Conv2d(1, 1, 3, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 0.0, -1.0]))[None, None])
    x = torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(low_rank.factorise(conv, 1)(x), conv(x))


@pytest.mark.parametrize(("energy", "rank"), [(0.1, 1), (9 / 14, 1), (0.7, 2), (13 / 14, 2), (0.95, 3), (1.0, 3)])
def test_the_rank_is_the_smallest_with_that_share_of_squares(energy: float, rank: int):
    assert low_rank.rank_of(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), energy) == rank


def test_a_budget_of_parameters_is_met_with_little_to_spare():
    model = network("resnet")
    params = count_params(model)
    model, _ = LowRank("params", 0.5, 1, []).apply(model)
    assert 0.45 < count_params(model) / params <= 0.5
    with pytest.raises(ConfigError, match=r"keep=0.01: at least 0\.\d+ of the parameters stay"):
        LowRank("params", 0.01, 1, []).apply(network("resnet"))


def test_the_last_layer_and_what_gets_no_cheaper_stay_whole():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 32), Scaled(32, 32), nn.Linear(32, 32)
    )
    assert list(low_rank.factorisable(model, [])) == ["2"]
    assert low_rank.is_cheaper(model[2], 6)  # 6 * (8 + 32) of 256
    assert not low_rank.is_cheaper(model[2], 7)
    strided = nn.Conv2d(8, 8, 3, stride=2)
    assert low_rank.is_cheaper(strided, 7)  # 7 * (24 * 2 + 24) of 576: the first layer sees every column
    assert not low_rank.is_cheaper(strided, 8)

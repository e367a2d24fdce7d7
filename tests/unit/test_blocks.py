"""The parts of networks against hand-computed values and torch's own layers."""

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from espalier.models import blocks


def samples(num: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(0))


def test_every_activation_name_has_a_module():
    assert list(blocks.ACTIVATIONS) == list(get_args(blocks.Activation))
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(blocks.make_activation("silu")(x), x / (1 + torch.exp(-x)))
    torch.testing.assert_close(blocks.make_activation("hard_swish")(x), x * (x + 3).clamp(0, 6) / 6)


@pytest.mark.parametrize(("norm", "axes"), [("batch", (0, 2, 3)), ("layer", (1, 2, 3)), ("instance", (2, 3))])
def test_a_norm_takes_its_statistics_over_the_promised_axes(norm: blocks.Norm, axes: tuple[int, ...]):
    x = 3 + 2 * samples(4, (6, 5, 5))
    expected = (x - x.mean(axes, keepdim=True)) / x.std(axes, correction=0, keepdim=True)
    torch.testing.assert_close(blocks.make_norm(norm, 6)(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("channels", "groups"), [(16, 4), (64, 16), (128, 32), (512, 32), (130, 2), (3, 1)])
def test_group_norm_divides_the_channels_into_groups_of_at_least_four(channels: int, groups: int):
    norm = blocks.make_norm("group", channels)
    assert norm.num_groups == groups
    assert channels % norm.num_groups == 0


def test_attention_equals_torch_multi_head_attention():
    ours = blocks.Attention(width=12, num_heads=3)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        ours.qkv.bias.normal_(generator=torch.Generator().manual_seed(3))
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = samples(2, (5, 12))
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], atol=1e-6, rtol=1e-5)


def test_a_head_can_be_removed_by_its_rows_and_columns():
    attention = blocks.Attention(width=12, num_heads=3)
    x = samples(2, (5, 12))
    with torch.no_grad():
        attention.proj.weight[:, 4:8] = 0  # the middle head says nothing
        silent = attention(x)
        keep = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
        rows = torch.cat([keep, keep + 12, keep + 24])
        attention.qkv.weight = nn.Parameter(attention.qkv.weight[rows])
        attention.qkv.bias = nn.Parameter(attention.qkv.bias[rows])
        attention.proj.weight = nn.Parameter(attention.proj.weight[:, keep])
        attention.num_heads = 2
        torch.testing.assert_close(attention(x), silent)


def test_residual_adds_the_input():
    double = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        double.weight.copy_(2 * torch.eye(3))
    x = samples(2, (3,))
    torch.testing.assert_close(blocks.Residual(double)(x), 3 * x)
    torch.testing.assert_close(blocks.Residual(double, activation=nn.ReLU())(x), 3 * x.clamp(min=0))

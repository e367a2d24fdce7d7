"""Scans of one layer at a time: what grows, what stays as it was, which grid is rounded to."""

import pytest
import torch
from torch import Tensor, nn

from espalier.compression.sensitivity import pruned, quantized, round_weight, scan
from espalier.data.loaders import Batch


def batch(x: Tensor, y: Tensor) -> Batch:
    return Batch.single(x, y, torch.arange(len(y)))


def chain() -> nn.Sequential:
    """The first layer is the identity, the second doubles and has a weight that no sample reaches."""
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.eye(2))
        second.weight.copy_(torch.tensor([[2.0, 1.0]]))
    return nn.Sequential(first, second)


def test_pruning_half_a_layer_costs_what_that_half_contributed():
    model = chain()
    x, y = torch.tensor([[1.0, 3.0]] * 4), torch.tensor([[5.0]] * 4)
    growth = scan(model, batch(x, y), nn.functional.mse_loss, pruned)
    # the identity loses its two zeros, that is nothing; the second layer loses its weight 1 and with it 3 of 5
    assert growth == {"1": pytest.approx(9.0), "0": pytest.approx(0.0)}
    assert list(growth) == ["1", "0"], "the most sensitive first"


@pytest.mark.parametrize("disturb", [pruned, quantized])
def test_a_scan_leaves_the_network_as_it_was(disturb):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    samples = batch(torch.randn(8, 1, 4, 4), torch.randint(3, (8,)))
    growth = scan(model, samples, nn.functional.cross_entropy, disturb)
    assert set(growth) == {"0", "2"}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_number_of_samples_per_pass_does_not_change_the_mean():
    model, x = chain(), torch.randn(300, 2)
    y = x.sum(1, keepdim=True)
    whole = scan(model, batch(x, y), nn.functional.mse_loss, pruned)["1"]
    with torch.no_grad():
        difference = (2 * x[:, :1] - y).square().mean() - (2 * x[:, :1] + x[:, 1:] - y).square().mean()
    assert whole == pytest.approx(float(difference), rel=1e-4)


def test_weights_are_rounded_per_output_channel_to_127_steps_a_side():
    weight = torch.tensor([[1.27, 0.014, -0.016], [12.7, 0.14, -0.16]])
    expected = torch.tensor([[1.27, 0.01, -0.02], [12.7, 0.1, -0.2]])
    assert torch.allclose(round_weight(weight), expected, atol=1e-5)


def test_a_layer_of_zeros_stays_one():
    assert torch.equal(round_weight(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_eight_bits_disturb_a_wide_range_more_than_a_narrow_one():
    narrow, wide = chain(), chain()
    with torch.no_grad():
        wide[1].weight.copy_(torch.tensor([[200.0, 0.5]]))
    x = torch.tensor([[0.0, 1.0]] * 2)
    loss = nn.functional.mse_loss
    of_narrow = scan(narrow, batch(x, narrow(x).detach()), loss, quantized)["1"]
    of_wide = scan(wide, batch(x, wide(x).detach()), loss, quantized)["1"]
    assert of_narrow < 1e-4
    assert of_wide == pytest.approx(0.25, rel=0.01)  # 0.5 is below half a step of 200 / 127, and is gone

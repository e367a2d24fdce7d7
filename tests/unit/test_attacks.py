"""Attacks where the worst change within reach is known on paper."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from espalier.data.loaders import Batch
from espalier.robustness.base import Setting
from espalier.robustness.curves import harmed
from espalier.robustness.fgsm import fgsm
from espalier.robustness.pgd import STEPS, STRIDE, pgd
from espalier.spec import DataSpec

ANYWHERE = (-float("inf"), float("inf"))
WEIGHT_N = torch.tensor([0.5, -2.0, 1.5, 0.25])
Y_B = torch.tensor([1.0, -1.0, 1.0, -1.0])


def logistic(x_BN: Tensor, y_B: Tensor) -> Tensor:
    """The loss of the linear classifier `WEIGHT_N`, with classes 1 and -1."""
    return F.softplus(-y_B * (x_BN @ WEIGHT_N)).mean()


def samples() -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def worst_logistic(x_BN: Tensor, epsilon: float) -> float:
    """Goodfellow et al. 2014, section 5: a linear margin loses epsilon times the sum of |weights|, and no more."""
    return float(F.softplus(-(Y_B * (x_BN @ WEIGHT_N) - epsilon * WEIGHT_N.abs().sum())).mean())


def test_one_step_is_the_worst_for_a_linear_network():
    moved = fgsm(logistic, samples(), Y_B, 0.3, ANYWHERE)
    assert float(logistic(moved, Y_B)) == pytest.approx(worst_logistic(samples(), 0.3), rel=1e-5)


def test_many_steps_find_the_same_corner_from_any_start():
    moved = pgd(logistic, samples(), Y_B, 0.3, ANYWHERE, seed=0, index_B=torch.arange(4))
    assert float(logistic(moved, Y_B)) == pytest.approx(worst_logistic(samples(), 0.3), rel=1e-5)


def test_many_steps_find_a_maximum_that_one_step_jumps_over():
    def peak(x: Tensor, y_B: Tensor) -> Tensor:  # highest where every value is 0.05 above the sample's zero
        return -(x - 0.05).square().sum()

    zeros = torch.zeros(4, 3)
    one = fgsm(peak, zeros, Y_B, 0.5, ANYWHERE)
    many = pgd(peak, zeros, Y_B, 0.5, ANYWHERE, seed=0, index_B=torch.arange(4))
    stride = STRIDE * 0.5 / STEPS
    assert torch.equal(one, torch.full_like(zeros, 0.5))
    assert (many - 0.05).abs().max() <= stride


@pytest.mark.parametrize("attack", [fgsm, partial(pgd, seed=0, index_B=torch.arange(4))], ids=["fgsm", "pgd"])
def test_no_value_leaves_its_range_or_moves_further_than_epsilon(attack: Callable[..., Tensor]):
    x = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    x[0, 0], x[1, 1] = 0.0, 1.0
    moved = attack(logistic, x, Y_B, 0.2, (0.0, 1.0))
    assert (moved - x).abs().max() <= 0.2 + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert float(logistic(moved, Y_B)) > float(logistic(x, Y_B))


def test_the_random_start_follows_from_seed_and_sample_alone():
    def flat(x: Tensor, y_B: Tensor) -> Tensor:
        return (0 * x).sum()  # no gradient, so the start is the end

    x, index_B = torch.zeros(3, 5), torch.tensor([4, 9, 2])
    whole = pgd(flat, x, Y_B[:3], 0.1, ANYWHERE, 0, index_B)
    alone = pgd(flat, x[:1], Y_B[:1], 0.1, ANYWHERE, 0, index_B[1:2])
    assert torch.equal(whole[1:2], alone)
    assert not torch.equal(whole, pgd(flat, x, Y_B[:3], 0.1, ANYWHERE, 1, index_B))
    assert 0 < whole.abs().max() <= 0.1


def test_severities_are_one_to_sixteen_levels_of_eight_bits():
    found = [255 * Setting("images", 0).epsilon(severity) for severity in (1, 2, 3, 4, 5)]
    assert found == pytest.approx([1, 2, 4, 8, 16])
    assert Setting("tables", 0).epsilon(4) == 0.25
    assert Setting("tables", 0, largest=0.2).epsilon(4) == 0.1


def test_an_attack_on_normalised_images_moves_pixels_by_epsilon():
    spec = DataSpec.single("made up", (1, 2, 2), 255.0, (0.3,), (0.2,), ("a", "b"))
    pixels = torch.full((4, 1, 2, 2), 0.5)
    batch = Batch.single((pixels - 0.3) / 0.2, Y_B, torch.arange(4))

    def loss(x: Tensor, y_B: Tensor) -> Tensor:
        return logistic(x.flatten(1), y_B)

    [found] = harmed([batch], "fgsm", 4, spec, 0, 0.1, loss)
    change = found.x * 0.2 + 0.3 - pixels
    assert torch.allclose(change.abs(), torch.full_like(change, 0.05), atol=1e-6)
    assert torch.equal(change.flatten(1).sign(), -Y_B[:, None] * WEIGHT_N.sign())

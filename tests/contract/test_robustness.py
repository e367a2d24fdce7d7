"""What every corruption and every attack promises. A new file is covered without touching this one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from espalier.data.loaders import Batch
from espalier.robustness import base
from espalier.robustness.base import KINDS, SEVERITIES, Setting

OURS = ("blur", "brightness", "contrast", "noise", "rotation", "fgsm", "pgd")
SHAPES = {"images": [(3, 16, 16), (1, 96, 96)], "tables": [(13,)]}  # of small and large samples
INDEX_B = torch.tensor([11, 5, 7, 2, 0, 40])
HARMS = [(name, kind) for name in base.names() for kind in base.named(name).applies_to]
EACH = pytest.mark.parametrize(("name", "kind"), HARMS, ids=[f"{name}-{kind}" for name, kind in HARMS])


def batches(kind: str) -> list[Batch]:
    """Samples of a kind in its sizes, away from black and white."""
    draw, y_B = torch.Generator().manual_seed(3), torch.tensor([1.0, -1.0]).repeat(3)
    uniform = [torch.rand(len(y_B), *shape, generator=draw) for shape in SHAPES[kind]]
    return [Batch.single(0.1 + 0.6 * x if kind == "images" else 2 * x - 1, y_B, INDEX_B) for x in uniform]


def logistic(x: Tensor, y_B: Tensor) -> Tensor:
    """The loss of a linear network with classes 1 and -1, summed over samples."""
    weight_N = torch.linspace(-1, 1, x[0].numel()).cos() - 0.8
    return F.softplus(-y_B * (x.flatten(1) @ weight_N)).sum()


def harmed(name: str, kind: str, batch: Batch, severity: int) -> Tensor:
    return base.named(name).harm(batch, severity, Setting(kind, seed=0, loss=logistic))


def test_ours_are_found_and_every_kind_of_samples_has_some():
    assert len(set(OURS) & set(base.names())) >= 5
    assert {kind for _, kind in HARMS} == KINDS.keys() == SHAPES.keys()


@EACH
def test_a_sample_is_harmed_alike_in_any_batch_whatever_was_drawn_before(name: str, kind: str):
    for batch in batches(kind):
        whole = harmed(name, kind, batch, 5)
        torch.manual_seed(99)
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        shuffled = harmed(name, kind, Batch.single(batch.x[order], batch.y[order], batch.index[order]), 5)
        pieces = [harmed(name, kind, part, 5) for part in batch.split(1)]
        assert torch.allclose(shuffled, whole[order], atol=1e-6)
        assert torch.allclose(torch.cat(pieces), whole, atol=1e-6)
        assert torch.equal(harmed(name, kind, batch, 5), whole)


@EACH
def test_each_severity_changes_more_than_the_one_before_and_stays_within_the_limits(name: str, kind: str):
    low, high = KINDS[kind].limits
    for batch in batches(kind):
        before, state = batch.x.clone(), torch.random.get_rng_state()
        found = [harmed(name, kind, batch, severity) for severity in SEVERITIES]
        assert torch.equal(batch.x, before)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all((each.shape, each.dtype) == (before.shape, before.dtype) for each in found)
        assert all(each.isfinite().all() and each.min() >= low and each.max() <= high for each in found)
        change = [float((each - before).abs().mean()) for each in found]
        assert change[0] > 0
        assert change == sorted(change)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in HARMS if base.attacks([name])])
def test_an_attack_raises_the_loss_by_changes_of_at_most_epsilon(name: str, kind: str):
    for batch in batches(kind):
        batch.x[0], batch.x[1] = KINDS["images"].limits
        for severity in SEVERITIES:
            moved = harmed(name, kind, batch, severity)
            assert (moved - batch.x).abs().max() <= Setting(kind, 0).epsilon(severity) + 1e-6
            assert float(logistic(moved, batch.y)) > float(logistic(batch.x, batch.y))

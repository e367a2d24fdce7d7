"""Tests of an attribution map: does it add up, does it need the trained weights, does it find what matters.

Letters: S samples, N steps, P positions.
"""

import copy

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from espalier import seeding

NUM_STEPS = 32  # of a deletion curve, at most
TIES_STREAM = 1  # keeps users of one seed apart


def completeness_error(total_S: Tensor, output_S: Tensor, reference_S: Tensor) -> float:
    """Return the sum of |total of the map - (output - reference)| over the sum of |output - reference|; 0 is best.

    One ratio for all samples, because the output of one may be that of the reference; NaN if that is so for all.
    """
    gap_S = output_S.double() - reference_S.double()
    return float((total_S.double() - gap_S).abs().sum() / gap_S.abs().sum())


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Return Spearman's correlation of the absolute values of two maps; 0 if one is constant and has no order."""
    ranked = [values.detach().abs().flatten().double().cpu() for values in (one, other)]
    if any(values.max() == values.min() for values in ranked):
        return 0.0
    return float(spearmanr(*(values.numpy() for values in ranked)).statistic)


@torch.no_grad()
def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy whose weights are useless: the entries of each parameter are shuffled.

    For the model parameter randomisation test of Adebayo et al. 2018, arXiv 1810.03292, section 3, all layers at once.
    Another order instead of new numbers keeps the scale of every layer, whatever its kind.
    """
    twin = copy.deepcopy(model)
    for number, parameter in enumerate(twin.parameters()):
        order = torch.randperm(parameter.numel(), generator=seeding.generator(seed, number))
        parameter.copy_(parameter.flatten()[order.to(parameter.device)].view_as(parameter))
    return twin


@torch.no_grad()
def deletion_and_insertion(
    model: nn.Module, x: Tensor, target: int, attribution: Tensor, baseline: Tensor, seed: int
) -> tuple[float, float]:
    """Return the areas under the deletion curve and the insertion curve of an attribution map, both in [0, 1].

    The curves show the probability of class `target` while positions are set to the baseline (deletion) or put back
    (insertion), the largest attribution first: Petsiuk et al. 2018, arXiv 1806.07421, section 3.3. A map that finds
    what matters has a low deletion and a high insertion. Equal values of a map are taken in random order.
    """
    values_P = attribution.flatten()
    num = len(values_P)
    shuffled_P = torch.randperm(num, generator=seeding.generator(seed, TIES_STREAM))
    order_P = shuffled_P[values_P[shuffled_P].argsort(descending=True, stable=True)]
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(num)
    share_N = torch.linspace(0, 1, min(num, NUM_STEPS) + 1)
    is_first_NP = place_P < (share_N * num).round()[:, None]
    is_first = is_first_NP.view(-1, *attribution.shape).to(x.device)
    if x.ndim == 3:
        is_first = is_first[:, None]
    curves = []
    for inside, outside in ((baseline, x), (x, baseline)):
        probability_N = model(torch.where(is_first, inside, outside)).softmax(dim=1)[:, target]
        curves.append(float(torch.trapezoid(probability_N.cpu(), share_N)))
    return curves[0], curves[1]

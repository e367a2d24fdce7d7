"""Maps of networks small enough to be explained by hand."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.compression.graph_module import capture
from espalier.errors import ConfigError
from espalier.explain import base, quality
from espalier.explain.base import Setting
from espalier.explain.selection import choose
from espalier.models.cnn import CNN
from espalier.models.vit import ViT
from espalier.spec import of_shape

WEIGHT = torch.tensor([[0.5, -2.0, 0.0, 1.0], [3.0, 1.0, -1.0, 0.25]])
X, BASELINE = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 0.0, 0.0, 2.0])
BACKGROUND = torch.tensor([[0.0, 1.0, 1.0, 1.0], [2.0, 1.0, -1.0, 0.0]])
SETTING = Setting(
    baseline=BASELINE,
    background=BACKGROUND,
    patch=1,
    layer=None,
    steps=16,
    copies=8,
    noise=0.1,
    evaluations=2000,
    batch_size=7,
    seed=3,
)
GRAD_CAM = base.method_named("grad_cam")
IMAGE = torch.arange(16.0).view(1, 4, 4) / 16


def linear() -> nn.Linear:
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(WEIGHT)
    return layer


def on_images(setting: Setting = SETTING) -> Setting:
    return replace(setting, baseline=torch.zeros(1, 4, 4), background=torch.rand(5, 1, 4, 4))


class TwoMaps(nn.Module):
    """Two 1x1 convolutions, their means, one output per row of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -3.0]).view(2, 1, 1, 1))
            self.head.weight.copy_(torch.tensor([[2.0, 1.0], [1.0, -1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


def small_cnn() -> CNN:
    torch.manual_seed(0)
    return CNN((1, 8, 8), 3, [4, 8], [], 4, "relu", "batch", 0.0).eval()


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
@pytest.mark.parametrize("target", [0, 1])
def test_a_linear_model_is_explained_by_weight_times_distance_from_the_baseline(method: str, target: int):
    found = base.attribute(method, linear(), X, target, SETTING)
    assert found.tolist() == pytest.approx((WEIGHT[target] * (X - BASELINE)).tolist(), abs=1e-5)


def test_shap_explains_a_linear_model_by_weight_times_distance_from_the_mean_of_the_background():
    found = base.attribute("shap", linear(), X, 1, SETTING)
    assert found.tolist() == pytest.approx((WEIGHT[1] * (X - BACKGROUND.mean(dim=0))).tolist(), abs=1e-5)


def test_lime_explains_a_linear_table_by_weight_times_distance_from_the_mean():
    setting = replace(SETTING, background=torch.randn(200, 4, generator=torch.Generator().manual_seed(0)))
    found = base.attribute("lime", linear(), X, 1, setting)
    expected = WEIGHT[1] * (X - setting.background.mean(dim=0))
    assert found.tolist() == pytest.approx(expected.tolist(), abs=0.05)  # ridge regression shrinks


def test_lime_finds_the_pixels_of_a_linear_image_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    found = base.attribute("lime", model, IMAGE, 0, on_images(replace(SETTING, evaluations=4000)))
    expected = model[1].weight[0].detach().view(4, 4) * IMAGE[0]
    assert float((found - expected).abs().max()) < 0.02


def test_smooth_grad_of_a_linear_model_is_its_weight():
    assert base.attribute("smooth_grad", linear(), X, 0, SETTING).tolist() == pytest.approx(WEIGHT[0].tolist())


def test_grad_cam_weighs_maps_by_their_mean_gradient_and_keeps_the_positive_part():
    model = TwoMaps()
    setting = GRAD_CAM.prepare(model, IMAGE - 0.4, on_images())
    assert setting.layer == "conv"
    for target, weights in enumerate(model.head.weight.tolist()):
        maps_CHW = torch.cat([IMAGE - 0.4, -3 * (IMAGE - 0.4)])
        by_hand = (torch.tensor(weights).view(2, 1, 1) / 16 * maps_CHW).sum(dim=0).clamp(min=0)
        assert torch.allclose(base.attribute("grad_cam", model, IMAGE - 0.4, target, setting), by_hand, atol=1e-6)


def test_grad_cam_of_a_captured_graph_is_that_of_the_modules():
    model, x = small_cnn(), torch.rand(1, 8, 8)
    setting = GRAD_CAM.prepare(model, x, SETTING)
    expected = base.attribute("grad_cam", model, x, 2, setting)
    graph = capture(model, of_shape((1, 8, 8))).eval()
    assert GRAD_CAM.prepare(graph, x, SETTING).layer == setting.layer == "features.conv2"
    assert expected.max() > 0
    assert torch.allclose(base.attribute("grad_cam", graph, x, 2, setting), expected, atol=1e-6)


def test_grad_cam_takes_the_last_layer_that_is_not_too_coarse():
    for side, layer in ((32, "features.conv4"), (16, "features.conv3")):
        model = CNN((1, side, side), 3, [2, 2, 2, 2], [], 4, "relu", "batch", 0.0).eval()
        assert GRAD_CAM.prepare(model, torch.rand(1, side, side), SETTING).layer == layer


def test_grad_cam_offers_the_nearest_layer():
    with pytest.raises(ConfigError, match=r"task.layer=features.conv3: .*did you mean features.conv[12]\?"):
        GRAD_CAM.prepare(small_cnn(), torch.rand(1, 8, 8), replace(SETTING, layer="features.conv3"))


def test_grad_cam_refuses_tokens_unless_their_layer_is_named():
    model = ViT((1, 8, 8), 3, 2, 8, 1, 2, 2, "mean", "gelu", "layer", 0.0).eval()
    x = torch.rand(1, 8, 8)
    with pytest.raises(ConfigError, match="tokens"):
        GRAD_CAM.prepare(model, x, SETTING)
    setting = GRAD_CAM.prepare(model, x, replace(SETTING, layer="patches"))
    assert base.attribute("grad_cam", model, x, 0, setting).shape == (8, 8)


def test_grad_cam_refuses_a_network_without_feature_maps():
    with pytest.raises(ConfigError, match="integrated_gradients"):
        GRAD_CAM.prepare(linear(), X, SETTING)


def test_a_window_of_occlusion_counts_at_each_position_that_it_covers():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1, bias=False))
    falls = (model[1].weight[0].view(4, 4) * IMAGE[0]).detach()
    found = base.attribute("occlusion", model, IMAGE, 0, on_images(replace(SETTING, patch=4)))
    assert torch.allclose(found, falls.sum().expand(4, 4), atol=1e-6)
    found = base.attribute("occlusion", model, IMAGE, 0, on_images(replace(SETTING, patch=2)))
    corner, edge = falls[:2, :2].sum(), (falls[:2, :2].sum() + falls[:2, 1:3].sum()) / 2
    assert found[0, :2].tolist() == pytest.approx([float(corner), float(edge)], abs=1e-6)


@pytest.mark.parametrize("method", ["integrated_gradients", "shap"])
def test_the_sum_of_a_map_is_the_output_minus_the_reference(method: str):
    model, x = small_cnn(), torch.rand(1, 8, 8)
    setting = replace(
        SETTING, baseline=torch.zeros(1, 8, 8), background=torch.rand(9, 1, 8, 8), steps=512, evaluations=1, patch=2
    )
    found, reference = (
        base.attribute(method, model, x, 1, setting),
        base.method_named(method).reference(model, 1, setting),
    )
    with torch.no_grad():
        change = model(x[None])[0, 1] - reference
    assert float(found.sum()) == pytest.approx(float(change), rel=0.01)


def test_three_channels_become_one_map_with_the_same_sum():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    x = torch.rand(3, 4, 4)
    setting = replace(SETTING, baseline=torch.zeros(3, 4, 4), background=torch.rand(3, 3, 4, 4))
    expected = (model[1].weight[0].view(3, 4, 4) * x).sum(dim=0)
    for method in ("integrated_gradients", "occlusion"):
        assert torch.allclose(base.attribute(method, model, x, 0, setting), expected, atol=1e-5), method
    assert base.attribute("shap", model, x, 0, setting).shape == (4, 4)


@pytest.mark.parametrize("method", ["smooth_grad", "shap", "lime"])
def test_randomness_follows_from_the_seed_and_leaves_the_global_generators_alone(method: str):
    model, x = small_cnn(), torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    setting = replace(
        SETTING, baseline=torch.zeros(1, 8, 8), background=torch.rand(8, 1, 8, 8), evaluations=200, patch=1
    )
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = base.attribute(method, model, x, 0, setting)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    torch.rand(5)
    assert torch.equal(base.attribute(method, model, x, 0, setting), first)
    assert not torch.equal(base.attribute(method, model, x, 0, replace(setting, seed=4)), first)


def test_pieces_are_squares_and_a_value_is_spread_over_its_piece():
    piece = base.pieces((3, 4, 6), 2)
    assert piece.tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    assert base.spread(torch.arange(6.0), piece).sum() == 15
    assert base.pieces((5,), 1).tolist() == [0, 1, 2, 3, 4]
    assert [base.default_patch(shape) for shape in ((1, 8, 8), (3, 32, 32), (3, 224, 200), (30,))] == [1, 4, 28, 1]


def test_completeness_error_is_the_share_of_the_change_that_is_missed():
    total, output, reference = torch.tensor([3.0, 1.0]), torch.tensor([5.0, 1.0]), torch.tensor([1.0, 1.0])
    assert quality.completeness_error(total, output, reference) == pytest.approx((1 + 1) / (4 + 0))


def test_rank_correlation_looks_at_absolute_values_and_finds_no_order_in_a_constant():
    one = torch.tensor([1.0, -2.0, 3.0, -4.0])
    assert quality.rank_correlation(one, torch.tensor([-10.0, 20.0, -31.0, 44.0])) == pytest.approx(1)
    assert quality.rank_correlation(one, torch.tensor([4.0, 3.0, 2.0, 1.0])) == pytest.approx(-1)
    assert quality.rank_correlation(one, torch.ones(4)) == 0


def test_a_randomised_network_has_the_same_numbers_in_other_places():
    model = small_cnn()
    twin = quality.randomised(model, seed=0)
    before, after = dict(model.named_parameters()), dict(twin.named_parameters())
    assert all(torch.equal(after[name].flatten().sort().values, before[name].flatten().sort().values) for name in after)
    assert not torch.equal(after["features.conv2.conv.weight"], before["features.conv2.conv.weight"])
    x = torch.rand(4, 1, 8, 8)
    assert not torch.allclose(model(x), twin(x))
    assert torch.equal(model(x), small_cnn()(x)), "the original is as it was"


def test_maps_of_a_randomised_network_differ():
    model, x = small_cnn(), torch.rand(1, 8, 8)
    setting = replace(SETTING, baseline=torch.zeros(1, 8, 8))
    maps = [base.attribute("smooth_grad", net, x, 0, setting) for net in (model, quality.randomised(model, seed=0))]
    assert abs(quality.rank_correlation(*maps)) < 0.5


def test_deletion_and_insertion_are_areas_under_the_probability():
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0, 100.0, 0.0], [0.0] * 4]))
    x, baseline = torch.ones(4), torch.zeros(4)  # the probability is 1 with feature 2, and 1/2 without it
    first, last = torch.tensor([0.0, 1.0, 9.0, 2.0]), torch.tensor([0.0, 1.0, -9.0, 2.0])
    assert quality.deletion_and_insertion(model, x, 0, first, baseline, seed=0) == pytest.approx((0.5625, 0.9375))
    assert quality.deletion_and_insertion(model, x, 0, last, baseline, seed=0) == pytest.approx((0.9375, 0.5625))


def test_right_and_wrong_samples_are_chosen_by_confidence():
    member, is_wrong = torch.tensor([0, 2, 3, 5, 6]), torch.tensor([0, 0, 1, 0, 0, 1, 0]).bool()
    confidence = torch.tensor([0.9, 1.0, 0.7, 0.5, 1.0, 0.8, 0.95])
    assert choose(member, is_wrong, confidence, 3, "confident") == [6, 0, 5]
    assert choose(member, is_wrong, confidence, 3, "unsure") == [3, 0, 2]
    assert choose(member, is_wrong, confidence, 3, "first") == [0, 3, 2]
    assert choose(member, is_wrong, confidence, 1, "confident") == [6]
    assert choose(member, is_wrong, confidence, 9, "confident") == [6, 0, 3, 5, 2]


def test_a_misspelt_method_offers_the_right_one_and_a_missing_package_its_extra(monkeypatch: pytest.MonkeyPatch):
    assert base.methods() == ["grad_cam", "integrated_gradients", "occlusion", "smooth_grad", "lime", "shap"]
    with pytest.raises(ConfigError, match="no method oclusion; did you mean occlusion"):
        base.check(["oclusion"])
    with pytest.raises(ConfigError, match="nothing to do"):
        base.check([])
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(ConfigError, match=r"task.method=\[occlusion\]: captum is not installed; .*\[explain\]"):
        base.check(["occlusion"])

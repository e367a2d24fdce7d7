"""Corruptions against scipy, the colour spaces of the standard library and numbers on paper."""

import colorsys
import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.ndimage import rotate as rotated_by_scipy
from scipy.stats import kstest

from espalier.data.loaders import Batch
from espalier.data.transforms import Normalise
from espalier.errors import ConfigError
from espalier.evaluation import corruptions
from espalier.evaluation.corruptions import CIFAR_C, IMAGENET_C, SEVERITIES, corrupt_images, corrupt_table
from espalier.evaluation.robustness import harmed, require_applicable
from espalier.spec import DataSpec

NAMES = [field.name for field in dataclasses.fields(CIFAR_C)]


def images(num: int, *shape: int) -> torch.Tensor:
    return torch.rand(num, *shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("deviation", [*CIFAR_C.blur, *IMAGENET_C.blur])
def test_blur_is_a_gaussian_filter(deviation: float):
    x_BCHW = images(2, 3, 20, 13)
    expected = gaussian_filter(x_BCHW.double().numpy(), (0, 0, deviation, deviation), mode="nearest", truncate=4)
    assert np.allclose(corruptions.blur(x_BCHW, deviation).numpy(), expected, atol=1e-5)


def test_contrast_shrinks_the_distance_from_the_mean_of_each_channel():
    x_BCHW = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]], [[0.2, 0.2], [0.2, 0.6]]]])
    expected = torch.tensor([[[[0.4, 0.6], [0.5, 0.5]], [[0.28, 0.28], [0.28, 0.36]]]])
    assert torch.allclose(corruptions.contrast(x_BCHW, 0.2), expected)


def test_brightness_adds_to_the_value_of_hsv():
    x_BCHW = torch.cat([images(1, 3, 6, 6), torch.zeros(1, 3, 6, 6)])
    found = corruptions.brightness(x_BCHW, 0.3)
    for before, after in zip(x_BCHW.movedim(1, 3).reshape(-1, 3), found.movedim(1, 3).reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before.tolist())
        assert after.tolist() == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.3)), abs=1e-5)


def test_grey_gets_brighter_by_just_that_much():
    grey = torch.tensor([0.0, 0.25, 0.9]).view(1, 1, 1, 3)
    assert torch.allclose(corruptions.brightness(grey, 0.2).flatten(), torch.tensor([0.2, 0.45, 1.0]))


def test_noise_is_gaussian_with_the_stated_deviation():
    x = torch.full((200, 1, 20, 20), 0.5)
    change = (corruptions.noise(x, 0.08, seed=0, index_B=torch.arange(200)) - x).flatten() / 0.08
    assert kstest(change.numpy(), "norm").pvalue > 0.01
    assert abs(float(change.mean())) < 0.015
    assert float(change.std()) == pytest.approx(1, abs=0.01)
    pixel_by_pixel = change.view(200, 400)[:, :2]
    assert abs(float(torch.corrcoef(pixel_by_pixel.T)[0, 1])) < 0.25


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_harmed_alike_in_any_batch(name: str):
    x_BCHW, index_B = images(6, 3, 8, 8), torch.tensor([11, 5, 7, 2, 0, 40])
    whole = corrupt_images(name, x_BCHW, 5, 0, index_B)
    pieces = [corrupt_images(name, x_BCHW[[place]], 5, 0, index_B[[place]]) for place in range(6)]
    assert torch.allclose(torch.cat(pieces), whole, atol=1e-6)


@pytest.mark.parametrize("name", ["noise", "rotation"])
def test_what_is_random_follows_from_the_seed(name: str):
    x_BCHW, index_B = images(20, 1, 8, 8), torch.arange(20)
    once, again, other = (corrupt_images(name, x_BCHW, 3, seed, index_B) for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.allclose(once, other)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [16, 96])
def test_each_severity_is_worse_than_the_one_before_and_stays_in_range(name: str, side: int):
    x_BCHW, index_B = 0.1 + 0.6 * images(4, 3, side, side), torch.arange(4)
    found = [corrupt_images(name, x_BCHW, severity, 0, index_B) for severity in SEVERITIES]
    harm = [float((each - x_BCHW).abs().mean()) for each in found]
    assert harm[0] > 0
    assert harm == sorted(harm)
    assert all(each.min() >= 0 and each.max() <= 1 for each in found)


def test_rotation_turns_to_either_side_by_the_stated_angle():
    index_B = torch.arange(40)
    turns = corruptions.turn(0, index_B)
    assert set(turns.tolist()) == {-1.0, 1.0}
    assert 10 <= int((turns > 0).sum()) <= 30
    x_BCHW = torch.from_numpy(gaussian_filter(images(40, 1, 33, 33).numpy(), (0, 0, 3, 3)))
    found = corrupt_images("rotation", x_BCHW, 5, 0, index_B)
    for x_HW, found_HW, sign in zip(x_BCHW[:8, 0], found[:8, 0], turns[:8], strict=True):
        expected = rotated_by_scipy(x_HW.numpy(), 30 * float(sign), order=1, reshape=False, mode="grid-constant")
        assert np.abs(found_HW.numpy() - expected)[8:-8, 8:-8].max() < 1e-3


def test_small_images_take_the_strengths_of_cifar_and_large_ones_those_of_imagenet():
    for side, deviation in ((32, 0.04), (224, 0.08)):
        grey = torch.full((4, 1, side, side), 0.5)
        found = corrupt_images("noise", grey, 1, 0, torch.arange(4))
        assert float((found - grey).std()) == pytest.approx(deviation, rel=0.05)
    x_BCHW = images(1, 1, 112, 112)  # half of the side that ImageNet-C's blur of 2 pixels is meant for
    expected = gaussian_filter(x_BCHW.numpy(), (0, 0, 1, 1), mode="nearest")
    assert np.allclose(corrupt_images("blur", x_BCHW, 2, 0, torch.arange(1)).numpy(), expected, atol=1e-5)


def spec(shape: tuple[int, ...], mean: tuple[float, ...], std: tuple[float, ...]) -> DataSpec:
    return DataSpec("made up", shape, 255.0, mean, std, ("a", "b"))


def test_normalised_images_are_harmed_as_pixels_and_normalised_again():
    of_images = spec((2, 4, 4), (0.2, 0.4), (0.1, 0.5))
    pixels = images(3, 2, 4, 4)
    normalise = Normalise(of_images, torch.device("cpu"))
    batch = Batch(normalise.of_scaled(pixels), torch.zeros(3), torch.arange(3))
    [found] = harmed([batch], "contrast", 2, of_images, 0, None, None)
    expected = normalise.of_scaled(corruptions.contrast(pixels, CIFAR_C.contrast[1]))
    assert torch.allclose(found.x, expected, atol=1e-5)


def test_tables_are_harmed_in_standard_deviations():
    batch = Batch(torch.zeros(500, 40), torch.zeros(500), torch.arange(500))
    of_tables = spec((40,), (5.0,) * 40, (20.0,) * 40)
    [found] = harmed([batch], "noise", 5, of_tables, 0, None, None)
    assert float(found.x.std()) == pytest.approx(0.5, rel=0.02)
    assert torch.equal(found.x, corrupt_table(batch.x, 5, 0, batch.index))


def test_a_table_has_no_contrast():
    with pytest.raises(ConfigError, match=r"task\.robustness=\[blur\].*noise, fgsm, pgd"):
        require_applicable("task.robustness", ["noise", "blur"], spec((3,), (0.0,) * 3, (1.0,) * 3))
    require_applicable("task.robustness", ["noise", "fgsm", "pgd"], spec((3,), (0.0,) * 3, (1.0,) * 3))
    require_applicable("task.robustness", NAMES, spec((1, 2, 2), (0.0,), (1.0,)))

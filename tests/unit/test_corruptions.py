"""Corruptions against scipy, the colour spaces of the standard library and numbers on paper."""

import colorsys
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.ndimage import rotate as rotated_by_scipy
from scipy.stats import kstest

from espalier import robustness
from espalier.data.loaders import Batch
from espalier.data.transforms import Normalise
from espalier.errors import ConfigError
from espalier.robustness import base, blur
from espalier.robustness.base import Setting, require_applicable
from espalier.robustness.brightness import brightness
from espalier.robustness.contrast import contrast
from espalier.robustness.curves import harmed
from espalier.robustness.noise import noise
from espalier.robustness.rotation import turn
from espalier.spec import DataSpec

BASE = base.__name__


def corrupted(name: str, x: torch.Tensor, severity: int, seed: int, index_B: torch.Tensor) -> torch.Tensor:
    batch = Batch.single(x, torch.zeros(len(x)), index_B)
    return base.named(name).harm(batch, severity, Setting("images" if x.ndim == 4 else "tables", seed))


def images(num: int, *shape: int) -> torch.Tensor:
    return torch.rand(num, *shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("deviation", [*blur.SMALL, *blur.LARGE])
def test_blur_is_a_gaussian_filter(deviation: float):
    x_BCHW = images(2, 3, 20, 13)
    expected = gaussian_filter(x_BCHW.double().numpy(), (0, 0, deviation, deviation), mode="nearest", truncate=4)
    assert np.allclose(blur.blur(x_BCHW, deviation).numpy(), expected, atol=1e-5)


def test_contrast_shrinks_the_distance_from_the_mean_of_each_channel():
    x_BCHW = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]], [[0.2, 0.2], [0.2, 0.6]]]])
    expected = torch.tensor([[[[0.4, 0.6], [0.5, 0.5]], [[0.28, 0.28], [0.28, 0.36]]]])
    assert torch.allclose(contrast(x_BCHW, 0.2), expected)


def test_brightness_adds_to_the_value_of_hsv():
    x_BCHW = torch.cat([images(1, 3, 6, 6), torch.zeros(1, 3, 6, 6)])
    found = brightness(x_BCHW, 0.3)
    for before, after in zip(x_BCHW.movedim(1, 3).reshape(-1, 3), found.movedim(1, 3).reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before.tolist())
        assert after.tolist() == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.3)), abs=1e-5)


def test_grey_gets_brighter_by_just_that_much():
    grey = torch.tensor([0.0, 0.25, 0.9]).view(1, 1, 1, 3)
    assert torch.allclose(brightness(grey, 0.2).flatten(), torch.tensor([0.2, 0.45, 1.0]))


def test_noise_is_gaussian_with_the_stated_deviation():
    x = torch.full((200, 1, 20, 20), 0.5)
    change = (noise(x, 0.08, seed=0, index_B=torch.arange(200)) - x).flatten() / 0.08
    assert kstest(change.numpy(), "norm").pvalue > 0.01
    assert abs(float(change.mean())) < 0.015
    assert float(change.std()) == pytest.approx(1, abs=0.01)
    pixel_by_pixel = change.view(200, 400)[:, :2]
    assert abs(float(torch.corrcoef(pixel_by_pixel.T)[0, 1])) < 0.25


@pytest.mark.parametrize("name", ["noise", "rotation"])
def test_what_is_random_follows_from_the_seed(name: str):
    x_BCHW, index_B = images(20, 1, 8, 8), torch.arange(20)
    once, again, other = (corrupted(name, x_BCHW, 3, seed, index_B) for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.allclose(once, other)


def test_rotation_turns_to_either_side_by_the_stated_angle():
    index_B = torch.arange(40)
    turns = turn(0, index_B)
    assert set(turns.tolist()) == {-1.0, 1.0}
    assert 10 <= int((turns > 0).sum()) <= 30
    x_BCHW = torch.from_numpy(gaussian_filter(images(40, 1, 33, 33).numpy(), (0, 0, 3, 3)))
    found = corrupted("rotation", x_BCHW, 5, 0, index_B)
    for x_HW, found_HW, sign in zip(x_BCHW[:8, 0], found[:8, 0], turns[:8], strict=True):
        expected = rotated_by_scipy(x_HW.numpy(), 30 * float(sign), order=1, reshape=False, mode="grid-constant")
        assert np.abs(found_HW.numpy() - expected)[8:-8, 8:-8].max() < 1e-3


def test_small_images_take_the_strengths_of_cifar_and_large_ones_those_of_imagenet():
    for side, deviation in ((32, 0.04), (224, 0.08)):
        grey = torch.full((4, 1, side, side), 0.5)
        found = corrupted("noise", grey, 1, 0, torch.arange(4))
        assert float((found - grey).std()) == pytest.approx(deviation, rel=0.05)
    x_BCHW = images(1, 1, 112, 112)  # half of the side that ImageNet-C's blur of 2 pixels is meant for
    expected = gaussian_filter(x_BCHW.numpy(), (0, 0, 1, 1), mode="nearest")
    assert np.allclose(corrupted("blur", x_BCHW, 2, 0, torch.arange(1)).numpy(), expected, atol=1e-5)


def spec(shape: tuple[int, ...], mean: tuple[float, ...], std: tuple[float, ...]) -> DataSpec:
    return DataSpec.single("made up", shape, 255.0, mean, std, ("a", "b"))


def test_normalised_images_are_harmed_as_pixels_and_normalised_again():
    of_images = spec((2, 4, 4), (0.2, 0.4), (0.1, 0.5))
    pixels = images(3, 2, 4, 4)
    normalise = Normalise(of_images, torch.device("cpu"))
    batch = Batch.single(normalise.of_scaled(pixels), torch.zeros(3), torch.arange(3))
    [found] = harmed([batch], "contrast", 2, of_images, 0, None, None)
    expected = normalise.of_scaled(contrast(pixels, 0.5))
    assert torch.allclose(found.x, expected, atol=1e-5)


def test_tables_are_harmed_in_standard_deviations():
    batch = Batch.single(torch.zeros(500, 40), torch.zeros(500), torch.arange(500))
    of_tables = spec((40,), (5.0,) * 40, (20.0,) * 40)
    [found] = harmed([batch], "noise", 5, of_tables, 0, None, None)
    assert float(found.x.std()) == pytest.approx(0.5, rel=0.02)
    assert torch.equal(found.x, corrupted("noise", batch.x, 5, 0, batch.index))


def test_a_table_has_no_contrast():
    with pytest.raises(ConfigError, match=r"task\.robustness=\[blur\].*noise, fgsm, pgd"):
        require_applicable("task.robustness", ["noise", "blur"], spec((3,), (0.0,) * 3, (1.0,) * 3))
    require_applicable("task.robustness", ["noise", "fgsm", "pgd"], spec((3,), (0.0,) * 3, (1.0,) * 3))
    require_applicable("task.robustness", base.names(), spec((1, 2, 2), (0.0,), (1.0,)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files are harms as well."""
    monkeypatch.setattr(robustness, "__path__", [*robustness.__path__, str(tmp_path)])
    return tmp_path


@pytest.mark.parametrize(
    ("contract", "body", "lack"),
    [
        ("Corruption", "pass", "has no applies_to and no corrupt; see docs/evaluation.md"),
        ("Attack", "pass", "has no attack; see docs/evaluation.md"),
        ("Attack", "def attack(self, x): ...", "takes (self, x), not (self, loss, batch, epsilon, setting); see docs"),
        ("Corruption", "applies_to = ('images',)", "has no corrupt; see docs/evaluation.md"),
    ],
)
def test_what_a_new_file_lacks_is_said_when_it_is_imported(folder: Path, contract: str, body: str, lack: str):
    (folder / "half.py").write_text(f"from {BASE} import {contract}\n\nclass Half({contract}):\n    {body}\n")
    with pytest.raises(ConfigError, match=rf"robustness\.half\.Half.*{re.escape(lack)}"):
        base.names()


def test_samples_that_there_are_not_cannot_be_harmed(folder: Path):
    (folder / "odd.py").write_text(
        f"from {BASE} import Attack\n\nclass Odd(Attack):\n    applies_to = ('tables', 'video')\n"
        "    def attack(self, loss, batch, epsilon, setting): ...\n"
    )
    with pytest.raises(ConfigError, match=r"Odd\.applies_to holds video, not images or tables; see docs/evaluation"):
        base.names()

"""Augmentations against numbers on paper, torch.rot90 and Pillow."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import beta
from torch import Tensor

from espalier import seeding
from espalier.data import colour, rand_augment
from espalier.data.augment import (
    Augmentation,
    Crop,
    Cutout,
    Flip,
    ResizedCrop,
    Rotation,
    crop,
    cutout,
    flip,
    resized_crop,
    rotate,
)
from espalier.data.colour import ColourJitter
from espalier.data.mixing import BetaQuantile, CutMix, Mixup, cutmix, mixup
from espalier.data.rand_augment import RandAugment

ALL = [
    Crop(padding=0.25),
    Flip(probability=0.5),
    Rotation(degrees=30),
    ResizedCrop(min_area=0.3),
    Cutout(size=0.5),
    ColourJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    RandAugment(num_operations=2, magnitude=15),
    Mixup(alpha=0.4, probability=1.0),
    CutMix(alpha=1.0, probability=1.0),
]
UNMIXED = [one for one in ALL if not one.mixes]


def named(one: Augmentation) -> str:
    return type(one).__name__


def images(num: int, channels: int = 3, height: int = 6, width: int = 9) -> Tensor:
    return torch.rand(num, channels, height, width, generator=seeding.generator(5))


def photograph(num: int = 4, side: int = 32) -> Tensor:
    """8-bit colour images with smooth and rough regions, as uint8 (B, 3, H, W)."""
    smooth = torch.linspace(20, 190, side)[None, None, None, :].expand(num, 3, side, side)
    rough = torch.randint(0, 50, (num, 3, side, side), generator=seeding.generator(6))
    return (smooth + rough).to(torch.uint8)


def through_pillow(x: Tensor, change) -> Tensor:
    """Each image of a uint8 batch after a Pillow operation, in levels."""
    done = [np.asarray(change(Image.fromarray(one.permute(1, 2, 0).numpy()))) for one in x]
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).float()


def draws(one: Augmentation, num: int, epoch: int = 0) -> Tensor:
    return seeding.uniform(0, epoch, torch.arange(num), one.num_draws, stream=9)


def test_flip_mirrors_only_the_chosen_images():
    x = torch.tensor([[1.0, 2.0, 3.0]]).view(1, 1, 1, 3).expand(2, 1, 1, 3)
    assert flip(x, torch.tensor([True, False])).view(2, 3).tolist() == [[3, 2, 1], [1, 2, 3]]


def test_crop_cuts_the_window_out_of_the_padded_image():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(3, 1, 2, 2)
    moved = crop(x, torch.tensor([1, 0, 2]), torch.tensor([1, 0, 1]), pad_h=1, pad_w=1)
    assert moved[0, 0].tolist() == [[1, 2], [3, 4]]
    assert moved[1, 0].tolist() == [[0, 0], [0, 1]]
    assert moved[2, 0].tolist() == [[3, 4], [0, 0]]


def test_crop_reaches_every_shift_and_no_other():
    x = torch.zeros(4000, 1, 8, 8)
    x[:, :, 4, 4] = 1
    one = Crop(padding=0.125)
    moved, _ = one(x, torch.zeros(4000), draws(one, 4000))
    assert moved.sum(dim=0)[0].nonzero().tolist() == [[row, column] for row in (3, 4, 5) for column in (3, 4, 5)]


def test_the_largest_random_number_stays_inside_the_padded_image():
    one = Crop(padding=0.5)
    almost_one = torch.full((1, 2), 1 - 2**-24)
    moved, _ = one(torch.ones(1, 1, 8, 8), torch.zeros(1), almost_one)
    assert moved.sum() == 16  # the lower right corner of the padded image holds a quarter of the ones


def test_cutout_blackens_the_box_and_is_cut_off_at_the_border():
    out = cutout(torch.ones(2, 1, 3, 4), torch.tensor([1, -1]), torch.tensor([1, 3]), height=2, width=2)
    assert out[0, 0].tolist() == [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1]]
    assert out[1, 0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_by_right_angles_equals_rot90(turns):
    x = images(2, height=7, width=7)
    turned = rotate(x, torch.full((2,), turns * math.pi / 2))
    torch.testing.assert_close(turned, torch.rot90(x, turns, dims=(2, 3)), atol=1e-5, rtol=0)


def test_rotation_of_a_wide_image_keeps_its_pixels_square():
    x = torch.zeros(1, 1, 5, 9)
    x[0, 0, 2, 6] = 1  # two pixels right of the centre
    turned = rotate(x, torch.tensor([math.pi / 2]))
    assert turned[0, 0].argmax() == 0 * 9 + 4  # two pixels above it
    assert turned[0, 0, 0, 4] == pytest.approx(1, abs=1e-5)


def test_a_resized_crop_of_the_middle_half_enlarges_it_twice():
    x = images(1, height=8, width=8)
    half, zero = torch.tensor([0.5]), torch.tensor([0.0])
    enlarged = resized_crop(x, half, half, zero, zero)
    wanted = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)[:, :, 4:12, 4:12]
    torch.testing.assert_close(enlarged, wanted, atol=1e-5, rtol=0)


def test_a_resized_crop_never_looks_outside_the_image():
    one = ResizedCrop(min_area=0.1)
    out, _ = one(torch.ones(500, 1, 12, 16), torch.zeros(500), draws(one, 500))
    assert out[:, :, 1:-1, 1:-1].min() > 0.999  # the outermost pixels may blend with the black around


@pytest.mark.parametrize(
    ("ours", "pillow"),
    [
        (colour.equalize, ImageOps.equalize),
        (lambda x: colour.posterize(x, torch.full((4,), 3.0)), lambda image: ImageOps.posterize(image, 3)),
        (lambda x: colour.solarize(x, torch.full((4,), 128 / 255)), lambda image: ImageOps.solarize(image, 128)),
    ],
    ids=["equalize", "posterize", "solarize"],
)
def test_operations_by_level_equal_pillow(ours, pillow):
    x = photograph()
    assert torch.equal((ours(x / 255) * 255).round(), through_pillow(x, pillow))


@pytest.mark.parametrize("factor", [0.1, 0.6, 1.9])
@pytest.mark.parametrize(
    ("ours", "pillow"),
    [
        (colour.brightness, ImageEnhance.Brightness),
        (colour.contrast, ImageEnhance.Contrast),
        (colour.saturation, ImageEnhance.Color),
        (colour.sharpness, ImageEnhance.Sharpness),
    ],
    ids=["brightness", "contrast", "saturation", "sharpness"],
)
def test_enhancements_equal_pillow_up_to_its_rounding(ours, pillow, factor):
    x = photograph()
    wanted = through_pillow(x, lambda image: pillow(image).enhance(factor))
    assert (ours(x / 255, torch.full((4,), factor)) * 255 - wanted).abs().max() <= 2


def test_auto_contrast_equals_pillow_up_to_its_rounding():
    x = photograph()
    assert (colour.auto_contrast(x / 255) * 255 - through_pillow(x, ImageOps.autocontrast)).abs().max() <= 1


def test_flat_images_survive_equalize_and_auto_contrast():
    x = torch.full((2, 3, 8, 8), 0.2)
    assert torch.equal(colour.equalize(x), x)
    assert torch.equal(colour.auto_contrast(x), x)


def test_a_third_of_a_turn_of_hue_moves_red_to_green():
    red = torch.tensor([0.9, 0.0, 0.0]).view(1, 3, 1, 1)
    turned = colour.hue(red, torch.tensor([1 / 3]))
    torch.testing.assert_close(turned.flatten(), torch.tensor([0.0, 0.9, 0.0]), atol=1e-6, rtol=0)


def test_grey_images_keep_their_values_under_saturation_and_hue():
    grey = images(3, channels=1)
    assert torch.equal(colour.saturation(grey, torch.full((3,), 1.7)), grey)
    three = grey.expand(-1, 3, -1, -1)
    torch.testing.assert_close(colour.hue(three, torch.full((3,), 0.3)), three)


def test_colour_of_two_channels_is_refused():
    with pytest.raises(ValueError, match="1 or 3 channels, the data has 2"):
        colour.saturation(images(1, channels=2), torch.ones(1))


def test_brightness_jitter_stays_within_its_factors_and_uses_them():
    one = ColourJitter(brightness=0.4, contrast=0, saturation=0, hue=0)
    out, _ = one(torch.full((2000, 3, 2, 2), 0.5), torch.zeros(2000), draws(one, 2000))
    assert out.min() == pytest.approx(0.3, abs=0.002)
    assert out.max() == pytest.approx(0.7, abs=0.002)


@pytest.mark.parametrize("number", range(rand_augment.NUM_OPERATIONS))
def test_each_operation_of_rand_augment_but_one_changes_an_image(number):
    x = photograph(1).float() / 255
    out = rand_augment.apply_operation(x, torch.tensor([number]), torch.tensor([1.0]), strength=0.5)
    assert torch.equal(out, x) == (number == rand_augment.IDENTITY)


def test_rand_augment_has_the_fourteen_operations_of_the_paper():
    assert rand_augment.NUM_OPERATIONS == 14


def test_rand_augment_shifts_by_its_share_of_the_width():
    x = torch.zeros(1, 1, 4, 331)
    x[..., 165] = 1
    out = rand_augment.apply_operation(x, torch.tensor([rand_augment.SHIFT_X]), torch.tensor([1.0]), strength=0.1)
    assert out[0, 0, 2].argmax() == 150


def test_images_of_one_batch_get_different_operations():
    x = photograph(1).float().div(255).expand(64, -1, -1, -1)
    one = RandAugment(num_operations=1, magnitude=15)
    out, _ = one(x, torch.zeros(64), draws(one, 64))
    assert len({image.numpy().tobytes() for image in out}) > 10


def test_mixup_blends_neighbours_and_targets():
    x = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1, 1)
    y = torch.eye(3)
    mixed_x, mixed_y = mixup(x, y, torch.tensor([0.75, 1.0, 0.5]))
    assert mixed_x.flatten().tolist() == [1.75, 2.0, 3.0]  # 0.75 * 1 + 0.25 * 4, 2, 0.5 * 4 + 0.5 * 2
    assert mixed_y.tolist() == [[0.75, 0, 0.25], [0, 1, 0], [0, 0.5, 0.5]]


def test_mixup_blends_targets_of_a_regression():
    _, y = mixup(torch.zeros(2, 1, 1, 1), torch.tensor([10.0, 20.0]), torch.tensor([0.5, 0.9]))
    torch.testing.assert_close(y, torch.tensor([15.0, 19.0]))


def test_cutmix_weighs_targets_by_the_area_that_is_covered():
    x = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    # sides sqrt(1 - 0.75) * 4 = 2; the second box is cut off by the corner to a single pixel
    mixed_x, mixed_y = cutmix(x, torch.eye(2), torch.tensor([0.75, 0.75]), torch.tensor([2, 0]), torch.tensor([2, 0]))
    assert mixed_x[0, 0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert mixed_x[1, 0].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert mixed_y.tolist() == [[0.75, 0.25], [1 / 16, 15 / 16]]


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 4.0])
def test_the_quantile_table_agrees_with_the_distribution_function(alpha):
    u = torch.linspace(0.001, 0.999, 997)
    value = BetaQuantile(alpha)(u)
    wanted = torch.from_numpy(beta.ppf(u.numpy(), alpha, alpha)).float()
    assert (value - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("one", [Mixup(1.0, 0.3), CutMix(1.0, 0.3)], ids=named)
def test_mixing_changes_the_wanted_share_of_targets(one):
    y = torch.eye(2)[torch.arange(4000) % 2]
    _, mixed = one(torch.zeros(4000, 1, 32, 32), y, draws(one, 4000))
    assert (mixed != y).any(dim=1).float().mean() == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(4000))


def test_what_is_not_mixed_keeps_its_exact_values():
    x, y = images(5), torch.rand(5, 3)
    same_x, same_y = mixup(x, y, torch.ones(5))
    assert torch.equal(same_x, x)
    assert torch.equal(same_y, y)


@pytest.mark.parametrize("one", UNMIXED, ids=named)
def test_a_sample_looks_the_same_in_any_batch(one):
    x, y = images(20, height=16, width=16), torch.zeros(20)
    u = draws(one, 20)
    chosen = torch.tensor([17, 3, 8])
    whole, _ = one(x, y, u)
    part, _ = one(x[chosen], y[chosen], u[chosen])
    torch.testing.assert_close(part, whole[chosen], atol=1e-6, rtol=0)


@pytest.mark.parametrize("one", ALL, ids=named)
def test_every_augmentation_changes_images_and_keeps_shape_and_range(one):
    x = images(8, height=16, width=20)
    out, _ = one(x, torch.eye(8), draws(one, 8))
    assert out.shape == x.shape
    assert not torch.equal(out, x)
    assert out.min() >= 0
    assert out.max() <= 1 + 1e-6


@pytest.mark.parametrize("one", ALL, ids=named)
def test_an_empty_batch_passes_through(one):
    out, _ = one(images(8)[:0], torch.zeros(0, 10), draws(one, 8)[:0])
    assert out.shape == (0, 3, 6, 9)

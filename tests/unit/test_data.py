"""Data options: splits, statistics, specs, and how options compose."""

import pytest
import torch
from hydra.utils import instantiate
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch import Tensor

from espalier import seeding
from espalier.config import compose
from espalier.config.conf_dir import CONF
from espalier.data.augment import Crop, Flip
from espalier.data.breast_cancer import BreastCancer
from espalier.data.diabetes import Diabetes
from espalier.data.digits import Digits
from espalier.data.loaders import Batch, Samples
from espalier.data.mixing import Mixup
from espalier.data.module import DataModule, Splits
from espalier.data.splits import statistics, stratified
from espalier.data.synthetic_images import SyntheticImages
from espalier.data.transforms import Prepare
from espalier.errors import ConfigError
from espalier.spec import DataSpec

SPLITS = ("train", "val", "test")


def synthetic(**changes) -> SyntheticImages:
    knobs = {"num_classes": 3, "channels": 3, "height": 8, "width": 12, "num_train": 90, "num_val": 12, "num_test": 14}
    knobs |= {"noise": 0.5, "batch_size": 10, "augment": {}, "seed": 0}
    return SyntheticImages(**(knobs | changes))


OPTIONS = {
    "digits": lambda seed=0: Digits(batch_size=64, augment={}, seed=seed),
    "breast_cancer": lambda seed=0: BreastCancer(batch_size=32, seed=seed),
    "diabetes": lambda seed=0: Diabetes(batch_size=32, seed=seed),
    "synthetic_images": lambda seed=0: synthetic(seed=seed),
}
option = pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS.keys())


def whole(data: DataModule, split: str) -> tuple[Tensor, Tensor]:
    """All finished samples of a split."""
    batches = list(data.loader(split))
    return torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches])


def composed(*overrides: str):
    return compose.compose(overrides).data


@pytest.mark.parametrize(
    ("make", "raw"),
    [("digits", load_digits), ("breast_cancer", load_breast_cancer), ("diabetes", lambda: load_diabetes(scaled=False))],
)
def test_splits_are_disjoint_and_cover_the_whole_data_set(make, raw):
    splits = OPTIONS[make]().splits
    rows = torch.cat([getattr(splits, split).x.flatten(1).double() for split in SPLITS])
    wanted = torch.from_numpy(raw().data).float().double()
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, wanted.tolist()))


@option
def test_splits_do_not_depend_on_the_seed(make):
    one, other = make(seed=0).splits, make(seed=1).splits
    assert all(torch.equal(getattr(one, split).x, getattr(other, split).x) for split in SPLITS)


@pytest.mark.parametrize("make", [OPTIONS["digits"], OPTIONS["breast_cancer"]], ids=["digits", "breast_cancer"])
def test_each_class_is_cut_in_the_same_shares(make):
    splits = make().splits
    counts_SK = torch.stack([getattr(splits, split).y.bincount() for split in SPLITS])
    wanted_S1 = torch.tensor([0.64, 0.16, 0.20])[:, None]
    assert (counts_SK - wanted_S1 * counts_SK.sum(dim=0)).abs().max() <= 1  # rounding of each of two shares


def test_stratified_parts_are_disjoint_sorted_and_complete():
    label = torch.tensor([0] * 10 + [1] * 20 + [2] * 50)[torch.randperm(80, generator=seeding.generator(1))]
    tenth, fifth, rest = stratified(label, [0.1, 0.2])
    assert [part.tolist() for part in (label[tenth].bincount(), label[fifth].bincount())] == [[1, 2, 5], [2, 4, 10]]
    assert torch.equal(torch.cat([tenth, fifth, rest]).sort().values, torch.arange(80))
    assert torch.equal(rest, rest.sort().values)


def test_a_class_too_small_to_divide_stays_in_training():
    part, rest = stratified(torch.tensor([0] * 20 + [1]), [0.5])
    assert 20 in rest.tolist()
    assert len(part) == 10


def test_an_empty_split_is_an_error_that_names_the_shares():
    with pytest.raises(ConfigError, match=r"shares \[0.1\] of 4 samples in 4 classes leave a split empty"):
        stratified(torch.arange(4), [0.1])


def test_statistics_of_channels_match_torch_and_never_divide_by_zero():
    x = torch.randint(0, 256, (5000, 3, 2, 3), generator=seeding.generator(2), dtype=torch.uint8)
    x[:, 1] = 7
    mean, std = statistics(x, 255)
    by_channel = (x.double() / 255).movedim(1, 0).flatten(1)
    assert mean == pytest.approx(by_channel.mean(dim=1).tolist())
    assert std[::2] == pytest.approx(by_channel.std(dim=1, correction=0)[::2].tolist())
    assert std[1] == 1


@option
def test_training_input_has_mean_zero_and_spread_one_per_channel(make):
    x, _ = whole(make(), "train")
    by_channel = x.double().movedim(1, 0).flatten(1)
    assert x.dtype == torch.float32
    assert by_channel.mean(dim=1).abs().max() < 1e-4
    assert (by_channel.std(dim=1, correction=0) - 1).abs().max() < 1e-3


@option
def test_evaluation_input_is_normalised_with_training_statistics(make):
    data = make()
    spec, test = data.spec, data.splits.test
    shape = (-1, *[1] * (len(spec.shape) - 1))
    mean, std = torch.tensor(spec.mean).view(shape), torch.tensor(spec.std).view(shape)
    x, y = whole(data, "test")
    torch.testing.assert_close(x, (test.x.float() / spec.scale - mean) / std)
    assert torch.equal(y, test.y)


@option
def test_the_spec_describes_the_training_split(make):
    data = make()
    spec, train = data.spec, data.splits.train
    assert spec.shape == tuple(train.x.shape[1:])
    assert len(spec.mean) == len(spec.std) == spec.shape[0]
    assert spec.class_counts == (tuple(train.y.bincount().tolist()) if spec.class_names else ())
    assert spec.num_outputs == (len(train.y.unique()) if spec.class_names else 1)


def test_a_regression_keeps_its_targets_in_raw_units():
    data = Diabetes(batch_size=32, seed=0)
    y = data.splits.train.y
    assert y.dtype == torch.float32
    assert data.spec.target_mean == pytest.approx(y.mean().item(), rel=1e-5)
    assert data.spec.target_std == pytest.approx(y.std(correction=0).item(), rel=1e-5)
    assert y.min() >= 25  # the smallest score that the source reports
    assert next(iter(data.train_dataloader())).y.shape == (32,)


def test_synthetic_images_can_be_told_apart_by_their_class_means():
    splits = synthetic().splits
    mean_KCHW = torch.stack([splits.train.x[splits.train.y == label].float().mean(dim=0) for label in range(3)])
    distance_NK = torch.cdist(splits.test.x.float().flatten(1), mean_KCHW.flatten(1))
    assert torch.equal(distance_NK.argmin(dim=1), splits.test.y)


def test_synthetic_splits_share_no_image():
    splits = synthetic().splits
    seen = {image.numpy().tobytes() for split in SPLITS for image in getattr(splits, split).x}
    assert len(seen) == 90 + 12 + 14


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (3, 64, 48)])
def test_synthetic_images_take_any_shape(shape):
    channels, height, width = shape
    data = synthetic(channels=channels, height=height, width=width)
    assert whole(data, "val")[0].shape == (12, *shape)


def test_the_spec_is_loaded_once():
    data = synthetic()
    assert data.spec is data.spec


def test_augmentation_acts_on_training_batches_only():
    plain, augmented = synthetic(), synthetic(augment={"flip": Flip(probability=1.0)})
    pairs = zip(plain.train_dataloader(), augmented.train_dataloader(), strict=True)
    assert all(torch.equal(one.x.flip(3), other.x) for one, other in pairs)
    assert torch.equal(whole(plain, "train")[0], whole(augmented, "train")[0])


@pytest.mark.parametrize("changed", ["seed", "epoch"])
def test_augmentation_changes_with_seed_and_epoch(changed):
    data = synthetic()
    raw, y, index = data.splits.train.x, data.splits.train.y, torch.arange(90)
    crop = [Crop(padding=0.25)]
    one = Prepare(data.spec, crop, 0, torch.device("cpu"))(Batch.single(raw, y, index), 0)
    seed, epoch = (1, 0) if changed == "seed" else (0, 1)
    other = Prepare(data.spec, crop, seed, torch.device("cpu"))(Batch.single(raw, y, index), epoch)
    assert (one.x != other.x).flatten(1).any(dim=1).float().mean() > 0.5


def test_a_sample_is_augmented_alike_in_any_batch():
    data = synthetic()
    train, index = data.splits.train, torch.arange(90)
    prepare = Prepare(data.spec, [Crop(padding=0.25), Flip(probability=0.5)], 0, torch.device("cpu"))
    few = torch.tensor([44, 2, 71])
    whole = Batch.single(train.x, train.y, index)
    part = Batch.single(train.x[few], train.y[few], few)
    assert torch.equal(prepare(part, 3).x, prepare(whole, 3).x[few])


def test_mixing_runs_last_and_gives_class_probabilities():
    data = synthetic(augment={"mixup": Mixup(alpha=1.0, probability=1.0), "flip": Flip(probability=1.0)})
    batch = next(iter(data.train_dataloader()))
    flipped = next(iter(synthetic(augment={"flip": Flip(probability=1.0)}).train_dataloader()))
    own = torch.nn.functional.one_hot(flipped.y, 3).float()
    # where neighbours are of different classes, the share of the own sample can be read off the target
    differ = flipped.y != flipped.y.roll(1)
    keep = (batch.y * own).sum(dim=1)[differ][:, None, None, None]
    wanted = keep * flipped.x[differ] + (1 - keep) * flipped.x.roll(1, dims=0)[differ]
    assert batch.y.shape == (10, 3)
    assert differ.sum() > 3
    torch.testing.assert_close(batch.x[differ], wanted, atol=1e-5, rtol=1e-4)


def test_every_data_option_composes_and_builds():
    names = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
    assert len(names) == 11
    for name in names:
        extra = ["data.path=somewhere"] if name in ("hub_images", "text") else []
        data = instantiate(composed(f"data={name}", *extra), seed=0, _convert_="all")
        assert isinstance(data, DataModule)


def test_every_augmentation_option_composes_under_its_own_name():
    names = sorted(path.stem for path in (CONF / "data" / "augment").glob("*.yaml") if path.stem != "none")
    assert len(names) == 9
    for name in names:
        assert list(composed("data=digits", f"data/augment=[{name}]").augment) == [name]


def test_augmentations_of_a_data_set_can_be_replaced_emptied_and_reached_into():
    assert list(composed("data=digits").augment) == ["crop", "rotation"]
    assert list(composed("data=cifar10", "data/augment=[cutout,flip]").augment) == ["cutout", "flip"]
    assert composed("data=cifar10", "data/augment=[]").augment == {}
    assert composed("data=digits", "data/augment=none").augment == {}
    assert composed("data=digits", "data.augment.crop.padding=0.25").augment.crop.padding == 0.25


def test_a_composed_option_augments_in_the_listed_order():
    data = instantiate(composed("data=digits", "data/augment=[mixup,flip,crop]"), seed=0, _convert_="all")
    loader = data.train_dataloader()
    assert [type(one).__name__ for one in loader.finish.augment] == ["Flip", "Crop", "Mixup"]


def test_raw_images_stay_eight_bit():
    train = Digits(batch_size=64, augment={}, seed=0).splits.train
    assert isinstance(train, Samples)
    assert train.x.dtype == torch.uint8


class Measured(DataModule):
    """A table that the test supplies, in all three splits."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(batch_size=2, seed=0, augment={})
        self.table = Samples(x, y)

    def load(self) -> Splits:
        mean, std = statistics(self.table.x, scale=1.0)
        names = () if self.table.y.is_floating_point() else ("no", "yes")
        spec = DataSpec.single("measured", (self.table.x.shape[1],), 1.0, mean, std, names)
        return Splits(spec, self.table, self.table, self.table)


def test_a_feature_that_is_nan_or_infinite_is_one_line_that_says_where():
    x = torch.arange(12.0).view(4, 3)
    x[2, 1], x[3, 0], x[3, 2] = torch.nan, torch.inf, torch.nan
    with pytest.raises(
        ConfigError, match=r"2 of 4 train samples are NaN or infinite, the first in sample 2, feature 1"
    ):
        _ = Measured(x, torch.tensor([0, 1, 0, 1])).spec
    with pytest.raises(ConfigError, match="data: 1 of 4 train targets are NaN or infinite, the first in sample 1"):
        _ = Measured(torch.arange(12.0).view(4, 3), torch.tensor([0.0, torch.nan, 1.0, 2.0])).spec


def test_features_and_targets_that_never_change_are_noted():
    x = torch.arange(12.0).view(4, 3)
    x[:, 1] = 5
    data = Measured(x, torch.full((4,), 2.5))
    _ = data.spec
    assert data.notes == [
        "constant in all training samples: features 1; they are only centred",
        "all training targets are 2.5, so nothing can be learnt from them",
    ]
    alike = Measured(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))
    _ = alike.spec
    assert alike.notes == ["all 4 training samples are the same, so nothing can be learnt from them"]


@option
def test_the_data_that_come_along_have_nothing_to_note(make):
    data = make()
    _ = data.spec
    assert data.notes == []

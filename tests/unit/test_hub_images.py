"""`hub_images` on folders and parquet files that these tests write; the hub itself is switched off."""

import struct
import zlib

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from espalier import errors
from espalier.data import image_reader, picture_table, pictures
from espalier.data.hub_images import HubImages, ImageReader
from espalier.data.loaders import BatchLoader, StreamLoader
from espalier.errors import ConfigError, EspalierError
from espalier.spec import DataSpec

SIDE = 6
SHADES = {"cat": 10, "dog": 120, "owl": 230}  # images of a class are around one shade


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def picture(name: str, number: int, side: int = SIDE) -> Image.Image:
    """A different image for each number, of one grey shade per column."""
    columns = np.arange(side) + SHADES[name] + number % 10
    return Image.fromarray(np.broadcast_to(columns[None, :, None], (side, side, 3)).astype(np.uint8))


def write_folder(root, num: int, names=tuple(SHADES), start: int = 0) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(start, start + num):
            picture(name, number).save(root / name / f"{number}.png")


def table(num: int, label="class") -> datasets.Dataset:
    names = list(SHADES)
    rows = {"photo": [], "kind": []}
    for number in range(num * len(names)):
        name = names[number % len(names)]
        rows["photo"].append(picture(name, number))
        rows["kind"].append(names.index(name) if label in ("class", "number") else name)
    kind = {"class": datasets.ClassLabel(names=names), "number": datasets.Value("int64")}.get(label)
    features = datasets.Features({"photo": datasets.Image(), "kind": kind or datasets.Value("string")})
    return datasets.Dataset.from_dict(rows, features=features)


def to_tensor(image: Image.Image, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.from_numpy(pictures.to_array(image, shape, pictures.WHITE)).permute(2, 0, 1)


def images(path, **changes) -> HubImages:
    knobs = {"path": str(path), "subset": None, "image_column": "image", "label_column": "label"}
    knobs |= {"train_split": "train", "val_split": None, "test_split": None, "val_share": 0.2, "test_share": 0.2}
    knobs |= {"channels": 3, "image_size": SIDE, "mean": None, "std": None, "in_memory": True, "num_workers": 0}
    knobs |= {"background": "black", "broken": "refuse", "batch_size": 4, "augment": {}, "seed": 0}
    return HubImages(**(knobs | changes))


def sizes(data: HubImages) -> dict[str, int]:
    return {split: len(getattr(data.splits, split)) for split in ("train", "val", "test")}


def one_line(data: HubImages) -> str:
    with pytest.raises(ConfigError) as caught:
        _ = data.spec
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_of_classes_is_divided_into_three_stratified_splits(tmp_path):
    write_folder(tmp_path / "pets", num=10)
    data = images(tmp_path / "pets")
    assert sizes(data) == {"train": 18, "val": 6, "test": 6}  # test 2 of 10 per class, then val 0.2 * 8 = 1.6
    assert data.spec.class_counts == (6, 6, 6)
    assert data.spec.class_names == ("cat", "dog", "owl")
    assert data.spec.name == "pets"


def test_a_split_has_the_same_fingerprint_wherever_it_lies_and_another_with_other_names_or_order(tmp_path):
    for place in ("here", "there/pets/pets", "renamed"):
        write_folder(tmp_path / place, num=10)
    (tmp_path / "renamed/owl/3.png").rename(tmp_path / "renamed/owl/03.png")
    here, there, renamed = (
        images(tmp_path / place, in_memory=place == "here").spec.fingerprint
        for place in ("here", "there/pets", "renamed")
    )
    assert here == there != renamed
    assert len(here) == 16


def test_a_table_has_another_fingerprint_once_its_rows_change_places(tmp_path):
    rows = table(10)
    for name, order in (("a", range(30)), ("b", range(30)), ("c", reversed(range(30)))):
        (tmp_path / name).mkdir()
        rows.select(list(order)).flatten_indices().to_parquet(tmp_path / name / "pets.parquet")
    columns = {"image_column": "photo", "label_column": "kind"}
    one, two, other = (images(tmp_path / name / "pets.parquet", **columns).spec.fingerprint for name in "abc")
    assert one == two != other


def test_carved_splits_share_no_image_and_lose_none(tmp_path):
    write_folder(tmp_path / "pets", num=10)
    splits = images(tmp_path / "pets").splits
    seen = [image.numpy().tobytes() for part in (splits.train, splits.val, splits.test) for image in part.x]
    assert len(set(seen)) == len(seen) == 30


def test_labels_belong_to_their_images(tmp_path):
    write_folder(tmp_path / "pets", num=10)
    splits = images(tmp_path / "pets").splits
    for part in (splits.train, splits.val, splits.test):
        shade = torch.tensor(list(SHADES.values()))[part.y]
        assert torch.equal((part.x[:, 0, 0, 0] - shade) // 10, torch.zeros_like(shade))


def test_an_official_test_split_is_kept_and_validation_comes_out_of_training(tmp_path):
    write_folder(tmp_path / "pets" / "train", num=10)
    write_folder(tmp_path / "pets" / "test", num=3, start=90)
    data = images(tmp_path / "pets")
    assert sizes(data) == {"train": 24, "val": 6, "test": 9}


def test_an_official_validation_split_is_kept(tmp_path):
    write_folder(tmp_path / "pets" / "train", num=10)
    write_folder(tmp_path / "pets" / "validation", num=2, start=50)
    write_folder(tmp_path / "pets" / "test", num=3, start=90)
    assert sizes(images(tmp_path / "pets")) == {"train": 30, "val": 6, "test": 9}


def test_the_validation_split_can_serve_as_test_as_imagenet_does(tmp_path):
    write_folder(tmp_path / "pets" / "train", num=10)
    write_folder(tmp_path / "pets" / "validation", num=2, start=50)
    data = images(tmp_path / "pets", test_split="validation")
    assert sizes(data) == {"train": 24, "val": 6, "test": 6}


@pytest.mark.parametrize(
    ("label", "names"), [("class", ("cat", "dog", "owl")), ("number", ("0", "1", "2")), ("text", ("cat", "dog", "owl"))]
)
def test_a_parquet_file_with_any_kind_of_label_is_read(tmp_path, label, names):
    table(10, label).to_parquet(tmp_path / "pets.parquet")
    data = images(tmp_path / "pets.parquet", image_column="photo", label_column="kind")
    assert sizes(data) == {"train": 18, "val": 6, "test": 6}
    assert data.spec.class_names == names
    assert torch.equal(data.splits.train.x[:, 0, 0, 0] // 100, data.splits.train.y)


def test_parquet_files_with_official_splits_are_read(tmp_path):
    table(10).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    table(4).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    data = images(tmp_path, image_column="photo", label_column="kind")
    assert sizes(data) == {"train": 24, "val": 6, "test": 12}


def test_plain_bytes_of_images_are_decoded(tmp_path):
    plain = table(10).cast_column("photo", datasets.Image(decode=False))
    rows = {"photo": [row["photo"]["bytes"] for row in plain], "kind": plain["kind"][:]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "pets.parquet")
    data = images(tmp_path / "pets.parquet", image_column="photo", label_column="kind")
    wanted = to_tensor(table(10)[0]["photo"], (3, SIDE, SIDE))
    everything = torch.cat([data.splits.train.x, data.splits.val.x, data.splits.test.x])
    assert (everything == wanted).flatten(1).all(dim=1).any()


def test_streaming_gives_the_same_batches_as_memory(tmp_path):
    write_folder(tmp_path / "pets", num=10)
    stored, streamed = images(tmp_path / "pets"), images(tmp_path / "pets", in_memory=False, num_workers=2)
    assert isinstance(streamed.splits.train, ImageReader)
    assert streamed.spec == stored.spec
    ours, theirs = stored.train_dataloader(), streamed.train_dataloader()
    assert isinstance(ours, BatchLoader)
    assert isinstance(theirs, StreamLoader)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.y, other.y)
        torch.testing.assert_close(one.x, other.x)


def test_splits_do_not_depend_on_the_seed(tmp_path):
    write_folder(tmp_path / "pets", num=10)
    one, other = images(tmp_path / "pets", seed=0).splits, images(tmp_path / "pets", seed=1).splits
    assert torch.equal(one.test.x, other.test.x)
    assert torch.equal(one.val.x, other.val.x)


def test_given_statistics_are_used_as_they_are(tmp_path):
    write_folder(tmp_path / "pets", num=10)
    spec = images(tmp_path / "pets", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]).spec
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_images_become_grey_for_one_channel():
    grey = to_tensor(Image.new("RGB", (4, 4), (255, 0, 0)), (1, 4, 4))
    assert grey.unique().tolist() == [76]  # 0.299 * 255


def test_other_sizes_are_scaled_and_cut_to_the_middle_square():
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200  # the middle square
    assert to_tensor(Image.fromarray(wide), (3, 4, 4)).unique().tolist() == [200]
    assert to_tensor(Image.fromarray(wide), (3, 8, 8)).shape == (3, 8, 8)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "some/where/else", "pets.parquet"])
def test_a_missing_folder_or_file_is_one_line_that_names_the_key(path):
    assert one_line(images(path)).startswith(f"data.path={path}: no such file or folder; give ")


@pytest.mark.parametrize("path", ["nobody/nothing", "???"])
def test_an_unreachable_hub_id_is_one_line_that_names_the_key(path):
    message = one_line(images(path))
    assert message.startswith(f"data.path={path}: is neither a folder here nor to be had from the hub (")
    assert message.endswith("; give a folder, a parquet file or a hub id")


def test_a_folder_without_images_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    assert one_line(images(tmp_path / "empty")).startswith(f"data.path={tmp_path}/empty: holds no data set (")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_column": "kid"}, "data.label_column=kid: no such column; did you mean kind?; there are photo, kind"),
        ({"image_column": "pic"}, "data.image_column=pic: no such column; there are photo, kind"),
        ({"image_column": "kind"}, "data.image_column=kind: holds no images but ClassLabel("),
        ({"test_split": "tset"}, "data.test_split=tset: no such split; there are train"),
        ({"val_split": "trian"}, "data.val_split=trian: no such split; did you mean train?; there are train"),
        ({"train_split": "all"}, "data.train_split=all: no such split; there are train"),
    ],
)
def test_wrong_names_are_one_line_with_what_there_is(tmp_path, changes, message):
    table(10).to_parquet(tmp_path / "pets.parquet")
    knobs = {"image_column": "photo", "label_column": "kind"} | changes
    assert one_line(images(tmp_path / "pets.parquet", **knobs)).startswith(message)


def test_a_test_split_without_labels_is_one_line(tmp_path):
    table(4, "number").to_parquet(tmp_path / "train.parquet")
    hidden = table(4, "number").map(lambda row: {"kind": -1})
    hidden.to_parquet(tmp_path / "test.parquet")
    message = one_line(images(tmp_path, image_column="photo", label_column="kind"))
    assert message.startswith("data.label_column=kind: a split has labels below 0")


def test_a_class_that_training_lacks_is_one_line(tmp_path):
    table(6, "text").filter(lambda row: row["kind"] != "owl").to_parquet(tmp_path / "train.parquet")
    table(6, "text").to_parquet(tmp_path / "test.parquet")
    message = one_line(images(tmp_path, image_column="photo", label_column="kind"))
    assert "the test split has labels that training lacks: owl" in message


def test_a_missing_extra_names_what_to_install(monkeypatch, tmp_path):
    def missing(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(errors, "import_module", missing)
    monkeypatch.setattr(picture_table, "require", errors.require)
    table(4).to_parquet(tmp_path / "pets.parquet")
    assert one_line(images(tmp_path / "pets.parquet")) == "datasets is not installed; run: pip install -e '.[hub]'"


def test_half_of_the_statistics_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give both or neither"):
        images(tmp_path, mean=[0.5, 0.5, 0.5])


def damage(root) -> None:
    """Three files that are no pictures, each in its own way, beside whole ones."""
    (root / "cat" / "cut.png").write_bytes((root / "cat" / "1.png").read_bytes()[:45])
    (root / "dog" / "empty.png").write_bytes(b"")
    content = bytearray((root / "owl" / "1.png").read_bytes())
    content[16:24] = struct.pack(">LL", 20_000, 20_000)  # what the head claims
    content[29:33] = struct.pack(">L", zlib.crc32(content[12:29]))
    (root / "owl" / "huge.png").write_bytes(content)


@pytest.mark.parametrize("in_memory", [True, False])
def test_all_damaged_pictures_are_listed_before_anything_is_trained(tmp_path, in_memory):
    write_folder(tmp_path / "pets", num=10)
    damage(tmp_path / "pets")
    message = one_line(images(tmp_path / "pets", in_memory=in_memory))
    assert "3 of 33 pictures cannot be used" in message
    for part in ("cat/cut.png: truncated", "dog/empty.png: empty", "owl/huge.png: larger than", "data.broken=skip"):
        assert part in message


@pytest.mark.parametrize("in_memory", [True, False])
def test_damaged_pictures_can_be_left_out_and_are_named(tmp_path, in_memory):
    write_folder(tmp_path / "pets", num=10)
    damage(tmp_path / "pets")
    data = images(tmp_path / "pets", in_memory=in_memory, broken="skip")
    assert sum(sizes(data).values()) == 30
    assert any("left out by data.broken=skip: 3 of 33" in note and "cat/cut.png" in note for note in data.notes)
    again = images(tmp_path / "pets", in_memory=True, broken="skip")
    for split in ("train", "val", "test"):
        ours, theirs = getattr(data.splits, split), getattr(again.splits, split)
        seen = ours if in_memory else ours.__getitems__(list(range(len(ours))))
        assert torch.equal(seen.x, theirs.x)
        assert torch.equal(seen.y, theirs.y)


def test_heads_and_ends_tell_what_is_damaged_where_not_all_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(image_reader, "NUM_DECODED", 0)
    write_folder(tmp_path / "pets", num=10)
    damage(tmp_path / "pets")
    assert "3 of 33 pictures cannot be used" in one_line(images(tmp_path / "pets", in_memory=False))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_vanishes_while_it_is_needed_is_one_line_with_its_name(tmp_path, num_workers):
    write_folder(tmp_path / "pets", num=10)
    data = images(tmp_path / "pets", in_memory=False, num_workers=num_workers)
    _ = data.splits
    for path in (tmp_path / "pets" / "owl").iterdir():
        path.unlink()
    with pytest.raises(EspalierError, match=r"^data\.path=\S+: owl/\d\.png: not read, no such file") as caught:
        list(data.train_dataloader())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, float("nan"), 0.5], ids=["null", "nan", "half"])
def test_a_label_that_is_none_is_listed_and_can_be_left_out(tmp_path, value):
    rows = table(10, "number").to_pandas()
    rows["kind"] = rows["kind"].astype(float)
    rows.loc[[4, 17], "kind"] = value
    rows.to_parquet(tmp_path / "pets.parquet")
    knobs = {"image_column": "photo", "label_column": "kind"}
    message = one_line(images(tmp_path / "pets.parquet", **knobs))
    assert "2 of 30 pictures cannot be used: train row 4: " in message
    assert "train row 17: " in message
    left = images(tmp_path / "pets.parquet", **knobs, broken="skip")
    assert sum(sizes(left).values()) == 28
    assert left.spec.class_names == ("0", "1", "2")


def test_a_row_without_a_picture_and_lists_as_labels_are_listed(tmp_path):
    plain = table(10).cast_column("photo", datasets.Image(decode=False))
    photos = [row["photo"]["bytes"] if number != 7 else None for number, row in enumerate(plain)]
    kinds = [[row["kind"]] for row in plain]
    datasets.Dataset.from_dict({"photo": photos, "kind": kinds}).to_parquet(tmp_path / "lists.parquet")
    datasets.Dataset.from_dict({"photo": photos, "kind": plain["kind"][:]}).to_parquet(tmp_path / "null.parquet")
    knobs = {"image_column": "photo", "label_column": "kind"}
    assert "1 of 30 pictures cannot be used: train row 7: no picture" in one_line(
        images(tmp_path / "null.parquet", **knobs)
    )
    message = one_line(images(tmp_path / "lists.parquet", **knobs))
    assert "30 of 30 pictures cannot be used: train row 0: the label [0], " in message
    assert message.count("train row") == 10


def test_what_was_found_is_one_remark_and_so_are_classes_that_a_split_lacks(tmp_path):
    write_folder(tmp_path / "pets" / "train", num=4, names=("cat", "dog"))
    write_folder(tmp_path / "pets" / "val", num=1, names=("cat",))
    write_folder(tmp_path / "pets" / "test", num=2)
    (tmp_path / "pets" / "train" / "cat" / "notes.txt").touch()
    data = images(tmp_path / "pets")
    assert data.spec.class_counts == (4, 4, 0)
    assert data.notes == [
        f"{tmp_path}/pets: 3 classes (cat, dog, owl); train 8 pictures of 2 classes, val 1 of 1, test 6 of 3; "
        "left out: 1 that are no picture by their name (train/cat/notes.txt)",
        "no training picture of owl; no val picture of dog, owl; "
        "a class without training pictures is an output that learns nothing",
    ]


def test_pictures_that_are_all_of_one_colour_are_noted(tmp_path):
    for name in SHADES:
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (SIDE, SIDE), (7, 7, 7)).save(tmp_path / "pets" / name / f"{number}.png")
    for in_memory in (True, False):
        data = images(tmp_path / "pets", in_memory=in_memory)
        _ = data.spec
        assert "samples are the same, so nothing can be learnt" in data.notes[-1]


@pytest.mark.parametrize(
    ("num", "changes", "key"), [(1, {}, "test_share=0.2"), (10, {"val_share": 0.001}, "val_share=0.001")]
)
def test_too_few_pictures_are_one_line_that_names_the_share(tmp_path, num, changes, key):
    write_folder(tmp_path / "pets", num=num)
    assert f"data.{key}: shares [" in one_line(images(tmp_path / "pets", **changes))


def test_a_cache_that_cannot_be_written_is_named_and_not_needed_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nope/datasets")
    monkeypatch.setenv("HF_HOME", "/proc/nope")
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    table(10).to_parquet(tmp_path / "pets.parquet")
    message = one_line(images(tmp_path / "pets.parquet", image_column="photo", label_column="kind"))
    assert message.startswith("HF_HOME=/proc/nope: the cache of datasets, /proc/nope/datasets, cannot be written")
    write_folder(tmp_path / "pets", num=10)
    assert sum(sizes(images(tmp_path / "pets")).values()) == 30


def test_transparent_pictures_lie_on_the_background_which_the_spec_keeps(tmp_path):
    for name in SHADES:
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGBA", (SIDE, SIDE), (number, 0, 0, 0)).save(tmp_path / "pets" / name / f"{number}.png")
    data = images(tmp_path / "pets", background="#0a14ff")
    assert data.splits.train.x[0, :, 0, 0].tolist() == [10, 20, 255]
    assert DataSpec.from_dict(data.spec.to_dict()).background == (10, 20, 255)
    stored = {key: value for key, value in data.spec.to_dict().items() if key != "background"}
    assert DataSpec.from_dict(stored).background == (0, 0, 0)


@pytest.mark.parametrize("std", [[0.0, 1.0, 1.0], [float("nan"), 1.0, 1.0], [1.0]])
def test_statistics_that_cannot_be_divided_by_are_refused(tmp_path, std):
    with pytest.raises(ValueError, match=r"data\.std"):
        images(tmp_path, mean=[0.5] * len(std), std=std)

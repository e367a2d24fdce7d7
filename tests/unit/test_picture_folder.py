"""A folder of pictures as people mean it: folders decide, names of files never do, and what is left out is said."""

import os

import pytest
from PIL import Image

from espalier.data.picture_folder import find
from espalier.errors import ConfigError


def write(root, *paths: str) -> str:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith((".png", ".PNG")):
            Image.new("L", (2, 2)).save(root / path, "PNG")
        else:
            (root / path).write_bytes(b"")
    return str(root)


def sizes(root: str) -> dict[str, dict[str, int]]:
    """Pictures per class and split."""
    found = find(root)
    assert found is not None
    return {
        split: {name: part.class_of.count(name) for name in part.class_names} for split, part in found.parts.items()
    }


def left_out(root: str) -> str:
    found = find(root)
    assert found is not None
    return ", ".join(found.remarks())


@pytest.mark.parametrize("name", ["train_1.png", "test.png", "my-val 2.png", "train/test.png", "évaluation.PNG"])
def test_names_of_files_decide_nothing(tmp_path, name):
    assert sizes(write(tmp_path, f"a/{name}", "a/2.png", "b/1.png")) == {"train": {"a": 2, "b": 1}}


@pytest.mark.parametrize(
    "name", ["train", "Test", "val", "test tube", "dev board", "training", "eval", "犬", "a\nb", "b\\c", "__x"]
)
def test_a_folder_of_pictures_is_a_class_whatever_it_is_called(tmp_path, name):
    assert sizes(write(tmp_path, f"{name}/1.png", "car/1.png")) == {"train": {name: 1, "car": 1}}


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN", "seg_train"])
@pytest.mark.parametrize("val", ["val", "Valid", "validation", "dev"])
def test_folders_that_hold_class_folders_are_splits(tmp_path, train, val):
    root = write(tmp_path, f"{train}/a/1.png", f"{train}/b/1.png", f"{val}/a/1.png", "test/b/1.png")
    once = {"train": {"a": 1, "b": 1}, "validation": {"a": 1, "b": 0}, "test": {"a": 0, "b": 1}}
    assert sizes(root) == once


def test_what_an_archive_has_wrapped_is_unwrapped(tmp_path):
    root = write(
        tmp_path, *(f"data/photos/seg_{split}/seg_{split}/{name}/1.png" for split in ("train", "test") for name in "ab")
    )
    assert sizes(root) == {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}}


def test_a_class_may_have_folders_and_be_called_train_with_them(tmp_path):
    root = write(tmp_path, "cat/1.png", "cat/2023/1.png", "cat/2023/may/1.png", "train/steam/1.png", "train/ice/1.png")
    assert sizes(root) == {"train": {"cat": 3, "train": 2}}


def test_links_are_followed_and_loops_are_not(tmp_path):
    write(tmp_path / "pool", "a/1.png", "b/1.png", "b/2.png")
    (tmp_path / "data").mkdir()
    for name in "ab":
        (tmp_path / "data" / name).symlink_to(tmp_path / "pool" / name)
    (tmp_path / "pool" / "a" / "up").symlink_to(tmp_path / "pool")
    (tmp_path / "pool" / "a" / "self").symlink_to(tmp_path / "pool" / "a")
    (tmp_path / "pool" / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    assert sizes(str(tmp_path / "data"))["train"]["b"] == 2
    (tmp_path / "pool" / "a" / "up").unlink()
    assert sizes(str(tmp_path / "data")) == {"train": {"a": 1, "b": 2}}
    assert "1 links to a folder above (a/self)" in left_out(str(tmp_path / "data"))
    assert "1 that are no file (b/gone.png)" in left_out(str(tmp_path / "data"))


def test_what_is_left_out_is_named_with_its_reason(tmp_path):
    root = write(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png", "train/a/._1.png", "train/.x/1.png")
    write(tmp_path, "train/a/notes.txt", "train/a/.DS_Store", "train/a/Thumbs.db", "__MACOSX/a/1.png", "train/9.png")
    write(tmp_path, "extra/a/1.png", "other/1.png")
    (tmp_path / "train" / "c").mkdir()
    said = left_out(root)
    assert sizes(root)["train"] == {"a": 1, "b": 1}
    for part in (
        "2 hidden (train/.x, train/a/._1.png)",
        "1 that are no picture by their name (train/a/notes.txt)",
        "1 folders without a picture (train/c)",
        "1 beside the class folders (train/9.png)",
        "1 in no split (other)",
    ):
        assert part in said
    assert "Store" not in said
    assert find(root).parts["extra"].class_of == ["a"]


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        (["1.png", "2.png"], "2 pictures but no class folders"),
        (["cat/1.png"], "one class folder alone, cat"),
        (["train/1.png", "test/1.png"], "no class folders in test and train|no class folders in train"),
        (["train/1.png", "test/a/1.png", "test/b/1.png"], "no class folders in train"),
        (["train/a/1.png", "train/b/1.png", "Training/a/1.png"], "could both be the train split"),
    ],
)
def test_what_is_no_folder_of_classes_is_told_in_one_line(tmp_path, paths, told):
    with pytest.raises(ConfigError, match=told) as caught:
        find(write(tmp_path, *paths))
    assert "\n" not in str(caught.value)


def test_a_name_that_is_no_text_is_told_in_one_line(tmp_path):
    write(tmp_path, "a/1.png")
    folder = os.path.join(os.fsencode(tmp_path), b"b\xff")  # noqa: PTH118
    os.mkdir(folder)  # noqa: PTH102
    Image.new("L", (2, 2)).save(os.fsdecode(folder) + "/1.png")
    with pytest.raises(ConfigError, match="no UTF-8; rename it"):
        find(str(tmp_path))


@pytest.mark.parametrize("name", ["metadata.csv", "train/metadata.jsonl", "train.parquet", "data/x.parquet"])
def test_tables_are_left_to_datasets(tmp_path, name):
    assert find(write(tmp_path, "a/1.png", "b/1.png", name)) is None


def test_a_folder_without_pictures_holds_no_classes(tmp_path):
    assert find(write(tmp_path, "a/1.txt")) is None


def test_pictures_come_in_the_order_of_their_paths(tmp_path):
    root = write(tmp_path, "b/1.png", "a/10.png", "a/9.png", "a b/1.png", "a/Z.png")
    found = find(root)
    assert found.parts["train"].paths == sorted(found.parts["train"].paths)
    assert found.parts["train"].class_of == ["a b", "a", "a", "a", "b"]

"""A bundle is read whole and unchanged or not at all, and numpy prepares samples exactly as training did."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from espalier.data.transforms import Normalise
from espalier.errors import ConfigError
from espalier.export import bundle, preprocess
from espalier.spec import DataSpec

SPEC = DataSpec.single("pictures", (3, 2, 4), 255.0, (0.1, 0.5, 0.7), (0.3, 0.2, 0.9), ("cat", "dog"), (5, 6))
CONTENT = {
    "name": "fp32",
    "data": SPEC.to_dict(),
    "sample_by_sample": False,
    "compression": [{"method": "qat"}],
    "config": {"data": {}, "model": {"width": 4}, "learner": {}},
    "formats": {"onnx": {"runtime": "onnxruntime", "files": ["model.onnx"], "parity": None}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "model.onnx").write_bytes(b"a network")
    bundle.write(draft, tmp_path / "export", CONTENT)
    assert not draft.exists()
    return tmp_path / "export"


def change(folder: Path, **values: object) -> None:
    file = folder / "bundle.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_bundle_says_what_was_written_and_lists_every_file_with_its_hash(folder: Path):
    read = bundle.read("source", folder)
    assert (read.name, read.spec, read.formats, read.sample_by_sample) == ("fp32", SPEC, ["onnx"], False)
    assert read.history == [{"method": "qat"}]
    assert read.config["model"] == {"width": 4}
    assert read.file("onnx").read_bytes() == b"a network"
    digest = hashlib.sha256(b"a network").hexdigest()
    assert read.content["files"] == {"model.onnx": {"sha256": digest, "size_bytes": 9}}


def test_a_changed_file_is_refused(folder: Path):
    (folder / "model.onnx").write_bytes(b"A network")
    with pytest.raises(ConfigError, match=r"source=.*: model\.onnx was changed after the export"):
        bundle.read("source", folder)


def test_a_missing_file_is_refused(folder: Path):
    (folder / "model.onnx").unlink()
    with pytest.raises(ConfigError, match=r"model\.onnx is missing"):
        bundle.read("source", folder)


def test_a_link_is_no_file_of_a_bundle(folder: Path, tmp_path: Path):
    (folder / "model.onnx").rename(tmp_path / "elsewhere")
    (folder / "model.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"model\.onnx is missing"):
        bundle.read("source", folder)


@pytest.mark.parametrize("name", ["weights.bin", ".weights", "README.md"])
def test_a_file_that_is_not_listed_is_refused_by_name(folder: Path, name: str):
    (folder / name).write_bytes(b"external data of the network")
    with pytest.raises(ConfigError, match=rf"'{name}' is no file of the bundle.*move it away"):
        bundle.read("source", folder)


def test_the_description_is_no_link_and_no_pipe(folder: Path, tmp_path: Path):
    (folder / "bundle.json").rename(tmp_path / "elsewhere")
    (folder / "bundle.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"bundle\.json is missing or damaged"):
        bundle.read("source", folder)
    (folder / "bundle.json").unlink()
    os.mkfifo(folder / "bundle.json")
    with pytest.raises(ConfigError, match=r"bundle\.json is missing or damaged"):
        bundle.read("source", folder)


@pytest.mark.parametrize(
    "values",
    [
        {"formats": {"onnx": {"files": []}}},
        {"formats": {"onnx": {"files": "model.onnx"}}},
        {"files": {"model.onnx": "no digest"}},
        {"sample_by_sample": "no"},
        {"data": []},
        {"versions": float("nan")},
    ],
)
def test_a_description_of_other_types_is_one_line(folder: Path, values: dict):
    change(folder, **values)
    with pytest.raises(ConfigError, match=r"bundle\.json is missing or damaged"):
        bundle.read("source", folder)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "sub/model.onnx", "unlisted.onnx"])
def test_no_name_leads_out_of_the_folder_or_to_a_file_without_a_hash(folder: Path, name: str):
    change(folder, formats={"onnx": {"runtime": "onnxruntime", "files": [name]}})
    with pytest.raises(ConfigError, match="is no file of the bundle"):
        bundle.read("source", folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', '{"schema": 1, "files": {}, "formats": []}'])
def test_a_damaged_description_is_one_line(folder: Path, text: str):
    (folder / "bundle.json").write_text(text)
    with pytest.raises(ConfigError, match=r"bundle\.json is missing or damaged"):
        bundle.read("source", folder)


def test_a_bundle_of_another_version_says_so(folder: Path):
    change(folder, schema=2)
    with pytest.raises(ConfigError, match="a bundle of version 2, not 1"):
        bundle.read("source", folder)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_numpy_normalises_bit_equal_to_training(dtype: type):
    raw = np.random.default_rng(0).integers(0, 256, (5, *SPEC.shape)).astype(dtype)
    expected = Normalise(SPEC, torch.device("cpu"))(torch.from_numpy(raw))
    found = preprocess.normalise(SPEC, raw)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected.numpy())


def test_numpy_normalises_tables_per_feature():
    spec = DataSpec.single("table", (2,), 1.0, (1.0, 10.0), (2.0, 5.0))
    assert preprocess.normalise(spec, np.array([[3.0, 0.0]])).tolist() == [[1.0, -2.0]]


def test_a_picture_becomes_raw_values_in_the_channels_size_and_unit_of_the_data():
    spec = DataSpec.single("digits", (1, 8, 8), 16.0, (0.3,), (0.4,), ("0", "1"))
    white = preprocess.raw_of(spec, Image.new("RGB", (100, 30), (255, 255, 255)))
    assert white.shape == (1, 8, 8)
    assert np.all(white == 16)
    half = Image.new("L", (8, 8))
    half.paste(51, (4, 0, 8, 8))
    raw = preprocess.raw_of(spec, half)
    assert np.allclose(raw[0], [[0, 0, 0, 0, 3.2, 3.2, 3.2, 3.2]] * 8)


def test_transparent_parts_of_a_picture_are_black():
    clear = Image.new("RGBA", (4, 2), (255, 255, 255, 0))
    assert np.all(preprocess.raw_of(SPEC, clear) == 0)

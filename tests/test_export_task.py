"""A trained run becomes a bundle that answers as the run does, or one line says why it does not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import QUICK, Command, command
from espalier.data.digits import Digits
from espalier.export import bundle
from espalier.export.parity import Gate, Parity

NETWORK = ("model=cnn", "model.channels=[8,16]", "trainer.max_epochs=4", *QUICK)
FAST = ("trainer.max_epochs=1", "task.batches=[1]", *QUICK)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command(["train", *NETWORK], folder).code == 0
    [run] = folder.glob("logs/train/*")
    return run


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    """The run that exported `trained` to ONNX and safetensors."""
    folder = trained.parents[2]
    words = [f"source={trained}", "task.format=[onnx,safetensors]", *QUICK]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command(["export", *words], folder).code == 0
    [run] = folder.glob("logs/export/*")
    return run


def compressed(espalier: Command, trained: Path, recipe: str, *words: str) -> Path:
    done = espalier("compress", f"source={trained}", f"compression=[{recipe}]", *words, *FAST)
    assert done.code == 0, done.err
    return done.run


def report(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def test_a_bundle_holds_the_files_their_parity_and_the_accuracy_that_training_measured(trained: Path, exported: Path):
    read = bundle.read("source", exported / "export")
    assert read.formats == ["onnx", "safetensors"]
    assert {path.name for path in read.path.iterdir()} == {"bundle.json", "model.onnx", "model.safetensors"}
    parity = read.content["formats"]["onnx"]["parity"]
    [measured] = report(trained)["rows"]
    assert parity["num_samples"] == 359
    assert parity["same_label"] == 1
    assert parity["max_difference"] < 1e-3
    assert parity["eager"] == parity["exported"] == measured["metrics"]["test/accuracy"]
    assert not list(exported.glob(".*"))


def test_a_bundle_names_no_path_of_the_machine(exported: Path):
    text = (exported / "export" / "bundle.json").read_text()
    assert str(exported.parents[2]) not in text
    assert str(Path.home()) not in text


RUNTIME_ALONE = """
import json, sys
import numpy as np, onnxruntime
folder, samples, answers = sys.argv[1:]
data = json.load(open(f"{folder}/bundle.json"))["data"]
x = (np.load(samples) / data["scale"] - np.reshape(data["mean"], (-1, 1, 1))) / np.reshape(data["std"], (-1, 1, 1))
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
logits = session.run(["logits"], {"input": x.astype(np.float32)})[0]
np.save(answers, logits.argmax(1))
assert not {"torch", "espalier"} & set(sys.modules)
"""


def test_the_runtime_alone_reads_raw_samples_to_the_labels_that_were_measured(exported: Path, tmp_path: Path):
    test = Digits(64, 0, {}).splits.test
    np.save(tmp_path / "raw.npy", test.x.numpy())
    subprocess.run(
        [sys.executable, "-c", RUNTIME_ALONE, exported / "export", tmp_path / "raw.npy", tmp_path / "labels.npy"],
        check=True,
    )
    accuracy = float((np.load(tmp_path / "labels.npy") == test.y.numpy()).mean())
    assert accuracy == pytest.approx(report(exported)["rows"][0]["metrics"]["test/accuracy"], abs=1e-6)


def test_a_quantized_network_keeps_its_labels(espalier: Command, trained: Path):
    small = compressed(espalier, trained, "prune_channels,qat", "compression.prune_channels.ratio=0.3")
    done = espalier("export", f"source={small}", "hydra.run.dir=shipped", *QUICK)
    assert done.code == 0, done.err
    read = bundle.read("source", Path("shipped/export"))
    assert read.name == "prune_channels+qat"
    assert read.content["formats"]["onnx"]["parity"]["same_label"] >= 0.997
    assert read.file("onnx").stat().st_size < (trained / "checkpoints" / "best.ckpt").stat().st_size / 8


def test_ranges_that_each_call_finds_are_said_to_be_so(espalier: Command):
    assert espalier("train", "data=breast_cancer", "trainer.max_epochs=2", *QUICK).code == 0
    assert espalier("compress", "source=latest", "compression=[ptq]", *FAST).code == 0
    assert espalier("export", "source=latest", "hydra.run.dir=shipped", *QUICK).code == 0
    assert bundle.read("source", Path("shipped/export")).sample_by_sample


def test_a_mismatch_ends_without_a_bundle_unless_it_is_allowed(espalier: Command, trained: Path):
    words = ("export", f"source={trained}", "task.tolerance=1e-12", "hydra.run.dir=shipped", *QUICK)
    done = espalier(*words)
    assert done.code == 2
    first, second = done.err.splitlines()
    assert first.startswith("espalier: MISMATCH: onnx differs from torch by ")
    assert second == "espalier: no bundle was written; task.allow_mismatch=true writes it all the same"
    assert not Path("shipped/export").exists()
    assert espalier(*words, "task.allow_mismatch=true").code == 0
    assert bundle.read("source", Path("shipped/export")).formats == ["onnx"]
    assert [note for note in report(Path("shipped"))["notes"] if note.startswith("MISMATCH: onnx differs")]
    again = espalier(*words)
    assert (again.code, again.err.count("holds a run already (report.json)")) == (2, 1)


def test_sixteen_bits_are_compared_with_the_network_in_float(espalier: Command, trained: Path):
    words = ("task.format=[torch_export]", "task.precision=bf16", "task.agreement=0.9", "hydra.run.dir=shipped")
    done = espalier("export", f"source={trained}", *words, *QUICK)
    assert done.code == 0, done.err
    parity = bundle.read("source", Path("shipped/export")).content["formats"]["torch_export"]["parity"]
    assert 1e-3 < parity["max_difference"] < 1
    assert parity["eager"] == report(trained)["rows"][0]["metrics"]["test/accuracy"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["source=null"], "source=null: export needs the trained RUN"),
        (["task.format=[]"], "task.format=[]: nothing to write; choose from onnx, torch_export,"),
        (["task.format=[onnx,onnx]"], "task.format=[onnx,onnx]: a format is listed twice"),
        (["task.format=[onxn]"], "task.format=['onxn']: should be 'onnx', 'torch_export',"),
        (["task.precision=bf16"], "task.precision=bf16: "),
        (["model=mlp"], "model=mlp: model comes from source and cannot change"),
    ],
)
def test_wrong_inputs_are_one_line(espalier: Command, trained: Path, words: list[str], line: str):
    source = [] if "source=null" in words else [f"source={trained}"]
    done = espalier("export", *source, *words, *QUICK)
    assert done.code == 2
    assert [text for text in done.err.splitlines() if text.startswith(f"espalier: {line}")], done.err
    assert not list(Path().glob("logs/export/*/export"))


def test_a_bundle_is_not_exported_again_nor_compressed(espalier: Command, exported: Path):
    for task in ("export", "compress", "train", "explain"):
        done = espalier(task, f"source={exported}", *QUICK)
        assert (done.code, len(done.err.splitlines())) == (2, 1)
        assert f"{task} needs the trained RUN, not the bundle that was exported from it" in done.err


def test_labels_that_may_differ_may_move_the_accuracy_of_a_weak_network_as_far():
    gate = Gate(is_exact=False, tolerance=0.0, agreement=0.997)
    right = 219  # of 359: one label is 0.28 points, and 0.3 % of that accuracy are 0.18
    one_other = Parity(359, 0.02, 358 / 359, "test/accuracy", right / 359, (right - 1) / 359)
    assert gate.problem(one_other) is None
    two_other = Parity(359, 0.02, 357 / 359, "test/accuracy", right / 359, (right - 2) / 359)
    assert gate.problem(two_other) == "gives 2 of 359 samples another label (99.7% must agree)"
    unlike = Parity(359, 0.02, 1.0, "test/rmse", 59.4, 59.9)
    assert gate.problem(unlike) == "changes test/rmse from 59.4000 to 59.9000"

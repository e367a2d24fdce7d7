"""A bundle answers to a whole data set in shards: whole ones only, each once, also after kill -9."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch
from pyarrow import Table, concat_tables, parquet

from conftest import Command
from espalier.data.synthetic_images import SyntheticImages
from espalier.export import onnx
from espalier.export.bundle import read
from helpers import forked
from test_evaluate import DIGITS, QUIET, evaluated, made, metrics, report

NUM_TRAIN = 1151
SECONDS = 60.0  # to wait for a process that predicts


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    digits = made(tmp_path_factory.mktemp("digits"), "train", *DIGITS)
    return made(tmp_path_factory.mktemp("bundle"), "export", f"source={digits}")


def predicted(espalier: Command, bundle: Path, *words: str, to: str) -> Path:
    done = espalier("predict", f"source={bundle}", *words, *QUIET, f"hydra.run.dir={to}")
    assert done.code == 0, done.err
    return done.folder / to


def shards(run: Path) -> list[Path]:
    return sorted((run / "predictions").glob("part-*.parquet"))


def rows(run: Path) -> Table:
    return concat_tables([parquet.read_table(path) for path in shards(run)])


def test_shards_together_are_what_evaluate_finds(espalier: Command, bundle: Path):
    words = ("task.split=train",)
    run = predicted(espalier, bundle, *words, "task.shard_size=100", "data.batch_size=64", to="shards")
    assert [parquet.read_metadata(path).num_rows for path in shards(run)] == [100] * 11 + [51]
    at_once = evaluated(espalier, bundle, *words, "task.predictions=parquet", to="whole")
    whole = parquet.read_table(at_once / "predictions.parquet")
    found = rows(run)
    assert found["index"].to_pylist() == list(range(NUM_TRAIN))
    assert found.column_names == whole.column_names
    assert found["predicted"].equals(whole["predicted"])
    assert found["p_3"].to_numpy() == pytest.approx(whole["p_3"].to_numpy(), abs=1e-6)
    assert metrics(run) == {"train/accuracy": pytest.approx(metrics(at_once)["train/accuracy"], abs=1e-6)}
    [row] = report(run)["rows"]
    assert row["rows"] == NUM_TRAIN
    assert row["samples_per_second"] == pytest.approx(NUM_TRAIN / row["seconds"])


@pytest.mark.parametrize(("shard_size", "batch_size"), [(30, 64), (100, 300)])
def test_any_size_of_shard_fits_any_size_of_batch(espalier: Command, bundle: Path, shard_size: int, batch_size: int):
    words = (f"task.shard_size={shard_size}", f"data.batch_size={batch_size}", "task.probabilities=false")
    run = predicted(espalier, bundle, *words, to="run")
    assert rows(run)["index"].to_pylist() == list(range(359))
    assert len(shards(run)) == -(-359 // shard_size)
    assert rows(run).column_names == ["index", "true", "predicted", "probability"]


SLOW = ("task.split=train", "task.shard_size=16")  # 72 files, each of which waits for the disk


def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(espalier: Command, bundle: Path, tmp_path: Path):
    unbroken = predicted(espalier, bundle, *SLOW, to="unbroken")
    words = ["predict", f"source={bundle}", *SLOW, *QUIET, "hydra.run.dir=broken"]
    process = forked.Popen([sys.executable, "-m", "espalier.cli", *words], cwd=tmp_path)
    broken = tmp_path / "broken"
    wait_for(lambda: len(shards(broken)) >= 5, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait(SECONDS) == -signal.SIGKILL
    there = {path: path.stat().st_mtime_ns for path in shards(broken)}
    assert 5 <= len(there) < len(shards(unbroken))
    assert not (broken / "report.json").exists()
    predicted(espalier, bundle, *SLOW, to="broken")
    assert rows(broken).equals(rows(unbroken))
    assert [path.name for path in shards(broken)] == [path.name for path in shards(unbroken)]
    assert {path: path.stat().st_mtime_ns for path in there} == there, "what was there is not written again"
    assert any(note.startswith(f"{len(there)} of 72 shards were there already") for note in report(broken)["notes"])


def wait_for(is_so, process: subprocess.Popen) -> None:
    end = monotonic() + SECONDS
    while not is_so():
        assert process.poll() is None, "it ended before it could be killed"
        assert monotonic() < end
        sleep(0.002)


def test_lost_and_damaged_shards_alone_are_written_again(espalier: Command, bundle: Path):
    words = ("task.shard_size=50",)
    run = predicted(espalier, bundle, *words, to="run")
    before = rows(run)
    files = shards(run)
    files[0].unlink()
    files[3].write_bytes(files[3].read_bytes()[:500])
    files[4].unlink()
    kept = {path: path.stat().st_mtime_ns for path in files if path not in (files[0], files[3], files[4])}
    predicted(espalier, bundle, *words, to="run")
    assert rows(run).equals(before)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    predicted(espalier, bundle, *words, to="run")
    assert "samples_per_second" not in report(run)["rows"][0], "nothing was left to do"
    right = sum(a == b for a, b in zip(before["true"].to_pylist(), before["predicted"].to_pylist(), strict=True))
    assert metrics(run)["test/accuracy"] == pytest.approx(right / 359)


def test_shards_of_something_else_are_not_mixed_in(espalier: Command, bundle: Path, tmp_path: Path):
    run = predicted(espalier, bundle, "task.shard_size=100", to="run")
    other = tmp_path / "other"
    shutil.copytree(bundle / "export", other)
    content = json.loads((other / "bundle.json").read_text())
    (other / "bundle.json").write_text(json.dumps({**content, "name": "another"}))
    before = {path: path.read_bytes() for path in run.rglob("*.parquet")}
    for words, what in (
        ((f"source={other}", "task.shard_size=100"), "bundle_sha256"),
        ((f"source={bundle}", "task.shard_size=50"), "shard_size"),
        ((f"source={bundle}", "task.shard_size=100", "task.split=val"), "split"),
        ((f"source={bundle}", "task.shard_size=100", *SAME_SHAPE), "data"),
    ):
        done = espalier("predict", *words, *QUIET, "hydra.run.dir=run")
        assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
        assert "hydra.run.dir" in done.err
        assert what in done.err
    assert {path: path.read_bytes() for path in run.rglob("*.parquet")} == before


SAME_SHAPE = ("data=synthetic_images", "data.channels=1", "data.height=8", "data.width=8", "data.num_test=40")


def test_other_data_is_normalised_as_in_training(espalier: Command, bundle: Path):
    run = predicted(espalier, bundle, *SAME_SHAPE, to="run")
    spec = read("source", bundle / "export").spec
    data = SyntheticImages(10, 1, 8, 8, 1024, 256, 40, noise=0.5, batch_size=40, augment={}, seed=0)
    x_BCHW = (data.splits.test.x.float() / 255 - spec.mean[0]) / spec.std[0]
    logits = onnx.Session(bundle / "export" / "model.onnx", threads=1)(x_BCHW)
    assert rows(run)["predicted"].to_pylist() == [str(label) for label in logits.argmax(1).tolist()]
    assert rows(run)["probability"].to_numpy() == pytest.approx(logits.softmax(1).amax(1).numpy(), abs=1e-4)


WRONG = {
    "no source": ([], "source=null"),
    "a run without a bundle": (["source=."], "espalier export"),
    "data of another shape": (["source=BUNDLE", "data=breast_cancer"], "breast_cancer"),
    "another network": (["source=BUNDLE", "model=cnn"], "model=cnn"),
    "shards without rows": (["source=BUNDLE", "task.shard_size=0"], "task.shard_size=0"),
    "a format that it lacks": (["source=BUNDLE", "task.runtime=torch_export"], "task.runtime=torch_export"),
}


@pytest.mark.parametrize(("words", "advice"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_wish_ends_in_one_line_and_leaves_nothing(espalier: Command, bundle: Path, words, advice: str):
    done = espalier("predict", *(word.replace("BUNDLE", str(bundle)) for word in words), *QUIET)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert advice in done.err
    assert not list(done.folder.glob("logs/*/*"))

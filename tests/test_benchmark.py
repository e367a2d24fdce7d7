"""Networks are timed beside each other in the runtimes that they ship in, and what cannot be timed is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import QUICK, Command, command
from espalier.errors import ConfigError
from espalier.export import onnx

FAST = ("task.rounds=2", "task.batches=[1,4]", "logger=[]")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A small network, the same in 8 bits, and one of other data."""
    folder = tmp_path_factory.mktemp("sources")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trained = command(["train", "model=cnn", "trainer.max_epochs=1", *QUICK], folder).run
        other = command(["train", "model=mlp", "data=diabetes", "trainer.max_epochs=1", *QUICK], folder).run
        small = command(["compress", f"source={trained}", "compression=[ptq]", *QUICK], folder).run
    return trained, small, other


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def by_name(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["name"].removesuffix(f", {row['runtime']}"), row["runtime"]): row for row in rows}


def test_two_runs_are_timed_in_two_runtimes_and_compared_with_the_first(
    espalier: Command, sources: tuple[Path, Path, Path]
):
    trained, small, _ = sources
    done = espalier("benchmark", f"source={trained},{small}", "task.runtimes=[eager,onnx]", "task.memory=false", *FAST)
    assert done.code == 0, done.err
    measured = report(done.run)
    rows = by_name(measured["rows"])
    assert list(rows) == [("fp32", "eager"), ("fp32", "onnx"), ("ptq", "eager"), ("ptq", "onnx")]
    for row in rows.values():
        assert list(row["latency_ms"]) == list(row["speedup"]) == list(row["samples_per_second"]) == ["1", "4"]
        assert all(0 < timed["p50"] <= timed["p95"] <= timed["p99"] for timed in row["latency_ms"].values())
        rate = row["samples_per_second"]["4"] * row["latency_ms"]["4"]["p50"] / 1000
        assert 1 < rate < 6  # samples per median call: 4, less what slow calls cost
    assert rows["fp32", "eager"]["speedup"] == {"1": 1, "4": 1}
    assert rows["ptq", "onnx"]["size_bytes"] < rows["fp32", "onnx"]["size_bytes"] / 3
    assert measured["notes"][0].startswith("measured on")
    assert (done.run / "figures" / "latency.png").stat().st_size > 10_000
    before = by_name(report(small)["rows"])  # what compress measured of the same networks
    for name in ("fp32", "ptq"):
        row, compressed = rows[name, "onnx"], before[name, "onnxruntime"]
        assert row["metrics"] == pytest.approx(compressed["metrics"], abs=1e-5)
        assert (row["params"], row["macs"], row["size_bytes"]) == tuple(
            compressed[key] for key in ("params", "macs", "size_bytes")
        )


def test_compiled_and_bf16_answer_as_eager_does(espalier: Command, sources: tuple[Path, Path, Path]):
    words = ("task.runtimes=[compiled,eager]", "task.precision=[bf16,fp32]", "task.threads=[1]", "task.memory=false")
    done = espalier("benchmark", f"source={sources[0]}", *words, "task.batches=[8]", "task.rounds=1", "logger=[]")
    assert done.code == 0, done.err
    rows = by_name(report(done.run)["rows"])
    eager = rows["fp32", "eager"]
    assert set(rows) == {(name, runtime) for name in ("fp32", "bf16") for runtime in ("eager", "compiled")}
    for row in rows.values():
        assert row["metrics"] == pytest.approx(eager["metrics"], abs=0.02)
    assert rows["bf16", "eager"]["size_bytes"] == pytest.approx(eager["size_bytes"] / 2, rel=0.01)


def test_each_number_of_threads_has_its_rows(espalier: Command, sources: tuple[Path, Path, Path]):
    words = ("task.runtimes=[onnx]", "task.threads=[1,2]", "task.memory=false", "task.score=false")
    done = espalier("benchmark", f"source={sources[0]}", *words, *FAST)
    assert done.code == 0, done.err
    rows = report(done.run)["rows"]
    assert [(row["name"], row["threads"], row["speedup"]["1"]) for row in rows] == [
        ("fp32, onnx, 1 threads", 1, 1),
        ("fp32, onnx, 2 threads", 2, 1),
    ]


def test_peak_memory_is_that_of_a_process_of_its_own(espalier: Command, sources: tuple[Path, Path, Path]):
    words = ("task.runtimes=[eager]", "task.score=false", "task.batches=[512]", "task.rounds=1", "logger=[]")
    done = espalier("benchmark", f"source={sources[0]}", *words)
    assert done.code == 0, done.err
    [row] = report(done.run)["rows"]
    activations = 512 * 4 * 1000  # each layer of the network holds thousands of numbers for a sample
    assert activations < row["peak_bytes"] < 2_000_000_000
    assert "metrics" not in row


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "source=null: benchmark needs the RUN"),
        (("source=nowhere",), "source=nowhere: no such run"),
        (("task.runtimes=[tensorrt]",), "task.runtimes"),
        (("task.runtimes=[]",), "task.runtimes=[]: nothing to measure"),
        (("task.batches=[]", "task.threads=[]"), "task.threads=[]: nothing to measure"),
        (("task.threads=[0]",), "task.threads"),
        (("task.batches=[0]",), "task.batches"),
        (("task.precision=[int8]",), "task.precision"),
        (
            ("task.runtimes=[onnx]", "task.precision=[bf16]"),
            "nothing to run; not run: fp32, onnx in bf16: the runtime lacks layers",
        ),
    ],
)
def test_what_cannot_be_timed_ends_in_one_line(
    espalier: Command, sources: tuple[Path, Path, Path], words: tuple[str, ...], reason: str
):
    source = () if not words or words[0].startswith("source") else (f"source={sources[0]}",)
    done = espalier("benchmark", *source, *words, "logger=[]")
    assert done.code == 2
    assert reason in done.err
    assert "Traceback" not in done.err


def test_runs_of_other_data_are_not_timed_beside_each_other(espalier: Command, sources: tuple[Path, Path, Path]):
    trained, _, other = sources
    done = espalier("benchmark", f"source={trained},{other}", "logger=[]")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "trained on diabetes" in done.err


def test_a_bundle_is_timed_in_the_formats_that_it_holds(espalier: Command, sources: tuple[Path, Path, Path]):
    assert espalier("export", f"source={sources[0]}", "logger=[]", "hydra.run.dir=shipped").code == 0
    words = ("task.runtimes=[eager,onnx]", "task.score=false", "task.memory=false")
    done = espalier("benchmark", f"source=shipped,{sources[0]}", *words, *FAST)
    assert done.code == 0, done.err
    measured = report(done.run)
    assert [row["runtime"] for row in measured["rows"]] == ["onnx", "eager", "onnx"]
    assert measured["rows"][0]["name"] == "fp32, shipped, onnx"
    assert measured["rows"][0]["size_bytes"] == measured["rows"][2]["size_bytes"]
    assert "not run: fp32, shipped, eager: the bundle holds onnx" in measured["notes"]


def test_what_a_precision_does_not_fit_is_left_out_and_said(espalier: Command, sources: tuple[Path, Path, Path]):
    trained, small, _ = sources
    words = ("task.runtimes=[eager]", "task.precision=[bf16]", "task.score=false", "task.memory=false")
    done = espalier("benchmark", f"source={trained},{small}", *words, *FAST)
    assert done.code == 0, done.err
    measured = report(done.run)
    assert [row["name"] for row in measured["rows"]] == ["bf16, eager"]
    assert "not run: ptq, eager in bf16: its numbers are integers" in measured["notes"]


def test_a_network_that_a_format_cannot_hold_is_left_out_and_said(
    espalier: Command, sources: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
):
    def write(*_: Any) -> None:
        raise ConfigError("task.format=onnx: no operator for this layer")

    monkeypatch.setattr(onnx, "write", write)
    words = (f"source={sources[0]}", "task.memory=false", "task.score=false", *FAST)
    done = espalier("benchmark", "task.runtimes=[onnx,eager]", *words)
    assert done.code == 0, done.err
    assert "not run: fp32, onnx: no operator for this layer" in report(done.run)["notes"]
    assert [row["runtime"] for row in report(done.run)["rows"]] == ["eager"]
    alone = espalier("benchmark", "task.runtimes=[onnx]", *words)
    assert (alone.code, alone.err.splitlines()[-1]) == (
        2,
        "espalier: not run: fp32, onnx: no operator for this layer",
    )

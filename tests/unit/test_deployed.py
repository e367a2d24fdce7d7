"""What is measured of exported networks, and what is said about it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from espalier.compression import masks
from espalier.compression.base import replay
from espalier.data.loaders import Batch
from espalier.export import conclusions, deployed, onnx
from espalier.learners.classifier import Classifier
from espalier.models.mlp import MLP
from espalier.spec import DataSpec, of_shape

SPEC = DataSpec.single("toy", (4,), 1.0, (0.0,) * 4, (1.0,) * 4, ("a", "b", "c"), (1, 1, 1))


def learner(model: nn.Module) -> Classifier:
    return Classifier(model, SPEC, None, None, 0, 0.0, None, False, False, None, None)  # type: ignore[arg-type]


def row(**latency_ms: float) -> dict[str, Any]:
    timed = {name.removeprefix("b"): {"p50": value} for name, value in latency_ms.items()}
    return {"name": "some", "metrics": {"test/accuracy": 0.9}, "latency_ms": timed}


def test_a_network_is_named_after_what_it_has_been_through():
    assert deployed.name_of([]) == "fp32"
    assert deployed.name_of([{"method": "low_rank"}, {"method": "qat"}]) == "low_rank+qat"


def test_the_exported_file_scores_what_a_count_by_hand_scores(tmp_path: Path):
    torch.manual_seed(0)
    model = MLP((4,), 3, [8], "relu", "none", 0.0)
    test = [Batch.single(torch.randn(5, 4), torch.randint(3, (5,)), torch.arange(5)) for _ in range(3)]
    artifact = deployed.export("fp32", model, [], of_shape((4,)), tmp_path / "deep" / "model.onnx")
    [measured] = deployed.measure([artifact], learner(model), test, batches=[1, 7], threads=1)
    correct = sum(int((model(batch.x).argmax(1) == batch.y).sum()) for batch in test)
    assert measured["metrics"]["test/accuracy"] == pytest.approx(correct / 15)
    assert (measured["params"], measured["macs"]) == (4 * 8 + 8 + 8 * 3 + 3, 4 * 8 + 8 * 3)
    assert measured["size_bytes"] == artifact.path.stat().st_size
    assert set(measured["latency_ms"]) == {"1", "7"}
    assert all(timed["p95"] >= timed["p50"] > 0 for timed in measured["latency_ms"].values())


def test_masks_count_as_zeros_and_are_gone_from_the_file(tmp_path: Path):
    model = MLP((4,), 3, [8], "relu", "none", 0.0)
    masks.attach(model, ["layers.linear1.weight"])
    model.layers.linear1.weight_mask[:4] = False
    with torch.no_grad():
        model.layers.linear1.weight.mul_(model.layers.linear1.weight_mask)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(1)
    history = [{"method": "prune_nm", "names": ["layers.linear1.weight"], "dense": []}]
    artifact = deployed.export("pruned", model, history, of_shape((4,)), tmp_path / "model.onnx")
    test = [Batch.single(torch.randn(2, 4), torch.zeros(2, dtype=torch.int64), torch.arange(2))]
    [measured] = deployed.measure([artifact], learner(model), test, batches=[1], threads=1)
    assert measured["params"] - measured["nonzero"] == 16
    assert "0.239 of all parameters are zero" in conclusions.zeros(measured, artifact)
    assert "weight_mask" in dict(model.layers.linear1.named_buffers()), "the trained network keeps its masks"


def test_a_dynamic_network_is_scored_sample_by_sample_so_that_no_sample_changes_another(tmp_path: Path):
    torch.manual_seed(0)
    model = MLP((4,), 3, [64], "relu", "none", 0.0)
    history = [{"method": "qat", "mode": "dynamic", "target": "onnxruntime", "skip": [], "input_shape": [4]}]
    artifact = deployed.export("qat", replay(model, history), history, of_shape((4,)), tmp_path / "model.onnx")
    session = onnx.Session(artifact.path, threads=1)
    x = torch.randn(1, 4)
    beside_a_giant = torch.cat([x, torch.full((1, 4), 1000.0)])
    alone = session(x)
    assert not torch.allclose(session(beside_a_giant)[:1], alone), "one range per call"
    assert torch.equal(deployed.predictor(artifact, session)(beside_a_giant)[:1], alone)


def test_ratios_say_how_many_times_smaller_and_faster():
    before = {"size_bytes": 800, "params": 100, "nonzero": 100, "macs": 90, **row(b1=3.0, b32=8.0)}
    after = {"size_bytes": 100, "params": 50, "nonzero": 25, "macs": 30, **row(b1=1.5, b32=16.0)}
    assert deployed.ratios(before, after) == {
        **{"size": 8.0, "params": 2.0, "nonzero": 4.0, "macs": 3.0},
        **{"latency_1": 2.0, "latency_32": 0.5},
    }


@pytest.mark.parametrize(("mode", "before", "after"), [("max", 0.95, 0.90), ("min", 0.90, 0.95)])
def test_a_drop_counts_in_the_direction_of_the_metric(mode, before: float, after: float):
    rows = [{"metrics": {"test/m": value}} for value in (before, after)]
    assert conclusions.drop(*rows, "test/m", mode, max_drop=0.06).endswith("0.0500 lost")
    assert conclusions.drop(*rows, "test/m", mode, max_drop=0.04).startswith("TOO MUCH LOST: test/m")
    assert conclusions.drop(*reversed(rows), "test/m", mode, max_drop=0.0).endswith("nothing lost")


def test_slower_is_said_for_each_row_and_batch_beyond_the_noise():
    lines = list(conclusions.slower([row(b1=1.0, b32=1.0)], row(b1=1.3, b32=1.04)))
    assert lines == ["SLOWER at batch 1: 1.30x the latency of some"]


def test_latency_of_a_wider_network_is_larger():
    narrow, wide = (MLP((64,), 10, [width], "relu", "none", 0.0).eval() for width in (8, 4096))
    assert deployed.latency_ms(narrow, of_shape((64,))) < deployed.latency_ms(wide, of_shape((64,)))

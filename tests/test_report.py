"""Finished runs side by side: the same numbers on the terminal, in Markdown and on the page."""

import json
from pathlib import Path

import pytest
import torch

from conftest import QUICK, Command, command
from unit.test_comparison import Page

NASTY = "a<script>b"
TRAIN = ("train", "model=mlp", "trainer.max_epochs=1", *QUICK)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two runs that differ in their seed alone, and one of another rate in a folder with an evil name."""
    folder = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in (0, 1):
            assert command([*TRAIN, f"seed={seed}", f"hydra.run.dir=seed{seed}"], folder).code == 0
        assert command([*TRAIN, "optimizer.lr=0.01", f"hydra.run.dir='{NASTY}'"], folder).code == 0
    return folder / "seed0", folder / "seed1", folder / NASTY


def accuracy(run: Path) -> float:
    return float(json.loads((run / "report.json").read_text())["rows"][0]["metrics"]["test/accuracy"])


def test_runs_are_put_side_by_side(espalier: Command, finished: tuple[Path, Path, Path]):
    done = espalier("report", f"source={','.join(map(str, finished))}", "logger=[]")
    assert done.code == 0, done.err
    first, second, third = (accuracy(run) for run in finished)
    stored = json.loads((done.run / "report.json").read_text())
    names = [row["name"] for row in stored["rows"]]
    assert names == ["MLP, seed0", "MLP, seed1", f"MLP, {NASTY}", "MLP: mean of seeds 0, 1"]
    assert stored["rows"][3]["metrics"]["test/accuracy"] == pytest.approx((first + second) / 2)
    markdown = (done.run / "report.md").read_text()
    html = (done.run / "report.html").read_text()
    for place, value in enumerate((first, second, third, (first + second) / 2)):
        [line] = [
            line for line in markdown.splitlines() if line.startswith(f"| {names[place]}".replace("<", "\\<")[:14])
        ]
        assert f" {value:.4f} |" in line
        assert f"{value:.4f}" in done.out
        assert f">{value:.4f}<" in html
    assert "| optimizer.lr | 0.003 | 0.003 | 0.01 |" in markdown
    text = Page(html).text
    assert all(name in text for name in ("seed0", "seed1", NASTY))
    assert "<script" not in html
    assert "://" not in html
    assert html.count("<img") == 1 + 3 * 2  # the front; curves and confusion of each run
    assert "Pareto front of test/accuracy against size" in text


def test_one_run_is_a_page_with_all_its_figures(espalier: Command, finished: tuple[Path, Path, Path]):
    done = espalier("report", f"source={finished[0]}", "logger=[]")
    assert done.code == 0, done.err
    html = (done.run / "report.html").read_text()
    assert html.count("<img") == 2
    assert "Differences" not in html
    assert "<details open>" in html


def test_the_front_is_that_of_the_metric_asked_for(espalier: Command, finished: tuple[Path, Path, Path]):
    source = f"source={finished[0]},{finished[1]}"
    done = espalier("report", source, "task.metric=test/loss", "logger=[]")
    assert "Pareto front of test/loss against size" in (done.run / "report.html").read_text()
    refused = espalier("report", source, "task.metric=test/wer", "logger=[]")
    assert refused.code == 2
    assert "task.metric=test/wer: none of these runs measured it; they have test/accuracy" in refused.err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "source=null: report needs finished RUNs"),
        (("source=nowhere",), "source=nowhere: no such run"),
        (("source=.",), "holds no report.json"),
        (("source=latest",), "source=latest: no finished run"),
        (("task.batch=0",), "task.batch"),
    ],
)
def test_what_is_no_finished_run_ends_in_one_line(espalier: Command, words: tuple[str, ...], reason: str):
    done = espalier("report", *words, "logger=[]")
    assert done.code == 2
    assert reason in done.err
    assert "Traceback" not in done.err


def test_a_damaged_report_ends_in_one_line(espalier: Command, tmp_path: Path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "report.json").write_text('{"schema": 2}')
    done = espalier("report", "source=broken", "logger=[]")
    assert done.code == 2
    assert "a report of schema 2; this espalier reads schema 1" in done.err
    assert done.err.count("\n") == 1

"""Finished runs side by side: the same numbers on the terminal, in Markdown and on the page."""

import base64
import json
import os
from pathlib import Path

import pytest
import torch

from conftest import QUICK, Command, command
from espalier.composition import build
from espalier.errors import CONTROL
from espalier.reporting import pareto
from unit.test_comparison import Page, row, stored

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
    assert html.count("<img") == 2 + 3 * 2  # the front, the validations; curves and confusion of each run
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


def test_a_report_builds_no_part_of_a_run(
    espalier: Command, finished: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
):
    built = []
    whole = build.part
    monkeypatch.setattr(build, "part", lambda key, *args, **kwargs: built.append(key) or whole(key, *args, **kwargs))
    words = ("data=hub_images", "data.path=/nonexistent", "logger=[csv]")
    done = espalier("report", f"source={finished[0]},{finished[1]}", *words)
    assert done.code == 0, done.err
    assert built == ["logger.csv"]


def test_a_report_shows_nothing_that_a_link_leads_to(espalier: Command, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"what nobody else may read")
    run = stored(tmp_path / "run", [row("fine", 0.9)])
    (run / "figures").mkdir()
    (run / "figures" / "own.png").write_bytes(b"own")
    (run / "figures" / "zz.png").symlink_to(secret)
    os.mkfifo(run / "figures" / "pipe.png")  # would be waited for
    linked = stored(tmp_path / "linked", [row("fine", 0.9)])
    (linked / "figures").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "private.png").write_bytes(secret.read_bytes())
    done = espalier("report", "source=run,linked", "logger=[]")
    assert done.code == 0, done.err
    html = (done.run / "report.html").read_text()
    assert html.count("<img") == 1 + 1  # the front, and the figure that is a file of the run
    assert base64.b64encode(secret.read_bytes()).decode() not in html
    for name in ("run: figures/zz.png", "run: figures/pipe.png", "linked: figures"):
        assert f"{name} is a link or no file, so it is left out" in done.out.replace("\n", " ")


@pytest.mark.parametrize("name", ["report.json", "config.yaml", "provenance.json"])
def test_a_file_of_a_run_that_is_a_link_is_refused(espalier: Command, tmp_path: Path, name: str):
    run = stored(tmp_path / "run", [row("fine", 0.9)])
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to("/etc/passwd")
    done = espalier("report", "source=run", "logger=[]")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert f"{name}: a link, and report follows none" in done.err
    assert "root:" not in done.out + done.err


def test_no_word_of_a_stranger_reaches_a_terminal_as_a_command(espalier: Command, tmp_path: Path):
    evil = "a\x1b]0;title\x07b\x9bc\rd\u202ee\nf\ud800"
    folder = tmp_path / "evil\x1b[2Jname"
    rows = [row(evil, 0.9) | {evil: evil, "runtime": evil, "metrics": {f"test/{evil}": 0.5}}]
    stored(folder, rows, **{"evil": "value\x1b[1m"})
    stored(tmp_path / "other", [row("fine", 0.8)])
    file = folder / "report.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"notes": [evil], "source": evil, "task": evil, "run": evil}))
    (folder / "provenance.json").write_text(json.dumps({"command": [evil], "hardware": {"cpu": evil}}))
    done = espalier("report", f"source={folder},other", "logger=[]")
    assert done.code == 0, done.err
    texts = [done.out, *((done.run / name).read_text() for name in ("report.md", "report.html", "report.json"))]
    for text in texts:
        assert "title" in text
        assert CONTROL.search(text) is None
    assert "a?]0;title?b?c?d?e f?" in texts[-1]


def test_dollars_in_a_name_are_no_formula(tmp_path: Path):
    points = pareto.points([row("$\\frac$ of $5", 0.9, 2), row("a_b^c", 0.8, 1)], "test/accuracy", "1")
    pareto.pareto(points, "test/accuracy", "1", tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").is_file()

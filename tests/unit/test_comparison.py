"""Runs beside each other: the front, differences, seeds, and files that are not what they say."""

import json
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from espalier.errors import ConfigError
from espalier.profiling import memory
from espalier.reporting import comparison, figures, page, pareto, report
from espalier.reporting.pareto import Point
from espalier.spec import Report, of_shape

NASTY = '<script>alert("1")</script> | **bold** `tick`'
MB = 1_000_000


def row(name: str, accuracy: float, ms: float | None = None, size_bytes: int = 1000, **more: Any) -> dict[str, Any]:
    timed = {"latency_ms": {"1": {"p50": ms, "p95": 2 * ms}}} if ms is not None else {}
    return {
        "name": name,
        "runtime": "onnx",
        "metrics": {"test/loss": 1 - accuracy, "test/accuracy": accuracy},
        "size_bytes": size_bytes,
        **timed,
        **more,
    }


def stored(folder: Path, rows: list[dict[str, Any]], *, task: str = "train", seed: int = 0, **config: Any) -> Path:
    folder.mkdir(parents=True)
    report.write(Report(task, str(folder), None, seed, rows), folder)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed, **config}))
    return folder


# --- the front ----------------------------------------------------------------------------------------------------


def test_the_front_of_five_points_is_the_one_on_paper():
    #        error, ms:  a best error  b beaten by c  c            d beaten by a  e cheapest
    points = [(0.01, 9.0), (0.05, 6.0), (0.04, 5.0), (0.01, 9.5), (0.30, 1.0)]
    assert pareto.front(points) == [0, 2, 4]


def test_equal_points_stay_on_the_front_together():
    assert pareto.front([(1.0, 1.0), (1.0, 1.0), (2.0, 2.0)]) == [0, 1]


def test_the_front_is_named_in_words_cheapest_first():
    rows = [row("big", 0.99, 9, 9000), row("beaten", 0.95, 6, 9000), row("small", 0.96, 5, 4000)]
    points = pareto.points(rows, "test/accuracy", "1")
    assert list(pareto.verdicts(points, "test/accuracy", "1")) == [
        "Pareto front of test/accuracy against milliseconds at batch 1, cheapest first (2 of 3): small; big",
        "Pareto front of test/accuracy against size, cheapest first (2 of 3): small; big",
    ]


def test_less_of_an_error_is_better():
    rows = [row("exact", 0.9, 2), row("rough", 0.5, 3)]
    points = pareto.points(rows, "test/loss", "1")
    [in_time, _] = pareto.verdicts(points, "test/loss", "1")
    assert in_time.endswith("(1 of 2): exact")


def test_runs_without_latency_have_a_front_over_size_alone(tmp_path: Path):
    points = pareto.points([row("a", 0.9, size_bytes=10 * MB), row("b", 0.8, size_bytes=MB)], "test/accuracy", None)
    [line] = pareto.verdicts(points, "test/accuracy", None)
    assert "against size" in line
    pareto.pareto(points, "test/accuracy", None, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_a_metric_that_is_no_number_is_on_no_front():
    rows = [row("fine", 0.9, 2), row("diverged", 0.9, 1)]
    rows[1]["metrics"]["test/accuracy"] = None
    assert pareto.points(rows, "test/accuracy", "1") == [Point("fine", 0.9, 0.9, 2, 1000)]


# --- side by side -------------------------------------------------------------------------------------------------


def test_only_keys_that_differ_are_listed(tmp_path: Path):
    same = {"model": {"depth": 8}, "data": {"_target_": "espalier.data.digits.Digits"}}
    a = stored(tmp_path / "a", [row("n", 0.9)], optimizer={"lr": 0.001, "betas": [0.9, 0.99]}, **same)
    b = stored(tmp_path / "b", [row("n", 0.9)], optimizer={"lr": 0.01, "betas": [0.9, 0.99], "foreach": True}, **same)
    entries = comparison.read("source", [a, b])
    assert comparison.differences(entries) == {
        "": ["optimizer.lr", "optimizer.foreach"],
        "a": ["0.001", "-"],
        "b": ["0.01", "true"],
    }


def test_equal_runs_have_no_differences(tmp_path: Path):
    folders = [stored(tmp_path / name, [row("n", 0.9)], optimizer={"lr": 0.1}) for name in "ab"]
    assert comparison.differences(comparison.read("source", folders)) == {}


def test_rows_of_the_same_name_are_told_apart_by_their_run(tmp_path: Path):
    a = stored(tmp_path / "train" / "2026-01-02_03-04-05_abc123", [row("fp32", 0.9), row("ptq", 0.8)])
    b = stored(tmp_path / "mine", [row("fp32", 0.9)])
    entries = comparison.read("source", [a, b])
    assert [entry.name for entry in entries] == ["train abc123", "mine"]
    assert [each["name"] for each in comparison.rows(entries)] == ["fp32, train abc123", "ptq", "fp32, mine"]


def test_a_trial_is_named_after_its_sweep():
    assert comparison.name_of(Path("logs/sweep/2026-01-02_03-04-05_abc123/7")) == "sweep abc123/7"


def test_runs_that_differ_in_their_seed_alone_get_a_row_of_means(tmp_path: Path):
    folders = [
        stored(tmp_path / str(seed), [row("net", accuracy, params=7)], seed=seed, optimizer={"lr": lr})
        for seed, accuracy, lr in [(0, 0.90, 0.1), (1, 0.92, 0.1), (2, 0.97, 0.1), (3, 0.5, 0.2)]
    ]
    [mean], [line] = comparison.means(comparison.read("source", folders))
    assert mean["name"] == "net: mean of seeds 0, 1, 2"
    assert mean["metrics"]["test/accuracy"] == pytest.approx(0.93)
    assert mean["params"] == 7
    assert "test/accuracy 0.9300 (0.9000 to 0.9700)" in line


def test_the_same_seed_twice_is_no_group(tmp_path: Path):
    folders = [stored(tmp_path / name, [row("net", 0.9)], seed=1) for name in "ab"]
    assert comparison.means(comparison.read("source", folders)) == ([], [])


def test_other_data_is_said_and_not_refused(tmp_path: Path):
    sets = {"a": "espalier.data.digits.Digits", "b": "espalier.data.diabetes.Diabetes"}
    folders = [stored(tmp_path / name, [row("n", 0.9)], data={"_target_": target}) for name, target in sets.items()]
    [line] = comparison.cautions(comparison.read("source", folders))
    assert line.startswith("DIFFERENT DATA (Diabetes, Digits)")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"schema": 2}', "a report of schema 2; this espalier reads schema 1"),
        ("{", "damaged, no JSON"),
        ("[" * 100_000, "damaged, no JSON"),
        ("[1]", "not a report"),
        ("null", "not a report"),
        ('{"task": "train"}', "not a report"),
        (json.dumps({"task": "t", "run": "r", "source": None, "seed": 0, "rows": []}), "without rows"),
        (json.dumps({"task": "t", "run": "r", "source": None, "seed": 0, "rows": [{"metrics": {}}]}), "not a report"),
        (
            json.dumps({"task": "t", "run": "r", "source": None, "seed": 0, "rows": [{"name": "n", "metrics": [1]}]}),
            "not a report",
        ),
        (
            json.dumps(
                {"task": "t", "run": "r", "source": None, "seed": 0, "rows": [{"name": "n", "latency_ms": {"1": "x"}}]}
            ),
            "not a report",
        ),
    ],
)
def test_a_file_that_is_no_report_ends_in_one_line(tmp_path: Path, text: str, reason: str):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ConfigError) as refused:
        comparison.read("source", [tmp_path])
    assert reason in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_folder_without_a_report_and_a_folder_named_twice_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"holds no report\.json"):
        comparison.read("source", [tmp_path])
    done = stored(tmp_path / "a", [row("n", 0.9)])
    with pytest.raises(ConfigError, match="named twice"):
        comparison.read("source", [done, done])


# --- the page -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, their attributes and the text between them; refuses tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def written(tmp_path: Path) -> tuple[str, str]:
    """Page and Markdown of a run with a name that means to do harm."""
    folder = stored(tmp_path / "run", [row(NASTY, 0.9, 1.5, 2000)], optimizer={"name": NASTY})
    other = stored(tmp_path / "plain", [row("plain net", 0.8)], optimizer={"name": "adam"})
    entries = comparison.read("source", [folder, other])
    points = pareto.points(comparison.rows(entries), "test/accuracy", "1")
    pareto.pareto(points, "test/accuracy", "1", tmp_path / "figures" / "pareto.png")
    done = Report("report", str(tmp_path), None, 0, comparison.rows(entries), notes=[NASTY])
    metrics, costs = report.columns_of(done)
    tables = {**metrics, **costs}, comparison.differences(entries)
    return (
        page.html("run, plain", entries, *tables, done, tmp_path / "figures"),
        page.markdown("run, plain", entries, *tables, done),
    )


def test_the_page_is_whole_and_asks_for_nothing_from_elsewhere(tmp_path: Path):
    html, _ = written(tmp_path)
    parsed = Page(html)
    addresses = [value for name, value in parsed.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert len(addresses) == 1  # the picture
    assert addresses[0].startswith("data:image/png;base64,")
    assert "://" not in html
    assert "url(" not in html
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)


def test_a_name_out_of_a_file_is_shown_as_text_on_the_page(tmp_path: Path):
    html, _ = written(tmp_path)
    assert "<script" not in html
    assert Page(html).text.count(NASTY) == 3  # a row, a value of the configuration, a remark
    assert "plain net" in html


def test_a_name_out_of_a_file_is_shown_as_text_in_markdown(tmp_path: Path):
    _, markdown = written(tmp_path)
    assert "<script" not in markdown.replace("\\<", "")
    table = [line.replace("\\|", "") for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table[:4]}) == 1  # a pipe in a name opens no column


# --- memory -------------------------------------------------------------------------------------------------------


def linear(width: int) -> memory.Prepare:
    layer = partial(torch.nn.Linear, width, width, bias=False)
    return partial(memory.on_example, layer, of_shape((abs(width),)), 1, torch.device("cpu"))


def test_the_peak_of_a_process_is_what_was_loaded_in_it():
    peak = memory.peak_bytes(linear(4000), threads=1)
    assert 0.99 < peak / (4000 * 4000 * 4) < 1.15


def test_a_process_that_ends_early_leaves_its_last_words():
    with pytest.raises(RuntimeError, match="negative dimension"):
        memory.peak_bytes(linear(-4), threads=1)


def test_tensors_that_share_memory_count_once():
    layer = torch.nn.Linear(10, 10, bias=False)
    tied = torch.nn.Sequential(layer, torch.nn.Linear(10, 10, bias=False))
    assert memory.tensor_bytes(tied) == 2 * 400
    tied[1].weight = layer.weight
    assert memory.tensor_bytes(tied) == 400


def test_a_choice_is_shown_as_a_word_and_the_knobs_of_one_choice_alone_are_left_out(tmp_path: Path):
    mlp = {"_target_": "espalier.models.mlp.MLP", "hidden": [16], "dropout": 0.1}
    resnet = {"_target_": "espalier.models.resnet.ResNet", "depth": 8, "dropout": 0.2}
    folders = [stored(tmp_path / name, [row("n", 0.9)], model=model) for name, model in (("a", mlp), ("b", resnet))]
    found = comparison.differences(comparison.read("source", folders))
    assert found == {"": ["model", "model.dropout"], "a": ["MLP", "0.1"], "b": ["ResNet", "0.2"]}


def test_validations_are_drawn_over_each_other_and_a_damaged_file_or_a_link_is_left_out(tmp_path: Path):
    folders = [stored(tmp_path / name, [row("n", 0.9)]) for name in ("a", "b", "damaged", "linked")]
    for folder in folders[:2]:
        (folder / "metrics.csv").write_text("step,epoch,val/loss\n1,0,0.5\n2,1,0.25\n")
    (folders[2] / "metrics.csv").write_text("step,epoch,val/loss\n1,nine,0.5\n")
    (folders[3] / "metrics.csv").symlink_to(folders[0] / "metrics.csv")
    logs = comparison.logs(comparison.read("source", folders))
    assert list(logs) == ["a", "b", "damaged"]
    assert figures.learning(logs, tmp_path / "learning.png")
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")
    assert not figures.learning({"a": logs["a"], "damaged": logs["damaged"]}, tmp_path / "none.png")

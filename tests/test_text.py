"""Texts through the tasks: trained, resumed, evaluated, compressed, exported and refused where they do not fit."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import QUICK, Command, command
from espalier.data import tokens
from espalier.runs import checkpoint
from espalier.spec import Input
from helpers import texts

WORDS = ("data=text", "model.width=16", "model.channels=16", "trainer.max_epochs=4", "optimizer.lr=0.01", *QUICK)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of texts, a run that was trained on it, and its bundle."""
    folder = tmp_path_factory.mktemp("texts")
    texts.write(folder / "texts.csv", 400)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in (
            ("train", *WORDS, f"data.path={folder / 'texts.csv'}", "hydra.run.dir=run"),
            ("export", "source=run", "task.format=[onnx,torch_export]", "hydra.run.dir=exported"),
        ):
            assert command(line, folder).code == 0
    return folder


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_a_text_network_learns_what_the_words_say(work: Path):
    assert report(work / "run")["rows"][0]["metrics"]["test/accuracy"] > 0.9


def test_a_training_in_two_parts_is_that_in_one(work: Path, espalier: Command, tmp_path: Path):
    words = (*WORDS, f"data.path={work / 'texts.csv'}", "scheduler=constant", "trainer.max_epochs=2")
    assert espalier("train", *words, "hydra.run.dir=whole").code == 0
    assert espalier("train", *words, "trainer.max_epochs=1", "hydra.run.dir=parts").code == 0
    assert espalier("train", "resume=parts", "trainer.max_epochs=2").code == 0
    whole, parts = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "parts"))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name


def test_a_run_does_not_go_on_with_other_texts(espalier: Command, tmp_path: Path):
    file = texts.write(tmp_path / "texts.csv", 100)
    assert espalier("train", *WORDS, f"data.path={file}", "trainer.max_epochs=1", "hydra.run.dir=run").code == 0
    file.write_text(file.read_text().replace("film", "book"))
    done = espalier("train", "resume=run", "trainer.max_epochs=2")
    assert done.code == 2
    assert "its 64 training samples are not those that it began with" in done.err


def test_the_vocabulary_of_the_run_reads_texts_of_another_file(work: Path, espalier: Command, tmp_path: Path):
    texts.write(tmp_path / "others.csv", 60, seed=1)
    lines = (tmp_path / "others.csv").read_text().replace("film", "unheard of").splitlines()
    (tmp_path / "others.csv").write_text("\n".join(lines) + "\n")
    assert espalier("evaluate", f"source={work / 'run'}", "data.path=others.csv", "hydra.run.dir=seen").code == 0
    assert report(tmp_path / "seen")["rows"][0]["metrics"]["test/accuracy"] > 0.8


def test_a_class_that_the_network_does_not_know_costs_one_line(work: Path, espalier: Command, tmp_path: Path):
    (tmp_path / "others.csv").write_text("text,label\n" + "a film,strange\n" * 30)
    done = espalier("evaluate", f"source={work / 'run'}", "data.path=others.csv")
    assert done.code == 2
    assert done.err.splitlines() == [
        "espalier: data.target=label: 'strange' is none of the classes of the network, bad, good"
    ]


def test_the_exported_file_takes_any_number_of_texts_of_any_length_and_ignores_padding(work: Path):
    import onnxruntime

    stored = checkpoint.load("source", work / "run" / "checkpoints" / "best.ckpt")
    entry = stored.spec.input
    session = onnxruntime.InferenceSession(work / "exported" / "export" / "model.onnx")
    encode = tokens.Encoder(entry, 500)
    rows = [encode(" ".join(["great film the story"] * num)) for num in (1, 3, 120)]
    together = session.run(None, {"tokens": tokens.padded(rows)})[0]
    alone = np.concatenate([session.run(None, {"tokens": row[None]})[0] for row in rows])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("method", ["ptq", "prune_channels"])
def test_a_text_network_is_compressed_and_measured_as_exported(
    work: Path, espalier: Command, tmp_path: Path, method: str
):
    words = (f"compression=[{method}]", "trainer.max_epochs=1", "task.batches=[1]", *QUICK, "hydra.run.dir=small")
    assert espalier("compress", f"source={work / 'run'}", *words).code == 0
    before, *_, after = report(tmp_path / "small")["rows"]
    assert after["metrics"]["test/accuracy"] > 0.8
    assert after["size_bytes"] < before["size_bytes"]


def test_predictions_of_a_bundle_are_those_of_the_run(work: Path, espalier: Command, tmp_path: Path):
    bundle = work / "exported" / "export"
    assert espalier("evaluate", f"source={work / 'run'}", "task.predictions=csv", "hydra.run.dir=run").code == 0
    assert espalier("evaluate", f"source={bundle}", "task.predictions=csv", "hydra.run.dir=file").code == 0
    found = [list(csv.DictReader((tmp_path / name / "predictions.csv").open())) for name in ("run", "file")]
    assert [row["predicted"] for row in found[0]] == [row["predicted"] for row in found[1]]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("explain", "source=RUN"), "explain makes maps of images and tables alone"),
        (("evaluate", "source=RUN", "task.robustness=[noise]"), "holds tokens, which cannot be harmed so"),
        (("train", "data=text", "data.path=FILE", "model=cnn"), "CNN takes one tensor of numbers"),
        (("train", "model=text_cnn"), "text_cnn reads tokens, and a sample is image"),
        (("train", "data=text", "data.path=FILE", "data.text=txet"), "no such column; did you mean text"),
        (("train", "data=text", "data.path=FILE", "data.task=number"), "'good' is no number; data.task=class"),
        (("train", "data=text", "data.path=FILE", "learner=regressor"), "has classes as targets, not numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_does_not_fit_texts_costs_one_line(work: Path, espalier: Command, words: tuple[str, ...], told: str):
    given = [word.replace("RUN", str(work / "run")).replace("FILE", str(work / "texts.csv")) for word in words]
    done = espalier(*given)
    assert done.code == 2
    [line] = [line for line in done.err.splitlines() if line.startswith("espalier: ")]
    assert told in line


def test_numbers_are_learnt_from_texts(espalier: Command, tmp_path: Path):
    rows = [f"{'good ' * (number % 5)}film,{number % 5 + 0.5}" for number in range(300)]
    (tmp_path / "stars.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    words = ("data=text", "data.path=stars.csv", "learner=regressor", "model=transformer", "model.width=16")
    assert (
        espalier("train", *words, "trainer.max_epochs=12", "optimizer.lr=0.01", *QUICK, "hydra.run.dir=run").code == 0
    )
    assert report(tmp_path / "run")["rows"][0]["metrics"]["test/r2"] > 0.8


@pytest.mark.parametrize(
    ("cut", "text", "expected"),
    [
        ("words", "Don't STOP, Zoë!", ["don", "'", "t", "stop", ",", "zoë", "!"]),
        ("characters", "Ab c", ["A", "b", " ", "c"]),
        ("bytes", "é", ["c3", "a9"]),
    ],
)
def test_a_text_is_cut_into_tokens(cut: str, text: str, expected: list[str]):
    assert tokens.pieces(text, cut) == expected  # type: ignore[arg-type]


def test_ids_begin_after_padding_and_unknown_and_end_at_the_longest():
    entry = Input("tokens", "tokens", ("T",), vocabulary=("the", "film"))
    encode = tokens.Encoder(entry, 3)
    assert encode("The film unseen the").tolist() == [2, 3, 1]
    assert encode("").tolist() == [1]
    assert tokens.joined([tokens.padded([encode("the")]), tokens.padded([encode("film the film")])]).tolist() == [
        [2, 0, 0],
        [3, 2, 3],
    ]


def test_the_vocabulary_is_the_most_frequent_pieces_in_an_order_that_does_not_depend_on_the_texts_order():
    texts_ = ["b b a a c", "c d"]
    assert tokens.vocabulary(texts_, "words", 2) == tokens.vocabulary(texts_[::-1], "words", 2) == ("a", "b")
    assert "d" not in tokens.vocabulary(texts_, "words", 9)
    assert len(tokens.vocabulary([], "bytes", 5)) == 256

"""The Python interface answers as the command and the server do, and leaves the process as it found it."""

import asyncio
import logging
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_diabetes, load_digits

import espalier as package
from conftest import QUICK, command, launch_anew
from espalier.api.loading import Loaded
from espalier.runs.run_folder import RunFolder
from helpers import texts

WORDS = ("model=mlp", "trainer.max_epochs=1", *QUICK)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained classifier, its bundle, and a trained regressor."""
    folder = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (
            ("train", *WORDS, "hydra.run.dir=digits"),
            ("export", "source=digits", "hydra.run.dir=exported"),
            ("train", *WORDS, "data=diabetes", "learner=regressor", "hydra.run.dir=diabetes"),
        ):
            assert command(words, folder).code == 0
    return folder


@pytest.fixture(scope="module")
def digits(work: Path) -> Loaded:
    return package.load(work / "digits")


@pytest.fixture(scope="module")
def raw() -> np.ndarray:
    pixels, _ = load_digits(return_X_y=True)
    return pixels.reshape(-1, 1, 8, 8)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained network of texts and its bundle."""
    folder = tmp_path_factory.mktemp("reviews")
    texts.write(folder / "films.csv")
    model = ("model.width=8", "model.channels=8", "optimizer.lr=0.03")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (
            ("train", "data=text", "data.path=films.csv", *model, *WORDS[1:], "hydra.run.dir=films"),
            ("export", "source=films", "hydra.run.dir=."),
        ):
            assert command(words, folder).code == 0
    return folder


def test_texts_are_answered_alike_by_run_and_bundle_one_or_many(reviews: Path):
    run, bundle = package.load(reviews / "films"), package.load(reviews / "export")
    given = ["a fine story", "Dull; and awful, and grey.", ""]
    found = run.predict(given)
    assert found.probabilities.shape == (3, 2)
    for same in (bundle.predict(given), bundle.predict(np.array(given)), run.predict(tuple(given))):
        np.testing.assert_allclose(same.probabilities, found.probabilities, atol=1e-5)
    alone = run.predict(given[0])
    np.testing.assert_allclose(alone.probabilities, found.probabilities[:1], atol=1e-5)
    assert alone.labels == found.labels[:1]


def test_a_bundle_answers_texts_in_a_process_without_torch_and_without_the_package(reviews: Path):
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    [script] = [text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnxruntime" in text]
    assert len([line for line in script.splitlines() if line.strip()]) <= 15
    given = re.findall(r'"([^"]+)"', re.search(r"for text in \[(.*)\]\]", script)[1])
    unwanted = "print([name for name in ('torch', 'espalier', 'lightning') if name in sys.modules])"
    (reviews / "answer.py").write_text(f"import sys\n{script}{unwanted}\n")
    done = launch_anew(reviews, "answer", PYTHONPATH=str(reviews))
    assert done.stdout.splitlines() == [str(package.load(reviews / "films").predict(given).labels), "[]"], done.stderr


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (3, "takes a text or a list of texts; a int is not that"),
        (Path("films.csv"), "takes a text or a list of texts; a PosixPath is not that"),
        ([], "there is no sample; give at least one"),
        (["fine", None], "this network takes texts; sample 1 is a NoneType"),
        (np.zeros((2, 3)), "this network takes texts; sample 0 is a list"),
    ],
)
def test_what_is_no_text_costs_one_line(reviews: Path, given: object, told: str):
    for path in ("films", "export"):
        with pytest.raises(package.ConfigError, match=told) as refused:
            package.load(reviews / path).predict(given)  # type: ignore[arg-type]
        assert len(str(refused.value).splitlines()) == 1


def test_answers_of_a_run_are_the_softmax_of_its_network(digits: Loaded, raw: np.ndarray):
    found = digits.predict(raw)
    x = (torch.from_numpy(raw).float() / 16 - digits.spec.mean[0]) / digits.spec.std[0]
    with torch.no_grad():
        expected = digits.model(x).softmax(dim=1)
    np.testing.assert_allclose(found.probabilities, expected.numpy(), atol=1e-6)
    assert found.labels == [str(place) for place in expected.argmax(dim=1).tolist()]
    assert len(found) == 1797
    assert not digits.model.training


def test_the_test_accuracy_of_the_report_is_that_of_the_answers(work: Path, digits: Loaded):
    from espalier.config import compose
    from espalier.data.digits import Digits

    cfg = compose.compose(["data=digits"])
    test = Digits(int(cfg.data.batch_size), {}, 0).splits.test
    found = digits.predict(test.x.numpy())
    accuracy = np.mean([int(label) == y for label, y in zip(found.labels, test.y.tolist(), strict=True)])
    assert digits.metrics["test/accuracy"] == pytest.approx(accuracy)


def test_a_bundle_answers_as_its_run_and_needs_no_torch(work: Path, digits: Loaded, raw: np.ndarray):
    np.save(work / "raw.npy", raw[:300])
    program = work / "without_torch.py"
    program.write_text(
        "import sys, espalier, numpy\n"
        "found = espalier.load('exported').predict(numpy.load('raw.npy'))\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules\n"
        "numpy.save('answers.npy', found.probabilities)\n"
    )
    done = launch_anew(work, "without_torch", PYTHONPATH=str(work))  # a copy of the fork server has torch already
    assert (done.returncode, done.stderr) == (0, "")
    np.testing.assert_allclose(np.load(work / "answers.npy"), digits.predict(raw[:300]).probabilities, atol=1e-5)


def test_a_bundle_says_that_it_holds_no_torch_module(work: Path):
    bundle = package.load(work / "exported" / "export")
    assert bundle.spec.class_names == tuple("0123456789")
    assert bundle.config["model"]["hidden"] == [256, 128]
    assert bundle.metrics["same label"] == 1.0
    with pytest.raises(package.ConfigError, match="a bundle holds no torch module; load the RUN"):
        _ = bundle.model


def test_a_sample_is_the_same_as_array_tensor_picture_or_file(tmp_path: Path, digits: Loaded, raw: np.ndarray):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    picture, file = Image.fromarray(grey), tmp_path / "grey.png"
    picture.save(file)
    array = grey[None].astype(np.float32) * (16 / 255)
    for same in (array, array[None], torch.from_numpy(array), array.tolist(), picture, [picture], file, [str(file)]):
        found = digits.predict(same)
        assert found.probabilities.shape == (1, 10)
        np.testing.assert_allclose(found.probabilities, digits.predict(array).probabilities, atol=1e-6)


@pytest.mark.parametrize("header", ["", "age,sex,bmi,bp,s1,s2,s3,s4,s5,s6\n"])
def test_rows_of_a_csv_file_give_values_in_the_unit_of_the_target(work: Path, tmp_path: Path, header: str):
    table = load_diabetes(scaled=False)
    file = tmp_path / "patients.csv"
    file.write_text(header + "".join(",".join(map(str, row)) + "\n" for row in table.data[:5]))
    run = package.load(work / "diabetes")
    found = run.predict(file)
    assert (found.labels, found.probabilities.shape, found.values.shape) == ([], (5, 0), (5,))
    np.testing.assert_allclose(found.values, run.predict(table.data[:5]).values, rtol=1e-5)
    x = (torch.from_numpy(table.data[:5]).float() - torch.tensor(run.spec.mean)) / torch.tensor(run.spec.std)
    with torch.no_grad():
        expected = run.model(x)[:, 0] * run.spec.target_std + run.spec.target_mean
    np.testing.assert_allclose(found.values, expected.numpy(), rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (np.zeros((8, 8)), r"predict: an array of shape \(8, 8\), but this network takes numbers of shape \(1, 8, 8\)"),
        (np.zeros((0, 1, 8, 8)), "there is no sample"),
        (np.full((1, 8, 8), np.nan), "sample 0 holds a number that is not finite"),
        (np.full((1, 8, 8), 1e300), "sample 0 holds a number that is not finite in 32 bits"),
        ([[1, 2], [3]], "a list is not that"),
        (np.array(["a"]), "an array of <U1 is not that"),
        ("missing.png", "missing.png: no such file"),
        (["missing.png", 3], "a list of pictures or paths that holds a int as well"),
        (".", "a folder; list its files"),
        (__file__, "test_api.py: no picture of"),
    ],
)
def test_what_cannot_be_a_sample_costs_one_line(digits: Loaded, given: object, told: str):
    with pytest.raises(package.ConfigError, match=told) as refused:
        digits.predict(given)  # type: ignore[arg-type]
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1,2\n", r"shape \(1, 2\), but this network takes numbers of shape \(10,\) or \(N, 10\)"),
        ("1,2\n1,x\n", "line 2: 'x' is no number"),
        ("1,2\n\n1\n", "line 3: 1 cells, where the first row has 2"),
        ("1,\n2,3\n", "line 1: '' is no number"),
        ("", r"shape \(0, 0\)"),
    ],
)
def test_a_csv_file_that_does_not_fit_costs_one_line(work: Path, tmp_path: Path, text: str, told: str):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(package.ConfigError, match=told):
        package.load(work / "diabetes").predict(tmp_path / "rows.csv")


def test_pictures_are_refused_by_a_network_of_numbers(work: Path):
    run = package.load(work / "diabetes")
    with pytest.raises(package.ConfigError, match=r"takes numbers of shape \(10,\) or \(N, 10\), not pictures"):
        run.predict(Image.new("L", (8, 8)))
    with pytest.raises(package.ConfigError, match=r"give an array, or a file NAME\.csv"):
        run.predict(__file__)


def test_metrics_are_those_of_the_checkpoint_that_the_report_measured(work: Path, digits: Loaded):
    folder = RunFolder(work / "digits")
    assert package.load(folder.checkpoints / "best.ckpt").metrics == digits.metrics != {}
    other = Path(shutil.copy(folder.last, folder.checkpoints / "other.ckpt"))
    assert package.load(other).metrics == {}


def test_what_is_no_run_costs_one_line(tmp_path: Path):
    with pytest.raises(package.ConfigError, match="no such run folder"):
        package.load(tmp_path / "nowhere")
    with pytest.raises(package.ConfigError, match="holds no checkpoint"):
        package.load(tmp_path)


def test_a_checkpoint_is_not_read_where_torch_would_run_its_code(work: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(package.ConfigError, match="makes torch run code out of checkpoints"):
        package.load(work / "digits")


def state_of_process() -> tuple[object, ...]:
    root = logging.getLogger()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return handlers, list(root.handlers), root.level, list(sys.argv), os.environ.get("HYDRA_FULL_ERROR")


def test_training_inside_of_an_event_loop_is_the_command_and_leaves_no_trace(
    work: Path, digits: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)

    async def cell() -> Loaded:
        return package.train(*WORDS)

    before = state_of_process()
    run = asyncio.run(cell())
    assert state_of_process() == before
    assert run.metrics == digits.metrics  # of the same words, typed into a shell
    for name, value in digits.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("modle=cnn", "modle: no such key; did you mean model"),
        ("model=cnn,mlp", "several values are several runs"),
        ("-m", "a flag of the command line"),
        ("task=evaluate", "other tasks are for the command line"),
        ("evaluate", "takes GROUP=OPTION and KEY=VALUE"),
        (3, "takes the words of the command as texts"),
    ],
)
def test_wrong_words_raise_in_one_line_and_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: object, told: str
):
    monkeypatch.chdir(tmp_path)
    before = state_of_process()
    with pytest.raises(package.ConfigError, match=told) as refused:
        package.train(word)  # type: ignore[arg-type]
    assert len(str(refused.value).splitlines()) == 1
    assert state_of_process() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["", "a.library"])
def test_the_log_file_of_the_program_goes_on_after_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    monkeypatch.chdir(tmp_path)
    log = logging.FileHandler(tmp_path / "program.log", mode="w")
    logger = logging.getLogger(place)
    logger.addHandler(log)
    try:
        logger.warning("before")
        with pytest.raises(package.EspalierError):
            package.train("data.batch_size=0")
        logger.warning("after")
    finally:
        logger.removeHandler(log)
        log.close()
    assert (tmp_path / "program.log").read_text() == "before\nafter\n"


def test_importing_the_package_imports_nothing_else(tmp_path: Path):
    slow = "{'numpy', 'torch', 'hydra', 'omegaconf', 'PIL'} & set(sys.modules)"
    (tmp_path / "imported.py").write_text(f"import sys, espalier; print({slow}, 'load' in dir(espalier))")
    assert launch_anew(tmp_path, "imported", PYTHONPATH=str(tmp_path)).stdout == "set() True\n"


def test_every_name_of_the_interface_exists_and_another_does_not():
    assert all(getattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = package.lod

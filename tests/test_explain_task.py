"""`espalier explain` from the command line: pictures, maps, numbers, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file

from conftest import QUICK, Command, command

TRAINED = {
    "cnn": ("model=cnn", "model.channels=[8,16]", "model.hidden=[]", "trainer.max_epochs=4", "optimizer.lr=0.01"),
    "cancer": ("model=mlp", "data=breast_cancer", "model.hidden=[16]", "trainer.max_epochs=10"),
    "diabetes": ("model=mlp", "data=diabetes", "learner=regressor", "model.hidden=[16]", "trainer.max_epochs=20"),
}
SMALL = {
    "cnn": ("model.channels=[4,8,8]", "model.hidden=[8]"),
    "densenet": ("model.depth=[1,1,1]", "model.growth=4"),
    "mlp": ("model.hidden=[8]",),
    "resnet": ("model.depth=8", "model.width=4"),
    "vit": ("model.depth=1", "model.width=8", "model.heads=2"),
}
FOUR = ["grad_cam", "integrated_gradients", "occlusion", "smooth_grad"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One short training for images, one for a table with classes, one for a table with numbers."""
    runs = {}
    for name, words in TRAINED.items():
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            done = command(["train", *words, *QUICK], folder)
        assert done.code == 0
        runs[name] = done.run
    return runs


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def metrics(run: Path, name: str) -> dict[str, float]:
    return next(row["metrics"] for row in report(run)["rows"] if row["name"] == name)


def test_images_get_a_figure_per_class_maps_and_numbers(espalier: Command, trained: dict[str, Path]):
    done = espalier("explain", f"source={trained['cnn']}", "logger=[csv]")
    assert done.code == 0, done.err
    assert [row["name"] for row in report(done.run)["rows"]] == FOUR
    assert {path.name for path in (done.run / "figures").iterdir()} == {
        "explain.png",
        *(f"explain_{digit}.png" for digit in range(10)),
    }
    assert imread(done.run / "figures" / "explain_3.png").std() > 0.05
    assert metrics(done.run, "integrated_gradients")["completeness_error"] < 0.01
    for name in FOUR:
        assert abs(metrics(done.run, name)["sanity"]) < 0.6
        assert 0 < metrics(done.run, name)["deletion"] < 1
        assert 0 < metrics(done.run, name)["insertion"] < 1
    stored = load_file(done.run / "attributions.safetensors")
    assert stored["map.grad_cam"].shape == stored["map.occlusion"].shape == (30, 8, 8)
    assert stored["y"].tolist() == [digit for digit in range(10) for _ in range(3)]
    assert stored["output"].argmax(1).tolist() == stored["target"].tolist(), "the predicted class is explained"


def test_maps_find_what_matters_better_than_chance(espalier: Command, trained: dict[str, Path]):
    done = espalier("explain", f"source={trained['cnn']}", "task.method=[integrated_gradients]", "logger=[csv]")
    [note] = [note for note in report(done.run)["notes"] if note.startswith("in random order")]
    deletion, insertion = (float(part.split()[-1]) for part in note.split(","))
    found = metrics(done.run, "integrated_gradients")
    assert found["deletion"] < deletion - 0.1
    assert found["insertion"] > insertion + 0.1


def test_the_true_class_of_chosen_classes_with_all_methods(espalier: Command, trained: dict[str, Path]):
    words = (
        *("task.method=[shap,lime,grad_cam]", 'task.classes=["8","3"]', "task.samples=2", "task.output=label"),
        *("task.evaluations=150", "task.split=val", "task.layer=features.conv1"),
    )
    done = espalier("explain", f"source={trained['cnn']}", *words, "logger=[csv]")
    assert done.code == 0, done.err
    assert load_file(done.run / "attributions.safetensors")["target"].tolist() == [8, 8, 3, 3]
    assert {path.stem for path in (done.run / "figures").iterdir()} == {"explain", "explain_8", "explain_3"}
    assert metrics(done.run, "shap")["completeness_error"] < 1e-4


def test_a_table_with_classes_gets_bars_per_class(espalier: Command, trained: dict[str, Path]):
    words = ("task.method=[integrated_gradients,occlusion,smooth_grad,shap,lime]", "task.evaluations=100")
    done = espalier("explain", f"source={trained['cancer']}", *words, "logger=[csv]")
    assert done.code == 0, done.err
    assert {path.stem for path in (done.run / "figures").iterdir()} == {
        "explain",
        "explain_benign",
        "explain_malignant",
    }
    assert load_file(done.run / "attributions.safetensors")["map.lime"].shape == (6, 30)
    assert any("x0, x1" in note for note in report(done.run)["notes"])


def test_a_regression_is_explained_by_its_one_output(espalier: Command, trained: dict[str, Path]):
    done = espalier("explain", f"source={trained['diabetes']}", "logger=[csv]", "task.samples=6")
    assert done.code == 0, done.err
    assert [row["name"] for row in report(done.run)["rows"]] == [name for name in FOUR if name != "grad_cam"]
    assert any(note.startswith("grad_cam left out") for note in report(done.run)["notes"])
    assert metrics(done.run, "integrated_gradients").keys() == {"completeness_error", "sanity"}
    assert metrics(done.run, "integrated_gradients")["completeness_error"] < 0.01
    assert {path.stem for path in (done.run / "figures").iterdir()} == {"explain", "explain_output"}


def test_a_quantized_network_is_explained_with_simulated_integers(espalier: Command, trained: dict[str, Path]):
    recipe = ("compression=[prune_magnitude,qat]", "compression.prune_magnitude.sparsity=0.3")
    small = espalier("compress", f"source={trained['cnn']}", *recipe, "trainer.max_epochs=1", *QUICK)
    assert small.code == 0, small.err
    done = espalier("explain", f"source={small.run}", "logger=[csv]", "task.samples=1", "task.steps=64")
    assert done.code == 0, done.err
    assert [row["name"] for row in report(done.run)["rows"]] == FOUR
    assert any("simulated integers" in note for note in report(done.run)["notes"])
    assert metrics(done.run, "integrated_gradients")["completeness_error"] < 0.1
    assert load_file(done.run / "attributions.safetensors")["map.grad_cam"].abs().sum() > 0


def test_the_same_command_gives_the_same_maps(espalier: Command, trained: dict[str, Path]):
    words = (
        "explain",
        f"source={trained['cnn']}",
        "task.method=[smooth_grad]",
        'task.classes=["1","7"]',
        "logger=[csv]",
    )
    first, second = espalier(*words, "hydra.run.dir=a"), espalier(*words, "task.samples=1", "hydra.run.dir=b")
    maps = [load_file(Path(folder) / "attributions.safetensors") for folder in ("a", "b")]
    assert (first.code, second.code) == (0, 0)
    places = [maps[0]["index"].tolist().index(number) for number in maps[1]["index"].tolist()]
    assert torch.allclose(maps[0]["map.smooth_grad"][places], maps[1]["map.smooth_grad"], atol=1e-6)


@pytest.mark.parametrize(
    ("source", "words", "key", "advice"),
    [
        ("cnn", ["task.method=[oclusion]"], "task.method=[oclusion]", "did you mean occlusion?"),
        ("cnn", ["task.method=[]"], "task.method=[]", "integrated_gradients"),
        ("cnn", ["task.samples=0"], "task.samples=0", "greater than or equal to 1"),
        ("cnn", ["task.layer=features.conv9"], "task.layer=features.conv9", "did you mean features.conv"),
        ("cnn", ['task.classes=["11"]'], "task.classes=[11]", "no class 11"),
        ("cnn", ["task.classes=[]"], "task.classes=[]", "say null"),
        ("cnn", ["task.patch=9"], "task.patch=9", "8 x 8"),
        ("cnn", ["task.baseline=blur"], "task.baseline=blur", "'mean' or 'zero'"),
        ("cancer", ["task.method=[grad_cam]"], "task.method=[grad_cam]", "use integrated_gradients"),
        ("cancer", ["task.classes=[bening]"], "task.classes=[bening]", "did you mean benign?"),
        ("cancer", ["task.patch=2"], "task.patch=2", "say null"),
        ("diabetes", ["task.classes=[high]"], "task.classes=[high]", "regression"),
        (None, [], "source=null", "source=latest"),
    ],
)
def test_a_wrong_input_costs_one_line_and_leaves_nothing(
    espalier: Command, trained: dict[str, Path], source: str | None, words: list[str], key: str, advice: str
):
    start = [f"source={trained[source]}"] if source else []
    done = espalier("explain", *start, *words, "logger=[csv]")
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert key in done.err
    assert advice in done.err
    assert not list(done.folder.glob("logs/*/*"))

"""`train source=RUN`: a warm start on the same data, transfer learning on other data."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from conftest import QUICK, Command, Outcome, command

SHAPES = (
    "data.channels=1",
    "data.height=8",
    "data.width=8",
    "data.num_train=64",
    "data.num_val=32",
    "data.num_test=32",
)
OTHER = ("data=synthetic_images", "data.num_classes=3", "data.batch_size=32", *SHAPES)
SHORT = ("trainer.max_epochs=1", "hydra.run.dir=run", *QUICK)

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = command(["train", "model=mlp", "model.hidden=[16]", "trainer.max_epochs=2", *QUICK], folder)
    assert done.code == 0
    return done


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def test_a_warm_start_goes_on_from_the_weights_of_the_source(espalier: Command, trained: Outcome):
    done = espalier("train", f"source={trained.run}", "optimizer=sgd", "optimizer.lr=1e-12", *SHORT)
    assert done.code == 0, done.err
    assert f"warm start from {trained.run / 'checkpoints' / 'best.ckpt'}\n" in done.out
    ours, theirs = weights(Path("run")), weights(trained.run, "best")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-9, rtol=0) for name in ours)
    report = json.loads(Path("run/report.json").read_text())
    assert report["source"] == str(trained.run / "checkpoints" / "best.ckpt")
    assert report["rows"][0]["metrics"] == json.loads((trained.run / "report.json").read_text())["rows"][0]["metrics"]


def test_transfer_learning_keeps_what_fits_and_names_the_new_head(espalier: Command, trained: Outcome):
    done = espalier("train", f"source={trained.run}", *OTHER, "optimizer=sgd", "optimizer.lr=1e-12", *SHORT)
    assert done.code == 0, done.err
    assert "new: head.weight, head.bias" in done.out
    ours, theirs = weights(Path("run")), weights(trained.run, "best")
    assert ours["model.head.weight"].shape == (3, 16)
    kept = [name for name in ours if "head" not in name]
    assert len(kept) == 2
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-9, rtol=0) for name in kept)
    content = torch.load("run/checkpoints/last.ckpt", weights_only=True)["espalier"]
    assert content["config"]["model"]["hidden"] == [16], "the model came from the source, not from the defaults"
    assert content["spec"]["name"] == "synthetic_images"


def test_a_transferred_run_is_evaluated_on_its_own_data(espalier: Command, trained: Outcome):
    assert espalier("train", f"source={trained.run}", *OTHER, *SHORT).code == 0
    done = espalier("evaluate", "source=run", *QUICK, "hydra.run.dir=again")
    assert done.code == 0, done.err
    again, before = (json.loads(Path(run, "report.json").read_text())["rows"][0] for run in ("again", "run"))
    assert again["metrics"] == before["metrics"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("evaluate source=RUN data.broken=skip", 2, "data.broken: no such key"),
        ("evaluate source=RUN model.hidden=[9]", 2, "model.hidden=[9]: model comes from source and cannot change"),
        ("evaluate source=RUN data.batch_sise=9", 2, "data.batch_sise"),
        ("train resume=RUN model.hidden=[9]", 2, "model.hidden=[9]: resume continues the run as it was configured"),
        ("train resume=RUN callbacks.early_stopping.patience=5", 2, "and callbacks differs"),
        ("train resume=RUN model.hidden=[16]", 0, ""),
    ],
)
def test_keys_are_those_of_the_run_whatever_a_new_one_would_have(
    espalier: Command, trained: Outcome, words: str, code: int, told: str
):
    shutil.copytree(trained.run, "copy")
    done = espalier(*words.replace("RUN", "copy").split(), *(QUICK if "evaluate" in words else ()))
    assert (done.code, len(done.err.splitlines())) == (code, bool(code)), done.err
    assert told in done.err


def test_a_warm_start_takes_a_key_that_the_network_of_the_source_has(espalier: Command, trained: Outcome):
    done = espalier("train", f"source={trained.run}", "model.dropout=0.5", *SHORT)
    assert done.code == 0, done.err
    assert "dropout: 0.5" in Path("run/config.yaml").read_text()

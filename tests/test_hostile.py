"""A checkpoint from anybody: none of it is executed, and what is wrong with it is one line."""

import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from conftest import QUICK, Command, command, run_in
from espalier.config import compose
from espalier.errors import ConfigError
from espalier.runs import remote
from helpers import hostile

TRAIN = ("train", "model=mlp", "model.hidden=[16]", "trainer.max_epochs=1", *QUICK)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command(TRAIN, folder).code == 0
    return run_in(folder)


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marker") / "executed"


@pytest.fixture(scope="module")
def files(trained: Path, marker: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    cases = {**hostile.CHECKPOINTS, **hostile.RESUMED}
    paths = hostile.write(trained / "checkpoints" / "last.ckpt", tmp_path_factory.mktemp("hostile"), marker, cases)
    assert not marker.exists()
    return paths


def test_there_are_30_hostile_checkpoints():
    assert len(hostile.CHECKPOINTS) == 30


@pytest.mark.parametrize("name", ["pickled call in the weights", "pickled call of eval", "pickled call in a key"])
def test_the_marker_appears_where_a_pickle_is_believed(files: dict[str, Path], marker: Path, name: str):
    torch.load(files[name], weights_only=False)
    assert marker.exists()
    marker.unlink()


@pytest.mark.parametrize("name", hostile.CHECKPOINTS)
def test_a_hostile_source_is_refused_in_one_line(espalier: Command, files: dict[str, Path], marker: Path, name: str):
    refused(espalier("evaluate", "logger=[csv]", f"source='{files[name]}'"), "espalier: ", marker)


@pytest.mark.parametrize("name", hostile.RESUMED)
def test_a_hostile_run_is_not_resumed(espalier: Command, files: dict[str, Path], marker: Path, name: str):
    refused(espalier("train", f"resume='{files[name]}'"), "espalier: ", marker)


def test_a_run_that_resumes_may_start_from_no_hostile_source(
    espalier: Command, trained: Path, files: dict[str, Path], marker: Path
):
    """A resumed compression reads the checkpoint that it started from, by the path that it says."""
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    composed = OmegaConf.to_container(compose.compose(["task=compress", "compression=[ptq]"]))
    content["espalier"]["config"] |= {group: composed[group] for group in ("task", "compression")}
    content["espalier"]["config"]["source"] = str(files["target os.system"])
    Path("run/checkpoints").mkdir(parents=True)
    torch.save(content, "run/checkpoints/last.ckpt")
    refused(espalier("train", "resume=run"), "espalier: model._target_=os.system: not built", marker)


def refused(done, start: str, marker: Path) -> None:
    assert done.code == 2, done.err
    [line] = done.err.splitlines()
    assert line.startswith(start)
    assert not marker.exists()


def test_a_place_that_the_user_says_too_is_no_suspicion(espalier: Command, trained: Path):
    here = Path.cwd()
    shutil.copytree(trained, "run")
    mirror = f"callbacks.checkpoint.mirror=file://{here}/mirror"
    content = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    content["espalier"]["config"]["callbacks"]["checkpoint"]["mirror"] = f"file://{here}/mirror"
    content["espalier"]["config"]["trainer"]["max_epochs"] = 2
    shutil.rmtree("run/checkpoints")
    Path("run/checkpoints").mkdir()
    torch.save(content, "run/checkpoints/last.ckpt")
    assert espalier("train", "resume=run").code == 2
    assert espalier("train", "resume=run", "callbacks=[checkpoint,monitor]", mirror).code == 0
    assert Path("mirror/last.ckpt").exists()


def test_what_makes_torch_believe_pickles_keeps_every_task_from_starting(
    espalier: Command, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "Yes")
    for task in ("train", "evaluate", "serve"):
        done = espalier(task)
        assert done.code == 2
        assert done.err == (
            "espalier: TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=Yes: makes torch run code out of checkpoints; unset it\n"
        )
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    assert "source=null" in espalier("evaluate").err


class Site(SimpleHTTPRequestHandler):
    """Files of a folder; of `cut.ckpt` half of what is announced."""

    def do_GET(self) -> None:
        if not self.path.startswith("/cut"):
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(bytes(500_000))
        return None

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address(trained: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(trained / "checkpoints" / "best.ckpt", folder / "good.ckpt")
    shutil.copytree(files["wrong manifest"].parent, folder / "wrong")
    shutil.copy(files["target os.system"], folder / "evil.ckpt")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_checkpoint_at_an_address_is_a_source(espalier: Command, address: str):
    done = espalier("evaluate", "logger=[csv]", f"source={address}/good.ckpt")
    assert (done.code, done.err) == (0, "")
    assert [line.startswith(f"fetched {address}/good.ckpt: ") for line in done.out.splitlines()].count(True) == 1
    assert not list(Path("logs/fetched").rglob("*.partial"))


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("source={}/wrong/last.ckpt", "last.ckpt: damaged, its sha256 is not the one in SHA256SUMS"),
        ("source={}/evil.ckpt", "model._target_=os.system: not built from a checkpoint"),
        ("source='{}/nowhere.ckpt'", "nowhere.ckpt: not fetched, nothing is there"),
        ('source="{}/nowhere.ckpt"', "nowhere.ckpt: not fetched, nothing is there"),
        ("source={}/cut.ckpt", "cut.ckpt: not fetched, it was cut off"),
        ("source=http://127.0.0.1:9/x.ckpt", "not fetched, 127.0.0.1 is out of reach: Connect"),
        ("source=http://nowhere.invalid/x.ckpt", "not fetched, nowhere.invalid is out of reach"),
        ("source=ftp://127.0.0.1/x.ckpt", "not fetched, an address starts with one of https, http"),
        ("source=reference::{}/good.ckpt", "not fetched, an address starts with"),
        ("resume={}/good.ckpt", "an address; only source=ADDRESS"),
    ],
)
def test_what_cannot_be_had_at_an_address_is_one_line(
    espalier: Command, address: str, marker: Path, word: str, reason: str
):
    task = "train" if word.startswith("resume") else "evaluate"
    done = espalier(task, *QUICK[:1], word.format(address))
    refused(done, "espalier: ", marker)
    assert reason in done.err
    assert not list(Path("logs").rglob("*.partial"))


def test_a_file_that_is_too_large_is_not_fetched_to_its_end(address: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"^source=.*good\.ckpt: not fetched, it is larger than 0\.0 GB"):
        remote.fetch("source", f"{address}/good.ckpt", max_bytes=1000)
    assert time.monotonic() - started < 10
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

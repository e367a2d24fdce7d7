"""A run folder has one owner, and any name: what is refused, what is shared, what is printed."""

import hashlib
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from conftest import Command, command
from espalier.cli import entry, folders, job
from espalier.config import compose, conf_dir, overrides
from espalier.errors import ConfigError
from espalier.run import Run
from espalier.runs import ownership, references

QUIET = ("logger=[csv]", "callbacks=[checkpoint,progress]")
SMALL = ("model=mlp", "model.hidden=[8]", "trainer.max_epochs=1", "trainer.limit_train_batches=2", *QUIET)
NAMES = [
    "o'brien",
    'say "x"',
    "''",
    "'quoted'",
    "[x] and [/x]",
    "lr=0.1",
    "a,b",
    "~",
    "a ~ #1 50% b",
    "{a} $b $(c)",
    "(1) & ; | * ? <x>",
    "back\\slash\\",
    "a\\'b",
    ":bug: a:b",
    "@+-!^",
    "数字 é ß",
    "null and void",
]
ALL = 'o\'b "q" [x] [/x] lr=0.1,b ~#%{a}$(1):bug:数é'  # all that can stand in one name


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its name, with a hash of what is in it."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an odd name, in which one run was trained and exported, each in a folder with an odd name."""
    folder = tmp_path_factory.mktemp("place") / ALL
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command(["train", *SMALL, f"hydra.run.dir={ALL}"], folder).code == 0
        assert command(["export", f"source={ALL}", "logger=[]", f"hydra.run.dir=export {ALL}"], folder).code == 0
    return folder


@pytest.fixture
def there(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """A command in that folder."""
    monkeypatch.chdir(place)
    return lambda *words: command(words, place, capfd)


# --- one owner ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [task for task in conf_dir.groups()["task"] if task != "serve"])
def test_no_task_writes_over_a_run(there: Command, place: Path, task: str):
    before = contents(place)
    source = f"export {ALL}" if task == "predict" else ALL
    words = [] if task == "train" else [f"source={source}"]
    done = there(task, *words, "logger=[]", f"hydra.run.dir={ALL}")
    assert done.code == 2
    [line] = done.err.splitlines()
    assert line.startswith(f"espalier: hydra.run.dir={ALL}: holds a run already (report.json)")
    assert ("resume=auto" in line) == (task in conf_dir.TRAINS)
    assert contents(place) == before


def test_the_current_folder_is_a_folder_like_others(there: Command, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place / ALL)
    before = contents(place)
    done = there("train", *SMALL, "hydra.run.dir=.")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "holds a run already" in done.err
    assert contents(place) == before


def test_a_sweep_does_not_write_over_a_sweep(espalier: Command, tmp_path: Path):
    (tmp_path / "sweep" / "1").mkdir(parents=True)
    (tmp_path / "sweep" / "1" / "report.json").touch()
    done = espalier("train", "-m", *SMALL, "seed=0,1", "hydra.sweep.dir=sweep")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "hydra.sweep.dir=sweep: holds a sweep already (1/report.json); choose another folder" in done.err
    assert list(contents(tmp_path)) == ["sweep/1/report.json"]


def test_a_run_that_never_trained_leaves_its_folder_to_the_next(espalier: Command, tmp_path: Path):
    (tmp_path / "run").mkdir()
    for name in ("run.log", "config.yaml", "overrides.yaml", "provenance.json"):
        (tmp_path / "run" / name).write_text("of the first\n")
    assert espalier("train", *SMALL, "hydra.run.dir=run").code == 0
    assert "of the first" not in (tmp_path / "run" / "config.yaml").read_text()


def test_what_ended_before_its_first_checkpoint_begins_again_by_resume_auto_alone(espalier: Command, tmp_path: Path):
    words = ("train", *SMALL, "trainer.log_every_n_steps=2", "hydra.run.dir=run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step,train/loss\n1,77.0\n")
    refused = espalier(*words)
    assert refused.code == 2
    assert "holds a run already (metrics.csv); go on with it by resume=auto" in refused.err
    assert espalier(*words, "resume=auto").code == 0
    assert "77.0" not in (tmp_path / "run" / "metrics.csv").read_text()
    assert not (tmp_path / "run" / ownership.LOCK).exists()


def test_while_a_run_works_its_folder_is_refused_to_another(
    espalier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first is a fork, halted where a training would begin."""
    words = ("train", *SMALL, "hydra.run.dir=run", "resume=auto")
    ready, told = os.pipe()
    if (first := os.fork()) == 0:
        try:
            monkeypatch.setattr(Run, "perform", lambda self: (os.write(told, b"x"), signal.pause()))
            espalier(*words)
        finally:
            os._exit(1)
    os.read(ready, 1)
    before = contents(tmp_path)
    try:
        done = espalier(*words)
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    assert done.code == 2
    assert f"in use by process {first} on " in done.err.splitlines()[-1]
    assert contents(tmp_path) == before
    assert espalier(*words).code == 0, "the lock of a process that was killed"


def test_resume_auto_is_decided_once_more_when_the_folder_is_locked(
    espalier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another process has begun and ended between the look for a checkpoint and the lock."""

    def begun(said: str) -> None:
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)

    whole = ownership.locked

    def locked(folder: Path, check: object) -> object:
        (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
        return whole(folder, check)

    monkeypatch.setattr(references, "begun", begun)
    monkeypatch.setattr(ownership, "locked", locked)
    done = espalier("train", *SMALL, "hydra.run.dir=run", "resume=auto")
    assert done.code == 2
    assert "a run has begun here meanwhile; start the same command again" in done.err
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes() == b""


def test_a_refused_start_in_the_current_folder_does_not_remove_it(espalier: Command, tmp_path: Path):
    assert espalier("train", "data.batch_size=0", "hydra.run.dir=.").code == 2
    assert tmp_path.is_dir()


# --- any name -----------------------------------------------------------------------------------------------------


def settled(*words: str) -> dict[str, str]:
    """What Hydra reads out of the words of a command once they are settled, by key."""
    parsed = overrides.parse(folders.settle(words, entry._task_of(words)))
    return {word.key_or_group: OmegaConf.create({"value": word.value()}).value for word in parsed}


def trained(folder: Path) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    (folder / "report.json").touch()
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_run_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    place = tmp_path / name
    run, other = trained(place / "run" / name), trained(place / "other")
    monkeypatch.chdir(place)
    for word in (f"run/{name}", overrides.quoted(f"run/{name}"), str(run)):
        assert settled("task=evaluate", f"source={word}")["source"] == str(run)
        resumed = settled("task=train", f"resume={word}")
        assert (resumed["resume"], resumed["hydra.run.dir"]) == (str(run), str(run))
        assert settled("task=train", f"hydra.run.dir={word}", "resume=auto")["resume"] in (str(run), f"run/{name}")
        assert settled("task=train", f"hydra.run.dir={word}")["hydra.run.dir"] in (str(run), f"run/{name}")
        assert settled("task=train", f"hydra.sweep.dir={word}")["hydra.sweep.dir"] in (str(run), f"run/{name}")
    assert references.split(settled("task=report", f"source={run},other")["source"]) == [str(run), str(other)]
    last = run / "checkpoints" / "epoch=3-last.ckpt"
    last.touch()
    assert settled("task=evaluate", f"source={last}")["source"] == str(last)
    (place / "logs").symlink_to(place / "run")
    assert settled("task=evaluate", "source=latest")["source"] == str(run)


def test_a_folder_without_a_run_is_no_run_to_resume_and_stays(espalier: Command, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    done = espalier("train", "resume=mine")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert (tmp_path / "mine").is_dir()


def test_a_file_stands_for_the_run_in_whose_folder_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = trained(tmp_path / "run")
    monkeypatch.chdir(run / "checkpoints")
    Path("best-3.ckpt").touch()
    for name in ("last.ckpt", "best-3.ckpt"):
        assert settled("task=train", f"resume={name}")["resume"] == str(run)
    alone = tmp_path / "mirror" / "last.ckpt"
    alone.parent.mkdir()
    alone.touch()
    with pytest.raises(ConfigError, match=r"lies in no run folder"):
        settled("task=train", f"resume={alone}")
    assert settled("task=evaluate", f"source={alone}")["source"] == str(alone)


def test_a_name_that_hydra_would_interpolate_can_be_a_source_alone(espalier: Command, tmp_path: Path):
    run = trained(tmp_path / "a ${b} c")
    assert settled("task=evaluate", f"source={run}")["source"] == str(run)
    done = espalier("train", f"resume={run}")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "${...} in the name of a run folder is read as an interpolation" in done.err


@pytest.mark.parametrize("name", NAMES)
def test_what_a_message_says_to_type_can_be_typed(tmp_path: Path, name: str):
    run = trained(tmp_path / name)
    [word] = shlex.split(overrides.typed("resume", run))
    assert settled("task=train", word)["resume"] == str(run)
    [word] = shlex.split(overrides.typed("data.path", name))
    assert settled("task=train", word)["data.path"] == name


@pytest.mark.parametrize("before", ["", "+", "++"])
def test_a_run_is_found_however_its_key_is_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str):
    run = trained(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    resumed = settled("task=train", f"{before}resume=run")
    assert (resumed["resume"], resumed["hydra.run.dir"]) == (str(run), str(run))
    assert settled("task=train", f"{before}resume=auto", f"{before}hydra.run.dir=run")["hydra.run.dir"] == str(run)
    assert settled("task=evaluate", f"{before}source=run")["source"] == str(run)


@pytest.fixture
def composed(espalier: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Where a command would run, trial by trial, as noted in place of a run."""
    found: list[Path] = []
    monkeypatch.setattr(job, "carry_out", lambda cfg: found.append(Path(HydraConfig.get().runtime.output_dir)))

    def composed(*words: str) -> list[Path]:
        found.clear()
        done = espalier(*words)
        assert done.code == 0, done.err
        return found

    return composed


def test_hydra_makes_the_folder_that_was_named(composed: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / ALL).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / ALL)
    assert composed("train", f"hydra.run.dir={ALL}") == [tmp_path / ALL / ALL]
    assert composed("train", "-m", "seed=0,1", f"hydra.sweep.dir={ALL}") == [
        tmp_path / ALL / ALL / "0",
        tmp_path / ALL / ALL / "1",
    ]


def test_the_home_folder_is_known(composed: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run, other = trained(tmp_path / "home" / "run"), trained(tmp_path / "home" / "other")
    said = settled("task=report", "source=~/run,~/other", "hydra.run.dir=~/new")
    assert said["source"] == f"{run},{other}"
    assert said["hydra.run.dir"] == str(tmp_path / "home" / "new")
    assert composed("train", "hydra.run.dir=~/${seed}") == [tmp_path / "home" / "0"]


def test_an_interpolation_stays_one(composed: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = "hydra.run.dir=logs/lr=${optimizer.lr}, seed ${seed}"
    assert composed("train", folder, "optimizer.lr=0.5") == [tmp_path / "logs" / "lr=0.5, seed 0"]
    monkeypatch.setenv("PLACE", "here")
    trained(tmp_path / "here")
    assert composed("train", "hydra.run.dir=${oc.env:PLACE}", "resume=auto") == [tmp_path / "here"]


def test_resume_auto_needs_a_folder_that_stays_the_same(espalier: Command):
    done = espalier("train", "hydra.run.dir=logs/${now:%H}", "resume=auto")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "not hydra.run.dir=logs/${now:%H}" in done.err


@pytest.mark.parametrize("value", ["a (1)=b", "o'brien", "数字"])
def test_a_value_that_lacks_quotes_is_answered_with_them(espalier: Command, tmp_path: Path, value: str):
    done = espalier("train", "data=hub_images", f"data.path={value}")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    [word] = shlex.split(done.err.partition("quote it: ")[2])
    (tmp_path / value).mkdir()
    assert compose.compose(["data=hub_images", word]).data.path == value


def test_a_word_that_is_no_assignment_is_offered_no_quotes(espalier: Command):
    done = espalier("train", "seed")
    assert done.err == "espalier: seed: not of the form KEY=VALUE\n"


@pytest.mark.parametrize(
    ("task", "source", "words"),
    [
        ("train", "resume", ("trainer.max_epochs=2",)),
        ("evaluate", "source", ()),
        ("predict", "source", ()),
        ("report", "source", ()),
        pytest.param("compress", "source", ("compression=[ptq]", "task.batches=[1]"), marks=pytest.mark.slow),
        pytest.param("explain", "source", ("task.method=[occlusion]", "task.samples=1"), marks=pytest.mark.slow),
    ],
)
def test_a_task_works_in_a_folder_of_any_name(
    there: Command, place: Path, task: str, source: str, words: tuple[str, ...]
):
    named = f"export {ALL}" if task == "predict" else f"{ALL},export {ALL}" if task == "report" else ALL
    to = ALL if source == "resume" else f"{task} {ALL}"
    own = words if source == "resume" else ("logger=[]", *words, f"hydra.run.dir={to}")
    done = there(task, f"{source}={named}", *own)
    assert done.code == 0, done.err
    assert f"report: {place / to / 'report.md'}" in done.out
    assert (place / to / "report.json").is_file()
    assert task != "report" or f"page: {place / to / 'report.html'}" in done.out

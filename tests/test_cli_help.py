"""What the command says about itself: quickly, completely, and without importing torch."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from espalier.config import conf_dir

HEAVY = ("torch", "lightning", "torchmetrics", "wandb", "sklearn", "matplotlib")
PROBE = f"""
import sys
from espalier import cli
sys.argv[0] = "espalier"
try:
    cli.main()
finally:
    print("heavy:", *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


def light(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The outcome of a command that imported none of the heavy packages and left nothing behind."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    *lines, heavy = done.stderr.splitlines()
    assert heavy.split() == ["heavy:"]
    assert list(folder.iterdir()) == []
    done.stderr = "\n".join(lines)
    return done


def test_without_words_it_lists_the_tasks_and_three_examples(tmp_path: Path):
    done = light(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    tasks, examples = done.stdout.split("Examples:")
    for task in conf_dir.groups()["task"]:
        assert f"espalier {task} " in tasks
        assert conf_dir.summary("task", task) in tasks
    assert examples.count("espalier ") >= 3


def test_help_of_a_task_lists_groups_options_defaults_and_keys(tmp_path: Path):
    done = light(tmp_path, "train", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for group, options in conf_dir.groups().items():
        if group not in ("task", "hydra"):
            [line] = [line for line in done.stdout.splitlines() if line.split()[:1] == [group]]
            assert all(option in line for option in options)
    assert "[resnet]" in done.stdout
    assert "seed=0" in done.stdout
    assert "task.split" in light(tmp_path, "evaluate", "--help").stdout


def test_the_version_is_that_of_the_package_and_of_what_it_stands_on(tmp_path: Path):
    done = light(tmp_path, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    for name in (conf_dir.__name__.partition(".")[0], "torch", "lightning"):
        assert f"{name} {version(name)}" in done.stdout


def test_help_of_a_group_explains_each_option(tmp_path: Path):
    done = light(tmp_path, "train", "--help", "model")
    assert done.returncode == 0
    for option in conf_dir.groups()["model"]:
        [line] = [line for line in done.stdout.splitlines() if f"model={option} " in line]
        assert conf_dir.summary("model", option) in line


@pytest.mark.parametrize("place", [("--cfg", "job", "model=vit"), ("model=vit", "--cfg", "job")])
def test_cfg_job_prints_the_configuration_as_yaml(tmp_path: Path, place: tuple[str, ...]):
    done = light(tmp_path, "train", *place, "model.width=48")
    assert (done.returncode, done.stderr) == (0, "")
    shown = yaml.safe_load(done.stdout)
    assert shown["model"]["_target_"] == "espalier.models.vit.ViT"
    assert shown["model"]["width"] == 48
    assert shown.keys() >= {"seed", "data", "model", "learner", "optimizer", "scheduler", "trainer", "task"}
    assert "hydra" not in shown


@pytest.mark.parametrize("words", [("trian",), ("train", "model=resnett"), ("train", "trainer.max_epoch=1")])
def test_what_does_not_compose_is_answered_without_torch(tmp_path: Path, words: tuple[str, ...]):
    done = light(tmp_path, *words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "did you mean" in done.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("espalier tr", {"train"}),
        ("espalier ", {*conf_dir.groups()["task"], "runs"}),
        ("espalier train mod", {"model=", "model."}),
        (
            "espalier train model=",
            {f"model={name}" for name in ("cnn", "mlp", "resnet", "vit", "densenet", "text_cnn", "transformer")},
        ),
        ("espalier train model=mlp optimizer=ad", {"optimizer=adam", "optimizer=adamw", "optimizer=adafactor"}),
        ("espalier train trainer.max_", {"trainer.max_epochs=", "trainer.max_steps="}),
        ("espalier train model=vit model.wi", {"model.width="}),
    ],
)
def test_tab_completes_verbs_groups_options_and_keys(tmp_path: Path, line: str, expected: set[str]):
    done = light(tmp_path, "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == expected


def test_the_shell_code_for_completion_defines_it_for_this_command(tmp_path: Path):
    done = light(tmp_path, "-sc", "install=bash")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].endswith(" espalier")
    checked = subprocess.run(["bash", "-n"], input=done.stdout, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr

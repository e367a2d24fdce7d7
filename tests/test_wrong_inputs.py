"""A path taken by mistake ends in one clear line and exit code 2, with nothing left behind."""

import sys
from pathlib import Path

import pytest
import torch

from conftest import QUICK, Command, command

CALLBACKS = "lightning.pytorch.callbacks"
WRONG = {
    "misspelt top-level key": (["sed=1"], "sed", "did you mean seed?"),
    "misspelt nested key": (["trainer.max_epoch=3"], "trainer.max_epoch", "did you mean trainer.max_epochs?"),
    "misspelt nested key, appended": (["+model.widht=3"], "model.widht", "did you mean width?"),
    "misspelt group": (["modle=cnn"], "modle", "did you mean model?"),
    "misspelt option": (["model=resnett"], "model=resnett", "did you mean resnet?"),
    "misspelt option in a list": (["logger=[csv,wanbd]"], "wanbd", "did you mean wandb?"),
    "misspelt target": (["model._target_=espalier.models.resnet.ResNett"], "model._target_", "ResNet?"),
    "target in a module that does not exist": (["model._target_=nowhere.Net"], "model._target_", "nowhere"),
    "null for a group": (["logger=null"], "logger=null", "none"),
    "folder that cannot be written": (["hydra.run.dir=/proc/nowhere"], "hydra.run.dir", "cannot be written"),
    "misspelt flag": (["--multirn"], "--multirn", "did you mean --multirun?"),
    "word without a value": (["seed"], "seed", "KEY=VALUE"),
    "wrong type, schema": (["seed=zero"], "seed=zero", "Integer"),
    "wrong type, signature": (["data.batch_size=many"], "data.batch_size=many", "integer"),
    "wrong type, Lightning's signature": (["trainer.max_epochs=ten"], "trainer.max_epochs=ten", "integer"),
    "batch size 0": (["data.batch_size=0"], "data.batch_size=0", "greater than or equal to 1"),
    "batch size beyond the data": (["data.batch_size=5000"], "data.batch_size=5000", "1151"),
    "negative learning rate": (["optimizer.lr=-0.1"], "optimizer.lr=-0.1", "greater than 0"),
    "share above 1": (["scheduler.warmup=1.5"], "scheduler.warmup=1.5", "less than or equal to 1"),
    "rate of 1.5": (["callbacks=[default,ema]", "callbacks.ema.decay=1.5"], "callbacks.ema.decay=1.5", "less than"),
    "unknown precision": (["trainer.precision=17"], "trainer.precision=17", "32-true"),
    "size that the data decides": (["+model.num_outputs=3"], "model.num_outputs", "cannot be set"),
    "GPU on a machine without": (["strategy=gpu"], "trainer.accelerator=gpu", "no GPU"),
    "more devices than exist": (["trainer.accelerator=cpu", "trainer.devices=999"], "trainer.devices=999", "CPU cores"),
    "processes that return no measurement": (["strategy=cpu", "trainer.strategy=ddp_spawn"], "ddp_spawn", "ddp_cpu"),
    "sync batch norm on a CPU": (["strategy=cpu", "trainer.sync_batchnorm=true"], "trainer.sync_batchnorm", "GPU"),
    "missing source": (["source=nowhere"], "source=nowhere", "no such run"),
    "missing resume": (["resume=nowhere"], "resume=nowhere", "no such run"),
    "no latest run": (["source=latest"], "source=latest", "no finished run"),
    "missing data folder": (["data=hub_images", "data.path=./nowhere"], "data.path=./nowhere", "nowhere"),
    "background that is no colour": (
        ["data=hub_images", "data.path=.", "data.background=wite"],
        "background=wite",
        "white, black",
    ),
    "broken pictures to be mended": (
        ["data=hub_images", "data.path=.", "data.broken=mend"],
        "data.broken=mend",
        "skip",
    ),
    "standard deviation 0": (
        ["data=hub_images", "data.path=.", "data.mean=[0,0,0]", "data.std=[0,1,1]"],
        "data.std",
        "above 0",
    ),
    "learner for other data": (["data=diabetes", "learner=classifier"], "learner", "learner=regressor"),
    "model for other data": (["data=breast_cancer", "model=cnn"], "model", "30"),
    "key of other options": (
        ["data.path=x"],
        "data.path: no such key in data=digits",
        "hub_images, imagenet, mnist and text have it",
    ),
    "key of another option, appended": (
        ["+data.path=x"],
        "data.path: no such key",
        "hub_images, imagenet, mnist and text have it",
    ),
    "key of one other option": (["scheduler.gamma=0.5"], "scheduler.gamma", "scheduler=step has it"),
    "key of a callback that is not chosen": (["callbacks.ema.decay=0.5"], "callbacks.ema", "callbacks=[ema] has it"),
    "key of another strategy": (["trainer.strategy.timeout_seconds=3"], "trainer.strategy", "strategy=ddp, ddp_cpu"),
    "key of another group": (["model.lr=3"], "model.lr", "did you mean optimizer.lr?"),
    "key that is like no other": (["model.zebra=1"], "model.zebra", "model=resnet has depth, stem, block, width"),
    "list for a group, with a dot": (["data.augment=[crop]"], "data.augment=[crop]", "say data/augment=[crop]"),
    "key of an older Lightning": (["+trainer.auto_lr_find=true"], "trainer.auto_lr_find", "-m optimizer.lr=1e-3"),
    "seed of 20 digits": (["seed=99999999999999999999"], "seed=99999999999999999999", "9223372036854775807"),
    "size beyond an integer": (["data.batch_size=99999999999999999999"], "data.batch_size=9999", "2147483647"),
    "count beyond any": (["model=mlp", "model.hidden=[3000000000]"], "model.hidden=[3000000000]", "2147483647"),
    "infinite rate": (["optimizer.lr=inf"], "optimizer.lr=inf", "finite"),
    "no number": (["learner.label_smoothing=nan"], "learner.label_smoothing=nan", "less than 1"),
    "negative number of epochs": (["trainer.max_epochs=-3"], "trainer.max_epochs=-3", "-1"),
    "negative number of batches": (["trainer.limit_val_batches=-2"], "trainer.limit_val_batches=-2", "0"),
    "share above 1 of batches": (["trainer.limit_test_batches=1.5"], "trainer.limit_test_batches=1.5", "1"),
    "validation every 0 epochs": (["trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch=0", "1"),
    "validation every 0 batches": (["+trainer.val_check_interval=0"], "trainer.val_check_interval=0", "1"),
    "fewer than none to keep": (["callbacks.checkpoint.save_top_k=-3"], "callbacks.checkpoint.save_top_k=-3", "-1"),
    "momentum of 1": (["optimizer.betas=[0.9,1.0]"], "optimizer.betas", "less than 1"),
    "rate finder": (
        [f"+callbacks.x={{_target_:{CALLBACKS}.LearningRateFinder}}"],
        "LearningRateFinder",
        "-m optimizer.lr",
    ),
    "size finder": (
        [f"+callbacks.x={{_target_:{CALLBACKS}.BatchSizeFinder}}"],
        "BatchSizeFinder",
        "-m data.batch_size",
    ),
    "bar of Lightning": ([f"+callbacks.x={{_target_:{CALLBACKS}.TQDMProgressBar}}"], "TQDMProgressBar", "progress"),
    "average that nothing keeps": (
        [f"+callbacks.x={{_target_:{CALLBACKS}.StochasticWeightAveraging,swa_lrs:0.1}}"],
        "StochasticWeightAveraging",
        "callbacks=[default,ema]",
    ),
    "accumulation by a schedule": (
        [f"+callbacks.x={{_target_:{CALLBACKS}.GradientAccumulationScheduler,scheduling:{{a:2}}}}"],
        "GradientAccumulationScheduler",
        "trainer.accumulate_grad_batches",
    ),
    "no epoch": (["trainer.max_epochs=0"], "trainer.max_epochs=0", "espalier evaluate source=RUN"),
    "no end": (["trainer.max_epochs=-1"], "trainer.max_epochs=-1", "trainer.max_steps"),
    "no test": (["trainer.limit_test_batches=0"], "trainer.limit_test_batches=0", "say 1"),
    "share of no batch": (["trainer.limit_train_batches=0.0001"], "trainer.limit_train_batches=0.0001", "17 batches"),
    "validation after the epoch": (
        ["+trainer.val_check_interval=1000"],
        "trainer.val_check_interval=1000",
        "at most 17",
    ),
    "float16 on a CPU": (["strategy=cpu", "trainer.precision=16-true"], "trainer.precision=16-true", "bf16-true"),
    "precision that is not installed": (["trainer.precision=transformer-engine"], "trainer", "transformer_engine"),
    "unknown profiler": (["trainer.profiler=fast"], "trainer.profiler=fast", "simple, advanced, pytorch"),
    "metric that is not measured": (
        ["callbacks=[checkpoint,early_stopping]", "callbacks.early_stopping.monitor=val/los"],
        "callbacks.early_stopping.monitor=val/los",
        "did you mean val/loss?",
    ),
    "best by another metric": (
        ["+callbacks.checkpoint.monitor=val/loss"],
        "callbacks.checkpoint.monitor",
        "cannot be set",
    ),
    "more than memory": (["model=mlp", "model.hidden=[2000000000,2000000000]"], "model", "does not fit into memory"),
    "several values without -m": (["seed=0,1"], "seed=0,1", "-m"),
    "interval": (["-m", "optimizer.lr=interval(0.1,0.2)"], "optimizer.lr=interval(0.1,0.2)", "list them"),
    "pattern without a match": (["-m", "model=glob(x*)"], "model=glob(x*)", "resnet"),
    "swept twice": (["-m", "seed=0,1", "seed=2,3"], "seed", "swept 2 times"),
    "configuration of many runs": (["-m", "seed=0,1", "--cfg", "job"], "--cfg", "drop -m"),
    "launcher that is not installed": (["-m", "hydra/launcher=joblib"], "joblib", "pip install hydra-joblib-launcher"),
    "sweeper that is not installed": (["-m", "hydra/sweeper=optuna"], "optuna", "pip install hydra-optuna-sweeper"),
    "unknown launcher": (["-m", "hydra/launcher=slurm"], "hydra/launcher=slurm", "submitit_slurm"),
}


@pytest.mark.parametrize(("words", "key", "advice"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_input_ends_in_one_line_and_exit_code_2(espalier: Command, words, key, advice):
    done = espalier("train", *QUICK, *words)
    assert done.code == 2
    [line] = done.err.splitlines()
    assert key in line
    assert advice in line
    assert not list(done.folder.glob("logs/*/*")), "a run that never started left a folder"


def test_there_are_at_least_20_wrong_inputs():
    assert len(WRONG) >= 20


def test_a_misspelt_verb_offers_the_right_one(espalier: Command):
    done = espalier("trian")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "did you mean train?" in done.err


def test_all_problems_are_reported_at_once(espalier: Command):
    done = espalier("train", "data.batch_size=0", "optimizer.lr=-1", "trainer.precision=8")
    assert done.code == 2
    assert [line.split(": ")[1].partition("=")[0] for line in done.err.splitlines()] == [
        "data.batch_size",
        "optimizer.lr",
        "trainer.precision",
    ]


def test_several_misspelt_words_are_reported_at_once(espalier: Command):
    done = espalier("train", "model=resnett", "sed=1", "trainer.max_epoch=3")
    assert done.code == 2
    assert len(done.err.splitlines()) == 3


def test_a_missing_extra_is_named(espalier: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    done = espalier("train", "logger=[csv,mlflow]")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "mlflow" in done.err
    assert "[track]" in done.err


def test_a_mode_that_wandb_does_not_know_is_answered_by_its_name(espalier: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offlin")
    done = espalier("train", "model=mlp", "logger=[csv,wandb]")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "WANDB_MODE=offlin: no such mode of W&B; it is one of online, offline, disabled" in done.err


def test_what_is_refused_once_the_data_are_known_leaves_no_folder(espalier: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert espalier("train", "model=mlp", "trainer.limit_val_batches=0.0001", "logger=[csv,wandb]").code == 2
    assert list(Path().glob("logs/*/*")) == []


def test_evaluate_refuses_a_share_of_no_batch(espalier: Command, trained: Path):
    done = espalier("evaluate", f"source={trained}", "trainer.limit_test_batches=0.0001", "task.split=val", *QUICK)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "trainer.limit_test_batches=0.0001: of 5 batches this is none" in done.err


def test_only_training_resumes(espalier: Command, trained: Path):
    done = espalier("evaluate", f"resume={trained}")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "source=RUN" in done.err


def test_evaluate_needs_a_source(espalier: Command):
    done = espalier("evaluate")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "source" in done.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = command(["train", "model=mlp", "model.hidden=[16]", "trainer.max_epochs=1", *QUICK], folder)
    assert done.code == 0
    return done.run


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["evaluate", "model=cnn"], "model=cnn"),
        (["evaluate", "model.hidden=[8]"], "model.hidden"),
        (["evaluate", "learner=regressor"], "learner=regressor"),
        (["evaluate", "data=synthetic_images"], "data=synthetic_images"),
        (["train", "model=resnet"], "another architecture"),
    ],
)
def test_what_the_source_decides_cannot_be_overridden(espalier: Command, trained: Path, words, key):
    done = espalier(words[0], f"source={trained}", *words[1:], *QUICK)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert key in done.err


def test_a_resumed_run_keeps_its_configuration(espalier: Command, trained: Path):
    done = espalier("train", f"resume={trained}", "model=cnn")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "model=cnn" in done.err


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half a zip"])
def test_a_damaged_checkpoint_is_refused(espalier: Command, tmp_path: Path, content: bytes):
    file = tmp_path / "damaged.ckpt"
    file.write_bytes(content)
    done = espalier("evaluate", f"source={file}")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "damaged.ckpt" in done.err


def test_a_checkpoint_of_something_else_is_refused(espalier: Command, tmp_path: Path):
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    done = espalier("evaluate", f"source={tmp_path / 'other.ckpt'}")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "other.ckpt" in done.err


def test_a_target_smuggled_into_a_checkpoint_is_not_built(espalier: Command, trained: Path, tmp_path: Path):
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    content["espalier"]["config"]["model"] = {"_target_": "pathlib.Path.touch", "self": str(tmp_path / "executed")}
    torch.save(content, tmp_path / "hostile.ckpt")
    done = espalier("evaluate", f"source={tmp_path / 'hostile.ckpt'}")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "pathlib.Path.touch" in done.err
    assert not (tmp_path / "executed").exists()


def test_a_sweep_over_ddp_is_refused_with_what_works(espalier: Command):
    done = espalier("train", "-m", "seed=0,1", "strategy=ddp_cpu")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "trainer.devices=2" in done.err
    assert "torchrun" in done.err


def test_a_misspelt_value_of_a_sweep_stops_it_before_the_first_trial(espalier: Command):
    done = espalier("train", "-m", "model=mlp,resnett")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "did you mean resnet?" in done.err
    assert not (done.folder / "logs").exists()


def test_traceback_shows_the_rest(espalier: Command):
    done = espalier("train", "--traceback", "data.batch_size=0")
    assert done.code == 2
    assert "Traceback" in done.err

"""What every option of every group promises. A new file in `conf/` is covered without touching this one."""

import inspect
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from espalier.config import check, compose, conf_dir
from espalier.data.hub_images import HubImages
from espalier.errors import ConfigError
from espalier.run import Run
from espalier.signature import example
from espalier.spec import FIRST
from espalier.validate import prepare
from helpers import texts

NUM_OPTIONS = {  # at least; a search that finds nothing proves nothing
    **{
        "callbacks": 8,
        "compression": 8,
        "data": 10,
        "data/augment": 10,
        "debug": 1,
        "hydra": 1,
        "learner": 2,
        "logger": 5,
    },
    **{"model": 5, "optimizer": 10, "scheduler": 7, "strategy": 6, "task": 9, "trainer": 1},
}
OPTIONS = [(group, option) for group, options in conf_dir.groups().items() for option in options]
LISTS = {"callbacks", "compression", "logger", "data/augment"}
SMALL = {
    "cnn": ("model.channels=[4,8,8]", "model.hidden=[8]"),
    "densenet": ("model.depth=[1,1,1]", "model.growth=4"),
    "mlp": ("model.hidden=[8]",),
    "resnet": ("model.depth=8", "model.width=4"),
    "vit": ("model.depth=1", "model.width=8", "model.heads=2"),
    "text_cnn": ("model.width=8", "model.channels=8"),
    "transformer": ("model.width=8", "model.depth=1", "model.heads=2"),
}
TEXTS = texts.write(Path(tempfile.mkdtemp(prefix="texts_")) / "texts.csv")  # for networks that read tokens
TWO_STEPS = ("trainer.max_steps=2", "trainer.limit_val_batches=0", "data.batch_size=32")
BATCH = 4


def options(group: str) -> list[str]:
    return conf_dir.groups()[group]


def small(model: str) -> tuple[str, ...]:
    """A small network of this kind, and data that it reads."""
    target = compose.compose([f"model={model}", "data=digits"]).model._target_
    reads_tokens = "input_shape" not in inspect.signature(check.locate(target)).parameters
    data = ("data=text", f"data.path={TEXTS}") if reads_tokens else ("data=digits",)
    return (*data, f"model={model}", *SMALL.get(model, ()))


def word(group: str, option: str) -> str:
    return f"{group}=[{option}]" if group in LISTS else f"{group}={option}"


@cache
def composed(*words: str) -> DictConfig:
    """Shared between tests, because Hydra takes a third of a second for each."""
    return compose.compose(words)


def silent(*words: str) -> DictConfig:
    """Without callbacks and loggers."""
    return composed(*words, "callbacks=[]", "logger=[]").copy()


def run_of(folder: Path, cfg: DictConfig) -> Run:
    return prepare(cfg, [], folder, task="train")


def built_nodes(node: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield where, node
        for key, child in node.items():
            yield from built_nodes(child, f"{where}.{key}" if where else key)


def test_no_group_is_left_out_and_none_is_empty():
    found = {group: len(names) for group, names in conf_dir.groups().items()}
    assert {group: found.get(group, 0) for group, least in NUM_OPTIONS.items() if found.get(group, 0) < least} == {}
    files = [file for file in conf_dir.CONF.rglob("*.yaml") if file.parent != conf_dir.CONF]
    assert len(OPTIONS) == len(files) >= sum(NUM_OPTIONS.values())
    assert [file for file in conf_dir.CONF.rglob("*") if file.is_file() and file.suffix != ".yaml"] == []


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_it_opens_with_a_comment_that_says_what_it_is(group: str, option: str):
    first, *rest = (conf_dir.CONF / group / f"{option}.yaml").read_text().splitlines()
    opening = rest[0] if first.startswith("# @package") else first
    assert opening.startswith("# ")
    assert conf_dir.summary(group, option) == opening.removeprefix("# ")
    assert len(opening) < 160


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_it_composes_and_passes_the_check(group: str, option: str):
    cfg = composed(word(group, option)).copy()
    if OmegaConf.is_missing(cfg.data, "path"):
        cfg.data.path = "."
    check.check(cfg)
    for where, node in built_nodes(OmegaConf.to_container(cfg, resolve=True)):
        named, target = node["_target_"], check.locate(node["_target_"])
        module, private, _ = target.__module__.partition("._")  # torch.optim.Adafactor lies in torch.optim._adafactor
        assert named == f"{module}.{target.__qualname__}", f"{where} does not name the module that defines it"
        assert not private or not named.startswith("espalier.")


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_no_value_has_a_second_default_in_the_signature(group: str, option: str):
    for where, node in built_nodes(OmegaConf.to_container(composed(word(group, option)), resolve=True)):
        if node["_target_"].startswith("espalier."):
            parameters = inspect.signature(check.locate(node["_target_"])).parameters
            twice = [
                key for key in node if key in parameters and parameters[key].default is not inspect.Parameter.empty
            ]
            assert twice == [], where


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parquet files with every column that an option asks for: 2 classes, grey noise of two shades."""
    folder = tmp_path_factory.mktemp("images")
    dice = np.random.default_rng(0)
    labels = [number % 2 for number in range(60)]
    pictures = [Image.fromarray((dice.integers(0, 99, (9, 7, 3)) + 150 * label).astype(np.uint8)) for label in labels]
    columns: dict[str, Any] = {"image": pictures, "img": pictures, "label": labels, "fine_label": labels}
    features = {name: datasets.Image() if name.startswith("im") else datasets.Value("int64") for name in columns}
    for split in ("train", "validation", "test"):
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(
            folder / f"{split}.parquet"
        )
    return folder


@pytest.mark.parametrize("option", options("data"))
def test_data_give_a_spec_and_batches_that_fit_it(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, option: str
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    cfg = silent(f"data={option}")
    cfg.data.batch_size = BATCH
    if cfg.data._target_.endswith("HubImages"):
        cfg.data.path, cfg.data.num_workers = str(images), 0  # a pool left in mid-epoch ends when it likes
    elif OmegaConf.is_missing(cfg.data, "path"):
        cfg.data.path = str(TEXTS)
    data = run_of(tmp_path, cfg).data
    assert not isinstance(data, HubImages) or data.spec.class_counts in {(30, 30), (29, 29)}  # carved or not
    batch, spec = next(iter(data.train_dataloader())), data.spec
    assert len(batch.y) == BATCH
    for x, each in zip(batch.inputs, spec.inputs, strict=True):
        if each.is_tokens:
            assert x.dtype == torch.int64
            assert 1 <= x.amax() < len(each.vocabulary) + FIRST
            assert (x != 0).any(0).all()  # no longer than the longest of the batch
            continue
        assert x.shape == (BATCH, *each.shape)
        assert x.dtype == torch.float32
        assert x.isfinite().all()
        assert 0 < x.abs().mean() < 10  # normalised
        assert len(each.mean) == len(each.std) == each.shape[0]
    if spec.num_classes:
        assert sum(spec.class_counts) == len(data.splits.train)
        assert ((batch.y >= 0) & (batch.y < spec.num_classes)).all()
    for split in ("val", "test"):
        assert [x.ndim for x in next(iter(data.loader(split))).inputs] == [1 + len(each.shape) for each in spec.inputs]


@pytest.mark.parametrize("option", options("data/augment"))
def test_augmentations_change_training_images_alone(tmp_path: Path, option: str):
    plain = run_of(tmp_path, silent("data/augment=[]")).data
    data = run_of(tmp_path, silent(word("data/augment", option))).data
    before, after = next(iter(plain.train_dataloader())), next(iter(data.train_dataloader()))
    assert torch.equal(before.index, after.index)
    assert (option == "none") == torch.allclose(before.x, after.x, atol=1e-5)
    assert torch.equal(next(iter(plain.val_dataloader())).x, next(iter(data.val_dataloader())).x)


def fitting(option: str) -> str:
    """Data that an option of `learner` can learn from."""
    return "data=diabetes" if option == "regressor" else "data=digits"


@pytest.mark.parametrize("option", options("learner"))
def test_learners_name_a_metric_that_they_measure(tmp_path: Path, option: str):
    learner = run_of(tmp_path, silent(fitting(option), f"learner={option}", "model=mlp")).learner
    assert learner.monitor in learner.new_metrics("val").keys()  # noqa: SIM118, it holds names without the prefix too
    assert learner.mode in ("min", "max")


@pytest.mark.parametrize("option", options("callbacks"))
def test_callbacks_build(tmp_path: Path, option: str):
    run = run_of(tmp_path, composed("model=mlp", word("callbacks", option), "logger=[]"))
    assert [type(callback).__name__ for callback in run.callbacks] == [
        node._target_.rpartition(".")[2] for node in run.cfg.callbacks.values()
    ]
    assert bool(run.callbacks) == (option != "none")
    assert run.trainer is not None


@pytest.mark.parametrize("option", options("logger"))
def test_loggers_build_and_stay_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = run_of(tmp_path, composed("model=mlp", word("logger", option), "callbacks=[]"))
    assert len(run.loggers) == (option != "none")
    for logger in run.loggers:
        logger.log_metrics({"val/loss": 1.0}, step=1)
        logger.save()
        logger.close()
    assert all(logger.is_on for logger in run.loggers)


@pytest.mark.parametrize("option", options("strategy"))
def test_strategies_build_or_say_that_the_machine_lacks_a_gpu(tmp_path: Path, option: str):
    needs_gpu = composed(f"strategy={option}").trainer.accelerator == "gpu"
    if needs_gpu and not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            run_of(tmp_path, composed(f"strategy={option}"))
    else:
        assert run_of(tmp_path, silent("model=mlp", f"strategy={option}")).trainer.num_nodes == 1


@pytest.mark.parametrize("option", options("task"))
def test_tasks_take_a_run_and_describe_themselves(option: str):
    task = check.locate(composed(f"task={option}").task._target_)
    assert next(iter(inspect.signature(task).parameters)) == "run"
    assert inspect.getdoc(task)


def train_two_steps(run: Run) -> None:
    """Asserts that the loss stays finite and every matrix and kernel moves."""
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.trainer.fit(run.learner, run.data)
    assert run.trainer.global_step == 2
    assert run.learner.last_loss is not None
    assert run.learner.last_loss.isfinite()
    after = run.model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    matrices = [name for name, parameter in run.model.named_parameters() if parameter.ndim > 1]
    assert matrices
    assert [name for name in matrices if torch.equal(before[name], after[name])] == []


def pairs() -> Iterator[Any]:
    """Each model with each optimizer; with a third of them here, with the others where time is no matter."""
    for place, model in enumerate(options("model")):
        for turn, optimizer in enumerate(options("optimizer")):
            marks = () if (place + turn) % 3 == 0 else pytest.mark.slow
            yield pytest.param(model, optimizer, id=f"{model}-{optimizer}", marks=marks)


@pytest.mark.parametrize(("model", "optimizer"), pairs())
def test_every_model_trains_with_every_optimizer(tmp_path: Path, model: str, optimizer: str):
    cfg = silent(*small(model), *TWO_STEPS)
    cfg.optimizer = composed(f"optimizer={optimizer}").optimizer
    run = run_of(tmp_path, cfg)
    train_two_steps(run)
    assert run.model(*example(run.data.spec, 3)).shape == (3, run.data.spec.num_outputs)


@pytest.mark.parametrize("scheduler", options("scheduler"))
def test_every_scheduler_sets_the_learning_rate(tmp_path: Path, scheduler: str):
    validated = ("trainer.limit_val_batches=1", "+trainer.val_check_interval=1") if scheduler == "plateau" else ()
    words = (f"scheduler={scheduler}", "model=mlp", "optimizer.lr=0.5", *TWO_STEPS, *validated)
    run = run_of(tmp_path, silent(*words))
    train_two_steps(run)
    [group, *others] = run.trainer.optimizers[0].param_groups
    assert 0 <= group["lr"] <= 0.5
    assert all(other["lr"] == group["lr"] for other in others)

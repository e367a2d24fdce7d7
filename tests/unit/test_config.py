"""What the check of a configuration finds, and what a configuration out of a checkpoint may build."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
from annotated_types import Ge
from omegaconf import OmegaConf

from espalier.config import check, compose, conf_dir, inherit, overrides
from espalier.config.overrides import parse
from espalier.config.ranges import Count, Positive, Rate
from espalier.errors import ConfigError
from espalier.trust import targets
from espalier.trust.targets import check_stored


def toy(
    sizes: Sequence[Count], name: Literal["a", "b"], share: Rate | None, scale: Positive, table: Mapping[str, int]
) -> None:
    """A target with one argument of each kind."""


GOOD = {"sizes": [1, 2], "name": "a", "share": None, "scale": 2, "table": {"x": 1}}


def problems(node: Mapping[str, Any], *, untrusted: bool = False) -> list[str]:
    try:
        (check_stored if untrusted else check.check)(OmegaConf.create({"toy": {"_target_": f"{__name__}.toy", **node}}))
    except ConfigError as error:
        return str(error).splitlines()
    return []


def test_values_that_fit_the_signature_pass():
    assert problems(GOOD) == []
    assert problems({**GOOD, "sizes": [], "name": "b", "share": 0.0, "scale": 1e-9}) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sizes": [1, 0]}, "toy.sizes=[1, 0]: should be greater than or equal to 1"),
        ({"sizes": 3}, "toy.sizes=3: should be a list"),
        ({"name": "c"}, "toy.name=c: should be 'a' or 'b'"),
        ({"share": 1.0}, "toy.share=1.0: should be less than 1"),
        ({"scale": 0}, "toy.scale=0: should be greater than 0"),
        ({"scale": "2"}, "toy.scale=2: should be a valid number"),
        ({"scale": True}, "toy.scale=True: should be a valid number"),
        ({"table": {"x": "y"}}, "toy.table={'x': 'y'}: should be a valid integer"),
        ({"table": {1: 2}}, "toy.table={1: 2}: the key 1 has to be a word, as in '1': 2"),
        ({"table": {"x": 2**63}}, f"toy.table.x={2**63}: should be between "),
        ({"scale": float("inf")}, "toy.scale=inf: should be finite"),
        ({"sizes": [2**31]}, "toy.sizes=[2147483648]: should be less than or equal to 2147483647"),
        ({"scale": "???"}, "toy.scale: needs a value, there is no default; say toy.scale=VALUE"),
    ],
)
def test_a_value_that_does_not_fit_is_one_line_with_its_key(change: Mapping[str, Any], line: str):
    [found] = problems({**GOOD, **change})
    assert found.startswith(line)


def test_all_problems_are_found_at_once():
    assert len(problems({"sizes": [0], "nmae": "a", "share": 2.0, "scale": -1})) == 3 + 1 + 2  # and two are missing


def test_a_key_that_nothing_takes_is_named_with_the_nearest():
    [unknown, missing] = problems({**{key: value for key, value in GOOD.items() if key != "scale"}, "scael": 1.0})
    assert unknown.startswith("toy.scael: no such key; did you mean scale?")
    assert missing.startswith("toy.scale: missing")


@pytest.mark.parametrize("group", ["model", "callbacks.x", "logger.x"])
def test_what_is_to_be_built_needs_a_target(group: str):
    cfg = OmegaConf.create({})
    OmegaConf.update(cfg, group, {"width": 3})
    with pytest.raises(ConfigError, match=rf"^{group}\._target_: missing"):
        check.check(cfg)


@pytest.mark.parametrize("target", ["espalier.models.resnet", "espalier.seeding.GOLDEN"])
def test_a_target_that_cannot_be_called_is_refused(target: str):
    with pytest.raises(ConfigError, match="neither a class nor a function"):
        check.check(OmegaConf.create({"model": {"_target_": target}}))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "pathlib.Path.touch",
        "espalier.cli.entry.shutil.rmtree",  # a trusted module, but only as a way to another one
        "espalier.reporting.provenance.subprocess.run",
        "espalier.config.check.import_module",
        "torch.optim.lr_scheduler.warnings.warn",
        "lightning.pytorch.callbacks.model_checkpoint.os.remove",
    ],
)
def test_a_checkpoint_can_name_only_what_was_made_for_it(target: str):
    with pytest.raises(ConfigError, match=r"^model\._target_=.*checkpoint"):
        check_stored(OmegaConf.create({"model": {"_target_": target}}))


@pytest.mark.parametrize(
    ("group", "node"),
    [
        ("model", {"_target_": "espalier.serving.settings.Settings"}),
        ("model", {"_target_": "espalier.callbacks.monitor.Monitor"}),
        ("data", {"_target_": "espalier.data.module.pick"}),
        ("data", {"_target_": "espalier.data.loaders.Batch"}),
        ("callbacks", {"x": {"_target_": "espalier.loggers.csv_log.CsvLog"}}),
        ("callbacks", {"x": {"_target_": "lightning.pytorch.callbacks.lambda_function.LambdaCallback"}}),
        ("callbacks", {"x": {"_target_": "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint"}}),
        ("logger", {"x": {"_target_": "espalier.loggers.wandb_log.mode"}}),
        ("scheduler", {"_target_": "torch.optim.lr_scheduler.partial"}),
        ("scheduler", {"_target_": "torch.optim.lr_scheduler.Counter"}),
        ("optimizer", {"_target_": "torch.optim.optimizer.Optimizer.step"}),
        ("trainer", {"_target_": "lightning.pytorch.strategies.deepspeed.DeepSpeedStrategy"}),
        ("task", {"_target_": "espalier.tasks.serve.serve"}),
        ("unknown", {"_target_": "espalier.models.mlp.MLP"}),
        ("model", {"_target_": ["espalier.models.mlp.MLP"]}),
        ("model", {"_target_": "espalier.models..mlp.MLP"}),
    ],
)
def test_a_checkpoint_can_build_in_each_group_only_what_belongs_there(group: str, node: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"\._target_=.*not built from a checkpoint"):
        check_stored(OmegaConf.create({group: node}))


@pytest.mark.parametrize("value", ["/etc/x", "~/x", "a/../../x", "s3://bucket/x", "C:\\x", "file::/x"])
def test_a_checkpoint_chooses_no_place_that_is_written_to(value: str):
    node = OmegaConf.create({"callbacks": {"checkpoint": {"filename": value}}})
    with pytest.raises(ConfigError, match=r"^callbacks\.checkpoint\.filename=.*: a place that no checkpoint chooses"):
        check_stored(node)


@pytest.mark.parametrize(
    ("group", "options"), [(group, options) for group, options in conf_dir.groups().items() if group in targets.BASES]
)
def test_each_option_can_come_out_of_a_checkpoint(group: str, options: list[str]):
    for option in options:
        chosen = f"[{option}]" if group in ("callbacks", "logger", "compression") and option != "none" else option
        words = [f"{group}={chosen}", *(["data.path=x"] if option in ("hub_images", "text") else [])]
        check_stored(compose.compose(words))


def test_every_option_can_come_out_of_a_checkpoint():
    check_stored(compose.compose(["callbacks=[default,ema,early_stopping]", "strategy=fsdp"]))


def test_a_checkpoint_may_not_read_the_environment():
    node = OmegaConf.create({"model": {"_target_": "espalier.models.mlp.MLP", "hidden": "${oc.env:HOME}"}})
    with pytest.raises(ConfigError, match="may not interpolate"):
        check_stored(node)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("espalier.models.resnet.ResNett", "did you mean espalier.models.resnet.ResNet?"),
        ("espalier.modles.resnet.ResNet", "did you mean espalier.models?"),
        ("nowhere.Net", "there is no package nowhere"),
    ],
)
def test_a_name_that_stands_for_nothing_is_answered_with_the_nearest(name: str, expected: str):
    with pytest.raises(ConfigError, match=expected.replace("?", r"\?")):
        check.locate(name)


def test_the_name_of_a_class_or_of_something_inside_it_is_found():
    assert check.locate("espalier.spec.DataSpec.to_dict").__qualname__ == "DataSpec.to_dict"
    assert check.locate("annotated_types.Ge") is Ge


def test_each_swept_value_is_composed_once():
    words = ["model=mlp,cnn", "seed=range(0,3)", "trainer.max_epochs=1", "optimizer.betas=[0.9,0.99]"]
    found = [set(trial) for trial in overrides.trials(words)]
    kept = {"trainer.max_epochs=1", "optimizer.betas=[0.9,0.99]"}
    assert all(kept <= trial for trial in found)
    assert {word for trial in found for word in trial - kept} == {
        "model=mlp",
        "model=cnn",
        "seed=0",
        "seed=1",
        "seed=2",
    }


STORED = compose.compose(["model=mlp", "model.hidden=[7]", "data.batch_size=32", "seed=5", "trainer.max_epochs=3"])


def test_a_source_brings_its_network_and_data_but_not_its_trainer():
    now = inherit.from_source(compose.compose([]), OmegaConf.to_container(STORED), [], may_change=())
    assert (now.model.hidden, now.data.batch_size) == ([7], 32)
    assert (now.seed, now.trainer.max_epochs) == (0, 30)


def test_knobs_of_the_data_stay_open_and_the_network_closed():
    stored = OmegaConf.to_container(STORED)
    words = ["data.batch_size=8"]
    now = inherit.from_source(compose.compose(words), stored, parse(words), may_change=())
    assert (now.data.batch_size, now.model.hidden) == (8, [7])
    with pytest.raises(ConfigError, match=r"^model\.hidden=\[9\]: model comes from source"):
        inherit.from_source(compose.compose(["model=mlp"]), stored, parse(["model.hidden=[9]"]), may_change=())


def test_a_warm_start_may_choose_another_data_set_and_keeps_the_model():
    words = ["data=synthetic_images", "data.num_classes=3"]
    stored = OmegaConf.to_container(STORED)
    now = inherit.from_source(compose.compose(words), stored, parse(words), may_change=inherit.NETWORK)
    assert (now.data.num_classes, now.model.hidden) == (3, [7])
    assert now.data._target_ == "espalier.data.synthetic_images.SyntheticImages"


def test_a_resumed_run_keeps_everything_but_what_the_trainer_is_told():
    words = ["trainer.max_epochs=9", "resume=somewhere"]
    now = inherit.from_resumed(compose.compose(words), OmegaConf.to_container(STORED), parse(words))
    assert (now.trainer.max_epochs, now.model.hidden, now.seed, now.resume) == (9, [7], 5, "somewhere")
    with pytest.raises(ConfigError, match=r"^seed=6: resume continues"):
        inherit.from_resumed(compose.compose(["seed=6"]), OmegaConf.to_container(STORED), parse(["seed=6"]))


def test_repeating_what_a_resumed_run_was_configured_with_is_no_error():
    words = ["model=mlp", "model.hidden=[7]", "seed=5"]
    assert inherit.from_resumed(compose.compose(words), OmegaConf.to_container(STORED), parse(words)).seed == 5

"""The order of methods, the history and its replay, without any training."""

import pytest
from torch import nn

from espalier.compression.base import Compression, Stage, check_recipe, methods, replay, stage_of, without_teacher
from espalier.compression.weight_only import WeightOnly
from espalier.errors import ConfigError
from espalier.models.mlp import MLP


def model() -> nn.Module:
    return MLP((4,), 3, [8], "relu", "none", 0.0)


def test_every_method_has_one_stage_and_they_are_listed_in_that_order():
    stages = [stage_of(method) for method in methods()]
    assert len(stages) >= 8
    assert stages == sorted(stages)
    assert set(stages) == set(Stage)


@pytest.mark.parametrize("recipe", [[], ["qat"], ["prune_channels", "low_rank", "prune_nm", "distill", "qat"]])
def test_structure_masks_distillation_quantization_is_a_good_order(recipe: list[str]):
    check_recipe(recipe, [])


def test_a_wrong_order_is_answered_with_the_right_one():
    with pytest.raises(ConfigError, match=r"say compression=\[prune_channels,distill,qat\]"):
        check_recipe(["qat", "prune_channels", "distill"], [])


@pytest.mark.parametrize("name", ["replay", "finalize", "apply", "stage"])
def test_a_method_without_a_part_of_the_contract_cannot_be_defined(name: str):
    parts = {part: vars(WeightOnly)[part] for part in ("replay", "finalize", "apply", "stage")}
    assert issubclass(type("Whole", (Compression,), parts), Compression)
    del parts[name]
    with pytest.raises(ConfigError, match=rf"\.Half has no {name}; see docs/compression_methods"):
        type("Half", (Compression,), parts)


@pytest.mark.parametrize("recipe", [["qat", "ptq"], ["prune_magnitude", "prune_nm"]])
def test_rivals_exclude_each_other(recipe: list[str]):
    with pytest.raises(ConfigError, match=f"{recipe[0]} and {recipe[1]} exclude each other"):
        check_recipe(recipe, [])


@pytest.mark.parametrize("recipe", [["prune_channels"], ["prune_magnitude"], ["distill"], ["qat"]])
def test_nothing_comes_after_quantization(recipe: list[str]):
    with pytest.raises(ConfigError, match="source went through qat already"):
        check_recipe(recipe, [{"method": "qat"}])


def test_a_distillation_left_nothing_behind_and_hinders_nothing():
    check_recipe(["prune_channels", "distill"], [{"method": "distill"}])


def test_masks_may_grow_in_a_chain_of_runs_but_channels_come_first():
    check_recipe(["prune_magnitude"], [{"method": "prune_channels"}, {"method": "prune_magnitude"}])
    with pytest.raises(ConfigError, match="source went through prune_magnitude already"):
        check_recipe(["prune_channels"], [{"method": "prune_magnitude"}])


@pytest.mark.parametrize("method", ["nowhere", "base", "../qat", "os", "None"])
def test_a_ledger_names_methods_of_this_package_alone(method: str):
    with pytest.raises(ConfigError, match="no such method"):
        replay(model(), [{"method": method}])


def test_a_ledger_of_another_architecture_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="does not fit this architecture"):
        replay(model(), [{"method": "low_rank", "ranks": {"stages.0": 3}}])


def test_a_new_run_starts_without_the_adapters_of_a_teacher():
    fresh = model()
    names = list(fresh.state_dict())
    entry = {"method": "distill", "adapters": {"layers": [8, 16, "linear"]}}
    student = replay(fresh, [entry])
    assert len(student.state_dict()) > len(names)
    alone, history = without_teacher(student, [{"method": "low_rank", "ranks": {}}, entry])
    assert list(alone.state_dict()) == names
    assert [kept["method"] for kept in history] == ["low_rank"]

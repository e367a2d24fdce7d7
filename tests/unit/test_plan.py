"""The numbers of a training before it begins, counted by hand, and the limits that leave nothing of it."""

from types import SimpleNamespace
from typing import Any

import pytest

from espalier.composition import plan
from espalier.errors import ConfigError


def planned(train: int = 1151, batch_size: int = 64, world_size: int = 1, **limits: Any) -> plan.Plan:
    """With 287 validation and 359 test samples."""
    whole = {"limit_train_batches": 1.0, "limit_val_batches": 1.0, "limit_test_batches": 1.0, "max_steps": -1}
    whole |= {"max_epochs": 30, "val_check_interval": 1.0, "check_val_every_n_epoch": 1, "accumulate_grad_batches": 1}
    splits = SimpleNamespace(train=range(train), val=range(287), test=range(359))
    trainer: Any = SimpleNamespace(world_size=world_size, **(whole | limits))
    data: Any = SimpleNamespace(splits=splits, batch_size=batch_size)
    return plan.of_training(trainer, data, is_tested=True)


@pytest.mark.parametrize(
    ("knobs", "steps_per_epoch", "num_steps"),
    [
        ({}, 17, 510),
        ({"accumulate_grad_batches": 5}, 4, 120),  # the last one of an epoch takes what is left
        ({"max_steps": 40}, 17, 40),
        ({"max_steps": 40, "max_epochs": -1}, 17, 40),
        ({"max_steps": 900}, 17, 510),
        ({"limit_train_batches": 3}, 3, 90),
        ({"limit_train_batches": 0.5}, 8, 240),
        ({"world_size": 2}, 8, 240),
        ({"batch_size": 1151}, 1, 30),
    ],
)
def test_steps_are_those_that_are_taken(knobs: dict[str, Any], steps_per_epoch: int, num_steps: int):
    found = planned(**knobs)
    assert (found.steps_per_epoch, found.num_steps) == (steps_per_epoch, num_steps)


def test_what_is_said_names_samples_steps_and_batch_size():
    samples, steps = planned(world_size=2).lines
    assert samples == "1151 training, 287 validation and 359 test samples"
    assert steps == "8 steps per epoch, 240 in all, batch size 64 on each of 2 devices"


@pytest.mark.parametrize(
    ("knobs", "parts"),
    [
        ({"train": 640}, []),
        ({"train": 639}, [("an epoch has only 9 batches", "data.batch_size=63 makes 10"), ("leaves out 63 of 639",)]),
        ({"train": 670, "batch_size": 64}, []),
        ({"train": 700, "batch_size": 60}, [("leaves out 40 of 700 training samples (5.7 %)", "data.batch_size=58")]),
        ({"train": 1330, "batch_size": 60, "world_size": 2}, []),
        ({"train": 9, "batch_size": 1}, []),  # nothing would help
        ({"train": 700, "batch_size": 60, "limit_train_batches": 2}, []),  # by the limit, which leaves out more
    ],
)
def test_few_batches_and_many_samples_left_out_are_said_with_a_remedy(knobs: dict[str, Any], parts: list[tuple[str]]):
    warnings = list(planned(**knobs).warnings)
    assert len(warnings) == len(parts)
    for warning, expected in zip(warnings, parts, strict=True):
        assert all(part in warning for part in expected), warning


@pytest.mark.parametrize(
    ("train", "batch_size", "world_size"), [(1151, 64, 1), (97, 31, 1), (500, 100, 2), (45, 20, 2)]
)
def test_the_remedies_help(train: int, batch_size: int, world_size: int):
    for warning in planned(train, batch_size, world_size).warnings:
        better = int(warning.rpartition("data.batch_size=")[2].split()[0])
        again = list(planned(train, better, world_size).warnings)
        assert not [one for one in again if one.split()[:3] == warning.split()[:3]]


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ({"max_epochs": 0}, "trainer.max_epochs=0: trains nothing"),
        ({"max_steps": 0}, "trainer.max_steps=0: trains nothing"),
        ({"max_epochs": -1}, "trainer.max_epochs=-1: a schedule needs an end"),
        ({"limit_train_batches": 0}, "trainer.limit_train_batches=0: trains nothing"),
        (
            {"limit_train_batches": 1e-4},
            "trainer.limit_train_batches=0.0001: of 17 batches this is none; say at least 0.0589",
        ),
        ({"limit_val_batches": 0.19}, "trainer.limit_val_batches=0.19: of 5 batches this is none; say at least 0.2"),
        ({"limit_test_batches": 0.1}, "trainer.limit_test_batches=0.1: of 6 batches this is none; say at least 0.1667"),
        ({"limit_test_batches": 0}, "trainer.limit_test_batches=0: the report would hold no number"),
        ({"val_check_interval": 18}, "trainer.val_check_interval=18: an epoch has 17 batches"),
        ({"val_check_interval": 9, "limit_train_batches": 8}, "trainer.val_check_interval=9: an epoch has 8 batches"),
        ({"batch_size": 1152}, "data.batch_size=1152: there are only 1151 training samples"),
    ],
)
def test_limits_that_leave_nothing_to_do_are_refused(limits: dict[str, Any], line: str):
    with pytest.raises(ConfigError) as refused:
        planned(**limits)
    assert str(refused.value).startswith(line)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "limits",
    [
        {"limit_val_batches": 0},
        {"limit_val_batches": 0.2},
        {"limit_train_batches": 0.0589},
        {"limit_train_batches": 1},
        {"val_check_interval": 17},
        {"val_check_interval": 1000, "check_val_every_n_epoch": None},
        {"val_check_interval": 0.01},
        {"max_epochs": None},
    ],
)
def test_limits_that_leave_something_pass(limits: dict[str, Any]):
    planned(**limits)

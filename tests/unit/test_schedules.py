import io
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from espalier.optim.build import build_scheduler
from espalier.optim.schedules import cosine, one_cycle, step_decay, warmup_cosine, warmup_stable_decay

CONF = Path(__file__).parents[2] / "conf" / "scheduler"
SCHEDULERS = sorted(file.stem for file in CONF.glob("*.yaml"))


def option(name: str) -> partial[Any]:
    return instantiate(OmegaConf.load(CONF / f"{name}.yaml"), _convert_="all")


def sgd(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_promised_schedulers_are_there():
    assert " ".join(SCHEDULERS) == "constant cosine one_cycle plateau step warmup_cosine warmup_stable_decay"


def test_the_factor_is_one_at_the_end_of_every_warm_up():
    assert warmup_cosine(10, 100, warmup=0.1, final=0.0) == 1.0
    assert one_cycle(30, 100, warmup=0.3, start=0.04, final=0.0) == 1.0
    assert warmup_stable_decay(10, 100, warmup=0.1, decay=0.2, final=0.0) == 1.0


def test_a_warm_up_is_a_line_that_does_not_start_at_zero():
    factors = [warmup_cosine(step, 100, warmup=0.04, final=0.0) for step in range(4)]
    torch.testing.assert_close(factors, [0.2, 0.4, 0.6, 0.8])


def test_a_cosine_agrees_with_torchs_cosine_annealing():
    optimizer = sgd(lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.25)
    for step in range(21):
        assert cosine(step, 20, final=0.25) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_one_cycle_agrees_with_torchs_one_cycle():
    optimizer = sgd(lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=1.0,
        total_steps=21,
        pct_start=7 / 21,
        div_factor=25,
        final_div_factor=1e4,
        cycle_momentum=False,
    )  # torch arrives at its step 20 and peaks at pct_start * 21 - 1 = 6
    for step in range(20):
        assert one_cycle(step, 20, warmup=0.3, start=0.04, final=4e-6) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_steps_fall_at_their_shares_of_the_run():
    factors = [step_decay(step, 8, milestones=[0.5, 0.75], gamma=0.1) for step in range(8)]
    assert factors == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_warmup_stable_decay_is_flat_between_its_ends_and_falls_as_one_minus_a_root():
    factors = [warmup_stable_decay(step, 20, warmup=0.1, decay=0.2, final=0.2) for step in range(21)]
    assert factors[:2] == pytest.approx([1 / 3, 2 / 3])
    assert factors[2:17] == [1.0] * 15
    assert factors[17:] == pytest.approx([0.6, 1 - 0.8 * math.sqrt(0.5), 1 - 0.8 * math.sqrt(0.75), 0.2])


def test_a_warm_up_and_a_decay_longer_than_the_run_are_refused():
    with pytest.raises(ValueError, match="at most 1"):
        warmup_stable_decay(0, 10, warmup=0.6, decay=0.5, final=0.0)


@pytest.mark.parametrize("total_steps", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "plateau"])
def test_every_schedule_rises_to_its_peak_falls_after_it_and_stays_within_zero_and_one(name, total_steps):
    optimizer = sgd(lr=2.0)
    (factor,) = build_scheduler(option(name), optimizer, total_steps, "val/loss", "min")["scheduler"].lr_lambdas
    factors = [factor(step) for step in range(total_steps + 2)]
    peak = factors.index(max(factors))
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_resumes_from_a_plain_state(name):
    def build() -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        optimizer = sgd(lr=2.0)
        return optimizer, build_scheduler(option(name), optimizer, 20, "val/loss", "min")

    def advance(optimizer: torch.optim.Optimizer, entry: dict[str, Any], steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            optimizer.step()
            entry["scheduler"].step(*([1.0] if entry["interval"] == "epoch" else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    unbroken = advance(*build(), 20)
    optimizer, entry = build()
    first = advance(optimizer, entry, 9)
    stored = through_a_file({"scheduler": entry["scheduler"].state_dict(), "optimizer": optimizer.state_dict()})
    optimizer, entry = build()
    optimizer.load_state_dict(stored["optimizer"])
    entry["scheduler"].load_state_dict(stored["scheduler"])
    assert first + advance(optimizer, entry, 11) == unbroken


def test_a_step_of_a_schedule_costs_a_handful_of_python_calls():
    optimizer = sgd(lr=2.0)
    entry = build_scheduler(option("warmup_cosine"), optimizer, 40, "val/loss", "min")
    (factor,) = entry["scheduler"].lr_lambdas
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event == "call" else None)
    factor(20)
    sys.setprofile(None)
    assert len(calls) <= 10  # through the partial that Hydra makes: hundreds


def test_schedules_count_steps_and_start_at_their_first_factor():
    optimizer = sgd(lr=2.0)
    entry = build_scheduler(option("warmup_cosine"), optimizer, 40, "val/loss", "min")
    assert entry["interval"] == "step"
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 / 5)  # warm-up of 4 steps


@pytest.mark.parametrize(("mode", "better"), [("min", -1.0), ("max", 1.0)])
def test_a_plateau_lowers_the_rate_only_when_the_monitored_value_stops_improving(mode, better):
    optimizer = sgd(lr=1.0)
    entry = build_scheduler(option("plateau"), optimizer, 40, "val/accuracy", mode)
    assert (entry["interval"], entry["monitor"]) == ("epoch", "val/accuracy")
    for epoch in range(5):
        entry["scheduler"].step(10 + better * epoch)
    assert optimizer.param_groups[0]["lr"] == 1.0
    for _ in range(4):  # one more than the patience of 3
        entry["scheduler"].step(10 - better)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)

"""Latency is compared in turns, and what disturbs a few calls does not count."""

from itertools import count
from pathlib import Path
from time import sleep

import numpy as np
import pytest

from espalier.profiling import latency
from espalier.profiling.latency import Latency
from espalier.reporting import figures


def work(amount: int) -> int:
    return sum(range(amount))


def test_four_times_the_work_takes_about_four_times_as_long():
    calls = {"once": lambda: work(2_000), "four times": lambda: work(8_000), "again": lambda: work(2_000)}
    compared = latency.compare(calls, rounds=9)
    assert list(compared) == list(calls)
    assert compared["once"].ratio == 1
    assert compared["four times"].ratio == pytest.approx(4, rel=0.4)
    assert compared["again"].ratio == pytest.approx(1, rel=0.3)


def test_a_few_slow_calls_move_the_tail_and_not_the_median():
    calls = count()
    compared = latency.compare({"disturbed": lambda: sleep(0.02) if next(calls) % 8 == 0 else None}, rounds=9)
    assert compared["disturbed"].p50 < 1
    assert compared["disturbed"].p95 > 19  # 12.5 % of calls take 20 ms


def test_candidates_take_turns_in_each_round():
    order: list[str] = []
    latency.compare({name: lambda name=name: (order.append(name), sleep(0.001)) for name in "ab"}, rounds=3)
    turns = "".join(name for name, before in zip(order, ["", *order], strict=False) if name != before)
    assert turns == "ab" * 4  # once to warm up


def test_percentiles_are_those_of_the_calls():
    turns = [np.arange(1.0, 101.0), np.arange(101.0, 201.0)]  # 1 to 200 ms
    first = [np.full(3, 101.0), np.full(3, 75.25)]
    timed = latency.summary(turns, first)
    assert (timed.p50, timed.num_calls) == (100.5, 200)
    assert timed.p95 == pytest.approx(190.05)  # 0.95 * 199 places above the lowest
    assert timed.p99 == pytest.approx(198.01)
    assert timed.calls_per_second == pytest.approx((1000 / 50.5 + 1000 / 150.5) / 2)
    assert timed.ratio == pytest.approx((0.5 + 2) / 2)  # the median over rounds, not that of all calls


def test_a_first_call_that_compiles_does_not_make_turns_short():
    calls = count()
    timed = latency.compare({"lazy": lambda: sleep(0.3) if next(calls) == 0 else None}, rounds=3)["lazy"]
    assert timed.num_calls > 100 * latency.MIN_CALLS


def test_a_report_holds_milliseconds():
    timed = Latency(1.5, 2.0, 3.0, ratio=0.5, calls_per_second=600.0, num_calls=200)
    assert timed.to_dict() == {"p50": 1.5, "p95": 2.0, "p99": 3.0}


@pytest.mark.parametrize("step", [0, 1, 20])
def test_the_trade_off_is_drawn_whether_rows_are_equal_or_far_apart(step: int, tmp_path: Path):
    rows = [
        {
            "name": f"row{place}",
            "metrics": {"test/loss": 0.1, "test/accuracy": 0.9 + 0.001 * step * place},
            "latency_ms": {"1": {"p50": 0.1 + step * place, "p95": 0.2 + step * place}},
            "size_bytes": 1000 + 10_000 * step * place,
        }
        for place in range(4)
    ]
    figures.trade_off(rows, tmp_path / "trade_off.png")
    assert (tmp_path / "trade_off.png").stat().st_size > 10_000


def test_sensitivity_is_drawn_for_many_layers_and_for_one(tmp_path: Path):
    figures.sensitivity({f"layer{place}": 1 / (place + 1) for place in range(60)}, tmp_path / "many.png")
    figures.sensitivity({"head": -0.01}, tmp_path / "one.png")
    assert (tmp_path / "many.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 1_000

"""Compare how long calls take, on a machine that does other things as well.

Another process steals milliseconds from a few calls: the median of single calls does not see it, a mean would.
Clock speed and neighbours drift over seconds: candidates take turns, so that a slow round slows all of them, and
their ratio within a round stays.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.config.ranges import Count

WARM_UP_S = 0.1  # caches, allocators and the clock of the processor
TURN_S = 0.02  # one candidate's part of a round: short against the drift, long against a context switch
MIN_CALLS = 5  # of a turn; a median of fewer would be one call's luck
MS = 1e3


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call, and the ratio to those of the first candidate."""

    p50: float
    p95: float
    p99: float
    ratio: float  # 1 for the first candidate; below 1 is faster
    calls_per_second: float  # one after the other: the median over rounds
    num_calls: int  # that were timed

    def to_dict(self) -> dict[str, float]:
        """Return the values as a report holds them."""
        return {"p50": self.p50, "p95": self.p95, "p99": self.p99}


def compare(calls: Mapping[str, Callable[[], Any]], rounds: Count) -> dict[str, Latency]:
    """Return percentiles over all calls of each candidate, and the median over rounds of the ratio of median latencies.

    A call has to be finished when it returns.
    """
    num_calls = {name: _warm_up(call) for name, call in calls.items()}
    turns_ms: dict[str, list[NDArray[np.float64]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            turns_ms[name].append(_turn(call, num_calls[name]))
    first = next(iter(turns_ms.values()))
    return {name: summary(turns, first) for name, turns in turns_ms.items()}


def summary(turns_ms: Sequence[NDArray[np.float64]], first_ms: Sequence[NDArray[np.float64]]) -> Latency:
    """Summarise the calls of one candidate, an array per round, against those of the first candidate."""
    calls_ms = np.concatenate(turns_ms)
    p50, p95, p99 = (float(value) for value in np.percentile(calls_ms, [50, 95, 99]))
    ratios = [np.median(turn) / np.median(first) for turn, first in zip(turns_ms, first_ms, strict=True)]
    calls_per_second = float(np.median([MS / turn.mean() for turn in turns_ms]))
    return Latency(p50, p95, p99, float(np.median(ratios)), calls_per_second, len(calls_ms))


def _warm_up(call: Callable[[], Any]) -> int:
    """Warm up a candidate; return the number of calls that make up its turn."""
    call()  # the first one may compile for seconds, and says nothing about the next
    start, num_calls = perf_counter(), 0
    while (passed := perf_counter() - start) < WARM_UP_S or num_calls < MIN_CALLS:
        call()
        num_calls += 1
    return max(MIN_CALLS, round(num_calls * TURN_S / passed))


def _turn(call: Callable[[], Any], num_calls: int) -> NDArray[np.float64]:
    """Time `num_calls` calls in a row; return milliseconds per call."""
    stamps = np.empty(num_calls + 1)
    stamps[0] = perf_counter()
    for place in range(num_calls):
        call()
        stamps[place + 1] = perf_counter()
    return np.diff(stamps) * MS

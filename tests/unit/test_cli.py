import os

import pytest

from espalier.cli import entry


@pytest.mark.parametrize(("load", "chosen"), [(0.2, None), (64.0, "PASSIVE")])
def test_threads_sleep_while_they_wait_where_the_machine_is_busy(monkeypatch: pytest.MonkeyPatch, load, chosen):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    entry._choose_wait_policy()
    assert os.environ.get("OMP_WAIT_POLICY") == chosen
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


def test_the_user_decides_how_threads_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(os, "getloadavg", lambda: (64.0, 64.0, 64.0))
    entry._choose_wait_policy()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_flags_may_stand_anywhere():
    flags, words = entry._split_flags(["task=train", "-m", "seed=0,1", "--cfg", "job", "model=cnn"])
    assert flags == ["-m", "--cfg", "job"]
    assert words == ["task=train", "seed=0,1", "model=cnn"]

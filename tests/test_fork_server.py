"""A copy of the fork server behaves as `python WORDS` does: words, streams, exit code, signals, and its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import launch
from helpers import forked

TELL = "import os, sys; print(sys.argv, os.getcwd(), os.environ.get('TOLD'), sys.path[0], sys.executable, __name__)"


def start(text: str, folder: Path, **settings) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", text]
    return forked.Popen(words, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)


@pytest.mark.parametrize("way", ["-c", "-m", "script"])
def test_a_program_is_told_what_python_tells_it(tmp_path: Path, way: str):
    (tmp_path / "tell.py").write_text(TELL)
    first = {"-c": ["-c", TELL], "-m": ["-m", "tell"], "script": ["tell.py"]}[way]
    told, words = {**os.environ, "TOLD": "yes"}, [*first, "--word", "a b"]
    plain = subprocess.run([sys.executable, *words], cwd=tmp_path, env=told, capture_output=True, text=True)
    copied = forked.run(words, cwd=tmp_path, env=told)
    assert (copied.returncode, copied.stdout, copied.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert copied.stdout.endswith("__main__\n")


@pytest.mark.parametrize(
    "text",
    [
        "import sys; sys.exit(7)",
        "import sys; sys.exit('said last')",
        "import atexit; atexit.register(print, 'at the end'); print('first')",
        "import os; os._exit(3)",
        "raise KeyboardInterrupt",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import threading; threading.Timer(0.1, print, ['from a thread']).start()",
        "import sys; print(input() + '!')",
    ],
)
def test_it_ends_as_python_does(tmp_path: Path, text: str):
    plain = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, input="given")
    copied = start(text, tmp_path, stdin=subprocess.PIPE)
    out, _ = copied.communicate("given", timeout=60)
    assert (copied.returncode, out) == (plain.returncode, plain.stdout)


def test_an_error_prints_its_traceback(tmp_path: Path):
    done = forked.run(["-c", "def fail():\n    raise ValueError('the moon is wrong')\nfail()"], cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("in fail\nValueError: the moon is wrong\n")


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_reaches_it(tmp_path: Path, name: str):
    process = start("import time; print('listens', flush=True); time.sleep(60)", tmp_path)
    assert process.stdout
    assert process.stdout.readline() == "listens\n"
    assert process.poll() is None
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=60)
    assert process.returncode == -getattr(signal, name)


def test_it_has_torch_already_and_a_thread_and_memory_of_its_own(tmp_path: Path):
    text = "import sys; assert 'lightning' in sys.modules; import threading; print(threading.active_count())"
    assert forked.run(["-c", text], cwd=tmp_path).stdout == "1\n"
    forked.run(["-c", "import torch; torch.left_behind = True"], cwd=tmp_path).check_returncode()
    assert forked.run(["-c", "import torch; print(hasattr(torch, 'left_behind'))"], cwd=tmp_path).stdout == "False\n"


def test_random_numbers_differ_between_copies(tmp_path: Path):
    text = "import random, tempfile; print(random.random(), tempfile.mkdtemp())"
    assert len({forked.run(["-c", text], cwd=tmp_path).stdout for _ in range(3)}) == 3


def test_a_rank_that_a_copy_starts_is_a_copy_and_ends_with_it(tmp_path: Path):
    rank = "import os, sys, time; print('lightning' in sys.modules, os.getpid(), flush=True); time.sleep(60)"
    text = f"""
import os, subprocess, sys, time
environment = dict(os.environ, LOCAL_RANK="0")
subprocess.Popen([sys.executable, "-c", {rank!r}], env=environment, start_new_session=True)
time.sleep(60)
"""
    process = start(text, tmp_path)
    assert process.stdout
    is_copy, number = process.stdout.readline().split()
    assert is_copy == "True"
    process.kill()
    process.communicate(timeout=60)  # until nobody holds its output
    end = time.monotonic() + 60
    while Path("/proc", number).exists():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("changed", "is_copy"),
    [
        ({"TOLD": "yes"}, True),
        ({"HOME": "/nowhere"}, False),
        ({"OMP_NUM_THREADS": "2"}, False),
        ({"HF_HOME": "x"}, False),
    ],
)
def test_what_is_read_while_a_program_starts_takes_an_interpreter_of_its_own(
    tmp_path: Path, changed: dict[str, str], is_copy: bool
):
    (tmp_path / "look.py").write_text("import sys; print('lightning' in sys.modules)")
    assert launch(tmp_path, "look", **changed).stdout == f"{is_copy}\n"


def test_a_module_that_python_imports_first_takes_one_too(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text("print('began')")
    (tmp_path / "look.py").write_text("print('went on')")
    assert launch(tmp_path, "look", PYTHONPATH=str(tmp_path)).stdout == "began\nwent on\n"

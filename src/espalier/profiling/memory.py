"""Measure the peak memory of loading and running something, in a process that does nothing else.

The high-water mark of a process never falls, so each candidate gets a fresh one. What imports take is there before the
count starts: a candidate is charged for its weights, its activations and the working space of its runtime.
"""

import ctypes
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from espalier.config.ranges import Count
from espalier.signature import example
from espalier.spec import DataSpec

NUM_CALLS = 5  # allocators settle after the first two or three
MAX_SECONDS = 600
STATUS = Path("/proc/self/status")  # Linux
RESET = Path("/proc/self/clear_refs")
RESET_MARK = "5"  # proc(5): sets the high-water mark to the present use

Call = Callable[[], Any]
Load = Callable[[], Call]  # what is counted: returns the call that runs what it loaded
Prepare = Callable[[], Load]  # what is not: imports, and building what a user would not build


def peak_bytes(prepare: Prepare, threads: Count) -> int:
    """Return the bytes that `prepare()()` and a few calls of its result add to a fresh process, on their device.

    `prepare` is pickled, so it has to be a function of a module, or a `partial` of one with plain arguments.

    Raises:
        RuntimeError: the process ended without an answer; says its last words, or the signal that killed it.
    """
    words = [sys.executable, "-m", __name__]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(
            words, input=pickle.dumps(prepare), capture_output=True, timeout=MAX_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no answer in {MAX_SECONDS} s") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"its process ended with {done.returncode}" + (f": {said[-1]}" if said else ""))
    return int(done.stdout.split()[-1])


def on_example(load: Callable[[], Callable[..., Any]], spec: DataSpec, num: Count, device: torch.device) -> Load:
    """Return a function that loads a network with `load`, and returns a call of it on `num` samples without content."""
    inputs = example(spec, num, device)
    return lambda: partial(load(), *inputs)


def tensor_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of all parameters and buffers; shared ones count once."""
    storages = {value.untyped_storage().data_ptr(): value for value in module.state_dict().values()}
    return sum(value.numel() * value.element_size() for value in storages.values())


def _measure(load: Load) -> int:
    gc.collect()
    _return_free_pages()
    is_on_accelerator = torch.accelerator.is_available()
    if RESET.exists():
        RESET.write_text(RESET_MARK)
    before = _high_water_bytes()
    call = load()
    for _ in range(NUM_CALLS):
        call()
    if is_on_accelerator and (on_device := torch.accelerator.max_memory_allocated()):
        return on_device
    return _high_water_bytes() - before


def _return_free_pages() -> None:
    """Return free memory to the system, so that memory used from here on counts as new."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):  # glibc
        library.malloc_trim(0)


def _high_water_bytes() -> int:
    """Return the peak resident memory in bytes.

    On Linux `VmHWM` starts at zero; `ru_maxrss` would start at the value of the parent process.
    """
    if STATUS.exists():
        words = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")).split()
        return int(words[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


if __name__ == "__main__":
    from espalier.profiling import memory  # the pickle names that module, not this one

    print(memory._measure(pickle.load(sys.stdin.buffer)()))

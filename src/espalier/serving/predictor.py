"""Predict with a bundle: raw values in, probabilities out, by ONNX Runtime alone.

Letters: B batch, K classes (1 for a regression).
"""

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import orjson
from numpy.typing import NDArray

from espalier.errors import ConfigError
from espalier.export import bundle, session
from espalier.export.preprocess import normalise
from espalier.spec import DataSpec
from espalier.targets.kinds import kind_of

INPUT, OUTPUT = "input", "logits"  # tensors of every exported file
FORMAT = "onnx"
FLOAT = "tensor(float)"  # as the runtime calls float32
SILENT = 4  # those that end the process; others are raised, and told in our words
FIRST_S = 10.0  # at least, for the first sample
MAX_SIDES = 8  # of a sample
MAX_NUMBERS = 100_000_000  # of a sample: 400 MB
MAX_REASON = 200  # letters of somebody else's error in ours
PUBLIC = ("name", "run", "data", "preprocessing", "precision", "sample_by_sample", "formats", "files", "versions")


class Predictor:
    """The network of a bundle, ready to run, one call at a time."""

    def __init__(self, folder: Path, threads: int, time_limit_s: float = FIRST_S) -> None:
        """Read, verify and open the bundle, and try it on one sample.

        Raises:
            ConfigError: the bundle is damaged, holds no ONNX file or one that the runtime cannot open, contradicts
                itself, or does not answer within the limit.
        """
        self.bundle = bundle.read("source", folder)
        if FORMAT not in self.bundle.formats:
            raise ConfigError(
                f"source={folder}: holds {', '.join(self.bundle.formats)}, and a server runs onnx; "
                "export again with onnx in task.format=[...]"
            )
        try:
            self.spec = self.bundle.spec
            self.kind = kind_of(self.spec)
            self.public = {key: self.bundle.content.get(key) for key in PUBLIC}
            orjson.dumps(self.public)  # as every answer is written: no half characters, no endless numbers
            problem = _problem(self.spec)
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            problem = str(error).partition("\n")[0][:MAX_REASON]
        if problem:
            raise ConfigError(f"source={folder}: its description is wrong: {problem}; export it again")
        options = session.options(threads)
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave the cores alone
        self._running = onnxruntime.RunOptions()
        self._running.log_severity_level = SILENT
        try:
            self._session = session.opened(self.bundle.file(FORMAT), options)
        except Exception as error:  # the runtime's own classes share no base
            raise ConfigError(f"source={folder}: ONNX Runtime cannot open the network: {_first_line(error)}") from error
        if problem := self._misfit() or self._try(max(FIRST_S, time_limit_s)):
            raise ConfigError(f"source={folder}: the network cannot be served: {problem}; export it again")

    def interrupt(self) -> None:
        """Make the present call raise, if a thread is in one."""
        self._running.terminate = True

    def predict(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return probabilities (B, K) of raw samples (B, *shape).

        A regression gives values (B, 1) in the target's unit.
        """
        self._running.terminate = False
        x = normalise(self.spec, raw)
        if self.bundle.sample_by_sample:
            logits_BK = np.concatenate([self._run(sample) for sample in np.split(x, len(x))])
        else:
            logits_BK = self._run(x)
        return self.kind.answer(logits_BK)

    def _run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._session.run([OUTPUT], {INPUT: x}, self._running)[0]

    def _misfit(self) -> str | None:
        """Return what is wrong with the names, types and sizes of input and output, or None."""
        for given, name, shape in (
            (self._session.get_inputs(), INPUT, self.spec.shape),
            (self._session.get_outputs(), OUTPUT, (self.spec.num_outputs,)),
        ):
            named = {each.name: each for each in given}
            if name not in named or (name == INPUT and len(named) > 1):
                return f"it has {', '.join(map(repr, named)) or 'nothing'} in place of {name!r}"
            sizes = named[name].shape[1:]
            is_other = any(isinstance(size, int) and size != own for size, own in zip(sizes, shape, strict=False))
            if named[name].type != FLOAT or is_other or len(sizes) not in (0, len(shape)):  # 0: not known
                return f"{name!r} is {named[name].type} of {named[name].shape}, the data has (batch, {_sizes(shape)})"
        return None

    def _try(self, limit_s: float) -> str | None:
        """Return what is wrong with the output for the mean of the training data, or None."""
        mean = np.array(self.spec.mean, dtype=np.float32).reshape(-1, *[1] * (len(self.spec.shape) - 1))
        raw = np.broadcast_to(mean * np.float32(self.spec.scale), (1, *self.spec.shape))
        outcome: list[Any] = []

        def answer() -> None:
            try:
                for num in (1,) if self.bundle.sample_by_sample else (1, 2):
                    outcome[:] = [num, self.predict(np.repeat(raw, num, axis=0))]
            except Exception as error:
                outcome[:] = [num, error]

        thread = threading.Thread(target=answer, name="first sample", daemon=True)
        thread.start()
        thread.join(limit_s)
        if thread.is_alive():
            self.interrupt()
            thread.join(1)
            return f"it has not answered a sample within {limit_s:g} s"
        num, given = outcome
        if isinstance(given, Exception):
            return f"it does not answer a batch of {num}: {_first_line(given)}"
        if given.shape != (num, self.spec.num_outputs):
            wanted = f"{num}, {self.spec.num_outputs}"
            return f"it answers a batch of {num} with ({_sizes(given.shape)}) numbers, not ({wanted})"
        return None if np.isfinite(given).all() else "its answer to the mean of the training data is not finite"


def _problem(spec: DataSpec) -> str | None:
    """Return what is impossible in a spec, so that no request could be answered, or None."""
    if not 1 <= len(spec.shape) <= MAX_SIDES or min(spec.shape) < 1 or math.prod(spec.shape) > MAX_NUMBERS:
        return f"spec.shape: ({_sizes(spec.shape)}) is no shape of a sample"
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) not in (1, spec.shape[0]):
            return f"spec.{name}: {len(values)} values for {spec.shape[0]} channels or features"
    with np.errstate(over="ignore"):
        above = np.array([*spec.std, spec.scale, spec.target_std], dtype=np.float64).astype(np.float32)
        others = np.array([*spec.mean, spec.target_mean], dtype=np.float64).astype(np.float32)
    if above.min() <= 0:
        return "spec: std, scale and target_std must be above 0"
    if not np.isfinite([*above, *others]).all():
        return "spec: a number is beyond 32 bits"
    if len(set(spec.class_names)) != len(spec.class_names):
        twice = next(name for name in spec.class_names if spec.class_names.count(name) > 1)
        return f"spec.class_names: two classes have the name {twice!r}"
    return None


def _sizes(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:MAX_REASON]

"""Predict with a bundle: raw values in, probabilities out, by ONNX Runtime alone.

Letters: B batch, T tokens, K classes (1 for a regression).
"""

import math
import threading
from collections import Counter
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
from espalier.spec import FIRST, OUTPUT, PAD, UNKNOWN, Axis, DataSpec
from espalier.targets.kinds import kind_of

FORMAT = "onnx"
FLOAT, INT64 = "tensor(float)", "tensor(int64)"  # as the runtime calls them
SILENT = 4  # those that end the process; others are raised, and told in our words
FIRST_S = 10.0  # at least, for the first sample
MAX_SIDES = 8  # of a sample
MAX_NUMBERS = 100_000_000  # of a sample: 400 MB
MAX_LONGEST = 65_536  # tokens of a text
MAX_VOCABULARY = 1_000_000
BESIDE = 0.01  # largest change of an answer by longer texts beside it: 8 bits round to another step now and then
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
            self.public["data"] = _public(self.spec, self.bundle.content["data"])
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

    def predict(self, raw: NDArray[Any]) -> NDArray[np.float32]:
        """Return probabilities (B, K) of raw samples (B, *shape), or of token ids (B, T) padded to one length.

        A regression gives values (B, 1) in the target's unit.
        """
        self._running.terminate = False
        is_tokens = self.spec.input.is_tokens
        x = raw if is_tokens else normalise(self.spec, raw)
        if self.bundle.sample_by_sample:
            samples = np.split(x, len(x))
            if is_tokens:
                samples = [ids[:, : np.count_nonzero(ids != PAD)] for ids in samples]
            logits_BK = np.concatenate([self._run(sample) for sample in samples])
        else:
            logits_BK = self._run(x)
        return self.kind.answer(logits_BK)

    def _run(self, x: NDArray[Any]) -> NDArray[np.float32]:
        return self._session.run([OUTPUT], {self.spec.input.name: x}, self._running)[0]

    def _misfit(self) -> str | None:
        """Return what is wrong with the names, types and sizes of input and output, or None."""
        taken = self.spec.input
        for given, name, kind, shape in (
            (self._session.get_inputs(), taken.name, INT64 if taken.is_tokens else FLOAT, taken.shape),
            (self._session.get_outputs(), OUTPUT, FLOAT, (self.spec.num_outputs,)),
        ):
            named = {each.name: each for each in given}
            if name not in named or (name == taken.name and len(named) > 1):
                return f"it has {', '.join(map(repr, named)) or 'nothing'} in place of {name!r}"
            sizes = named[name].shape[1:]
            is_other = any(isinstance(size, int) and size != own for size, own in zip(sizes, shape, strict=False))
            if named[name].type != kind or is_other or len(sizes) not in (0, len(shape)):  # 0: not known
                return f"{name!r} is {named[name].type} of {named[name].shape}, the data has (batch, {_sizes(shape)})"
        return None

    def _try(self, limit_s: float) -> str | None:
        """Return what is wrong with the output for the mean of the training data, or for texts, or None."""
        is_tokens = self.spec.input.is_tokens
        examples = _texts(self.spec) if is_tokens else _means(self.spec)
        if self.bundle.sample_by_sample and not is_tokens:
            examples = examples[:1]
        outcomes: list[Any] = []

        def answer() -> None:
            try:
                for raw in examples:
                    outcomes.append(self.predict(raw))
            except Exception as error:
                outcomes.append(error)

        thread = threading.Thread(target=answer, name="first sample", daemon=True)
        thread.start()
        thread.join(limit_s)
        if thread.is_alive():
            self.interrupt()
            thread.join(1)
            return f"it has not answered a sample within {limit_s:g} s"
        for raw, given in zip(examples, outcomes, strict=False):  # the last may be the error
            num = len(raw)
            if isinstance(given, Exception):
                return f"it does not answer a batch of {num}: {_first_line(given)}"
            if given.shape != (num, self.spec.num_outputs):
                wanted = f"{num}, {self.spec.num_outputs}"
                return f"it answers a batch of {num} with ({_sizes(given.shape)}) numbers, not ({wanted})"
            if not np.isfinite(given).all():
                return f"its answer to {'a text' if is_tokens else 'the mean of the training data'} is not finite"
        if is_tokens and np.abs(outcomes[0][0] - outcomes[1][0]).max() > BESIDE * max(1.0, self.spec.target_std):
            return "its answer to a text is another one beside a longer text; it must not look at padding"
        return None


def _means(spec: DataSpec) -> list[NDArray[Any]]:
    """Return a batch of one and one of two, of the mean of the training data."""
    mean = np.array(spec.mean, dtype=np.float32).reshape(-1, *[1] * (len(spec.shape) - 1))
    raw = np.broadcast_to(mean * np.float32(spec.scale), (1, *spec.shape))
    return [raw, np.repeat(raw, 2, axis=0)]


def _texts(spec: DataSpec) -> list[NDArray[Any]]:
    """Return the last token of the vocabulary alone, and beside the longest text."""
    last = FIRST - 1 + len(spec.input.vocabulary)
    beside = np.full((2, spec.longest[0][1]), UNKNOWN, dtype=np.int64)
    beside[0] = PAD
    beside[0, 0] = last
    return [beside[:1, :1], beside]


def _public(spec: DataSpec, stored: dict[str, Any]) -> dict[str, Any]:
    """Return what everybody may know of the data: of a vocabulary its size."""
    if not spec.input.is_tokens:
        return stored
    told = {key: getattr(spec.input, key) for key in ("name", "kind", "shape", "cut")}
    return spec.to_dict() | {"inputs": [{**told, "num_known_tokens": len(spec.input.vocabulary)}]}


def _problem(spec: DataSpec) -> str | None:
    """Return what is impossible in a spec, so that no request could be answered, or None."""
    if problem := (_problem_of_tokens if spec.input.is_tokens else _problem_of_numbers)(spec):
        return problem
    with np.errstate(over="ignore"):
        above = np.array([*spec.std, spec.scale, spec.target_std], dtype=np.float64).astype(np.float32)
        others = np.array([*spec.mean, spec.target_mean], dtype=np.float64).astype(np.float32)
    if above.min() <= 0:
        return "spec: std, scale and target_std must be above 0"
    if not np.isfinite([*above, *others]).all():
        return "spec: a number is beyond 32 bits"
    return _twice("spec.class_names: two classes have the name", spec.class_names)


def _problem_of_numbers(spec: DataSpec) -> str | None:
    is_number = all(isinstance(size, int) for size in spec.shape)  # no letter: only texts may have any length
    is_shape = is_number and 1 <= len(spec.shape) <= MAX_SIDES and min(spec.shape) >= 1
    if not is_shape or math.prod(spec.shape) > MAX_NUMBERS:
        return f"spec.shape: ({_sizes(spec.shape)}) is no shape of a sample"
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) not in (1, spec.shape[0]):
            return f"spec.{name}: {len(values)} values for {spec.shape[0]} channels or features"
    return None


def _problem_of_tokens(spec: DataSpec) -> str | None:
    taken = spec.input
    if [str(axis) for axis in taken.shape] != [letter for letter, _ in spec.longest]:
        return f"spec.inputs.0.shape: ({_sizes(taken.shape)}) is not one axis whose letter has a longest length"
    [(_, longest)] = spec.longest
    if longest > MAX_LONGEST:
        return f"spec.longest: {longest} tokens, at most {MAX_LONGEST} are served"
    if len(taken.vocabulary) > MAX_VOCABULARY:
        return f"spec.inputs.0.vocabulary: {len(taken.vocabulary)} tokens, at most {MAX_VOCABULARY} are served"
    return _twice("spec.inputs.0.vocabulary: it holds twice", taken.vocabulary)


def _twice(told: str, names: Sequence[str]) -> str | None:
    """Return a problem that ends with the first name that is there twice, or None."""
    if len(set(names)) == len(names):
        return None
    twice = next(name for name, count in Counter(names).items() if count > 1)
    return f"{told} {twice!r}"[:MAX_REASON]


def _sizes(shape: Sequence[Axis]) -> str:
    return ", ".join(map(str, shape))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:MAX_REASON]

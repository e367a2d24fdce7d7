"""The contract of export formats, and the code that all formats share.

A format is one file of this package, which holds one subclass of `Format`. `docs/formats.md` compares them and shows
how each file is used without this package.
"""

import copy
import logging
import os
import re
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from espalier import export
from espalier.compression.base import Conversion
from espalier.compression.graph_module import CapturedNet
from espalier.config import plugins
from espalier.config.plugins import OneOf
from espalier.config.ranges import Count
from espalier.errors import ConfigError
from espalier.spec import DataSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLACE_IN_CPP = re.compile(r"(Exception from|Check '.*' failed at) \S+:\d+:?$")
MAX_REASON = 200  # characters of what a converter says; some print the whole graph


class Format(plugins.Plugin):
    """A format that a network can be written in; it has no state, so it is made anew for each call."""

    guide: ClassVar[str] = "docs/formats.md"
    files: ClassVar[tuple[str, ...]]  # of a bundle; a session opens the first one
    runtime: ClassVar[str | None] = None  # as rows of a report call it; None: weights alone, which nothing runs
    precisions: ClassVar[Collection[str]] = ("fp32",)  # of `DTYPES`, those that run on a CPU
    conversions: ClassVar[Collection[str]] = ()  # kinds of `Conversion` that are carried out; others stay in float
    is_machine_code: ClassVar[bool] = False  # does what its author wrote, so it runs only where somebody names it
    place: ClassVar[int] = 9  # in lists; of a bundle the first format is run where nobody names one

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.runtime is not None and cls.session is Format.session:
            raise ConfigError(f"{cls.__module__}.{cls.__qualname__} has a runtime and no session; see {cls.guide}")

    def require(self, key: str) -> None:
        """Raise `ConfigError`, which starts with `key`, unless all that writing and running need is installed."""

    @abstractmethod
    def write(self, model: nn.Module, spec: DataSpec, path: Path, conversion: Conversion | None = None) -> None:
        """Write a network in evaluation mode unchanged; a crash leaves the old files or the new.

        `path` is that of the first file, the others lie beside it.

        Raises:
            ConfigError: the format cannot hold the network.
        """

    def session(self, path: Path, threads: Count) -> Callable[..., Tensor]:
        """Open a file on the CPU; the result maps inputs (B, ...) to float32 logits (B, K), without gradients."""
        raise NotImplementedError(f"{type(self).__name__} has no runtime")


def names() -> list[str]:
    """Return the names of all formats, the preferred ones first."""
    found = plugins.members(export, Format)  # type: ignore[type-abstract]
    return sorted(found, key=lambda name: (found[name].place, name))


def runnable() -> list[str]:
    """Return the names of the formats that a runtime runs."""
    return [name for name in names() if named(name).runtime is not None]


def named(name: str) -> Format:
    """Return a format; a package that it needs is imported when it is used.

    Raises:
        ConfigError: there is no such format, or its class is incomplete.
    """
    found = plugins.member(export, Format, name)  # type: ignore[type-abstract]
    if found is None:
        raise ConfigError(f"format {name}: no such format; there are {', '.join(names())}")
    return found()


Name = Annotated[str, OneOf(names)]  # of a format, as a setting
Runnable = Annotated[str, OneOf(runnable)]


def require_package(key: str, package: str, remedy: str) -> None:
    """Raise `ConfigError` if a package is not installed; `remedy` is the command that installs it."""
    if find_spec(package) is None:
        raise ConfigError(f"{key}: needs {package}, which is not installed; {remedy}")


class InPrecision(nn.Module):
    """A network that computes in `dtype`, but takes float32 samples and returns float32 outputs."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(dtype)
        self.dtype = dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*(x.to(self.dtype) if x.is_floating_point() else x for x in inputs)).float()


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """Return the network itself for fp32; else a copy of it that computes in this precision.

    Raises:
        ConfigError: the network computes in integers.
    """
    if precision == "fp32":
        return model
    if isinstance(model, CapturedNet):
        raise ConfigError(
            f"task.precision={precision}: the network is quantized to 8 bits already; say task.precision=fp32"
        )
    return InPrecision(copy.deepcopy(model), DTYPES[precision]).train(model.training)


def require_precision(name: str, model: nn.Module) -> None:
    """Raise `ConfigError` if a format cannot run the network in the precision that its tensors have."""
    held = {tensor.dtype for tensor in model.state_dict().values()}
    for precision, dtype in DTYPES.items():
        if dtype in held and precision not in named(name).precisions:
            able = ", ".join(each for each in names() if precision in named(each).precisions)
            raise ConfigError(
                f"task.precision={precision}: {name} does not run every layer in it on a CPU; these do: {able}"
            )


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """Yield a path of that name in a new folder, whose files replace those beside `path` when the block ends well.

    Before, and after an error, nothing has changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        target = Path(folder) / path.name
        yield target
        written = sorted(Path(folder).iterdir(), key=lambda file: file == target)  # last what sessions open
        for file in written:
            with file.open("rb") as content:
                os.fsync(content.fileno())
            file.replace(path.with_name(file.name))


@contextmanager
def converting(name: str) -> Iterator[None]:
    """Turn errors of a converter into one line that says which format cannot hold the network."""
    try:
        with quiet():
            yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"task.format={name}: it cannot hold this network ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """Return the first line of the first of a chain of errors, without the C++ source positions of openvino."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not PLACE_IN_CPP.match(line)]
    return lines[0][:MAX_REASON] if lines else type(error).__name__


@contextmanager
def silent() -> Iterator[None]:
    """Discard all output inside the block, also that of C++ libraries; errors are raised all the same."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for descriptor, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(nowhere)


@contextmanager
def quiet() -> Iterator[None]:
    """Discard warnings and log records below an error inside the block: exporters warn of what nobody can change."""
    level, handlers = logging.root.manager.disable, list(logging.root.handlers)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        logging.root.handlers[:] = handlers  # `logging.warning` installs one


def on_cpu(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU for writing, in evaluation mode, without gradients."""
    twin: Any = copy.deepcopy(model)
    twin = twin.cpu().eval().requires_grad_(False)
    if isinstance(twin, CapturedNet):
        twin.switch()
    return cast(nn.Module, twin)

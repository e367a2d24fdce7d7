"""Runs the command line inside the test process, in a folder of its own."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn
from torch.fx import GraphModule

from espalier.cli import entry, program
from espalier.profiling import latency
from espalier.reporting import figures
from helpers import composing, forked

QUICK = ("logger=[csv]", "callbacks=[checkpoint,monitor]")


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str
    folder: Path  # where logs/ lies

    @property
    def run(self) -> Path:
        """The newest run folder."""
        return max(self.folder.glob("logs/*/*/report.json"), key=lambda report: report.stat().st_mtime).parent


Command = Callable[..., Outcome]


@pytest.fixture
def espalier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`espalier("train", "model=mlp")` as a user would type it, with tmp_path as the current folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Outcome:
        return command(words, tmp_path, capfd)

    return run


def command(words: Sequence[str], folder: Path, capfd: pytest.CaptureFixture[str] | None = None) -> Outcome:
    before, sys.argv = sys.argv, ["espalier", *words]
    try:
        # Folders of mistakes are gone, those of pytest go: no later line is for a file in them.
        with program.kept_logging(), pytest.MonkeyPatch.context() as patch:
            spare(patch)
            entry.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
        if torch.distributed.is_initialized():  # by a strategy with one process: it stays with the process
            torch.distributed.destroy_process_group()
    out, err = capfd.readouterr() if capfd else ("", "")
    return Outcome(code, out, err, folder)


_drawn: dict[tuple[Any, ...], bytes] = {}


def spare(patch: pytest.MonkeyPatch) -> None:
    """Take from a command inside the test process what costs half of its time and differs in no test.

    Curves of the same metrics, the confusion matrix of the same classes, and figures with as many parts whose names
    differ at most in a number, are drawn once in each test process, and copied; so is the ONNX file of a network that
    was exported before.
    Latencies are measured in a tenth of the time, but for `benchmark`.
    """

    def draw(key: tuple[Any, ...], target: Path, whole: Callable[[], None]) -> None:
        if key in _drawn:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(_drawn[key])
        else:
            whole()
            _drawn[key] = target.read_bytes()

    def once(module: ModuleType, name: str, content: Callable[..., object]) -> None:
        whole = getattr(module, name)

        def draw_once(*given: Any) -> None:
            draw((name, content(*given)), given[-1], lambda: whole(*given))

        patch.setattr(module, name, draw_once)

    once(figures, "curves", lambda metrics_csv, _: metrics_csv.read_text().partition("\n")[0])
    once(figures, "confusion_matrix", lambda _counts, class_names, _: tuple(class_names))
    print_figure = FigureCanvasAgg.print_figure

    def print_once(canvas: FigureCanvasAgg, file: Any, **more: Any) -> None:
        if more or not isinstance(file, str):  # no figure of ours
            print_figure(canvas, file, **more)
            return
        key = (re.sub(r"\d", "", Path(file).name), len(canvas.figure.axes))
        draw(key, Path(file), lambda: print_figure(canvas, file))

    patch.setattr(FigureCanvasAgg, "print_figure", print_once)
    onnx = sys.modules.get("espalier.export.onnx")
    if onnx and onnx.write.__module__ == onnx.__name__:  # not where a test has put something else in its place
        patch.setattr(onnx, "write", export_once(onnx.write))
    if "benchmark" not in sys.argv:  # which is about them: one slow call among five would be seen
        patch.setattr(latency, "WARM_UP_S", latency.WARM_UP_S / 10)
        patch.setattr(latency, "TURN_S", latency.TURN_S / 10)


_exported: dict[str, bytes] = {}


def export_once(write: Callable[..., None]) -> Callable[..., None]:
    """Return `espalier.export.onnx.write`, which copies the file of a network of the same code and numbers."""

    def write_once(model: nn.Module, input_shape: tuple[int, ...], path: Path, conversion: object = None) -> None:
        parts = [type(model), model, model.training, input_shape, conversion]
        graphs = [vars(part).get("code", part) for part in model.modules()]  # a captured network holds it beside
        parts += [graph.code for graph in graphs if isinstance(graph, GraphModule)]
        digest = hashlib.sha256("\n".join(map(str, parts)).encode())
        for name, value in model.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} {value.device}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        key = digest.hexdigest()
        if key in _exported:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_exported[key])
            return
        write(model, input_shape, path, conversion)
        _exported[key] = path.read_bytes()

    return write_once


def launch(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m WORDS` in the folder, with the modules of the tests at hand.

    A copy of the fork server, whose figures are blank, unless a variable says something that is read while a program
    starts (`can_fork`).
    """
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), **environment}
    return forked.run(["-m", *words], cwd=folder, env=own, timeout=120)


def launch_anew(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`launch` in interpreters of their own, for what happens while a program starts."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), **environment}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=own, capture_output=True, text=True, timeout=120
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    composing.share()
    if sys.platform == "linux" and forked.ADDRESS not in os.environ:  # the workers of pytest-xdist share one
        server = forked.server()
        server.__enter__()
        config.add_cleanup(lambda: server.__exit__(None, None, None))


def run_in(folder: Path) -> Path:
    """The only run folder."""
    [run] = folder.glob("logs/*/*")
    return run


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    share_registry(monkeypatch)


def share_registry(patch: pytest.MonkeyPatch) -> None:
    """Share what libraries read again each time: lists of operators in each export, plugins of Lightning, the digits.

    Not with the first one in a process, which imports the library.
    """

    def share(module: str, owner: str, name: str) -> None:
        place = sys.modules.get(module)
        if place is None:
            return
        place = getattr(place, owner) if owner else place
        whole = getattr(place, name)

        def shared(*given: Any, **settings: int) -> Any:
            # There are more operators once a library is imported that has its own.
            key = (name, *map(str, given), *settings.items(), len(torch._C._dispatch_get_all_op_names()))
            if key not in _registries:
                _registries[key] = whole(*given, **settings)
            return _registries[key]

        patch.setattr(place, name, staticmethod(shared) if owner else shared)

    share("torch.onnx._internal.exporter._registration", "ONNXRegistry", "from_torchlib")
    share("torch._export.utils", "", "_collect_all_valid_cia_ops_for_namespace")
    share("lightning.fabric.utilities.registry", "", "entry_points")
    share("sklearn.datasets._base", "", "load_gzip_compressed_csv_data")


_registries: dict[tuple[Any, ...], Any] = {}

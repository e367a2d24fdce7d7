"""A network as machine code: C++ that torch's compiler writes and g++ compiles, in a `.pt2` package.

The code is that of the processor it was compiled on. Networks quantized with `target=inductor` are computed in float:
inductor has integer convolutions, but uses them only with `freezing`, and then answered wrongly (torch 2.13: logits of
0.05 standard deviation were off by 0.06 to 0.16).
"""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import ClassVar
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor, nn

from espalier.compression.base import Conversion
from espalier.config.ranges import Count
from espalier.errors import ConfigError
from espalier.export.formats import DTYPES, Format, converting, draft
from espalier.export.torch_export import program, reloaded, torch_threads
from espalier.spec import DataSpec

OPTIONS = {
    "aot_inductor.enable_line_tables": False,  # 1.3 MB of 1.8 are the lines of the C++ files
    "cpp.dynamic_threads": True,  # else the number of threads at export is compiled in
}
ENTRIES_OF_CODE = (".cpp", ".h")  # what was compiled; loading needs the compiled alone


class AOTInductor(Format):
    """Machine code for the kind of processor on which it was compiled."""

    runtime: ClassVar[str] = "aotinductor"
    files: ClassVar[tuple[str, ...]] = ("model.aot.pt2",)
    precisions: ClassVar[Collection[str]] = tuple(DTYPES)
    is_machine_code: ClassVar[bool] = True

    def require(self, key: str) -> None:
        """Raise `ConfigError` unless there is a C++ compiler."""
        from torch._inductor import config

        names = [name for name in config.cpp.cxx if name]
        if not any(map(shutil.which, names)):
            raise ConfigError(
                f"{key}: aotinductor needs the C++ compiler {names[-1]}, which is not installed; "
                "on Debian and Ubuntu: apt-get install g++"
            )

    def write(self, model: nn.Module, spec: DataSpec, path: Path, conversion: Conversion | None = None) -> None:
        """Compile for batches of any size; takes seconds to a minute."""
        with converting("aotinductor"), draft(path) as target, torch.no_grad():
            exported = reloaded(program(model, spec))
            package = target.with_name("unstripped.pt2")
            torch._inductor.aoti_compile_and_package(exported, package_path=str(package), inductor_configs=OPTIONS)
            _strip(package, target)
            package.unlink()

    def session(self, path: Path, threads: Count) -> Callable[..., Tensor]:
        return Session(path, threads)


class Session:
    """The compiled network, on the CPU. Threads are those of torch in the whole process, so each call sets them."""

    def __init__(self, path: Path, threads: Count) -> None:
        self._network = torch._inductor.aoti_load_package(str(path))
        self._threads = threads

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        with torch_threads(self._threads):
            return self._network(x.cpu())


def _strip(package: Path, target: Path) -> None:
    """Copy the package without the C++ code, and with dots for folders of this machine in its error messages."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folders = [str(Path(torch.__file__).parents[1]).encode(), cache_dir().encode()]
    with ZipFile(package) as source, ZipFile(target, "w", ZIP_STORED) as copy:
        for entry in source.infolist():
            if entry.filename.endswith(ENTRIES_OF_CODE):
                continue
            content = source.read(entry)
            for folder in folders:
                content = content.replace(folder, b"." * len(folder))  # of the same length: offsets stay
            inner = entry.filename.partition("/")[2]
            copy.writestr(f"model/{inner}", content)

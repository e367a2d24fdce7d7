"""Which file of a bundle runs where nobody named one."""

from pathlib import Path
from shutil import which

import pytest

from espalier.errors import ConfigError
from espalier.export.bundle import Bundle
from espalier.export.runtimes import choose


def holding(*names: str) -> Bundle:
    return Bundle(Path("shipped"), {"formats": {name: {} for name in names}})


def test_the_first_format_does_not_depend_on_how_the_bundle_lists_them():
    assert choose(holding("safetensors", "torch_export", "onnx"), None) == "onnx"
    assert choose(holding("torch_export", "onnx"), "torch_export") == "torch_export"


def test_machine_code_runs_only_if_it_is_named():
    assert choose(holding("aotinductor", "torch_export"), None) == "torch_export"
    with pytest.raises(ConfigError, match=r"^source=shipped: .*machine code.*say task\.runtime=aotinductor$"):
        choose(holding("aotinductor", "safetensors"), None)
    if which("g++"):
        assert choose(holding("aotinductor"), "aotinductor") == "aotinductor"


@pytest.mark.parametrize("name", ["safetensors", "candidates", "os.path"])
def test_what_is_no_format_with_a_runtime_is_neither_run_nor_imported(name: str):
    with pytest.raises(ConfigError, match="which nothing runs; export onnx"):
        choose(holding(name), None)
    with pytest.raises(ConfigError, match=f"task.runtime={name}: .* but onnx; choose one of these"):
        choose(holding("onnx", name), name)

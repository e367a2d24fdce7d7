"""Private parts of libraries are few, listed in docs/internals.md, and missed by name when one is gone."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "src" / "espalier").rglob("*.py"))}
ROW = re.compile(r"^\| `([\w.]+)` \| `([\w/]+\.py)` \|", re.MULTILINE)
LISTED = ROW.findall((ROOT / "docs" / "internals.md").read_text())
BY_OTHER_NAMES = {  # of Python and Hydra, or described below the table
    *("_exit", "_replace", "_target_", "_inductor", "_threadpool_get_thread_count", "_unsafe_reset_threadpool"),
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", "_foreach_"))


def own_names() -> set[str]:
    found = set()
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    found.add(name)
                case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                    found.add(name)
                case ast.Name(id=name, ctx=ast.Store()):
                    found.add(name)
    return found


def names_used() -> set[str]:
    own, found = own_names(), set()
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
                found.add(node.attr)
            if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("espalier"):
                for alias in node.names:
                    if any(map(is_private, [*str(node.module).split("."), alias.name])):
                        found.add(alias.name)
    return found


@pytest.mark.parametrize("name", [name for name, _ in LISTED])
def test_a_private_part_is_still_there(name: str):
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        break
    for place, part in enumerate(parts[split:], split):
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        bases = [base for base in found.__mro__ if base is not object]  # what an instance gets when it is made
        in_code = any(re.search(rf"\b{part}\b", inspect.getsource(base)) for base in bases)
        assert place == len(parts) - 1, name
        assert in_code, name


def test_the_list_names_all_private_parts_that_are_used_and_no_others():
    listed = {name.rpartition(".")[2] for name, _ in LISTED}
    assert names_used() - BY_OTHER_NAMES <= listed
    for name, file in LISTED:
        part = name.rpartition(".")[2]
        assert re.search(rf"\b{part}\b", (ROOT / "src" / "espalier" / file).read_text()), f"{name} in {file}"

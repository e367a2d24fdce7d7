"""Contracts of plugins: what a class lacks is said when it is defined, and files are found by listing the folder."""

import sys
from abc import abstractmethod
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, ClassVar

import pytest

from espalier.config import check, plugins
from espalier.config.plugins import OneOf, Plugin, member, members
from espalier.errors import ConfigError


class Shape(Plugin):
    """A contract."""

    sides: ClassVar[int]
    colour: ClassVar[str] = "black"

    @abstractmethod
    def area(self, scale: float) -> float:
        """Return the area."""

    @staticmethod
    @abstractmethod
    def parse(text: str) -> "Shape":
        """Read a shape."""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package with one member, `square.py`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "shapes"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "helper.py").write_text(f"from {__name__} import Shape\n")
    add(folder, "square", "Square")
    yield import_module("shapes")
    for name in [name for name in sys.modules if name.partition(".")[0] == "shapes"]:
        del sys.modules[name]


def add(folder: Path, file: str, *classes: str, above: str = "") -> None:
    whole = "sides = 4\n    def area(self, scale): return scale\n    @staticmethod\n    def parse(text): return None"
    bodies = [f"class {name}(Shape):\n    {whole}\n" for name in classes]
    (folder / f"{file}.py").write_text("".join([above, f"from {__name__} import Shape\n", *bodies]))


def test_all_that_is_missing_is_named_in_one_line():
    with pytest.raises(ConfigError, match=r"Blob has no sides and no area and no parse; see docs/forking\.md$"):
        type("Blob", (Shape,), {})


def test_a_class_with_an_abstract_method_of_its_own_may_be_incomplete_and_what_is_inherited_counts():
    class Regular(Shape):
        sides = 3

        @staticmethod
        def parse(text: str) -> Shape:
            raise NotImplementedError

        @abstractmethod
        def area(self, scale: float) -> float: ...

    class Triangle(Regular):
        def area(self, scale: float) -> float:
            return scale / 2

    assert Triangle().area(3) == 1.5
    with pytest.raises(ConfigError, match="Mistake has no area;"):
        type("Mistake", (Regular,), {})


def test_a_method_that_cannot_be_called_as_the_contract_says_is_refused():
    parts = {"sides": 1, "area": lambda self, scale: scale, "parse": lambda self, text: None}
    with pytest.raises(ConfigError, match=r"Circle\.parse takes \(self, text\), not \(text\); see"):
        type("Circle", (Shape,), parts)


def test_members_are_found_by_their_file_and_helpers_are_none(package: ModuleType):
    assert list(members(package, Shape)) == ["square"]
    assert member(package, Shape, "square").__name__ == "Square"
    assert [member(package, Shape, name) for name in ("helper", "circle", "../square", "os")] == [None] * 4


def test_a_new_file_is_a_new_member_without_anything_else(package: ModuleType):
    add(Path(package.__path__[0]), "diamond", "Diamond")
    assert list(members(package, Shape)) == ["diamond", "square"]


def test_a_file_with_two_classes_is_refused(package: ModuleType):
    add(Path(package.__path__[0]), "twins", "One", "Other")
    with pytest.raises(ConfigError, match=r"shapes\.twins: holds One and Other; give each a file of its own"):
        members(package, Shape)


def test_a_file_whose_package_is_missing_says_which_and_what_to_do(package: ModuleType):
    add(Path(package.__path__[0]), "far", "Far", above="import nowhere_to_be_found\n")
    with pytest.raises(ConfigError, match=r"shapes\.far: needs the package nowhere_to_be_found, .*; import it inside"):
        members(package, Shape)


def test_a_knob_takes_the_names_of_the_moment(monkeypatch: pytest.MonkeyPatch):
    names = ["a", "b"]

    def build(name: Annotated[str, OneOf(lambda: names)]) -> None: ...

    monkeypatch.setattr(plugins, "build", build, raising=False)
    node = {"_target_": "espalier.config.plugins.build", "name": "c"}
    with pytest.raises(ConfigError, match=r"toy\.name=c: should be 'a' or 'b'"):
        check.check_plain({"toy": node})
    names.append("c")
    check.check_plain({"toy": node})

"""The site of the documentation has every page; `scripts/docs` builds it in CI and fails on a dead link."""

import re
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> Any:
    """`scripts/docs` as a module; it needs nothing but Python."""
    loader = SourceFileLoader("docs_script", str(ROOT / "scripts/docs"))
    module = module_from_spec(spec_from_loader("docs_script", loader))
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    script.write(folder)
    return folder


def pages_of(menu: Any) -> list[str]:
    if isinstance(menu, str):
        return [menu]
    entries = menu if isinstance(menu, list) else menu.values()
    return [page for entry in entries for page in pages_of(entry)]


def test_every_page_is_in_the_menu_once_and_every_entry_of_the_menu_is_a_page(site):
    listed = pages_of(yaml.safe_load((site / "mkdocs.yml").read_text())["nav"])
    written = [str(page.relative_to(site / "pages")) for page in (site / "pages").rglob("*.md")]
    assert len(written) > 30
    assert sorted(listed) == sorted(written)


def test_every_module_has_its_docstrings_on_a_page(script, site):
    source = ROOT / "src"
    pages = [page.read_text() for page in (site / "pages/api").glob("*.md")]
    named = {name for text in pages for name in re.findall("^::: (.*)$", text, re.MULTILINE)}
    files = [file.relative_to(source).with_suffix("") for file in (source / script.PROJECT["name"]).rglob("*.py")]
    assert len(files) > 100
    assert named == {".".join(file.parts).removesuffix(".__init__") for file in files}


def test_the_site_loads_nothing_from_elsewhere():
    theme = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["theme"]
    assert theme["font"] is False


def test_links_of_the_readme_and_of_pages_beside_docs_lead_to_pages_of_the_site(site):
    for page in (site / "pages").glob("*.md"):
        links = [link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()) if "://" not in link]
        assert [f"{page.name}: {link}" for link in links if not (site / "pages" / link).exists()] == []

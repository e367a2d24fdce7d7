"""Names of classes in figures: letters that no font has, and dollars."""

import logging

import numpy as np
import pytest
from matplotlib import font_manager

from espalier.reporting import figures, lettering

CJK = "犬猫"


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    monkeypatch.setattr(lettering, "_told", set())
    lettering._fonts_with.cache_clear()


def without_fonts(monkeypatch) -> None:
    """Only what matplotlib brings along."""
    own = [font for font in font_manager.fontManager.ttflist if "DejaVu" in font.name or "Last Resort" in font.name]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


def test_letters_without_a_font_cost_one_line_however_many_figures(tmp_path, monkeypatch, caplog, recwarn):
    without_fonts(monkeypatch)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            figures.confusion_matrix(np.eye(2), [CJK, "cat"], tmp_path / "confusion.png")
    [record] = caplog.records
    assert "has 2 letters of the class names" in record.message
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_a_font_that_has_the_letters_is_used(monkeypatch):
    monkeypatch.setattr(
        lettering, "_letters_of", lambda path: {"犬"} if "Serif" in path else {"猫"} if "Mono" in path else set()
    )
    without_fonts(monkeypatch)
    fonts, boxes = lettering._fonts_with(frozenset("犬猫鳥"))
    assert len(fonts) == 2
    assert any("Serif" in name for name in fonts)
    assert any("Mono" in name for name in fonts)
    assert boxes == {"鳥"}


@pytest.mark.parametrize("name", ["$5 to $10", r"$\nothing{$", "a\nb", "$"])
def test_no_name_is_a_formula(tmp_path, name):
    figures.confusion_matrix(np.eye(2), [name, "cat"], tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    assert "\n" not in lettering.plain(name)

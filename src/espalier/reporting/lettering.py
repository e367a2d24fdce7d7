"""Prepare names for figures: each on one line, in a font that has its letters."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

LAST_RESORT = "Last Resort"  # ships with matplotlib, and has a box for every letter
NUM_TOLD = 20  # letters in a message

log = logging.getLogger(__name__)
_told: set[str] = set()


def plain(name: str) -> str:
    """Return a name on one line."""
    return " ".join(name.split("\n"))


def short(name: str, letters: int = 20) -> str:
    """Return a name on one line, cut where it has more letters."""
    return plain(name if len(name) <= letters else f"{name[: letters - 1]}…")


@contextmanager
def provided(figure: Figure) -> Iterator[None]:
    """Use other fonts inside the block for letters that the default font lacks; warn once of letters that none has."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_ticklabels()  # which makes them
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and not text.get_text().isascii()]
    letters = {letter for text in texts for letter in text.get_text() if not letter.isspace()}
    missing = frozenset(letters - _letters_of(font_manager.findfont(font_manager.FontProperties())))
    fonts, boxes = _fonts_with(missing) if missing else ((), frozenset())
    for text in texts if fonts else ():
        text.set_fontfamily([*text.get_fontfamily(), *fonts])
    if boxes - _told:
        _told.update(boxes)
        some = "".join(sorted(boxes)[:NUM_TOLD])
        log.warning(
            "figures: no installed font has %d letters of the class names (%s), which become boxes", len(boxes), some
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


@cache
def _fonts_with(missing: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return a few installed fonts that together have these letters, and the letters that no font has."""
    upright = {font.name: font.fname for font in font_manager.fontManager.ttflist if font.style == "normal"}
    have = {name: missing & _letters_of(path) for name, path in sorted(upright.items()) if LAST_RESORT not in name}
    chosen: list[str] = []
    while have:
        best = max(have, key=lambda name: len(have[name] & missing))
        if not have[best] & missing:
            break
        chosen.append(best)
        missing -= have[best]
    return tuple(chosen), missing


def _letters_of(path: str) -> set[str]:
    try:
        return set(map(chr, font_manager.get_font(path).get_charmap()))
    except (OSError, RuntimeError):  # a font that was removed, or none
        return set()

"""Turn the texts of a request into token ids, or into one sentence that says what is wrong with them.

However long a text is, only as much of it is read as its first tokens need. Letters: B batch, T tokens.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from espalier.data.tokens import Encoder, Ids, padded, pieces
from espalier.serving.errors import RequestError
from espalier.spec import DataSpec

LETTERS = (8, 64)  # per token: what is read of a text at first, and at most
MAX_MARKS = 30  # accents in a row (UAX #15, 13): ordering them takes the square of their number, 0.15 s for 8,000
MARKS = re.compile(rf"[^\w\s\x00-\x7f]{{{MAX_MARKS + 1},}}")
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)  # of JSON; the last may have no end
KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list"}
ALLOWED = 'each sample must be a text, or {"text": "a text"}'


class Texts:
    """Reads texts for a network of tokens."""

    def __init__(self, spec: DataSpec) -> None:
        self.cut = spec.input.cut
        self.longest = spec.longest[0][1]
        self._encode = Encoder(spec.input, self.longest)

    def read(self, items: Sequence[Any]) -> list[str]:
        """Return the beginnings of texts, which hold all tokens that the network reads and one more if there is one.

        Raises:
            RequestError: an item is no text, or too long.
        """
        named = ((item, f"inputs[{place}]") for place, item in enumerate(items))
        return [self._beginning(_text(item, where), where) for item, where in named]

    def ids(self, items: Sequence[Any]) -> Ids:
        """Return token ids (B, T), padded to the longest of the texts.

        Raises:
            RequestError: an item is no text, or too long.
        """
        return padded([self._encode(text) for text in self.read(items)])

    def pieces(self, text: str) -> list[str]:
        """Return the tokens of what `read` returned, in words."""
        return pieces(text, self.cut)

    def require_parts(self, body: bytes, most: int) -> None:
        """Raise `RequestError` if a JSON body has more strings, lists and commas than `most` texts need.

        They are counted in the bytes, before parsing: eight million bytes of `"",` would become millions of objects.
        """
        largest = 2 + 2 * most  # "inputs", its object and list; of each sample a comma, an object, a key and a text
        num_strings = num_others = end = 0
        for found in STRING.finditer(body):
            num_strings += 1
            num_others += _num_others(body, end, found.start())
            end = found.end()
            if num_strings > largest:
                break
        if max(num_strings, num_others + _num_others(body, end, len(body))) > largest:
            raise RequestError(413, f"the body has more parts than {most} texts; split it")

    def _beginning(self, text: str, where: str) -> str:
        enough = self.longest + MAX_MARKS + 1  # what follows may change the last token, and the order of its accents
        for letters in LETTERS:
            start = text[: letters * enough]
            if self.cut != "bytes" and any(map(_is_too_marked, MARKS.findall(start))):
                raise RequestError(422, f"{where}: more than {MAX_MARKS} accents in a row")
            if len(start) == len(text) or len(pieces(start, self.cut)) >= enough:
                return start
        raise RequestError(413, f"{where}: fewer than {enough} {self.cut} in its first {len(start)} letters; send less")


def _text(item: Any, where: str) -> str:
    text = item["text"] if isinstance(item, dict) and list(item) == ["text"] else item
    if isinstance(text, str):
        return text
    kind = "an object of another form" if isinstance(item, dict) else KINDS[type(item)]
    raise RequestError(422, f"{where}: {kind}; {ALLOWED}")


def _is_too_marked(run: str) -> bool:
    return sum(map(bool, map(unicodedata.combining, run))) > MAX_MARKS


def _num_others(body: bytes, start: int, end: int) -> int:
    """Count what makes objects of a part of a body outside of its strings."""
    return sum(body.count(mark, start, end) for mark in (b",", b"[", b"{"))

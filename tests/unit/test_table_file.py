"""Tables that users bring, whole and broken: a right reading or one line."""

from pathlib import Path

import pytest

from espalier.data.table_file import read
from espalier.errors import ConfigError

ROWS = [["a", "1"], ["b", "2"]]

READ = {
    "commas": ("t.csv", b"text,label\na,1\nb,2\n"),
    "semicolons": ("t.csv", b"text;label\na;1\nb;2\n"),
    "bars": ("t.csv", b"text|label\na|1\nb|2\n"),
    "tabs in a CSV": ("t.csv", b"text\tlabel\na\t1\nb\t2\n"),
    "tabs": ("t.tsv", b"text\tlabel\na\t1\nb\t2\n"),
    "a byte order mark": ("t.csv", b"\xef\xbb\xbftext,label\na,1\nb,2\n"),
    "lines of Windows": ("t.csv", b"text,label\r\na,1\r\nb,2\r\n"),
    "lines of old Macs": ("t.csv", b"text,label\ra,1\rb,2\r"),
    "no newline at the end": ("t.csv", b"text,label\na,1\nb,2"),
    "empty lines": ("t.csv", b"\ntext,label\n\na,1\n\n\nb,2\n\n"),
    "spaces around names": ("t.csv", b" text , label \na,1\nb,2\n"),
    "quotes": ("t.csv", b'"text","label"\n"a","1"\n"b","2"\n'),
    "JSON lines": ("t.jsonl", b'{"text": "a", "label": 1}\n\n{"label": 2, "text": "b"}\n'),
    "an ending in capitals": ("t.CSV", b"text,label\na,1\nb,2\n"),
}


@pytest.mark.parametrize(("name", "content"), READ.values(), ids=READ)
def test_a_table_is_read_as_people_mean_it(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    rows = read("data.path", tmp_path / name)
    assert rows.names == ("text", "label")
    assert rows.cells == ROWS


def test_a_cell_keeps_what_its_quotes_hold(tmp_path: Path):
    (tmp_path / "t.csv").write_text('text,label\n"two\nlines, a comma and ""quotes""",x\n', newline="")
    assert read("data.path", tmp_path / "t.csv").cells == [['two\nlines, a comma and "quotes"', "x"]]


def test_a_line_of_ten_megabytes_is_read(tmp_path: Path):
    (tmp_path / "t.csv").write_text("text,label\n" + "word " * 2_000_000 + ",x\n")
    assert len(read("data.path", tmp_path / "t.csv").cells[0][0]) == 10_000_000


BROKEN = {
    "nothing": ("t.csv", b"", "is empty"),
    "blank lines": ("t.csv", b"\n \n\n", "is empty"),
    "a header alone": ("t.csv", b"text,label\n", "no row"),
    "Latin-1": ("t.csv", b"text,label\ncaf\xe9,1\n", "byte 14 is no UTF-8"),
    "UTF-16": ("t.csv", "text,label\na,1\n".encode("utf-16"), "no UTF-8"),
    "zero bytes": ("t.csv", b"text,label\na\x00,1\n", "bytes of zero"),
    "a line with more cells": ("t.csv", b"text,label\na,1,2\n", "line 2 has 3 cells and the header 2"),
    "a line with fewer": ("t.csv", b"text,label\na,1\nb\n", "line 3 has 1 cells"),
    "an open quote": ("t.csv", b'text,label\n"a,1\n', "no row of a table"),
    "two columns of one name": ("t.csv", b"text,text\na,1\n", "two columns are called 'text'"),
    "no JSON": ("t.jsonl", b'{"text": "a"}\n{broken\n', "line 2 is no JSON"),
    "JSON that is a list": ("t.jsonl", b"[1, 2]\n", "line 1 is no object"),
    "nested JSON": ("t.jsonl", b'{"text": {"a": 1}}\n', "line 1 is no object"),
    "another kind of file": ("t.xlsx", b"PK", "not .xlsx"),
    "no ending": ("table", b"text,label\na,1\n", "a file without an ending"),
}


@pytest.mark.parametrize(("name", "content", "told"), BROKEN.values(), ids=BROKEN)
def test_a_broken_table_costs_one_line(tmp_path: Path, name: str, content: bytes, told: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        read("data.path", tmp_path / name)
    [line] = str(refused.value).splitlines()
    assert line.startswith(f"data.path={tmp_path / name}: ")
    assert told in line


def test_a_file_that_is_not_there_costs_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        read("data.path", tmp_path / "t.csv")

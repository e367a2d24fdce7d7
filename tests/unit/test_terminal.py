"""What is printed: readers that leave, letters that are missing, words that look like markup."""

import io
import os
import sys

import pytest
import torch
from torch import nn

from espalier.callbacks import summary
from espalier.errors import ConfigError
from espalier.reporting import report, terminal
from espalier.targets import class_report
from espalier.targets.class_report import ClassScore

MARKUP = "[/x] [red]y[/red] :bug:"
COMMANDS = "a\x1b]0;title\x07b\x9b2Jc\u202ed"


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str]):
    terminal.console(soft_wrap=True).print(MARKUP)
    assert printed(capsys) == f"{MARKUP}\n"


@pytest.mark.parametrize("name", [MARKUP, COMMANDS])
def test_every_table_shows_a_name_as_letters(capsys: pytest.CaptureFixture[str], name: str):
    safe = name if name == MARKUP else "a?]0;title?b?2Jc?d"
    lines = summary.parts(nn.Sequential(nn.Linear(2, 2)), [torch.zeros(1, 2)], depth=1)
    lines[1].name = name  # as a key of nn.ModuleDict
    for table in (
        summary.table(lines),
        report.grid_of({"": [name], name: [name]}),
        class_report.class_table([ClassScore(name, 1, 1, 1, 1)]),
    ):
        terminal.console().print(table)
        out = printed(capsys)
        assert safe in out
        assert "\x1b" not in out


def test_an_error_turns_no_line_around():
    assert str(ConfigError(COMMANDS)) == "a?]0;title?b?2Jc?d"


def test_letters_that_the_encoding_lacks_are_replaced(monkeypatch: pytest.MonkeyPatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", errors="strict"))
    terminal.keep_open()
    terminal.console().print(report.grid_of({"": ["数字", "\udcff"], "accuracy": ["0.5", "0.25"]}))
    sys.stdout.flush()
    assert b"??" in written.getvalue()
    assert b"0.25" in written.getvalue()


def print_into_a_pipe_that_nobody_reads(patch: pytest.MonkeyPatch) -> int:
    """Make it the standard output; the file descriptor."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = io.TextIOWrapper(io.FileIO(writer, "w", closefd=False), encoding="utf-8")
    patch.setitem(terminal.STANDARD, "stdout", writer)
    patch.setattr(sys, "stdout", stream)
    patch.setattr(sys, "__stdout__", stream)
    patch.setattr(terminal, "_farewell", "")
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"x")
    return writer


def test_a_reader_that_leaves_ends_nothing_and_costs_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    writer = print_into_a_pipe_that_nobody_reads(monkeypatch)
    terminal.keep_open()
    terminal.say_when_closed("train goes on in RUN")
    for _ in range(3):
        print("epoch", flush=True)
        terminal.console().print("table")
    assert capsys.readouterr().err == "train goes on in RUN\n"
    os.write(writer, b"as C libraries do")


def test_help_that_is_cut_off_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    print_into_a_pipe_that_nobody_reads(monkeypatch)
    terminal.keep_open()
    print("usage", flush=True)
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_no_reader_that_left(monkeypatch: pytest.MonkeyPatch):
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        stream = terminal._Patient(full.fileno(), "w", closefd=False)
        with pytest.raises(OSError, match="No space"):
            stream.write(b"x")

"""A comparison as Markdown, and as one HTML file that loads nothing: no script, no font, no address.

Names, notes and values come from files: whatever they hold is shown as text.
"""

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from espalier.reporting.comparison import Entry, pictures
from espalier.reporting.report import MISSING, Columns
from espalier.reporting.terminal import printable
from espalier.spec import Report

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --pale: #606060; --line: #dcdcdc; --ground: #fff; --card: #f6f6f6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --pale: #a5a5a5; --line: #3c3c3c; --ground: #161616; --card: #202020 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--ground); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1rem 0 }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: 600;
                              position: sticky; left: 0; background: var(--ground) }
td.text, th.text { text-align: left }
img { display: block; max-width: 100%; height: auto; margin: .75rem 0; background: #fff; border-radius: 6px }
details { margin: .75rem 0; padding: .6rem 1rem; background: var(--card); border-radius: 6px }
summary { cursor: pointer; font-weight: 600 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem }
dt, footer { color: var(--pale) }
dd { margin: 0 }
footer { margin-top: 3rem; font-size: .85rem }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser sees to it as well
MARKDOWN = re.compile(r"([\\`*\[\]<>|#~]|(?<!\w)_|_(?!\w))")  # what means something; not the _ of top5_accuracy


def html(
    title: str, entries: Sequence[Entry], measured: Columns, differing: Columns, done: Report, figures: Path
) -> str:
    """Return the whole page, with the pictures in the folders `figures` of the comparison and of each run."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>",
            _list(done.notes),
            "<h2>Measured</h2>",
            _table(measured),
            *_pictures(sorted(figures.glob("*.png")), title),
            *(["<h2>Differences in the configuration</h2>", _table(differing)] if differing else []),
            "<h2>Runs</h2>" if len(entries) > 1 else "<h2>Run</h2>",
            *(_run(entry, is_open=len(entries) == 1) for entry in entries),
            f"<footer>{escape(done.run)}</footer>",
            "</body>\n</html>\n",
        ]
    )


def markdown(title: str, entries: Sequence[Entry], measured: Columns, differing: Columns, done: Report) -> str:
    """Return the same tables and remarks, for `report.md` and for pull requests."""
    parts = [f"# {_plain(title)}", _markdown_table(measured)]
    parts.append("\n".join(f"* {_plain(note)}" for note in done.notes))
    if differing:
        parts += ["## Differences in the configuration", _markdown_table(differing)]
    parts += [
        "## Runs",
        "\n".join(f"* {_plain(entry.name)}: `{printable(str(entry.folder)).replace('`', '')}`" for entry in entries),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _run(entry: Entry, *, is_open: bool) -> str:
    """Return the section of a run: what is known of it, and its pictures."""
    git = entry.provenance.get("git")
    commit = str(git.get("commit")) + (" and changes" if git.get("dirty") else "") if isinstance(git, dict) else None
    command = entry.provenance.get("command")
    facts: Mapping[str, object] = {
        "folder": printable(str(entry.folder)),
        "task": entry.report.task,
        "command": " ".join(map(str, command)) if isinstance(command, list) else None,
        "source": entry.report.source,
        "seed": entry.report.seed,
        "data": entry.data,
        "hardware": entry.hardware,
        "commit": commit,
    }
    terms = "".join(
        f"<dt>{key}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items() if value not in (None, "")
    )
    drawn = "\n".join(_pictures(pictures(entry.folder)[0], entry.name))
    return (
        f"<details{' open' if is_open else ''}><summary>{escape(entry.name)}</summary>\n<dl>{terms}</dl>\n"
        f"{_list(entry.report.notes)}\n{drawn}</details>"
    )


def _pictures(files: Sequence[Path], name: str) -> Iterator[str]:
    for file in files:
        data = base64.b64encode(file.read_bytes()).decode()
        alt = escape(f"{printable(file.stem).replace('_', ' ')}: {name}", quote=True)
        yield f'<img alt="{alt}" src="data:image/png;base64,{data}">'


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _table(columns: Columns) -> str:
    kinds = {header: "" if _is_numeric(cells) or header == "" else ' class="text"' for header, cells in columns.items()}
    head = "".join(f"<th{kinds[header]}>{escape(header)}</th>" for header in columns)
    lines = []
    for cells in zip(*columns.values(), strict=True):
        row = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds.values(), cells, strict=True))
        lines.append(f"<tr>{row}</tr>")
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{chr(10).join(lines)}\n</table></div>'


def _markdown_table(columns: Columns) -> str:
    rule = ["---:" if header and _is_numeric(cells) else "---" for header, cells in columns.items()]
    rows = [list(columns), rule, *([_plain(cell) for cell in cells] for cells in zip(*columns.values(), strict=True))]
    rows[0] = [_plain(header) for header in rows[0]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _is_numeric(cells: Iterable[str]) -> bool:
    return all(cell == MISSING or cell.lstrip("-")[:1].isdigit() for cell in cells)


def _plain(text: str) -> str:
    """Escape a text so that Markdown shows it as it is, on one line."""
    return MARKDOWN.sub(r"\\\1", " ".join(text.split()))

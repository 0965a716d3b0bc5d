"""Pieces of a page: the page itself, figures and tables that can be downloaded, rows of facts."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from urllib.parse import quote

from consilience.core.names import clean
from consilience.report._style import SCRIPT, STYLE
from consilience.report._svg import esc
from consilience.report._text import Column, cell, rows_of

# The page asks the network for nothing, and the browser enforces it.
POLICY = "default-src 'none';style-src 'unsafe-inline';script-src 'unsafe-inline';img-src data:"


def document(title: str, lead: Sequence[str], body: str, footer: str) -> str:
    """Write the HTML text of a page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<link rel="icon" href="data:,"><title>{esc(title)}</title><style>{STYLE}</style></head><body>'
        f"<header><p class=brand>Consilience</p><h1>{esc(title)}</h1>"
        f"<p class=lead>{' <i>/</i> '.join(map(esc, lead))}</p></header>"
        f"<main>{body}</main><footer>{footer}</footer><script>{SCRIPT}</script></body></html>\n"
    )


def slug(title: str) -> str:
    """Make the name of a file of a title.

    >>> slug("Accuracy (%) over stages")
    'accuracy-over-stages'
    """
    return re.sub(r"[^a-z0-9]+", "-", clean(title).lower()).strip("-")[:60] or "figure"


def figure(title: str, svg: str, note: str = "", wide: bool = False) -> str:
    """Write a chart with its title, and buttons that download it."""
    small = f"<small>{esc(note)}</small>" if note else ""
    buttons = "".join(
        f'<button type="button" data-save="{kind}" aria-label="{esc(title)} as {kind.upper()}">'
        f"{kind.upper()}</button>"
        for kind in ("svg", "png")
    )
    caption = f"<figcaption><span>{esc(title)}{small}</span><span class=save>{buttons}</span></figcaption>"
    return (
        f'<figure class="card{" wide" if wide else ""}" data-name="{slug(title)}">{caption}'
        f"<div class=scroll>{svg}</div></figure>"
    )


def csv_of(found: Sequence[Column]) -> str:
    """Write columns as CSV, safe for spreadsheets.

    >>> csv_of([Column("name", ["a,b", "=1"], False), Column("n", ["1", "-"])])
    'name,n\\r\\n"a,b",1\\r\\n\\'=1,-\\r\\n'
    """
    text = io.StringIO()
    csv.writer(text).writerows(
        [cell(clean(value)) for value in row] for row in ([each.name for each in found], *rows_of(found))
    )
    return text.getvalue()


def sheet(
    title: str,
    found: Sequence[Column],
    special: Mapping[tuple[int, str], str] | None = None,
    note: str = "",
    wide: bool = False,
) -> str:
    """Write a table with its title, and a link that downloads it as CSV.

    Args:
        title: of the table.
        found: its columns.
        special: the HTML of cells that are not plain text, by row and column name.
        note: a sentence below the title.
        wide: whether it takes the width of the page.
    """
    head = "".join(
        f'<th scope="col"{" class=r" if column.right else ""}>{esc(column.name)}</th>' for column in found
    )
    rows = []
    for i in range(len(found[0].cells)):
        cells = []
        for place, column in enumerate(found):
            text = esc(column.cells[i])
            plain = f"<td{' class=r' if column.right else ''}>{text if text != '-' else '<i>-</i>'}</td>"
            if not place:
                plain = f'<th scope="row">{text}</th>'
            cells.append((special or {}).get((i, column.name), plain))
        rows.append(f"<tr>{''.join(cells)}</tr>")

    small = f"<small>{esc(note)}</small>" if note else ""
    # A link with the data in it works without scripts, and asks no server.
    link = f"data:text/csv;charset=utf-8,{quote(csv_of(found))}"
    save = (
        f'<a class=save download="{slug(title)}.csv" href="{link}" aria-label="{esc(title)} as CSV">CSV</a>'
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return (
        f'<div class="card sheet{" wide" if wide else ""}"><h4><span>{esc(title)}{small}</span>{save}</h4>'
        f"<div class=scroll>{table}</div></div>"
    )


def copy(title: str, text: str) -> str:
    """Write a text with a button that copies it."""
    return (
        f'<div class="card copy"><h4>{esc(title)}<button type="button">Copy</button></h4>'
        f'<textarea readonly rows="8" spellcheck="false" wrap="off" aria-label="{esc(title)}">\n'
        f"{escape(text)}</textarea></div>"
    )


def chips(facts: Iterable[tuple[str, str]]) -> str:
    """Write names and values in a row."""
    shown = "".join(f"<span><b>{esc(name)}</b> {esc(value)}</span>" for name, value in facts)
    return f"<p class=chips>{shown}</p>"

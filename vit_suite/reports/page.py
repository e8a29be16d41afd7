"""A report as one HTML file: it holds its pictures, data and scripts, and reads nothing else, on disk or on the net."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1080px; padding: 24px; color: #1c2733; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 10px; border-top: 1px solid #dde3ea;
padding-top: 20px; }
.sub { color: #5a6b7c; margin: 0 0 18px; } .tiles { display: flex; flex-wrap: wrap; gap: 10px; }
.tile { background: #f2f5f9; border-radius: 8px; padding: 10px 14px; min-width: 110px; }
.tile b { display: block; font-size: 20px; } .tile span { color: #5a6b7c; font-size: 13px; }
table { border-collapse: collapse; font-size: 14px; } th, td { text-align: left; padding: 4px 12px 4px 0;
vertical-align: top; border-bottom: 1px solid #e6ebf0; } td.n, th.n { text-align: right;
font-variant-numeric: tabular-nums; }
pre { background: #f2f5f9; border-radius: 8px; padding: 12px; overflow-x: auto; font-size: 13px; white-space: pre-wrap;
overflow-wrap: anywhere; }
.grid { display: flex; flex-wrap: wrap; gap: 12px; } img.sheet { max-width: 100%; border: 1px solid #dde3ea; }
.wide { overflow-x: auto; } .strip { white-space: nowrap; } .strip figure { display: inline-block; margin: 0 6px 6px 0;
text-align: center; font-size: 11px; color: #5a6b7c; width: 76px; overflow: hidden; text-overflow: ellipsis; }
.strip img { width: 64px; height: 64px; object-fit: contain; image-rendering: pixelated; background: #f2f5f9; }
.query img { outline: 3px solid #1f77b4; outline-offset: -3px; } details { margin: 8px 0; } summary { cursor: pointer; }
"""


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]], head: str = "", foot: str = "") -> str:
    """The whole document. `title`, `subtitle` and the sections' names are text; their bodies, `head`, `foot` are
    HTML."""
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>\n" for name, content in sections if content)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>\n{head}</head>\n'
        f'<body><h1>{escape(title)}</h1><p class="sub">{escape(subtitle)}</p>\n{body}{foot}</body></html>\n'
    )


def tiles(values: Mapping[str, str]) -> str:
    """Figures in large print, each with its name below."""
    cells = (
        f'<div class="tile"><b>{escape(text)}</b><span>{escape(name)}</span></div>' for name, text in values.items()
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of text; columns that hold numbers stand to the right."""
    if not rows:
        return ""
    columns = list(zip(*rows, strict=True))
    numeric = [all(isinstance(cell, (int, float)) or cell in ("", None) for cell in column) for column in columns]
    marks = [' class="n"' if there else "" for there in numeric]

    def line(tag: str, cells: Sequence[Any]) -> str:
        marked = zip(marks, cells, strict=True)
        return "<tr>" + "".join(f"<{tag}{mark}>{escape(shown(cell))}</{tag}>" for mark, cell in marked) + "</tr>"

    lines = line("th", header) + "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table>{lines}</table></div>'


def shown(value: Any) -> str:
    """A cell as text: floats with at most five digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, (list, dict)):
        return json.dumps(value)
    return str(value)


def folded(title: str, content: str) -> str:
    """HTML that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def text(content: str) -> str:
    """Text as it stands, in a box."""
    return f"<pre>{escape(content)}</pre>"


def picture(path: Path) -> str:
    """A PNG file inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="wide"><img class="sheet" alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></div>'


def strips(rows: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Rows of (thumbnail, caption); the first of a row is the query."""
    lines = []
    for row in rows:
        figures = (
            f'<figure class="{"query" if place == 0 else ""}"><img src="{uri}" alt="">{escape(caption)}</figure>'
            for place, (uri, caption) in enumerate(row)
        )
        lines.append(f'<div class="strip">{"".join(figures)}</div>')
    return "".join(lines)

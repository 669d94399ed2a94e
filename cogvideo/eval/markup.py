"""Pieces of the HTML pages of reports."""

import html
from collections.abc import Sequence
from pathlib import Path

_STYLE = Path(__file__).with_name("report.css")


def escape(text: object) -> str:
    return html.escape(str(text))


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, with a row of names."""
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in names)
    body = ""
    for row in rows:
        body += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def page(title: str, body: str) -> str:
    """A whole page that needs no other file; `body` is HTML."""
    style = _STYLE.read_text(encoding="utf-8")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{style}</style></head><body>{body}</body></html>"
    )

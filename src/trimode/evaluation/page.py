"""Pieces of the report's HTML: its style, and text and tables that cannot break it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; margin: 0 auto;
  max-width: 76rem; padding: 1rem 1.2rem 3rem; }
h1 { font-size: 1.6rem; margin: .6rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #e5e7eb; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.lead, figcaption p, .note { color: #4b5563; margin: .2rem 0; }
figcaption p { font-size: .85rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.4rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .6rem;
  margin: 1rem 0 0; }
.facts div { background: #f3f4f6; border-radius: 6px; padding: .5rem .7rem; }
.facts dt { color: #4b5563; font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figure img { width: 100%; height: auto; }
figcaption strong { display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid #e5e7eb;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: #4b5563; }
pre { background: #f3f4f6; border-radius: 6px; padding: .6rem .8rem; margin: .2rem 0 .6rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; line-height: 1.4; }
summary { cursor: pointer; color: #374151; }
"""


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of text; wide ones scroll on their own."""
    head = "".join(f"<th>{safe(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{safe(cell)}</td>' for cell in line)}</tr>" for line in lines
    )
    rows = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{rows}</table></div>'


def pre(text: str) -> str:
    """Text with its line breaks."""
    return f"<pre>\n{safe(text) or ' '}</pre>"  # HTML drops a line break right after <pre>


def safe(text: str) -> str:
    """Text for HTML: nothing in it is markup, or a character that HTML forbids."""
    return html.escape(_UNSAFE.sub("\ufffd", text))

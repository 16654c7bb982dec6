"""One HTML file that needs nothing else: its style, for light and dark screens, and tables."""

from collections.abc import Iterable
from html import escape

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2024; --faint: #667; --rule: #dde1e6; --band: #f5f7f9;
  --good: #06702c; --bad: #b3261e;
  --c0: #1f6fc4; --c1: #d1600f; --c2: #23864a; --c3: #b0358a; --c4: #6f55c9; --c5: #8a7400; --c6: #c0392b;
  --c7: #52606d }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --text: #e4e7eb; --faint: #9aa5b1; --rule: #333a42;
  --band: #1c2126; --good: #5fd38a; --bad: #ff8a80;
  --c0: #6cb2ff; --c1: #ff9f5a; --c2: #62cf8a; --c3: #f086c8; --c4: #b09cff; --c5: #e0c440; --c6: #ff7f74;
  --c7: #a9b4c0 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem;
  background: var(--back); color: var(--text) }
h1, h2, h3 { line-height: 1.25 } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--rule); padding-bottom: .3rem }
p { max-width: 48rem } .faint { color: var(--faint) } .right { color: var(--good) } .wrong { color: var(--bad) }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 13.5px }
td, th { padding: .22rem .7rem; text-align: left; vertical-align: top; white-space: nowrap }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
tr { border-bottom: 1px solid var(--rule) } tr.group td { border-top: 2px solid var(--rule) }
tr.ours { background: var(--band); font-weight: 600 }
pre { margin: 0; font-size: 13px } details { margin: .6rem 0 } summary { cursor: pointer }
.charts { display: flex; flex-wrap: wrap; gap: 1.2rem 1.5rem; margin: 1.5rem 0 } figure { margin: 0; max-width: 100% }
figcaption { font-size: 13.5px; max-width: 560px } figcaption.legend { color: var(--faint); min-height: 1.5em }
.key { margin-right: .9rem; white-space: nowrap } .key::before { content: "\\25CF\\00A0"; color: var(--c) }
.key.dashed::before { content: "\\2504\\00A0" } svg { max-width: 100%; height: auto; display: block }
svg text { fill: var(--faint); font-size: 11px } svg .grid { stroke: var(--rule); fill: none }
svg .line { stroke: var(--c); stroke-width: 1.8; fill: none } svg .dashed { stroke-dasharray: 5 4; stroke-width: 1.3 }
svg circle { fill: var(--c); fill-opacity: .8 }
""" + " ".join(f".c{i} {{ --c: var(--c{i}) }}" for i in range(8))


def page(title: str, body: str) -> str:
    """A whole document; `title` is text, `body` HTML."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


class Number(str):
    """Text that stands to the right in its column."""


def table(head: Iterable[str], rows: Iterable[str]) -> str:
    """A table of `rows`, as `row` makes them, under the titles of its columns."""
    titles = "".join(f"<th{_side(name)}>{escape(name)}" for name in head)
    return f'<div class="scroll"><table><thead><tr>{titles}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def row(cells: Iterable[str], kind: str = "") -> str:
    """A row of a table; `kind` is a class of the style."""
    return f'<tr class="{kind}">' + "".join(f"<td{_side(text)}>{escape(text)}" for text in cells)


def _side(text: str) -> str:
    return " class=number" if isinstance(text, Number) else ""


def charts(figures: Iterable[str]) -> str:
    """Figures beside each other."""
    return f'<div class="charts">{"".join(figures)}</div>'

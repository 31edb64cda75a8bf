"""A report as a page: one file, no script, nothing from outside; narrow and wide, light and dark."""

import base64
from collections.abc import Mapping
from html import escape as escape_html
from typing import TYPE_CHECKING, Any

from orthokit.checks import printable
from orthokit.palette import WORDS
from orthokit.report.words import ranked
from orthokit.tables import Column, Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from orthokit.report import Report

__all__ = ["escape", "fragment", "page"]

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #6b6b6b; --line: #dddddd; --ground: #ffffff; --raised: #f5f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #a0a0a0; --line: #3a3d42; --ground: #16181b; --raised: #202327 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1320px; padding: 16px; color: var(--ink); background: var(--ground);
  font: 16px/1.5 system-ui, sans-serif }
h1, h2 { overflow-wrap: anywhere } h1 { font-size: 1.4rem; margin: .2em 0 } h2 { font-size: 1.1rem; margin: 1.6em 0 .4em }
p.summary { font-size: 1.15rem; margin: .4em 0 }
pre { background: var(--raised); padding: 10px; overflow-x: auto; border-radius: 6px }
.wide { overflow-x: auto; margin: 10px 0; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: 4px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom }
tbody:last-child tr:last-child td { border-bottom: 0 }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--ground);
  min-width: min(14rem, 34vw); overflow-wrap: anywhere; white-space: normal }
tr.total td { font-weight: 600 } .word { text-align: left }
.chip { display: inline-block; padding: 0 8px; border-radius: 10px; color: #fff; font-size: .8rem; white-space: nowrap }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 12px }
figure { margin: 0; max-width: 760px }
figcaption { color: var(--soft); font-size: .85rem } img { width: 100%; height: auto; display: block }
.note { color: var(--soft); font-size: .88rem; overflow-wrap: anywhere }
@media (max-width: 640px) { body { padding: 12px } th, td { padding: 4px 6px } }
"""
WORD = ' class="word"'


def page(reports: "Mapping[str, Report]", *, top: int | None = 12, table: Table | None = None) -> str:
    """The page of one report, or of several side by side (``table``: their comparison).

    Args:
        reports: by name.
        top: layers of the last report that get pictures, the least orthogonal ones; None for all.
        table: shown first, where there are several.
    """
    from orthokit import plots

    with plots.own_style():
        return _page(reports, top, table)


def _page(reports: "Mapping[str, Report]", top: int | None, table: Table | None) -> str:
    from orthokit import plots

    last = list(reports.values())[-1]
    title = last.title if table is None else table.title
    parts = [f"<h1>{escape(title)}</h1>"]
    for name, report in reports.items():
        named = f"<strong>{escape(name)}:</strong> " if len(reports) > 1 else ""
        parts.append(f'<p class="summary">{named}{escape(report.summary)}</p>')
    if action := last.action:
        parts.append(f"<p>To train the layers that need it towards orthogonality:</p><pre>{escape(action)}</pre>")
    if table is not None:
        picture = plots.side_by_side({name: report.rows for name, report in reports.items()})
        parts.append("<h2>Side by side</h2>" + _picture(picture, "every layer of every network"))
        parts.append(_table(table.columns, table.rows, table.totals) + _notes(table))
    parts.append("<h2>Layers, in the order of the model</h2>" + _picture(plots.overview(last.rows), "overview of all layers"))
    parts.append("<h2>Layers, the least orthogonal first</h2>" + fragment(last, summary=False))
    rows = [row for row in ranked(last.rows) if row["mean_length_error"] is not None]
    shown = rows if top is None else rows[:top]
    parts += [_layer(last, row) for row in shown]
    if len(shown) < len(rows):
        parts.append(
            f'<p class="note">Pictures of the {len(shown)} least orthogonal of {len(rows)} layers; the table holds all.</p>'
        )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def fragment(report: "Report", *, summary: bool = True) -> str:
    """Summary and table of a report, for a notebook."""
    told = f"<p>{escape(report.summary)}</p>" if summary else ""
    return told + _table(report.columns, ranked(report.rows), report.totals) + _notes(report)


def _table(columns: tuple[Column, ...], rows: Any, totals: Mapping[str, Row]) -> str:
    every = [*rows, *totals.values()]
    shown = [column for column in columns if column.shown and any(row.get(column.key) is not None for row in every)]
    head = "".join(f"<th{WORD * _is_word(column)}>{escape(column.header)}</th>" for column in shown)
    body = "".join(f"<tr>{''.join(_cell(column, row) for column in shown)}</tr>" for row in rows)
    foot = "".join(
        f'<tr class="total"><td>{escape(str(row.get("label", name)))}</td>'
        + "".join(
            f"<td>{escape(column.show(row[column.key])) if row.get(column.key) is not None else ''}</td>" for column in shown[1:]
        )
        + "</tr>"
        for name, row in totals.items()
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody><tbody>{foot}</tbody></table></div>'


def _is_word(column: Column) -> bool:
    return column.key.endswith("word")


def _cell(column: Column, row: Row) -> str:
    value = row.get(column.key)
    if _is_word(column) and value in WORDS:
        return f'<td{WORD}><span class="chip" style="background:{WORDS[value]}">{escape(value)}</span></td>'
    return f"<td>{escape(column.show(value))}</td>"


def _notes(table: Table) -> str:
    return "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)


def _layer(report: "Report", row: Row) -> str:
    """The pictures of a layer."""
    from orthokit import plots

    word = row["word"]
    chip = f' <span class="chip" style="background:{WORDS[word]}">{word}</span>' if word else ""
    pictures = []
    with plots.own_style(plots.SMALL):
        for title, draw_in in plots.details(report.kernel(row["layer"])).items():
            figure = plots.new_figure(4.2, 3.2)
            draw_in(figure.subplots())
            pictures.append(_picture(figure, f"{title} of {row['layer']}", title))
    more = f", group 1 of {row['groups']} in the heat map" if row["groups"] > 1 else ""
    shape = f'<p class="note">{row["o"]} filters of {row["n"]} weights ({row["shape"]}){more}</p>'
    return f'<h2>{escape(row["layer"])}{chip}</h2>{shape}<div class="pictures">{"".join(pictures)}</div>'


def _picture(figure: "Figure", alt: str, caption: str = "") -> str:
    from orthokit import plots

    told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    data = base64.b64encode(plots.svg(figure, alt).encode()).decode()
    return f'<figure>{told}<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}"></figure>'


def escape(text: str) -> str:
    """Text of files, such as a layer's name, as it may stand in a page."""
    return escape_html(printable(text))

"""Write tables and charts to ``summary.json``, a self-contained ``report.html``, and SVG and PNG figures.

A report reads records only; nothing here knows what a study is about.
"""

import dataclasses
import html
import json
from collections.abc import Sequence
from pathlib import Path

import altair as alt
import pandas as pd
import vl_convert

from experiments.harness.running import files


@dataclasses.dataclass(frozen=True)
class Figure:
    """Panels side by side under one caption.

    Attributes:
        name: of the image files.
        title: what one sees in it.
        caption: how to read it.
        panels: charts without a width, each with a title of its own.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[alt.Chart | alt.LayerChart]


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, paragraphs, and below them tables and figures."""

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[tuple[str, pd.DataFrame]] = ()  # (caption, table)
    figures: Sequence[Figure] = ()


def write(workdir: Path, title: str, lead: str, sections: Sequence[Section], summary: dict) -> None:
    """Writes ``summary.json``, ``figures/NAME.svg`` and ``.png``, and ``report.html``, atomically each."""
    workdir = files.at(workdir)
    files.write_json(workdir / "summary.json", summary)
    figures = [figure for section in sections for figure in section.figures]
    for figure in figures:
        image = still(figure).to_json()
        files.write(
            workdir / "figures" / f"{figure.name}.svg",
            vl_convert.vegalite_to_svg(image, _VEGA_LITE),
        )
        files.write(
            workdir / "figures" / f"{figure.name}.png",
            vl_convert.vegalite_to_png(image, _VEGA_LITE, scale=2),
        )
    files.write(workdir / "report.html", to_html(title, lead, sections))


def still(figure: Figure, columns: int = 2) -> alt.ConcatChart:
    """Returns a figure's panels as one image of fixed size."""
    sized = [panel.properties(width=340, height=230) for panel in figure.panels]
    chart = alt.concat(*sized, columns=min(columns, len(sized)), title=figure.title)
    return chart.configure(**_CONFIG).resolve_scale(color="shared")


_CONFIG = {
    "background": "white",
    "font": "sans-serif",
    "axis": {"grid": True, "gridColor": "#eee", "domainColor": "#999", "tickColor": "#999"},
    "view": {"stroke": None},
    "legend": {"orient": "bottom", "columns": 2},
}

_FIT_WIDTH = {"type": "fit-x", "contains": "padding"}

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
  max-width: 1080px; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; } h3 { margin-bottom: 0; }
.lead { font-size: 1.1rem; border-left: 4px solid #4269d0; padding-left: 1rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1rem; }
.panel { width: 100%; min-width: 0; min-height: 280px; } .caption { color: #555; font-size: .92rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
thead th { border-bottom: 2px solid #999; }
code { background: #f4f4f4; padding: .1em .3em; overflow-wrap: anywhere; }
"""

# The version that Altair's charts are written in, as vl-convert names it: "6.4" of "v6.4.1".
_VEGA_LITE = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])

_DRAW = """
window.drawn = 0;
for (const [id, spec] of Object.entries(JSON.parse(document.getElementById("specs").textContent))) {
  vegaEmbed("#" + id, spec, { actions: false, renderer: "svg" }).then(() => { window.drawn += 1; });
}
"""


def to_html(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Returns the page, with its scripts, styles and data inside: it needs no network."""
    specs: dict[str, dict] = {}
    body = "\n".join(_section(section, specs) for section in sections)
    # "</" would end the script element early wherever it stood in a string.
    data = json.dumps(specs).replace("</", "<\\/")
    library = vl_convert.javascript_bundle(vl_version=_VEGA_LITE)  # pyright: ignore[reportCallIssue]
    library = library.replace("</script", "<\\/script")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head>
<body><h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>
{body}
<script type="application/json" id="specs">{data}</script>
<script>{library}</script>
<script>{_DRAW}</script>
</body></html>
"""


def _section(section: Section, specs: dict[str, dict]) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{html.escape(text)}</p>" for text in section.paragraphs]
    for caption, table in section.tables:
        parts.append(f'<p class="caption">{html.escape(caption)}</p>')
        parts.append(f'<div class="table">{table.to_html(index=False, border=0, na_rep="—")}</div>')
    parts += [_figure(figure, specs) for figure in section.figures]
    return "\n".join(parts)


def _figure(figure: Figure, specs: dict[str, dict]) -> str:
    panels = []
    for panel in figure.panels:
        key = f"panel-{len(specs)}"
        fitted = panel.properties(width="container", height=220, autosize=_FIT_WIDTH)
        specs[key] = fitted.configure(**_CONFIG).to_dict()
        panels.append(f'<div class="panel" id="{key}"></div>')
    return (
        f'<h3>{html.escape(figure.title)}</h3><p class="caption">{html.escape(figure.caption)}</p>'
        f'<div class="panels">{"".join(panels)}</div>'
    )

"""The page: findings first, then where they come from, then sections; it needs no network."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from experiments.harness.reporting import prose, provenance
from experiments.harness.reporting.charts import Scale
from experiments.harness.reporting.findings import (
    UNRESOLVED,
    Finding,
    capitalized,
    grouped,
    headline,
)
from experiments.harness.reporting.layout import Figure, Report, Section
from experiments.harness.reporting.statistics import CONFIDENCE
from experiments.harness.reporting.values import listed

CONFIG: dict[str, Any] = {
    "background": "white",
    "font": "sans-serif",
    "axis": {"grid": True, "gridColor": "#eee", "domainColor": "#999", "tickColor": "#999"},
    "view": {"stroke": None},
    "legend": {"orient": "bottom", "columns": 2},
}
# Of figures whose legend the page draws.
_PAGE_CONFIG: dict[str, Any] = CONFIG | {"legend": {"disable": True}}

_FINDINGS_SHOWN = 6  # of one question; the others are folded

_SMOKE = "A smoke run: nothing can be concluded from it."

_FIT_WIDTH = {"type": "fit-x", "contains": "padding"}

_STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")

# The version that Altair's charts are written in, as vl-convert names it: "6.4" of "v6.4.1".
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])

_DRAW = """
window.drawn = 0;
for (const [id, spec] of Object.entries(JSON.parse(document.getElementById("specs").textContent))) {
  vegaEmbed("#" + id, spec, { actions: false, renderer: "svg" }).then(() => { window.drawn += 1; });
}
"""


def to_html(report: Report, records: str) -> str:
    """The page, with its scripts, styles and data inside.

    Args:
        report: what is written.
        records: where they lie, beside the page; "" where there are none.
    """
    specs: dict[str, dict] = {}
    body = "\n".join(_section(section, specs) for section in report.sections)
    # "</" would end the script element early wherever it stood in a string.
    data = json.dumps(specs).replace("</", "<\\/")
    library = vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # pyright: ignore[reportCallIssue]
    library = library.replace("</script", "<\\/script")
    title = html.escape(report.title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head>
<body><h1>{title}</h1>
{_head(report)}
{_findings(report.findings)}
{_origin(report, records)}
{body}
<script type="application/json" id="specs">{data}</script>
<script>{library}</script>
<script>{_DRAW}</script>
</body></html>
"""


def _head(report: Report) -> str:
    asked = report.source.question if report.source else ""
    smoke = _SMOKE if report.source and report.source.is_smoke else ""
    parts = [("question", asked), ("lead", report.lead), ("caption", _certainty(report))]
    parts += [("status", text) for text in (smoke, *report.status)]
    return "\n".join(f'<p class="{kind}">{html.escape(text)}</p>' for kind, text in parts if text)


def _certainty(report: Report) -> str:
    """The intervals' level and how many seeds there are, where known."""
    said = []
    if any(finding.low is not None for finding in report.findings):
        said.append(f"Intervals are at {100 * CONFIDENCE:.0f} %.")
    if report.source and report.source.seeds:
        least, most = report.source.seeds
        count = f"{most}" if least == most else f"{least} to {most}"
        said.append(f"{count} {'seed' if most == 1 else 'seeds'} per setting.")
    return " ".join(said)


def _findings(findings: Sequence[Finding]) -> str:
    """Each question with its answer, and below it what was measured."""
    parts = []
    for question, group in grouped(findings).items():
        parts.append(
            f'<h2 class="asked">{html.escape(question)} '
            f'<span class="said">{html.escape(capitalized(headline(group)))}.</span></h2>'
        )
        first, more = group[:_FINDINGS_SHOWN], group[_FINDINGS_SHOWN:]
        parts.append(_grid(first))
        if more:
            parts.append(f"<details><summary>{len(more)} more</summary>{_grid(more)}</details>")
    return f'<div class="answers">{"".join(parts)}</div>' if parts else ""


def _grid(findings: Sequence[Finding]) -> str:
    return f'<div class="findings">{"".join(map(_finding, findings))}</div>'


def _finding(finding: Finding) -> str:
    kind = " open" if finding.answer == UNRESOLVED else ""
    value = "" if finding.estimate is None else finding.value_text()
    remarks = "; ".join(finding.remarks())
    return (
        f'<div class="finding"><span class="quantity">{html.escape(finding.quantity)}</span>'
        f'<span class="answer{kind}">{html.escape(finding.answer)}</span>'
        f'<span class="value">{html.escape(value)}</span>'
        f'<span class="remark">{html.escape(capitalized(remarks))}</span></div>'
    )


def records_of(workdir: Path) -> str:
    """Where a folder's records lie, from the page."""
    for name in ("records.jsonl", "records.jsonl.gz", "trials", "benchmark.json"):
        if (workdir / name).exists():
            return name
    return ""


def _origin(report: Report, records: str) -> str:
    """Papers, records, the command, and when and where the page was written."""
    commit, source = provenance.commit(), report.source
    rows = {}
    if source and source.papers:
        rows["Papers"] = ", ".join(_link(*provenance.paper_link(paper)) for paper in source.papers)
    links = [_link(name, name) for name in (records, "summary.json") if name]
    rows["Records"] = ", ".join(links)
    if source:
        rows["Rebuild with"] = f"<code>{html.escape(source.command)}</code>, DIR being this folder"
    written = [provenance.today(), html.escape(provenance.machine())]
    if commit:
        address = f"{provenance.REPOSITORY}/commit/{commit}"
        changed = " with changes that are not committed" if provenance.has_changes() else ""
        written.insert(1, f"commit {_link(commit[:10], address)}{changed}")
    rows["Written"] = ", ".join(written)
    versions = report.summary.get("versions")
    if versions:
        versions = [versions] if isinstance(versions, dict) else versions
        rows["Measured with"] = html.escape("; ".join(map(listed, versions)))
    items = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows.items())
    return f'<dl class="origin">{items}</dl>'


def _link(text: str, address: str) -> str:
    shown = html.escape(text)
    return f'<a href="{html.escape(address)}">{shown}</a>' if address else shown


def _section(section: Section, specs: dict[str, dict]) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{prose.to_html(text)}</p>" for text in section.paragraphs]
    for caption, table in section.tables:
        parts.append(f'<p class="caption">{html.escape(caption)}</p>{_table(table)}')
    parts += [_figure(figure, specs) for figure in section.figures]
    for caption, table in section.folded:
        summary = f"<summary>{html.escape(caption)}</summary>"
        parts.append(f"<details>{summary}{_table(table)}</details>")
    return "\n".join(parts)


def _table(table: pd.DataFrame) -> str:
    return f'<div class="table">{table.to_html(index=False, border=0, na_rep="—")}</div>'


def _figure(figure: Figure, specs: dict[str, dict]) -> str:
    panels = []
    for panel in figure.panels:
        key = f"panel-{len(specs)}"
        fitted = panel.properties(width="container", height=220, autosize=_FIT_WIDTH)
        specs[key] = fitted.configure(**(_PAGE_CONFIG if figure.scales else CONFIG)).to_dict()
        panels.append(f'<div class="panel" id="{key}"></div>')
    return (
        f'<h3>{html.escape(figure.title)}</h3><p class="caption">{html.escape(figure.caption)}</p>'
        f'{"".join(map(_legend, figure.scales))}<div class="panels">{"".join(panels)}</div>'
    )


_GLYPHS = {
    "circle": "●", "square": "■", "triangle-up": "▲", "diamond": "◆", "cross": "✚", "triangle-down": "▼",
}  # fmt: skip


def _legend(scale: Scale) -> str:
    items = "".join(
        f"<span>{_mark(scale.channel, mark)} {html.escape(str(name))}</span>"
        for name, mark in zip(scale.names, scale.marks, strict=True)
    )
    return f'<p class="legend"><b>{html.escape(scale.title)}</b>{items}</p>'


def _mark(channel: str, mark: Any) -> str:
    if channel == "color":
        return f'<i style="background:{mark}"></i>'
    if channel == "shape":
        return _GLYPHS[mark]
    dashes = "" if mark[1] == 0 else f' stroke-dasharray="{" ".join(map(str, mark))}"'
    return (
        '<svg width="26" height="8"><line x1="0" y1="4" x2="26" y2="4" stroke="#333" '
        f'stroke-width="2"{dashes}/></svg>'
    )

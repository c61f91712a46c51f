"""Writes a report: ``summary.json``, one self-contained ``report.html``, and figures as SVG and PNG.

A report reads records only; nothing here knows what a study is about.
"""

from pathlib import Path

import altair as alt
import vl_convert

from experiments.harness.reporting import page
from experiments.harness.reporting.layout import Figure, Report
from experiments.harness.running import files
from jaxquant.artifacts.plain import plain


def write(workdir: Path, report: Report) -> dict:
    """Writes ``summary.json``, figures as SVG and PNG, and ``report.html``; returns the summary."""
    workdir = files.at(workdir)
    found = plain([finding.to_json() for finding in report.findings])
    summary = report.summary | {report.findings_key: found}
    files.write_json(workdir / "summary.json", summary)
    figures = [figure for section in report.sections for figure in section.figures]
    for figure in figures:
        image = still(figure).to_json()
        files.write(
            workdir / "figures" / f"{figure.name}.svg",
            vl_convert.vegalite_to_svg(image, page.VEGA_LITE),
        )
        files.write(
            workdir / "figures" / f"{figure.name}.png",
            vl_convert.vegalite_to_png(image, page.VEGA_LITE, scale=2),
        )
    files.write(workdir / "report.html", page.to_html(report, page.records_of(workdir)))
    return summary


def still(figure: Figure, columns: int = 2) -> alt.ConcatChart:
    """Returns a figure's panels as one image of fixed size."""
    sized = [panel.properties(width=340, height=230) for panel in figure.panels]
    chart = alt.concat(*sized, columns=min(columns, len(sized)), title=figure.title)
    chart = chart.configure(**page.CONFIG)
    return chart.resolve_scale(color="shared") if figure.scales else chart

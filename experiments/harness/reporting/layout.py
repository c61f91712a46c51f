"""What a report is made of: findings, and sections of text, tables and figures."""

import dataclasses
from collections.abc import Sequence

import altair as alt
import pandas as pd

from experiments.harness.reporting.charts import Scale
from experiments.harness.reporting.findings import Finding
from experiments.harness.reporting.provenance import Source
from experiments.harness.reporting.values import listed


@dataclasses.dataclass(frozen=True)
class Figure:
    """Panels side by side under one caption.

    Attributes:
        name: of the image files.
        title: what one sees in it.
        caption: how to read it.
        panels: charts without a width, each with a title of its own.
        scales: that all panels share: one legend for the figure; without any, each panel has its own.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[alt.Chart | alt.LayerChart]
    scales: Sequence[Scale] = ()


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, paragraphs, and below them tables and figures.

    Attributes:
        title: of the section.
        paragraphs: as `experiments.harness.reporting.prose` reads them.
        tables: (caption, table) that are shown.
        figures: below the tables.
        folded: (caption, table) that open on a click.
    """

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[tuple[str, pd.DataFrame]] = ()
    figures: Sequence[Figure] = ()
    folded: Sequence[tuple[str, pd.DataFrame]] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """All that is written.

    Attributes:
        title: of the page.
        findings: what was asked and answered, first on the page.
        sections: below.
        summary: of ``summary.json``, which gets the findings too.
        status: what of the run is unfinished or left out.
        source: where it comes from; None where only the records are known.
        lead: a sentence before everything, where there are no findings.
        findings_key: of the findings in the summary.
    """

    title: str
    findings: Sequence[Finding]
    sections: Sequence[Section]
    summary: dict
    status: Sequence[str] = ()
    source: Source | None = None
    lead: str = ""
    findings_key: str = "findings"


def method_section(
    paragraphs: Sequence[str],
    summary: dict,
    settings: Sequence[str] = (),
    folded: Sequence[tuple[str, pd.DataFrame]] = (),
) -> Section:
    """How it was measured: the study's text, its settings, and the versions of the records."""
    versions = "; ".join(map(listed, summary.get("versions", ())))
    versions = [f"Versions: {versions}."] if versions else []
    trials = summary["trials"]
    counts = [f"{trials['finished']} of {trials['expected']} trials are finished."]
    said = [*paragraphs, *settings, *counts, *versions]
    return Section("How this was measured", said, folded=folded)

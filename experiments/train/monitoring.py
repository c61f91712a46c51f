"""Monitor a run's quantizers every few steps: records, TensorBoard histograms, and a figure over time.

A monitored step is the run's own: its statistics are another program's, which reads the parameters and the
batch before the step takes them, and changes nothing.
"""

import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import jax
import pandas as pd

import jaxquant as jq
from experiments.harness.reporting import report
from experiments.harness.reporting.layout import Figure, Report, Section
from experiments.harness.running import files, processes
from experiments.harness.training import metrics

ROLES = {
    "lhs": "activations",
    "rhs": "weights",
    "dlhs": "gradients for ∂activations",
    "drhs": "gradients for ∂weights",
}
FIELDS = {
    "sqnr": "SQNR, dB",
    "saturated": "share saturated",
    "underflow": "share of nonzero values that become zero",
    "amax": "largest magnitude",
}
_OF_HISTORY = 16  # records


class Monitor:
    """Records statistics of a run's steps under ``monitor`` in its folder.

    Attributes:
        seconds: that it took so far.
    """

    def __init__(self, statistics: Callable[..., Any] | None, every: int, workdir: Path):
        """Starts with no record.

        Args:
            statistics: from (parameters, batch) to what `jaxquant.nnx.monitor` gives, compiled.
            every: steps between records; 0 for none.
            workdir: the run's.
        """
        self._statistics, self._every, self._folder = statistics, every, workdir / "monitor"
        self._workdir, self.seconds = workdir, 0.0

    def before(self, at: int, state: Any, batch: Any, writers: Sequence[metrics.Writer]) -> None:
        """Records the next step if it is to be monitored.

        Args:
            at: its number, from 1.
            state: that it starts from; only read.
            batch: that it takes.
            writers: of figures.
        """
        if not self._every or at % self._every or self._statistics is None:
            return
        jax.block_until_ready(state)  # what was still running is no part of this
        start = time.perf_counter()
        rows = jq.monitoring.rows(self._statistics(state.params, batch))
        if processes.is_first():
            files.write_json(self._folder / f"{at:09}.json", {"step": at, "rows": rows})
            values = {f"monitor/{tag(r)}/{f}": r[f] for r in rows for f in FIELDS}
            counts = {f"monitor/{tag(r)}": r["histogram"] for r in rows}
            for writer in writers:
                writer.write(at, {name: x for name, x in values.items() if x is not None})
                writer.write_histograms(at, counts)
        self.seconds += time.perf_counter() - start

    def on_end(self) -> None:
        """Writes ``report.html`` of all records."""
        if not self._every or not processes.is_first():
            return
        found = records(self._workdir)
        if not found:
            logging.getLogger(__name__).warning(
                "nothing was monitored: no step is a multiple of %d", self._every
            )
            return
        write_report(self._workdir, found)


def tag(row: dict[str, Any]) -> str:
    """Returns a row's name: its product, its place in scans and its role."""
    return "/".join((row["product"], *map(str, row["turn"]), row["role"]))


def records(workdir: Path) -> list[dict[str, Any]]:
    """Returns the records of a run in the order of their steps; damaged ones are set aside with a warning."""
    found = [files.read_json(path) for path in sorted((workdir / "monitor").glob("[0-9]*.json"))]
    return [x for x in found if isinstance(x, dict)]


# ---------------------------------------------------------------------------------------------------
# The report


def write_report(workdir: Path, found: Sequence[dict[str, Any]]) -> None:
    """Writes ``report.html``, ``summary.json`` and figures of a run's records.

    Args:
        workdir: the run's.
        found: of `records`.
    """
    table = to_table(found)
    sections = [
        Section(
            "What is quantized, over time",
            (
                "A line for each layer and product. SQNR counts the noise of the grid alone; what stays in "
                f"float has none and is left out. A largest value above those of the {_OF_HISTORY} records "
                "before would clip under a scale taken from them.",
            ),
            figures=[*_figures(table)],
        ),
        Section("The last record", tables=[("Worst SQNR first.", _last(table))]),
    ]
    last = int(table["step"].to_numpy().max())
    lead = f"{len(found)} records of {table['product'].nunique()} products, to step {last}."
    rows = found[-1]["rows"]
    summary = {"records": len(found), "last_step": last, "last": rows}
    report.write(workdir, Report("What the quantizers did", [], sections, summary, lead=lead))


def to_table(found: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Returns a row for each record, product, layer and role; ``growth`` is amax over the largest before."""
    table = pd.DataFrame(
        [
            {"step": one["step"], "layer": _layer(row), "kind": _kind(row)}
            | {k: v for k, v in row.items() if k not in ("histogram", "turn")}
            | {"name": tag(row)}
            for one in found
            for row in one["rows"]
        ]
    )
    for field in FIELDS:
        table[field] = pd.to_numeric(table[field])
    before = table.groupby("name")["amax"].transform(
        lambda x: x.shift().rolling(_OF_HISTORY, min_periods=1).max()
    )
    table["growth"] = table["amax"] / before
    return table


def _layer(row: dict[str, Any]) -> str:
    """Returns the layer: the numbers in a product's path, or its place in scans."""
    own = [part for part in row["product"].split("/") if part.isdecimal()]
    return ".".join([*own, *map(str, row["turn"])]) or "–"


def _kind(row: dict[str, Any]) -> str:
    """Returns the product's path without the layer."""
    path = re.sub(r"(^|/)\d+(?=/|$)", "", row["product"]).strip("/")
    return path.removesuffix("/kernel")


def _figures(table: pd.DataFrame) -> Iterator[Figure]:
    for field, words in {**FIELDS, "growth": "amax over the largest before"}.items():
        panels = []
        for role, name in ROLES.items():
            own: Any = table[(table["role"] == role) & table[field].notna()]
            if field == "amax" or field == "growth":
                own = own[own[field] > 0]
            if len(own):
                panels.append(_panel(own, field, words, name))
        if panels:
            caption = f"{words[0].upper()}{words[1:]} by step; color by layer, dashes by product."
            yield Figure(f"monitor_{field}", words, caption, panels)


def _panel(own: pd.DataFrame, field: str, words: str, name: str) -> alt.Chart:
    is_log = field in ("amax", "growth")
    scale = alt.Scale(type="log") if is_log else alt.Scale(zero=field != "sqnr")
    shown = own[["step", "layer", "kind", field]]
    return (
        alt.Chart(shown, title=name)
        .mark_line(point=len(own["step"].unique()) < 3)
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y(f"{field}:Q", title=words, scale=scale),
            color=alt.Color("layer:N", title="layer"),
            strokeDash=alt.StrokeDash("kind:N", title="product"),
            tooltip=["step", "layer", "kind", field],
        )
    )


def _last(table: Any) -> pd.DataFrame:
    last = table[table["step"] == table["step"].max()].sort_values("sqnr", na_position="last")
    shown = last[["product", "layer", "role", *FIELDS, "growth", "nonfinite"]].copy()
    for field in (*FIELDS, "growth", "nonfinite"):
        shown[field] = [
            None if x is None or math.isnan(x) else float(f"{x:.4g}") for x in shown[field]
        ]
    return shown.rename(columns={"growth": "amax / largest before"})

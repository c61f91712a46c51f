"""The figures of the report, from tables."""

# pandas' selections, and Altair's layers, are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false

import altair as alt
import pandas as pd

from experiments.harness.reporting.report import Figure

_GROUP = ["task", "size", "steps", "schedule"]


def against_bits(gaps: list[dict]) -> Figure:
    """Gap to full precision against bits a number, everything counted."""
    table = pd.DataFrame([row for row in gaps if row["arm"] != "fp32"])
    panels = []
    for (task, size, steps, schedule), rows in table.groupby(_GROUP, sort=False):
        rows = rows.assign(
            low=rows["low"].fillna(rows["gap"]), high=rows["high"].fillna(rows["gap"])
        )
        spread = rows["exact_sd"].fillna(0.0).iloc[0]
        x = alt.X("bits:Q", title="bits a number, everything counted", scale=alt.Scale(zero=False))
        base = alt.Chart(rows).encode(x=x, color=alt.Color("arm:N", title="state", sort=None))
        band = alt.Chart(pd.DataFrame([{"low": -spread, "high": spread}])).mark_rect(
            opacity=0.15, color="#555"
        )
        panels.append(
            alt.layer(
                band.encode(
                    y=alt.Y("low:Q", title="loss above full precision (nats)"), y2="high:Q"
                ),
                base.mark_rule().encode(y="low:Q", y2="high:Q"),
                base.mark_point(filled=True, size=70).encode(
                    y="gap:Q", tooltip=["arm", "bits", "gap", "low", "high"]
                ),
            ).properties(title=f"{task} {size}, {steps} steps, {schedule}")
        )
    caption = (
        "Points: mean paired gap; rules: 90 % intervals over seeds; grey: one SD of full precision's "
        "loss over seeds."
    )
    return Figure("gap_against_bits", "What few bits cost", caption, panels)


def widths_over_time(table: pd.DataFrame) -> Figure | None:
    """A heat map for each adaptive arm: bits of each leaf over the steps of WSD or the only schedule."""
    table = table[~table["arm"].str.startswith("even")] if not table.empty else table
    if table.empty:
        return None
    schedule = "wsd" if "wsd" in set(table["schedule"]) else table["schedule"].iloc[0]
    table = table[table["schedule"] == schedule]
    keys = ["task", "size", "steps", "arm", "leaf", "step"]
    means = table.groupby(keys, sort=False)["bits"].mean().reset_index()
    panels = [
        alt.Chart(rows)
        .mark_rect()
        .encode(
            x=alt.X("step:O", title="step"),
            y=alt.Y(
                "leaf:N", title=None, sort=None, axis=alt.Axis(labelLimit=150, labelFontSize=7)
            ),
            color=alt.Color("bits:Q", scale=alt.Scale(scheme="viridis", domain=[1, 8])),
            tooltip=["leaf", "step", "bits"],
        )
        .properties(title=f"{task} {size}, {steps} steps, {arm}")
        for (task, size, steps, arm), rows in means.groupby(keys[:4], sort=False)
    ]
    caption = f"Mean bits of a leaf's codes over seeds, under {schedule}; a leaf may share pages."
    return Figure("widths_over_time", "Where the bits go", caption, panels)

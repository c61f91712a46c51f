"""The figures of the report, from tables."""

# pandas' selections, and Altair's layers, are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false

import altair as alt
import pandas as pd

from experiments.harness.reporting.charts import Scale, facets, with_intervals
from experiments.harness.reporting.layout import Figure

_GROUP = ["task", "size", "steps", "schedule"]
_LABELLED = 8  # arms in a panel, at most, that are named beside their points
_TICKS = (-0.1, -0.01, 0, 0.01, 0.1, 1)


def _title(task: str, size: str, steps: int, schedule: str) -> str:
    return f"{task} {size}, {steps} steps, {schedule}"


def against_bits(gaps: list[dict]) -> Figure:
    """Gap to full precision against bits a number, everything counted."""
    table = pd.DataFrame([row for row in gaps if row["arm"] != "fp32"])
    table = table.sort_values(["task", "size", "steps"])
    scale = Scale.of("state", sorted(table["arm"], key=str))
    y_scale = alt.Scale(type="symlog", constant=0.01)
    axis = alt.Axis(values=list(_TICKS), format="~g")

    def draw(rows: pd.DataFrame):
        spread = rows["exact_sd"].fillna(0.0).iloc[0]
        band = alt.Chart(pd.DataFrame([{"low": -spread, "high": spread}])).mark_rect(
            opacity=0.15, color="#555"
        )
        x = alt.X(
            "bits:Q",
            title="bits a number, everything counted",
            scale=alt.Scale(zero=False, padding=20),
        )
        color = scale.of_field("arm")
        points = with_intervals(
            rows,
            "gap",
            "loss above full precision (nats)",
            scale=y_scale,
            tooltip=["arm", "bits", "gap", "low", "high"],
            x=x,
            color=color,
        )
        y = alt.Y("low:Q", title="loss above full precision (nats)", scale=y_scale, axis=axis)
        layers = [band.encode(y=y, y2="high:Q"), points]
        if len(rows) <= _LABELLED:
            words = alt.Chart(rows).mark_text(align="left", dx=6, dy=-6, fontSize=10)
            layers.append(
                words.encode(x=x, y=alt.Y("gap:Q", scale=y_scale), text="arm:N", color=color)
            )
        return alt.layer(*layers)

    caption = (
        "Points: mean paired gap; rules: 90 % intervals over seeds; grey: one SD of full precision's "
        "loss over seeds. The axis is linear near zero and logarithmic beyond 0.01."
    )
    panels = facets(table, _GROUP, draw, _title)
    return Figure("gap_against_bits", "Loss above full precision", caption, panels, [scale])


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

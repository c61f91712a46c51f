"""The figures of the report, from the rows of its tables."""

# Altair's layers are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

import altair as alt
import pandas as pd

from experiments.gradient_precision.arms import FAMILIES
from experiments.gradient_precision.law_answers import longest
from experiments.harness.reporting.charts import (
    Axis,
    Scale,
    facets,
    labelled_lines,
    reference,
    with_intervals,
)
from experiments.harness.reporting.layout import Figure

_LEAST = 1e-4  # nats: a logarithmic axis begins there


def of_recipes(rows: list[dict]) -> Figure | None:
    """The gap of each recipe, and of NVIDIA's less a part, at each size's longest training."""
    own = [row for row in longest(rows) if row["method"] not in FAMILIES]
    if not own:
        return None
    table = pd.DataFrame(own).sort_values("mean")

    def draw(one: pd.DataFrame):
        drawn = with_intervals(
            one,
            "mean",
            "gap to full precision (nats)",
            is_across=True,
            tooltip=["name", "mean", "low", "high"],
            y=alt.Y("name:N", sort=None, title=None),
        )
        return alt.layer(drawn, reference(0.0, "", axis="x"))

    panels = facets(table, ["size", "d_over_n"], draw, lambda n, d: f"N = {n}, D/N = {d}")
    caption = "Means over seeds with 90 % intervals, each at its best learning rate."
    return Figure("recipes", "What recipes cost", caption, panels)


def of_bits(rows: list[dict]) -> Figure | None:
    """The gap against backward bits, a line for each forward width, at each size's longest training."""
    own = [row for row in longest(rows) if row["method"] in FAMILIES and row["mean"] > _LEAST]
    table = pd.DataFrame(own)
    if table.empty or table["P_backward"].nunique() < 2:
        return None
    widths = tuple(sorted(map(int, set(table["P_forward"]))))
    scale = Scale("forward bits", widths, is_ordered=True)
    ends = (float(table["P_backward"].min()), float(table["P_backward"].max()))
    x = Axis("P_backward", "backward bits", True, ends, sorted(set(table["P_backward"])))

    def draw(one: pd.DataFrame):
        y = Axis("mean", "gap to full precision (nats)", True, form=".0e")
        return labelled_lines(one, one, x, y, "P_forward", scale, is_at_start=True)

    title = lambda n, d, name: f"{name}, N = {n}, D/N = {d}"  # noqa: E731
    panels = facets(table, ["size", "d_over_n", "name"], draw, title)
    caption = f"Means over seeds; gaps below {_LEAST:g} nats are not drawn."
    return Figure("bits", "The gap by forward and backward bits", caption, panels, [scale])


def of_noise(rows: list[dict]) -> Figure | None:
    """The gap of each arm against the variance and the bias of its gradient."""
    table = pd.DataFrame(longest(rows))
    if table.empty:
        return None
    table = table[(table["mean"] > _LEAST) & (table["variance"] + table["bias"] ** 2 > 0)]
    if len(table) < 2:
        return None
    scale = Scale.of("arm", table["name"])
    panels = [
        _scatter(own, measure, title, scale)
        for measure, title in (("variance", "variance / |g|²"), ("bias", "|bias| / |g|"))
        if len(own := table[table[measure] > 1e-6])
    ]
    caption = "A point is an arm with its bits; its bias is drawn where the draws show one."
    return Figure("noise", "Gap and error of the gradient", caption, panels, [scale])


def _scatter(table: pd.DataFrame, measure: str, title: str, scale: Scale) -> alt.Chart:
    log = alt.Scale(type="log", nice=False, padding=12)
    chart = alt.Chart(table).mark_point(filled=True, size=60, opacity=0.8)
    return chart.encode(
        x=alt.X(f"{measure}:Q", title=title, scale=log, axis=alt.Axis(format=".0e")),
        y=alt.Y("mean:Q", title="gap (nats)", scale=log, axis=alt.Axis(format=".0e")),
        color=scale.of_field("name"),
        tooltip=["size", "name", "pair", measure, "mean"],
    ).properties(title=f"Against {measure}")

"""The figures of the report, from tables."""

# Altair's layers are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false

import altair as alt
import numpy as np
import pandas as pd

from experiments.harness.reporting.report import Figure
from experiments.training_precision.analysis import METHOD_NAMES, tied
from jaxquant import laws

_BITS = alt.X(
    "P_w:Q",
    title="bits",
    scale=alt.Scale(type="log", nice=False),
    axis=alt.Axis(values=[1, 2, 3, 4, 6, 8, 16]),
)


def loss_by_bits(table: pd.DataFrame) -> Figure:
    """A panel for each size, at its longest training."""
    panels = []
    for size, own in table.groupby("size", sort=False):
        longest = own["d_over_n"].max()
        parts = [tied(own[own["d_over_n"] == longest], method) for method in METHOD_NAMES]
        shown = pd.concat(parts)[["method", "P_w", "loss", "seed"]]
        shown = shown.assign(method=shown["method"].map(METHOD_NAMES))
        means = shown.groupby(["method", "P_w"], sort=False)["loss"].mean().reset_index()
        y = alt.Y("loss:Q", title="loss (nats per token)", scale=alt.Scale(zero=False))
        color = alt.Color("method:N", title=None)
        lines = alt.Chart(means).mark_line().encode(x=_BITS, y=y, color=color)
        points = (
            alt.Chart(shown)
            .mark_circle(size=28, opacity=0.6)
            .encode(x=_BITS, y=y, color=color, tooltip=["method", "P_w", "loss", "seed"])
        )
        panels.append(alt.layer(lines, points).properties(title=f"N = {size}, D/N = {longest}"))
    caption = "Weights, activations and cache alike in so many bits; lines are means over seeds."
    return Figure("loss_by_bits", "Loss against bits of training", caption, panels)


def efficiencies(methods: list[dict]) -> Figure | None:
    """N_eff / N of each width: ours, and as published for QuEST's models and by Kumar's law."""
    rows = [
        {"method": METHOD_NAMES[m["method"]], "P_w": e["bits"]}
        | {k: e[k] for k in ("value", "low", "high")}
        for m in methods
        for e in m.get("efficiencies", ())
    ]
    if not rows:
        return None
    table = pd.DataFrame(rows)
    published = pd.DataFrame(_published_rows())
    y = alt.Y("value:Q", title="N_eff / N", scale=alt.Scale(domain=[0, 1.2], clamp=True))
    color = alt.Color("method:N", title=None)
    base = alt.Chart(table).encode(x=_BITS, color=color)
    ours = alt.layer(
        base.mark_line().encode(y=y),
        base.mark_rule().encode(y=alt.Y("low:Q", title="N_eff / N"), y2="high:Q"),
        base.mark_circle(size=40).encode(y=y, tooltip=["method", "P_w", "value", "low", "high"]),
    ).properties(title="These runs, with 90 % intervals")
    theirs = (
        alt.Chart(published)
        .mark_line()
        .encode(x=_BITS, y=y, color=color, strokeDash=alt.StrokeDash("of:N", title="published by"))
        .properties(title="Published: QuEST's 30M models; Kumar's law")
    )
    caption = "The share of parameters that counts, free for each width. Above 1.2 it is cut."
    return Figure("efficiencies", "What bits are worth", caption, [ours, theirs])


def _published_rows() -> list[dict]:
    law = {"A": laws.QUEST_2025_A, "alpha": laws.QUEST_2025_ALPHA, "N": laws.QUEST_2025_N}
    rows = [
        {"method": METHOD_NAMES[name], "P_w": bits, "value": value, "of": "QuEST"}
        for name, losses in laws.QUEST_2025_LOSSES.items()
        for bits, value in laws.efficiency_from_losses(losses, laws.QUEST_2025_BF16, **law).items()
    ]
    efficiency, bits = laws.KUMAR.efficiency, np.arange(2.0, 16.1, 0.25)
    assert efficiency is not None
    values = np.asarray(efficiency(laws.KUMAR_2024.params, bits))
    of = {"method": METHOD_NAMES["ste"], "of": "Kumar et al."}
    return rows + [
        of | {"P_w": float(b), "value": float(v)} for b, v in zip(bits, values, strict=True)
    ]

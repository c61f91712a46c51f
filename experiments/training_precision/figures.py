"""The figures of the report, from tables."""

# Altair's layers are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false

import altair as alt
import numpy as np
import pandas as pd

from experiments.harness.reporting.charts import (
    Axis,
    Scale,
    facets,
    labelled_lines,
    reference,
    with_intervals,
)
from experiments.harness.reporting.layout import Figure
from experiments.training_precision.runs import METHOD_NAMES, tied
from jaxquant import laws

_METHODS = Scale("method", tuple(METHOD_NAMES.values()))
_WIDTHS = (1, 2, 3, 4, 6, 8, 16)


def _methods_of(table: pd.DataFrame) -> Scale:
    """The scale of the methods that are there, each with the color that it always has."""
    kept = [n for n in _METHODS.names if n in set(table["method"])]
    colors = dict(zip(_METHODS.names, _METHODS.marks, strict=False))
    return Scale("method", tuple(kept), own=tuple(colors[n] for n in kept))


def _bits(table: pd.DataFrame) -> Axis:
    ends = (float(table["P_w"].min()), float(table["P_w"].max()))
    return Axis("P_w", "bits", is_log=True, domain=ends, ticks=_WIDTHS)


def loss_by_bits(table: pd.DataFrame) -> Figure:
    """A panel for each size, at its longest training."""
    longest = table.groupby("size")["d_over_n"].transform("max")
    own = table[table["d_over_n"] == longest]
    shown = pd.concat([tied(own, method) for method in METHOD_NAMES])
    shown = shown[["size", "d_over_n", "method", "P_w", "loss", "seed"]]
    shown = shown.assign(method=shown["method"].map(METHOD_NAMES))
    scale = _methods_of(shown)

    def draw(rows: pd.DataFrame):
        means = rows.groupby(["method", "P_w"], sort=False)["loss"].mean().reset_index()
        tooltip = ["method", "P_w", "loss", "seed"]
        y = Axis("loss", "loss (nats per token)")
        return labelled_lines(
            means, rows, _bits(shown), y, "method", scale, is_at_start=True, tooltip=tooltip
        )

    return Figure(
        "loss_by_bits",
        "Loss against bits of training",
        "Weights, activations and cache alike in so many bits, at each size's longest training; lines are "
        "means over seeds.",
        facets(
            shown, ["size", "d_over_n"], draw, lambda size, length: f"N = {size}, D/N = {length}"
        ),
        [scale],
    )


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
    table, published = pd.DataFrame(rows), pd.DataFrame(_published_rows())
    both = pd.concat([table, published])
    scale, by = _methods_of(both), Scale.of("published by", published["of"], "dash")
    y = Axis("value", "N_eff / N", domain=(0.0, 1.2))
    x = _bits(both[both["P_w"] < 16])
    ends = table[(table["high"] > 0) & (table["low"] < 1.2)]
    bars = (
        alt.Chart(ends.assign(high=ends["high"].clip(upper=1.2)))
        .mark_rule()
        .encode(x="P_w:Q", y="low:Q", y2="high:Q", color=scale.of_field("method"))
    )
    cut = table.assign(value=table["value"].clip(upper=1.2))
    ours = alt.layer(bars, labelled_lines(cut, cut, x, y, "method", scale))
    shown = published[published["P_w"] <= table["P_w"].max()]
    theirs = labelled_lines(shown, None, x, y, "method", scale, dash=by.of_field("of"))
    return Figure(
        "efficiencies",
        "What bits are worth",
        "The share of parameters that counts, free for each width. Above 1.2 it is cut.",
        [
            ours.properties(title="These runs, with 90 % intervals"),
            theirs.properties(title="Published: QuEST's 30M models; Kumar's law"),
        ],
        [scale, by],
    )


def optima(methods: list[dict]) -> Figure:
    """P* of each method by compute, beside the published 7 to 8 bits."""
    rows = [
        {"method": METHOD_NAMES[m["method"]]} | {k: o[k] for k in ("flops", "bits", "low", "high")}
        for m in methods
        for o in m.get("optima", ())
        if o["is_determined"]
    ]
    table = pd.DataFrame(rows, columns=["method", "flops", "bits", "low", "high"])
    scale = _methods_of(table)
    ends = (float(table["flops"].min()), float(table["flops"].max()))
    x = Axis("flops", "operations of training, 6 N D of 16 bits", is_log=True, domain=ends)
    most = max(9.0, float(table["high"].max()))
    y = Axis("bits", "P*, bits", domain=(min(4.0, float(table["low"].min())), most))
    bars = (
        alt.Chart(table)
        .mark_rule()
        .encode(x="flops:Q", y="low:Q", y2="high:Q", color=scale.of_field("method"))
    )
    band = alt.Chart(pd.DataFrame([{"from": 7, "to": 8}])).mark_rect(color="#ddd")
    layers = [
        band.encode(y="from:Q", y2="to:Q"),
        bars,
        labelled_lines(table, table, x, y, "method", scale),
    ]
    return Figure(
        "optima",
        "The best precision by compute",
        "Bars are 90 % intervals, of all laws that the runs do not tell apart; grey: 7 to 8 bits, as Kumar "
        "et al. have it. An optimum that the runs do not determine is left out.",
        [alt.layer(*layers).properties(title="P* by method")],
        [scale],
    )


def robustness(rows: list[dict], words: str) -> Figure:
    """What weights trained in few bits change of a loss, beside weights trained in 16."""
    table = pd.DataFrame(rows)
    table = table.assign(method=table["method"].map(METHOD_NAMES))
    widths = tuple(sorted(map(int, set(table["P"]))))
    scale = Scale("trained at (bits)", widths, is_ordered=True)

    def draw(one: pd.DataFrame):
        drawn = with_intervals(
            one,
            "mean",
            "less that of 16 bits (nats)",
            tooltip=["P", "P_post", "mean", "low", "high"],
            x=alt.X("P_post:O", title="served at (bits)", axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("P:O"),
            color=scale.of_field("P"),
        )
        return alt.layer(reference(0.0, ""), drawn)

    name = words.replace(" ", "_")
    return Figure(
        f"robustness_{name}",
        f"Weights alone in few bits: {words}",
        "Means over seeds, sizes and lengths with 90 % intervals. Dashed: as weights trained in 16 bits; "
        "below it, training in few bits helps.",
        facets(table, "method", draw, str),
        [scale],
    )


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

"""The figures of the report, from tables and records."""

# pandas' selections and groups, and Altair's layers, are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import altair as alt
import pandas as pd

from experiments.harness.reporting.report import Figure
from experiments.ptq_overtraining.analysis import (
    HEADLINE,
    KUMAR_EXPONENT,
    SCHEDULE_NAMES,
    SPLIT_NAMES,
    select,
)


def _lines(
    table: pd.DataFrame, color: alt.Color, y: alt.Y, title: str, dash=None
) -> alt.LayerChart:
    """Means over seeds as lines, single seeds as points, against D/N, where the evaluation resolves them."""
    series = [c for c in table.columns if c not in ("seed", "mean", "se")]
    means = table.groupby(series, sort=False)[["mean", "se"]].mean().reset_index()
    shown = [t[t["mean"] > _RESOLVED * t["se"].fillna(0)] for t in (means, table)]
    shown = [t[t["mean"] > 0] for t in shown]
    x = alt.X(
        "d_over_n:Q",
        title="D/N, training tokens per parameter",
        scale=alt.Scale(
            type="log",
            nice=False,
            domain=[table["d_over_n"].min() / 1.1, table["d_over_n"].max() * 1.1],
        ),
    )
    lines, points = (alt.Chart(t).encode(x=x, y=y, color=color) for t in shown)
    lines = lines.mark_line(clip=True)
    lines = lines if dash is None else lines.encode(strokeDash=dash)
    points = points.mark_circle(size=28, opacity=0.6, clip=True).encode(
        tooltip=["d_over_n:Q", "mean:Q", "se:Q", "seed:Q"]
    )
    return alt.layer(lines, points).properties(title=title)


# A loss added is shown where it exceeds so many standard errors over the evaluation's windows.
_RESOLVED = 2
_SMALLEST_SHOWN = 1e-4  # nats per token: where a logarithmic axis ends


def _log_y(table: pd.DataFrame) -> alt.Y:
    """The loss added on a logarithmic axis that all panels of a figure share."""
    shown = table["mean"][table["mean"] > 0]
    domain = (
        [max(_SMALLEST_SHOWN, shown.min()), shown.max()] if len(shown) else [_SMALLEST_SHOWN, 1.0]
    )
    scale = alt.Scale(type="log", nice=False, domain=domain)
    axis = alt.Axis(format="~g", tickCount=6)
    return alt.Y("mean:Q", title="loss added (nats per token)", scale=scale, axis=axis)


def _bits_color(added: pd.DataFrame) -> alt.Color:
    return alt.Color(
        "bits:O",
        title="bits",
        legend=alt.Legend(columns=7),
        scale=alt.Scale(scheme="viridis", domain=sorted(map(int, set(added["bits"])))),
    )


def by_bits(added: pd.DataFrame) -> Figure:
    table = select(added, granularity="tensor", scope="linears", split="valid")
    panels = [
        _lines(
            group[["d_over_n", "mean", "se", "seed", "bits"]],
            _bits_color(added),
            _log_y(table),
            f"N = {size}, {SCHEDULE_NAMES[schedule]}",
        )
        for (size, schedule), group in table.groupby(["size", "schedule"], sort=False)
    ]
    return Figure(
        "added_loss",
        "Loss added by quantization against training length",
        "Weights of the blocks' linears rounded to nearest, one scale per tensor, held-out text. A line "
        "is the mean over seeds, a point one seed; both axes are logarithmic. Shown is what exceeds twice "
        "its standard error over the evaluation's windows.",
        panels,
    )


def by_granularity(added: pd.DataFrame) -> Figure:
    table = select(added, scope="linears", split="valid", bits=HEADLINE["bits"])
    table = table.assign(schedule=table["schedule"].map(SCHEDULE_NAMES))
    panels = [
        _lines(
            group[["d_over_n", "mean", "se", "seed", "granularity", "schedule"]],
            alt.Color("granularity:N", title="one scale per", sort=None),
            _log_y(table),
            f"N = {size}, 4 bits",
            dash=alt.StrokeDash("schedule:N", title="schedule"),
        )
        for size, group in table.groupby("size", sort=False)
    ]
    return Figure(
        "granularity",
        "The same under finer scales",
        "4-bit weights under each granularity: one scale per tensor, per output channel, or per block of "
        "as many weights as the number says.",
        panels,
    )


def shift_and_scope(added: pd.DataFrame) -> Figure:
    table = select(added, granularity="tensor", bits=HEADLINE["bits"])
    kind = table["split"].map(SPLIT_NAMES) + ", " + table["scope"]
    panels = [
        _lines(
            group[["d_over_n", "mean", "se", "seed", "kind"]],
            alt.Color("kind:N", title="text, layers", sort=None),
            _log_y(table),
            f"N = {size}, {SCHEDULE_NAMES[schedule]}, 4 bits",
        )
        for (size, schedule), group in table.assign(kind=kind).groupby(
            ["size", "schedule"], sort=False
        )
    ]
    return Figure(
        "shift_and_scope",
        "Shifted text, and the embedding and head",
        "4 bits per tensor on held-out text like the training text and on text unlike it; of the blocks' "
        "linears alone (linears), and of the embedding and the head too (all).",
        panels,
    )


def exponent(table: pd.DataFrame) -> Figure:
    table = select(table, granularity="tensor", scope="linears", split="valid")
    table = table[table["gamma"].notna()]
    run = table["size"] + ", " + table["schedule"].map(SCHEDULE_NAMES)
    table = table.assign(run=run)[["run", "bits", "gamma", "low", "high"]]
    chart = alt.Chart(table).encode(
        x=alt.X("bits:O", title="bits", axis=alt.Axis(labelAngle=0)),
        xOffset="run:N",
        color=alt.Color("run:N", title="N, schedule", sort=None),
    )
    bars = chart.mark_rule(strokeWidth=2, clip=True).encode(
        y=alt.Y("low:Q", title="γ_D", scale=alt.Scale(domain=[-1, 2], clamp=True)), y2="high:Q"
    )
    points = chart.mark_circle(size=50, opacity=1, clip=True).encode(
        y="gamma:Q", tooltip=["run:N", "bits:O", "gamma:Q", "low:Q", "high:Q"]
    )
    published = (
        alt.Chart(pd.DataFrame({"y": [KUMAR_EXPONENT]}))
        .mark_rule(strokeDash=[6, 4])
        .encode(y="y:Q")
    )
    return Figure(
        "exponent",
        "The exponent beside the published one",
        "γ_D of δ ∝ D^γ_D with 90 % intervals, weights per tensor. "
        f"Dashed: {KUMAR_EXPONENT:.3f}, Kumar et al., fitted on 30M–220M parameters with GPTQ. "
        "Widths at which some run adds no loss have no exponent; "
        "the axis ends at −1 and 2.",
        [alt.layer(published, bars, points).properties(title="exponent by bits")],
    )


def models_themselves(base: pd.DataFrame, records: list[dict]) -> Figure:
    table = select(base, split="valid").assign(schedule=lambda t: t["schedule"].map(SCHEDULE_NAMES))
    y = alt.Y("mean:Q", title="loss (nats per token)", scale=alt.Scale(zero=False))
    against_length = _lines(
        table[["d_over_n", "mean", "se", "seed", "size", "schedule"]],
        alt.Color("size:N", title="N", sort=None),
        y,
        "base loss on held-out text",
        dash=alt.StrokeDash("schedule:N", title="schedule"),
    )
    curves = pd.DataFrame(
        [
            {
                "step": step,
                "loss": loss,
                "run": f"{r['trial']['size']}, {SCHEDULE_NAMES[r['trial']['schedule']]}",
            }
            for r in records
            if r["trial"]["seed"] == 0 and r["points"]
            for step, loss in _thin(r["points"][-1]["curve"])
            if r["trial"]["tokens_per_parameter"][-1] == _longest(records, r["trial"]["size"])
        ],
        columns=["step", "loss", "run"],
    )
    training = (
        alt.Chart(curves)
        .mark_line(strokeWidth=1.2)
        .encode(
            x=alt.X("step:Q", title="training step"),
            y=alt.Y(
                "loss:Q",
                title="training loss (nats per token)",
                scale=alt.Scale(zero=False, domainMax=3.5, clamp=True),
            ),
            color=alt.Color("run:N", title="longest runs, seed 0", sort=None),
        )
        .properties(title="training loss")
    )
    return Figure(
        "base_loss",
        "Base loss and training curves",
        "Left: unquantized loss on held-out text. Right: training loss of the longest runs.",
        [against_length, training],
    )


def _longest(records: list[dict], size: str) -> int:
    return max(
        r["trial"]["tokens_per_parameter"][-1] for r in records if r["trial"]["size"] == size
    )


def _thin(curve: list, most: int = 150) -> list:
    return curve[:: max(1, len(curve) // most)]

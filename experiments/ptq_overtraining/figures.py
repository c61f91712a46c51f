"""The figures of the report, from tables and records."""

# pandas' selections and groups, and Altair's layers, are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import altair as alt
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
from experiments.ptq_overtraining.analysis import (
    HEADLINE,
    KUMAR_EXPONENT,
    SCHEDULE_NAMES,
    select,
)

# A loss added is shown where it exceeds so many standard errors over the evaluation's windows.
_RESOLVED = 2
_SMALLEST_SHOWN = 1e-4  # nats per token: where a logarithmic axis ends


def _lines(table: pd.DataFrame, name: str, scale: Scale, y: Axis, suffix: str = "", dash=None):
    """Means over seeds as lines, single seeds as points, where the evaluation resolves them."""
    keys = ["d_over_n", *dict.fromkeys([name, *(["schedule"] if dash is not None else [])])]
    table = table[[*keys, "seed", "mean", "se"]]
    means = table.groupby(keys, sort=False)[["mean", "se"]].mean().reset_index()
    shown = [t[t["mean"] > _RESOLVED * t["se"].fillna(0)] for t in (means, table)]
    shown = [t[t["mean"] > 0] for t in shown]
    x = Axis(
        "d_over_n",
        "D/N, training tokens per parameter",
        is_log=True,
        domain=(float(table["d_over_n"].min()), float(table["d_over_n"].max())),
        ticks=sorted(set(table["d_over_n"])),
    )
    tooltip = ["d_over_n:Q", "mean:Q", "se:Q", "seed:Q"]
    return labelled_lines(*shown, x, y, name, scale, suffix=suffix, dash=dash, tooltip=tooltip)


def _added(table: pd.DataFrame) -> Axis:
    """The loss added on a logarithmic axis that all panels of a figure share."""
    shown = table["mean"][table["mean"] > 0]
    ends = (
        (max(_SMALLEST_SHOWN, shown.min()), shown.max()) if len(shown) else (_SMALLEST_SHOWN, 1.0)
    )
    return Axis("mean", "loss added (nats per token)", is_log=True, domain=ends)


def _named(size: str, schedule: str) -> str:
    return f"N = {size}, {SCHEDULE_NAMES[schedule]}"


def by_bits(added: pd.DataFrame) -> Figure:
    table = select(added, granularity="tensor", scope="linears", split="valid")
    scale = Scale("bits", tuple(sorted(map(int, set(added["bits"])))), is_ordered=True)

    def draw(rows: pd.DataFrame):
        return _lines(rows, "bits", scale, _added(table), " bits")

    return Figure(
        "added_loss",
        "Loss added by each width",
        "Weights of the blocks' linears rounded to nearest, one scale per tensor, held-out text. A line "
        "is the mean over seeds, a point one seed; both axes are logarithmic. Shown is what exceeds twice "
        "its standard error over the evaluation's windows.",
        facets(table, ["size", "schedule"], draw, _named),
        [scale],
    )


def _dashes(table: pd.DataFrame) -> Scale:
    return Scale.of("schedule", table["schedule"], "dash")


def by_granularity(added: pd.DataFrame) -> Figure:
    table = select(added, scope="linears", split="valid", bits=HEADLINE["bits"])
    table = table.assign(schedule=table["schedule"].map(SCHEDULE_NAMES))
    scale, dashes = Scale.of("one scale per", table["granularity"]), _dashes(table)

    def draw(rows: pd.DataFrame):
        dash = dashes.of_field("schedule")
        return _lines(rows, "granularity", scale, _added(table), dash=dash)

    return Figure(
        "granularity",
        "The same under finer scales",
        "4-bit weights under each granularity: one scale per tensor, per output channel, or per block of "
        "as many weights as the number says.",
        facets(table, "size", draw, lambda size: f"N = {size}, 4 bits"),
        [scale, dashes],
    )


def shift_and_scope(added: pd.DataFrame) -> Figure:
    table = select(added, granularity="tensor", bits=HEADLINE["bits"])
    kind = table["split"].map({"valid": "like", "shift": "shifted"}) + ", " + table["scope"]
    table = table.assign(kind=kind, schedule=table["schedule"].map(SCHEDULE_NAMES))
    scale, dashes = (
        Scale.of("text (like training or shifted), layers", table["kind"]),
        _dashes(table),
    )

    def draw(rows: pd.DataFrame):
        return _lines(rows, "kind", scale, _added(table), dash=dashes.of_field("schedule"))

    return Figure(
        "shift_and_scope",
        "Shifted text, and the embedding and head",
        "4 bits per tensor on held-out text like the training text and on text unlike it; of the blocks' "
        "linears alone (linears), and of the embedding and the head too (all).",
        facets(table, "size", draw, lambda size: f"N = {size}, 4 bits"),
        [scale, dashes],
    )


def exponent(table: pd.DataFrame) -> Figure:
    table = select(table, granularity="tensor", scope="linears", split="valid")
    table = table[table["gamma"].notna()]
    table = table.assign(schedule=table["schedule"].map(SCHEDULE_NAMES))
    scale = Scale.of("schedule", table["schedule"])

    def draw(rows: pd.DataFrame):
        drawn = with_intervals(
            rows[["schedule", "bits", "gamma", "low", "high"]],
            "gamma",
            "γ_D",
            scale=alt.Scale(domain=[-1, 2], clamp=True),
            tooltip=["schedule:N", "bits:O", "gamma:Q", "low:Q", "high:Q"],
            x=alt.X("bits:O", title="bits", axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("schedule:N", sort=None),
            color=scale.of_field("schedule"),
        )
        published = reference(KUMAR_EXPONENT, f"Kumar et al. {KUMAR_EXPONENT:.3f}")
        return alt.layer(published, drawn)

    return Figure(
        "exponent",
        "The exponent beside the published one",
        "γ_D of δ ∝ D^γ_D with 90 % intervals, weights per tensor. "
        f"Dashed: {KUMAR_EXPONENT:.3f}, Kumar et al., fitted on 30M–220M parameters with GPTQ. "
        "Widths at which some run adds no loss have no exponent; "
        "the axis ends at −1 and 2.",
        facets(table, "size", draw, lambda size: f"N = {size}"),
        [scale],
    )


def rates(table: pd.DataFrame) -> Figure:
    """Base loss and exponent against the learning rate, from the rows of `rates.summaries`."""
    table = table.assign(schedule=table["schedule"].map(SCHEDULE_NAMES))
    sizes, dashes = Scale.of("N", table["size"]), _dashes(table)
    x = Axis("peak_lr", "peak learning rate", is_log=True, ticks=sorted(set(table["peak_lr"])))

    def draw(column: str, title: str):
        drawn = table[table[column].notna()].astype({column: float})
        shown = drawn[["peak_lr", "size", "schedule", column]]
        dash = dashes.of_field("schedule")
        return labelled_lines(shown, shown, x, Axis(column, title), "size", sizes, dash=dash)

    return Figure(
        "rates",
        "Base loss and exponent by learning rate",
        "Left: unquantized loss on held-out text at the longest length. Right: γ_D of 4 bits per tensor.",
        [
            draw("loss", "loss (nats per token)").properties(title="base loss on held-out text"),
            draw("gamma", "γ_D").properties(title="γ_D, 4 bits per tensor"),
        ],
        [sizes, dashes],
    )


def models_themselves(base: pd.DataFrame, records: list[dict]) -> Figure:
    table = select(base, split="valid").assign(schedule=lambda t: t["schedule"].map(SCHEDULE_NAMES))
    sizes, dashes = Scale.of("N", table["size"]), _dashes(table)
    against_length = _lines(
        table,
        "size",
        sizes,
        Axis("mean", "loss (nats per token)"),
        dash=dashes.of_field("schedule"),
    )
    curves = pd.DataFrame(
        [
            {
                "step": step,
                "loss": loss,
                "size": r["trial"]["size"],
                "schedule": SCHEDULE_NAMES[r["trial"]["schedule"]],
            }
            for r in records
            if r["trial"]["seed"] == 0 and r["points"]
            for step, loss in _thin(r["points"][-1]["curve"])
            if r["trial"]["tokens_per_parameter"][-1] == _longest(records, r["trial"]["size"])
        ],
        columns=["step", "loss", "size", "schedule"],
    )
    training = labelled_lines(
        curves[curves["loss"] <= _LARGEST_SHOWN],
        None,
        Axis("step", "training step", form="~s"),
        Axis("loss", "training loss (nats per token)"),
        "size",
        sizes,
        dash=dashes.of_field("schedule"),
    )
    return Figure(
        "base_loss",
        "Base loss and training curves",
        "Left: unquantized loss on held-out text. Right: training loss of the longest runs, seed 0.",
        [
            against_length.properties(title="base loss on held-out text"),
            training.properties(title="training loss"),
        ],
        [sizes, dashes],
    )


_LARGEST_SHOWN = 3.5  # nats per token: where the axis of training losses ends


def _longest(records: list[dict], size: str) -> int:
    return max(
        r["trial"]["tokens_per_parameter"][-1] for r in records if r["trial"]["size"] == size
    )


def _thin(curve: list, most: int = 150) -> list:
    return curve[:: max(1, len(curve) // most)]

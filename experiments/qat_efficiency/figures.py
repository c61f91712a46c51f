"""The figures of the report, from tables."""

# pandas' selections, and Altair's layers, are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import altair as alt
import pandas as pd

from experiments.harness.reporting.charts import Scale, facets, reference, with_intervals
from experiments.harness.reporting.layout import Figure
from experiments.qat_efficiency.analysis import METRIC_NAMES, PRIMARY, front, interval, select
from experiments.qat_efficiency.latency import program
from experiments.qat_efficiency.stages import AGAIN, Arm

FAMILY_NAMES = {"float": "full precision", "ptq": "after training", "qat": "with training"}
_FAMILIES = list(FAMILY_NAMES.values())


_FAMILY = Scale("quantized", tuple(_FAMILIES), own=("#555555", "#3565b0", "#c2481c"))


def _named(table: pd.DataFrame) -> pd.DataFrame:
    """With families in words, and a width for the float model."""
    widths = table["width"].replace("", "float")
    return table.assign(family=table["family"].map(FAMILY_NAMES), width=widths)


def _widths(table: pd.DataFrame) -> Scale:
    return Scale.of("width", _named(table)["width"], "shape")


def _metric_axis(metric: str) -> alt.Y:
    title = METRIC_NAMES[metric]
    return alt.Y(f"{metric}:Q", title=title, scale=alt.Scale(zero=False, padding=14))


def _points(rows: pd.DataFrame, x: alt.X, metric: str, widths: Scale) -> alt.LayerChart:
    """Arms as points; the best is named, on the side where there is room."""
    rows = _named(rows)
    columns = ["arm", "family", "width", "bytes", "ratio", metric]
    rows = rows[[c for c in columns if c in rows]]
    base = alt.Chart(rows).encode(x=x, y=_metric_axis(metric), color=_FAMILY.of_field("family"))
    points = base.mark_point(size=70, filled=True, opacity=0.85)
    best = rows.loc[[rows[metric].idxmax() if metric == "accuracy" else rows[metric].idxmin()]]
    column = "ratio" if "ratio" in rows else "bytes"
    is_left = best[column].iloc[0] ** 2 < rows[column].min() * rows[column].max()
    side = {"align": "left", "dx": 8} if is_left else {"align": "right", "dx": -8}
    words = alt.Chart(best).mark_text(**side, fontSize=10)
    words = words.encode(
        x=x, y=_metric_axis(metric), text="arm:N", color=_FAMILY.of_field("family")
    )
    return alt.layer(points.encode(shape=widths.of_field("width"), tooltip=list(rows)), words)


def against_bytes(means: pd.DataFrame) -> Figure:
    panels, widths = [], _widths(means)
    for model in dict.fromkeys(means["model"]):
        metric = PRIMARY[model][0]
        rows = select(means, model=model).dropna(subset=["bytes", metric])
        x = alt.X(
            "bytes:Q",
            title="bytes",
            scale=alt.Scale(type="log", nice=False, padding=12),
            axis=alt.Axis(format="~s", tickCount=5, labelOverlap=True),
        )
        ahead = rows[rows["arm"].isin(front(means, model))].sort_values("bytes")
        line = (
            alt.Chart(ahead[["bytes", metric]])
            .mark_line(strokeDash=[5, 4], color="#222", strokeWidth=1.2, interpolate="step-after")
            .encode(x=x, y=_metric_axis(metric))
        )
        panels.append(alt.layer(line, _points(rows, x, metric, widths)).properties(title=model))
    return Figure(
        "bytes",
        "Quality against bytes",
        "Each point is an arm, the mean over seeds; bytes are those of the frozen model: packed weights, "
        "their scales, and what stays in float32. Dashed: the Pareto front, the arms that none of as few "
        "bytes surpasses. Named is the best arm.",
        panels,
        [_FAMILY, widths],
    )


def with_ratios(means: pd.DataFrame, latencies: list[dict]) -> pd.DataFrame:
    """Arms with their measured latency over the float model's; those without one are left out."""
    measured = {(r["model"], r["width"], r["program"]): r["median"] for r in latencies}
    ratios = [
        1.0
        if r["family"] == "float" and not r["method"]
        else measured.get((r["model"], r["width"], program(_arm(r))))
        for r in means.to_dict("records")
    ]
    return means.assign(ratio=pd.Series(ratios, dtype=float, index=means.index)).dropna(
        subset=["ratio"]
    )


def _arm(row: dict) -> Arm:
    """As much of a row's arm as its program depends on."""
    names = ("family", "method", "width", "group", "activations")
    return Arm(**{name: row[name] for name in names})


def against_latency(means: pd.DataFrame, latencies: list[dict]) -> Figure | None:
    table = with_ratios(means, latencies)
    if not latencies or table.empty:
        return None
    panels, widths = [], _widths(table)
    for model in dict.fromkeys(table["model"]):
        metric = PRIMARY[model][0]
        rows = select(table, model=model).dropna(subset=[metric])
        x = alt.X(
            "ratio:Q", title="measured time over float's", scale=alt.Scale(zero=False, padding=12)
        )
        panels.append(_points(rows, x, metric, widths).properties(title=model))
    return Figure(
        "latency",
        "Quality against measured latency",
        "Time of a frozen model's forward pass over the float model's in the same round, median of "
        "rounds, on this machine. Arms whose products are simulated have no latency and are not here.",
        panels,
        [_FAMILY, widths],
    )


def gains_by_width(table: pd.DataFrame) -> Figure | None:
    if table.empty:
        return None
    scale = Scale.of("estimator", table["method"])

    def draw(rows: pd.DataFrame):
        metric = PRIMARY[rows["model"].iloc[0]][0]
        drawn = with_intervals(
            rows,
            "mean",
            f"gain in {METRIC_NAMES[metric]}",
            tooltip=["width", "method", "qat", "ptq", "mean", "low", "high"],
            x=alt.X("width:N", title="width", sort=None, axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("method:N", sort=list(scale.names)),
            color=scale.of_field("method"),
        )
        return alt.layer(reference(0.0, "as good as after training"), drawn)

    return Figure(
        "gain",
        "What training gains over quantizing after training",
        "Paired by seed: each estimator's best setting against the best setting after training, both "
        "chosen on the selection examples; above zero, training is better (a lower NLL counts as a gain). "
        "Bars are 90 % intervals.",
        facets(table, "model", draw, str),
        [scale],
    )


def away(table: pd.DataFrame, chosen: list[dict]) -> Figure | None:
    """Corruptions and other texts: the chosen arms of each family, and the float model trained again."""
    panels = []
    for row in chosen:
        if row["scope"] != "best":
            continue
        names = {AGAIN, *(f"{f} {row[f]} {row['width']}" for f in ("ptq", "qat") if row[f])}
        group = select(table, model=row["model"])
        group = group[group["arm"].isin(names)]
        if len(group):
            panels.append(_away_panel(group, f"{row['model']}, {row['width']}"))
    if not panels:
        return None
    return Figure(
        "robustness",
        "Under corruption, and on other text",
        "The chosen arm of each family, and the float model trained on in another order of the data. "
        "Vision: errors over the reference's under the same corruption, summed over severities; 1 is as "
        "robust as the reference. Language: NLL added on text like the training text (valid), of later "
        "years (shift) and on program code (code). Bars are 90 % intervals.",
        panels,
        [_FAMILY],
    )


def _away_panel(group: pd.DataFrame, title: str) -> alt.LayerChart:
    axis = {"corruption": "errors over the reference's", "text": "NLL added (nats)"}
    axis = axis[group["kind"].iloc[0]]
    rows = [
        {"family": FAMILY_NAMES[family], "where": where}
        | interval(list(runs["value"]), [None if pd.isna(e) else e for e in runs["se"]])
        for (family, where), runs in group.groupby(["family", "where"], sort=False)
    ]
    drawn = with_intervals(
        pd.DataFrame(rows),
        "mean",
        axis,
        tooltip=["where", "mean"],
        x=alt.X("where:N", title=None, sort=None, axis=alt.Axis(labelAngle=-25)),
        xOffset=alt.XOffset("family:N", sort=_FAMILIES),
        color=_FAMILY.of_field("family"),
    )
    return drawn.properties(title=title)

"""The report of `ptq_overtraining`: from its records to tables, figures and a verdict."""

import math
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
from scipy import stats

from experiments.harness import models, report

KUMAR_EXPONENT = 0.5068  # γ_D, arXiv 2411.04330, Table 2
CONFIDENCE = 0.9
HEADLINE = {"bits": 4, "granularity": "tensor", "scope": "linears", "split": "valid"}
_KIND = ["size", "schedule", "granularity", "scope", "split", "bits"]
_SCHEDULE_NAMES = {"wsd": "WSD", "cosine": "cosine"}


# ---------------------------------------------------------------------------------------------------
# Records to tables


def added_loss(records: list[dict]) -> pd.DataFrame:
    """One row per run, length, quantization and split: the loss added, in nats per token."""
    rows = []
    for record in records:
        run = {k: record["trial"][k] for k in ("size", "schedule", "seed")}
        for point in record["points"]:
            at = {"d_over_n": point["tokens_per_parameter"], "tokens": point["tokens"]}
            rows += [run | at | entry for entry in point["added"]]
    return pd.DataFrame(rows, columns=["seed", "d_over_n", "tokens", "mean", "se", *_KIND])


def base_loss(records: list[dict]) -> pd.DataFrame:
    """One row per run, length and split: the unquantized loss, in nats per token."""
    rows = []
    for record in records:
        run = {k: record["trial"][k] for k in ("size", "schedule", "seed")}
        for point in record["points"]:
            at = {"d_over_n": point["tokens_per_parameter"], "repetitions": point["repetitions"]}
            rows += [run | at | {"split": split} | value for split, value in point["base"].items()]
    columns = ["size", "schedule", "seed", "d_over_n", "repetitions", "split", "mean", "se"]
    return pd.DataFrame(rows, columns=columns)


def fit_exponent(table: pd.DataFrame) -> dict:
    """The exponent γ of δ ∝ D^γ with a 90 % interval.

    Least squares on log δ = a_seed + γ log D: every seed has a level of its own, so that only growth
    within a run counts.  The interval is Student's t on the residuals, which hold the seeds' different
    growth and any departure from a power law alike.

    Args:
        table: `added_loss` rows of one kind: columns seed, tokens, mean.

    Returns:
        gamma, low and high (None where they cannot be had, with the reason), and the points used.
    """
    positive = table[table["mean"] > 0]
    lengths, seeds = positive["tokens"].nunique(), positive["seed"].nunique()
    freedom = len(positive) - seeds - 1
    result = {"gamma": None, "low": None, "high": None, "points": len(positive), "reason": None}
    if len(positive) < len(table):
        return result | {"reason": f"{len(table) - len(positive)} of {len(table)} points add no loss"}
    if lengths < 2 or freedom < 1:
        return result | {"reason": "too few lengths or seeds"}
    log_d, log_loss = np.log(positive["tokens"]), np.log(positive["mean"])
    x = (log_d - log_d.groupby(positive["seed"]).transform("mean")).to_numpy()
    y = (log_loss - log_loss.groupby(positive["seed"]).transform("mean")).to_numpy()
    gamma = float(x @ y / (x @ x))
    error = math.sqrt(float(np.sum((y - gamma * x) ** 2)) / freedom / float(x @ x))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return result | {"gamma": gamma, "low": gamma - half, "high": gamma + half}


def exponents(added: pd.DataFrame) -> pd.DataFrame:
    """`fit_exponent` of every size, schedule, granularity, scope, split and width."""
    rows = [
        dict(zip(_KIND, kind, strict=True)) | fit_exponent(group)
        for kind, group in added.groupby(_KIND, sort=False)
    ]
    return pd.DataFrame(rows)


def growth(added: pd.DataFrame) -> pd.DataFrame:
    """The headline question per size and schedule: the mean over seeds at each D/N, and whether it grows."""
    rows = []
    for (size, schedule), group in select(added, **HEADLINE).groupby(["size", "schedule"], sort=False):
        means = group.groupby("d_over_n")["mean"].mean().sort_index()
        fit = fit_exponent(group)
        rows.append(
            {
                "size": size,
                "schedule": schedule,
                "seeds": int(group["seed"].nunique()),
                "added": {str(d): float(v) for d, v in means.items()},
                "grows": bool(len(means) > 1 and (np.diff(means) > 0).all()),
                **fit,
            }
        )
    return pd.DataFrame(rows)


def select(table: pd.DataFrame, **values) -> pd.DataFrame:
    for column, value in values.items():
        table = table[table[column] == value]
    return table


def summarize(records: list[dict], expected: int) -> dict:
    """What ``summary.json`` holds."""
    added, base = added_loss(records), base_loss(records)
    diverged = [
        {"id": r["id"], **{k: r["trial"][k] for k in ("size", "schedule", "seed")}, "step": r["step"]}
        for r in records
        if r["status"] == "diverged"
    ]
    return {
        "study": "ptq_overtraining",
        "trials": {"finished": len(records), "expected": expected, "diverged": diverged},
        "headline": {
            "question": "Does the loss added by 4-bit per-tensor weights grow with D/N?",
            "kumar_2024_gamma_D": KUMAR_EXPONENT,
            "confidence": CONFIDENCE,
            "rows": _records(growth(added)),
        },
        "exponents": _records(exponents(added)),
        "added_loss": _records(_over_seeds(added, [*_KIND, "d_over_n", "tokens"])),
        "base_loss": _records(_over_seeds(base, ["size", "schedule", "split", "d_over_n", "repetitions"])),
        "parameters": {s: models.SIZES[s].non_embedding_parameters for s in sorted(set(base["size"]))},
        "versions": records[0]["versions"] if records else {},
    }


def _over_seeds(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    grouped = table.groupby(keys, sort=False)["mean"]
    return grouped.agg(mean="mean", sd="std", seeds="count").reset_index()


def _records(table: pd.DataFrame) -> list[dict]:
    """Rows as JSON values: NaN becomes null."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(k): v for k, v in row.items()} for row in rows]


# ---------------------------------------------------------------------------------------------------
# Words


def verdict(summary: dict) -> str:
    """The finding in one or two sentences."""
    rows, trials = summary["headline"]["rows"], summary["trials"]
    prefix = ""
    if trials["finished"] < trials["expected"]:
        prefix = f"{trials['finished']} of {trials['expected']} trials are finished. "
    if not rows:
        return prefix + "The grid has no 4-bit per-tensor measurement, so the main question stays open."
    names = [f"{r['size']} {_SCHEDULE_NAMES[r['schedule']]}" for r in rows]
    against = [n for n, r in zip(names, rows, strict=True) if not r["grows"]]
    if against:
        finding = f"it does not at {', '.join(against)}" + (
            "" if len(against) == len(rows) else ", and does elsewhere"
        )
    else:
        finding = "it does, for every size and schedule measured"
    gammas = ", ".join(f"{n} {_interval(r)}" for n, r in zip(names, rows, strict=True))
    return (
        f"{prefix}Does the loss that 4-bit per-tensor quantization adds grow with training length? Here "
        f"{finding}. Exponents γ_D with 90 % intervals: {gammas}; Kumar et al. report {KUMAR_EXPONENT:.3f}."
    )


def _interval(fit: dict) -> str:
    if pd.isna(fit["gamma"]):
        return f"not determined ({fit['reason']})"
    return f"{fit['gamma']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]"


def to_text(summary: dict) -> str:
    """The finding for a terminal."""
    lines = [verdict(summary), ""]
    for row in summary["headline"]["rows"]:
        values = "  ".join(f"D/N {d}: +{v:.3f}" for d, v in row["added"].items())
        lines.append(f"  N {row['size']:>5} {_SCHEDULE_NAMES[row['schedule']]:>6}   {values}")
    return "\n".join(lines)


def _headline_table(rows: list[dict]) -> pd.DataFrame:
    shown = [
        {"N": r["size"], "schedule": _SCHEDULE_NAMES[r["schedule"]], "seeds": r["seeds"]}
        | {f"D/N = {d}": f"{v:.4f}" for d, v in r["added"].items()}
        | {"grows": "yes" if r["grows"] else "no", "γ_D [90 %]": _interval(r)}
        for r in rows
    ]
    return pd.DataFrame(shown)


def _exponent_table(table: pd.DataFrame) -> pd.DataFrame:
    table = select(table, scope="linears", split="valid")
    if table.empty:
        return table
    cells = ["—" if pd.isna(row["gamma"]) else _interval(row) for row in table.to_dict("records")]
    shown = table.assign(cell=cells, schedule=table["schedule"].map(_SCHEDULE_NAMES))
    pivot = shown.pivot_table(
        index=["size", "schedule", "granularity"], columns="bits", values="cell", aggfunc="first", sort=False
    )
    pivot.columns = [f"{bits} bits" for bits in pivot.columns]
    return pivot.reset_index()


def _base_table(base: pd.DataFrame) -> pd.DataFrame:
    keys = ["size", "schedule", "split", "d_over_n", "repetitions"]
    table = _over_seeds(base, keys)
    return pd.DataFrame(
        {
            "N": table["size"],
            "schedule": table["schedule"].map(_SCHEDULE_NAMES),
            "text": table["split"],
            "D/N": table["d_over_n"],
            "times each token was seen": table["repetitions"].map("{:.2f}".format),
            "loss (nats per token)": table["mean"].map("{:.4f}".format),
            "SD over seeds": table["sd"].map(lambda x: "—" if pd.isna(x) else f"{x:.4f}"),
            "seeds": table["seeds"],
        }
    )


# ---------------------------------------------------------------------------------------------------
# Figures


def _lines(table: pd.DataFrame, color: alt.Color, y: alt.Y, title: str, dash=None) -> alt.LayerChart:
    """Means over seeds as lines, single seeds as points, against D/N; what a log axis lacks is left out."""
    series = [c for c in table.columns if c not in ("seed", "mean", "se")]
    means = table.groupby(series, sort=False, as_index=False)["mean"].mean()
    shown = [t[t["mean"] > 0] for t in (means, table)]
    x = alt.X("d_over_n:Q", title="D/N, training tokens per parameter", scale=alt.Scale(type="log", nice=False))
    lines, points = (alt.Chart(t).encode(x=x, y=y, color=color) for t in shown)
    lines = lines.mark_line(clip=True)
    lines = lines if dash is None else lines.encode(strokeDash=dash)
    points = points.mark_circle(size=28, opacity=0.6, clip=True).encode(tooltip=["d_over_n", "mean", "se", "seed"])
    return alt.layer(lines, points).properties(title=title)


_SMALLEST_SHOWN = 1e-4  # nats per token; below it lies the noise of any affordable number of windows


def _log_y(table: pd.DataFrame) -> alt.Y:
    """The loss added on a logarithmic axis that all panels of a figure share."""
    shown = table["mean"][table["mean"] > 0]
    domain = [max(_SMALLEST_SHOWN, shown.min()), shown.max()] if len(shown) else [_SMALLEST_SHOWN, 1.0]
    scale = alt.Scale(type="log", nice=False, domain=domain)
    axis = alt.Axis(format="~g", tickCount=6)
    return alt.Y("mean:Q", title="loss added (nats per token)", scale=scale, axis=axis)


def _bits_color(added: pd.DataFrame) -> alt.Color:
    return alt.Color(
        "bits:O", title="bits", scale=alt.Scale(scheme="viridis", domain=sorted(map(int, set(added["bits"]))))
    )


def _by_bits(added: pd.DataFrame) -> report.Figure:
    table = select(added, granularity="tensor", scope="linears", split="valid")
    panels = [
        _lines(
            group[["d_over_n", "mean", "se", "seed", "bits"]],
            _bits_color(added),
            _log_y(table),
            f"N = {size}, {_SCHEDULE_NAMES[schedule]}",
        )
        for (size, schedule), group in table.groupby(["size", "schedule"], sort=False)
    ]
    return report.Figure(
        "added_loss",
        "Loss added by quantization against training length",
        "Weights of the blocks' linears rounded to nearest, one scale per tensor, held-out text. A line "
        "is the mean over seeds, a point one seed; both axes are logarithmic. What adds less than "
        f"{_SMALLEST_SHOWN:g} is within the noise of the evaluation and left out.",
        panels,
    )


def _by_granularity(added: pd.DataFrame) -> report.Figure:
    table = select(added, scope="linears", split="valid", bits=HEADLINE["bits"])
    table = table.assign(schedule=table["schedule"].map(_SCHEDULE_NAMES))
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
    return report.Figure(
        "granularity",
        "The same under finer scales",
        "4-bit weights under each granularity: one scale per tensor, per output channel, or per block of "
        "as many weights as the number says.",
        panels,
    )


def _shift_and_scope(added: pd.DataFrame) -> report.Figure:
    table = select(added, granularity="tensor", bits=HEADLINE["bits"])
    kind = table["split"].map({"valid": "like training", "shift": "shifted"}) + ", " + table["scope"]
    panels = [
        _lines(
            group[["d_over_n", "mean", "se", "seed", "kind"]],
            alt.Color("kind:N", title="text, layers", sort=None),
            _log_y(table),
            f"N = {size}, {_SCHEDULE_NAMES[schedule]}, 4 bits",
        )
        for (size, schedule), group in table.assign(kind=kind).groupby(["size", "schedule"], sort=False)
    ]
    return report.Figure(
        "shift_and_scope",
        "Shifted text, and the embedding and head",
        "4 bits per tensor on held-out text like the training text and on text unlike it; of the blocks' "
        "linears alone (linears), and of the embedding and the head too (all).",
        panels,
    )


def _exponent_figure(table: pd.DataFrame) -> report.Figure:
    table = select(table, granularity="tensor", scope="linears", split="valid")
    table = table[table["gamma"].notna()]
    run = table["size"] + ", " + table["schedule"].map(_SCHEDULE_NAMES)
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
        y="gamma:Q", tooltip=["run", "bits", "gamma", "low", "high"]
    )
    published = alt.Chart(pd.DataFrame({"y": [KUMAR_EXPONENT]})).mark_rule(strokeDash=[6, 4]).encode(y="y:Q")
    return report.Figure(
        "exponent",
        "The exponent beside the published one",
        f"γ_D of δ ∝ D^γ_D with 90 % intervals, weights per tensor. Dashed: {KUMAR_EXPONENT:.3f}, Kumar et al., "
        "fitted on 30M–220M parameters with GPTQ. Widths at which some run adds no loss have no exponent; "
        "the axis ends at −1 and 2.",
        [alt.layer(published, bars, points).properties(title="exponent by bits")],
    )


def _base_figure(base: pd.DataFrame, records: list[dict]) -> report.Figure:
    table = select(base, split="valid").assign(schedule=lambda t: t["schedule"].map(_SCHEDULE_NAMES))
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
            {"step": step, "loss": loss, "run": f"{r['trial']['size']}, {_SCHEDULE_NAMES[r['trial']['schedule']]}"}
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
            y=alt.Y("loss:Q", title="training loss (nats per token)", scale=alt.Scale(zero=False, domainMax=3.5, clamp=True)),
            color=alt.Color("run:N", title="longest runs, seed 0", sort=None),
        )
        .properties(title="training loss")
    )
    return report.Figure(
        "base_loss",
        "The models themselves",
        "Left: unquantized loss on held-out text. Right: training loss of the longest runs.",
        [against_length, training],
    )


def _longest(records: list[dict], size: str) -> int:
    return max(r["trial"]["tokens_per_parameter"][-1] for r in records if r["trial"]["size"] == size)


def _thin(curve: list, most: int = 150) -> list:
    return curve[:: max(1, len(curve) // most)]


# ---------------------------------------------------------------------------------------------------
# The report

_EXPONENT_CAPTION = (
    "γ_D [90 % interval], blocks' linears, held-out text; a dash where some run adds no loss, so that no "
    "power law holds"
)



def write(workdir: Path, records: list[dict], expected: int) -> dict:
    """Writes summary, report and figures of the records, and returns the summary.

    Args:
        workdir: where.
        records: of finished trials.
        expected: how many trials the grid has.
    """
    summary = summarize(records, expected)
    added, base = added_loss(records), base_loss(records)
    sections = [_question(summary, added)]
    if not added.empty:
        sections += [
            report.Section("By granularity, text and layers", figures=[_by_granularity(added), _shift_and_scope(added)]),
            report.Section(
                "The exponent",
                figures=[_exponent_figure(exponents(added))],
                tables=[(_EXPONENT_CAPTION, _exponent_table(exponents(added)))],
            ),
            report.Section(
                "The models themselves",
                tables=[("Unquantized loss, and how often a token was repeated", _base_table(base))],
                figures=[_base_figure(base, records)],
            ),
        ]
    sections.append(_method(summary, records))
    title = "Overtraining against quantization"
    report.write(workdir, title, verdict(summary), sections, summary)
    return summary


def _question(summary: dict, added: pd.DataFrame) -> report.Section:
    tables = [("Loss added by 4-bit per-tensor weights, in nats per token, mean over seeds", _headline_table(summary["headline"]["rows"]))]
    return report.Section(
        "Does overtraining make quantization cost more?",
        [
            "Kumar et al. (2024) found that the loss which post-training quantization adds grows as a power "
            "of the training length D. Catalan-Tatjer et al. (2025) answer that the learning-rate decay has "
            "a part in it. So each size is trained to each length under both schedules: cosine, and "
            "warm-up-stable-decay (WSD), whose lengths branch from one stable run."
        ],
        tables if summary["headline"]["rows"] else [],
        [_by_bits(added)] if not added.empty else [],
    )


def _method(summary: dict, records: list[dict]) -> report.Section:
    trials = summary["trials"]
    paragraphs = [
        "Measured: each loss is the mean cross-entropy per token over the same held-out windows before and "
        "after quantization, so that added losses are paired. Simulated: weights are rounded to symmetric "
        "integer grids with absmax ranges and multiplied in floating point; nothing here is a latency or a size. "
        "Fitted: γ_D by least squares on log δ against log D with a level per seed; its interval is Student's "
        "t on the residuals, so it is as wide as few seeds and lengths make it, and the lengths of one WSD run "
        "share a trunk.",
        f"{trials['finished']} of {trials['expected']} trials finished, {len(trials['diverged'])} of them diverged."
        + "".join(f" Diverged: {d['size']} {d['schedule']} seed {d['seed']} at step {d['step']}." for d in trials["diverged"]),
        "Non-embedding parameters N: " + ", ".join(f"{k} = {v:,}" for k, v in summary["parameters"].items()) + ".",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in summary["versions"].items()) + ".",
    ]
    if records:
        t = records[0]["trial"]
        paragraphs.insert(
            2,
            f"Data: {t['data']} {t['data_path']} (fingerprint {t['data_fingerprint']}); sequences of {t['sequence']} tokens, "
            f"batches of {t['batch']}; AdamW (0.9, 0.95), weight decay 0.1, clipping at 1, peak learning rate {t['peak_lr']}, "
            f"{t['dtype']}; {t['evaluation_windows']} evaluation windows per text.",
        )
    return report.Section("How this was measured", paragraphs)

"""Growth below one pass over the training text and above it: local slopes, a seed's own each."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import itertools
from collections.abc import Iterator

import numpy as np
import pandas as pd

from experiments.harness.reporting.findings import Finding
from experiments.harness.reporting.layout import Section
from experiments.harness.reporting.statistics import corrected, t_interval, t_p_value
from experiments.harness.reporting.values import bounds
from experiments.ptq_overtraining import corrections
from experiments.ptq_overtraining.analysis import HEADLINE, SCHEDULE_NAMES, select

PARTS = {"below": "at most one pass", "across": "from below one pass to above", "above": "above"}
_BELOW = "Does the loss added grow before any text is repeated?"
_SLOWER = "Does it grow more slowly once text is repeated?"


def part_of(start: float, end: float) -> str:
    """Where a step from one length to the next lies, by the passes over the text at both.

    >>> part_of(0.2, 0.9), part_of(0.9, 1.6), part_of(1.6, 4.9)
    ('below', 'across', 'above')
    """
    return "below" if end <= 1 else "above" if start >= 1 else "across"


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """The slope of log δ by log D of each size, schedule and seed in each part of its lengths.

    A part's slope is that of least squares over its lengths; one where a length adds no loss is left out.

    Args:
        table: of `added_loss` rows of one quantization and text.

    Returns:
        Columns size, schedule, seed, part, slope, start and end, in passes over the text.
    """
    rows = []
    for (size, schedule, seed), run in table.groupby(["size", "schedule", "seed"], sort=False):
        own = {"size": size, "schedule": schedule, "seed": seed}
        rows += [own | part for part in _parts(run.sort_values("tokens"))]
    columns = ["size", "schedule", "seed", "part", "slope", "start", "end"]
    return pd.DataFrame(rows, columns=columns)


def _parts(run: pd.DataFrame) -> Iterator[dict]:
    passes = run["epochs"].to_numpy(float)
    kinds = np.array([part_of(a, b) for a, b in itertools.pairwise(passes)])
    for part in dict.fromkeys(kinds.tolist()):
        steps = np.flatnonzero(kinds == part)
        own = run.iloc[steps[0] : steps[-1] + 2]
        if (own["mean"] > 0).all():
            slope = np.polyfit(np.log(own["tokens"]), np.log(own["mean"]), 1)[0]
            ends = {"start": float(own["epochs"].iloc[0]), "end": float(own["epochs"].iloc[-1])}
            yield {"part": part, "slope": float(slope), **ends}


def summaries(added: pd.DataFrame) -> dict:
    """Slopes by schedule, size and part, and the change from below one pass to above it.

    Intervals are Student's t over units of size and seed.  Empty where no run repeats text.

    Args:
        added: of `added_loss`.
    """
    table = select(added, **HEADLINE)
    if not (table["epochs"].to_numpy(float) > 1).any():
        return {}
    found, rows, changes = slopes(table), [], []
    for schedule, own in found.groupby("schedule", sort=False):
        sizes = [(size, runs) for size, runs in own.groupby("size", sort=False)]
        for size, runs in [*sizes, ("all", own)]:
            of = {"schedule": schedule, "size": size}
            rows += [of | _row(runs, part) for part in PARTS if (runs["part"] == part).any()]
        by_part = own.pivot_table(index=["size", "seed"], columns="part", values="slope")
        if {"below", "above"} <= set(by_part.columns):
            change = (by_part["above"] - by_part["below"]).dropna()
            named = ", ".join(dict.fromkeys(change.index.get_level_values("size")))
            if len(change):
                changes.append({"schedule": schedule, "sizes": named} | _mean(change))
    return {"rows": rows, "changes": changes}


def _row(runs: pd.DataFrame, part: str) -> dict:
    own = select(runs, part=part)
    ends = {"start": float(own["start"].min()), "end": float(own["end"].max())}
    sizes = ", ".join(dict.fromkeys(own["size"]))
    return {"part": part, "sizes": sizes} | ends | _mean(own["slope"])


def _mean(values: pd.Series) -> dict:
    mean, low, high = t_interval(values)
    p_value = t_p_value(values)
    return {"units": len(values), "mean": mean, "low": low, "high": high, "p_value": p_value}


def findings(found: dict) -> list[Finding]:
    """Growth below one pass, over all sizes, and whether it is slower above."""
    if not found:
        return []
    below = [r for r in found["rows"] if r["size"] == "all" and r["part"] == "below"]
    grown = [
        _finding(row, q, _BELOW, f"γ_D below one pass, {_where(row)}", "yes", "no")
        for row, q in _with_q(below)
    ]
    slowed = [
        _finding(row, q, _SLOWER, f"γ_D above one pass − below, {_where(row)}", "no, faster", "yes")
        for row, q in _with_q(found["changes"])
    ]
    return grown + slowed


def _where(row: dict) -> str:
    return f"{SCHEDULE_NAMES[row['schedule']]}, N = {row['sizes']}"


def _with_q(rows: list[dict]) -> list[tuple[dict, float | None]]:
    return list(zip(rows, corrected([row["p_value"] for row in rows]), strict=True))


def _finding(
    row: dict, q: float | None, question: str, quantity: str, positive: str, negative: str
) -> Finding:
    units = f"{row['units']} units of size and seed"
    return Finding(
        question,
        quantity,
        corrections.sign(row["mean"], q, positive, negative),
        *(row[k] for k in ("mean", "low", "high")),
        form="+.2f" if question == _SLOWER else ".2f",
        least_effect=None if row["low"] is None else (row["high"] - row["low"]) / 2,
        note=units if q is None else f"{units}; q {corrections.q_text(q)}",
    )


def section(found: dict, paragraphs: list[str]) -> Section:
    """The slopes as a section of the report."""
    table = pd.DataFrame(
        [
            {
                "schedule": SCHEDULE_NAMES[row["schedule"]],
                "N": row["size"],
                "lengths": PARTS[row["part"]],
                "passes over the text": f"{row['start']:.2f} to {row['end']:.2f}",
                "slope [90 %]": bounds(row["mean"], row["low"], row["high"], ".2f"),
                "units": row["units"],
                "p (slope = 0)": corrections.q_text(row["p_value"]),
                "q": corrections.q_text(q),
            }
            for row, q in _with_q(found["rows"])
        ]
    )
    caption = "Slopes of log δ by log D, 4 bits per tensor, by the passes over the text"
    return Section("Repeated text", paragraphs, [(caption, table)])

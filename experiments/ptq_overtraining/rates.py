"""The learning rate: base loss and exponent at each, and whether growth survives the best one."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import pandas as pd

from experiments.harness.reporting.findings import Finding
from experiments.harness.reporting.layout import Section
from experiments.harness.reporting.values import bounds, number
from experiments.ptq_overtraining import corrections, figures
from experiments.ptq_overtraining.analysis import (
    HEADLINE,
    NEAREST,
    SCHEDULE_NAMES,
    best_rates,
    pooled_exponents,
    select,
    varied,
)

_QUESTION = "Does the growth survive tuning of the learning rate?"
_KEYS = ["size", "schedule", "peak_lr"]


def summaries(added: pd.DataFrame, base: pd.DataFrame) -> list[dict]:
    """A row per size, schedule and learning rate; none where each size and schedule has one rate alone.

    Each has the base loss on held-out text at the longest length, the exponent of 4 bits per tensor with an
    interval from the residuals of all rates together, and whether it is the best rate: of least base loss.

    Args:
        added: of `added_loss`.
        base: of `base_loss`.
    """
    if "peak_lr" not in varied(base):
        return []
    own, best = select(base, split="valid"), best_rates(base)
    groups = dict(list(select(added, **HEADLINE, solver=NEAREST).groupby(_KEYS, sort=False)))
    keys = [*own.groupby(["size", "schedule", "peak_lr"], sort=False).groups]
    fits = pooled_exponents(groups.get(key, added.iloc[:0]) for key in keys)
    return [_row(key, own, best) | fit for key, fit in zip(keys, fits, strict=True)]


def _row(key: tuple, base: pd.DataFrame, best: dict) -> dict:
    size, schedule, rate = key
    runs = select(base, size=size, schedule=schedule)
    longest = int(runs["d_over_n"].max())
    losses = select(runs, peak_lr=rate, d_over_n=longest)["mean"]
    tried = sorted(set(runs["peak_lr"]))
    return {
        "size": size,
        "schedule": schedule,
        "peak_lr": float(rate),
        "rates": len(tried),
        "d_over_n": longest,
        "loss": float(losses.mean()) if len(losses) else None,
        "runs": len(losses),
        "is_best": best[size, schedule] == rate,
        "is_at_end": rate in (tried[0], tried[-1]),
    }


def findings(rows: list[dict]) -> list[Finding]:
    """Whether the loss added grows at the best rate of each size and schedule."""
    return [_finding(r, rows) for r in corrections.tested([r for r in rows if r["is_best"]])]


def _finding(row: dict, rows: list[dict]) -> Finding:
    said = []
    if row["is_at_end"]:
        said.append("the best rate is at an end of those tried")
    others = [
        r["gamma"]
        for r in rows
        if (r["size"], r["schedule"]) == (row["size"], row["schedule"])
        and not r["is_best"]
        and r["gamma"] is not None
    ]
    if others:
        said.append(f"at the other rates {min(others):.2f} to {max(others):.2f}")
    quantity = (
        f"γ_D at the best of {row['rates']} rates, {row['peak_lr']:g}, N = {row['size']}, "
        f"{SCHEDULE_NAMES[row['schedule']]}"
    )
    return corrections.finding(_QUESTION, quantity, row, said)


def section(rows: list[dict], paragraphs: list[str]) -> Section:
    """The rates as a section of the report."""
    caption = (
        "Base loss on held-out text at the longest length, and γ_D [90 % interval] of 4 bits per tensor; "
        "the best rate is that of least base loss"
    )
    drawn = [figures.rates(pd.DataFrame(rows))]
    return Section("The learning rate", paragraphs, [(caption, _table(rows))], drawn)


def _table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "N": r["size"],
                "schedule": SCHEDULE_NAMES[r["schedule"]],
                "peak rate": f"{r['peak_lr']:g}",
                "D/N": r["d_over_n"],
                "base loss": number(r["loss"], ".4f"),
                "runs": r["runs"],
                "γ_D": bounds(r["gamma"], r["low"], r["high"], ".2f"),
                "best": "best" if r["is_best"] else "",
            }
            for r in rows
        ]
    )

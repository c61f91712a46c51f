"""GPTQ beside rounding to nearest: the exponents of both, and of their ratio."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import pandas as pd

from experiments.harness.reporting.findings import Finding
from experiments.harness.reporting.layout import Section
from experiments.harness.reporting.values import bounds, number
from experiments.ptq_overtraining import corrections
from experiments.ptq_overtraining.analysis import (
    HEADLINE,
    SCHEDULE_NAMES,
    pooled_exponents,
    select,
)
from experiments.ptq_overtraining.measuring import GPTQ, NEAREST

_QUESTION = "Does the growth survive GPTQ?"
_KEYS = ["granularity", "bits", "size", "schedule"]
_RUN = ["seed", "d_over_n", "tokens"]


def summaries(added: pd.DataFrame) -> list[dict]:
    """γ_D under GPTQ and under rounding to nearest, and of the ratio of what both add.

    Of the blocks' linears on text like the training text.  Within a granularity and width, residuals of all
    sizes and schedules have one variance.  The p- and q-values are those of the exponents under GPTQ.

    Args:
        added: of `added_loss`, with rows of both solvers; none gives no summaries.
    """
    own = select(added, scope="linears", split="valid")
    if GPTQ not in set(own["solver"]):
        return []
    pairs = select(own, solver=GPTQ).merge(
        select(own, solver=NEAREST)[[*_KEYS, *_RUN, "mean"]],
        on=[*_KEYS, *_RUN],
        suffixes=("", "_nearest"),
    )
    rows = []
    for _, family in pairs.groupby(["granularity", "bits"], sort=False):
        groups = [(key, runs) for key, runs in family.groupby(_KEYS, sort=False)]
        tables = [runs for _, runs in groups]
        fits = zip(
            groups,
            pooled_exponents(tables),
            pooled_exponents(t.assign(mean=t["mean_nearest"]) for t in tables),
            pooled_exponents(t.assign(mean=t["mean"] / t["mean_nearest"]) for t in tables),
            strict=True,
        )
        for (key, runs), gptq, nearest, ratio in fits:
            row = dict(zip(_KEYS, key, strict=True)) | gptq
            row |= {"seeds": int(runs["seed"].nunique()), "nearest": nearest, "ratio": ratio}
            rows.append(row | {"added": _means(runs, "mean"), "share": _share(runs)})
    return corrections.tested(rows)


def _means(runs: pd.DataFrame, column: str) -> dict[str, float]:
    means = runs.groupby("d_over_n")[column].mean()
    return {str(d): float(v) for d, v in means.items()}


def _share(runs: pd.DataFrame) -> dict[str, float]:
    """What GPTQ adds as a share of what rounding to nearest adds, at each length."""
    nearest = _means(runs, "mean_nearest")
    return {d: v / nearest[d] for d, v in _means(runs, "mean").items() if nearest[d]}


def findings(rows: list[dict]) -> list[Finding]:
    """Whether the loss that 4 bits by GPTQ add grows with D/N; q-values are over all widths."""
    return [_finding(row) for row in rows if row["bits"] == HEADLINE["bits"]]


def _finding(row: dict) -> Finding:
    near, said = row["nearest"], []
    if near["gamma"] is not None:
        said.append(f"to nearest {bounds(near['gamma'], near['low'], near['high'], '.2f')}")
    quantity = (
        f"γ_D, 4 bits per {row['granularity']} by GPTQ, N = {row['size']}, "
        f"{SCHEDULE_NAMES[row['schedule']]}"
    )
    return corrections.finding(_QUESTION, quantity, row, said)


def section(rows: list[dict], paragraphs: list[str]) -> Section:
    """Both solvers as a section of the report."""
    caption = (
        "γ_D [90 %] by solver, and that of the ratio GPTQ / nearest; below zero, GPTQ slows growth"
    )
    tests = pd.DataFrame([_named(row) | corrections.columns(row) for row in rows])
    shares = pd.DataFrame(
        [
            _named(row) | {f"D/N = {d}": number(v, ".2f") for d, v in row["share"].items()}
            for row in rows
        ]
    )
    folded = [
        ("What GPTQ adds as a share of what rounding to nearest adds, means over seeds", shares),
        ("γ_D under GPTQ against zero and the published one; q over all rows", tests),
    ]
    shown = pd.DataFrame(
        [
            _named(row)
            | {
                "nearest": _bounds(row["nearest"]),
                "GPTQ": _bounds(row),
                "ratio": _bounds(row["ratio"]),
            }
            | {"seeds": row["seeds"]}
            for row in rows
        ]
    )
    return Section("GPTQ beside rounding to nearest", paragraphs, [(caption, shown)], folded=folded)


def _named(row: dict) -> dict:
    return {
        "N": row["size"],
        "schedule": SCHEDULE_NAMES[row["schedule"]],
        "one scale per": row["granularity"],
        "bits": row["bits"],
    }


def _bounds(fit: dict) -> str:
    return bounds(fit["gamma"], fit["low"], fit["high"], ".2f")

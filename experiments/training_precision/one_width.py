"""Runs whose tensors have one width: how the gap to full precision grows, laws ranked, the best precision."""

# pandas' selections are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import numpy as np
import pandas as pd

from experiments.harness.reporting.exponents import power_law
from experiments.harness.reporting.law_tables import control_summary, fit_summary
from experiments.training_precision.runs import FULL, gaps, tied
from jaxquant import laws

BOOTSTRAPS = 60  # of the laws, by units of size and seed within sizes
STARTS = 64  # of each fit; runs held out need them
_RESAMPLED_STARTS = 16  # where runs are resampled, beside the fit itself
# Laws of a term that grows, and of a part of N that counts: what is set against each other.
GROWING = (laws.GROWING_ERROR, laws.GROWING_ONE)
OF_N = (laws.PANFEROV, laws.KUMAR_ONE)
NOT_REJECTED = 2.0  # of the criterion, behind the leader
_BUDGETS = tuple(m * 10.0**e for e in range(6, 30) for m in (1, 3))


def candidates(widths: list[int]) -> list[laws.Law]:
    """The laws that runs of one width are given."""
    free = laws.free_efficiency(*(b for b in widths if b < FULL))
    return [*GROWING, laws.ADDITIVE_ERROR, laws.ADDITIVE_ONE, *OF_N, free, laws.CHINCHILLA]


def fit(law: laws.Law, table: pd.DataFrame) -> laws.Fit:
    """A law with its intervals: over units of size and seed within sizes; of one seed, over trunks."""
    has_seeds = (table.groupby("size")["seed"].nunique() > 1).all()
    units = {"groups": "unit", "strata": "size"} if has_seeds else {"groups": "trunk"}
    return laws.fit(law, table, bootstraps=BOOTSTRAPS, starts=_RESAMPLED_STARTS, **units)


def summary(table: pd.DataFrame, method: str) -> dict:
    """A method's gaps, its laws, its best precision and its control; or the reason why there are none."""
    own, apart = tied(table, method), gaps(table, method)
    widths = sorted(map(int, own["P_w"].unique()))
    found: dict = {"method": method, "runs": len(own), "widths": widths, "gaps": of_gaps(apart)}
    try:
        ranked = laws.compare(candidates(widths), own, groups="unit", starts=STARTS)
        control = laws.shuffled_bits(laws.GROWING_ERROR, laws.CHINCHILLA, own, starts=STARTS)
        levels = fit(laws.free_efficiency(*(b for b in widths if b < FULL)), own)
    except ValueError as error:
        return found | {"reason": str(error)}
    scores = dict(zip((f.law.name for f in ranked.fits), ranked.criteria, strict=True))
    kept = _not_rejected(scores)
    fits = {law.name: fit(law, own) for law in (*GROWING, laws.KUMAR_ONE)}
    return found | {
        "laws": ranked.rows,
        "independent": ranked.independent,
        "warnings": list(ranked.warnings),
        "over_n": _lead(scores),
        "fits": {name: fit_summary(f) for name, f in fits.items()},
        "kept": [law.name for law in kept],
        "optima": _optima([fits[law.name] for law in kept], own) if kept else [],
        "efficiencies": _efficiencies(levels, widths),
        "control": control_summary(control),
    }


def of_gaps(table: pd.DataFrame) -> dict:
    """How the gap of paired runs grows: one law of all widths, and least squares at each width alone.

    "late" is of each size's two longest lengths: whether the gap still grows there.
    """
    found: dict = {"widths": []}
    for bits, own in table.groupby("P_w"):
        late = _late(own)
        means = own.groupby(["size", "d_over_n"], sort=False)["gap"].mean()
        levels = [
            {"size": size, "d_over_n": int(length), "gap": float(gap)}
            for (size, length), gap in means.items()
        ]
        row = {"P": int(bits), "gaps": levels, "late": power_law(late, "gap", _columns(late))}
        found["widths"].append(row | power_law(own, "gap", _columns(own)))
    try:
        found["fit"] = fit_summary(fit(laws.GAP_ERROR, table))
    except ValueError as error:
        found["reason"] = str(error)
    return found


def _columns(table: pd.DataFrame) -> tuple[str, ...]:
    return ("D", "N") if table["N"].nunique() > 1 else ("D",)


def _late(table: pd.DataFrame) -> pd.DataFrame:
    """The gaps at each size's two longest lengths; without sizes of one length."""
    rank = table.groupby("size")["d_over_n"].rank(method="dense", ascending=False)
    has_two = table.groupby("size")["d_over_n"].transform("nunique") > 1
    return table[(rank <= 2) & has_two]


def _not_rejected(scores: dict[str, float]) -> list[laws.Law]:
    """The laws of N, D and bits that the runs do not tell from the likeliest, if that is one that grows."""
    best = min(scores.values())
    if not np.isfinite(best):
        return []
    return [law for law in GROWING if scores[law.name] <= best + NOT_REJECTED]


def _lead(scores: dict[str, float]) -> float:
    """By how much the best growing law is below the best law of a part of N, in the criterion."""
    of_n, growing = (min(scores[law.name] for law in group) for group in (OF_N, GROWING))
    return of_n - growing


def budgets(table: pd.DataFrame) -> list[float]:
    """Round budgets of compute that the runs surround: 6 N D of 16-bit operations."""
    spent = 6 * table["N"] * table["D"]
    least, most = 8 * spent.min(), spent.max()
    return [c for c in _BUDGETS if least <= c <= most]


def _optima(fits: list[laws.Fit], table: pd.DataFrame) -> list[dict]:
    """P*(C), each interval the union of those of all laws that are not rejected."""
    found = []
    for flops in budgets(table):
        each = {f.law.name: laws.precision_at_budget(f, flops=flops) for f in fits}
        own = {name: optimum_summary(one) for name, one in each.items()}
        found.append(
            {"flops": flops, "by_law": own} | optimum_summary(laws.union([*each.values()]))
        )
    return found


def optimum_summary(found: laws.Optimum) -> dict:
    """The best precision as JSON values."""
    return {
        "bits": found.bits,
        "low": found.low,
        "high": found.high,
        "is_determined": found.is_determined,
        "text": str(found),
    }


def _efficiencies(levels: laws.Fit, widths: list[int]) -> list[dict]:
    return [
        {"bits": b, "value": levels.params[f"eff_{b}"]}
        | dict(zip(("low", "high"), levels.interval(f"eff_{b}"), strict=True))
        for b in widths
        if b < FULL
    ]

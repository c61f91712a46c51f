"""The law of forward and backward bits: how gaps grow, which law is likeliest, Quartet's efficiencies."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import numpy as np
import pandas as pd

from experiments.gradient_precision import forms, split
from experiments.gradient_precision.arms import FAMILIES, FULL, FULL_BITS
from experiments.harness.reporting.exponents import power_law
from experiments.harness.reporting.law_tables import control_summary, fit_summary
from experiments.harness.reporting.statistics import corrected
from jaxquant import laws

BOOTSTRAPS = 60  # of the laws, by units of size and seed within sizes
STARTS = 32  # of fits that are ranked; runs held out need them
_RESAMPLED_STARTS = 16  # where runs are resampled, beside the fit itself
HELD_OUT = ("P_forward", "P_backward", "N", "D")


def summaries(best: pd.DataFrame, apart: pd.DataFrame) -> list[dict]:
    """The law of each grid that has several forward and several backward widths.

    Args:
        best: of `runs.at_best_rate`.
        apart: of `runs.gaps`.
    """
    found = []
    for name, own in apart[apart["method"].isin(FAMILIES)].groupby("name", sort=False):
        if all(own[c].nunique() > 1 for c in forms.COLUMNS):
            found.append({"name": name} | _summary(whole(best, name), own))
    return found


def whole(best: pd.DataFrame, name: str) -> pd.DataFrame:
    """A grid's runs; those of full precision stand for its widest pair where it has none."""
    own = best[best["name"] == name]
    widest = (own["P_forward"] == FULL_BITS) & (own["P_backward"] == FULL_BITS)
    return own if widest.any() else pd.concat([own, best[best["method"] == FULL]])


def _summary(whole: pd.DataFrame, own: pd.DataFrame) -> dict:
    """Growth by pair, the gap's law, the ranking, Quartet's efficiencies, and the best split."""
    found: dict = {
        "runs": len(whole),
        "pairs": growth(own),
        "measured_split": split.measured(own),
    }
    try:
        gap = fit(forms.GAP, own)
        ranked = laws.compare(
            forms.PAIRED, own, groups="unit", held_out=HELD_OUT, starts=_RESAMPLED_STARTS
        )
    except ValueError as error:
        return found | {"reason": str(error)}
    found |= {"gap": fit_summary(gap), "split": split.of_fit(gap, own)}
    found |= {"independent_pairs": ranked.independent, "paired": _of_gaps(ranked.rows, own)}
    try:
        efficiencies = forms.quartet(*widths(whole), FULL_BITS)
        candidates = [forms.GROWING, *forms.COSTS, efficiencies, laws.CHINCHILLA]
        ranked = laws.compare(candidates, whole, groups="unit", held_out=HELD_OUT, starts=STARTS)
        control = laws.shuffled_bits(
            forms.GROWING, laws.CHINCHILLA, whole, starts=_RESAMPLED_STARTS
        )
    except ValueError as error:
        return found | {"reason_of_laws": str(error)}
    return found | {
        "laws": ranked.rows,
        "independent": ranked.independent,
        "warnings": list(ranked.warnings),
        "quartet": fit_summary(fit(efficiencies, whole)),
        "tokens": fit_summary(fit(forms.TOKENS, whole)),
        "control": control_summary(control),
    }


def _of_gaps(rows: list[dict], own: pd.DataFrame) -> list[dict]:
    """A ranking's rows with R² of log(L / L_full) in the place of R² of log L, most of which is L_full's."""
    whole, gap = np.log(own["loss"]), np.log(own["loss"] / own["loss_full"])
    share = float(((whole - whole.mean()) ** 2).sum() / ((gap - gap.mean()) ** 2).sum())
    return [
        {k: 1 - (1 - v) * share if k.startswith("r2") else v for k, v in row.items()}
        for row in rows
    ]


def widths(table: pd.DataFrame) -> tuple[list[int], list[int]]:
    forward, backward = (sorted(map(int, table[c].unique())) for c in forms.COLUMNS)
    return forward, backward


def fit(law: laws.Law, table: pd.DataFrame) -> laws.Fit:
    """A law with its intervals: over units of size and seed within sizes; of one seed, over trunks."""
    has_seeds = (table.groupby("size")["seed"].nunique() > 1).all()
    units = {"groups": "unit", "strata": "size"} if has_seeds else {"groups": "trunk"}
    return laws.fit(law, table, bootstraps=BOOTSTRAPS, starts=_RESAMPLED_STARTS, **units)


def growth(apart: pd.DataFrame) -> list[dict]:
    """How the gap of each pair of bits grows with D and N, least squares; q-values of all exponents."""
    rows = []
    for (forward, backward), own in apart.groupby([*forms.COLUMNS]):
        if forward == backward == FULL_BITS:
            continue
        columns = ("D", "N") if own["N"].nunique() > 1 else ("D",)
        row = {"P_forward": int(forward), "P_backward": int(backward)}
        rows.append(row | power_law(own, "gap", columns))
    places = [(row, c) for row in rows for c in ("D", "N") if c in row]
    q_values = corrected([row[c]["p_value"] for row, c in places])
    for (row, column), q in zip(places, q_values, strict=True):
        row[column] = row[column] | {"q_value": q}
    return rows

"""The best split of bits between the passes: (P_f + 2 P_b) / 3 bits a multiplication, in the mean."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import math

import numpy as np
import pandas as pd

from experiments.gradient_precision import forms
from experiments.gradient_precision.comparisons import over_seeds, with_q_values
from jaxquant import laws
from jaxquant.stats import percentile_interval

BUDGETS = (5.0, 6.0, 7.0, 8.0)  # mean bits of a multiplication


def mean_bits(forward: float, backward: float) -> float:
    """Bits of a multiplication in the mean over a forward and two gradient products.

    >>> mean_bits(4, 8)
    6.666666666666667
    """
    return (forward + 2 * backward) / 3


def best(p: dict, n: float, d: float, budget: float) -> float:
    """P_backward at which the gap's law is least for mean bits.

    With heights h_x, h_f exp(−(3B − 2 P_b)/γ_f) + h_b exp(−P_b/γ_b) is least where
    P_b (2/γ_f + 1/γ_b) = log(h_b γ_f / (2 h_f γ_b)) + 3B/γ_f.

    Args:
        p: parameters of `forms.GAP`.
        n, d: parameters and tokens.
        budget: B.

    >>> same = {f"{k}_{x}": 1.0 for x in ("forward", "backward") for k in ("C", "gamma")}
    >>> flat = {f"gamma_{k}_{x}": 0.0 for x in ("forward", "backward") for k in "DN"}
    >>> round(best(same | flat, 1e4, 1e6, 6.0), 3)  # two products need log 2 less each
    5.769
    """
    forward, backward = (p[f"gamma_{x}"] for x in forms.PASSES)
    heights = [
        math.log(p[f"C_{x}"]) + p[f"gamma_D_{x}"] * math.log(d) + p[f"gamma_N_{x}"] * math.log(n)
        for x in forms.PASSES
    ]
    right = heights[1] - heights[0] + math.log(forward / (2 * backward)) + 3 * budget / forward
    return right / (2 / forward + 1 / backward)


def of_fit(fit: laws.Fit, table: pd.DataFrame) -> list[dict]:
    """The best split at each size's longest training; beyond the measured widths it is not determined."""
    found = []
    ranges = [(float(table[c].min()), float(table[c].max())) for c in forms.COLUMNS]
    longest = table.loc[table.groupby("size", sort=False)["D"].idxmax()]
    drawn = [
        dict(zip(fit.samples, x, strict=True)) for x in zip(*fit.samples.values(), strict=True)
    ]
    for _, run in longest.iterrows():
        for budget in BUDGETS:
            value = best(fit.params, run["N"], run["D"], budget)
            samples = np.array([best(p, run["N"], run["D"], budget) for p in drawn])
            low, high = percentile_interval(samples, fit.expanded())
            pair = (3 * budget - 2 * value, value)
            inside = all(a <= x <= b for x, (a, b) in zip(pair, ranges, strict=True))
            found.append(
                {"size": run["size"], "d_over_n": int(run["d_over_n"]), "budget": budget}
                | {"forward": pair[0], "backward": value, "is_inside": inside}
                | {"low": min(low, value), "high": max(high, value)}
            )
    return found


def measured(table: pd.DataFrame) -> list[dict]:
    """The best measured pair of at most so many mean bits, against the widest even one of no more.

    The pair is chosen for each seed by the other seeds, so never by what it is compared with.  Gains are
    positive where it is better than the even one.

    Args:
        table: of `runs.gaps`, of one grid.
    """
    found = []
    for place, own in table.groupby(["size", "d_over_n"], sort=False):
        gaps = own.pivot_table(index="seed", columns=[*forms.COLUMNS], values="gap").dropna()
        for budget in BUDGETS:
            pairs = [p for p in gaps.columns if mean_bits(*p) <= budget]
            even = [p for p in pairs if p[0] == p[1]]
            if len(gaps) < 2 or not even or len(pairs) < 2:
                continue
            others = {seed: gaps[pairs].drop(index=seed).mean().idxmin() for seed in gaps.index}
            gain = pd.Series(
                {s: gaps.loc[s, max(even)] - gaps.loc[s, pair] for s, pair in others.items()}
            )
            row = dict(zip(("size", "d_over_n"), place, strict=True)) | {"budget": budget}
            row |= {"best": _named(gaps[pairs].mean().idxmin()), "even": _named(max(even))}
            found.append(row | over_seeds(gain))
    return with_q_values(found)


def _named(pair: tuple[int, int]) -> str:
    return f"{pair[0]}/{pair[1]}"

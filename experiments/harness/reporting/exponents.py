"""Exponents of power laws by least squares, with intervals over units of size and seed within sizes."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.harness.reporting.statistics import CONFIDENCE
from jaxquant.laws.intervals import expanded
from jaxquant.stats import percentile_interval

BOOTSTRAPS = 400


def power_law(table: pd.DataFrame, target: str, columns: Sequence[str]) -> dict:
    """The exponents of target ∝ Π column^γ: least squares on logarithms, with 90 % intervals.

    Runs of one size and seed share what they are off by, and sizes are chosen: units of both are resampled
    within sizes.  p-values are the shares of resamples beyond zero, doubled.

    Args:
        table: runs, with the columns "size" and "seed"; more than one value of each of `columns`.
        target: a column of positive numbers.
        columns: what it grows with, as ("D", "N").

    Returns:
        points, units, reason (None where exponents could be had), and for each column a dict of value, low,
        high and p_value; of one seed a size, value alone.
    """
    units = table.groupby(["size", "seed"], sort=False).ngroup().to_numpy()
    found: dict = {"points": len(table), "units": len(set(units.tolist())), "reason": None}
    broken = int((~(table[target] > 0)).sum())
    if broken:
        return found | {"reason": f"{broken} of {len(table)} runs have no {target} above zero"}
    if len(table) <= len(columns) + 1 or any(table[c].nunique() < 2 for c in columns):
        return found | {"reason": f"too few runs or one {' or '.join(columns)} alone"}
    x = np.column_stack([np.ones(len(table)), *(np.log(table[c].to_numpy(float)) for c in columns)])
    x[:, 1:] -= x[:, 1:].mean(axis=0)
    y = np.log(table[target].to_numpy(float))
    own = _solved(x, y, np.ones((1, len(y))))[0]
    if min(table.groupby("size")["seed"].nunique().tolist()) < 2:
        ends = {"low": None, "high": None, "p_value": None}
        return found | {
            c: {"value": float(v)} | ends for c, v in zip(columns, own[1:], strict=True)
        }
    weights = resampled(units, table["size"].to_numpy(), BOOTSTRAPS)
    drawn = _solved(x, y, weights)
    level = expanded(CONFIDENCE, max(found["units"], 2), len(y), x.shape[1])
    rows = {}
    for i, column in enumerate(columns, start=1):
        low, high = percentile_interval(drawn[:, i], level)
        beyond = min((drawn[:, i] <= 0).mean(), (drawn[:, i] >= 0).mean())
        p_value = min(1.0, 2 * max(float(beyond), 1 / (BOOTSTRAPS + 1)))
        rows[column] = {"value": float(own[i]), "low": low, "high": high, "p_value": p_value}
    return found | rows


def resampled(units: np.ndarray, strata: np.ndarray, bootstraps: int, seed: int = 0) -> np.ndarray:
    """How often each run counts in each bootstrap of units within strata, float64[bootstraps, runs]."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((bootstraps, int(units.max()) + 1))
    for stratum in pd.unique(strata):
        members = np.unique(units[strata == stratum])
        even = np.full(len(members), 1 / len(members))
        counts[:, members] = rng.multinomial(len(members), even, bootstraps)
    return counts[:, units]


def _solved(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least squares, float64[fits, columns of x]."""
    normal = np.einsum("br,ri,rj->bij", weights, x, x)
    right = np.einsum("br,ri,r->bi", weights, x, y)
    return np.einsum("bij,bj->bi", np.linalg.pinv(normal), right)

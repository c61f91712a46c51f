"""Whether training in few bits lowers what serving in fewer costs: pairs of widths, by method."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import pandas as pd

from experiments.harness.reporting.statistics import corrected, t_interval, t_p_value
from experiments.training_precision.runs import FULL, weights_alone

KINDS = {"added": "loss that serving adds", "loss": "loss as served"}
TENSORS = {"weights": "weights alone", "all": "weights, activations and cache"}


def rows(table: pd.DataFrame) -> list[dict]:
    """Every pair of widths: a model trained in P bits less one trained in 16, both served at P_post < P.

    Once for models whose weights alone have P bits, which is the question: what is served differs in its
    weights alone.  And once for models with P bits in all tensors, whose activations and cache stay so when
    they are served.  Differences are of the loss that serving adds, and of the whole loss as served; paired
    by size, length and seed.  Intervals are Student's t over seeds, each the mean over its sizes and lengths;
    q-values are of all pairs of a kind together.

    Returns:
        rows with method, tensors, kind, P, P_post, mean, low, high, seeds, p_value, q_value.
    """
    is_one = (table["P_w"] == table["P_a"]) & (table["P_a"] == table["P_kv"])
    parts = {"weights": weights_alone(table), "all": table[is_one]}
    found = []
    for tensors, own in parts.items():
        for kind in KINDS:
            pairs = [{"tensors": tensors, "kind": kind} | row for row in _pairs(own, kind)]
            q_values = corrected([row["p_value"] for row in pairs])
            found += [row | {"q_value": q} for row, q in zip(pairs, q_values, strict=True)]
    return found


def _pairs(table: pd.DataFrame, kind: str) -> list[dict]:
    found, pairing = [], ["size", "d_over_n", "seed", "P_post"]
    for method, own in table.groupby("method", sort=False):
        full = own[own["P_w"] == FULL].set_index(pairing)[kind]
        for bits, narrow in own[own["P_w"] < FULL].groupby("P_w"):
            change = narrow.set_index(pairing)[kind].sub(full).dropna()
            for post, values in change.groupby("P_post"):
                if post < bits:
                    pair = {"method": method, "P": int(bits), "P_post": int(post)}
                    found.append(pair | _over_seeds(values))
    return found


def _over_seeds(values: pd.Series) -> dict:
    means = values.groupby("seed").mean().to_numpy()
    mean, low, high = t_interval(means)
    ends = {"mean": mean, "low": low, "high": high, "seeds": len(means)}
    return ends | {"p_value": t_p_value(means)}


def selected(found: list[dict], tensors: str, kind: str) -> list[dict]:
    """The rows of one set of tensors and one kind."""
    return [row for row in found if row["tensors"] == tensors and row["kind"] == kind]


def counts(found: list[dict], level: float = 0.1) -> dict[str, int]:
    """How many pairs are lower, higher or not resolved, by q-values."""
    resolved = [r for r in found if r["q_value"] is not None and r["q_value"] <= level]
    lower = sum(r["mean"] < 0 for r in resolved)
    return {"lower": lower, "higher": len(resolved) - lower, "not": len(found) - len(resolved)}

"""Pairs of arms: gaps to full precision, the order of recipes, what parts earn, what rounding changes."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import itertools

import pandas as pd

from experiments.gradient_precision.arms import FAMILIES, LAST, NVFP4
from experiments.gradient_precision.runs import KIND
from experiments.harness.reporting.statistics import corrected, t_interval, t_p_value

_PLACE = ["size", "d_over_n"]
_PAIRED = [*_PLACE, "seed"]


def over_seeds(values: pd.Series) -> dict:
    """The mean over seeds with Student's t interval and p-value.

    Args:
        values: one of each seed.
    """
    mean, low, high = t_interval(values)
    ends = {"mean": mean, "low": low, "high": high, "seeds": len(values)}
    return ends | {"p_value": t_p_value(values)}


def with_q_values(rows: list[dict]) -> list[dict]:
    """The rows with Benjamini and Hochberg's q-values of them all."""
    q_values = corrected([row["p_value"] for row in rows])
    return [row | {"q_value": q} for row, q in zip(rows, q_values, strict=True)]


def of_arms(table: pd.DataFrame) -> list[dict]:
    """The gap of every arm with its bits, by size and length, and its gradient's error; q-values of all.

    Args:
        table: of `runs.gaps`.
    """
    found = []
    for key, own in table.groupby([*_PLACE, "name", *KIND], sort=False):
        row = dict(zip([*_PLACE, "name", *KIND], key, strict=True))
        row |= {"pair": own["pair"].iloc[0], "peak_lr": float(own["peak_lr"].iloc[0])}
        row |= {x: float(own[x].mean()) for x in ("bias", "variance", "least_bias", "forward")}
        found.append(row | {"loss": float(own["loss"].mean())} | over_seeds(own["gap"]))
    return with_q_values(found)


def recipes(table: pd.DataFrame) -> pd.DataFrame:
    """The runs of published recipes as they are published."""
    return table[~table["method"].isin(FAMILIES) & (table["part"] == "")]


def order(table: pd.DataFrame) -> list[dict]:
    """Every pair of recipes, the better one first: the other's loss less its, paired by seed.

    Args:
        table: of `runs.gaps`.
    """
    found = []
    for place, own in recipes(table).groupby(_PLACE, sort=False):
        losses = own.pivot(index="seed", columns="name", values="loss")
        ranked = losses.mean().sort_values().index
        for first, second in itertools.combinations(ranked, 2):
            change = (losses[second] - losses[first]).dropna()
            if len(change):
                row = dict(zip(_PLACE, place, strict=True)) | {"first": first, "second": second}
                found.append(row | over_seeds(change))
    return with_q_values(found)


def parts(table: pd.DataFrame) -> list[dict]:
    """What each part of NVIDIA's recipe earns: the loss without it less that with it, paired by seed.

    The last layer in full precision is no part of the recipe as it is here, so there it is the loss of the
    recipe less that of the recipe with it.
    """
    own = table[table["method"] == NVFP4]
    whole = own[own["part"] == ""].set_index(_PAIRED)["loss"]
    found = []
    for part, other in own[own["part"] != ""].groupby("part", sort=False):
        change = other.set_index(_PAIRED)["loss"].sub(whole).dropna()
        for place, values in (-change if part == LAST else change).groupby(_PLACE):
            row = dict(zip(_PLACE, place, strict=True)) | {"part": part}
            found.append(row | over_seeds(values))
    return with_q_values(found)


def roundings(table: pd.DataFrame) -> list[dict]:
    """Every pair of ways to round gradients that differ in one thing: rounding alone, or rotation alone.

    Rows are the second one's loss less the first one's, the mean of a seed over lengths.
    """
    own = table[table["method"].isin(FAMILIES)]
    found = []
    for key, group in own.groupby(["size", "method", "block", "pair"], sort=False):
        ways = group.pivot_table(
            index=["d_over_n", "seed"], columns=["rounding", "hadamard"], values="loss"
        )
        for first, second in itertools.combinations(ways.columns, 2):
            if (first[0] == second[0]) == (first[1] == second[1]):
                continue
            change = (ways[second] - ways[first]).dropna()
            if len(change):
                row = dict(zip(("size", "method", "block", "pair"), key, strict=True))
                row |= {"first": _way(*first), "second": _way(*second)}
                found.append(row | over_seeds(change.groupby("seed").mean()))
    return with_q_values(found)


def _way(rounding: str, hadamard: int) -> str:
    """How gradients are rounded, in words.

    >>> _way("nearest", 0)
    'nearest, plain'
    """
    return f"{rounding}, {f'h{hadamard}' if hadamard else 'plain'}"


def additivity(table: pd.DataFrame) -> list[dict]:
    """Whether the gaps of few forward and of few backward bits add up: both at once, less each alone."""
    own = table[table["method"].isin(FAMILIES)]
    found = []
    keys = ["name", "P_forward", "P_backward"]
    by_kind = {key: rows.set_index(_PAIRED)["gap"] for key, rows in own.groupby(keys)}
    most = max((key[1] for key in by_kind), default=0)
    for (name, forward, backward), both in by_kind.items():
        alone = [by_kind.get((name, *bits)) for bits in ((forward, most), (most, backward))]
        if forward == most or backward == most or any(a is None for a in alone):
            continue
        change = (both - alone[0] - alone[1]).dropna()
        if len(change):
            row = {"name": name, "P_forward": forward, "P_backward": backward}
            row |= {"together": float(both.mean())}
            found.append(row | over_seeds(change.groupby("seed").mean()))
    return with_q_values(found)

"""Weights in bfloat16 without a copy in float32, against float32 weights with the same state."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

import pandas as pd

from experiments.harness.reporting.findings import UNRESOLVED, Finding
from experiments.harness.reporting.statistics import corrected, is_discovery, t_interval, t_p_value
from experiments.harness.training.arms import EXACT, STOCHASTIC, weights_of

QUESTION = "Do weights in bfloat16 without a float32 copy train as float32 weights do?"
_GROUP = ["task", "size", "steps", "schedule"]  # runs that differ in arm and seed alone
_ROUNDED = {STOCHASTIC: "rounded stochastically", "bf16-nearest": "rounded to nearest"}
_BYTES = {"": 4, **dict.fromkeys(_ROUNDED, 2)}  # of a weight


def comparisons(table: pd.DataFrame) -> list[dict]:
    """Each arm whose weights are in bfloat16 against the arm of its state with float32 weights.

    Gaps are paired by seed and positive where bfloat16 is worse; q-values correct for all of them.
    """
    found = []
    if table.empty:
        return found
    for key, group in table.groupby(_GROUP, sort=False):
        losses = {arm: rows.set_index("seed")["loss"] for arm, rows in group.groupby("arm")}
        nbytes = {arm: rows["bytes"].mean() for arm, rows in group.groupby("arm")}
        elements = float(group["parameters"].iloc[0])
        exact = losses.get(EXACT, ())
        spread = float(exact.std(ddof=1)) if len(exact) > 1 else None
        for arm, own in losses.items():
            weights, state = weights_of(arm)
            if weights and state in losses:
                place = dict(zip(_GROUP, key, strict=True)) | {"arm": arm, "state": state}
                place |= {"weights": weights, "exact_sd": spread}
                place |= {"bytes": _BYTES[weights] + nbytes[arm] / elements}
                place |= {"bytes_float32": _BYTES[""] + nbytes[state] / elements}
                found.append(place | _gap((own - losses[state]).dropna()))
    for row, q in zip(found, corrected([row["p_value"] for row in found]), strict=True):
        row["q_value"] = q
    return found


def _gap(values: pd.Series) -> dict:
    mean, low, high = t_interval(values.to_numpy())
    found = {"seeds": len(values), "gap": mean, "low": low, "high": high}
    return found | {"p_value": t_p_value(values.to_numpy())}


def findings(rows: list[dict]) -> list[Finding]:
    """Of each arm: whether its whole interval lies within full precision's spread over seeds, or above."""
    return [_finding(row) for row in rows]


def _finding(row: dict) -> Finding:
    quantity = f"{_ROUNDED[row['weights']]}, state {row['state']}, {row['task']} {row['size']}"
    note = (
        f"{row['bytes']:.2f} bytes a parameter of weights and state where float32 weights take "
        f"{row['bytes_float32']:.2f}"
    )
    if row["exact_sd"] is not None:
        note += f"; the spread is {row['exact_sd']:.4f}"
    if row["q_value"] is not None:
        note += f"; q = {row['q_value']:.2g}"
    ends = row["gap"], row["low"], row["high"]
    return Finding(QUESTION, quantity, _answer(row), *ends, note=note, unit="nats", form="+.4f")


def _answer(row: dict) -> str:
    """Whether the mean gap is within the spread, which no single run could tell it from."""
    if row["exact_sd"] is None or row["low"] is None:
        return UNRESOLVED
    if row["high"] <= row["exact_sd"]:
        return "within the spread over seeds"
    if row["low"] > 0 and is_discovery(row["q_value"]):
        return "worse"
    return UNRESOLVED

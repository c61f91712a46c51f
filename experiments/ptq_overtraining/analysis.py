"""What the records say: tables, the exponent with its interval, the summary."""

# pandas' selections and groups, and Altair's layers, are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from experiments.harness.models import lm
from experiments.harness.reporting.statistics import CONFIDENCE, t_half_width, t_test
from experiments.harness.reporting.values import rows_of, versions_of
from experiments.ptq_overtraining.measuring import NEAREST

KUMAR_EXPONENT = 0.5068  # γ_D, arXiv 2411.04330, Table 2
HEADLINE = {"bits": 4, "granularity": "tensor", "scope": "linears", "split": "valid"}
KIND = ["size", "schedule", "granularity", "scope", "split", "bits"]
SETTINGS = ["peak_lr", "solver"]  # told apart where a size and schedule has several
SPLIT_NAMES = {"valid": "like training", "shift": "shifted"}
SCHEDULE_NAMES = {"wsd": "WSD", "cosine": "cosine"}


def added_loss(records: list[dict]) -> pd.DataFrame:
    """One row per run, length, quantization and split: the loss added, in nats per token."""
    rows = []
    for record in records:
        run = {k: record["trial"][k] for k in ("size", "schedule", "seed", "peak_lr")}
        run["solver"] = NEAREST
        for point in record["points"]:
            at = {"d_over_n": point["tokens_per_parameter"], "tokens": point["tokens"]}
            at["epochs"] = point["epochs"]
            rows += [run | at | entry for entry in point["added"]]
    columns = ["seed", "d_over_n", "tokens", "epochs", "mean", "se", *SETTINGS, *KIND]
    return pd.DataFrame(rows, columns=columns).astype({"mean": float, "se": float})


def base_loss(records: list[dict]) -> pd.DataFrame:
    """One row per run, length and split: the unquantized loss, in nats per token."""
    rows = []
    for record in records:
        run = {k: record["trial"][k] for k in ("size", "schedule", "seed", "peak_lr")}
        for point in record["points"]:
            at = {"d_over_n": point["tokens_per_parameter"], "epochs": point["epochs"]}
            rows += [run | at | {"split": split} | value for split, value in point["base"].items()]
    columns = ["size", "schedule", "seed", "peak_lr", "d_over_n", "epochs", "split", "mean", "se"]
    return pd.DataFrame(rows, columns=columns).astype({"mean": float, "se": float})


def varied(table: pd.DataFrame) -> list[str]:
    """Those of `SETTINGS` of which some size and schedule has several: their runs are no seeds."""
    if table.empty:
        return []
    runs = table.groupby(["size", "schedule"])
    return [k for k in SETTINGS if k in table and (runs[k].nunique() > 1).any()]


def best_rates(base: pd.DataFrame) -> dict[tuple[str, str], float]:
    """The learning rate of least loss on held-out text at the longest length, by size and schedule.

    Rates at which fewer seeds reached that length than at others are left out: those diverged, or go on.
    """
    found = {}
    own = select(base, split="valid")
    for key, runs in own.groupby(["size", "schedule"], sort=False):
        longest = select(runs, d_over_n=runs["d_over_n"].max()).groupby("peak_lr")["mean"]
        means = longest.mean()[longest.count() == longest.count().max()]
        found[key] = float(means.idxmin() if means.notna().any() else means.index[0])
    return found


def at_best(table: pd.DataFrame, best: dict[tuple[str, str], float]) -> pd.DataFrame:
    """The rows of `added_loss` or `base_loss` at the best rate of their size and schedule."""
    is_best = [
        best.get((size, schedule)) == rate
        for size, schedule, rate in zip(
            table["size"], table["schedule"], table["peak_lr"], strict=True
        )
    ]
    return table[is_best] if len(table) else table


def main_rows(added: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    """What the report is about: weights rounded to nearest, at the best rate of each size and schedule."""
    return at_best(select(added, solver=NEAREST), best_rates(base))


@dataclasses.dataclass(frozen=True)
class Slope:
    """Least squares on log δ = a_seed + γ log D.

    Attributes:
        gamma: γ.
        spread: the sum of squares of log D about the seeds' means.
        squares: of the residuals, their sum.
        freedom: their degrees of freedom.
    """

    gamma: float
    spread: float
    squares: float
    freedom: int


def slope(table: pd.DataFrame) -> Slope | str:
    """The exponent of `added_loss` rows of one kind, or the reason why there is none."""
    positive = table[table["mean"] > 0]
    broken = int(table["mean"].isna().sum())
    if broken:
        return f"{broken} of {len(table)} points are not finite"
    if len(positive) < len(table):
        return f"{len(table) - len(positive)} of {len(table)} points add no loss"
    if positive["tokens"].nunique() < 2:
        return _TOO_FEW
    log_d, log_loss = np.log(positive["tokens"]), np.log(positive["mean"])
    x = (log_d - log_d.groupby(positive["seed"]).transform("mean")).to_numpy()
    y = (log_loss - log_loss.groupby(positive["seed"]).transform("mean")).to_numpy()
    spread = float(x @ x)
    if not spread:
        return _TOO_FEW
    gamma = float(x @ y / (x @ x))
    squares = float(np.sum((y - gamma * x) ** 2))
    return Slope(gamma, spread, squares, len(positive) - positive["seed"].nunique() - 1)


_TOO_FEW = "too few lengths or seeds"


def fit_exponent(table: pd.DataFrame) -> dict:
    """The exponent γ of δ ∝ D^γ with a 90 % interval.

    Least squares on log δ = a_seed + γ log D: every seed has a level of its own, so that only growth
    within a run counts.  The interval is Student's t on the residuals, which hold the seeds' different
    growth and any departure from a power law alike.

    Args:
        table: `added_loss` rows of one kind: columns seed, tokens, mean.

    Returns:
        gamma, low, high and error (None where they cannot be had, with the reason), the points used,
        and the degrees of freedom.
    """
    positive = table[table["mean"] > 0]
    freedom = len(positive) - positive["seed"].nunique() - 1
    result: dict = dict.fromkeys(("gamma", "low", "high", "error", "reason"))
    result |= {"points": len(positive), "freedom": freedom}
    found = slope(table)
    if isinstance(found, str):
        return result | {"reason": found}
    if freedom < 1:
        return result | {"reason": _TOO_FEW}
    error = math.sqrt(found.squares / freedom / found.spread)
    return result | _with_error(found.gamma, error, freedom)


def pooled_exponents(tables: Iterable[pd.DataFrame]) -> list[dict]:
    """Exponents whose residuals have one variance, so that few seeds or lengths of each suffice together.

    Args:
        tables: of `added_loss` rows, each of one kind.

    Returns:
        As of `fit_exponent`, of each; without interval where no table has a residual's freedom.
    """
    slopes = [slope(table) for table in tables]
    fitted = [s for s in slopes if isinstance(s, Slope)]
    freedom = sum(s.freedom for s in fitted)
    variance = sum(s.squares for s in fitted) / freedom if freedom else None
    found = []
    for one in slopes:
        row: dict = dict.fromkeys(("gamma", "low", "high", "error", "reason"))
        row |= {"freedom": freedom}
        if isinstance(one, str):
            row["reason"] = one
        elif variance is None:
            row |= {"gamma": one.gamma, "reason": _TOO_FEW}
        else:
            row |= _with_error(one.gamma, math.sqrt(variance / one.spread), freedom)
        found.append(row)
    return found


def _with_error(gamma: float, error: float, freedom: int) -> dict:
    half = t_half_width(error, freedom)
    return {"gamma": gamma, "low": gamma - half, "high": gamma + half, "error": error}


def exponents(added: pd.DataFrame) -> pd.DataFrame:
    """`fit_exponent` of every size, schedule, granularity, scope, split, width, and rate of several."""
    keys = [*KIND, *varied(added)]
    rows = [
        dict(zip(keys, kind, strict=True)) | fit_exponent(group)
        for kind, group in added.groupby(keys, sort=False)
    ]
    return pd.DataFrame(rows)


def growth(added: pd.DataFrame) -> pd.DataFrame:
    """The headline question per size and schedule: the mean over seeds at each D/N, and whether it grows.

    ``grows`` is "yes" where the means rise from each length to the next and γ's interval lies above zero,
    "no" where they do not rise, and "unresolved" where they rise but the interval does not settle it, or
    where there are too few lengths or a model broke.
    """
    rows = []
    for (size, schedule), group in select(added, **HEADLINE).groupby(
        ["size", "schedule"], sort=False
    ):
        by_length = group.groupby("d_over_n")["mean"]
        means = by_length.apply(lambda x: x.mean(skipna=False)).sort_index()
        fit = fit_exponent(group)
        rows.append(
            {
                "size": size,
                "schedule": schedule,
                "seeds": int(by_length.count().min()),
                "added": {str(d): float(v) if np.isfinite(v) else None for d, v in means.items()},
                "grows": _grows(means, fit),
                **fit,
            }
        )
    return pd.DataFrame(rows)


def _grows(means: pd.Series, fit: dict) -> str:
    if len(means) < 2 or means.isna().any():
        return "unresolved"
    if not (np.diff(means) > 0).all():
        return "no"
    return "yes" if fit["gamma"] is not None and fit["low"] > 0 else "unresolved"


def schedule_effect(added: pd.DataFrame) -> list[dict]:
    """What the schedule changes, per size: cosine beside WSD at the headline's quantization.

    The added loss of cosine over that of WSD at each D/N (means over seeds), and the difference of their
    exponents, γ_cosine − γ_WSD, with an interval by Welch's approximation.
    """
    rows, table = [], select(added, **HEADLINE)
    for size, group in table.groupby("size", sort=False):
        runs = [select(group, schedule=schedule) for schedule in ("cosine", "wsd")]
        if any(run.empty for run in runs):
            continue
        means = [run.groupby("d_over_n")["mean"].mean() for run in runs]
        ratios = (means[0] / means[1])[(means[0] > 0) & (means[1] > 0)]
        row = {"size": size, "ratio": {str(d): float(r) for d, r in ratios.items()}}
        rows.append(row | _difference(*(fit_exponent(run) for run in runs)))
    return rows


def _difference(one: dict, other: dict) -> dict:
    """one − other of two fitted exponents, with Welch's interval."""
    if one["gamma"] is None or other["gamma"] is None:
        reason = one["reason"] or other["reason"]
        return dict.fromkeys(("gamma", "low", "high", "p_value")) | {"reason": reason}
    squares = [fit["error"] ** 2 for fit in (one, other)]
    parts = [s**2 / fit["freedom"] for s, fit in zip(squares, (one, other), strict=True)]
    freedom = sum(squares) ** 2 / sum(parts) if sum(parts) else float(one["freedom"])
    error, gamma = math.sqrt(sum(squares)), one["gamma"] - other["gamma"]
    half, p_value = t_half_width(error, freedom), t_test(gamma, error, freedom)
    ends = {"gamma": gamma, "low": gamma - half, "high": gamma + half}
    return ends | {"p_value": p_value, "reason": None}


def select(table: pd.DataFrame, **values) -> pd.DataFrame:
    for column, value in values.items():
        table = table[table[column] == value]
    return table


def summarize(records: list[dict], expected: int) -> dict:
    """What ``summary.json`` holds; the headline is of the best learning rates, where there are several."""
    added, base = added_loss(records), base_loss(records)
    main, by = main_rows(added, base), varied(added)
    rates = ["peak_lr"] if varied(pd.DataFrame([r["trial"] for r in records])) else []
    named = ["size", "schedule", *rates, "seed"]
    diverged = [
        {"id": r["id"], **{k: r["trial"][k] for k in named}, "step": r["step"]}
        for r in records
        if r["status"] == "diverged"
    ]
    of_base = ["size", "schedule", "split", "d_over_n", "epochs", *varied(base)]
    return {
        "study": "ptq_overtraining",
        "trials": {"finished": len(records), "expected": expected, "diverged": diverged},
        "headline": {
            "question": "Does the loss added by 4-bit per-tensor weights grow with D/N?",
            "kumar_2024_gamma_D": KUMAR_EXPONENT,
            "confidence": CONFIDENCE,
            "rows": rows_of(growth(main)),
            "cosine_minus_wsd": schedule_effect(main),
        },
        "exponents": rows_of(exponents(added)),
        "added_loss": rows_of(over_seeds(added, [*KIND, "d_over_n", "tokens", *by])),
        "base_loss": rows_of(over_seeds(base, of_base)),
        "parameters": {s: lm.SIZES[s].non_embedding_parameters for s in sorted(set(base["size"]))},
        "versions": versions_of(records),
    }


def over_seeds(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    grouped = table.groupby(keys, sort=False)["mean"]
    return grouped.agg(mean="mean", sd="std", seeds="count").reset_index()

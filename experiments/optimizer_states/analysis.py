"""What the records say: gaps to full precision, paired by seed, and what of them the question turns on."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from typing import Any

import numpy as np
import pandas as pd

from experiments.harness.reporting.statistics import t_interval
from experiments.harness.reporting.values import versions_of
from experiments.harness.training.arms import EXACT, budget_of
from experiments.optimizer_states import law, weights
from experiments.optimizer_states.contest import contests
from experiments.optimizer_states.tasks import LANGUAGE_SIZES

PRIMARY = {"language": "loss valid", "vision": "loss test"}
_KEYS = ["task", "schedule", "arm"]
GROUP = ["task", "size", "steps", "schedule"]  # runs that differ in arm and seed alone


def runs(records: list[dict]) -> pd.DataFrame:
    """A row for each finished run that is not tuning."""
    rows = [
        {k: r["trial"][k] for k in (*_KEYS, "seed", "size", "steps")}
        | {"loss": r["measures"][PRIMARY[r["trial"]["task"]]]}
        | _scale(r["trial"])
        | {f"measure {k}": v for k, v in r["measures"].items()}
        | {"bytes": r["state_bytes"], "parameters": r["parameters"]}
        for r in records
        if r["status"] == "done" and not r["trial"]["is_tuning"]
    ]
    return pd.DataFrame(rows)


def _scale(trial: dict) -> dict[str, Any]:
    """N and D of a language run, and what shares initial weights and data; nothing of other tasks."""
    if trial["task"] != "language":
        return {}
    n = LANGUAGE_SIZES[trial["size"]].non_embedding_parameters
    tokens = trial["steps"] * trial["batch"] * trial["sequence"]
    return {"N": n, "D": tokens, "pair": f"{trial['size']} {trial['seed']}"}


def gaps(table: pd.DataFrame) -> list[dict]:
    """Each arm against full precision: paired loss gap, its SD and interval, beside full precision's SD."""
    if table.empty:
        return []
    found = []
    for key, group in table.groupby(GROUP, sort=False):
        exact = group[group["arm"] == EXACT].set_index("seed")
        spread = _sd(exact["loss"].to_numpy())
        for arm, rows in group.groupby("arm", sort=False):
            rows = rows.set_index("seed")
            shared = [seed for seed in rows.index if seed in exact.index]
            if not shared:
                continue
            difference = (rows["loss"][shared] - exact["loss"][shared]).to_numpy()
            nbytes = float(rows["bytes"].mean())
            whole = float(exact["bytes"].mean())
            found.append(
                dict(zip(GROUP, key, strict=True))
                | {"arm": arm, "seeds": len(shared)}
                | {"loss": float(rows["loss"].mean()), "exact_sd": spread}
                | _interval(difference)
                | {"bytes": nbytes, "share": nbytes / whole, "bits": 32 * nbytes / whole}
            )
    return found


def _sd(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _interval(values: np.ndarray) -> dict[str, float | None]:
    """Mean, SD over seeds, and Student's t interval of the mean."""
    mean, low, high = t_interval(values)
    return {"gap": mean, "sd": _sd(values), "low": low, "high": high}


def tuning(records: list[dict]) -> pd.DataFrame:
    """Full precision at the chosen learning rate and at its neighbours, seed 0."""
    rows = [
        {
            "task": r["trial"]["task"],
            "size": r["trial"]["size"],
            "steps": r["trial"]["steps"],
            "schedule": r["trial"]["schedule"],
            "learning rate": r["trial"]["peak_lr"],
            "loss": r["measures"][PRIMARY[r["trial"]["task"]]] if r["status"] == "done" else None,
            "used": "" if r["trial"]["is_tuning"] else "used",
        }
        for r in records
        if r["trial"]["arm"] == EXACT and r["trial"]["seed"] == 0
    ]
    table = pd.DataFrame(rows)
    return table if table.empty else table.sort_values([*GROUP, "learning rate"])


def widths(records: list[dict]) -> pd.DataFrame:
    """Bits of each leaf over time, means over seeds, of arms with a budget."""
    rows = [
        {k: r["trial"][k] for k in (*_KEYS, "seed", "size", "steps")}
        | {"step": snapshot["step"], "leaf": f"{leaf['slot']}/{leaf['path']}", "bits": leaf["bits"]}
        | {"role": leaf["role"], "slot": leaf["slot"], "elements": leaf["elements"]}
        for r in records
        if r["status"] == "done" and budget_of(r["trial"]["arm"])
        for snapshot in r["snapshots"]
        for leaf in snapshot["leaves"]
    ]
    return pd.DataFrame(rows)


def summarize(records: list[dict], expected: int) -> dict[str, Any]:
    """What ``summary.json`` holds."""
    table = runs(records)
    rows = gaps(table)
    return {
        "study": "optimizer_states",
        "trials": {
            "finished": len(records),
            "expected": expected,
            "diverged": [
                {k: r["trial"][k] for k in (*_KEYS, "seed")} | {"step": r["step"]}
                for r in records
                if r["status"] == "diverged"
            ],
        },
        "gaps": rows,
        "contests": contests(table),
        "weights": weights.comparisons(table),
        "law": law.summarize(table),
        "versions": versions_of(records),
    }

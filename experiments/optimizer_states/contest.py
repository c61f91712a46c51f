"""Contests at equal budgets: adaptive widths against even ones, and against the best static split.

A split is static: momentum has some bits more than the second moment, or embedding and head more than the
matrices.  The best one of a budget is chosen for each seed by the losses of the other seeds, so that it is
never chosen by what it is compared with.
"""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from experiments.harness.reporting import findings as said
from experiments.harness.reporting.findings import Finding
from experiments.harness.reporting.statistics import corrected, is_discovery, t_interval, t_p_value
from experiments.harness.training.arms import HINDSIGHT, STATIC, budget_of

EVEN, BEST = "even", "the best static split"
QUESTIONS = {
    EVEN: "Do adaptive widths beat an even allocation of the same budget?",
    BEST: "Do adaptive widths beat the best static split of the same budget?",
}
CEILING = "Does any allocation beat an even one of the same budget?"
_GROUP = ["task", "size", "steps", "schedule"]  # runs that differ in arm and seed alone
Losses = Mapping[str, pd.Series]  # by kind of arm, the loss of each seed


def contests(table: pd.DataFrame) -> list[dict]:
    """Each arm with a budget against the even one of that budget, and adaptive ones against the best split.

    Gains are paired by seed and positive where the arm is better; q-values correct for all contests.
    """
    found = [row for own in _budgets(table) for row in _of_budget(*own)]
    for row, q in zip(found, corrected([row["p_value"] for row in found]), strict=True):
        row["q_value"] = q
    return found


def _budgets(table: pd.DataFrame) -> Iterator[tuple[dict, float, Losses]]:
    """(what is trained, budget, losses) of each budget."""
    if table.empty:
        return
    for key, group in table.groupby(_GROUP, sort=False):
        by_budget: dict[tuple[float, str], dict[str, pd.Series]] = {}
        for arm, rows in group.groupby("arm", sort=False):
            if found := budget_of(str(arm)):
                scale, kind = scale_of(found[0])
                losses = by_budget.setdefault((found[1], scale), {})
                losses[kind] = rows.set_index("seed")["loss"]
        for (budget, scale), losses in by_budget.items():
            yield dict(zip(_GROUP, key, strict=True)) | {"scale": scale}, budget, losses


def scale_of(kind: str) -> tuple[str, str]:
    """What shares a scale in a simulated arm, "" for a real one, and how bits are allocated.

    >>> scale_of("row:felt"), scale_of("felt")
    (('row', 'felt'), ('', 'felt'))
    """
    scale, _, allocation = kind.rpartition(":")
    return scale, allocation


def _of_budget(place: dict, budget: float, losses: Losses) -> Iterator[dict]:
    prefix = f"{place['scale']}:" if place["scale"] else ""
    for kind, own in losses.items():
        if kind == EVEN:
            continue
        others = {EVEN: losses.get(EVEN)}
        if kind not in STATIC:
            others[BEST] = best_split(losses)
        for name, other in others.items():
            if other is None:
                continue
            shared = [seed for seed in own.index if seed in other.index]
            if shared:
                row = place | {"arm": f"{prefix}{kind}-{budget}", "kind": kind, "budget": budget}
                yield row | {"against": name} | _gain((other[shared] - own[shared]).to_numpy())


def _gain(values: np.ndarray) -> dict:
    mean, low, high = t_interval(values)
    return {"seeds": len(values), "gap": mean, "low": low, "high": high} | {
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
        "p_value": t_p_value(values),
    }


def best_split(losses: Losses) -> pd.Series | None:
    """For each seed, the loss of the static arm that is best on the other seeds; None without seeds.

    >>> losses = {"even": pd.Series([2.0, 2.0, 1.0]), "split1": pd.Series([1.0, 1.0, 9.0])}
    >>> best_split(losses).tolist()
    [2.0, 2.0, 9.0]
    """
    table = pd.DataFrame({kind: own for kind, own in losses.items() if kind in STATIC}).dropna()
    if len(table) < 2 or table.empty:
        return None
    chosen = {seed: table.drop(index=seed).mean().idxmin() for seed in table.index}
    return pd.Series({seed: float(table.loc[seed, kind]) for seed, kind in chosen.items()})


def findings(rows: list[dict]) -> list[Finding]:
    """Adaptive arms against either, then the best of all allocations against the even one."""
    found = []
    for against, question in QUESTIONS.items():
        own = [r for r in rows if r["against"] == against and r["kind"] not in (*STATIC, HINDSIGHT)]
        found += [_finding(question, row) for row in own]
    return [*found, *_ceilings(rows)]


def _finding(question: str, row: dict) -> Finding:
    """An answer that stands only where it survives the correction for all contests."""
    note = "" if row["q_value"] is None else f"q = {row['q_value']:.2g}"
    quantity = f"{row['arm']} on {row['task']} {row['size']}, {row['schedule']}"
    quantity += f", {row['steps']} steps"
    finding = said.from_mean(
        question, quantity, row, "better", "worse", unit="nats", form="+.4f", note=note
    )
    if finding.answer != said.UNRESOLVED and not is_discovery(row["q_value"]):
        note = f"{note}, which does not survive the correction for all contests"
        return Finding(**{**finding.__dict__, "answer": said.UNRESOLVED, "note": note.lstrip(", ")})
    return finding


def _ceilings(rows: list[dict]) -> list[Finding]:
    """Of each budget, the allocation with the largest gain over the even one."""
    best: dict[tuple, dict] = {}
    for row in rows:
        key = (*(row[k] for k in _GROUP), row["scale"], row["budget"])
        if row["against"] == EVEN and row["gap"] > best.get(key, {"gap": -np.inf})["gap"]:
            best[key] = row
    return [_finding(CEILING, row) for row in best.values()]

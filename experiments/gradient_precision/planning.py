"""Plans of forward and backward bits, by the laws that a grid's runs do not reject."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false

import dataclasses
import math
from typing import Any

import pandas as pd

from experiments.gradient_precision import forms, law
from experiments.gradient_precision.arms import FAMILIES, FULL_BITS
from experiments.gradient_precision.runs import at_best_rate, kept, runs
from experiments.harness.reporting.law_tables import ranking
from jaxquant import laws

RANKED = "Laws fitted to these runs, by AICc of the independent ones"
BESIDE = "What other choices cost"


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Laws fitted to the runs of a grid.

    Attributes:
        ranked: all of them, without intervals.
        fits: those that the runs do not reject, the likeliest first, with intervals.
        grid: its name.
        others: the study's other grids.
        widths: (of the forward products, of the backward products) that were trained.
    """

    ranked: laws.Comparison
    fits: tuple[laws.Fit, ...]
    grid: str
    others: tuple[str, ...]
    widths: tuple[list[int], list[int]]


def of_study(records: list[dict], name: str | None = None) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Returns (a grid's runs, each at its best learning rate; names of all grids).

    Args:
        records: of the study.
        name: of a grid that has several forward and several backward widths; the first where not given.

    Raises:
        ValueError: no such grid.
    """
    best = at_best_rate(kept(runs(records)))
    grids = best[best["method"].isin(FAMILIES)].groupby("name", sort=False)
    names = tuple(str(n) for n, own in grids if all(own[c].nunique() > 1 for c in forms.COLUMNS))
    if not names:
        raise ValueError(
            "the study has no grid of several forward and several backward widths, which a plan of both needs"
        )
    if name is not None and name not in names:
        raise ValueError(f"--method is one of {'; '.join(names)}; got {name!r}")
    return law.whole(best, name or names[0]), names


def choose(table: pd.DataFrame, names: tuple[str, ...]) -> Chosen:
    """Ranks the laws of the whole loss, and fits with intervals those that the runs do not reject.

    Raises:
        ValueError: runs that no law can be fitted to, or too few to tell laws apart.
    """
    widths = law.widths(table)
    candidates = (forms.GROWING, *forms.COSTS, forms.quartet(*widths, FULL_BITS))
    ranked = laws.compare(candidates, table, groups="unit", held_out=(), starts=law.STARTS)
    fits = tuple(law.fit(fitted.law, table) for fitted in ranked.not_rejected())
    grid = str(_of_grid(table)["name"].iloc[0])
    return Chosen(ranked, fits, grid, tuple(n for n in names if n != grid), widths)


def family(table: pd.DataFrame) -> str:
    """What a grid's bits are of: "int" or "float"."""
    return str(_of_grid(table)["method"].iloc[0])


def _of_grid(table: pd.DataFrame) -> pd.DataFrame:
    """The runs less those in full precision that stand for the widest pair."""
    return table[table["method"].isin(FAMILIES)]


def plan(chosen: Chosen, asked: dict[str, Any]) -> laws.PassPlan:
    """Returns the plan by the likeliest law, with intervals over all that are kept.

    Args:
        chosen: laws.
        asked: of `laws.plan_passes`; its bits are those that were trained where not given.

    Raises:
        ValueError: as `laws.plan_passes`.
    """
    bits = dict(zip(("forward", "backward"), chosen.widths, strict=True))
    given = {k: v for k, v in asked.items() if v is not None}
    return laws.plan_passes(chosen.fits, **{"flops": None} | bits | given)


def ranks(chosen: Chosen) -> pd.DataFrame:
    """The laws by their criterion."""
    return ranking(chosen.ranked, {f.law.name for f in chosen.fits})


def beside(found: laws.PassPlan) -> pd.DataFrame:
    """The best run beside those that choose fewer things: one width, or a backward pass in full precision."""
    choices = (
        ("the plan", lambda r: True),
        ("one width for both", lambda r: r.forward == r.backward),
        (f"backward in {FULL_BITS} bits", lambda r: r.backward == FULL_BITS),
        (f"both in {FULL_BITS} bits", lambda r: r.forward == r.backward == FULL_BITS),
    )
    rows = []
    for name, has in choices:
        row = next((r for r in found.rows if has(r)), None)
        if row is not None:
            rows.append(
                {"choice": name, "bits": row.pair, "N": f"{row.N:.3g}", "D": f"{row.D:.3g}"}
                | {"loss": f"{row.loss:.4f}", "excess": _excess(row, found.best)}
            )
    return pd.DataFrame(rows)


def _excess(row: laws.PassRow, best: laws.PassRow) -> str:
    if row is best:
        return "—"
    if math.isnan(row.excess_low):
        return f"{row.excess:+.4f}"
    return f"{row.excess:+.4f} [{row.excess_low:+.4f}, {row.excess_high:+.4f}]"


def notes(chosen: Chosen) -> tuple[str, ...]:
    """What to know of how the law was chosen, a sentence each."""
    names = " and ".join(f.law.name for f in chosen.fits)
    said = [f"laws that these runs do not reject, over which intervals are the union: {names}"]
    if len(chosen.fits) == 1:
        said = [
            f"{names} is the one law that these runs do not reject: intervals are over bootstraps"
        ]
    if chosen.others:
        said.append(f"the study has other grids, which --method takes: {'; '.join(chosen.others)}")
    return tuple(said)

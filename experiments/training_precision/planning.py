"""Plans by the law that a study's runs do not reject, beside plans by Kumar et al.'s law."""

# pandas' selections are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import dataclasses
import math
from typing import Any

import pandas as pd

from experiments.harness.reporting.law_tables import ranking
from experiments.training_precision.one_width import BOOTSTRAPS, GROWING, NOT_REJECTED, OF_N
from experiments.training_precision.runs import (
    FULL,
    METHOD_NAMES,
    at_best_rate,
    runs,
    served,
    tied,
)
from jaxquant import laws

LAWS = (
    *GROWING,
    *OF_N,
)  # a penalty that grows, and bits that cost parameters: each by two functions
STARTS = 64  # with fewer, N_eff stays in a worse valley on our runs
RANKED = "Laws fitted to these runs, by AICc of the independent ones"
BESIDE = "What it changes"


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Laws fitted to the same runs.

    Attributes:
        ranked: all of them.
        fits: those that the runs do not reject, the likeliest first.
        kumar: N_eff, fitted to the same runs.
        resampled: what the intervals are over.
    """

    ranked: laws.Comparison
    fits: tuple[laws.Fit, ...]
    kumar: laws.Fit
    resampled: str


def of_study(records: list[dict], method: str) -> pd.DataFrame:
    """A method's runs of one width, each at its best learning rate.

    Raises:
        ValueError: no such runs.
    """
    table = at_best_rate(runs(records))
    found = tied(table, method)
    if found.empty:
        known = [name for name in METHOD_NAMES if not tied(table, name).empty]
        raise ValueError(
            f"the study has no runs of {method} with one width for all tensors; it has them of "
            f"{', '.join(known) or 'no method'}"
        )
    return found


def choose(table: pd.DataFrame) -> Chosen:
    """Fits `LAWS` to runs of one width, whose units are a size and a seed, resampled within sizes.

    Args:
        table: of `of_study`.

    Raises:
        ValueError: runs that no law can be fitted to, or too few to tell laws apart.
    """
    options, text = _units(table)
    ranked = laws.compare(LAWS, table, held_out=(), starts=STARTS, bootstraps=BOOTSTRAPS, **options)
    kumar = next(f for f in ranked.fits if f.law is laws.KUMAR_ONE)
    return Chosen(ranked, ranked.not_rejected(NOT_REJECTED), kumar, text)


def _units(table: pd.DataFrame) -> tuple[dict[str, Any], str]:
    """Returns (how runs are resampled, that in words)."""
    units = f"{table['unit'].nunique()} units of a size and a seed"
    if int(table.groupby("size")["seed"].nunique().min()) > 1:
        return {"groups": "unit", "strata": "size"}, f"{units}, resampled within sizes"
    return {"groups": "unit"}, f"{units}, resampled over all, since a size has one seed"


def added(records: list[dict], method: str) -> laws.Fit | None:
    """What serving adds to models trained at 16 bits; None where no law fits."""
    table = tied(at_best_rate(served(records), "trained"), method)
    own = table[(table["P_w"] == FULL) & (table["added"] > 0)]
    if own.empty:
        return None
    options, _ = _units(own)
    try:
        return laws.fit(laws.KUMAR_PTQ, own, starts=STARTS, bootstraps=BOOTSTRAPS, **options)
    except ValueError:
        return None


def notes(chosen: Chosen) -> tuple[str, ...]:
    """What to know of how the law was chosen, a sentence each."""
    most = max(len(law.parameters) for law in LAWS)
    independent = chosen.ranked.independent
    if independent >= 2 * most:
        return (union_text(chosen),)
    return (
        union_text(chosen),
        f"these runs are worth {independent:.0f} independent ones, few for laws of {most} parameters: a law "
        "that is rejected may have too many, and need not be wrong",
    )


def union_text(chosen: Chosen) -> str:
    """What the intervals are the union of."""
    names = " and ".join(f.law.name for f in chosen.fits)
    if len(chosen.fits) == 1:
        return (
            f"{names} is the one law that these runs do not reject: intervals are over bootstraps"
        )
    return (
        f"intervals are the union, over bootstraps and over the laws within {NOT_REJECTED:g} of the least "
        f"criterion, which these runs do not reject: {names}"
    )


def ranks(chosen: Chosen) -> pd.DataFrame:
    """The laws by their criterion."""
    return ranking(chosen.ranked, {f.law.name for f in chosen.fits})


def plan(
    chosen: Chosen, ptq: laws.Fit | None, asked: dict[str, Any]
) -> tuple[laws.Plan, pd.DataFrame]:
    """Returns the plan by the likeliest law, with intervals over all that are kept, and what it changes.

    Args:
        chosen: laws.
        ptq: what serving adds.
        asked: of `laws.plan`.

    Raises:
        ValueError: as `laws.plan`.
    """
    plans = [laws.plan(fit, ptq=ptq, **asked) for fit in chosen.fits]
    first = plans[0]
    rows = tuple(_united(row, chosen.fits[1:], ptq, asked) for row in first.rows)
    optima = [found.optimum for found in plans if found.optimum is not None]
    united = dataclasses.replace(
        first,
        rows=rows,
        best=rows[first.rows.index(first.best)],
        optimum=laws.union(optima) if optima else None,
    )
    return united, _beside(chosen, plans, ptq, asked)


def _united(row: laws.Row, others: tuple[laws.Fit, ...], ptq: Any, asked: dict) -> laws.Row:
    """Returns a row whose interval takes in those of other laws for the same run."""
    ends = [(row.low, row.high)]
    for fit in others:
        try:
            other = _same_run(fit, row, ptq, asked)
            ends.append((other.low, other.high))
        except ValueError:  # a law that says nothing of this precision
            ends.append((math.nan, math.nan))
    if any(math.isnan(end) for pair in ends for end in pair):
        return dataclasses.replace(row, low=math.nan, high=math.nan)
    return dataclasses.replace(row, low=min(a for a, _ in ends), high=max(b for _, b in ends))


def _same_run(law: laws.Fit, row: laws.Row, ptq: Any, asked: dict) -> laws.Row:
    """Returns what a law says of a run that another has planned."""
    run = {"flops": None, "N": row.N, "D": row.D, "precisions": [row.bits]}
    return laws.plan(law, ptq=ptq, **asked | run).best


def _beside(chosen: Chosen, plans: list[laws.Plan], ptq: Any, asked: dict) -> pd.DataFrame:
    """Returns each law's plan, and what its run costs by the likeliest law."""
    sources = [(f.law.name, f, ptq) for f in chosen.fits]
    if chosen.kumar not in chosen.fits:
        sources.append((f"{chosen.kumar.law.name}, fitted to these runs", chosen.kumar, ptq))
    sources.append(("Kumar et al. 2024, as published", laws.KUMAR_2024, laws.KUMAR_2024_PTQ))
    rows = []
    for i, (name, law, own) in enumerate(sources):
        try:
            found = plans[i] if i < len(plans) else laws.plan(law, ptq=own, **asked)
            cost = _same_run(chosen.fits[0], found.best, ptq, asked).loss - plans[0].best.loss
        except ValueError as error:
            rows.append({"plan by": name, "P": f"none: {error}"} | dict.fromkeys(_COLUMNS, "—"))
            continue
        unseen = " ".join(found.best.outside) or "—"
        numbers = found.best.N, found.best.D, found.best.D / found.best.N
        cells = (*(f"{x:.3g}" for x in numbers), unseen, f"{cost:+.4f}", _short(found.optimum))
        rows.append(
            {"plan by": name, "P": f"{found.best.bits:g}"} | dict(zip(_COLUMNS, cells, strict=True))
        )
    return pd.DataFrame(rows)


_COLUMNS = ("N", "D", "D/N", "not seen", "loss added by the likeliest law", "P*")


def _short(optimum: laws.Optimum | None) -> str:
    if optimum is None:
        return "—"
    return str(optimum) if optimum.is_determined else "not determined"

"""Sizes and intervals of runs whose passes have bits of their own; `passes` makes plans of them."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxquant.laws.budgets import least_losses
from jaxquant.laws.law import Law, x64
from jaxquant.laws.optimum import (
    FULL_BITS,
    MAC_FLOPS,
    Optimum,
    optimum_of,
    parts,
    resolve_confidence,
    step_cost,
)
from jaxquant.laws.sizes import least_size
from jaxquant.stats import percentile_interval

COLUMNS = ("P_forward", "P_backward")
_WIDER, _SIZES = 1e3, 121  # of the plan's sizes, where bootstraps seek their own; so many of them

Pair = tuple[float, float]  # bits forward and backward
Run = dict[str, float]  # a law's columns, with the cost of a step and the loss
Ends = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Budget:
    """The given quantities of a run, and c(P) of a product."""

    flops: float
    N: float | None
    D: float | None
    cost: Callable[[Any], Any]

    def tokens(self, forward: float, backward: float) -> float:
        """Returns N · D that the budget trains in so many bits."""
        return self.flops / (MAC_FLOPS * float(step_cost(forward, backward, self.cost)))


def run_of(law: Any, budget: Budget, pair: Pair) -> Run:
    """Returns the run of the least loss in so many bits: its columns, cost and loss."""
    form, numbers, _ = parts(law, None)
    n, d = _sized(form, numbers, budget, pair)
    found = _columns(pair, n, d)
    loss = float(form.evaluate(numbers, found)[0])
    cost = float(step_cost(*pair, budget.cost))
    return {k: float(v[0]) for k, v in found.items()} | {"cost": cost, "loss": loss}


def _columns(pair: Pair, n: Any, d: Any) -> dict[str, np.ndarray]:
    n = np.atleast_1d(np.asarray(n, float))
    bits = {c: np.full_like(n, b) for c, b in zip(COLUMNS, pair, strict=True)}
    return {"N": n, "D": np.broadcast_to(np.asarray(d, float), n.shape)} | bits


def _sized(form: Law, p: Any, budget: Budget, pair: Pair) -> tuple[float, float]:
    """Returns (N, D) of the least loss in so many bits."""
    both = budget.tokens(*pair)
    if budget.N is not None:
        return float(budget.N), both / budget.N
    if budget.D is not None:
        return both / budget.D, float(budget.D)
    ratio = p["alpha"] * p["A"] / (p["beta"] * p["B"]) * both ** p["beta"]  # as in full precision
    near = float(ratio ** (1 / (p["alpha"] + p["beta"])))
    n = least_size(lambda x: form.evaluate(p, _columns(pair, x, both / x)), near)
    return n, both / n


def intervals(law: Any, runs: list[Run]) -> tuple[Ends, Ends]:
    """Returns (intervals of the losses, and of their excesses over the first run's) by one law."""
    form, numbers, samples = parts(law, None)
    columns = {c: np.array([run[c] for run in runs]) for c in form.columns}
    is_covered = covered(form, columns)
    unknown = (math.nan, math.nan)
    if not samples:
        return [unknown] * len(runs), [unknown] * len(runs)
    with x64():
        each = {k: np.asarray(v, float)[:, None] for k, v in samples.items()}
        drawn = np.exp(np.asarray(form.log_prediction(each, columns)))
    own, asked = form.evaluate(numbers, columns), resolve_confidence(law, None)
    losses: Ends = []
    excesses: Ends = []
    for i, is_own in enumerate(is_covered):
        difference = drawn[:, i] - drawn[:, 0], own[i] - own[0]
        is_both = is_own and is_covered[0]
        losses.append(_interval(drawn[:, i], own[i], asked) if is_own else unknown)
        excesses.append(_interval(*difference, asked) if is_both else unknown)
    return losses, excesses


def _interval(draws: np.ndarray, value: Any, asked: float) -> tuple[float, float]:
    """Returns the percentile interval, drawn out to the estimate."""
    low, high = percentile_interval(draws, asked)
    return float(np.minimum(low, value)), float(np.maximum(high, value))


def covered(form: Law, columns: dict[str, np.ndarray]) -> np.ndarray:
    """Returns which runs have bits that a law knows."""
    found = np.ones(len(columns["N"]), bool)
    for column, own in zip(COLUMNS, form.pass_widths or (), strict=False):
        found &= np.isin(columns[column], (*own, FULL_BITS))
    return found


def united(ends: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Returns the union of intervals; NaN where one of them is."""
    low, high = np.array([*ends]).T
    return float(low.min()), float(high.max())


def optima(
    law: Any, budget: Budget, runs: list[Run], first: Pair | None = None
) -> tuple[Optimum, Optimum]:
    """Returns P_f* and P_b* by one law, each bootstrap with sizes of its own.

    Args:
        law: a fit or published constants.
        budget: what is given.
        runs: of a plan, whose pairs of bits are looked at.
        first: the estimate; the law's own where not given.
    """
    form, numbers, samples = parts(law, None)
    pairs = [(run["P_forward"], run["P_backward"]) for run in runs]
    columns = _grid(budget, pairs, [run["N"] for run in runs])
    kept = covered(form, {c: v[:, 0] for c, v in columns.items()})

    def best(p: Any) -> Pair:
        losses = least_losses(form, p, columns)
        return pairs[int(np.argmin(np.where(kept, losses, np.inf)))]

    first = best(numbers) if first is None else first
    drawn = np.array([best(p) for p in _each(samples)]).reshape(-1, 2)
    asked = resolve_confidence(law, None)
    found = [
        optimum_of(first[i], drawn[:, i], np.unique([pair[i] for pair in pairs]), asked)
        for i in range(2)
    ]
    return found[0], found[1]


def _grid(budget: Budget, pairs: list[Pair], near: list[float]) -> dict[str, np.ndarray]:
    """Returns columns [pairs, sizes] of all runs that a budget allows."""
    both = np.array([budget.tokens(*pair) for pair in pairs])[:, None]  # N · D
    if budget.D is not None:
        n = both / budget.D
    elif budget.N is not None:
        n = np.full_like(both, budget.N)
    else:
        sizes = np.geomspace(min(near) / _WIDER, max(near) * _WIDER, _SIZES)
        n = np.broadcast_to(sizes, (len(pairs), _SIZES))
    bits = np.broadcast_to(np.array(pairs, float).T[:, :, None], (2, *n.shape))
    return {"N": n, "D": both / n} | dict(zip(COLUMNS, bits, strict=True))


def _each(samples: Mapping[str, np.ndarray]) -> list[dict[str, float]]:
    """Returns the parameters of each bootstrap."""
    rows = zip(*samples.values(), strict=True)
    return [dict(zip(samples, map(float, row), strict=True)) for row in rows]


def sizes_of(law: Any, budget: Budget, run: Run) -> Ends:
    """Returns intervals of N and D in a run's bits, each bootstrap having its own least loss."""
    form, _, samples = parts(law, None)
    pair = run["P_forward"], run["P_backward"]
    is_covered = covered(form, _columns(pair, run["N"], run["D"]))[0]
    sized = [_sized(form, p, budget, pair) for p in _each(samples)] if is_covered else []
    found, asked = np.array(sized).reshape(-1, 2), resolve_confidence(law, None)
    return [_interval(found[:, i], run[name], asked) for i, name in enumerate(("N", "D"))]

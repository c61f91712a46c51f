"""Plan a run whose passes have bits of their own: P_forward, P_backward, size and tokens for a budget.

A step multiplies as much in each of three products, one forward and two backward, so that it costs
c = (c(P_f) + 2 c(P_b)) / 3 beside one in 16 bits, and C = 6 N D c.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxquant.checks import check_positive
from jaxquant.laws.budgets import union
from jaxquant.laws.constants import Published
from jaxquant.laws.fitting import Fit
from jaxquant.laws.law import Law
from jaxquant.laws.optimum import FULL_BITS, Optimum, bits_linear, check_cost, parts
from jaxquant.laws.pass_sizes import (
    COLUMNS,
    Budget,
    Pair,
    Run,
    intervals,
    optima,
    run_of,
    sizes_of,
    united,
)
from jaxquant.laws.planning import PRECISIONS, check_precisions

_MOST_LOSS = 1e6  # nats: beyond, a law has no value
_SHOWN = 10  # rows that are printed at least


@dataclasses.dataclass(frozen=True)
class PassRow:
    """A run that could be trained, with bits of each pass.

    Attributes:
        forward, backward: P_f and P_b of training.
        cost: of a step, beside one in 16 bits.
        N, D: parameters without embeddings; tokens.
        loss: nats per token.
        low, high: the loss's interval over bootstraps; NaN without, or where a law does not know these bits.
        excess: nats above the best run.
        excess_low, excess_high: its interval over the same bootstraps of both runs; likewise.
        outside: columns in which it leaves what a law was fitted over.
    """

    forward: float
    backward: float
    cost: float
    N: float
    D: float
    loss: float
    low: float
    high: float
    excess: float
    excess_low: float
    excess_high: float
    outside: tuple[str, ...] = ()

    @property
    def is_apart(self) -> bool:
        """Whether the runs tell it apart from the best: the whole interval of its excess is above 0."""
        return self.excess_low > 0

    @property
    def pair(self) -> str:
        """Its bits, as 4/8."""
        return f"{self.forward:g}/{self.backward:g}"


@dataclasses.dataclass(frozen=True)
class PassPlan:
    """Runs by bits of both passes, the best of them, and what is not known.

    Attributes:
        rows: by loss, the least first.
        best: the first.
        alike: others that the runs do not tell apart from it; none where there are no intervals.
        forward, backward: P_f* and P_b* among the bits looked at, with their intervals.
        N, D: intervals of the best pair's size and tokens; NaN without bootstraps.
        warnings: where the plan leaves what the law was fitted over, and what the fit does not identify.
    """

    rows: tuple[PassRow, ...]
    best: PassRow
    alike: tuple[PassRow, ...]
    forward: Optimum
    backward: Optimum
    N: tuple[float, float]
    D: tuple[float, float]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        head = ("", "P_f", "P_b", "c", "N", "D", "D/N", "loss", "interval", "excess", "interval")
        shown = max(_SHOWN, 1 + max((self.rows.index(row) for row in self.alike), default=0))
        cells = [(*head, "not seen"), *(_cells(r, r is self.best) for r in self.rows[:shown])]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in cells]
        if len(self.rows) > shown:
            lines.append(f"and {len(self.rows) - shown} more, of a larger loss")
        for name, (low, high) in (("N", self.N), ("D", self.D)):
            if not math.isnan(low):
                lines.append(f"{name} = {getattr(self.best, name):.3g} [{low:.3g}, {high:.3g}]")
        lines += [f"P_forward* = {self.forward}", f"P_backward* = {self.backward}"]
        if not math.isnan(self.best.low):
            alike = ", ".join(row.pair for row in self.alike) or "none"
            lines.append(f"not told apart from {self.best.pair}: {alike}")
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def _cells(row: PassRow, is_best: bool) -> tuple[str, ...]:
    interval = "—" if math.isnan(row.low) else f"[{row.low:.4f}, {row.high:.4f}]"
    excess = "—"
    if not math.isnan(row.excess_low):
        excess = f"[{row.excess_low:+.4f}, {row.excess_high:+.4f}]"
    return (
        "→" if is_best else "",
        f"{row.forward:g}",
        f"{row.backward:g}",
        f"{row.cost:.3f}",
        f"{row.N:.3g}",
        f"{row.D:.3g}",
        f"{row.D / row.N:.3g}",
        f"{row.loss:.4f}",
        interval,
        f"{row.excess:+.4f}",
        "—" if is_best else excess,
        " ".join(row.outside) or "—",
    )


def plan_passes(
    law: Fit | Published | Sequence[Fit],
    *,
    flops: float,
    N: float | None = None,
    D: float | None = None,
    forward: Sequence[float] = PRECISIONS,
    backward: Sequence[float] = PRECISIONS,
    cost: Callable[[Any], Any] = bits_linear,
) -> PassPlan:
    """Returns the run of the least loss at each pair of bits, under C = 6 N D (c(P_f) + 2 c(P_b)) / 3.

    An alternative's excess is the difference of two runs' losses by the same bootstraps, of what a law says
    of both.  Those whose interval reaches 0 are not told apart from the best.

    Args:
        law: a fit or published constants, of a law of N, D, P_forward and P_backward with A, α, B, β and E,
            such as `quartet`; or several fits of the same runs, the likeliest first: it plans, and each
            interval is the union over all.
        flops: C, in operations that cost as 16-bit ones.
        N: parameters without embeddings, where they are given.
        D: tokens, where they are given.
        forward, backward: bits to look at; every pair of them.
        cost: c(P), of a product beside a 16-bit one, such as `chip_cost` gives.

    Raises:
        ValueError: both N and D; numbers that are not positive; bits of which the law says nothing; a law
            of another form.

    Source: Castro et al. 2025 (Quartet), arXiv 2505.14669, for forward and backward bits in one law.

    >>> from jaxquant.laws.forms import quartet
    >>> numbers = {"A": 400, "alpha": 0.35, "B": 400, "beta": 0.3, "E": 1.7, "gamma": 1.0}
    >>> efficiencies = {"eff_N_4": 0.9, "eff_N_8": 0.98, "eff_D_4": 0.5, "eff_D_8": 0.97}
    >>> law = Published(quartet((4, 8), (4, 8)), numbers | efficiencies, "made up")
    >>> found = plan_passes(law, flops=1e20, forward=(4, 8, 16), backward=(4, 8, 16))
    >>> found.best.pair
    '4/8'
    """
    sources = [law] if isinstance(law, Fit | Published) else _several(law)
    budget = _budget(flops, N, D, cost)
    looked = [check_precisions(forward, "forward"), check_precisions(backward, "backward")]
    for bits in looked:
        check_cost(cost, bits)
    for source in sources:
        _check_form(parts(source, None)[0])
    form = parts(sources[0], None)[0]
    known, said = _known(form, looked)
    runs = sorted((run_of(sources[0], budget, pair) for pair in known), key=lambda run: run["loss"])
    alive = [run for run in runs if run["loss"] < _MOST_LOSS]
    if not alive:
        raise ValueError(f"{form.name} has no value at any of the bits {looked[0]} and {looked[1]}")
    if gone := [f"{run['P_forward']:g}/{run['P_backward']:g}" for run in runs[len(alive) :]]:
        said.append(f"at {', '.join(gone)} bits the law has no value: left out")
    return _plan(sources, budget, alive, said)


def _plan(sources: list, budget: Budget, runs: list[Run], said: list[str]) -> PassPlan:
    """Returns the plan of runs in the order of their losses."""
    rows = _rows(sources, runs)
    pair = runs[0]["P_forward"], runs[0]["P_backward"]
    best = [optima(s, budget, runs, None if i else pair) for i, s in enumerate(sources)]
    forward, backward = (union([one[i] for one in best]) for i in range(2))
    sizes = [sizes_of(source, budget, runs[0]) for source in sources]
    n, d = (united(one[i] for one in sizes) for i in range(2))
    alike = () if math.isnan(rows[0].low) else tuple(r for r in rows[1:] if not r.is_apart)
    warnings = tuple(dict.fromkeys((*_warnings(sources, rows, runs[0]), *said)))
    return PassPlan(rows, rows[0], alike, forward, backward, n, d, warnings)


def _several(law: Any) -> list[Fit]:
    fits = list(law) if isinstance(law, Iterable) and not isinstance(law, str) else []
    if not fits or not all(isinstance(fit, Fit) for fit in fits):
        raise ValueError(
            f"law is a fit, published constants, or several fits, the likeliest first; got {law!r}"
        )
    return fits


def _budget(flops: Any, N: Any, D: Any, cost: Any) -> Budget:
    for name, value in {"flops": flops, "N": N, "D": D}.items():
        if value is not None or name == "flops":
            check_positive(name, value)
    if N is not None and D is not None:
        raise ValueError("flops, N and D over-determine a run; give two of them")
    return Budget(flops, N, D, cost)


def _check_form(form: Law) -> None:
    is_of_passes = set(form.columns) == {"N", "D", *COLUMNS}
    if not is_of_passes or not {"A", "alpha", "B", "beta", "E"} <= set(form.names):
        raise ValueError(
            "a plan of both passes needs a law of N, D, P_forward and P_backward with A, α, B, β and E; "
            f"{form.name} is none: it reads {', '.join(form.columns)}"
        )


def _known(form: Law, looked: list[list]) -> tuple[list[Pair], list[str]]:
    """Returns (pairs that the law covers, what it does not cover in words)."""
    said, kept = [], []
    widths = (None, None) if form.pass_widths is None else form.pass_widths
    for column, bits, own in zip(COLUMNS, looked, widths, strict=True):
        known = [b for b in bits if own is None or b in (*own, FULL_BITS)]
        if not known:
            raise ValueError(
                f"{form.name} knows {column} of {own} bits and {FULL_BITS}; got {bits}"
            )
        kept.append(known)
        if unknown := [f"{b:g}" for b in bits if b not in known]:
            said.append(f"of {column} = {', '.join(unknown)} the law says nothing: left out")
    return [*itertools.product(*kept)], said


def _rows(sources: list, runs: list[Run]) -> tuple[PassRow, ...]:
    """Returns rows of runs, the best first, with intervals that are the unions over all laws."""
    losses, excesses = zip(*(intervals(source, runs) for source in sources), strict=True)
    rows = []
    for i, run in enumerate(runs):
        own = {name: run[name] for name in ("cost", "N", "D", "loss")}
        own |= {"forward": run["P_forward"], "backward": run["P_backward"]}
        own["low"], own["high"] = united(ends[i] for ends in losses)
        own["excess"] = run["loss"] - runs[0]["loss"]
        own["excess_low"], own["excess_high"] = united(ends[i] for ends in excesses)
        outside = dict.fromkeys(name for s in sources for name, *_ in _outside(s, run))
        rows.append(PassRow(**own, outside=tuple(outside)))
    return tuple(rows)


def _outside(law: Any, run: Run) -> list[tuple]:
    """Returns (column, value, low, high, law) wherever a run leaves what a law was fitted over."""
    within = law.within.items()
    return [
        (name, run[name], low, high, law.law.name)
        for name, (low, high) in within
        if name in run and not low <= run[name] <= high
    ]


def _warnings(sources: list, rows: tuple[PassRow, ...], run: Run) -> list[str]:
    found = {name: x for s in sources for name, *x in _outside(s, run)}
    said = [
        f"{name} = {value:.3g} lies outside {low:.3g} to {high:.3g}, over which {of} was fitted"
        for name, (value, low, high, of) in found.items()
    ]
    if math.isnan(rows[0].low):
        said.append("there are no bootstraps: nothing says which alternatives are as good")
    said += [text for source in sources for text in getattr(source, "warnings", ())]
    for name in ("forward", "backward"):
        bits, own = [getattr(row, name) for row in rows], getattr(rows[0], name)
        for which, end in (("fewest", min(bits)), ("most", max(bits))):
            if own == end and len(set(bits)) > 1:
                said.append(
                    f"the best P_{name}, {end:g} bits, is the {which} that the plan looked at"
                )
    return said

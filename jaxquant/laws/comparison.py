"""Laws beside each other on the same runs: criteria, runs held out, and a control that must fail."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxquant.checks import check_number, check_whole
from jaxquant.laws.criteria import aicc, independent_runs
from jaxquant.laws.fitting import DELTA, Fit, Space, check_numbers, fit, r2
from jaxquant.laws.law import Columns, Law, check_law, x64
from jaxquant.laws.runs import check_runs, number_column, places

_P = 0.05
_MOST_FOLDS = 6  # of a column with many values: runs are held out by ranges of it


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Laws ranked on the same runs, the likeliest first.

    Attributes:
        fits: with intervals where bootstraps were asked for.
        criteria: AICc of each, all of `independent` runs.
        independent: how many independent runs they count, by the leader's residuals; all without groups.
        held_out: for each, R² on runs that it was not fitted to, by the column by which they were held out;
            NaN where the law says nothing of values that it has not seen.
    """

    fits: tuple[Fit, ...]
    held_out: tuple[dict[str, float], ...]
    criteria: tuple[float, ...]
    independent: float

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each law: name, parameters, r2, aicc, delta_aicc, and held-out R² by column."""
        best = min(self.criteria)
        return [
            {
                "law": f.law.name,
                "parameters": len(f.law.parameters),
                "r2": f.r2,
                "aicc": criterion,
                "delta_aicc": criterion - best if math.isfinite(best) else math.nan,
                **{f"r2_by_{column}": value for column, value in out.items()},
                "warnings": len(f.warnings),
            }
            for f, out, criterion in zip(self.fits, self.held_out, self.criteria, strict=True)
        ]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a ranking must not hide: laws that predict held-out runs worse than their mean does."""
        return tuple(
            f"{f.law.name} held out by {column}: R² = {value:.2f}, worse than the mean of the runs"
            for f, out in zip(self.fits, self.held_out, strict=True)
            for column, value in out.items()
            if value < 0
        )

    def not_rejected(self, margin: float = 2.0) -> tuple[Fit, ...]:
        """Returns the fits whose criterion lies within a margin of the least, the likeliest first.

        Raises:
            ValueError: a margin below 0; too few independent runs for any law to have a criterion.

        Source: Burnham and Anderson 2002, "Model Selection and Multimodel Inference", section 2.6: laws
        within 2 of the least are as well supported.
        """
        check_number("margin", margin, 0)
        if not math.isfinite(min(self.criteria)):
            raise ValueError(
                f"{self.independent:.1f} independent runs are too few to tell these laws apart"
            )
        pairs = zip(self.fits, self.criteria, strict=True)
        return tuple(f for f, value in pairs if value - min(self.criteria) <= margin)

    def __str__(self) -> str:
        rows = self.rows
        cells = [list(rows[0])] + [
            [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in cells]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(line.rstrip() for line in lines)


def compare(
    laws: Iterable[Law],
    runs: Any,
    *,
    held_out: Iterable[str] = ("N", "D", "P_w"),
    groups: str | None = None,
    strata: str | None = None,
    starts: int = 64,
    bootstraps: int = 0,
    delta: float = DELTA,
    seed: int = 0,
) -> Comparison:
    """Returns each law fitted to the same runs, ranked by AICc, with R² on runs held out by N, by D and by P.

    Where `groups` says which runs belong together, AICc is that of the likelihood that the fits maximise,
    Huber's, of as many runs as are independent: runs of one trunk or seed share what they are off by
    (`criteria.independent_runs`).  Without groups it takes residuals as normal and all runs as independent.

    Held out are all runs with one value of a column, in turn (or in one range of it, where it has many), so
    that a law is asked for what it has not seen.

    Args:
        laws: of one target.
        runs: as of `fit`, with the columns of all laws.
        held_out: columns by which runs are held out.
        groups, strata: as of `fit`: columns of what belongs together, and within what it is resampled.
        bootstraps: as of `fit`; they give the fits intervals, and may lead them to better valleys.
        starts, delta, seed: as of `fit`.

    Raises:
        ValueError: no laws, or of several targets; as `fit`.
    """
    if isinstance(laws, Law):
        raise ValueError(f"laws are several, as [{laws.name}]; got one")
    if not isinstance(laws, Iterable):
        raise ValueError(f"laws are several laws of jaxquant.laws; got {laws!r}")
    laws = [*laws]
    for law in laws:
        check_law(law)
    if isinstance(held_out, str) or not isinstance(held_out, Iterable):
        raise ValueError(f"held_out names columns, as ('N', 'D'); got {held_out!r}")
    held_out = [*held_out]
    if not laws or len({law.target for law in laws}) != 1:
        raise ValueError(f"laws are one or more of one target; got {[law.name for law in laws]}")
    check_numbers(starts, bootstraps, delta, seed)
    found = []
    for law in laws:
        fitted = fit(
            law,
            runs,
            starts=starts,
            bootstraps=bootstraps,
            delta=delta,
            groups=groups,
            strata=strata,
            seed=seed,
        )
        columns, target = check_runs(law, runs)
        scores = {
            name: _held_out_r2(
                law,
                columns,
                target,
                number_column(runs, name, len(target)),
                name,
                starts,
                delta,
                seed,
            )
            for name in held_out
        }
        found.append((fitted, scores))
    return _ranked(found, runs, groups)


def _ranked(found: list[tuple[Fit, dict[str, float]]], runs: Any, groups: str | None) -> Comparison:
    """Returns the comparison, all laws counting the independent runs that the leader's residuals tell."""
    residuals = []
    for fitted, _ in found:
        columns, target = check_runs(fitted.law, runs)
        residuals.append(np.log(fitted.law.evaluate(fitted.params, columns)) - np.log(target))
    leader = min(range(len(found)), key=lambda i: found[i][0].objective)
    independent = float(len(residuals[leader]))
    scores = [fitted.aicc for fitted, _ in found]
    if groups is not None:
        place = places(runs, groups, len(residuals[leader]))
        independent = independent_runs(residuals[leader], place)
        scores = [
            aicc(r, len(fitted.law.parameters), fitted.delta, independent)
            for r, (fitted, _) in zip(residuals, found, strict=True)
        ]
    scored = sorted((score, i) for i, score in enumerate(scores))
    return Comparison(
        tuple(found[i][0] for _, i in scored),
        tuple(found[i][1] for _, i in scored),
        tuple(score for score, _ in scored),
        independent,
    )


def folds(column: np.ndarray) -> list[np.ndarray]:
    """Returns the runs to hold out together: those of one value, or of a range if there are many values."""
    values = np.unique(column)
    if len(values) > _MOST_FOLDS:
        edges = np.quantile(column, np.linspace(0, 1, _MOST_FOLDS + 1)[1:-1])
        column = np.searchsorted(edges, column, side="right").astype(float)
        values = np.unique(column)
    return [column == value for value in values]


def _held_out_r2(
    law: Law,
    columns: Columns,
    target: np.ndarray,
    by: np.ndarray,
    name: str,
    starts: int,
    delta: float,
    seed: int,
) -> float:
    parts = folds(by)
    if len(parts) < 2 or (law.widths is not None and name.startswith("P")):
        return math.nan
    space = Space(law, columns, target)
    # Runs held out have weight zero: one compilation serves all folds.
    weights = np.stack([(~part).astype(float) for part in parts])
    with x64():
        first = space.starts(np.random.default_rng(seed), len(parts), starts)
        points = space.natural(space.solve(weights, first, delta)[0])
    residual = np.zeros(len(target))
    for i, part in enumerate(parts):
        params = {key: float(value[i]) for key, value in points.items()}
        residual[part] = (np.log(law.evaluate(params, columns)) - np.log(target))[part]
    return r2(residual, np.log(target))


@dataclasses.dataclass(frozen=True)
class Control:
    """A law's gain on runs with shuffled bits, which cannot be real.

    A p-value of 0.05 takes 19 shuffles.

    Attributes:
        gain: in AICc over the law without bits, on the runs as they are.
        shuffled: the same on each shuffle.
        p_value: the share of shuffles that gain as much, (1 + count) / (1 + shuffles).
    """

    gain: float
    shuffled: np.ndarray
    p_value: float

    @property
    def is_rejected(self) -> bool:
        """Whether the term of precision is to be dropped: it gains no more than on shuffled bits."""
        return not (self.gain > 0 and self.p_value <= _P)

    def __str__(self) -> str:
        kept = "rejected" if self.is_rejected else "kept"
        return (
            f"the term of precision gains {self.gain:.1f} in AICc, {self.shuffled.max():.1f} at most with "
            f"bits shuffled (p = {self.p_value:.2f}): {kept}"
        )


def shuffled_bits(
    law: Law, baseline: Law, runs: Any, *, shuffles: int = 19, starts: int = 32, seed: int = 0
) -> Control:
    """Returns the control: bits are shuffled among runs, and the law's gain over one without bits must go.

    Args:
        law: with columns of bits.
        baseline: without, such as `CHINCHILLA`.
        runs: as of `fit`.
        shuffles: how often, 19 or more.
        starts: of each fit.
        seed: of shuffles and starts.

    Raises:
        ValueError: a law without columns of bits, or a baseline with such; as `fit`.
    """
    for one in (law, baseline):
        check_law(one)
    check_whole(f"shuffles, for p = {_P},", shuffles, round(1 / _P) - 1)
    bits = [c for c in law.columns if c.startswith("P_")]
    if not bits or any(c.startswith("P_") for c in baseline.columns):
        raise ValueError(f"law reads bits and baseline does not; got {law.name}, {baseline.name}")
    columns, target = check_runs(law, runs)
    table = columns | {law.target: target}
    without = fit(baseline, table, starts=starts, bootstraps=0, seed=seed).aicc
    rng = np.random.default_rng(seed)

    def gain(order: np.ndarray) -> float:
        own = table | {c: table[c][order] for c in bits}
        return without - fit(law, own, starts=starts, bootstraps=0, seed=seed).aicc

    actual = gain(np.arange(len(target)))
    drawn = np.array([gain(rng.permutation(len(target))) for _ in range(shuffles)])
    return Control(actual, drawn, (1 + int(np.sum(drawn >= actual))) / (1 + shuffles))

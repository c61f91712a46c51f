"""How the gap to full precision grows: gap = C D^γ_D N^γ_N over paired runs, with intervals."""

# pandas' selections are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.harness.reporting.exponents import resampled
from experiments.harness.reporting.statistics import CONFIDENCE, t_half_width
from jaxquant import laws
from jaxquant.laws.intervals import expanded
from jaxquant.stats import percentile_interval

BOOTSTRAPS = 2000
SUM = "gamma_D + gamma_N"  # all that is known where D/N is one number
_ONE_RATIO = 0.15  # a spread of log D/N within which it counts as one


@dataclasses.dataclass(frozen=True)
class Growth:
    """Exponents of a gap.

    Attributes:
        of: which runs, in words.
        form: the equation, and how it was fitted.
        pairs: how many gaps.
        units: how many were resampled.
        params: an exponent for each of "gamma_D" and "gamma_N" that the runs tell, or for `SUM`.
        samples: of each over bootstraps.
        level: of percentiles, for an interval to hold its nominal level.
        spread: the standard deviation of log gap about the fit; NaN where the form has none.
        freedom: its degrees of freedom.
    """

    of: str
    form: str
    pairs: int
    units: int
    params: Mapping[str, float]
    samples: Mapping[str, np.ndarray]
    level: float
    spread: float = math.nan
    freedom: int = 0

    def interval(self, name: str) -> tuple[float, float]:
        """Returns the interval of an exponent, drawn out to the estimate where that lies outside."""
        low, high = percentile_interval(self.samples[name], self.level)
        return min(low, self.params[name]), max(high, self.params[name])

    def row(self) -> dict:
        """Returns it as a row of numbers."""
        found: dict = {"runs": self.of, "form": self.form, "pairs": self.pairs, "units": self.units}
        for name in ("gamma_D", "gamma_N", SUM):
            low, high = self.interval(name) if name in self.params else (None, None)
            found |= {name: self.params.get(name), f"{name} low": low, f"{name} high": high}
        return found | {"spread": None if math.isnan(self.spread) else self.spread}


def pair(few: pd.DataFrame, full: pd.DataFrame, on: tuple[str, ...] = ("N", "D")) -> pd.DataFrame:
    """Returns runs of few bits beside that of full precision, with ``loss_full`` and ``added``.

    Runs without a partner drop out.

    Args:
        few: with the columns of `on` and ``loss``.
        full: likewise, one run for each.
        on: what both runs share.
    """
    kept = full[[*on, "loss"]].rename(columns={"loss": "loss_full"})
    found = few.merge(kept, on=list(on), validate="many_to_one")
    return found.assign(added=found["loss"] - found["loss_full"])


def exponents_of(pairs: pd.DataFrame) -> dict[str, str]:
    """Returns which exponents pairs tell, and of which column: both, that of D at one size, or their sum."""
    if pairs["N"].nunique() == 1:
        return {"gamma_D": "D"}
    if np.ptp(np.log(pairs["D"] / pairs["N"])) < _ONE_RATIO:
        return {SUM: "N"}
    return {"gamma_D": "D", "gamma_N": "N"}


def least_squares(
    pairs: pd.DataFrame, of: str, *, bootstraps: int = BOOTSTRAPS, seed: int = 0
) -> Growth | None:
    """Fits log gap = c + γ_D log D + γ_N log N by least squares; gaps that are not above 0 are left out.

    Units are resampled within sizes, where each size has several, and over all of them elsewhere.

    Args:
        pairs: with ``N``, ``D``, ``added``, and ``unit``, what is resampled together.
        of: in words.
        bootstraps: refits.
        seed: of resampling.

    Returns:
        None where there are fewer than two gaps more than parameters.
    """
    own = pairs[pairs["added"] > 0]
    if own.empty:
        return None
    columns = exponents_of(own)
    names = list(columns)
    if len(own) < len(names) + 3:
        return None
    table = np.stack([np.ones(len(own)), *(np.log(own[c]) for c in columns.values())], axis=1)
    # About the middle, so that a constant and an exponent are not next to one column.
    table[:, 1:] -= table[:, 1:].mean(axis=0)
    target = np.log(own["added"].to_numpy())
    best = np.linalg.lstsq(table, target, rcond=None)[0]
    counts = _counts(own, bootstraps, seed)
    drawn = np.array([_solved(table, target, weights) for weights in counts])
    drawn = drawn[np.isfinite(drawn).all(axis=1)]
    freedom, units = len(own) - table.shape[1], own["unit"].nunique()
    spread = float(np.sqrt(np.sum((target - table @ best) ** 2) / freedom))
    return Growth(
        of,
        f"log gap by least squares, {' and '.join(names)}",
        len(own),
        units,
        dict(zip(names, best[1:].tolist(), strict=True)),
        {name: drawn[:, 1 + i] for i, name in enumerate(names)},
        expanded(CONFIDENCE, units, len(own), table.shape[1]),
        spread,
        freedom,
    )


def _counts(pairs: pd.DataFrame, bootstraps: int, seed: int) -> np.ndarray:
    """Returns how often each pair counts in each bootstrap, [bootstraps, pairs]."""
    units, place = np.unique(pairs["unit"].astype(str), return_inverse=True)
    layer = np.zeros(len(units))
    layer[place] = pairs["N"]
    if min(np.unique(layer, return_counts=True)[1]) < 2:
        layer[:] = 0
    return resampled(place, layer[place], bootstraps, seed)


def _solved(table: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the weighted solution; NaN where what was drawn does not tell all parameters."""
    root = np.sqrt(weights)
    found, _, rank, _ = np.linalg.lstsq(root[:, None] * table, root * target, rcond=None)
    return found if rank == table.shape[1] else np.full(table.shape[1], np.nan)


def by_error(
    pairs: pd.DataFrame, of: str, *, starts: int, bootstraps: int, **options: Any
) -> Growth:
    """Fits `laws.GAP_ERROR` to the pairs of several widths, whose exponents are one.

    Args:
        pairs: with ``N``, ``D``, ``P_w``, ``loss``, ``loss_full`` and ``unit``.
        of: in words.
        starts, bootstraps: of `laws.fit`.
        **options: of `laws.fit`.
    """
    law = laws.GAP_ERROR
    found = laws.fit(law, pairs, starts=starts, bootstraps=bootstraps, groups="unit", **options)
    names = ("gamma_D", "gamma_N")
    return Growth(
        of,
        f"{law.equation}, Huber on log L",
        found.runs,
        found.units,
        {name: found.params[name] for name in names},
        {name: found.samples[name] for name in names},
        found.expanded(CONFIDENCE),
    )


def transferred(base: laws.Fit, efficiency: laws.Fit, pairs: pd.DataFrame, of: str) -> Growth:
    """Returns the exponents of the gap L(eff N, D) − L(N, D) over the pairs' N and D.

    Args:
        base: L, a fit of a law of N and D to runs in full precision.
        efficiency: a fit with "eff_4", to other runs.
        pairs: with ``N`` and ``D``; their losses are not read.
        of: in words.
    """
    size, tokens = pairs["N"].to_numpy(), pairs["D"].to_numpy()
    table = np.stack([np.ones(len(pairs)), np.log(tokens), np.log(size)], axis=1)

    def exponents(params: Mapping[str, float], share: float) -> np.ndarray:
        few = base.law.evaluate(params, {"N": size * share, "D": tokens})
        gap = few - base.law.evaluate(params, {"N": size, "D": tokens})
        return np.linalg.lstsq(table, np.log(gap), rcond=None)[0][1:]

    names = ("gamma_D", "gamma_N")
    # The two were resampled apart, and may have unlike numbers of samples.
    bases = [
        dict(zip(base.samples, x, strict=True)) for x in zip(*base.samples.values(), strict=True)
    ]
    shares = efficiency.samples["eff_4"]
    drawn = [exponents(params, share) for params, share in zip(bases, shares, strict=False)]
    return Growth(
        of,
        "an efficiency and a law of full precision",
        len(pairs),
        min(base.units, efficiency.units),
        dict(zip(names, exponents(base.params, efficiency.params["eff_4"]).tolist(), strict=True)),
        dict(zip(names, np.array(drawn).T, strict=True)),
        max(base.expanded(CONFIDENCE), efficiency.expanded(CONFIDENCE)),
    )


def difference(ours: Growth, theirs: Growth, name: str) -> tuple[float, float, float]:
    """Returns (value, low, high) of an exponent of ours less one of theirs, resampled apart."""
    size = min(len(ours.samples[name]), len(theirs.samples[name]))
    samples = ours.samples[name][:size] - theirs.samples[name][:size]
    value = ours.params[name] - theirs.params[name]
    low, high = percentile_interval(samples, max(ours.level, theirs.level))
    return value, min(low, value), max(high, value)


def ratios(theirs: pd.DataFrame, fitted: Growth, predictors: list[Growth]) -> pd.DataFrame:
    """Returns gap(largest D) / gap(smallest D) at each size: measured, and as exponents predict it.

    The measured ratio is of two single runs: its interval is Student's, of the scatter about `fitted`.

    Args:
        theirs: pairs.
        fitted: their own growth.
        predictors: growths that have "gamma_D".
    """
    half = t_half_width(fitted.spread * math.sqrt(2), fitted.freedom)
    rows = []
    for size, own in theirs.sort_values("N").groupby("size", sort=False):
        first, last = (own.loc[own["D"].idxmin()], own.loc[own["D"].idxmax()])
        measured, longer = last["added"] / first["added"], last["D"] / first["D"]
        row = {"size": size, "D from": first["D"], "D to": last["D"], "measured": measured}
        row |= {"low": measured * math.exp(-half), "high": measured * math.exp(half)}
        for predictor in predictors:
            ends = (predictor.params["gamma_D"], *predictor.interval("gamma_D"))
            row[predictor.of] = tuple(float(longer**end) for end in ends)
        rows.append(row)
    return pd.DataFrame(rows)

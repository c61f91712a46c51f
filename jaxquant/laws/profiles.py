"""The interval of one parameter, by refitting all others at each of its values."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.laws.fitting import Fit, Space
from jaxquant.laws.law import Columns, x64
from jaxquant.laws.runs import check_runs
from jaxquant.laws.solving import huber
from jaxquant.stats import check_confidence_level, critical, renamed


@renamed("confidence", "confidence_level")
def profile(
    fitted: Fit,
    runs: Any,
    name: str,
    *,
    confidence_level: float | None = None,
    points: int = 25,
    starts: int = 16,
) -> tuple[float, float]:
    r"""Returns the interval of a parameter within which the objective, refitted, rises too little to tell.

    θ is inside while 2 (S(θ) − S(θ̂)) ≤ λ χ²₁, with S the objective and λ = E[ψ²] / E[ψ′] for Huber's ψ,
    which a likelihood's λ would be 1 of.  An end that is not found within the bounds is infinite, or 0.

    Args:
        fitted: of `fit`.
        runs: that it was fitted to.
        name: a parameter that is no coefficient of a power, whose interval would be that of its exponent.
        confidence_level: the fit's where not given.
        points: at which the objective is refitted, on each side.
        starts: of each refit.

    Raises:
        ValueError: another parameter; a level outside (0, 1).

    Source: Ronchetti 1982, on tests by Huber's objective; Venzon and Moolgavkar 1988, on profiles.
    """
    if not isinstance(fitted, Fit):
        raise ValueError(f"fitted is what laws.fit returned; got a {type(fitted).__name__}")
    law = fitted.law
    if name not in law.names or law.parameters[law.names.index(name)].term:
        plain = ", ".join(p.name for p in law.parameters if not p.term)
        raise ValueError(f"profiles are of {plain}; got {name!r}")
    confidence_level = fitted.confidence_level if confidence_level is None else confidence_level
    check_confidence_level(confidence_level)
    columns, target = check_runs(law, runs)
    _check_own(fitted, columns, target)
    space, place = Space(law, columns, target), law.names.index(name)
    parameter = law.parameters[place]
    best = float(parameter.to_fitted(fitted.params[name]))
    reach = np.concatenate([[0.0], np.geomspace(1e-3, 3.0, points)])
    ends = []
    with x64():
        allowed = _threshold(fitted, columns, target, confidence_level)
        for side in (-1, 1):
            values = np.clip(best + side * reach, space.low[place], space.high[place])
            rises = [
                _fixed(space, place, v, fitted.delta, starts) - fitted.objective for v in values
            ]
            end = _crossing(values, np.array(rises), allowed)
            least = -math.inf if parameter.is_signed else 0.0
            beyond = math.inf if side > 0 else least
            ends.append(beyond if end is None else float(parameter.from_fitted(end)))
    return ends[0], ends[1]


def _check_own(fitted: Fit, columns: Columns, target: np.ndarray) -> None:
    with x64():
        residual = np.log(fitted.law.evaluate(fitted.params, columns)) - np.log(target)
        there = float(np.sum(huber(jnp.asarray(residual), fitted.delta)))
    if not math.isclose(there, fitted.objective, rel_tol=1e-6, abs_tol=1e-12):
        raise ValueError(
            f"runs are those that were fitted, whose objective is {fitted.objective:.6g}; with these it is "
            f"{there:.6g}"
        )


def _fixed(space: Space, place: int, value: float, delta: float, starts: int) -> float:
    low, high = space.low.copy(), space.high.copy()
    low[place] = high[place] = value
    first = space.starts(np.random.default_rng(0), 1, starts)
    ones = np.ones((1, len(space.target)))
    return float(space.solve(ones, first, delta, low, high)[1][0])


def _crossing(values: np.ndarray, rises: np.ndarray, allowed: float) -> float | None:
    """Returns where the rise crosses its limit, by interpolation between two points; None where it does
    not.
    """
    beyond = np.flatnonzero(rises > allowed)
    if not beyond.size:
        return None
    i = beyond[0]
    if i == 0:
        return float(values[0])
    share = (allowed - rises[i - 1]) / (rises[i] - rises[i - 1])
    return float(values[i - 1] + share * (values[i] - values[i - 1]))


def _threshold(fitted: Fit, columns: Columns, target: np.ndarray, confidence_level: float) -> float:
    residual = np.log(fitted.law.evaluate(fitted.params, columns)) - np.log(target)
    psi = lambda r: np.clip(r, -fitted.delta, fitted.delta)  # noqa: E731
    # ψ′ is a spike of width δ; its mean is taken over a width that some residuals fall into.
    width = max(fitted.delta, 0.5 * float(np.median(np.abs(residual))) / 0.6745)
    slope = float(np.mean(psi(residual + width) - psi(residual - width))) / (2 * width)
    scale = float(np.mean(psi(residual) ** 2)) / max(slope, 1e-12)
    freedom = max(1, len(target) - len(fitted.law.parameters))
    scale *= len(target) / freedom
    return 0.5 * scale * critical(confidence_level) ** 2

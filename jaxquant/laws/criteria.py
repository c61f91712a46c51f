"""How well a fit explains its runs: the likelihood that it minimised, and how many runs are independent."""

import math

import numpy as np
from scipy import optimize, special


def huber_values(residual: np.ndarray, delta: float) -> np.ndarray:
    """Returns H_δ(r) = r²/2 up to |r| = δ, and δ (|r| − δ/2) beyond."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def log_likelihood(residual: np.ndarray, delta: float) -> float:
    """Returns the log-likelihood of residuals under the density whose maximum a Huber fit is.

    p(r) = exp(−H_δ(r)/s) / Z(s), Z(s) = √(2πs) erf(δ/√(2s)) + (2s/δ) exp(−δ²/(2s)), with the scale s at its
    maximum.  It is Laplace's density where residuals are far larger than δ, and the normal one where they are
    smaller.

    Args:
        residual: log ŷ − log y of each run.
        delta: δ of the fit.

    Source: Huber 1964, "Robust Estimation of a Location Parameter".

    >>> rng = np.random.default_rng(0)
    >>> laplace = rng.laplace(scale=0.02, size=20_000)
    >>> expected = -math.log(2 * 0.02) - 1
    >>> abs(log_likelihood(laplace, 1e-3) / 20_000 - expected) < 0.02
    True
    """
    total, n = float(huber_values(residual, delta).sum()), len(residual)

    def negative(log_scale: float) -> float:
        s = math.exp(log_scale)
        normal = math.sqrt(2 * math.pi * s) * special.erf(delta / math.sqrt(2 * s))
        tails = 2 * s / delta * math.exp(-(delta**2) / (2 * s))
        return n * math.log(normal + tails) + total / s

    # Of Laplace's and of the normal density the best scales are these; the best one lies between or near
    # them.
    centre = math.log(max(total / n, 1e-300))
    found = optimize.minimize_scalar(negative, bounds=(centre - 3, centre + 4), method="bounded")
    return -float(found.fun)


def independent_runs(residual: np.ndarray, place: np.ndarray) -> float:
    """Returns how many independent runs so many correlated ones are worth: n / (1 + (m − 1) ρ).

    ρ is the correlation of residuals within a unit, from one-way analysis of variance, at least 0; m is the
    mean size of a unit, weighted by size.

    Args:
        residual: of each run.
        place: the number of the unit that each run belongs to.

    Source: Kish 1965, "Survey Sampling", section 5.4.

    >>> place = np.repeat(np.arange(50), 4)
    >>> shared = np.random.default_rng(0).normal(size=50)[place]
    >>> round(independent_runs(shared, place))
    50
    """
    n, counts = len(residual), np.bincount(place)
    units = len(counts)
    if units in (1, n):
        return float(n)
    means = np.bincount(place, residual) / counts
    between = float(np.sum(counts * (means - residual.mean()) ** 2)) / (units - 1)
    within = float(np.sum((residual - means[place]) ** 2)) / (n - units)
    typical = (n - float(np.sum(counts**2)) / n) / (units - 1)
    spread = between + (typical - 1) * within
    correlation = (between - within) / spread if spread > 0 else 0.0
    size = float(np.sum(counts**2)) / n
    return n / (1 + (size - 1) * min(max(correlation, 0.0), 1.0))


def squared_aicc(residual: np.ndarray, parameters: int) -> float:
    """Returns AICc of all runs as if residuals were normal and independent; infinite of too few runs."""
    n, k = len(residual), parameters + 1  # the residuals' variance is one too
    if n <= k + 1:
        return math.inf
    spread = max(float(np.mean(residual**2)), 1e-300)
    return n * math.log(spread) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def aicc(residual: np.ndarray, parameters: int, delta: float, independent: float) -> float:
    """Returns Akaike's criterion, corrected for few runs, of so many independent ones.

    AICc = −2 ℓ n'/n + 2 k n'/(n' − k − 1), with ℓ of `log_likelihood`, n' the independent runs of n, and k
    the parameters with the scale.  Infinite where n' ≤ k + 1.

    Args:
        residual: of each run.
        parameters: of the law.
        delta: δ of the fit.
        independent: n', as of `independent_runs`.

    Source: Hurvich and Tsai 1989, "Regression and time series model selection in small samples".
    """
    k = parameters + 1
    if independent <= k + 1:
        return math.inf
    likelihood = log_likelihood(residual, delta) * independent / len(residual)
    return -2 * likelihood + 2 * k * independent / (independent - k - 1)

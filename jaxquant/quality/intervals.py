"""Intervals and tests of paired figures, with examples that may come in correlated clusters.

All of it is arithmetic on float64 NumPy arrays.  A cluster is what was drawn independently (a window of a
text, a document, a patient): figures within one may depend on each other in any way.
"""

import dataclasses
import math
import reprlib
from typing import Any

import numpy as np
from scipy import special

from jaxquant.stats import critical


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its standard error and a two-sided confidence interval.

    Limits and standard error are infinite where the data bound nothing (one cluster, for example).
    """

    estimate: float
    se: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".4g"
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self, "")


def as_array(name: str, values: Any, dtype: Any = None) -> np.ndarray:
    """Returns values as a NumPy array.

    Raises:
        ValueError: rows of several lengths, or what is of another type; it names the argument.

    >>> as_array("scores", ["good", "bad"], float)
    Traceback (most recent call last):
    ValueError: scores are an array of float; got ['good', 'bad']
    """
    try:
        return np.asarray(values, dtype)
    except (TypeError, ValueError) as error:
        kind = "" if dtype is None else f" of {np.dtype(dtype).name.rstrip('0123456789')}"
        raise ValueError(f"{name} are an array{kind}; got {reprlib.repr(values)}") from error


def sign_tail(successes: int, trials: int) -> float:
    """Returns P(X ≥ successes) for X ~ Binomial(trials, ½).

    >>> sign_tail(9, 10)  # 11 / 1024
    0.0107...
    """
    return float(special.bdtrc(successes - 1, trials, 0.5))


def mcnemar(lost: int, gained: int) -> tuple[float, float, bool]:
    """Returns mcNemar's test of b losses against c gains, both counted over the same examples.

    χ² = (|b − c| − 1)²/(b + c) with one degree of freedom (zero where |b − c| < 1); under 25 changes the
    p-value is the exact binomial one.  Examples are taken as independent.

    Returns:
        (χ², two-sided p-value, whether it is exact).

    Source: McNemar 1947; the continuity correction of Edwards 1948.

    >>> mcnemar(40, 20)[0]
    6.016...
    """
    changes = lost + gained
    if not changes:
        return 0.0, 1.0, True
    statistic = max(abs(lost - gained) - 1, 0) ** 2 / changes
    if changes < 25:
        return statistic, min(1.0, 2 * sign_tail(max(lost, gained), changes)), True
    return statistic, float(special.chdtrc(1, statistic)), False


def holm(p_values: list[float]) -> list[float]:
    """Returns p-values adjusted so that the chance of any false rejection among them stays below the level.

    Source: Holm 1979.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, running = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _spread(residuals: np.ndarray, clusters: np.ndarray | None) -> tuple[float, int]:
    """Returns the standard error of Σ residuals, and how many clusters it rests on.

    √(G/(G − 1) · Σ_g (Σ_{i in g} r_i)²): for clusters of one, √(n/(n − 1) · Σ r²).
    """
    totals = residuals if clusters is None else np.bincount(clusters, residuals)
    count = len(totals) if clusters is None else int(np.count_nonzero(np.bincount(clusters)))
    if count < 2:
        return math.inf, count
    return math.sqrt(count / (count - 1) * float(np.sum(totals**2))), count


def _around(estimate: float, se: float, degrees: int, confidence_level: float) -> Interval:
    if math.isinf(se):
        return Interval(estimate, se, -math.inf, math.inf)
    half = critical(confidence_level, degrees) * se
    return Interval(estimate, se, estimate - half, estimate + half)


def mean_interval(
    values: np.ndarray, clusters: np.ndarray | None, confidence_level: float
) -> Interval:
    """Returns the mean, with Student's interval on (clusters − 1) degrees of freedom.

    Args:
        values: [n].
        clusters: [n] small non-negative integers, or None where examples are independent.
        confidence_level: such as 0.9.

    Source: the cluster-robust variance of Liang & Zeger 1986, for a mean.

    >>> f"{mean_interval(np.array([1.0, 2.0, 3.0, 4.0]), None, 0.9):.2f}"
    '2.50 [0.98, 4.02]'
    """
    mean = float(np.mean(values))
    spread, count = _spread(values - mean, clusters)
    return _around(mean, spread / len(values), count - 1, confidence_level)


def pairs_interval(values: np.ndarray, pairs: np.ndarray, confidence_level: float) -> Interval:
    """Returns the mean over pairs of items that were drawn independently: pairs that share an item are not.

    With s_i the sum of the residuals of the n_i pairs that item i is in, and t_d that of the n_d pairs of the
    same two items d: se² = (Σ_i s_i²/(1 − n_i/n) − Σ_d t_d²/(1 − n_d/n))/n², the second sum over pairs of two
    items, and no less than the se² of independent d.  Of effective items there are (Σ n_i²)²/Σ n_i⁴, or d if
    fewer, and one degree of freedom less: one item that is in all pairs bounds nothing.

    Args:
        values: [n].
        pairs: [n, 2] items as small non-negative integers.
        confidence_level: such as 0.9.

    Sources: variance of dyadic data, Aronow, Samii & Assenova 2015, with the leverage of Bell & McCaffrey
    2002; effective number of clusters, Carter, Schnepel & Steigerwald 2017.

    >>> values = np.array([1.0, 2.0, 3.0, 4.0])
    >>> f"{pairs_interval(values, np.array([[0, 1], [2, 3], [4, 5], [6, 7]]), 0.9):.2f}"
    '2.50 [0.98, 4.02]'
    >>> f"{pairs_interval(values, np.array([[0, 1], [0, 2], [3, 1], [3, 2]]), 0.9):.2f}"
    '2.50 [0.35, 4.65]'
    """
    mean, n = float(np.mean(values)), len(values)
    residuals, ordered = values - mean, np.sort(pairs, axis=1)
    of_two = ordered[:, 0] != ordered[:, 1]
    dyads, which = np.unique(ordered, axis=0, return_inverse=True)
    which = which.reshape(-1)
    items = np.concatenate([ordered[:, 0], ordered[of_two, 1]])
    counts = np.bincount(items)
    effective = np.sum(counts**2.0) ** 2 / np.sum(counts**4.0)
    degrees = int(min(effective, len(dyads)) + 1e-9) - 1
    if degrees < 1 or counts.max() == n:
        return _around(mean, math.inf, degrees, confidence_level)
    sums = np.bincount(items, np.concatenate([residuals, residuals[of_two]]))
    separate = np.bincount(which, residuals) ** 2 / (1 - np.bincount(which) / n)
    shared = np.sum(sums**2 / (1 - counts / n)) - np.sum(separate[dyads[:, 0] != dyads[:, 1]])
    return _around(mean, math.sqrt(max(shared, np.sum(separate))) / n, degrees, confidence_level)


def ratio_interval(
    numerator: np.ndarray,
    denominator: np.ndarray,
    clusters: np.ndarray | None,
    confidence_level: float,
) -> Interval:
    """Returns Σ numerator / Σ denominator, with the jackknife's interval.

    R = Σ_i u_i / Σ_i v_i, se² = G/(G − 1)·Σ_g (u_g − R·v_g)²/(1 − v_g/Σv)²/(Σv)², over clusters g, with
    1/Σ_g (v_g/Σv)² − 1 degrees of freedom: few of them where few clusters carry the denominator.

    Args:
        numerator: u, [n].
        denominator: v, [n], not negative, of a positive sum.
        clusters: as in `mean_interval`.
        confidence_level: such as 0.9.

    Sources: ratio estimators, Cochran 1977, section 6.3; leverage as in the jackknife of Efron 1982;
    effective size, Kish 1965.

    >>> f"{ratio_interval(np.array([1.0, 2.0, 2.0]), np.array([2.0, 4.0, 4.0]), None, 0.9):.2f}"
    '0.50 [0.50, 0.50]'
    """
    total = float(np.sum(denominator))
    ratio = float(np.sum(numerator)) / total
    residuals = numerator - ratio * denominator
    if clusters is not None:
        residuals, denominator = (np.bincount(clusters, x) for x in (residuals, denominator))
    share = denominator / total
    degrees = int(1 / float(np.sum(share**2)) + 1e-9) - 1
    if degrees < 1:
        return _around(ratio, math.inf, degrees, confidence_level)
    spread, _ = _spread(residuals / (1 - share), None)
    return _around(ratio, spread / total, degrees, confidence_level)


def _with_a_flip_each_way(
    after: np.ndarray, before: np.ndarray, clusters: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Adds two examples, one lost and one gained, each its own cluster."""
    after, before = np.append(after, [1.0, 0.0]), np.append(before, [0.0, 1.0])
    if clusters is not None:
        clusters = np.append(clusters, [clusters.max() + 1, clusters.max() + 2])
    return after, before, clusters


def paired_difference(
    after: np.ndarray, before: np.ndarray, clusters: np.ndarray | None, confidence_level: float
) -> Interval:
    """Returns the difference of two proportions over the same examples.

    The estimate is the plain difference.  The interval is that of the mean after one example lost and
    one gained are added, so that it has a width where nothing flipped.

    Args:
        after, before: [n] of zeros and ones.
        clusters: as in `mean_interval`; the two added examples are clusters of their own.
        confidence_level: such as 0.9.

    Source: Bonett & Price 2012, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data", here with Student's quantile and clusters.

    >>> print(f"{paired_difference(np.ones(50), np.ones(50), None, 0.9):.3f}")  # 50 alike say little
    0.000 [-0.046, 0.046]
    """
    wide_after, wide_before, wide_clusters = _with_a_flip_each_way(after, before, clusters)
    interval = mean_interval(wide_after - wide_before, wide_clusters, confidence_level)
    return dataclasses.replace(interval, estimate=float(np.mean(after - before)))


def paired_ratio(
    after: np.ndarray, before: np.ndarray, clusters: np.ndarray | None, confidence_level: float
) -> Interval | None:
    """Returns the ratio of two proportions over the same examples; None where `before` is zero throughout.

    As `paired_difference`, with one example lost and one gained added for the interval.

    >>> f"{paired_ratio(np.ones(50), np.ones(50), None, 0.9):.3f}"
    '1.000 [0.953, 1.047]'
    """
    if not np.any(before):
        return None
    interval = ratio_interval(*_with_a_flip_each_way(after, before, clusters), confidence_level)
    return dataclasses.replace(interval, estimate=float(np.sum(after) / np.sum(before)))


def proportion(
    values: np.ndarray, clusters: np.ndarray | None, confidence_level: float
) -> Interval:
    """Returns a proportion with Wilson's score interval.

    With clusters, n becomes the number of independent examples that would have the clustered standard
    error.  Where all values are alike that cannot be told, and examples count as independent.

    Source: Wilson 1927; the effective size of Korn & Graubard 1998.

    >>> f"{proportion(np.ones(50), None, 0.9):.3f}"
    '1.000 [0.949, 1.000]'
    """
    n, p = float(len(values)), float(np.mean(values))
    degrees: float = math.inf
    se = math.sqrt(p * (1 - p) / n)
    if clusters is not None:
        spread, count = _spread(values - p, clusters)
        if math.isinf(spread):
            return Interval(p, spread, 0.0, 1.0)
        degrees = count - 1
        if se > 0 and spread > 0:
            se = max(se, spread / n)
            n = p * (1 - p) / se**2
    z = critical(confidence_level, degrees)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, se, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))


def quantile_interval(
    values: np.ndarray, share: float, clusters: np.ndarray | None, confidence_level: float
) -> Interval:
    """Returns a quantile, and the interval that inverts the test of the share below it.

    The limits are the quantiles at share ± z·√(share(1 − share)/n); a limit is infinite where that lies
    outside (0, 1).  With clusters, the standard error of the share is the clustered one if larger.

    Source: Woodruff 1952, "Confidence intervals for medians and other position measures".

    >>> f"{quantile_interval(np.arange(1000.0), 0.5, None, 0.9):.0f}"
    '500 [474, 525]'
    """
    n = len(values)
    estimate = float(np.quantile(values, share))
    error, degrees = math.sqrt(share * (1 - share) / n), math.inf
    if clusters is not None:
        below = (values <= estimate).astype(np.float64)
        spread, count = _spread(below - below.mean(), clusters)
        error, degrees = max(error, spread / n), count - 1
    half = critical(confidence_level, degrees) * error if math.isfinite(error) else math.inf
    low = float(np.quantile(values, share - half)) if share - half > 0 else -math.inf
    high = float(np.quantile(values, share + half)) if share + half < 1 else math.inf
    finite = math.isfinite(low) and math.isfinite(high)
    return Interval(
        estimate,
        (high - low) / (2 * critical(confidence_level, degrees)) if finite else math.inf,
        low,
        high,
    )

"""Fit a law's parameters to runs, with intervals, and with warnings if the runs do not identify them."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.checks import check_positive, check_whole
from jaxquant.laws.criteria import squared_aicc
from jaxquant.laws.intervals import expanded
from jaxquant.laws.law import Columns, Law, Values, check_params, filled_up, x64
from jaxquant.laws.runs import check_runs, doubts, places, strata_of_units
from jaxquant.laws.solving import solve
from jaxquant.stats import check_confidence_level, percentile_interval, renamed

DELTA = 1e-3  # of Huber's loss, as Hoffmann et al. 2022 have it
_NEAR_BOUND = 1e-3  # of the logarithm of a bound
_LEAST_BEYOND = 2.5  # bootstraps, for an interval's end to be more than the outermost of them
_FLAT = 30.0  # a factor between an interval's ends beyond which a parameter counts as unknown


@renamed("confidence", "confidence_level")
@dataclasses.dataclass(frozen=True)
class Fit:
    """A law fitted to runs.

    Attributes:
        law: the form.
        params: the best number for each parameter.
        samples: of each parameter over bootstraps, float64[bootstraps]; empty where there are none.
        confidence_level: of intervals, unless another is asked for.
        runs: how many.
        units: how many were resampled: the runs, or groups of them.
        objective: the sum of Huber's loss at the optimum.
        delta: of that loss.
        r2: of the target's logarithm, 1 − Σ r² / Σ (log y − mean)².
        aicc: Akaike's criterion with its correction for few runs, as if residuals were independent and
            normal; `compare` has the one of the likelihood that the fit maximised.
        warnings: what the runs do not tell.
        within: from column to the range of the runs.
    """

    law: Law
    params: Mapping[str, float]
    samples: Mapping[str, np.ndarray]
    confidence_level: float
    runs: int
    units: int
    objective: float
    delta: float
    r2: float
    aicc: float
    warnings: tuple[str, ...]
    within: Mapping[str, tuple[float, float]]

    @renamed("confidence", "confidence_level")
    def interval(self, name: str, confidence_level: float | None = None) -> tuple[float, float]:
        """Returns the expanded percentile interval of a parameter over bootstraps; NaN where there are none.

        It is drawn out to the estimate itself where all resampled runs lead to one side of that.

        Raises:
            ValueError: a parameter that the law has not; a level outside (0, 1).
        """
        if name not in self.params:
            raise ValueError(f"{self.law.name} has {', '.join(self.law.names)}; got {name!r}")
        low, high = percentile_interval(
            self.samples.get(name, np.empty(0)), self.expanded(confidence_level)
        )
        value = float(self.params[name])
        return float(np.minimum(low, value)), float(np.maximum(high, value))

    @renamed("confidence", "confidence_level")
    def expanded(self, confidence_level: float | None = None) -> float:
        """Returns the percentile level for an interval to hold its nominal one; see `intervals.expanded`.

        Raises:
            ValueError: a level outside (0, 1).
        """
        wanted = self.confidence_level if confidence_level is None else confidence_level
        return expanded(wanted, self.units, self.runs, len(self.params))

    def predict(self, runs: Any) -> np.ndarray:
        """Returns the target in nats per token, float64[runs]."""
        return self.law.predict(self.params, runs)

    def __str__(self) -> str:
        lines = [f"{self.law.name}: {self.law.equation}"]
        for name, value in self.params.items():
            low, high = self.interval(name)
            unit = next(p.unit for p in self.law.parameters if p.name == name)
            of = "" if math.isnan(low) else f"  [{low:.4g}, {high:.4g}]"
            lines.append(f"  {name:10} {value:.4g}{of}" + (f"  {unit}" if unit != "1" else ""))
        lines.append(f"  {self.runs} runs, R² {self.r2:.4f}, AICc {self.aicc:.1f}")
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])


@renamed("confidence", "confidence_level")
def fit(
    law: Law,
    runs: Any,
    *,
    starts: int = 64,
    bootstraps: int = 1000,
    confidence_level: float = 0.9,
    delta: float = DELTA,
    groups: str | None = None,
    strata: str | None = None,
    seed: int = 0,
) -> Fit:
    """Fits the parameters with the least Huber loss on log L, Σ_i H_δ(log ŷ_i − log y_i), from many starts.

    Intervals come from refitting resampled runs, each from as many starts; where one of these finds a better
    valley, the fit goes there too.  Runs that share a trunk or a seed are not independent: name the column
    that says which belong together, and they are resampled together.

    Args:
        law: of `jaxquant.laws`.
        runs: a mapping of columns, such as a data frame: those that the law reads, and its target.  Where
            there is ``"entropy_rate"``, losses below it are refused; where there is ``"tokenizer"`` or
            ``"vocab_size"``, it is one.
        starts: of each fit.
        bootstraps: refits; 0 for no intervals.
        confidence_level: of intervals.
        delta: δ of Huber's loss.
        groups: a column of what is resampled together; each run by itself where not given.
        strata: a column within whose values units are resampled, such as N where sizes were chosen and seeds
            drawn; over all units where not given.
        seed: of starts and of resampling.

    Raises:
        ValueError: columns missing, not finite or not positive; no more runs than parameters; a column with
            one value alone, whose exponent nothing tells; losses below the entropy rate; several tokenizers.

    Source: Hoffmann et al. 2022, arXiv 2203.15556, appendix D.2 (Huber on log L, many starts).

    >>> from jaxquant.laws.forms import QID
    >>> rng = np.random.default_rng(0)
    >>> runs = {"N": 10 ** rng.uniform(7, 9, 60), "D": 10 ** rng.uniform(9, 11, 60)}
    >>> runs["P_post"] = rng.choice([2.0, 3.0, 4.0], 60)
    >>> true = {"k": 0.02, "beta": 0.5, "alpha": 0.4, "gamma": 3.0}
    >>> runs["added"] = QID.predict(true, runs)
    >>> found = fit(QID, runs, bootstraps=0)
    >>> {name: round(value, 3) for name, value in found.params.items()}
    {'k': 0.02, 'beta': 0.5, 'alpha': 0.4, 'gamma': 3.0}
    """
    columns, target = check_runs(law, runs)
    check_numbers(starts, bootstraps, delta, seed)
    check_confidence_level(confidence_level)
    place = places(runs, groups, len(target))
    units = int(place.max()) + 1
    layer = strata_of_units(runs, strata, place)
    rng = np.random.default_rng(seed)
    space = Space(law, columns, target)
    with x64():
        own = np.ones((1, len(target)))
        logs, values = space.solve(own, space.starts(rng, 1, starts), delta)
        samples: dict[str, np.ndarray] = {}
        if bootstraps:
            weights = _resampled(rng, place, layer, bootstraps)
            first = space.starts(rng, bootstraps, starts)
            # One start is the fit itself, so that no bootstrap misses its own neighbourhood.
            first[:, 0] = logs[0]
            drawn = space.solve(weights, first, delta)[0]
            samples = space.natural(drawn)
            logs, values = _best(space, own, (logs, values), drawn, starts, delta)
        found = space.natural(logs)
    params = {name: float(column[0]) for name, column in found.items()}
    residual = np.log(law.evaluate(params, columns)) - np.log(target)
    asked = expanded(confidence_level, units, len(target), len(params))
    return Fit(
        law,
        params,
        samples,
        confidence_level,
        len(target),
        units,
        float(values[0]),
        delta,
        r2(residual, np.log(target)),
        squared_aicc(residual, len(law.parameters)),
        (*_warnings(law, space, logs[0], params, samples, asked, target), *doubts(law, runs)),
        {name: (float(c.min()), float(c.max())) for name, c in columns.items()},
    )


class Space:
    """The space of a fit: logarithms of parameters, signed ones as they are, and coefficients as terms at the
    mean of log columns.
    """

    def __init__(self, law: Law, columns: Columns, target: np.ndarray):
        self.law, self.columns, self.target = law, columns, target
        self._middle = tuple(float(np.log(columns[c]).mean()) for c in law.columns)
        self._unit = float(np.log(target).mean())
        self.low = np.array([p.to_fitted(p.low) for p in law.parameters])
        self.high = np.array([p.to_fitted(p.high) for p in law.parameters])

    def starts(self, rng: np.random.Generator, fits: int, starts: int) -> np.ndarray:
        """Returns random starts, float64[fits, starts, parameters]."""
        ends = np.array([p.to_fitted(np.array(p.start)) for p in self.law.parameters])
        return rng.uniform(ends[:, 0], ends[:, 1], (fits, starts, len(ends)))

    def natural(self, logs: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the parameters of some points, each float64[points]."""
        filled = np.stack([filled_up(column) for column in np.asarray(logs).T])
        found = _naturals(self.law, self._middle, self._unit, filled)
        # A compiled function returns a dict in the order of its keys.
        return {name: np.asarray(found[name])[: len(logs)] for name in self.law.names}

    def solve(
        self,
        weights: np.ndarray,
        starts: np.ndarray,
        delta: float,
        low: np.ndarray | None = None,
        high: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (best points [fits, parameters], objectives [fits]); call it within `x64`."""
        # Middle and unit are data, so that one compilation serves every set of as many runs.
        data = self.columns, self._middle, self._unit
        found = solve(
            _predictor(self.law),
            data,
            np.log(self.target),
            weights,
            starts,
            jnp.asarray(self.low if low is None else low),
            jnp.asarray(self.high if high is None else high),
            delta,
        )
        return found


def _natural(law: Law, middle: Any, unit: Any, logs: Any) -> dict[str, Any]:
    """Returns the parameters from logarithms and terms, [parameters, ...]."""
    at = dict(zip(law.columns, middle, strict=True))
    moved = dict(zip(law.names, logs, strict=True))
    found = {p.name: p.from_fitted(moved[p.name]) for p in law.parameters if not p.term}
    for parameter in law.parameters:
        if parameter.term:
            powers = sum(s * found[e] * at[column] for e, column, s in parameter.term)
            found[parameter.name] = jnp.exp(moved[parameter.name] + unit - powers)
    return {name: found[name] for name in law.names}


_naturals = jax.jit(_natural, static_argnums=0)


@functools.lru_cache(maxsize=64)
def _predictor(law: Law) -> Any:
    """Returns (logarithms and terms, data) -> log ŷ: one function for each law, so that it compiles once."""

    def predict(x: jax.Array, data: Any) -> jax.Array:
        columns, middle, unit = data
        return law.log_prediction(_natural(law, middle, unit, x), columns)

    return predict


def _best(
    space: "Space",
    own: np.ndarray,
    found: tuple[np.ndarray, np.ndarray],
    drawn: np.ndarray,
    starts: int,
    delta: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the better of a fit and one restarted from the bootstraps, which may escape its valley."""
    chosen = drawn[np.linspace(0, len(drawn) - 1, starts).astype(int)]
    other = space.solve(own, chosen[None], delta)
    return other if other[1][0] < found[1][0] else found


def _resampled(
    rng: np.random.Generator, place: np.ndarray, layer: np.ndarray, bootstraps: int
) -> np.ndarray:
    """Returns how often each run counts in each bootstrap, float64[bootstraps, runs]."""
    counts = np.zeros((bootstraps, len(layer)))
    for one in np.unique(layer):
        members = np.flatnonzero(layer == one)
        even = np.full(len(members), 1 / len(members))
        counts[:, members] = rng.multinomial(len(members), even, bootstraps)
    return counts[:, place]


def check_numbers(starts: Any, bootstraps: Any, delta: Any, seed: Any) -> None:
    """Raises a ValueError for numbers that no fit could take."""
    for name, value, least in (
        ("starts", starts, 1),
        ("bootstraps", bootstraps, 0),
        ("seed", seed, 0),
    ):
        check_whole(name, value, least)
    check_positive("delta", delta)


def r2(residual: np.ndarray, log_target: np.ndarray) -> float:
    """Returns 1 − Σ r² / Σ (log y − mean)²."""
    total = float(np.sum((log_target - log_target.mean()) ** 2))
    return 1 - float(np.sum(residual**2)) / total if total else math.nan


def _warnings(
    law: Law,
    space: Space,
    logs: np.ndarray,
    params: Values,
    samples: Values,
    confidence_level: float,
    target: np.ndarray,
) -> tuple[str, ...]:
    """Returns warnings about parameters that the runs do not identify."""
    said = []
    for i, parameter in enumerate(law.parameters):
        name, value = parameter.name, params[parameter.name]
        ends = {"lower": space.low[i], "upper": space.high[i]}
        held = [side for side, end in ends.items() if abs(logs[i] - end) < _NEAR_BOUND]
        if held:
            said.append(f"{name} = {value:.3g} sits on its {held[0]} bound: not determined")
        elif len(samples):
            low, high = percentile_interval(samples[name], confidence_level)
            is_plain = not (parameter.term or parameter.is_signed)
            if is_plain and high > _FLAT * low:
                said.append(f"{name} is between {low:.3g} and {high:.3g}: hardly determined")
    if "E" in params and law.target == "loss" and params["E"] < 0.05 * float(target.min()):
        said.append(
            f"E = {params['E']:.3g} is next to nothing: the runs do not tell the entropy from the power laws"
        )
    for name in ("alpha", "beta"):
        if name in params and params[name] < 0.05:
            said.append(f"{name} = {params[name]:.3g} is next to a logarithm: not identified")
    count = len(next(iter(samples.values()), ()))
    beyond = count * (1 - confidence_level) / 2
    if samples and beyond < _LEAST_BEYOND:
        said.append(
            f"{count} bootstraps leave {beyond:.2g} beyond each end of an interval: take 1000"
        )
    return tuple(said)


def values_of(law: Law, params: Values) -> dict[str, float]:
    """Returns checked parameters as floats."""
    check_params(law, params)
    return {name: float(params[name]) for name in law.names}

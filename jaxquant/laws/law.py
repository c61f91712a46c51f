"""Laws: named parameters with bounds and units, and a pure function of them and of runs."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.checks import check_number

Values = Mapping[str, Any]  # a number for each parameter, or an array for each column
Columns = dict[str, np.ndarray]

_ABSURD = 1e6  # nats
_FEWEST_ROWS = 192

COLUMNS = {
    "N": "parameters without embeddings",
    "D": "training tokens",
    "P_w": "bits of weights in training",
    "P_a": "bits of activations in training",
    "P_kv": "bits of keys and values in training",
    "P_post": "bits that weights are served at",
    "P_forward": "bits of the forward products",
    "P_backward": "bits of the gradients' products",
    "P_state": "bits of the optimizer's state",
    "exponent_bits": "of a floating-point format",
    "mantissa_bits": "of a floating-point format",
    "block": "elements that share a scale",
    "loss": "validation loss, nats per token",
    "loss_full": "the loss of the same run in full precision, nats per token",
    "added": "loss added by quantizing after training, nats per token",
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a law, fitted between bounds: by its logarithm where it is positive, else by itself.

    The coefficient of a power law means little by itself: its logarithm moves with the exponent, since runs
        are far from N = 1.  So a fit takes the term that it makes at the runs' middle instead, in units of
        the target's middle; `term` says how, and bounds and starts are of that.

    Attributes:
        name: as in the source.
        low, high: what a fit keeps it, or its term, within.
        start: the range, (low, high), that a fit's starts are drawn from, evenly in the logarithm.
        unit: of its value.
        term: what multiplies it there: (exponent, column, sign) for each power column^(sign · exponent).
        is_signed: whether it may be zero or negative.
    """

    name: str
    low: float
    high: float
    start: tuple[float, float]
    unit: str = "1"
    term: tuple[tuple[str, str, int], ...] = ()
    is_signed: bool = False

    def __post_init__(self):
        least, most = self.start
        bottom = -math.inf if self.is_signed else 0
        if not bottom < self.low <= least <= most <= self.high < math.inf:
            needed = "low ≤ start ≤ high" if self.is_signed else "0 < low ≤ start ≤ high"
            raise ValueError(
                f"{self.name} needs {needed}; got low {self.low}, start {self.start}, high {self.high}"
            )

    def to_fitted(self, value: Any) -> Any:
        """Returns the number that a fit moves: the logarithm, or the value itself where it is signed."""
        return value if self.is_signed else np.log(value)

    def from_fitted(self, value: Any) -> Any:
        """Returns the parameter, or its term, of the number that a fit moves."""
        return value if self.is_signed else jnp.exp(value)


@dataclasses.dataclass(frozen=True)
class Law:
    """A scaling law as data.

    Attributes:
        name: in a word or two.
        equation: as text.
        parameters: what is fitted.
        log_prediction: (parameters, columns) -> the target's natural logarithm, by run.
        columns: what it reads of each run, of `COLUMNS`.
        target: what it predicts, ``"loss"`` or ``"added"``.
        source: paper, section.
        efficiency: (parameters, bits) -> f(P), the part of N that counts where weights, activations and cache
            all have P bits; None where the law has no such number.
        widths: where f is known at these bits and at full precision alone; None where it is at any.
        pass_widths: (of forward, of backward products), where a law of both passes is known at these bits and
            at full precision alone; None where it is at any, or of other bits.
        check_bits: raises a ValueError for columns whose bits it says nothing of; None where it is of any.
        check_fit: the same for columns that it cannot be fitted to.
    """

    name: str
    equation: str
    parameters: tuple[Parameter, ...]
    log_prediction: Callable[[Values, Values], jax.Array]
    columns: tuple[str, ...]
    source: str
    target: str = "loss"
    efficiency: Callable[[Values, Any], Any] | None = None
    widths: tuple[int, ...] | None = None
    pass_widths: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    check_bits: Callable[[Columns], None] | None = None
    check_fit: Callable[[Columns], None] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    def predict(self, params: Values, runs: Any) -> np.ndarray:
        """Returns the target in nats per token, float64[runs].

        Args:
            params: a number for each parameter.
            runs: a mapping of columns, such as a data frame.

        Raises:
            ValueError: parameters or columns that are missing or not finite; bits at which the law has no
                finite value, or an efficiency of next to nothing.

        >>> from jaxquant.laws.constants import KUMAR_2024
        >>> runs = {"N": [1e8], "D": [2e9], "P_w": [16.0], "P_a": [16.0], "P_kv": [16.0]}
        >>> KUMAR_2024.law.predict(KUMAR_2024.params, runs).round(3)
        array([3.66])
        """
        check_params(self, params)
        columns = read_columns(runs, self.columns)
        if self.check_bits is not None:
            self.check_bits(columns)
        found = self.evaluate(params, columns)
        bad = np.flatnonzero(~(found < _ABSURD))
        if bad.size:
            run = {name: float(column[bad[0]]) for name, column in columns.items()}
            raise ValueError(
                f"{self.name} has no value for run {bad[0]}, {run}: there its efficiency is next to nothing"
            )
        return found

    def evaluate(self, params: Values, columns: Columns) -> np.ndarray:
        """Returns `predict` without its checks."""
        names = [*columns]
        arrays = np.broadcast_arrays(*(np.asarray(columns[n], np.float64) for n in names))
        shape = arrays[0].shape
        flat = {n: filled_up(a.ravel()) for n, a in zip(names, arrays, strict=True)}
        numbers = {name: np.float64(value) for name, value in params.items()}
        with x64():
            found = np.asarray(_compiled(self)(numbers, flat))
        return np.exp(found[: math.prod(shape)]).reshape(shape)


def filled_up(column: np.ndarray) -> np.ndarray:
    """Returns a column with its last value again, up to one of a few lengths.

    So about as many runs share a compiled program.  Lengths are 192, 384, 768 and on.

    >>> [len(filled_up(np.ones(n))) for n in (1, 192, 193)]
    [192, 192, 384]
    """
    length = _FEWEST_ROWS
    while length < len(column):
        length *= 2
    return np.pad(column, (0, length - len(column)), mode="edge")


@functools.lru_cache(maxsize=64)
def _compiled(law: Law) -> Callable[[Values, Values], jax.Array]:
    return jax.jit(lambda params, columns: law.log_prediction(params, columns))


@contextlib.contextmanager
def x64() -> Iterator[None]:
    """Enables float64, which near-degenerate laws need, and NumPy's broadcasting."""
    own = getattr(jax, "enable_x64", None)
    if own is None:  # before jax 0.8
        from jax.experimental import enable_x64 as own  # pyright: ignore[reportAttributeAccessIssue]
    with own(True), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def check_law(law: Any) -> None:
    """Raises a ValueError for what is no law."""
    if not isinstance(law, Law):
        raise ValueError(
            f"a law is one of jaxquant.laws, as laws.KUMAR; got {str(law)[:100]!r} of type "
            f"{type(law).__name__}"
        )


def check_params(law: Law, params: Any) -> None:
    """Raises a ValueError unless each parameter has a finite number, of at least 0 if it is not signed."""
    if not isinstance(params, Mapping):
        raise ValueError(f"params map {', '.join(law.names)} to numbers; got {params!r}")
    missing, unknown = set(law.names) - set(params), set(params) - set(law.names)
    if missing or unknown:
        what = f"missing: {sorted(missing)}" if missing else f"unknown: {sorted(unknown)}"
        raise ValueError(f"{law.name} has the parameters {', '.join(law.names)}; {what}")
    for parameter in law.parameters:
        least = -math.inf if parameter.is_signed else 0
        check_number(f"{parameter.name} of {law.name}", params[parameter.name], least)


def read_columns(runs: Any, names: tuple[str, ...]) -> Columns:
    """Returns columns of runs as float64 arrays of one length.

    Raises:
        ValueError: a column that is missing, of another length, or holds what is no positive finite number.
    """
    found: Columns = {}
    for name in names:
        try:
            column = runs[name]
        except (KeyError, IndexError, TypeError, ValueError):
            known = f" ({COLUMNS[name]})" if name in COLUMNS else ""
            raise ValueError(f"runs have no column {name!r}{known}") from None
        try:
            if np.asarray(column).dtype.kind not in "iufO":  # complex, text, booleans
                raise TypeError
            found[name] = np.atleast_1d(np.asarray(column, np.float64))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"column {name!r} holds numbers; got {str(column)[:100]}") from None
        bad = np.flatnonzero(~(np.isfinite(found[name]) & (found[name] > 0)))
        if found[name].ndim != 1 or bad.size:
            where = f"run {bad[0]} has {found[name][bad[0]]}" if bad.size else "it has several axes"
            raise ValueError(f"column {name!r} holds positive finite numbers, one a run; {where}")
    lengths = {name: len(column) for name, column in found.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns have one length; got {lengths}")
    return found


def log_sum(*terms: Any) -> jax.Array:
    """Returns log Σ exp(term)."""
    return jax.nn.logsumexp(jnp.stack(jnp.broadcast_arrays(*map(jnp.asarray, terms))), axis=0)

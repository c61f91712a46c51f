"""Bound the values of a traced program for all possible arguments, by abstract interpretation.

Each value has an interval that contains all of its elements.  If a value is linear in some arguments,
element by element, its coefficients are tracked too.  Intervals alone are not enough: v + 0.1 (g² − v)
equals 0.9 v + 0.1 g², so it is non-negative if v is, and only the coefficients show it.  The bound of an
unknown value is the whole line.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxquant.optim.tracing import Operation, Program

Interval = tuple[float, float]


def names_of(text: str) -> frozenset[str]:
    """Splits a text into the names of operations."""
    return frozenset(text.split())


ANYTHING: Interval = (-math.inf, math.inf)
ZERO: Interval = (0.0, 0.0)
NON_NEGATIVE: Interval = (0.0, math.inf)


@dataclasses.dataclass(frozen=True)
class Bound:
    """The bound of a value: it lies within `whole`, and within Σ coefficients · arguments + `rest`.

    Attributes:
        whole: an interval that contains every element.
        linear: the coefficients of arguments, by number.  An argument that is not listed affects an element
            only through sums over elements and through comparisons.
        rest: the interval of the remainder.
    """

    whole: Interval
    linear: Mapping[int, Interval] = dataclasses.field(default_factory=dict)
    rest: Interval = ANYTHING


def bounds_of(
    program: Program, given: Mapping[int, Interval], linear: frozenset[int] = frozenset()
) -> list[Bound]:
    """Returns the bounds of every value of a program.

    Args:
        program: a traced program.
        given: the intervals of its inputs.  Inputs that are not listed are unbounded.
        linear: the inputs whose coefficients are tracked.

    >>> program = Program(lambda v, g: v + 0.1 * (g * g - v), 1.0, 1.0)
    >>> v, _ = program.inputs
    >>> found = bounds_of(program, {v: NON_NEGATIVE}, frozenset([v]))[program.outputs[0]]
    >>> found.whole[0], found.linear[v]
    (0.0, (0.9, 0.9))
    """
    found: list[Any] = [Bound(ANYTHING)] * len(program.specs)
    terms = {n: given.get(n, ANYTHING) for n in program.inputs}
    for number, whole in terms.items():
        found[number] = _term(number, whole) if number in linear else _plain(whole)
    for number, value in program.constants.items():
        found[number] = _plain(of_constant(value))
    for operation in program.operations:
        operands = [found[n] for n in operation.inputs]
        whole = _whole(program, operation, found)
        form = _form(operation, operands, linear)
        for number in operation.outputs:
            kept = _held(program.specs[number].dtype, whole)
            if form is None and operation.name in _SQUARES:
                terms[number] = kept
                found[number] = _term(number, kept)
            else:
                found[number] = _joined(kept, form or Bound(ANYTHING), terms)
    return found


def of_constant(value: Any) -> Interval:
    """Returns the interval of a known value."""
    dtype = getattr(value, "dtype", np.result_type(type(value)))
    is_number = any(jnp.issubdtype(dtype, t) for t in (np.floating, np.integer, np.bool_))
    if isinstance(value, Tracer) or not is_number:
        return ANYTHING
    array = np.asarray(value).astype(np.float64)
    if array.size == 0 or np.isnan(array).any():
        return ANYTHING
    return float(array.min()), float(array.max())


def _held(dtype: Any, whole: Interval) -> Interval:
    """Restricts an interval to the values of a type."""
    if jnp.issubdtype(dtype, np.floating):
        return whole
    if jnp.issubdtype(dtype, np.bool_):
        return max(whole[0], 0.0), min(whole[1], 1.0)
    if jnp.issubdtype(dtype, np.unsignedinteger):
        return NON_NEGATIVE
    if jnp.issubdtype(dtype, np.signedinteger):  # conversion truncates non-integers
        low, high = whole
        return _finite(math.floor, low), _finite(math.ceil, high)
    return ANYTHING


def _finite(function: Callable[[float], float], x: float) -> float:
    return function(x) if math.isfinite(x) else x


def _plain(whole: Interval) -> Bound:
    return Bound(whole, {}, whole)


def _term(number: int, whole: Interval) -> Bound:
    """Returns the bound of a value that is a variable of linear forms."""
    return Bound(whole, {number: (1.0, 1.0)}, ZERO)


def _joined(whole: Interval, form: Bound, inputs: Mapping[int, Interval]) -> Bound:
    """Combines the interval and the linear form of a value."""
    total = form.rest
    for number, coefficient in form.linear.items():
        total = add(total, multiply(coefficient, inputs[number]))
    low, high = max(whole[0], total[0]), min(whole[1], total[1])
    if low > high:  # the two differ by a rounding error
        low, high = min(whole[0], total[0]), max(whole[1], total[1])
    rest = form.rest if form.linear else (low, high)
    return Bound((low, high), form.linear, rest)


# ---------------------------------------------------------------------------------------------------
# Arithmetic of intervals


def add(x: Interval, y: Interval) -> Interval:
    """Returns the interval of x + y."""
    found = x[0] + y[0], x[1] + y[1]
    return ANYTHING if any(map(math.isnan, found)) else found


def negative(x: Interval) -> Interval:
    """Returns the interval of −x."""
    return -x[1], -x[0]


def multiply(x: Interval, y: Interval) -> Interval:
    """Returns the interval of x · y; zero times anything is zero."""
    found = [a * b if a and b else 0.0 for a in x for b in y]
    return min(found), max(found)


def hull(intervals: Sequence[Interval]) -> Interval:
    """Returns the smallest interval that contains all of the given ones."""
    return min(x[0] for x in intervals), max(x[1] for x in intervals)


def reciprocal(x: Interval) -> Interval:
    """Returns the interval of 1 / x."""
    if x[0] < 0 < x[1] or x == ZERO:
        return ANYTHING
    ends = [1 / end if end else math.inf for end in x]
    if x[1] == 0:
        ends[1] = -math.inf
    return min(ends), max(ends)


def power(x: Interval, y: Interval) -> Interval:
    """Returns the interval of x^y for non-negative x.  The extremes are at corners of the rectangle."""
    if x[0] < 0:
        return ANYTHING
    with np.errstate(all="ignore"):
        found = [float(np.power(np.float64(a), np.float64(b))) for a in x for b in y]
    return NON_NEGATIVE if any(map(math.isnan, found)) else (min(found), max(found))


def integer_power(x: Interval, exponent: int) -> Interval:
    """Returns the interval of x^n."""
    if exponent < 0:
        return reciprocal(integer_power(x, -exponent))
    with np.errstate(all="ignore"):
        ends = [float(np.power(np.float64(end), exponent)) for end in x]
    if exponent % 2 == 0 and x[0] < 0 < x[1]:
        ends.append(0.0)
    return min(ends), max(ends)


def _absolute(x: Interval) -> Interval:
    ends = abs(x[0]), abs(x[1])
    return (0.0 if x[0] <= 0 <= x[1] else min(ends)), max(ends)


def _increasing(function: Callable[[float], float]) -> Callable[[Interval], Interval]:
    def image(x: Interval) -> Interval:
        with np.errstate(all="ignore"):
            low, high = (float(function(np.float64(end))) for end in x)
        return ANYTHING if math.isnan(low) or math.isnan(high) else (low, high)

    return image


def _root(x: Interval) -> Interval:
    """Returns the interval of √x; negative values give NaN and are ignored."""
    return math.sqrt(max(x[0], 0.0)), math.sqrt(max(x[1], 0.0))


# The interval of each operation's result, from the intervals of its operands.
_RULES: dict[str, Callable[..., Interval]] = {
    "add": add,
    "add_any": add,
    "sub": lambda x, y: add(x, negative(y)),
    "neg": negative,
    "mul": multiply,
    "div": lambda x, y: multiply(x, reciprocal(y)),
    "max": lambda x, y: (max(x[0], y[0]), max(x[1], y[1])),
    "min": lambda x, y: (min(x[0], y[0]), min(x[1], y[1])),
    "clamp": lambda low, x, high: (
        min(max(x[0], low[0]), high[0]),
        min(max(x[1], low[1]), high[1]),
    ),
    "abs": _absolute,
    "square": lambda x: integer_power(x, 2),
    "sqrt": _root,
    "rsqrt": lambda x: reciprocal(_root(x)),
    "cbrt": _increasing(np.cbrt),
    "pow": power,
    "exp": _increasing(np.exp),
    "exp2": _increasing(np.exp2),
    "log1p": _increasing(np.log1p),
    "log": lambda x: _increasing(np.log)((max(x[0], 0.0), max(x[1], 0.0))),
    "expm1": _increasing(np.expm1),
    "tanh": _increasing(np.tanh),
    "logistic": lambda x: (0.0, 1.0),
    "sign": lambda x: (float(np.sign(x[0])), float(np.sign(x[1]))),
    "floor": _increasing(np.floor),
    "ceil": _increasing(np.ceil),
    "round": _increasing(np.round),
    "select_n": lambda which, *cases: hull(cases),
    "concatenate": lambda *x: hull(x),
    "pad": lambda x, filler: hull((x, filler)),
    "argmax": lambda x: NON_NEGATIVE,
    "argmin": lambda x: NON_NEGATIVE,
    "iota": lambda: NON_NEGATIVE,
}
# The values of these operations' results are among those of the operand.
_SAME = names_of(
    "broadcast_in_dim convert_element_type copy copy_p expand_dims optimization_barrier real "
    "reduce_max reduce_min reduce_precision reshape rev slice dynamic_slice sort squeeze "
    "stop_gradient transpose cummax cummin"
)
_SUMS = frozenset(("reduce_sum", "cumsum", "reduce_window_sum"))
_PRODUCTS = frozenset(("dot_general", "conv_general_dilated"))
_ORDERS: dict[str, Callable[[Interval, Interval], Interval]] = {
    "gt": lambda x, y: (float(x[0] > y[1]), float(x[1] > y[0])),
    "ge": lambda x, y: (float(x[0] >= y[1]), float(x[1] >= y[0])),
    "lt": lambda x, y: (float(x[1] < y[0]), float(x[0] < y[1])),
    "le": lambda x, y: (float(x[1] <= y[0]), float(x[0] <= y[1])),
    "eq": lambda x, y: (float(x[0] == x[1] == y[0] == y[1]), float(x[0] <= y[1] and y[0] <= x[1])),
    "ne": lambda x, y: (float(x[1] < y[0] or y[1] < x[0]), float(not x[0] == x[1] == y[0] == y[1])),
}
_COMPARISONS = names_of("eq ne lt le gt ge is_finite not and or xor reduce_and reduce_or")


def _whole(program: Program, operation: Operation, bounds: Sequence[Bound]) -> Interval:
    name, x = operation.name, [bounds[n].whole for n in operation.inputs]
    if name == "mul":
        return _product(program, operation, bounds)
    if name == "integer_pow":
        return integer_power(x[0], operation.params["y"])
    if name == "select_n" and x[0][0] == x[0][1]:
        return x[1 + int(x[0][0])]
    if name in _ORDERS:
        return _ORDERS[name](*x)
    if name in _RULES:
        return _RULES[name](*x)
    if name in _SAME and len(operation.outputs) == 1:
        return x[0]
    if name in _SUMS or name in _PRODUCTS:
        # The number of terms is unknown here, so only the sign is kept.
        return multiply(x[0] if name in _SUMS else multiply(x[0], x[1]), NON_NEGATIVE)
    return ANYTHING


def _product(program: Program, operation: Operation, bounds: Sequence[Bound]) -> Interval:
    """Returns the interval of a product.  A factor that occurs twice is squared."""
    plain = multiply(*(bounds[n].whole for n in operation.inputs))
    factors = collections.Counter(n for x in operation.inputs for n in _factors(program, x))
    if max(factors.values()) == 1:
        return plain
    found = (1.0, 1.0)
    for number, count in factors.items():
        found = multiply(found, integer_power(bounds[number].whole, count))
    return max(plain[0], found[0]), min(plain[1], found[1])


def _factors(program: Program, value: int) -> list[int]:
    maker = program.makers.get(value)
    if maker is None or maker.name != "mul":
        return [value]
    return [n for x in maker.inputs for n in _factors(program, x)]


# ---------------------------------------------------------------------------------------------------
# Linear forms

# Each element of the result is one element of the operand, with the same value.
_MOVES = names_of(
    "broadcast_in_dim convert_element_type copy copy_p expand_dims optimization_barrier real "
    "reduce_precision reshape rev squeeze stop_gradient transpose"
)
# Reductions and comparisons are not linear element by element.
_NOT_LINEAR = (
    _SUMS
    | _PRODUCTS
    | _COMPARISONS
    | names_of("reduce_max reduce_min reduce_prod sort argmax argmin sign floor ceil round")
)


# Results of these operations without a linear form become variables of linear forms.
_SQUARES = frozenset(["mul", "square", "integer_pow", "abs", "pow"])


def _form(operation: Operation, x: Sequence[Bound], given: frozenset[int]) -> Bound | None:
    """Returns the linear form of an operation's result; None if it has none and contains no given input."""
    name = operation.name
    if name in _NOT_LINEAR or not any(operand.linear for operand in x):
        return None
    if name in _MOVES:
        return x[0]
    if name in ("add", "add_any"):
        return _sum(x[0], x[1])
    if name == "sub":
        return _sum(x[0], _scaled(x[1], (-1.0, -1.0)))
    if name == "neg":
        return _scaled(x[0], (-1.0, -1.0))
    own = [given.intersection(operand.linear) for operand in x]
    if name == "mul" and not own[1] and (own[0] or _is_known(x[1])):
        return _scaled(x[0], x[1].whole)
    if name == "mul" and not own[0] and (own[1] or _is_known(x[0])):
        return _scaled(x[1], x[0].whole)
    if name == "div" and not own[1]:
        return _scaled(x[0], reciprocal(x[1].whole))
    if name == "select_n" and _is_known(x[0]):
        return x[1 + int(x[0].whole[0])]
    if name in ("select_n", "max", "min", "clamp"):
        return _either(x[1:] if name == "select_n" else x)
    unknown = frozenset().union(*own)
    return Bound(ANYTHING, dict.fromkeys(unknown, ANYTHING)) if unknown else None


def _is_known(x: Bound) -> bool:
    return x.whole[0] == x.whole[1]


def _scaled(x: Bound, factor: Interval) -> Bound:
    linear = {number: multiply(c, factor) for number, c in x.linear.items()}
    return Bound(ANYTHING, linear, multiply(x.rest, factor))


def _sum(x: Bound, y: Bound) -> Bound:
    both = {*x.linear, *y.linear}
    linear = {n: add(x.linear.get(n, ZERO), y.linear.get(n, ZERO)) for n in both}
    return Bound(ANYTHING, linear, add(x.rest, y.rest))


def _either(cases: Sequence[Bound]) -> Bound:
    both = {number for case in cases for number in case.linear}
    linear = {n: hull([case.linear.get(n, ZERO) for case in cases]) for n in both}
    return Bound(ANYTHING, linear, hull([case.rest for case in cases]))

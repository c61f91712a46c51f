"""`Tapped`: a product that tells what its quantizers do, to its operands and to both of its gradients.

A tap is a tree of zeros that a product takes beside its operands and does not use.  Its derivative is what
was measured: J = f(tap, x) has ∂J/∂tap = statistics, and the same J, ∂J/∂x and bits as without it.  So
statistics come out of jit, scan, remat, cond and vmap as gradients do.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxquant.numerics import rounding
from jaxquant.numerics.measuring import Quantized, Sums, measure, zero_sums
from jaxquant.numerics.qarray import QArray, quantize
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.operations.backward import BackwardOperands, rotated_gradient
from jaxquant.operations.conv import DRHS_KEY
from jaxquant.operations.dot import DotGeneral, carry_scale, gradient_numbers
from jaxquant.operations.native import wide
from jaxquant.operations.operands import DimensionNumbers, Operands, as_tuples
from jaxquant.operations.ragged import by_row, in_groups
from jaxquant.operations.windows import Window, all_but, window_of


class Four(NamedTuple):
    """The operands of a product, and its incoming gradient as the products for ∂lhs and ∂rhs use it."""

    lhs: Any
    rhs: Any
    dlhs: Any
    drhs: Any


def blank(turns: tuple[int, ...] = ()) -> Four:
    """Returns a tap.

    Args:
        turns: axes in front.
    """
    return Four(*[zero_sums(turns)] * 4)


@dataclasses.dataclass(frozen=True)
class Tapped(DotGeneral):
    """A `DotGeneral` with a tap.

    Attributes:
        tap: of `blank`.
        cached: the right operand before a cache held it, where one did.
    """

    tap: Any = None
    cached: Quantized | None = None

    def __call__(
        self,
        lhs: jax.Array | QArray,
        rhs: jax.Array | QArray,
        dimension_numbers: DimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Multiplies as `DotGeneral`."""
        plain = DotGeneral(self.forward, self.dlhs, self.drhs)
        options = precision, preferred_element_type, out_sharding
        out = plain(lhs, rhs, dimension_numbers, *options)
        return _dot(self, out, lhs, rhs, as_tuples(dimension_numbers))

    def of_cached(self, cached: Quantized) -> "Tapped":
        """Returns the same whose right operand is what a cache gives back of another."""
        return dataclasses.replace(self, cached=cached)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(
    incoming: Callable[[Any, jax.Array], Any], tap: Four, out: jax.Array, operands: Any, rest: Any
) -> jax.Array:
    """Returns a product's result.

    Args:
        incoming: from (rest, gradient) to the gradient as each of the two products quantizes it; static.
        tap: the product's.
        out: the result.
        operands: a pair of what is quantized, or None.
        rest: what `incoming` needs.
    """
    del incoming, tap, operands, rest
    return out


def _forward(incoming: Any, tap: Four, out: jax.Array, operands: Any, rest: Any) -> Any:
    del incoming, tap
    with jax.named_scope("monitor"):
        return out, ([_measure(x) for x in operands], rest)


def _backward(incoming: Any, residuals: Any, gradient: jax.Array) -> Any:
    forward, rest = residuals
    with jax.named_scope("monitor"):
        return (
            Four(*forward, *[_measure(x) for x in incoming(rest, gradient)]),
            gradient,
            None,
            None,
        )


_tap.defvjp(_forward, _backward)


def _measure(tensor: Quantized | None) -> Sums:
    return zero_sums() if tensor is None else measure(tensor)


def _as_quantized(gradient: jax.Array, operands: Operands | None, axes: Any, key: Any) -> Quantized:
    """Returns a gradient as a product of `operands` quantizes it."""
    return Quantized(gradient, None if operands is None else operands.lhs, tuple(axes), key)


# ---------------------------------------------------------------------------------------------------
# The gradient as each of a product's two gradients quantizes it


def _dot(dot: Tapped, out: jax.Array, lhs: Any, rhs: Any, dims: Any) -> jax.Array:
    """Returns a product's result with its tap."""
    incoming, (left, right), rest = quantized_by(dot, lhs, rhs, dims)
    operands = left, right if dot.cached is None else dot.cached
    return _tap(incoming, dot.tap, out, *jax.lax.stop_gradient((operands, rest)))


def quantized_by(dot: DotGeneral, lhs: Any, rhs: Any, dims: Any) -> tuple[Any, Any, Any]:
    """Returns what a matrix product quantizes.

    Args:
        dot: how it is computed.
        lhs, rhs: its operands.
        dims: its dimension numbers, as `as_tuples` gives them.

    Returns:
        A static function from (rest, gradient) to the gradient as each of both gradients' products quantizes
        it, None where there is none; the operands as the forward product quantizes them; and `rest`.
    """
    forward = dot.forward
    operands = Quantized(lhs, forward.lhs, dims[0][0]), Quantized(rhs, forward.rhs, dims[0][1])
    numbers = [gradient_numbers(dims, (lhs.ndim, rhs.ndim), side) for side in (0, 1)]
    others = (
        _carried(dot.dlhs, rhs, forward.rhs, forward.arithmetic, dims[0][1]),
        _carried(dot.drhs, lhs, forward.lhs, forward.arithmetic, dims[0][0]),
    )
    is_stored = isinstance(lhs, QArray), isinstance(rhs, QArray)
    incoming = functools.partial(_of_dot, numbers, is_stored)
    return incoming, operands, ((dot.dlhs, dot.drhs), others)


def _of_dot(
    numbers: Any, is_stored: tuple[bool, bool], rest: Any, gradient: jax.Array
) -> Iterator[Quantized | None]:
    for side, (operands, other) in enumerate(zip(*rest, strict=True)):
        if is_stored[side]:
            yield None
            continue
        if isinstance(operands, BackwardOperands):
            axes = numbers[side][0][side]
            own, key = rotated_gradient(operands, gradient, axes, side)
            yield _as_quantized(own, operands, axes, key)
            continue
        own = gradient if other is None else carry_scale(gradient, other, numbers[side], side)[0]
        key = functools.partial(rounding.key_of, seed=side)  # as the product itself draws
        yield _as_quantized(own, operands, numbers[side][0][side], key)


def _carried(
    operands: Operands | None,
    x: Any,
    quantizer: Quantizer | None,
    arithmetic: str,
    axes: tuple[int, ...],
) -> QArray | None:
    """Returns the operand of a gradient's product as stored, so that its scales move to the gradient.

    Args:
        operands: of the gradient's product.
        x: the forward product's operand.
        quantizer: of it there.
        arithmetic: there.
        axes: that it is summed over there.
    """
    if operands is None or operands.arithmetic != "native" or operands.rhs is not None:
        return None
    if isinstance(x, QArray):
        return x if arithmetic == "native" else None
    return quantize(x, quantizer, axes) if quantizer and arithmetic == "native" else None


def convolution(
    dot: DotGeneral,
    gradients: Sequence[Operands | None],
    out: jax.Array,
    left: tuple[Any, tuple[int, ...]],
    right: tuple[Any, tuple[int, ...]],
    settings: Mapping[str, Any],
) -> jax.Array:
    """Returns a convolution's result with the tap of the `DotGeneral` that it was made of, if any.

    Args:
        dot: a `DotGeneral` or `Tapped`.
        gradients: the operands of ∂lhs and of ∂rhs.
        out: the result.
        left, right: operands, and the axes that they are summed over.
        settings: the other arguments, by name.
    """
    if not isinstance(dot, Tapped):
        return out
    window = window_of(
        left[0].shape,
        right[0].shape,
        settings["window_strides"],
        settings["padding"],
        settings["lhs_dilation"],
        settings["rhs_dilation"],
        settings["dimension_numbers"],
        (settings["feature_group_count"], settings["batch_group_count"]),
    )
    forward, (dlhs, drhs) = dot.forward, gradients
    operands = (
        Quantized(left[0], forward.lhs, left[1]),
        Quantized(right[0], forward.rhs, right[1]),
    )
    others = (
        _carried(dlhs, right[0], forward.rhs, forward.arithmetic, right[1]),
        _carried(drhs, left[0], forward.lhs, forward.arithmetic, left[1]),
    )
    rest = (dlhs, drhs), [None if x is None else x.float_scale() for x in others]
    incoming = functools.partial(_of_conv, window, isinstance(right[0], QArray))
    return _tap(incoming, dot.tap, out, *jax.lax.stop_gradient((operands, rest)))


def _of_conv(
    window: Window, is_stored: bool, rest: Any, gradient: jax.Array
) -> Iterator[Quantized | None]:
    (dlhs, drhs), (rhs_scale, lhs_scale) = rest
    wider, features = wide(gradient.dtype), gradient.shape[window.out_spec[1]]
    own = gradient
    if rhs_scale is not None:
        own = gradient.astype(wider) * window.rhs_scale(rhs_scale).astype(wider)
    yield _as_quantized(own, dlhs, all_but(window.out_spec[0], gradient.ndim), rounding.key_of)
    if is_stored:
        yield None
        return
    own = gradient
    if lhs_scale is not None:
        own = gradient.astype(wider) * window.lhs_scale(lhs_scale, features).astype(wider)
    is_native = drhs is not None and drhs.arithmetic == "native"
    key = DRHS_KEY if is_native else rounding.key_of
    yield _as_quantized(own, drhs, all_but(window.out_spec[1], gradient.ndim), key)


def ragged(
    dot: DotGeneral, out: jax.Array, lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """Returns the result of a `RaggedDot`, likewise; rows of no group take no part.

    Args:
        dot: a `DotGeneral` or `Tapped`.
        out: the result.
        lhs, rhs, group_sizes: the product's operands.
    """
    if not isinstance(dot, Tapped):
        return out
    forward, lhs = dot.forward, in_groups(lhs, group_sizes)
    operands = Quantized(lhs, forward.lhs, (1,)), Quantized(rhs, forward.rhs, (1,))
    others = (
        _carried(dot.dlhs, rhs, forward.rhs, forward.arithmetic, (1,)),
        _carried(dot.drhs, lhs, forward.lhs, forward.arithmetic, (1,)),
    )
    scales = [None if x is None else x.float_scale() for x in others]
    rest = (dot.dlhs, dot.drhs), scales, group_sizes
    return _tap(_of_ragged, dot.tap, out, *jax.lax.stop_gradient((operands, rest)))


def _of_ragged(rest: Any, gradient: jax.Array) -> Iterator[Quantized]:
    (dlhs, drhs), (rhs_scale, lhs_scale), group_sizes = rest
    gradient, wider = in_groups(gradient, group_sizes), wide(gradient.dtype)
    own = gradient
    if rhs_scale is not None:
        carried = by_row(rhs_scale, group_sizes, gradient.shape[0])
        own = gradient.astype(wider) * carried.astype(wider)
    yield _as_quantized(own, dlhs, (1,), functools.partial(rounding.key_of, seed=1))
    own = gradient if lhs_scale is None else gradient.astype(wider) * lhs_scale.astype(wider)
    yield _as_quantized(own, drhs, (0,), functools.partial(rounding.key_of, seed=0))


def lookup(dot: DotGeneral, out: jax.Array, table: Any) -> jax.Array:
    """Returns rows of a table, likewise: the table is the right operand, and its gradient is in float.

    Args:
        dot: a `DotGeneral` or `Tapped`.
        out: the rows.
        table: as it was before it was quantized, or stored.
    """
    if not isinstance(dot, Tapped):
        return out
    operands = None, Quantized(table, dot.forward.rhs, (table.ndim - 1,))
    incoming = functools.partial(_of_lookup, isinstance(table, QArray))
    return _tap(incoming, dot.tap, out, *jax.lax.stop_gradient((operands, None)))


def _of_lookup(is_stored: bool, rest: Any, gradient: jax.Array) -> tuple[None, Quantized | None]:
    del rest
    return None, None if is_stored else Quantized(gradient, None)

"""`Delaying`: a product by the ranges of the steps before, which tells the largest magnitudes of its own.

Forward operands could be looked at when they are multiplied; the incoming gradient only when the product is
differentiated.  So all of them come out as the derivative by the product's `Scales`: J = f(scales, x) has
∂J/∂x as without them, and in the place of ∂J/∂scales what `next_scales` makes the next ones of.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping as jt
from jax.sharding import PartitionSpec

from jaxquant.numerics.calibration import Range
from jaxquant.numerics.delayed import DelayedRange, delayed_absmax
from jaxquant.numerics.measuring import Quantized
from jaxquant.numerics.qarray import QArray
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.numerics.reductions import largest
from jaxquant.numerics.sharding import call_with_auto_axes
from jaxquant.operations.dot import DotGeneral
from jaxquant.operations.operands import DimensionNumbers, as_tuples
from jaxquant.operations.tapped import Four, quantized_by


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("ranges", "uses"), meta_fields=("by",)
)
@dataclasses.dataclass(frozen=True)
class Scales:
    """Delayed ranges of one product, or of one for each turn of a scan and for each of several matrices.

    Attributes:
        ranges: of its operands, and of the gradient as ∂lhs and ∂rhs quantize it; None of what has none.
        uses: zero; its derivative is how often the product was differentiated.
        by: how each of them is found.
    """

    ranges: Four
    uses: jt.Float[jax.Array, "*turns"]
    by: Four


def delayed_by(recipe: Any) -> Four:
    """Returns the delayed ranges of a recipe, None of what has others.

    Raises:
        ValueError: such a range that is not of a whole tensor, or of rotated coordinates.
    """
    if not isinstance(recipe, DotGeneral):
        return Four(None, None, None, None)
    return Four(*(_delayed_by(q) for q in _quantizers(recipe)))


def is_delayed(recipe: Any) -> bool:
    """Returns whether a recipe has a delayed range."""
    return any(one is not None for one in delayed_by(recipe))


def _quantizers(recipe: DotGeneral) -> Four:
    gradients = (None if x is None else x.lhs for x in (recipe.dlhs, recipe.drhs))
    return Four(recipe.forward.lhs, recipe.forward.rhs, *gradients)


def _delayed_by(quantizer: Quantizer | None) -> delayed_absmax | None:
    own = None if quantizer is None else quantizer.calibration
    if not isinstance(own, delayed_absmax):
        return None
    assert quantizer is not None
    if quantizer.granularity != "tensor" or quantizer.hadamard is not None:
        raise ValueError(
            "delayed scaling has one range for a tensor, without a rotation; got granularity "
            f"{quantizer.granularity!r} and hadamard {quantizer.hadamard}"
        )
    return own


def first_scales(recipe: DotGeneral, turns: Sequence[int] = ()) -> Scales:
    """Returns the scales before the first step: each 1, and so each range the largest value of its grid.

    Args:
        recipe: with delayed ranges.
        turns: sizes of the axes in front.
    """

    def first(quantizer: Quantizer | None, by: delayed_absmax | None) -> DelayedRange | None:
        if by is None:
            return None
        assert quantizer is not None
        one = by.pair.init(quantizer.element)
        return jax.tree.map(lambda x: jnp.tile(x, (*turns, *[1] * x.ndim)), one)

    by = delayed_by(recipe)
    ranges = (first(q, own) for q, own in zip(_quantizers(recipe), by, strict=True))
    return Scales(Four(*ranges), jnp.zeros(tuple(turns), jnp.float32), by)


def next_scales(scales: Any, derivative: Any) -> Any:
    """Returns the scales of the next step.

    A product that was not differentiated, as in a branch that is not taken, keeps its scales.  One that was
    several times in a step has only the sum of what was largest in each, which is no range: it becomes NaN,
    and so does what the next step computes.

    Args:
        scales: a tree of `Scales`; what else is in it is returned as it is.
        derivative: of a loss by that tree.
    """

    def each(own: Any, seen: Any) -> Any:
        return _next(own, seen) if isinstance(own, Scales) else own

    return jax.tree.map(each, scales, derivative, is_leaf=lambda x: isinstance(x, Scales))


def _next(scales: Scales, seen: Scales) -> Scales:
    def of(own: DelayedRange | None, amax: DelayedRange | None, by: delayed_absmax) -> Any:
        if own is None:
            return None
        assert amax is not None
        update = by.pair.update
        for _ in range(scales.uses.ndim):
            update = jax.vmap(update)
        new, uses = update(own, amax.value), seen.uses
        value = jnp.where(uses > 1, jnp.nan, new.value)
        kept = DelayedRange(new.history, value)
        was_used = lambda x: (uses > 0).reshape(uses.shape + (1,) * (x.ndim - uses.ndim))  # noqa: E731
        return jax.tree.map(lambda a, b: jnp.where(was_used(a), a, b), kept, own)

    parts = zip(scales.ranges, seen.ranges, scales.by, strict=True)
    return dataclasses.replace(scales, ranges=Four(*(of(*part) for part in parts)))


def with_ranges(recipe: DotGeneral, scales: Scales) -> DotGeneral:
    """Returns a recipe with the scales' ranges in it, through which no derivative passes."""
    lhs, rhs, dlhs, drhs = (
        q if own is None else dataclasses.replace(q, calibration=Range(jax.lax.stop_gradient(own.value)))
        for q, own in zip(_quantizers(recipe), scales.ranges, strict=True)
    )  # fmt: skip
    forward = dataclasses.replace(recipe.forward, lhs=lhs, rhs=rhs)
    gradients = {
        name: None if operands is None else dataclasses.replace(operands, lhs=own)
        for name, operands, own in (("dlhs", recipe.dlhs, dlhs), ("drhs", recipe.drhs, drhs))
    }
    return dataclasses.replace(recipe, forward=forward, **gradients)


@dataclasses.dataclass(frozen=True)
class Delaying(DotGeneral):
    """A `DotGeneral` whose delayed ranges are given, and whose derivative by them is what was largest.

    Attributes:
        scales: of which `with_ranges` made it.
    """

    scales: Scales | None = None

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
        assert self.scales is not None
        plain = DotGeneral(self.forward, self.dlhs, self.drhs)
        out = plain(lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding)
        incoming, *what = quantized_by(self, lhs, rhs, as_tuples(dimension_numbers))
        values = Four(*(None if x is None else x.value for x in self.scales.ranges))
        return _told(incoming, (values, self.scales.uses), out, *jax.lax.stop_gradient(what))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _told(incoming: Any, scales: Any, out: jax.Array, operands: Any, rest: Any) -> jax.Array:
    """Returns a product's result, whose derivative by its scales is (largest magnitudes, 1)."""
    del incoming, scales, operands, rest
    return out


def _forward(incoming: Any, scales: Any, out: jax.Array, operands: Any, rest: Any) -> Any:
    del incoming
    values, _ = scales
    with jax.named_scope("delayed"):
        return out, (values, [_largest(x, v) for x, v in zip(operands, values, strict=False)], rest)


def _backward(incoming: Any, residuals: Any, gradient: jax.Array) -> Any:
    values, forward, rest = residuals
    with jax.named_scope("delayed"):
        found = zip(incoming(rest, gradient), values[2:], strict=True)
        four = Four(*forward, *(_largest(x, v) for x, v in found))
        return (four, jnp.float32(1)), gradient, None, None


_told.defvjp(_forward, _backward)


def _largest(tensor: Quantized | None, value: jax.Array | None) -> jax.Array | None:
    """Returns the largest magnitude, NaN of a tensor with a NaN or an Inf; None of what has no such range."""
    if value is None:
        return None
    if tensor is None or isinstance(tensor.x, QArray):
        return jnp.zeros_like(value)
    amax = lambda x: largest(jnp.abs(x)).reshape(()).astype(jnp.float32)  # noqa: E731
    return call_with_auto_axes(amax, (tensor.x,), PartitionSpec)

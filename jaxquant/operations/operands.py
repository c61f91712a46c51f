"""Operands: how both sides of a product are quantized, and what every product checks of what it is given."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant.numerics import estimators, rounding
from jaxquant.numerics.qarray import QArray, dequantize
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.numerics.sharding import spec_of
from jaxquant.operations.integers import is_integer
from jaxquant.operations.product import is_float8

DimensionNumbers = Any  # ((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch)), as in lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """One matrix product: the quantizers of its two operands, and how it is computed.

    Args:
        lhs: quantizer of the left operand (activations; in a gradient's product, the incoming
            gradient); None leaves it as it is.
        rhs: quantizer of the right operand (weights; in a gradient's product, the forward operand that
            it is multiplied with); None leaves it as it is, which in a gradient's product is as
            the forward product had it.
        arithmetic: ``"simulated"`` multiplies the dequantized values in their own type, at any
            precision, traced ones included; ``"native"`` multiplies stored numbers of at most 8 bits and
            applies the scales to the result: int8 with int32 accumulation, float8 with float32, or,
            where only one operand is quantized, its values in the other's type, or in the wider of both.

    Raises:
        ValueError: an operand that is neither a Quantizer nor None; "native" with no quantizer, a
            format that cannot be multiplied so, another gradient than the straight-through one, or
            operands of which only one is rotated.
    """

    lhs: Quantizer | None = None
    rhs: Quantizer | None = None
    arithmetic: Literal["simulated", "native"] = dataclasses.field(
        default="simulated", metadata={"static": True}
    )

    def __post_init__(self):
        if self.arithmetic not in ("simulated", "native"):
            raise ValueError(f"arithmetic is 'simulated' or 'native'; got {self.arithmetic!r}")
        for name in ("lhs", "rhs"):
            quantizer = getattr(self, name)
            if (
                quantizer is None or type(quantizer) is object
            ):  # a placeholder of a tree transformation
                continue
            if not isinstance(quantizer, Quantizer):
                raise ValueError(
                    f"{name} of {self.arithmetic} operands is a Quantizer or None; got {quantizer!r}"
                )
            if self.arithmetic == "native":
                _check_native(name, quantizer)
        if self.arithmetic == "native":
            _check_pair(self.lhs, self.rhs)


def _check_native(name: str, quantizer: Quantizer) -> None:
    if jax.tree.leaves(quantizer.format):
        raise ValueError(
            f"native arithmetic multiplies stored numbers; {name} has {quantizer.format!r}, whose "
            "precision is traced. Use arithmetic='simulated'."
        )
    if quantizer.estimator is not estimators.straight_through:
        raise ValueError(
            "native arithmetic has the straight-through gradient; "
            f"{name} has {quantizer.estimator.__name__}. Use arithmetic='simulated'."
        )


def _check_pair(lhs: Quantizer | None, rhs: Quantizer | None) -> None:
    if lhs is None and rhs is None:
        raise ValueError("native operands need a quantizer for lhs, rhs or both; got None for both")
    if lhs is None or rhs is None:
        return
    pair = (lhs.element, rhs.element)
    if not (all(map(is_integer, pair)) or all(map(is_float8, pair))):
        raise ValueError(
            f"native arithmetic multiplies two Ints of at most 8 bits (midrise at most 7) or two 8-bit "
            f"Floats; got {pair[0]} and {pair[1]}. Use arithmetic='simulated'."
        )
    if lhs.hadamard != rhs.hadamard:
        raise ValueError(
            "native arithmetic multiplies in rotated coordinates, so both operands have the same hadamard; "
            f"got {lhs.hadamard} and {rhs.hadamard}. Use arithmetic='simulated'."
        )


def _varying_axes(x: jax.Array) -> frozenset:
    """Returns the axes of a surrounding shard_map along which an array differs from device to device."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # what newer versions call it
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)


def result_spec(
    operation: Callable[..., jax.Array], lhs: Any, rhs: Any, out_sharding: Any
) -> Callable[[], PartitionSpec]:
    """Returns the PartitionSpec of lax's own result for these operands, for `call_with_auto_axes`.

    Args:
        operation: of two arrays, and of out_sharding where that is given.
        lhs, rhs: operands, of which only shapes and shardings count.
        out_sharding: as of the operation; wherever it is given, lax says whether it can be.
    """

    def spec() -> PartitionSpec:
        options = {} if out_sharding is None else {"out_sharding": out_sharding}
        trace = jax.make_jaxpr(functools.partial(operation, **options))
        (result,) = trace(
            *map(_shape_of, (lhs, rhs))
        ).out_avals  # jax.eval_shape has no mixed meshes
        return result.sharding.spec

    if out_sharding is not None:
        found = spec()
        return lambda: found
    return spec


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """Returns an operand's shape and sharding, stored or not."""
    array = x.qvalue if isinstance(x, QArray) else x
    sharding = NamedSharding(jax.typeof(array).sharding.mesh, spec_of(array, x.shape))
    return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=sharding)


def as_values(operands: Any) -> list[jax.Array]:
    """Operands with the values of those that are stored."""
    return [dequantize(x) if isinstance(x, QArray) else x for x in operands]


def check_stored(name: str, x: Any, quantizer: Quantizer | None) -> None:
    """Raises a ValueError where an operand is stored in another format than its quantizer's."""
    if not isinstance(x, QArray) or quantizer is None:
        return
    if jax.tree.leaves(quantizer.format) or quantizer.format != x.format:
        raise ValueError(
            f"{name} is stored as {x.format} already, and its quantizer here has {quantizer.format}; "
            "give None, or the same format"
        )


def differentiable(*operands: jax.Array | QArray) -> list[jax.Array]:
    """Returns the differentiable operands of a product, with None for stored ones.

    Within shard_map an operand that is the same on all devices is marked as varying like the others, so
    that its gradient is summed over them.
    """
    arrays = [jnp.zeros(0) if isinstance(x, QArray) else jnp.asarray(x) for x in operands]
    varying = [_varying_axes(x) for x in arrays]
    everywhere = frozenset().union(*varying)

    def vary(x: jax.Array, axes: frozenset) -> jax.Array:
        missing = tuple(sorted(everywhere - axes))
        if not missing:
            return x
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(x, missing, to="varying")
        return jax.lax.pvary(x, missing)  # pyright: ignore[reportAttributeAccessIssue]

    return [vary(x, axes) for x, axes in zip(arrays, varying, strict=True)]


@jax.custom_vjp
def forbid_second_derivative(value: jax.Array, witnesses: Any) -> jax.Array:
    """Returns a value whose derivative, by itself or by the witnesses, is an error.

    What a product keeps for its gradients is rounded and has no derivative, so that a second one would
    come out as zero.
    """
    del witnesses
    return value


def _refuse(_, gradient):
    raise ValueError(
        "second derivatives do not pass through native products or quantized gradients, which keep rounded "
        "numbers alone; use arithmetic='simulated' with dlhs and drhs None"
    )


forbid_second_derivative.defvjp(lambda value, witnesses: (value, None), _refuse)


def check_rounding(product_name: str, side: str, quantizer: Any) -> None:
    """Raises a ValueError unless the rounding needs no key, or is a gradient's, which makes its own."""
    is_gradient = product_name != "forward" and side == "lhs"
    if (
        isinstance(quantizer, Quantizer)
        and rounding.needs_key(quantizer.rounding)
        and not is_gradient
    ):
        raise ValueError(
            f"{side} of {product_name} rounds stochastically, which needs a PRNG key that dot_general's "
            "signature does not carry; use rounding.nearest there"
        )


def check_reuse(name: str, operands: Operands, kept: Quantizer | None) -> None:
    """Checks that a native gradient product multiplies the kept operand, or quantizes it itself."""
    if operands.rhs is not None or kept is None:
        return
    other = "rhs" if name == "dlhs" else "lhs"
    if not isinstance(kept.granularity, str):
        raise ValueError(
            f"native {name} cannot multiply the forward's {other} again: its scales, {kept.granularity} to a "
            f"block along the forward's sum, do not carry over to the gradient; give {name} an rhs quantizer"
        )
    if isinstance(operands.lhs, Quantizer):
        _check_pair(dataclasses.replace(operands.lhs, hadamard=kept.hadamard), kept)


def as_tuples(dimension_numbers: DimensionNumbers) -> Any:
    """Returns dimension numbers as tuples of Python ints, hashable whatever sequences they came in."""
    dims = tuple(tuple(tuple(int(a) for a in axes) for axes in pair) for pair in dimension_numbers)
    if any(a < 0 for pair in dims for axes in pair for a in axes):
        raise ValueError(f"dimension numbers count axes from the start; got {dimension_numbers}")
    return dims

"""`DotGeneral`: a quantized matrix product with `jax.lax.dot_general`'s own signature."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxquant import rounding
from jaxquant.formats import Int, is_static
from jaxquant.qarray import QArray, Quantizer, dequantize, fake_quant, quantize

DimensionNumbers = Any  # ((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch)), as in lax


@dataclasses.dataclass(frozen=True)
class Operands:
    """What one matrix product takes: its two operands' quantizers, and how the product is computed.

    Args:
        lhs: quantizer of the left operand (activations); None leaves it as it is.
        rhs: quantizer of the right operand (weights); None leaves it as it is.
        arithmetic: ``"simulated"`` multiplies the dequantized values in their own type, at any
            precision, traced ones included; ``"native"`` multiplies 8-bit integers with int32
            accumulation and applies the scales to the result.

    Raises:
        ValueError: an operand that is neither a Quantizer nor None, or whose rounding needs a key;
            "native" with an operand that is not a static Int of at most 8 bits per tensor or channel.
    """

    lhs: Quantizer | None = None
    rhs: Quantizer | None = None
    arithmetic: Literal["simulated", "native"] = "simulated"

    def __post_init__(self):
        if self.arithmetic not in ("simulated", "native"):
            raise ValueError(f"arithmetic is 'simulated' or 'native'; got {self.arithmetic!r}")
        for name in ("lhs", "rhs"):
            quantizer = getattr(self, name)
            if quantizer is None and self.arithmetic == "simulated":
                continue
            if not isinstance(quantizer, Quantizer):
                wanted = "a Quantizer" + (" or None" if self.arithmetic == "simulated" else "")
                raise ValueError(
                    f"{name} of {self.arithmetic} operands is {wanted}; got {quantizer!r}"
                )
            if quantizer.rounding is rounding.stochastic:
                raise ValueError(
                    f"{name} rounds stochastically, which needs a PRNG key that dot_general's "
                    "signature does not carry; use rounding.nearest in a forward product"
                )
            if self.arithmetic == "native":
                _check_native(name, quantizer)


def _check_native(name: str, quantizer: Quantizer) -> None:
    fmt = quantizer.format
    if not (isinstance(fmt, Int) and is_static(fmt.bits) and fmt.bits <= 8):
        raise ValueError(
            f"native arithmetic multiplies stored integers of at most 8 bits; {name} has {fmt!r}. "
            "Use arithmetic='simulated'."
        )
    if quantizer.granularity not in ("tensor", "channel"):
        raise ValueError(
            f"native arithmetic takes granularity 'tensor' or 'channel', whose scales factor out of "
            f"the sum; {name} has blocks of {quantizer.granularity}. Use arithmetic='simulated'."
        )


@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """A matrix product whose operands are quantized: out = Σ_k Q_l(lhs)_k · Q_r(rhs)_k.

    A frozen, hashable callable that goes wherever `jax.lax.dot_general` goes, a Flax layer's
    `dot_general` included.  Both gradients are straight-through, of the quantized operands:
    ∂lhs = g · Q_r(rhs)ᵀ and ∂rhs = Q_l(lhs)ᵀ · g, in floating point.

    Args:
        forward: the forward product's operands.

    Source: Jacob et al. 2018, arXiv 1712.05877; Kumar et al. 2024, arXiv 2411.04330, section 2.

    >>> from jaxquant.formats import INT8
    >>> int8 = Quantizer(INT8, "channel")
    >>> dot = DotGeneral(Operands(int8, int8, "native"))
    >>> dot(jnp.array([[1.0, -127.0]]), jnp.array([[127.0], [2.0]]), (((1,), (0,)), ((), ())))
    Array([[-127.]], dtype=float32)
    """

    forward: Operands = dataclasses.field(default_factory=Operands)

    def __post_init__(self):
        if not isinstance(self.forward, Operands):
            raise ValueError(f"forward is an Operands; got {self.forward!r}")

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: DimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """As `jax.lax.dot_general`, whose arguments these are."""
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        if out_sharding is not None:
            options["out_sharding"] = out_sharding
        dims = _as_tuples(dimension_numbers)
        if self.forward.arithmetic == "native":
            return _native(self.forward, dims, tuple(options.items()), lhs, rhs)
        (lhs_axes, rhs_axes), _ = dims
        lhs = _simulate(lhs, self.forward.lhs, lhs_axes)
        rhs = _simulate(rhs, self.forward.rhs, rhs_axes)
        return jax.lax.dot_general(lhs, rhs, dims, **options)


def _as_tuples(dimension_numbers: DimensionNumbers) -> Any:
    """Dimension numbers as tuples of Python ints, hashable whatever sequences they came in."""
    return tuple(tuple(tuple(int(a) for a in axes) for axes in pair) for pair in dimension_numbers)


def _simulate(x: jax.Array, quantizer: Quantizer | None, axes: tuple[int, ...]) -> jax.Array:
    return x if quantizer is None else fake_quant(x, quantizer, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _native(operands: Operands, dims, options, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return _native_forward(operands, dims, options, lhs, rhs)[0]


def _native_forward(operands: Operands, dims, options, lhs, rhs):
    (lhs_axes, rhs_axes), _ = dims
    _check_accumulation(operands, math.prod(lhs.shape[a] for a in lhs_axes))
    qlhs = quantize(lhs, operands.lhs, lhs_axes)  # pyright: ignore[reportArgumentType]
    qrhs = quantize(rhs, operands.rhs, rhs_axes)  # pyright: ignore[reportArgumentType]
    # The residuals stay quantized: the backward pass holds a quarter of float32's bytes.
    return _integer_product(qlhs, qrhs, dims, dict(options)), (qlhs, qrhs)


def _check_accumulation(operands: Operands, terms: int) -> None:
    """Raises a ValueError where a sum of so many products could leave int32."""
    largest = math.prod(q.format.max_value for q in (operands.lhs, operands.rhs) if q is not None)
    if terms * largest >= 2**31:
        raise ValueError(
            f"a native product over {terms} terms of up to {largest} could overflow int32, which holds "
            f"{2**31 // largest} of them; use arithmetic='simulated' or split the contraction"
        )


def _integer_product(qlhs: QArray, qrhs: QArray, dims, options) -> jax.Array:
    del options["precision"]  # chooses among floating-point algorithms; an integer product is exact
    dtype = options.pop("preferred_element_type") or jnp.result_type(qlhs.dtype, qrhs.dtype)
    product = jax.lax.dot_general(
        qlhs.qvalue, qrhs.qvalue, dims, preferred_element_type=jnp.int32, **options
    )
    lhs_scale, rhs_scale = _output_scales(qlhs.scale, qrhs.scale, dims)
    return (product.astype(jnp.float32) * lhs_scale * rhs_scale).astype(dtype)


def _output_scales(lhs_scale: jax.Array, rhs_scale: jax.Array, dims):
    """Both operands' scales, laid out as the product is: (batch, lhs's free axes, rhs's free axes).

    A scale has size 1 along its contracting axes, so it is itself an operand of the same product.
    """
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = dims

    def batch_and_free(scale, contracting, batch):
        free = [a for a in range(scale.ndim) if a not in contracting and a not in batch]
        ordered = jnp.transpose(scale, (*batch, *free, *contracting))
        sizes = ordered.shape
        return sizes[: len(batch)], sizes[len(batch) : len(batch) + len(free)], ordered

    batch, lhs_free, lhs_scale = batch_and_free(lhs_scale, lhs_axes, lhs_batch)
    lhs_scale = lhs_scale.reshape(
        *batch, *lhs_free, *[1] * (rhs_scale.ndim - len(rhs_axes + rhs_batch))
    )
    batch, rhs_free, rhs_scale = batch_and_free(rhs_scale, rhs_axes, rhs_batch)
    return lhs_scale, rhs_scale.reshape(*batch, *[1] * len(lhs_free), *rhs_free)


def _native_backward(operands: Operands, dims, options, residuals, gradient):
    lhs, rhs = (dequantize(q) for q in residuals)

    def product(lhs, rhs):
        return jax.lax.dot_general(lhs, rhs, dims, **dict(options)).astype(gradient.dtype)

    return jax.vjp(product, lhs, rhs)[1](gradient)


_native.defvjp(_native_forward, _native_backward)

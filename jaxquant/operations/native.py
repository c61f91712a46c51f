"""What the products other than `dot_general` share: which stored numbers they multiply, and in which type
they sum.

    Σ_k s_l l_k · s_r r_k  =  s_l s_r Σ_k l_k r_k

These products have scales that do not vary along the sum, and no zero points.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxquant.formats import Float, Int
from jaxquant.numerics.qarray import QArray, dequantize
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.operations.backward import BackwardOperands
from jaxquant.operations.integers import as_int8, check_accumulation, is_integer, values_in
from jaxquant.operations.operands import Operands
from jaxquant.operations.product import is_float8


class Part(NamedTuple):
    """One operand: the numbers that are multiplied, and their scales, or None where they are whole."""

    values: jax.Array
    scale: jax.Array | None


def parts(
    lhs: QArray | jax.Array, rhs: QArray | jax.Array, terms: int
) -> tuple[Part, Part, np.dtype]:
    """Returns both operands in the types to multiply, and the type of their sum.

    Two stored operands are multiplied in int8 with int32 sums, or in float8 with float32 sums; one stored
    operand's values in the other's type.

    Args:
        lhs: left operand.
        rhs: right operand; at least one of both is a QArray.
        terms: how many products the longest sum has.

    Raises:
        ValueError: formats that are not multiplied together; zero points; a sum that could leave int32.

    >>> from jaxquant.numerics.qarray import quantize
    >>> x = quantize(jax.numpy.array([1.0, -127.0]), Quantizer(Int(8)))
    >>> left, right, dtype = parts(x, x, 2)
    >>> left.values, left.scale, dtype
    (Array([   1, -127], dtype=int8), Array([1.], dtype=float32), dtype('int32'))
    """
    lhs, rhs = (x.unpack() if isinstance(x, QArray) else x for x in (lhs, rhs))
    if not (isinstance(lhs, QArray) and isinstance(rhs, QArray)):
        return _in_type_of(lhs, rhs), _in_type_of(rhs, lhs), wide(lhs.dtype, rhs.dtype)
    pair = (lhs, rhs)
    if all(is_integer(x.element) for x in pair):
        check_accumulation(lhs, rhs, terms)
        return _integers(lhs), _integers(rhs), np.dtype(np.int32)
    if all(is_float8(x.element) for x in pair):
        left, right = (Part(x.qvalue, x.float_scale()) for x in pair)
        return left, right, np.dtype(np.float32)
    raise ValueError(
        f"no product multiplies {lhs.element} by {rhs.element}: native arithmetic takes two Ints of at "
        "most 8 bits (midrise 7), or two 8-bit Floats; use arithmetic='simulated'"
    )


def wide(*dtypes: Any) -> np.dtype:
    """Returns the type of sums and scales for these types: float32, or the widest of them if wider."""
    # promote_types would refuse 16-bit floats under jax_numpy_dtype_promotion="strict".
    return max(map(np.dtype, (np.float32, *dtypes)), key=lambda dtype: dtype.itemsize)


def _integers(x: QArray) -> Part:
    values, zero = as_int8(x)
    if zero is not None:
        raise ValueError(_zero_message(x.element))
    return Part(values, x.float_scale())


def _zero_message(format: Any) -> str:
    # In a convolution the padding and the dilation put in zeros, which a stored number other than 0
    # would stand for, and how many a sum has differs from place to place.
    return (
        "native convolutions and ragged products multiply numbers whose zero is stored as 0, the zero that "
        f"padding puts in; got {format} with a zero point. Use a symmetric range, or arithmetic='simulated'"
    )


def _in_type_of(x: QArray | jax.Array, other: QArray | jax.Array) -> Part:
    """Returns a float operand as it is; a stored one's values in the other's type."""
    if not isinstance(x, QArray):
        return Part(x, None)
    if x.zero_point is None and isinstance(x.format, Int | Float):
        return Part(values_in(x, other.dtype), x.float_scale())
    # What a 16-bit float may not hold exactly is scaled first, in float32.
    return Part(dequantize(x).astype(other.dtype), None)


def check_operands(owner: str, name: str, operands: Operands | None) -> None:
    """Raises a ValueError where a product of scales that do not vary along its sum cannot take them."""
    if isinstance(operands, BackwardOperands):
        raise ValueError(
            f"{owner} takes no BackwardOperands, which matrix products do; got them as {name}"
        )
    if not isinstance(operands, Operands):
        return
    for side in ("lhs", "rhs"):
        quantizer = getattr(operands, side)
        if not isinstance(quantizer, Quantizer):
            continue
        if quantizer.granularity not in ("tensor", "channel") or quantizer.hadamard is not None:
            raise ValueError(
                f"{owner} takes granularity 'tensor' or 'channel' and no hadamard rotation; {side} of "
                f"{name} has granularity {quantizer.granularity!r} and hadamard {quantizer.hadamard}"
            )
        element = quantizer.element
        if operands.arithmetic == "native" and element == Int(8, "unsigned"):
            raise ValueError(f"{side} of {name}: " + _zero_message(element))

"""The product of two operands of which at least one is quantized: which numbers are multiplied, and where
the scales go.

    Σ_k s_l (l_k − z_l) · s_r (r_k − z_r)  =  s_l s_r Σ_k (l_k − z_l) (r_k − z_r)

Scales that do not vary along k factor out, and what remains is a product of 8-bit numbers.  Scales in
blocks along k are applied block by block.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.formats import Float, Format, Int, is_static
from jaxquant.formats.base import unchanged
from jaxquant.numerics.packing import NIBBLE_BITS, nibble_words, nibbles
from jaxquant.numerics.qarray import QArray, dequantize
from jaxquant.numerics.sharding import call_with_auto_axes, spec_of
from jaxquant.operations.integers import (
    Dims,
    broadcast_to_product,
    full,
    integers,
    is_integer,
    split,
    values_in,
)

_FEW_ROWS = 4  # up to here a product with stored weights takes as long as reading them
_LARGE = 2**16  # elements from which on a pass over them is worth compiling a branch
_TERMS = 16  # products that one pass adds up


def is_float8(format: Format) -> bool:
    """Returns whether the format's values are those of an 8-bit float type that can be multiplied."""
    if not isinstance(format, Float) or not all(
        map(is_static, (format.exponent_bits, format.mantissa_bits))
    ):
        return False
    return bool(format.bits == 8) and format.convention != "fnu" and format.dtype != np.uint8


def product(
    lhs: QArray | jax.Array, rhs: QArray | jax.Array, dims: Dims, **options: Any
) -> jax.Array:
    """Returns lhs · rhs, in 8-bit numbers where both operands are quantized.

    Args:
        lhs: left operand.
        rhs: right operand.
        dims: dimension numbers, as of `jax.lax.dot_general`.
        options: preferred_element_type and precision, as of `jax.lax.dot_general`; is_gradient, of a product
            of the backward pass.

    Raises:
        ValueError: formats that no product takes together; a sum that could leave int32; blocks of two
            sizes that have no common division of the contracting axis.
    """
    preferred = options.pop("preferred_element_type", None)
    is_gradient = options.pop("is_gradient", False)
    dtype = preferred or result_type(lhs.dtype, rhs.dtype)
    if not (isinstance(lhs, QArray) and isinstance(rhs, QArray)):
        return _one_sided(lhs, rhs, dims, {**options, "preferred_element_type": preferred})
    lhs, rhs = lhs.unpack(), rhs.unpack()
    if lhs.hadamard or rhs.hadamard:
        _check_rotations(lhs, rhs, dims)
    precision = options.pop("precision", None), is_gradient
    if _blocks(lhs, dims[0][0]) > 1 or _blocks(rhs, dims[0][1]) > 1:
        return _blockwise(lhs, rhs, dims, dtype, precision).astype(dtype)
    return _scaled_product(lhs, rhs, dims, dtype, precision).astype(dtype)


def result_type(lhs: Any, rhs: Any) -> np.dtype:
    """Returns the type of `jax.lax.dot_general`'s result for operands of two types.

    >>> result_type(jnp.bfloat16, jnp.float32)
    dtype('float32')
    """
    if lhs == rhs:
        return np.dtype(lhs)
    # Asked of lax, whose rule is not quite NumPy's: float16 by bfloat16 is bfloat16.
    one, other = (jax.ShapeDtypeStruct((1, 1), dtype) for dtype in (lhs, rhs))
    dims = (((1,), (0,)), ((), ()))
    return jax.eval_shape(lambda a, b: jax.lax.dot_general(a, b, dims), one, other).dtype


def _check_rotations(lhs: QArray, rhs: QArray, dims: Dims) -> None:
    """Raises a ValueError unless both operands are rotated alike along the axis that is summed over."""
    wanted = [(lhs.hadamard or rhs.hadamard or (0, 0))[0]] * 2
    places = [
        x.hadamard[0] if x.hadamard and x.hadamard[1] % x.ndim == axes[-1] else None
        for x, axes in ((lhs, dims[0][0]), (rhs, dims[0][1]))
    ]
    if places != wanted:
        raise ValueError(
            "operands are multiplied in rotated coordinates where both are rotated in the same blocks along "
            f"their last contracting axis; got {lhs.hadamard} and {rhs.hadamard}"
        )


def _one_sided(
    lhs: QArray | jax.Array, rhs: QArray | jax.Array, dims: Dims, options: dict
) -> jax.Array:
    """Multiplies a float and a quantized operand, in the float operand's type or a wider one."""
    quantized, axes = (lhs, dims[0][0]) if isinstance(lhs, QArray) else (rhs, dims[0][1])
    other: Any = rhs if isinstance(lhs, QArray) else lhs
    assert isinstance(quantized, QArray)

    def multiply(values: jax.Array, other: jax.Array, **options: Any) -> jax.Array:
        left, right = (values, other) if isinstance(lhs, QArray) else (other, values)
        return jax.lax.dot_general(left, right, dims, **options)

    factors = (
        quantized.zero_point is None
        and quantized.hadamard is None
        and all(quantized.scale.shape[a] == 1 for a in axes)
        and all(s in (1, n) for s, n in zip(quantized.scale.shape, quantized.shape, strict=True))
        # What a 16-bit float may not hold exactly is scaled first, in float32.
        and isinstance(quantized.format, Int | Float)
    )
    common = result_type(quantized.dtype, other.dtype)
    if not factors:
        return multiply(dequantize(dataclasses.replace(quantized, dtype=common)), other, **options)
    dtype = options["preferred_element_type"] or common
    options = {**options, "preferred_element_type": _at_least_float32(dtype)}
    scale = broadcast_to_product(_known_scale(quantized), dims, isinstance(lhs, QArray), other.ndim)

    def plain(other: jax.Array, qvalue: jax.Array) -> jax.Array:
        stored = dataclasses.replace(quantized, qvalue=qvalue).unpack()
        return multiply(values_in(stored, other.dtype), other, **options)

    def few(other: jax.Array, qvalue: jax.Array) -> jax.Array:
        stored = dataclasses.replace(quantized, qvalue=qvalue)
        return _few_rows(other, stored, dims, options["preferred_element_type"])

    if isinstance(rhs, QArray) and _has_few_rows(other, rhs, dims):
        result = jax.lax.platform_dependent(other, rhs.qvalue, cpu=few, default=plain)
    else:
        result = plain(other, quantized.qvalue)
    return apply_scale(result, scale.astype(result.dtype)).astype(dtype)


def _has_few_rows(lhs: jax.Array, rhs: QArray, dims: Dims) -> bool:
    """Returns whether a product is one that `_few_rows` computes, by its shapes and formats alone."""
    (lhs_axes, rhs_axes), (lhs_batch, _) = dims
    rows = math.prod(n for a, n in enumerate(lhs.shape) if a not in lhs_axes)
    terms = math.prod(rhs.shape[a] for a in rhs_axes)
    if not all(isinstance(n, int) for n in lhs.shape):
        return False  # a program for any number of rows
    return (
        not lhs_batch
        and 0 < rows <= _FEW_ROWS
        and rhs.size > 0
        and sorted(rhs_axes) == list(range(len(rhs_axes)))  # what is summed over comes first
        and len(rhs_axes) < rhs.ndim
        and terms % 4 == 0
        and is_integer(rhs.element)
    )


def _few_rows(lhs: jax.Array, rhs: QArray, dims: Dims, dtype: Any) -> jax.Array:
    """Returns a few rows times stored weights without their scales, reading each stored byte once.

    A library's product would have the weights written out in floating point first, which takes several
    times as long as multiplying them.  Elementwise arithmetic that adds up a few rows of weights at a
    time reads them as they are stored.
    """
    lhs_axes, rhs_axes = dims[0]
    ordered = [a for _, a in sorted(zip(rhs_axes, lhs_axes, strict=True))]
    free = [a for a in range(lhs.ndim) if a not in lhs_axes]
    terms, shape = math.prod(lhs.shape[a] for a in ordered), rhs.shape[len(rhs_axes) :]
    rows = jnp.transpose(lhs, (*ordered, *free)).reshape(terms, -1).astype(dtype)
    if _holds_nibbles(rhs.element):
        # Packed or not, the same words are multiplied, so that the sums are the same to the bit.
        words = nibble_words(rhs.pack().qvalue, int(rhs.element.bits), rhs.shape[-1])
        words = words | _zero_after(rows)
        sums = _sum_products(rows, words.reshape(terms, -1, 1), lambda w: nibbles(w).astype(dtype))
        sums = sums.reshape(rows.shape[1], *shape[:-1], -1)[..., : shape[-1]]
    else:
        stored = rhs.unpack().qvalue
        stored = stored.astype(jnp.int8) if stored.dtype == jnp.int4 else stored
        load = rhs.element.load
        sums = _sum_products(rows, stored.reshape(terms, -1), lambda q: load(q).astype(dtype))
    return sums.reshape(*(lhs.shape[a] for a in free), *shape)


def _zero_after(x: jax.Array) -> jax.Array:
    """Returns an int32 zero that the compiler knows to need x, and not to be zero.

    What depends on weights alone may be computed as soon as a program starts: the words of all layers, in
    memory at once and out of the cache again before they are multiplied.
    """
    bits = jax.lax.bitcast_convert_type(x[0, 0].astype(jnp.float32), jnp.uint32)
    return ((bits >> jnp.uint32(31)) >> jnp.uint32(1)).astype(jnp.int32)


def _holds_nibbles(format: Format) -> bool:
    """Returns whether codes are two's complement of at most four bits."""
    assert isinstance(format, Int)
    return bool(format.bits <= NIBBLE_BITS) and format.levels in ("symmetric", "full")


def _sum_products(rows: jax.Array, stored: jax.Array, load: Any) -> jax.Array:
    """Returns Σ_k rows[k, r] · load(stored)[k, …], [r, …].

    Args:
        rows: [k, r].
        stored: weights as they lie in memory, [k, …].
        load: from stored weights to numbers of rows' type.
    """
    terms = math.gcd(stored.shape[0], _TERMS)
    # Kept apart from what made them: else the rows would be computed anew for every column, and a
    # quantization within the same program could change the order of the sum.
    rows, stored = jax.lax.optimization_barrier((rows, stored))
    rows = rows.reshape(-1, terms, rows.shape[1], *[1] * (stored.ndim - 1))
    stored = stored.reshape(-1, terms, 1, *stored.shape[1:])
    # Each addition may become one multiply-add with its product.  Of the first two products that could be
    # either; with one of them rounded by itself, it is the same in every program.
    total = apply_scale(rows[:, 0], load(stored[:, 0]))
    for i in range(1, terms):
        total = total + rows[:, i] * load(stored[:, i])
    return _sum_first(jax.lax.optimization_barrier(total))


def _sum_first(x: jax.Array) -> jax.Array:
    """Sums over the first axis by adding slices, which are vectorized; a reduction is not."""
    rows = x.shape[0]
    count = min(rows, _TERMS)
    step = rows // count
    parts = (x[i * step : (i + 1) * step] for i in range(count))
    total = functools.reduce(operator.add, parts)
    total = total[0] if step == 1 else _sum_first(total)
    return total if count * step == rows else total + _sum_first(x[count * step :])


def _at_least_float32(dtype: Any) -> Any:
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def _blocks(operand: QArray, axes: tuple[int, ...]) -> int:
    return math.prod(operand.scale.shape[a] for a in axes)


def _scaled_product(
    lhs: QArray, rhs: QArray, dims: Dims, dtype: Any, precision: tuple[Any, bool]
) -> jax.Array:
    """Multiplies operands whose scales are constant along the contracting axes; in float32 or wider."""
    is_exact = is_integer(lhs.element) and is_integer(rhs.element)
    if is_exact:
        result = integers(lhs, rhs, dims)  # at any precision
    elif is_float8(lhs.element) and is_float8(rhs.element):
        result = _float8_product(lhs.qvalue, rhs.qvalue, dims, *precision)
    else:
        raise ValueError(
            f"no product multiplies {lhs.element} by {rhs.element}: native arithmetic takes two Ints of at "
            "most 8 bits (midrise 7), or two 8-bit Floats; use arithmetic='simulated'"
        )
    result = result.astype(_at_least_float32(dtype))
    left, right = (full(_known_scale(x), x.shape) for x in (lhs, rhs))
    left = broadcast_to_product(left, dims, True, rhs.ndim).astype(result.dtype)
    right = broadcast_to_product(right, dims, False, lhs.ndim).astype(result.dtype)
    rows = lhs.ndim - len(dims[0][0])
    scaled = _scaled if dims[1][0] else functools.partial(_scaled_as_matrix, rows=rows)
    if not is_exact and left.size == right.size == 1:
        scaled = _scaled_once
    if not isinstance(result.size, int) or result.size < _LARGE:
        branches = {}
    else:
        # A pass of its own: what follows is often a transposition, which would multiply number by number.
        branches = {"cpu": lambda x, left, right: _materialized_on_cpu(x * left * right)}
    return jax.lax.platform_dependent(result, left, right, cuda=scaled, default=_scaled, **branches)


def _scaled(result: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    return apply_scale(result * left, right)


def _scaled_once(result: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns the same by one number, which cuBLASLt's product of float8 takes as its operand's scale.

    A second factor would be a pass of its own.  Two scales' product beyond float32 would make NaN of zeros.
    """
    scale = jnp.minimum(left * right, jnp.finfo(result.dtype).max)
    return result * scale.reshape(())


def _scaled_as_matrix(result: jax.Array, left: jax.Array, right: jax.Array, rows: int) -> jax.Array:
    """Returns the same, scaled as a matrix, which is how a GPU multiplies: else it would be another pass.

    Args:
        result: the product.
        left: scales that vary along the rows alone.
        right: scales that vary along the columns alone.
        rows: how many of the first axes are rows.
    """
    shape = result.shape
    sizes = math.prod(shape[:rows]), math.prod(shape[rows:])
    if not all(isinstance(n, int) for n in sizes) or rows >= result.ndim:
        return _scaled(result, left, right)
    flat = result.reshape(sizes)
    if left.size > 1:
        left = jnp.broadcast_to(left, (*shape[:rows], *[1] * (len(shape) - rows)))
    if right.size > 1:
        right = jnp.broadcast_to(right, (*[1] * rows, *shape[rows:]))
    return _scaled(flat, left.reshape(-1, 1), right.reshape(1, -1)).reshape(shape)


def _known_scale(x: QArray) -> jax.Array:
    """Returns the scales; on GPUs behind a barrier.

    A GPU's compiler applies scales within the product only where they are known before it.  What computes
    them it would draw in, in part, and write the product in float32 for another pass to scale.
    """
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(x.float_scale(), cuda=barrier, default=unchanged)


def _float8_product(
    lhs: jax.Array, rhs: jax.Array, dims: Dims, precision: Any, is_gradient: bool
) -> jax.Array:
    """Returns the float32 product of two float8 arrays.

    By default Hopper's tensor cores add up in about 14 bits (openxla/xla issue 6599).  Gradients, whose sums
    run over all tokens of a batch, get float32's unless a precision was asked for.
    """

    def multiply(lhs, rhs, precision=precision):
        options = {"precision": precision, "preferred_element_type": jnp.float32}
        return jax.lax.dot_general(lhs, rhs, dims, **options)

    if not is_gradient or precision is not None:
        return multiply(lhs, rhs)
    highest = functools.partial(multiply, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.platform_dependent(lhs, rhs, cuda=highest, default=multiply)


def apply_scale(result: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns result · scale, subnormal numbers flushed to zero (not on GPUs).

    A bare product that a bias is added to may be compiled to one multiply-add, which rounds once, or to two
    instructions that round twice, as the rest of the program has it.  With a choice between them it is two
    in every program, so that a frozen model's numbers are the quantized one's.
    """

    def rounded_by_itself(result: jax.Array, scale: jax.Array) -> jax.Array:
        product = result * scale
        return jnp.where(jnp.abs(product) < jnp.finfo(product.dtype).tiny, 0, product)

    # A GPU's compiler makes no multiply-add of the two, and applies a bare product within the matrix product.
    return jax.lax.platform_dependent(result, scale, cuda=jnp.multiply, default=rounded_by_itself)


def materialized(x: jax.Array) -> jax.Array:
    """Returns x behind a barrier: nothing is fused across it, so that what follows has the same bits.

    Sums of a row, as layer normalization has them, are compiled together with what makes their terms, and add
    these up in an order that depends on it.
    """
    return call_with_auto_axes(_materialized, (x,), lambda: spec_of(x))


def _materialized(x: jax.Array) -> jax.Array:
    default = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(x, cpu=_materialized_on_cpu, default=default)


def _materialized_on_cpu(x: jax.Array) -> jax.Array:
    if 0 in x.shape:
        return x
    # That compiler drops barriers before it joins operations; what it cannot join is a branch.
    return jax.lax.cond(_zero_after(x.reshape(1, -1)) > 0, jnp.negative, lambda x: x, x)


def _blockwise(
    lhs: QArray, rhs: QArray, dims: Dims, dtype: Any, precision: tuple[Any, bool]
) -> jax.Array:
    """Returns Σ over blocks of the block's product times its scales, in `_scaled_product`'s type."""
    lhs, rhs, dims = _one_axis(lhs, rhs, dims)
    lhs_axes, rhs_axes = dims[0]
    blocks = math.lcm(_blocks(lhs, lhs_axes), _blocks(rhs, rhs_axes))
    if lhs.shape[lhs_axes[0]] % blocks:
        raise ValueError(
            f"operands with {_blocks(lhs, lhs_axes)} and {_blocks(rhs, rhs_axes)} blocks along the "
            f"contracting axis of {lhs.shape[lhs_axes[0]]} do not split it into blocks of one size"
        )
    # Each block is a product like any other; the scan's axis comes first and is gone within.
    parts = (split(lhs, lhs_axes[0], blocks), split(rhs, rhs_axes[0], blocks))

    def step(total, pair):
        return total + _scaled_product(pair[0], pair[1], dims, dtype, precision), None

    first = jax.tree.map(lambda x: x[0], parts)
    shape = jax.eval_shape(lambda a, b: _scaled_product(a, b, dims, dtype, precision), *first)
    return jax.lax.scan(step, jnp.zeros(shape.shape, shape.dtype), parts)[0]


def _one_axis(lhs: QArray, rhs: QArray, dims: Dims) -> tuple[QArray, QArray, Dims]:
    """Returns the same product over one contracting axis, which then comes last in both operands."""
    if len(dims[0][0]) == 1:
        return lhs, rhs, dims
    merged, batches = [], []
    for x, axes, batch in zip((lhs, rhs), *dims, strict=True):
        kept = [a for a in range(x.ndim) if a not in axes]

        def merge(array, kept=kept, axes=axes):
            array = jnp.transpose(array, (*kept, *axes))
            return array.reshape(*array.shape[: len(kept)], -1)

        merged.append(
            QArray(
                merge(x.qvalue),
                merge(x.float_scale()),
                None if x.zero_point is None else merge(x.zero_point),
                format=x.element,
                dtype=x.dtype,
            )
        )
        batches.append(tuple(kept.index(a) for a in batch))
    left, right = merged
    return left, right, (((left.ndim - 1,), (right.ndim - 1,)), tuple(batches))

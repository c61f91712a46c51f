"""Sums of products of 8-bit integers, in int32.

    Σ_k (l_k − z_l) (r_k − z_r)  =  Σ l_k r_k − z_l Σ r_k − z_r Σ l_k + K z_l z_r

A sum with more terms than int32 is sure to hold (133,144 of int8 numbers), as a weight's gradient over a
large batch has, is one of parts: each exact in int32, added up in float32.  Where a mesh is set, with
`jax.set_mesh` say, each of its devices multiplies parts of its own where sizes allow it, and adds up all
parts of its own share of the result: half of what an all-reduce would send, and in one order everywhere.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jaxquant.formats import Format, Int, is_static
from jaxquant.numerics.qarray import QArray

Dims = Any  # ((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch)), tuples of tuples of ints

_MOST_PARTS = 16  # as many as needed at least; this times as many at most


def is_integer(format: Format) -> bool:
    """Returns whether the format's values are, up to an offset, 8-bit integers."""
    if not isinstance(format, Int) or not is_static(format.bits):
        return False
    return int(format.bits) <= (7 if format.levels == "midrise" else 8)


def integers(lhs: QArray, rhs: QArray, dims: Dims) -> jax.Array:
    """Returns Σ (l − z_l)(r − z_r), float32; scales and zero points do not vary along the sum.

    Args:
        lhs, rhs: unpacked.
        dims: dimension numbers, as of `jax.lax.dot_general`.

    Raises:
        ValueError: a sum that could leave int32 and does not divide into parts that cannot.
    """
    terms = math.prod(lhs.shape[a] for a in dims[0][0])
    needed = -(-terms // _most_terms(lhs, rhs))
    if needed <= 1:
        return _exact(lhs, rhs, dims).astype(jnp.float32)
    parts, which = _division(lhs, rhs, dims, needed)
    # The parts' axis comes first, as one more axis of the batch.
    left, right = (split(x, a[which], parts) for x, a in zip((lhs, rhs), dims[0], strict=True))
    contracting, batch = (tuple(tuple(a + 1 for a in axes) for axes in both) for both in dims)
    dims = (contracting, tuple((0, *axes) for axes in batch))
    found = _spread_parts(_exact(left, right, dims))
    return jnp.sum(found.astype(jnp.float32), axis=0)


def _division(lhs: QArray, rhs: QArray, dims: Dims, needed: int) -> tuple[int, int]:
    """Returns the number of equal parts, and the contracting axis to split: the fewest parts that suffice."""
    sizes = [lhs.shape[a] for a in dims[0][0]]
    most, devices = _MOST_PARTS * needed, _devices()
    # Devices share the first axis, a batch's rows.
    shared = ((n, 0) for n in range(devices, max(most, devices) + 1, devices))
    others = ((n, which) for n in range(needed, most + 1) for which in range(len(sizes)))
    for parts, which in (*shared, *others):
        if parts >= needed and sizes[which] % parts == 0:
            return parts, which
    raise _too_long(lhs, rhs, math.prod(sizes))


def _devices() -> int:
    """Returns how many devices share an array here."""
    return math.prod(_axes().values())


def _axes() -> dict[str, int]:
    """Returns the axes of the mesh that is set whose use is the compiler's to choose, and their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in kinds if kind == AxisType.Auto and size > 1}


def _spread_parts(parts: jax.Array) -> jax.Array:
    """Returns parts of sums [parts, ...], each device's share of the sums with all of their parts."""
    devices = _devices()
    able = [a for a in range(1, parts.ndim) if parts.shape[a] % devices == 0]
    if devices == 1 or not able:
        return parts
    spec: list[Any] = [None] * parts.ndim
    spec[max(able, key=lambda a: parts.shape[a])] = tuple(_axes())
    return jax.lax.with_sharding_constraint(parts, PartitionSpec(*spec))


def _exact(lhs: QArray, rhs: QArray, dims: Dims) -> jax.Array:
    """Returns Σ (l − z_l)(r − z_r) in int32, which holds it."""
    (left, left_zero), (right, right_zero) = as_int8(lhs), as_int8(rhs)
    terms = math.prod(lhs.shape[a] for a in dims[0][0])
    result = integer_dot(left, right, dims)
    left_sum = right_sum = None
    if right_zero is not None:
        left_sum = jnp.sum(left.astype(jnp.int32), dims[0][0], keepdims=True)
        right_zero = broadcast_to_product(full(right_zero, rhs.shape), dims, False, lhs.ndim)
        result = result - right_zero * broadcast_to_product(left_sum, dims, True, rhs.ndim)
    if left_zero is not None:
        right_sum = jnp.sum(right.astype(jnp.int32), dims[0][1], keepdims=True)
        left_zero = broadcast_to_product(full(left_zero, lhs.shape), dims, True, rhs.ndim)
        result = result - left_zero * broadcast_to_product(right_sum, dims, False, lhs.ndim)
        if right_zero is not None:
            result = result + terms * left_zero * right_zero
    return result


def as_int8(x: QArray) -> tuple[jax.Array, jax.Array | None]:
    """Returns values as int8, and the int32 zero point that they then have."""
    format = x.element
    assert isinstance(format, Int)
    zero = None if x.zero_point is None else format.load(x.zero_point).astype(jnp.int32)
    if format.levels == "midrise":
        return 2 * x.qvalue.astype(jnp.int8) + jnp.int8(1), zero
    if format.levels == "unsigned" and format.bits == 8:
        # 0 … 255 is −128 … 127 with a zero point of −128.
        shifted = (x.qvalue ^ jnp.uint8(128)).astype(jnp.int8)
        return shifted, (jnp.zeros((1,) * x.ndim, jnp.int32) if zero is None else zero) - 128
    return x.qvalue.astype(jnp.int8), zero


def values_in(x: QArray, dtype: Any) -> jax.Array:
    """Returns stored values without their scales in a floating-point type.

    Integers of at most 8 bits are cast to it directly, which is exact in 16 bits too: a compiler reads them
    within the product, where by way of float32 a GPU's writes the whole array out first.

    >>> from jaxquant.formats import INT4
    >>> values_in(QArray(jnp.array([7], jnp.int4), jnp.ones(1), format=INT4), jnp.bfloat16)
    Array([7], dtype=bfloat16)
    """
    element = x.element
    if not isinstance(element, Int) or not is_integer(element):
        return element.load(x.qvalue).astype(dtype)
    assert isinstance(element, Int)
    if element.levels == "midrise":
        return as_int8(x)[0].astype(dtype)
    return x.qvalue.astype(dtype)


def check_accumulation(lhs: QArray, rhs: QArray, terms: int) -> None:
    """Raises a ValueError where a sum of so many products could leave int32."""
    if terms > _most_terms(lhs, rhs):
        raise _too_long(lhs, rhs, terms)


def _too_long(lhs: QArray, rhs: QArray, terms: int) -> ValueError:
    return ValueError(
        f"a native product over {terms} terms could overflow int32, which holds {_most_terms(lhs, rhs)} of "
        "these, and does not split into equal parts here; use arithmetic='simulated' or split the contraction"
    )


def _most_terms(lhs: QArray, rhs: QArray) -> int:
    """Returns how many products int32 can always sum without overflow."""

    def largest(x: QArray) -> int:
        low, high = int(x.element.min_value), int(x.element.max_value)
        # With zero points the corrections together are bounded by the widest difference.
        return max(-low, high) if x.zero_point is None else high - low

    return (2**31 - 1) // max(1, largest(lhs) * largest(rhs))


def integer_dot(lhs: jax.Array, rhs: jax.Array, dims: Dims) -> jax.Array:
    """Returns the int32 product of two int8 arrays, computed the way that suits the platform.

    The numbers are the same everywhere.  TPU and GPU multiply int8 as given.  A CPU does so only where the
    left operand's contracting axes come last; other layouts fall to a loop some thirty times slower, so
    there the operand is transposed first.
    """

    def plain(lhs, rhs):
        return jax.lax.dot_general(lhs, rhs, dims, preferred_element_type=jnp.int32)

    def on_cpu(lhs, rhs):
        return _contracting_last(lhs, rhs, dims, plain)

    return jax.lax.platform_dependent(lhs, rhs, cpu=on_cpu, default=plain)


def _contracting_last(lhs: jax.Array, rhs: jax.Array, dims: Dims, plain: Any) -> jax.Array:
    (contracting, rhs_contracting), (batch, rhs_batch) = dims
    free = [a for a in range(lhs.ndim) if a not in contracting and a not in batch]
    terms = math.prod(lhs.shape[a] for a in contracting)
    moved = [a for a in (*batch, *free, *contracting) if lhs.shape[a] != 1]
    if moved == sorted(moved) or terms < 2 or lhs.size == 0:
        return plain(lhs, rhs)
    lhs_shape = [lhs.shape[a] for a in (*batch, *free)]
    left = jnp.transpose(lhs, (*batch, *free, *contracting)).reshape(*lhs_shape, terms)
    rhs_free = [a for a in range(rhs.ndim) if a not in rhs_contracting and a not in rhs_batch]
    rhs_shape = [rhs.shape[a] for a in rhs_free]
    right = jnp.transpose(rhs, (*rhs_batch, *rhs_contracting, *rhs_free))
    right = right.reshape(*(rhs.shape[a] for a in rhs_batch), terms, *rhs_shape)
    n, last = len(batch), left.ndim - 1
    # In two halves: the compiler folds a whole transpose back into the product, and not a slice of one.
    half = terms // 2
    parts = (
        jax.lax.dot_general(
            jax.lax.slice_in_dim(left, start, stop, axis=last),
            jax.lax.slice_in_dim(right, start, stop, axis=n),
            (((last,), (n,)), (tuple(range(n)), tuple(range(n)))),
            preferred_element_type=jnp.int32,
        )
        for start, stop in ((0, half), (half, terms))
    )
    return sum(parts)  # pyright: ignore[reportReturnType]


def full(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns scales with one entry per element along each axis that has several, as tiles need."""
    for axis, (groups, n) in enumerate(zip(scale.shape, shape, strict=True)):
        if groups not in (1, n):
            scale = jnp.repeat(scale, n // groups, axis=axis)
    return scale


def broadcast_to_product(scale: jax.Array, dims: Dims, is_lhs: bool, other_ndim: int) -> jax.Array:
    """Returns one operand's scales in the product's axis order: (batch, lhs's free axes, rhs's free axes).

    A scale has size 1 along its contracting axes, so those are dropped.
    """
    side = 0 if is_lhs else 1
    contracting, batch = dims[0][side], dims[1][side]
    free = [a for a in range(scale.ndim) if a not in contracting and a not in batch]
    ordered = jnp.transpose(scale, (*batch, *free, *contracting))
    sizes = ordered.shape[: len(batch) + len(free)]
    others = [1] * (other_ndim - len(dims[0][1 - side]) - len(dims[1][1 - side]))
    if is_lhs:
        return ordered.reshape(*sizes, *others)
    return ordered.reshape(*sizes[: len(batch)], *others, *sizes[len(batch) :])


def split(x: QArray, axis: int, blocks: int) -> QArray:
    """Returns a QArray of blocks along a new first axis, each with one scale along `axis`."""

    def cut(array):
        n = array.shape[axis] // blocks
        view = array.reshape(*array.shape[:axis], blocks, n, *array.shape[axis + 1 :])
        return jnp.moveaxis(view, axis, 0)

    def per_block(scale):
        return cut(jnp.repeat(scale, blocks // scale.shape[axis], axis=axis))

    zero = None if x.zero_point is None else per_block(x.zero_point)
    scale = per_block(x.float_scale())
    return QArray(cut(x.qvalue), scale, zero, None, format=x.element, dtype=x.dtype)

"""`RaggedDot`: the quantized product of a mixture of experts, with `jax.lax.ragged_dot`'s own signature."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping as jt

from jaxquant.numerics import rounding
from jaxquant.numerics.qarray import QArray, dequantize, quantize
from jaxquant.numerics.sharding import call_with_auto_axes
from jaxquant.operations.dot import DotGeneral, as_multiplied, grad_templates, residual, simulate
from jaxquant.operations.native import check_operands, parts, wide
from jaxquant.operations.operands import (
    Operands,
    as_values,
    check_stored,
    differentiable,
    forbid_second_derivative,
    result_spec,
)
from jaxquant.operations.product import result_type

_BY_GROUP = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedDot:
    """A product of each group of rows with a matrix of its own: out[i] = Q_l(lhs)[i] · Q_r(rhs)[group of i].

    A frozen callable, hashable where its formats are static, that goes wherever `jax.lax.ragged_dot` goes.
    Gradients are straight-through, of the quantized operands, in floating point or, by `dlhs` and
    `drhs`, quantized too.  What the backward pass needs is kept as the forward pass quantized it.  Rows
    that belong to no group give zeros, and take no part in any scale.

    rhs may be a `QArray` already, whose quantizer here is None or has the same format; it gets no gradient.

    An operand's ``"channel"`` granularity is, in the forward product, a scale for each row of lhs and for
    each column of each group's matrix; in ∂lhs one for each row of the gradient; in ∂rhs, which sums over
    the rows of a group, one for each column of the gradient, alike in all groups.

    Args:
        forward: the forward product's operands.
        dlhs: the operands of ∂lhs: the incoming gradient (lhs) and rhs (rhs); None for floating point.
            Where its rhs is None, the forward's stored numbers are multiplied again, with their scales
            carried over to the gradient.
        drhs: the same for ∂rhs: the gradient (lhs) and the forward's lhs (rhs).

    Raises:
        ValueError: whatever `DotGeneral` refuses; a granularity in blocks or tiles, or a rotation, of a
            gradient or where native arithmetic multiplies two stored operands; in native arithmetic
            unsigned 8-bit numbers; at the call, operands of other ranks, a group_offset, zero points in
            native arithmetic, or a sum that could leave int32.

    Source: Gale et al. 2022, "MegaBlocks", arXiv 2211.15841, for the product; Jacob et al. 2018, arXiv
    1712.05877, for its quantization.

    >>> from jaxquant.formats import INT8
    >>> from jaxquant.numerics.quantizer import Quantizer
    >>> int8 = Quantizer(INT8, "channel")
    >>> dot = RaggedDot(Operands(int8, int8, "native"))
    >>> rows, experts = jnp.full((3, 1), 127.0), jnp.array([[[1.0]], [[10.0]]])
    >>> dot(rows, experts, jnp.array([1, 1])).round().astype(int).T
    Array([[ 127, 1270,    0]], dtype=int32)
    """

    forward: Operands = dataclasses.field(default_factory=Operands)
    dlhs: Operands | None = None
    drhs: Operands | None = None

    def __post_init__(self):
        DotGeneral(self.forward, self.dlhs, self.drhs)  # refuses what no product takes
        for name in ("forward", "dlhs", "drhs"):
            operands = getattr(self, name)
            if name != "forward" or _multiplies_stored(operands):
                check_operands("a ragged product", name, operands)

    def __call__(
        self,
        lhs: jt.Float[jax.Array, "m k"],
        rhs: jt.Float[jax.Array, "g k n"] | QArray,
        group_sizes: jt.Int[jax.Array, " g"],
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: Any = None,
        group_offset: None = None,
        out_sharding: Any = None,
    ) -> jt.Float[jax.Array, "m n"]:
        """Multiplies as `jax.lax.ragged_dot`, with the same arguments."""
        _check(lhs, rhs, group_sizes, group_offset)
        _check_stored(self, rhs)
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        # Rows go where lhs has them and columns where rhs has them, as in the product with one matrix.
        specs = result_spec(_one_matrix, lhs, rhs, out_sharding)
        compute = functools.partial(RaggedDot._computed, options=options)
        return call_with_auto_axes(compute, (self, lhs, rhs, group_sizes), specs)

    def _computed(self, lhs: Any, rhs: Any, group_sizes: jax.Array, options: dict) -> jax.Array:
        # Rows of no group are multiplied with nothing, so that they must not widen a scale either.
        lhs = in_groups(lhs, group_sizes)
        forward, originals = self.forward, jax.lax.stop_gradient((lhs, rhs))
        if forward.arithmetic == "simulated":
            lhs, rhs = simulate(lhs, forward.lhs, (1,)), simulate(rhs, forward.rhs, (1,))
            if self.dlhs is None and self.drhs is None:
                return jax.lax.ragged_dot(lhs, rhs, group_sizes, **options)
            forward, originals = Operands(), as_values(originals)
        operands = (forward, self.dlhs, self.drhs, originals)
        lhs, rhs = differentiable(lhs, rhs)
        return _ragged(tuple(options.items()), operands, lhs, rhs, group_sizes)


def _multiplies_stored(operands: Any) -> bool:
    """Returns whether both operands' stored numbers are multiplied, and their scales applied after."""
    is_one = isinstance(operands, Operands) and operands.arithmetic == "native"
    return is_one and None not in (operands.lhs, operands.rhs)


def _check(lhs: Any, rhs: Any, group_sizes: Any, group_offset: Any) -> None:
    for name, x, axes in (
        ("lhs", lhs, "m k"),
        ("rhs", rhs, "g k n"),
        ("group_sizes", group_sizes, "g"),
    ):
        is_stored = isinstance(x, QArray) and name != "rhs"
        if is_stored or len(getattr(x, "shape", ())) != len(axes.split()):
            raise ValueError(
                f"{name} is an array with axes ({axes.replace(' ', ', ')}); got {type(x).__name__} of shape "
                f"{getattr(x, 'shape', None)}"
            )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes are integers; got {group_sizes.dtype}")
    if (lhs.shape[1], group_sizes.shape[0]) != (rhs.shape[1], rhs.shape[0]):
        raise ValueError(
            "lhs (m, k), rhs (g, k, n) and group_sizes (g) agree in k and g; got shapes "
            f"{lhs.shape}, {rhs.shape} and {group_sizes.shape}"
        )
    if group_offset is not None:
        raise ValueError(
            f"group_offset is not supported: all groups are computed, from the first; got {group_offset!r}"
        )


def _check_stored(dot: RaggedDot, rhs: Any) -> None:
    """Raises a ValueError for a stored rhs that a product does not take."""
    check_stored("rhs", rhs, dot.forward.rhs)
    if not isinstance(rhs, QArray) or _is_scaled_after(rhs):
        return
    is_carried = dot.dlhs is not None and dot.dlhs.arithmetic == "native" and dot.dlhs.rhs is None
    is_multiplied = dot.forward.arithmetic == "native" and dot.forward.lhs is not None
    if is_carried or is_multiplied:
        raise ValueError(
            "native products of two stored operands take an rhs that is not rotated, and whose scales do not "
            f"vary along k; got scales {rhs.scale.shape} of {rhs.shape}, and hadamard {rhs.hadamard}"
        )


def _is_scaled_after(rhs: QArray) -> bool:
    """Returns whether a stored rhs (g, k, n) has scales that do not vary along k, and no rotation."""
    return rhs.scale.shape[1] == 1 and rhs.hadamard is None


def _one_matrix(lhs: jax.Array, rhs: jax.Array, **options: Any) -> jax.Array:
    return jax.lax.dot_general(lhs, jnp.sum(rhs, axis=0), (((1,), (0,)), ((), ())), **options)


def _groups(group_sizes: jax.Array, rows: int) -> jax.Array:
    """Returns the group of each row; the number of groups for rows that belong to none."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right")


def in_groups(x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Returns x with zeros in the rows that belong to no group, whatever was in them."""
    rows = jnp.arange(x.shape[0])[:, None]
    return jnp.where(rows < jnp.sum(group_sizes), x, jnp.zeros((), x.dtype))


def by_row(scale: jax.Array, group_sizes: jax.Array, rows: int) -> jax.Array:
    """Returns the groups' scales (g, 1, n) in the product's shape: each row gets its group's."""
    if scale.shape[0] == 1:
        return scale[0]
    groups = _groups(group_sizes, rows)
    return jnp.take(
        scale[:, 0], groups, axis=0, mode="fill", fill_value=1
    )  # 1 for rows of no group


def _row_product(lhs: Any, rhs: Any, group_sizes: jax.Array, options: dict) -> jax.Array:
    """Returns each row of lhs (m, k) times its group's rhs (g, k, n)."""
    options, dtype = _split(lhs, rhs, options)
    rhs = _as_multiplied(lhs, rhs)
    if not isinstance(lhs, QArray) and not isinstance(rhs, QArray):
        return jax.lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=dtype, **options)
    left, right, accumulator = parts(lhs, rhs, lhs.shape[1])
    out = jax.lax.ragged_dot(
        left.values, right.values, group_sizes, preferred_element_type=accumulator, **options
    )
    out = out.astype(wide(dtype))
    if left.scale is not None:
        out = out * left.scale.astype(out.dtype)
    if right.scale is not None:
        out = out * by_row(right.scale, group_sizes, lhs.shape[0]).astype(out.dtype)
    return in_groups(out, group_sizes).astype(dtype)  # 0 · NaN is not 0


def _as_multiplied(lhs: QArray | jax.Array, rhs: QArray | jax.Array) -> QArray | jax.Array:
    """Returns rhs (g, k, n), or its values in the type of lhs where scales are not applied after the sum."""
    if not isinstance(rhs, QArray) or isinstance(lhs, QArray) or _is_scaled_after(rhs):
        return rhs
    return dequantize(rhs).astype(lhs.dtype)


def _group_product(lhs: Any, rhs: Any, group_sizes: jax.Array, options: dict) -> jax.Array:
    """Multiplies, for each group, its rows of lhs (m, k), transposed, by its rows of rhs (m, n)."""
    options, dtype = _split(lhs, rhs, options)
    if not isinstance(lhs, QArray) and not isinstance(rhs, QArray):
        return jax.lax.ragged_dot_general(
            lhs, rhs, group_sizes, _BY_GROUP, preferred_element_type=dtype, **options
        )
    left, right, accumulator = parts(lhs, rhs, lhs.shape[0])
    out = jax.lax.ragged_dot_general(
        left.values,
        right.values,
        group_sizes,
        _BY_GROUP,
        preferred_element_type=accumulator,
        **options,
    )
    out = out.astype(wide(dtype))
    if left.scale is not None:
        out = out * left.scale.T[None].astype(out.dtype)
    if right.scale is not None:
        out = out * right.scale[None].astype(out.dtype)
    return out.astype(dtype)


def _split(lhs: Any, rhs: Any, options: dict) -> tuple[dict, Any]:
    """Options of the product of the numbers themselves, and the type of the result."""
    options = dict(options)
    preferred = options.pop("preferred_element_type", None)
    if isinstance(lhs, QArray) and isinstance(rhs, QArray):
        options.pop(
            "precision", None
        )  # chooses among floating-point algorithms; these sums are exact
    return options, preferred or result_type(lhs.dtype, rhs.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged(
    options: Any, operands: Any, lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    return _ragged_forward(options, operands, lhs, rhs, group_sizes)[0]


def _ragged_forward(options, operands, lhs, rhs, group_sizes):
    forward, dlhs, drhs, originals = operands
    left = lhs if forward.lhs is None else quantize(lhs, forward.lhs, 1)
    right = as_multiplied(rhs, originals[1], forward.rhs, (1,))
    out = _row_product(left, right, group_sizes, dict(options))
    # What the backward pass multiplies stays quantized: a quarter of float32's bytes.
    residuals = (
        residual(originals[0], left, drhs, (0,)),
        residual(originals[1], right, dlhs, (2,)),
    )
    return out, (residuals, group_sizes, (dlhs, drhs), grad_templates(lhs, rhs, originals))


def _ragged_backward(options, residuals, gradient):
    (lhs, rhs), group_sizes, (dlhs, drhs), (lhs_like, rhs_like) = residuals
    options = {
        "precision": dict(options)["precision"],
        "preferred_element_type": wide(gradient.dtype),
    }
    gradient = in_groups(gradient, group_sizes)
    left = _lhs_gradient(options, dlhs, gradient, rhs, group_sizes).astype(lhs_like.dtype)
    right = jnp.zeros(0)
    if rhs_like is not None:
        right = _rhs_gradient(options, drhs, gradient, lhs, group_sizes).astype(rhs_like.dtype)
    witnesses = (lhs_like, rhs_like)
    return (
        None,
        forbid_second_derivative(left, witnesses),
        forbid_second_derivative(right, witnesses),
        None,
    )


_ragged.defvjp(_ragged_forward, _ragged_backward)


def _lhs_gradient(options, operands, gradient, rhs, group_sizes) -> jax.Array:
    """∂lhs: each row of the gradient times its group's rhs, transposed."""
    gradient, rhs = _operands(
        operands,
        gradient,
        rhs,
        axis=1,
        carried=lambda scale: by_row(scale, group_sizes, gradient.shape[0]),
    )
    return _row_product(gradient, _matrices_transposed(rhs), group_sizes, options)


def _rhs_gradient(options, operands, gradient, lhs, group_sizes) -> jax.Array:
    """∂rhs: for each group, its rows of lhs, transposed, times those of the gradient."""
    gradient, lhs = _operands(operands, gradient, lhs, axis=0, carried=lambda scale: scale)
    return _group_product(lhs, gradient, group_sizes, options)


def _operands(operands, gradient, kept, axis, carried) -> tuple[Any, Any]:
    """Returns the gradient, quantized along `axis`, and the kept operand, as they are multiplied.

    The forward's own scales vary along what a gradient's product sums over, and not along what it leaves:
    Σ_n g_n (s_n q_n) = Σ_n (g_n s_n) q_n, so that they are carried over to the gradient, and the stored
    numbers are multiplied as they are.
    """
    # The two gradients draw for themselves, were their scales equal.
    key = functools.partial(rounding.key_of, seed=axis)
    if operands is None or operands.arithmetic == "simulated":
        quantizer = None if operands is None else operands.lhs
        gradient = simulate(gradient, quantizer, (axis,), key)
        values = dequantize(kept) if isinstance(kept, QArray) else kept
        return gradient, values.astype(gradient.dtype)
    if isinstance(kept, QArray) and operands.rhs is None:
        wider = wide(gradient.dtype)
        gradient = gradient.astype(wider) * carried(kept.float_scale()).astype(wider)
        kept = dataclasses.replace(kept, scale=jnp.ones((1,) * kept.ndim, jnp.float32))
    if operands.lhs is not None:
        gradient = quantize(gradient, operands.lhs, axis, key)
    return gradient, kept


def _matrices_transposed(rhs: QArray | jax.Array) -> QArray | jax.Array:
    """Returns (g, k, n) as (g, n, k), scales along."""
    if not isinstance(rhs, QArray):
        return jnp.swapaxes(rhs, 1, 2)
    rhs = rhs.unpack()
    qvalue, scale = (jnp.swapaxes(x, 1, 2) for x in (rhs.qvalue, rhs.float_scale()))
    return dataclasses.replace(rhs, qvalue=qvalue, scale=scale)

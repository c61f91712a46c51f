"""`ConvGeneralDilated`: a quantized convolution with `jax.lax.conv_general_dilated`'s own signature."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.numerics import rounding
from jaxquant.numerics.qarray import QArray, dequantize, quantize
from jaxquant.numerics.quantizer import Quantizer
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
from jaxquant.operations.product import apply_scale, is_float8
from jaxquant.operations.taps import integer_convolution
from jaxquant.operations.windows import Window, all_but, towards_lhs, towards_rhs, window_of

Padding = str | Sequence[tuple[int, int]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvGeneralDilated:
    """A convolution of quantized operands: out[n, o, p] = Σ_{c, k} Q_l(lhs)[n, c, p + k] · Q_r(rhs)[o, c, k].

    A frozen callable, hashable where its formats are static, that goes wherever
    `jax.lax.conv_general_dilated` goes, a Flax layer's `conv_general_dilated` included.  Gradients are
    straight-through, of the quantized operands, in floating point or, by `dlhs` and `drhs`, quantized too.
    What the backward pass needs is kept as the forward pass quantized it.

    An operand's ``"channel"`` granularity is a scale for all that is summed over together: in the forward
    product one per element of lhs's batch and one per output feature of rhs; in ∂lhs one per element
    of the gradient's batch (and one per input feature of rhs); in ∂rhs one per feature of the gradient
    (and one per input feature of lhs).

    Args:
        forward: the forward convolution's operands; either may be a `QArray` already.
        dlhs: the operands of ∂lhs: the incoming gradient (lhs) and rhs (rhs); None for floating point.
            Where its rhs is None, the forward's stored numbers are multiplied again, with their scales
            carried over to the gradient.
        drhs: the same for ∂rhs: the gradient (lhs) and the forward's lhs (rhs).

    Raises:
        ValueError: whatever `DotGeneral` refuses; a granularity in blocks or tiles; a rotation; in
            native arithmetic unsigned 8-bit numbers or two float8 types; at the call, zero points there, a
            sum that could leave int32, or lax's own refusals.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 2.

    >>> from jaxquant.formats import INT8
    >>> int8 = Quantizer(INT8, "channel")
    >>> conv = ConvGeneralDilated(Operands(int8, int8, "native"))
    >>> conv(jnp.array([[[1.0, 2.0, 127.0]]]), jnp.array([[[127.0, 1.0]]]), (1,), "VALID")
    Array([[[129., 381.]]], dtype=float32)
    """

    forward: Operands = dataclasses.field(default_factory=Operands)
    dlhs: Operands | None = None
    drhs: Operands | None = None

    def __post_init__(self):
        DotGeneral(self.forward, self.dlhs, self.drhs)  # refuses what no product takes
        for name in ("forward", "dlhs", "drhs"):
            check_operands("a convolution", name, getattr(self, name))
        if not isinstance(self.forward, Operands):  # a placeholder of a tree transformation
            return
        _check_types("forward", self.forward, None)
        _check_types("dlhs", self.dlhs, self.forward.rhs)
        _check_types("drhs", self.drhs, self.forward.lhs)

    def __call__(
        self,
        lhs: jax.Array | QArray,
        rhs: jax.Array | QArray,
        window_strides: Sequence[int],
        padding: Padding,
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Convolves as `jax.lax.conv_general_dilated`, with the same arguments."""
        window = window_of(
            lhs.shape,
            rhs.shape,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            (feature_group_count, batch_group_count),
        )
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        for name, x, spec in (("lhs", lhs, window.lhs_spec), ("rhs", rhs, window.rhs_spec)):
            _check_stored(name, x, getattr(self.forward, name), spec[0])
        specs = result_spec(window.convolve, lhs, rhs, out_sharding)
        compute = functools.partial(ConvGeneralDilated._computed, window=window, options=options)
        return call_with_auto_axes(compute, (self, lhs, rhs), specs)

    def _computed(self, lhs: Any, rhs: Any, window: "Window", options: dict) -> jax.Array:
        forward, originals = self.forward, jax.lax.stop_gradient((lhs, rhs))
        if forward.arithmetic == "simulated":
            lhs = simulate(lhs, forward.lhs, all_but(window.lhs_spec[0], lhs.ndim))
            rhs = simulate(rhs, forward.rhs, all_but(window.rhs_spec[0], rhs.ndim))
            if self.dlhs is None and self.drhs is None:
                return window.convolve(lhs, rhs, **options)
            forward, originals = Operands(), as_values(originals)
        operands = (forward, self.dlhs, self.drhs, originals)
        return _conv(window, tuple(options.items()), operands, *differentiable(lhs, rhs))


def _check_stored(name: str, x: Any, quantizer: Quantizer | None, axis: int) -> None:
    """Raises a ValueError where a stored operand's scales are not what a convolution applies."""
    check_stored(name, x, quantizer)
    if not isinstance(x, QArray):
        return
    if any(x.scale.shape[a] != 1 for a in all_but(axis, x.ndim)) or x.hadamard is not None:
        raise ValueError(
            f"a stored {name} has scales along axis {axis} alone and no rotation, as granularity "
            f"'channel' gives; got scales of shape {x.scale.shape} and hadamard {x.hadamard}"
        )


def _check_types(name: str, operands: Operands | None, kept: Quantizer | None) -> None:
    """Raises a ValueError where a native convolution would multiply two float8 types."""
    if not isinstance(operands, Operands) or operands.arithmetic != "native":
        return
    pair = (operands.lhs, operands.rhs or kept)
    if not all(isinstance(q, Quantizer) and is_float8(q.element) for q in pair):
        return
    first, second = (q.element.dtype for q in pair if q is not None)
    if first != second:
        raise ValueError(
            f"a native convolution multiplies numbers of one float8 type; {name} has {first} and {second}. "
            "Use arithmetic='simulated'."
        )


def _product(window: Window, lhs: Any, rhs: Any, options: dict) -> jax.Array:
    """Convolves two operands: stored numbers are multiplied directly, and scales are applied after."""
    options = dict(options)
    preferred = options.pop("preferred_element_type", None)
    dtype = preferred or jnp.result_type(lhs.dtype, rhs.dtype)
    if not isinstance(lhs, QArray) and not isinstance(rhs, QArray):
        return window.convolve(lhs, rhs, preferred_element_type=preferred, **options)
    if isinstance(lhs, QArray) and isinstance(rhs, QArray):
        options.pop(
            "precision", None
        )  # chooses among floating-point algorithms; these sums are exact
    features = rhs.shape[window.rhs_spec[0]]
    terms = math.prod(rhs.shape) // max(1, features)
    left, right, accumulator = parts(lhs, rhs, terms)
    if accumulator == jnp.int32:
        out = integer_convolution(window, left.values, right.values)
    else:
        out = window.convolve(
            left.values, right.values, preferred_element_type=accumulator, **options
        )
    out = out.astype(wide(dtype))
    if left.scale is not None:
        out = apply_scale(out, window.lhs_scale(left.scale, features).astype(out.dtype))
    if right.scale is not None:
        out = apply_scale(out, window.rhs_scale(right.scale).astype(out.dtype))
    return out.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv(window: Window, options: Any, operands: Any, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return _conv_forward(window, options, operands, lhs, rhs)[0]


def _conv_forward(window, options, operands, lhs, rhs):
    forward, dlhs, drhs, originals = operands
    (batch, lhs_in), (features, rhs_in) = window.lhs_spec[:2], window.rhs_spec[:2]
    ndim = len(window.lhs_spec)
    left = as_multiplied(lhs, originals[0], forward.lhs, all_but(batch, ndim))
    right = as_multiplied(rhs, originals[1], forward.rhs, all_but(features, ndim))
    out = _product(window, left, right, dict(options))
    # What the backward pass multiplies stays quantized: a quarter of float32's bytes.
    residuals = (
        residual(originals[0], left, drhs, all_but(lhs_in, ndim)),
        residual(originals[1], right, dlhs, all_but(rhs_in, ndim)),
    )
    return out, (residuals, (dlhs, drhs), grad_templates(lhs, rhs, originals))


def _conv_backward(window, options, residuals, gradient):
    (lhs, rhs), (dlhs, drhs), (lhs_like, rhs_like) = residuals
    options = {"precision": dict(options)["precision"]}
    left = right = jnp.zeros(0)
    if lhs_like is not None:
        left = jnp.zeros(lhs.shape, lhs_like.dtype)
        if gradient.size:  # XLA has no convolution with an empty window
            left = _lhs_gradient(window, options, dlhs, gradient, lhs.shape, rhs)
        left = left.astype(lhs_like.dtype)
    if rhs_like is not None:
        right = jnp.zeros(rhs.shape, rhs_like.dtype)
        if gradient.size:
            right = _rhs_gradient(window, options, drhs, gradient, lhs, rhs.shape)
        right = right.astype(rhs_like.dtype)
    witnesses = (lhs_like, rhs_like)
    return (
        None,
        forbid_second_derivative(left, witnesses),
        forbid_second_derivative(right, witnesses),
    )


_conv.defvjp(_conv_forward, _conv_backward)


# The two gradients draw for themselves, were their scales equal.
DRHS_KEY = functools.partial(rounding.key_of, seed=1)


def _lhs_gradient(window, options, operands, gradient, lhs_shape, rhs) -> jax.Array:
    """∂lhs: the gradient convolved with rhs turned round, summed over features and space."""
    summed = all_but(window.out_spec[0], gradient.ndim)
    if operands is None or operands.arithmetic == "simulated":
        gradient, values = _in_floats(operands, gradient, rhs, summed)
        return _transposed(lambda x: window.convolve(x, values, **options), lhs_shape, gradient)
    if isinstance(rhs, QArray) and operands.rhs is None:
        # rhs's scales belong to output features, which this product sums over: Σ_o g_o (s_o q_o) is
        # Σ_o (g_o s_o) q_o, and the stored numbers are multiplied as they are.
        wider = wide(gradient.dtype)
        gradient = gradient.astype(wider) * window.rhs_scale(rhs.float_scale()).astype(wider)
        rhs = _without_scale(rhs)
    if operands.lhs is not None:
        gradient = quantize(gradient, operands.lhs, summed, rounding.key_of)
    transposed = towards_lhs(window, lhs_shape, rhs.shape, gradient.shape)
    options = {**options, "preferred_element_type": wide(gradient.dtype)}
    result = _product(transposed, gradient, _transpose_kernel(window, rhs), options)
    batch, features = window.lhs_spec[:2]
    return _regroup(result, features, batch, window.batch_groups)


def _rhs_gradient(window, options, operands, gradient, lhs, rhs_shape) -> jax.Array:
    """∂rhs: lhs convolved with the gradient as the window, summed over batch and space."""
    summed = all_but(window.out_spec[1], gradient.ndim)
    if operands is None or operands.arithmetic == "simulated":
        gradient, values = _in_floats(operands, gradient, lhs, summed)
        return _transposed(lambda x: window.convolve(values, x, **options), rhs_shape, gradient)
    if isinstance(lhs, QArray) and operands.rhs is None:
        # As above; lhs's scales belong to elements of the batch.
        features = gradient.shape[window.out_spec[1]]
        wider = wide(gradient.dtype)
        scale = window.lhs_scale(lhs.float_scale(), features).astype(wider)
        gradient = gradient.astype(wider) * scale
        lhs = _without_scale(lhs)
    if operands.lhs is not None:
        gradient = quantize(gradient, operands.lhs, summed, DRHS_KEY)
    transposed = towards_rhs(window, lhs.shape, rhs_shape, gradient.shape)
    options = {**options, "preferred_element_type": wide(gradient.dtype)}
    return _product(transposed, lhs, gradient, options)


def _in_floats(operands, gradient, kept, summed) -> tuple[jax.Array, jax.Array]:
    """Returns the gradient, fake-quantized if asked, and the kept operand's values, in one type."""
    quantizer = None if operands is None else operands.lhs
    gradient = simulate(gradient, quantizer, summed, rounding.key_of)
    values = dequantize(kept) if isinstance(kept, QArray) else kept
    return gradient, values.astype(gradient.dtype)


def _transposed(linear, shape, gradient) -> jax.Array:
    """Returns the transpose of a linear function of an array of that shape, in the gradient's type."""
    (result,) = jax.linear_transpose(linear, jax.ShapeDtypeStruct(shape, gradient.dtype))(gradient)
    return result


def _without_scale(kept: QArray) -> QArray:
    return dataclasses.replace(kept, scale=jnp.ones((1,) * kept.ndim, jnp.float32))


def _transpose_kernel(window: Window, rhs: QArray | jax.Array) -> QArray | jax.Array:
    """Reverses rhs's window, and moves its groups from the output features to the input features."""
    groups = max(window.feature_groups, window.batch_groups)
    features, inputs, *space = window.rhs_spec

    def turned(x):
        return _regroup(jax.lax.rev(x, space), features, inputs, groups)

    if not isinstance(rhs, QArray):
        return turned(rhs)
    scale = rhs.float_scale()
    if scale.size > 1:  # one per input feature of a group, alike in all groups
        scale = turned(jnp.repeat(scale, groups, axis=features))
    return dataclasses.replace(rhs, qvalue=turned(rhs.qvalue), scale=scale)


def _regroup(x: jax.Array, source: int, target: int, groups: int) -> jax.Array:
    """Splits the groups off axis `source`, outermost within it, and puts them outermost within `target`."""
    if groups == 1:
        return x
    shape = list(x.shape)
    split = x.reshape(*shape[:source], groups, shape[source] // groups, *shape[source + 1 :])
    moved = jnp.moveaxis(split, source, target)
    shape[source] //= groups
    shape[target] *= groups
    return moved.reshape(shape)

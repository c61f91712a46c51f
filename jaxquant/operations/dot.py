"""`DotGeneral`: a quantized matrix product with `jax.lax.dot_general`'s own signature."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.numerics import rounding
from jaxquant.numerics.hadamard import hadamard
from jaxquant.numerics.qarray import QArray, dequantize, fake_quant, quantize
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.numerics.sharding import call_with_auto_axes
from jaxquant.operations.backward import (
    BackwardOperands,
    keeps_rotated,
    kept_operand,
    multiplied,
    rotated_forward,
)
from jaxquant.operations.operands import (
    DimensionNumbers,
    Operands,
    as_tuples,
    as_values,
    check_reuse,
    check_rounding,
    check_stored,
    differentiable,
    forbid_second_derivative,
    result_spec,
)
from jaxquant.operations.product import product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """A matrix product whose operands are quantized: out = Σ_k Q_l(lhs)_k · Q_r(rhs)_k.

    A frozen callable, hashable where its formats are static, that goes wherever `jax.lax.dot_general`
    goes, a Flax layer's `dot_general` included.  Gradients are straight-through, of the quantized
    operands: ∂lhs = g · Q_r(rhs)ᵀ and ∂rhs = Q_l(lhs)ᵀ · g, in floating point or, by `dlhs` and `drhs`,
    quantized too.  What the backward pass needs is kept as the forward pass quantized it.

    An operand may be a `QArray` already, whose quantizer here is None or has the same format; it gets
    no gradient, the other operand does.  Second derivatives pass through simulated products alone; through
    the others they are a ValueError.

    Args:
        forward: the forward product's operands.
        dlhs: the operands of ∂lhs: the incoming gradient (lhs) and rhs (rhs), which are quantized along
            rhs's free axes; None for floating point.  Where its rhs is None, the forward's stored
            numbers are multiplied again, with their scales carried over to the gradient.
        drhs: the same for ∂rhs: the gradient (lhs) and the forward's lhs (rhs).

    A gradient's quantizer that rounds stochastically draws by a key made from the gradient's scales
    (`rounding.key_of`): no key is passed, no state is kept, and the same step repeats exactly.

    Source: Jacob et al. 2018, arXiv 1712.05877; Kumar et al. 2024, arXiv 2411.04330, section 2.

    >>> from jaxquant.formats import INT8
    >>> int8 = Quantizer(INT8, "channel")
    >>> dot = DotGeneral(Operands(int8, int8, "native"))
    >>> dot(jnp.array([[1.0, -127.0]]), jnp.array([[127.0], [2.0]]), (((1,), (0,)), ((), ())))
    Array([[-127.]], dtype=float32)
    """

    forward: Operands = dataclasses.field(default_factory=Operands)
    dlhs: Operands | None = None
    drhs: Operands | None = None

    def __post_init__(self):
        for name in ("forward", "dlhs", "drhs"):
            operands = getattr(self, name)
            if type(operands) is object or (operands is None and name != "forward"):
                continue
            if not isinstance(operands, Operands):
                raise ValueError(f"{name} is an Operands; got {operands!r}")
            if isinstance(operands, BackwardOperands):
                if name == "forward":
                    raise ValueError(
                        f"forward is an Operands of the forward product; got {operands!r}"
                    )
                continue
            for side in ("lhs", "rhs"):
                check_rounding(name, side, getattr(operands, side))
            if name != "forward" and operands.arithmetic == "native":
                check_reuse(
                    name, operands, self.forward.rhs if name == "dlhs" else self.forward.lhs
                )

    def __call__(
        self,
        lhs: jax.Array | QArray,
        rhs: jax.Array | QArray,
        dimension_numbers: DimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Multiplies as `jax.lax.dot_general`, with the same arguments."""
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        dims = as_tuples(dimension_numbers)
        for name, x in (("lhs", lhs), ("rhs", rhs)):
            check_stored(name, x, getattr(self.forward, name))
        lax_product = functools.partial(jax.lax.dot_general, dimension_numbers=dims)
        specs = result_spec(lax_product, lhs, rhs, out_sharding)
        compute = functools.partial(DotGeneral._computed, dims=dims, options=options)
        return call_with_auto_axes(compute, (self, lhs, rhs), specs)

    def _computed(self, lhs: Any, rhs: Any, dims: Any, options: dict) -> jax.Array:
        forward, originals = self.forward, jax.lax.stop_gradient((lhs, rhs))
        if forward.arithmetic == "simulated":
            if keeps_rotated((self.dlhs, self.drhs), forward):
                return self._computed_rotated(lhs, rhs, dims, options)
            lhs = simulate(lhs, forward.lhs, dims[0][0])
            rhs = simulate(rhs, forward.rhs, dims[0][1])
            if self.dlhs is None and self.drhs is None:
                return jax.lax.dot_general(lhs, rhs, dims, **options)
            forward, originals = Operands(), as_values(originals)
        operands = (forward, self.dlhs, self.drhs, originals)
        return _dot(dims, tuple(options.items()), operands, *differentiable(lhs, rhs))

    def _computed_rotated(self, lhs: Any, rhs: Any, dims: Any, options: dict) -> jax.Array:
        """Multiplies in the coordinates in which both operands are quantized, backward too."""
        values = []
        for x, quantizer, axes in zip(
            (lhs, rhs), (self.forward.lhs, self.forward.rhs), dims[0], strict=True
        ):
            if isinstance(x, QArray):
                raise ValueError("a product that keeps rotated operands takes no stored ones")
            turned, quantizer = rotated_forward(x, quantizer, axes)  # pyright: ignore
            values.append(simulate(turned, quantizer, axes).astype(x.dtype))
        operands = (Operands(), self.dlhs, self.drhs, values)
        return _dot(dims, tuple(options.items()), operands, *differentiable(*values))


def simulate(
    x: jax.Array | QArray, quantizer: Quantizer | None, axes: tuple[int, ...], key: Any = None
) -> jax.Array:
    """Returns x as its quantizer leaves it, in x's own type; x where there is none; a stored one's values."""
    if isinstance(x, QArray):
        return dequantize(x)
    return x if quantizer is None else fake_quant(x, quantizer, axes, key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dot(dims: Any, options: Any, operands: Any, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return _dot_forward(dims, options, operands, lhs, rhs)[0]


def _dot_forward(dims, options, operands, lhs, rhs):
    forward, dlhs, drhs, originals = operands
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = dims
    left = as_multiplied(lhs, originals[0], forward.lhs, lhs_axes)
    right = as_multiplied(rhs, originals[1], forward.rhs, rhs_axes)
    if isinstance(left, QArray) or isinstance(right, QArray):
        out = product(left, right, dims, **dict(options))
    else:
        out = jax.lax.dot_general(left, right, dims, **dict(options))
    # What the backward pass multiplies stays quantized: a quarter of float32's bytes.
    residuals = (
        residual(originals[0], left, drhs, free_axes(left.ndim, lhs_axes, lhs_batch)),
        residual(originals[1], right, dlhs, free_axes(right.ndim, rhs_axes, rhs_batch)),
    )
    return out, (residuals, (dlhs, drhs), grad_templates(lhs, rhs, originals))


def as_multiplied(
    x: jax.Array, original: Any, quantizer: Quantizer | None, axes: tuple[int, ...]
) -> Any:
    """Returns an operand as it is multiplied: stored already, or quantized now, or as it is."""
    if isinstance(original, QArray):
        return original
    return x if quantizer is None else quantize(x, quantizer, axes)


def grad_templates(lhs: jax.Array, rhs: jax.Array, originals: Any) -> list[jax.Array | None]:
    """Returns empty parts of the operands, for their gradients' types; None for one that is stored."""

    def empty(x: jax.Array) -> jax.Array:
        return jax.lax.slice_in_dim(x if x.ndim else x[None], 0, 0)

    pairs = zip((lhs, rhs), originals, strict=True)
    return [None if isinstance(o, QArray) else empty(x) for x, o in pairs]


def residual(x: jax.Array, quantized: Any, operands: Operands | None, axes: tuple[int, ...]) -> Any:
    """Returns the other operand for a gradient's product: as in the forward pass, or quantized again.

    Args:
        x: the operand before the forward product quantized it.
        quantized: after.
        operands: the gradient's.
        axes: what the gradient's product sums over.
    """
    if isinstance(operands, BackwardOperands):
        return kept_operand(operands, x, quantized)
    if operands is None or operands.rhs is None:
        return quantized
    if isinstance(x, QArray):
        x = dequantize(x)
    if operands.arithmetic == "native":
        return quantize(x, operands.rhs, axes)
    return fake_quant(x, operands.rhs, axes)


def free_axes(ndim: int, contracting: tuple[int, ...], batch: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a in range(ndim) if a not in contracting and a not in batch)


def _dot_backward(dims, options, residuals, gradient):
    (lhs, rhs), (dlhs, drhs), (lhs_like, rhs_like) = residuals
    options = {"precision": dict(options)["precision"]}
    left = right = jnp.zeros(0)
    # Names for profiles and compiled text: both gradients come from the same line of a model.
    if lhs_like is not None:
        with jax.named_scope("dlhs"):
            left = _lhs_gradient(dims, options, dlhs, gradient, lhs, rhs).astype(lhs_like.dtype)
    if rhs_like is not None:
        with jax.named_scope("drhs"):
            right = _rhs_gradient(dims, options, drhs, gradient, lhs, rhs).astype(rhs_like.dtype)
    witnesses = (lhs_like, rhs_like)
    return (
        None,
        forbid_second_derivative(left, witnesses),
        forbid_second_derivative(right, witnesses),
    )


_dot.defvjp(_dot_forward, _dot_backward)


def gradient_numbers(dims: Any, ndims: tuple[int, int], side: int) -> Any:
    """Returns dimension numbers of a gradient's product.

    Args:
        dims: the forward product's.
        ndims: of its operands.
        side: 0 for ∂lhs, the gradient times rhs; 1 for ∂rhs, lhs times the gradient.
    """
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = dims
    n = len(lhs_batch)
    lhs_free = free_axes(ndims[0], lhs_axes, lhs_batch)
    rhs_free = free_axes(ndims[1], rhs_axes, rhs_batch)
    # The gradient's axes: batch, lhs's free axes, rhs's.
    batch, middle = tuple(range(n)), n + len(lhs_free)
    if side == 0:
        return ((tuple(range(middle, middle + len(rhs_free))), rhs_free), (batch, rhs_batch))
    return ((lhs_free, tuple(range(n, middle))), (lhs_batch, batch))


def _lhs_gradient(dims, options, operands, gradient, lhs, rhs) -> jax.Array:
    """∂lhs: the gradient times rhs, summed over rhs's free axes."""
    (lhs_axes, rhs_axes), (lhs_batch, _) = dims
    lhs_free = free_axes(lhs.ndim, lhs_axes, lhs_batch)
    numbers = gradient_numbers(dims, (lhs.ndim, rhs.ndim), 0)
    result = _gradient_product(operands, gradient, rhs, numbers, options, gradient_first=True)
    # The result's axes: batch, lhs's free axes, then rhs's contracting axes in rising order.
    contracted = [lhs_axes[rhs_axes.index(a)] for a in sorted(rhs_axes)]
    return _in_place(result, (*lhs_batch, *lhs_free, *contracted), rhs, rhs_axes, lhs_axes)


def _rhs_gradient(dims, options, operands, gradient, lhs, rhs) -> jax.Array:
    """∂rhs: lhs times the gradient, summed over lhs's free axes."""
    (lhs_axes, rhs_axes), (_, rhs_batch) = dims
    rhs_free = free_axes(rhs.ndim, rhs_axes, rhs_batch)
    numbers = gradient_numbers(dims, (lhs.ndim, rhs.ndim), 1)
    result = _gradient_product(operands, gradient, lhs, numbers, options, gradient_first=False)
    contracted = [rhs_axes[lhs_axes.index(a)] for a in sorted(lhs_axes)]
    return _in_place(result, (*rhs_batch, *contracted, *rhs_free), lhs, lhs_axes, rhs_axes)


def _in_place(result, order, kept, kept_axes, axes) -> jax.Array:
    """Returns a gradient in the operand's axis order, rotated back from the kept operand's coordinates."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    result = jnp.transpose(result, inverse)
    if isinstance(kept, QArray) and kept.hadamard is not None and _rotated_along(kept, kept_axes):
        return hadamard(result, kept.hadamard[0], axes[-1])
    return result


def _rotated_along(kept: QArray, axes: tuple[int, ...]) -> bool:
    """Returns whether a kept operand is in coordinates rotated along what the forward product summed over."""
    assert kept.hadamard is not None
    return kept.hadamard[1] % kept.ndim == axes[-1]


def _gradient_product(
    operands, gradient, kept, numbers, options, gradient_first: bool
) -> jax.Array:
    """Returns the product of the gradient with what was kept, either of them first; `numbers` say which."""
    side = 0 if gradient_first else 1
    axes = numbers[0][side]
    # Each of the two products draws for itself, were the scales equal.
    key = functools.partial(rounding.key_of, seed=side)

    def multiply(gradient, kept, dot=product):
        pair = (gradient, kept) if gradient_first else (kept, gradient)
        return dot(*pair, numbers, **options)

    if isinstance(operands, BackwardOperands):
        pair = multiplied(operands, gradient, kept, numbers, side)
        return multiply(*pair, jax.lax.dot_general)
    if operands is None or operands.arithmetic == "simulated":
        quantizer = None if operands is None else operands.lhs
        values = _unrotate(kept)
        gradient = simulate(gradient, quantizer, axes, key)
        return multiply(gradient, values.astype(gradient.dtype), jax.lax.dot_general)
    if isinstance(kept, QArray) and operands.rhs is None:
        gradient, kept = carry_scale(gradient, kept, numbers, side)
    if operands.lhs is not None:
        gradient = quantize(gradient, operands.lhs, axes, key)
        if isinstance(kept, QArray):  # rotations of the forward's sum are no part of this one
            kept = dataclasses.replace(kept, hadamard=gradient.hadamard)
    if isinstance(gradient, QArray) or isinstance(kept, QArray):
        return multiply(gradient, kept, functools.partial(product, is_gradient=True))
    return multiply(gradient, kept, jax.lax.dot_general)


def _unrotate(kept: QArray | jax.Array) -> jax.Array:
    """Returns the values of what was kept, in the coordinates that it is in."""
    if not isinstance(kept, QArray):
        return kept
    return dequantize(dataclasses.replace(kept, hadamard=None))


def carry_scale(
    gradient: jax.Array, kept: QArray, numbers: Any, side: int
) -> tuple[jax.Array, QArray]:
    """Moves the kept operand's scales over to the gradient.

    They vary along what this product sums over, and not along what it leaves, so that
    Σ_n g_n (s_n q_n) = Σ_n (g_n s_n) q_n: the stored numbers are multiplied as they are.
    """
    if kept.zero_point is not None and kept.zero_point.size != 1:
        raise ValueError(
            "a native gradient product cannot multiply the forward's stored numbers again where their "
            "zero points vary along its sum; give it an rhs quantizer"
        )
    kept_axes, kept_batch = numbers[0][1 - side], numbers[1][1 - side]
    axes, batch = numbers[0][side], numbers[1][side]
    scale = kept.float_scale()
    if any(scale.shape[a] != 1 for a in free_axes(kept.ndim, kept_axes, kept_batch)):
        raise ValueError(
            "a native gradient product cannot multiply stored numbers again whose scales vary along what it "
            f"leaves, as scales in blocks do; got scales of shape {scale.shape}. Give it an rhs quantizer"
        )
    if scale.size == 1:  # does not vary, and is applied to the result
        return gradient, kept
    order = dict(zip((*axes, *batch), (*kept_axes, *kept_batch), strict=True))
    moved = jnp.transpose(
        scale, (*(order[a] for a in sorted(order)), *free_axes(kept.ndim, kept_axes, kept_batch))
    )
    shape = [scale.shape[order[a]] if a in order else 1 for a in range(gradient.ndim)]
    wider = jnp.float32 if jnp.finfo(gradient.dtype).bits < 32 else gradient.dtype
    carried = gradient.astype(wider) * moved.reshape(shape).astype(wider)
    ones = jnp.ones((1,) * kept.ndim, jnp.float32)
    # A new QArray: a Block's scales are carried over too, and what is left is its elements'.
    stored = QArray(kept.qvalue, ones, kept.zero_point, format=kept.element, dtype=carried.dtype)
    return carried, stored

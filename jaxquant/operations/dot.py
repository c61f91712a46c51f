"""`DotGeneral`: a quantized matrix product with `jax.lax.dot_general`'s own signature."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant.numerics import estimators, rounding
from jaxquant.numerics.hadamard import hadamard
from jaxquant.numerics.qarray import QArray, dequantize, fake_quant, quantize
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.numerics.sharding import computed_as_auto, spec_of
from jaxquant.operations.integers import is_integer
from jaxquant.operations.product import is_float8, product

DimensionNumbers = Any  # ((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch)), as in lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """What one matrix product takes: its two operands' quantizers, and how the product is computed.

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
            for side in ("lhs", "rhs"):
                _check_rounding(name, side, getattr(operands, side))
            if name != "forward" and operands.arithmetic == "native":
                _check_reuse(
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
        """As `jax.lax.dot_general`, whose arguments these are."""
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        dims = as_tuples(dimension_numbers)
        for name, x in (("lhs", lhs), ("rhs", rhs)):
            check_stored(name, x, getattr(self.forward, name))
        lax_product = functools.partial(jax.lax.dot_general, dimension_numbers=dims)
        specs = result_spec(lax_product, lhs, rhs, out_sharding)
        compute = functools.partial(DotGeneral._computed, dims=dims, options=options)
        return computed_as_auto(compute, (self, lhs, rhs), specs)

    def _computed(self, lhs: Any, rhs: Any, dims: Any, options: dict) -> jax.Array:
        forward, originals = self.forward, jax.lax.stop_gradient((lhs, rhs))
        if forward.arithmetic == "simulated":
            lhs = simulate(lhs, forward.lhs, dims[0][0])
            rhs = simulate(rhs, forward.rhs, dims[0][1])
            if self.dlhs is None and self.drhs is None:
                return jax.lax.dot_general(lhs, rhs, dims, **options)
            forward, originals = Operands(), as_values(originals)
        operands = (forward, self.dlhs, self.drhs, originals)
        return _dot(dims, tuple(options.items()), operands, *differentiable(lhs, rhs))


def _varying_axes(x: jax.Array) -> frozenset:
    """The axes of a surrounding shard_map along which an array differs from device to device."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # what newer versions call it
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)


def result_spec(
    operation: Callable[..., jax.Array], lhs: Any, rhs: Any, out_sharding: Any
) -> Callable[[], PartitionSpec]:
    """How the result of lax's own operation on such operands is split, for `computed_as_auto`.

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
    """An operand's shape and sharding, stored or not."""
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
    """What a product is differentiated by: its operands, with nothing in the place of stored ones.

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
def first_order(value: jax.Array, witnesses: Any) -> jax.Array:
    """A value whose derivative, by itself or by the witnesses, is an error.

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


first_order.defvjp(lambda value, witnesses: (value, None), _refuse)


def _check_rounding(product_name: str, side: str, quantizer: Any) -> None:
    """Only a gradient, whose scales change with every step, makes its own key."""
    is_gradient = product_name != "forward" and side == "lhs"
    if (
        isinstance(quantizer, Quantizer)
        and quantizer.rounding in rounding.NEEDS_KEY
        and not is_gradient
    ):
        raise ValueError(
            f"{side} of {product_name} rounds stochastically, which needs a PRNG key that dot_general's "
            "signature does not carry; use rounding.nearest there"
        )


def _check_reuse(name: str, operands: Operands, kept: Quantizer | None) -> None:
    """A native gradient product multiplies what the forward product kept, or quantizes it itself."""
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
    """Dimension numbers as tuples of Python ints, hashable whatever sequences they came in."""
    dims = tuple(tuple(tuple(int(a) for a in axes) for axes in pair) for pair in dimension_numbers)
    if any(a < 0 for pair in dims for axes in pair for a in axes):
        raise ValueError(f"dimension numbers count axes from the start; got {dimension_numbers}")
    return dims


def simulate(
    x: jax.Array | QArray, quantizer: Quantizer | None, axes: tuple[int, ...], key: Any = None
) -> jax.Array:
    """x as its quantizer leaves it, in x's own type; x where there is none; a stored one's values."""
    if isinstance(x, QArray):
        return dequantize(x)
    return x if quantizer is None else fake_quant(x, quantizer, axes, key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dot(dims: Any, options: Any, operands: Any, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return _dot_forward(dims, options, operands, lhs, rhs)[0]


def _dot_forward(dims, options, operands, lhs, rhs):
    forward, dlhs, drhs, originals = operands
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = dims
    left = laid(lhs, originals[0], forward.lhs, lhs_axes)
    right = laid(rhs, originals[1], forward.rhs, rhs_axes)
    if isinstance(left, QArray) or isinstance(right, QArray):
        out = product(left, right, dims, **dict(options))
    else:
        out = jax.lax.dot_general(left, right, dims, **dict(options))
    # What the backward pass multiplies stays quantized: a quarter of float32's bytes.
    residuals = (
        kept(originals[0], left, drhs, free_axes(left.ndim, lhs_axes, lhs_batch)),
        kept(originals[1], right, dlhs, free_axes(right.ndim, rhs_axes, rhs_batch)),
    )
    return out, (residuals, (dlhs, drhs), likes(lhs, rhs, originals))


def laid(x: jax.Array, original: Any, quantizer: Quantizer | None, axes: tuple[int, ...]) -> Any:
    """An operand as it is multiplied: stored already, or quantized now, or as it is."""
    if isinstance(original, QArray):
        return original
    return x if quantizer is None else quantize(x, quantizer, axes)


def likes(lhs: jax.Array, rhs: jax.Array, originals: Any) -> list[jax.Array | None]:
    """Empty parts of the operands, for their gradients' types; None for one that is stored."""

    def empty(x: jax.Array) -> jax.Array:
        return jax.lax.slice_in_dim(x if x.ndim else x[None], 0, 0)

    pairs = zip((lhs, rhs), originals, strict=True)
    return [None if isinstance(o, QArray) else empty(x) for x, o in pairs]


def kept(x: jax.Array, quantized: Any, operands: Operands | None, axes: tuple[int, ...]) -> Any:
    """What a gradient's product needs of the other operand: as the forward had it, or quantized anew.

    Args:
        x: the operand before the forward product quantized it.
        quantized: after.
        operands: the gradient's.
        axes: what the gradient's product sums over.
    """
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
    return None, first_order(left, witnesses), first_order(right, witnesses)


_dot.defvjp(_dot_forward, _dot_backward)


def gradient_numbers(dims: Any, ndims: tuple[int, int], side: int) -> Any:
    """Dimension numbers of a gradient's product.

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
    """A gradient with its axes in the operand's order, and out of the coordinates of the kept operand."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    result = jnp.transpose(result, inverse)
    if isinstance(kept, QArray) and kept.hadamard is not None and _rotated_along(kept, kept_axes):
        return hadamard(result, kept.hadamard[0], axes[-1])
    return result


def _rotated_along(kept: QArray, axes: tuple[int, ...]) -> bool:
    """Whether a kept operand is in coordinates rotated along what the forward product summed over."""
    assert kept.hadamard is not None
    return kept.hadamard[1] % kept.ndim == axes[-1]


def _gradient_product(
    operands, gradient, kept, numbers, options, gradient_first: bool
) -> jax.Array:
    """The product of the gradient with what was kept, either of them first; `numbers` say which."""
    side = 0 if gradient_first else 1
    axes = numbers[0][side]
    # Each of the two products draws for itself, were the scales equal.
    key = functools.partial(rounding.key_of, seed=side)

    def multiply(gradient, kept, dot=product):
        pair = (gradient, kept) if gradient_first else (kept, gradient)
        return dot(*pair, numbers, **options)

    if operands is None or operands.arithmetic == "simulated":
        quantizer = None if operands is None else operands.lhs
        values = _unrotated(kept)
        gradient = simulate(gradient, quantizer, axes, key)
        return multiply(gradient, values.astype(gradient.dtype), jax.lax.dot_general)
    if isinstance(kept, QArray) and operands.rhs is None:
        gradient, kept = carry_scale(gradient, kept, numbers, side)
    if operands.lhs is not None:
        gradient = quantize(gradient, operands.lhs, axes, key)
        if isinstance(kept, QArray):  # rotations of the forward's sum are no part of this one
            kept = dataclasses.replace(kept, hadamard=gradient.hadamard)
    if isinstance(gradient, QArray) or isinstance(kept, QArray):
        return multiply(gradient, kept)
    return multiply(gradient, kept, jax.lax.dot_general)


def _unrotated(kept: QArray | jax.Array) -> jax.Array:
    """The values of what was kept, in the coordinates that it is in."""
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

"""Scales for a layer's input channels, and the product that applies them: y = (s W)ᵀ (x / s).

In floating point the scales s change nothing.  Quantized, they decide which channels get the finer share of
the grid: `awq_scale` chooses them for a quantized weight alone, `smoothquant_scale` for a quantized weight
and quantized inputs.  `Smoothed` wraps a layer's product with them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping as jt

from jaxquant.dot import DimensionNumbers, as_tuples
from jaxquant.ptq.solvers import Statistics, check_grid, check_layer, least_of, objective
from jaxquant.qarray import QArray, fake_quant
from jaxquant.quantizer import Quantizer

# Channels below this share of the largest one count as that large, so that no scale is zero or Inf.
_LEAST_SHARE = 1e-5


def awq_scale(
    weight: jt.Float[jax.Array, "n m"], state: Statistics, quantizer: Quantizer, *, grid: int = 20
) -> jt.Float[jax.Array, " n"]:
    """Activation-aware scales: input channels that are large are given the finer share of the grid.

    s_j = (mean |x_j| / g)^α with g the geometric mean over channels, and α among 0, 1/grid, …, 1 the one
    with the least objective of Ŵ = Q(s W) / s, for inputs divided by s.  Equal objectives take the smaller
    α, and α = 0 is rounding to nearest: on the inputs seen the result is never worse than that.

    Args:
        weight: W, inputs by outputs.
        state: of the inputs, with their Hessian.
        quantizer: how s W is quantized along axis 0.
        grid: steps of the search.

    Returns:
        s, positive: what the weight's rows are multiplied with and the inputs divided by.

    Raises:
        ValueError: shapes that do not fit; statistics without a Hessian; a grid below 1.

    Source: Lin et al. 2023, arXiv 2306.00978, section 3.2.

    >>> from jaxquant.formats import Int
    >>> x = jax.random.normal(jax.random.key(0), (64, 8)) * jnp.array([30.0] + [1.0] * 7)
    >>> weight = jax.random.normal(jax.random.key(1), (8, 4))
    >>> from jaxquant.ptq.solvers import statistics, update
    >>> state = update(statistics(8), x)
    >>> scale = awq_scale(weight, state, Quantizer(Int(3), "channel"))
    >>> bool(scale[0] > scale[1:].max())
    True
    """
    check_layer(weight, state.hessian, quantizer)
    check_grid(grid)
    return _awq_scale(weight, state.absmean, state.hessian, quantizer, grid)


@functools.partial(jax.jit, static_argnames="grid")
def _awq_scale(
    weight: jax.Array, absmean: jax.Array, hessian: jax.Array, quantizer: Quantizer, grid: int
) -> jax.Array:
    weight = weight.astype(jnp.float32)
    logs = jnp.log(_floored(absmean))
    logs = logs - jnp.mean(logs)

    def loss(exponent: jax.Array) -> jax.Array:
        scale = jnp.exp(exponent * logs)[:, None]
        return objective(weight, fake_quant(weight * scale, quantizer, 0) / scale, hessian)

    exponents = jnp.linspace(0, 1, grid + 1)
    return jnp.exp(exponents[least_of(jax.lax.map(loss, exponents))] * logs)


def smoothquant_scale(
    weight: jt.Float[jax.Array, "n m"], state: Statistics, alpha: float = 0.5
) -> jt.Float[jax.Array, " n"]:
    """Scales that move the difficulty of quantizing from the inputs to the weight:

        s_j = max |x_j|^α / max |W_j|^(1 − α).

    Magnitudes below 10⁻⁵ of the largest channel's count as that large, so that a channel without inputs
    gets a small s, and one without weights a large one; where all are zero they count as one.

    Args:
        weight: W, inputs by outputs; several that share their inputs are joined along the outputs.
        state: of the inputs.
        alpha: α, from 0, all to the inputs, to 1, all to the weight.

    Returns:
        s, positive: what the weight's rows are multiplied with and the inputs divided by.

    Raises:
        ValueError: alpha outside [0, 1]; shapes that do not fit.

    Source: Xiao et al. 2022, arXiv 2211.10438, equation 4.

    >>> from jaxquant.ptq.solvers import statistics, update
    >>> state = update(statistics(2, hessian=False), jnp.array([[8.0, 1.0]]))
    >>> smoothquant_scale(jnp.array([[0.5], [1.0]]), state)
    Array([4., 1.], dtype=float32)
    """
    check_layer(weight, None, None)
    if state.largest.shape != weight.shape[:1]:
        raise ValueError(
            f"statistics of {state.largest.shape[0]} channels do not fit a weight of shape {weight.shape}"
        )
    if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha is from 0 to 1; got {alpha!r}")
    rows = jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=1, initial=0)
    return _floored(state.absmax) ** alpha / _floored(rows) ** (1 - alpha)


def _floored(magnitudes: jax.Array) -> jax.Array:
    """Magnitudes of channels, none less than a small share of the largest; ones where all are zero."""
    largest = jnp.max(magnitudes)
    return jnp.where(largest > 0, jnp.maximum(magnitudes, _LEAST_SHARE * largest), 1)


def rescaled(state: Statistics, scale: jt.Float[jax.Array, " n"]) -> Statistics:
    """The statistics of x / scale, of those of x: what a smoothed layer's weight is multiplied with.

    Args:
        state: of x.
        scale: positive, one for each channel.

    >>> from jaxquant.ptq.solvers import statistics, update
    >>> rescaled(update(statistics(1), jnp.array([[6.0]])), jnp.array([2.0])).hessian
    Array([[9.]], dtype=float32)
    """
    inverse = 1 / scale
    products = state.products
    if products is not None:
        products = products * inverse[:, None] * inverse[None, :]
    return dataclasses.replace(
        state,
        products=products,
        largest=state.largest * inverse,
        magnitudes=state.magnitudes * inverse,
    )


@functools.partial(jax.tree_util.register_pytree_node_class)
@dataclasses.dataclass(frozen=True)
class Smoothed:
    """A product with `jax.lax.dot_general`'s own signature, of lhs / s and s · rhs, for another to compute.

    A right operand that is stored is passed on as it is: it was multiplied by s, with `multiplied`, before
    it was quantized.  One that is not is multiplied here in the same way, so that both give the same product.

    Args:
        dot_general: what computes the product: `jax.lax.dot_general`, or a `DotGeneral`.
        scale: s, positive, one number for each channel that is summed over; where several axes are, in
            the order of the right operand's own axes, flattened.

    Raises:
        ValueError: a dot_general that is not callable; a scale that is no floating-point array.  When
            called: a left operand that is stored, or operands with another number of channels.

    >>> dot = Smoothed(jax.lax.dot_general, jnp.array([2.0, 4.0]))
    >>> dot(jnp.array([[6.0, 8.0]]), jnp.array([[1.0], [0.5]]), (((1,), (0,)), ((), ())))
    Array([[10.]], dtype=float32)
    """

    dot_general: Callable[..., jax.Array]
    scale: jt.Float[jax.Array, " n"]

    def __post_init__(self):
        if not callable(self.dot_general):
            raise ValueError(
                f"dot_general is a function, as jax.lax.dot_general; got {self.dot_general!r}"
            )
        if not jnp.issubdtype(getattr(self.scale, "dtype", type(None)), jnp.floating):
            raise ValueError(f"scale is a floating-point array; got {self.scale!r}")

    @property
    def nbytes(self) -> int:
        """Bytes that the scales hold."""
        return self.scale.size * self.scale.dtype.itemsize

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array | QArray,
        dimension_numbers: DimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: Any = None,
        **options: Any,
    ) -> jax.Array:
        """As `jax.lax.dot_general`, whose arguments these are."""
        dims = as_tuples(dimension_numbers)
        if isinstance(lhs, QArray):
            raise ValueError(
                "the left operand of a smoothed product is divided by its scales before it is quantized; "
                "got one that is stored already"
            )
        # Pairs of axes in the order of the right operand's, which is the scales'.
        pairs = sorted(zip(*dims[0], strict=True), key=lambda pair: pair[1])
        lhs = multiplied(lhs, 1 / self.scale, [left for left, _ in pairs])
        if not isinstance(rhs, QArray):
            rhs = multiplied(rhs, self.scale, [right for _, right in pairs])
        return self.dot_general(
            lhs,
            rhs,
            dims,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **options,
        )

    def tree_flatten(self):
        # A product that is a pytree holds data; another is a function, and static.
        is_data = not jax.tree_util.all_leaves([self.dot_general])
        children = (self.dot_general if is_data else None, self.scale)
        return children, None if is_data else self.dot_general

    @classmethod
    def tree_unflatten(cls, function, children):
        instance = object.__new__(cls)
        dot_general, scale = children
        object.__setattr__(instance, "dot_general", dot_general if function is None else function)
        object.__setattr__(instance, "scale", scale)
        return instance


def multiplied(
    x: jt.Float[jax.Array, "*shape"], factor: jt.Float[jax.Array, " n"], axes: Sequence[int]
) -> jt.Float[jax.Array, "*shape"]:
    """x with each channel multiplied by its factor, in float32, in x's own type.

    Args:
        x: values.
        factor: one number for each channel.
        axes: the axes, counted from the start, whose places are the channels, in the order in which
            they are flattened.

    Raises:
        ValueError: as many factors as channels are not given.

    >>> multiplied(jnp.ones((1, 2, 2)), jnp.array([1.0, 2.0, 3.0, 4.0]), (2, 1))
    Array([[[1., 3.],
            [2., 4.]]], dtype=float32)
    """
    sizes = tuple(x.shape[a] for a in axes)
    if factor.shape != (math.prod(sizes),):
        raise ValueError(
            f"axes {tuple(axes)} of shape {x.shape} have {math.prod(sizes)} channels; "
            f"got factors of shape {factor.shape}"
        )
    rising = sorted(range(len(axes)), key=axes.__getitem__)
    laid = jnp.transpose(factor.astype(jnp.float32).reshape(sizes), rising)
    laid = laid.reshape([n if a in axes else 1 for a, n in enumerate(x.shape)])
    return (x.astype(jnp.float32) * laid).astype(x.dtype)

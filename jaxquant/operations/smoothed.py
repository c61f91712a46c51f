"""`Smoothed`: a product whose input channels are scaled: (x / s) · (s W).

In floating point the scales s change nothing.  Quantized, they decide which channels get the finer share of
the grid; `jaxquant.ptq.smooth` finds them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np

from jaxquant.numerics.qarray import QArray
from jaxquant.numerics.sharding import call_with_auto_axes, spec_of
from jaxquant.operations.operands import DimensionNumbers, as_tuples


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
        """Multiplies as `jax.lax.dot_general`, with the same arguments."""
        dims = as_tuples(dimension_numbers)
        if isinstance(lhs, QArray):
            raise ValueError(
                "the left operand of a smoothed product is divided by its scales before it is quantized; "
                "got one that is stored already"
            )
        # Pairs of axes in the order of the right operand's, which is the scales'.
        pairs = sorted(zip(*dims[0], strict=True), key=lambda pair: pair[1])
        # A layer's part of several layers' scales may have axes of size 1 before their own.
        scale = self.scale
        scale = scale.reshape(-1) if scale.size == scale.shape[-1] else scale
        lhs = multiplied(lhs, 1 / scale, [left for left, _ in pairs])
        if not isinstance(rhs, QArray):
            rhs = multiplied(rhs, scale, [right for _, right in pairs])
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
    """Returns x with each channel multiplied by its factor, in float32 or wider, in x's own type.

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
    multiply = functools.partial(_multiplied, axes=tuple(axes))
    return call_with_auto_axes(multiply, (x, factor), lambda: spec_of(x))


def _multiplied(x: jax.Array, factor: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    sizes = tuple(x.shape[a] for a in axes)
    rising = sorted(range(len(axes)), key=axes.__getitem__)
    wider = max(np.dtype(jnp.float32), x.dtype, key=lambda dtype: dtype.itemsize)
    broadcast = jnp.transpose(factor.astype(wider).reshape(sizes), rising)
    broadcast = broadcast.reshape([n if a in axes else 1 for a, n in enumerate(x.shape)])
    return (x.astype(wider) * broadcast).astype(x.dtype)

"""`Adapted`: a product with a low-rank one beside it, x · W + gain · (x · A) · B."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.numerics.qarray import QArray
from jaxquant.operations.operands import DimensionNumbers, as_tuples


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("a", "b", "gain"),
    meta_fields=("dot_general",),
)
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A product with `jax.lax.dot_general`'s own signature and a low-rank product beside it.

    The weight, which another product multiplies, may be stored in few bits; A and B are trained.

    Args:
        dot_general: what computes x · W.
        a: A, [n, rank]: n numbers that are summed over, in the order of the right operand's own axes.
        b: B, [rank, m]: m numbers of the right operand's other axes, in their order.
        gain: what the low-rank product is multiplied with.

    Source: Hu et al. 2021, arXiv 2106.09685; over a base of 4 bits Dettmers et al. 2023, arXiv 2305.14314.

    >>> dot = Adapted(jax.lax.dot_general, jnp.ones((2, 1)), jnp.ones((1, 1)), 0.5)
    >>> dot(jnp.array([[1.0, 2.0]]), jnp.array([[1.0], [0.0]]), (((1,), (0,)), ((), ())))
    Array([[2.5]], dtype=float32)
    """

    dot_general: Callable[..., jax.Array]
    a: jax.Array
    b: jax.Array
    gain: Any = 1.0

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array | QArray,
        dimension_numbers: DimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: Any = None,
        **options: Any,
    ) -> jax.Array:
        """Multiplies as `jax.lax.dot_general`, with the same arguments but without batch axes."""
        (left, right), (batch, _) = as_tuples(dimension_numbers)
        if batch:
            raise ValueError("adapters are of one matrix; got a product with batch axes")
        plain = self.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, **options
        )
        pairs = sorted(zip(left, right, strict=True), key=lambda pair: pair[1])
        x = jnp.moveaxis(lhs, [p for p, _ in pairs], range(lhs.ndim - len(pairs), lhs.ndim))
        x = x.reshape(*x.shape[: lhs.ndim - len(pairs)], -1)
        free = [n for a, n in enumerate(rhs.shape) if a not in right]
        check(self.a, self.b, x.shape[-1], math.prod(free))
        low = (x @ self.a.astype(x.dtype)) @ self.b.astype(x.dtype)
        low = low.reshape(*x.shape[:-1], *free) * jnp.asarray(self.gain, x.dtype)
        return plain + low.astype(plain.dtype)

    def delta(self, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
        """Returns gain · A · B as what a weight of a shape is added to, that is summed over along `axes`."""
        free = [a for a in range(len(shape)) if a not in axes]
        order = [*sorted(axes), *free]
        flat = (self.a @ self.b) * jnp.asarray(self.gain, self.a.dtype)
        whole = flat.reshape([shape[a] for a in order])
        return jnp.transpose(whole, [order.index(a) for a in range(len(shape))])


def check(a: jax.Array, b: jax.Array, n: int, m: int) -> None:
    """Raises a ValueError for adapters of another weight."""
    if a.shape[0] != n or b.shape[-1] != m or a.shape[-1] != b.shape[0]:
        raise ValueError(
            f"a weight of {n} by {m} has adapters [{n}, rank] and [rank, {m}]; "
            f"got {list(a.shape)} and {list(b.shape)}"
        )

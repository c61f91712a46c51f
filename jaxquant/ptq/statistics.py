"""Statistics of a layer's inputs over batches: their second moment and magnitudes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping as jt

from jaxquant.checks import check_whole
from jaxquant.numerics.reductions import largest

matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """Sums over one layer's inputs x, so that batches can be added.

    Attributes:
        products: Σ x xᵀ, or None where it was not asked for.
        largest: max |x| of each channel.
        magnitudes: Σ |x| of each channel.
        count: how many x were seen, below 2³¹.
        nonfinite: how many of their elements were NaN or Inf.  The others are NaN or Inf then too, and
            what is solved with them decodes to NaN.
    """

    products: jt.Float[jax.Array, "n n"] | None
    largest: jt.Float[jax.Array, " n"]
    magnitudes: jt.Float[jax.Array, " n"]
    count: jt.Int[jax.Array, ""]
    nonfinite: jt.Int[jax.Array, ""]

    @property
    def hessian(self) -> jt.Float[jax.Array, "n n"]:
        """H = Σ x xᵀ / count, half of the Hessian of ‖(W − Ŵ)ᵀx‖² by Ŵ; NaN where nothing was seen."""
        if self.products is None:
            raise ValueError(
                "these statistics hold no Hessian; start them with statistics(n, hessian=True)"
            )
        return self.products / self.count.astype(jnp.float32)

    @property
    def absmax(self) -> jt.Float[jax.Array, " n"]:
        """max |x| of each channel; zero where nothing was seen."""
        return self.largest

    @property
    def absmean(self) -> jt.Float[jax.Array, " n"]:
        """Σ |x| / count of each channel; NaN where nothing was seen."""
        return self.magnitudes / self.count.astype(jnp.float32)


def statistics(n: int, hessian: bool = True) -> InputStatistics:
    """Statistics of inputs of n channels that have seen nothing; `update` gives the next.

    Args:
        n: channels, at least 1.
        hessian: whether Σ x xᵀ is kept, which takes 4n² bytes.

    Raises:
        ValueError: n that is no integer of at least 1.

    >>> state = update(statistics(2), jnp.array([[1.0, 0.0], [3.0, -2.0]]))
    >>> state.hessian, state.absmax, state.absmean
    (Array([[ 5., -3.],
           [-3.,  2.]], dtype=float32), Array([3., 2.], dtype=float32), Array([2., 1.], dtype=float32))
    """
    check_whole("n", n, 1, unit="channels")
    zeros = jnp.zeros(n, jnp.float32)
    products = jnp.zeros((n, n), jnp.float32) if hessian else None
    return InputStatistics(products, zeros, zeros, jnp.int32(0), jnp.int32(0))


def update(state: InputStatistics, x: jt.Float[jax.Array, "*batch n"]) -> InputStatistics:
    """Adds x to the statistics; pure, and to be jitted by the caller.

    Args:
        state: what `statistics` or `update` gave.
        x: inputs, whose leading axes count alike.

    Raises:
        ValueError: x is not floating point, or has another number of channels.

    >>> update(statistics(2, hessian=False), jnp.array([[[1.0, jnp.nan]]])).nonfinite
    Array(1, dtype=int32)
    """
    n = state.largest.shape[0]
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim == 0 or x.shape[-1] != n:
        raise ValueError(
            f"statistics of {n} channels take floating-point inputs of shape (..., {n}); "
            f"got {x.dtype}{list(x.shape)}"
        )
    x = x.reshape(-1, n).astype(jnp.float32)
    magnitude = jnp.abs(x)
    return InputStatistics(
        None if state.products is None else state.products + matmul(x.T, x),
        jnp.maximum(state.largest, largest(magnitude, (0,))[0]),
        state.magnitudes + jnp.sum(magnitude, axis=0),
        state.count + x.shape[0],
        state.nonfinite + jnp.sum(~jnp.isfinite(x), dtype=jnp.int32),
    )


def merge(one: InputStatistics, other: InputStatistics) -> InputStatistics:
    """Returns the statistics of what either has seen.

    >>> seen = update(statistics(1), jnp.array([[3.0], [-1.0]]))
    >>> merge(seen, seen).hessian, merge(seen, seen).count
    (Array([[5.]], dtype=float32), Array(4, dtype=int32))
    """
    return InputStatistics(
        None if one.products is None or other.products is None else one.products + other.products,
        jnp.maximum(one.largest, other.largest),
        one.magnitudes + other.magnitudes,
        one.count + other.count,
        one.nonfinite + other.nonfinite,
    )

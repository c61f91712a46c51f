"""Adam whose moments are rounded with coarser scales, as a simulation: what adaptive widths win back of that.

The codecs are those of `jaxquant.optim`; a scale is shared by a block of 128, a row or a whole tensor.
Moments are held as the floats that codes would give, so that any width can be had anywhere; bytes are
derived.  Each leaf of each moment has one width, decided anew every few steps.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxquant.optim import Companded, Logarithmic
from jaxquant.optim.budget import allocate
from jaxquant.optim.codecs import BLOCK, Codec, largest_of_each
from jaxquant.optim.state import draw_word, draws_of

SCALES = ("block", "row", "tensor")
ALLOCATIONS = ("even", "split1", "split2", "felt", "statistics")
_UNIT = 1024  # elements that are allocated bits together: as many as a row of bit planes has bytes
_MOST_BITS = 8
_CODECS: tuple[Codec, Codec] = (Companded(), Logarithmic())
_LINEAR: tuple[Codec, Codec] = (Companded(1.0), Logarithmic())
_KEEP = 0.5  # of the last scores, as of `UpdateSensitivity`


class CoarseState(NamedTuple):
    """Step, both moments, the width of each leaf of each, and the scores that they were decided by."""

    step: jax.Array
    mu: Any
    nu: Any
    bits: jax.Array  # int32[2, leaves]
    scores: jax.Array  # float32[2, leaves]


@dataclasses.dataclass(frozen=True)
class Coarse:
    """How moments are held.

    Attributes:
        scale: what shares a scale, of `SCALES`.
        allocation: of `ALLOCATIONS`.
        budget: mean bits of an element's code; scales come on top.
        interval: steps between decisions.
        linear: whether the first moment's levels are uniform, as STQuant's are said to be.
    """

    scale: str
    allocation: str
    budget: float
    interval: int
    linear: bool = False

    @property
    def codecs(self) -> tuple[Codec, Codec]:
        return _LINEAR if self.linear else _CODECS


def scale_by_coarse_adam(
    held: Coarse, b1: float, b2: float, eps: float, seed: int = 0
) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam` whose moments are rounded between steps as `held` says.

    >>> held = Coarse("row", "even", 4.0, interval=10)
    >>> tx = scale_by_coarse_adam(held, 0.9, 0.95, 1e-8)
    >>> tx.init({"w": jnp.ones((64, 64))}).bits.tolist()
    [[4], [4]]
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def init(params: Any) -> CoarseState:
        plain: Any = adam.init(params)
        sizes = _sizes(params)
        scores = _first_scores(held, len(sizes))
        return CoarseState(plain.count, plain.mu, plain.nu, _allocated(held, scores, sizes), scores)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, CoarseState]:
        del params
        after: Any
        plain = optax.ScaleByAdamState(state.step, state.mu, state.nu)
        steps, after = adam.update(updates, plain)
        moments = [jax.tree.leaves(after.mu), jax.tree.leaves(after.nu)]
        rounded = functools.partial(_rounded, held, state.step, seed)
        sizes = _sizes(updates)

        def decide(old: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            bits, scores = old
            if held.allocation == "felt":
                found = _felt(moments, rounded, bits, after.count, (b1, b2, eps))
            else:
                found = _statistics(jax.tree.leaves(updates), moments, sizes)
            keep = jnp.where(state.step == 0, 0.0, _KEEP)
            scores = keep * scores + (1 - keep) * found
            return _allocated(held, scores, sizes), scores

        bits, scores = state.bits, state.scores
        if held.allocation in ("felt", "statistics"):
            is_due = state.step % held.interval == 0
            bits, scores = jax.lax.cond(is_due, decide, lambda old: old, (bits, scores))
        structure = jax.tree.structure(updates)
        mu, nu = (
            jax.tree.unflatten(
                structure,
                [rounded(slot, i, x, bits[slot, i]) for i, x in enumerate(moments[slot])],
            )
            for slot in (0, 1)
        )
        return steps, CoarseState(after.count, mu, nu, bits, scores)

    return optax.GradientTransformation(init, update)


def derived_bytes(held: Coarse, params: Any, bits: Any) -> float:
    """Bytes of codes and scales of both moments."""
    found = 0.0
    for slot, codec in enumerate(held.codecs):
        scale = codec.scale.dtype.itemsize * codec.scale.shape[0]
        for i, x in enumerate(jax.tree.leaves(params)):
            count = _blocks(held.scale, x).shape[0]
            found += x.size * int(bits[slot][i]) / 8 + scale * count
    return found


def _sizes(tree: Any) -> tuple[int, ...]:
    return tuple(x.size for x in jax.tree.leaves(tree))


def _blocks(scale: str, x: jax.Array) -> jax.Array:
    """Returns what shares a scale, one below another; blocks are filled up with zeros."""
    if scale == "tensor":
        return x.reshape(1, -1)
    if scale == "row":
        return x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
    return jnp.pad(x.ravel(), (0, -x.size % BLOCK)).reshape(-1, BLOCK)


def _rounded(
    held: Coarse, step: jax.Array, seed: int, slot: int, leaf: int, x: jax.Array, bits: jax.Array
) -> jax.Array:
    """Returns the values of a leaf's codes."""
    codec, blocks = held.codecs[slot], _blocks(held.scale, x)
    width = jnp.broadcast_to(bits, blocks.shape[:1])
    scale = codec.scaled(largest_of_each(codec.measures(blocks)), width)
    draws = draws_of(draw_word(seed, step, leaf, slot), jnp.uint32(0), blocks.shape)
    values = codec.decode(codec.codes(blocks, scale, width, draws), scale, width)
    return values.ravel()[: x.size].reshape(x.shape)


# ---------------------------------------------------------------------------------------------------
# Scores and widths


def _first_scores(held: Coarse, leaves: int) -> jax.Array:
    """Momentum is ahead by what a split says, and otherwise by so little that it only gets what is left."""
    lead = {"split1": 1.0, "split2": 2.0}.get(held.allocation, 0.01)
    return jnp.stack([jnp.full(leaves, lead), jnp.zeros(leaves)])


def _allocated(held: Coarse, scores: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Returns the width of each leaf under the budget, by reverse water-filling over units of elements."""
    units = np.maximum(1, np.round(np.array(sizes) / _UNIT)).astype(int)
    owner = np.repeat(np.arange(2 * len(sizes)), np.tile(units, 2))
    least = np.array([codec.least_bits for codec in held.codecs]).repeat(len(sizes))[owner]
    start = jnp.full(owner.shape, round(held.budget), jnp.int32)
    wanted = allocate(
        scores.ravel()[owner],
        start,
        jnp.asarray(least, jnp.int32),
        jnp.full(owner.shape, _MOST_BITS, jnp.int32),
        int(held.budget * len(owner)),
    )
    # A leaf has one width: what its narrowest unit got, so that the budget holds.
    first = jnp.full(2 * len(sizes), _MOST_BITS, jnp.int32).at[owner].min(wanted)
    return first.reshape(2, -1)


def _felt(
    moments: list[list[jax.Array]], rounded: Any, bits: jax.Array, count: jax.Array, adam: Any
) -> jax.Array:
    """Bits and half the logarithm of the update's mean squared error by the rounding of each leaf alone."""
    b1, b2, eps = adam

    def step(m: jax.Array, v: jax.Array) -> jax.Array:
        return (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + eps)

    rows = []
    for slot in (0, 1):
        own = []
        for i, (m, v) in enumerate(zip(*moments, strict=True)):
            other = [m, v]
            other[slot] = rounded(slot, i, other[slot], bits[slot, i])
            error = jnp.mean((step(*other) - step(m, v)) ** 2)
            own.append(bits[slot, i] + 0.5 * jnp.log2(jnp.maximum(error, 1e-30)))
        rows.append(jnp.stack(own))
    return jnp.stack(rows)


def _statistics(
    gradients: list[jax.Array], moments: list[list[jax.Array]], sizes: tuple[int, ...]
) -> jax.Array:
    """Means of the logarithms of gradient RMS, dispersion of the moment and kurtosis, over their means."""
    tiny = jnp.finfo(jnp.float32).tiny

    def factors(g: jax.Array, x: jax.Array) -> jax.Array:
        square = jnp.maximum(jnp.mean(g**2), tiny)
        kurtosis = jnp.mean((g / jnp.sqrt(square)) ** 4)
        dispersion = jnp.std(jnp.abs(x)) / jnp.maximum(jnp.mean(jnp.abs(x)), tiny)
        return jnp.maximum(jnp.stack([jnp.sqrt(square), dispersion, kurtosis]), 2.0**-40)

    found = jnp.stack(
        [jnp.stack([factors(g, x) for g, x in zip(gradients, own, strict=True)]) for own in moments]
    )
    weight = jnp.array(sizes, jnp.float32)[None, :, None] / (2 * sum(sizes))
    return jnp.mean(jnp.log2(found / jnp.sum(weight * found, axis=(0, 1))), axis=-1)

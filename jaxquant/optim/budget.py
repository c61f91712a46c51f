"""From scores to whole bits: reverse water-filling over pages, under a budget of rows."""

import jax
import jax.numpy as jnp
import jaxtyping as jt

Pages = jt.Float32[jax.Array, " pages"]
Bits = jt.Int32[jax.Array, " pages"]

_HALVINGS = 40


def allocate(
    scores: Pages,
    bits: Bits,
    least: Bits,
    most: Bits,
    rows: int | jax.Array,
    hysteresis: float = 0.0,
) -> Bits:
    r"""The widths of pages that spend a budget where it is felt most.

    A page's error falls like 4^−b.  With d its error at b bits, Σ d 4^(b − b') is least under Σ b' ≤ rows
    where every page's b' is its score b + log₄ d, less a level common to all: reverse water-filling.  The
    level is found by halving an interval, b' is rounded, and rows that are left go to the pages nearest to
    one more bit.

    Args:
        scores: of each page, in bits; only differences matter.
        bits: that pages have now.
        least: of each page; their sum is within the budget.
        most: of each page.
        rows: the budget, in bits of pages.
        stay: a page keeps its width while what it wants is within a half and so much more of it: hysteresis.

    >>> allocate(jnp.array([3.0, 5.0, 9.0]), *jnp.array([[4] * 3, [2] * 3, [8] * 3]), 13)
    Array([2, 3, 8], dtype=int32)
    """

    def rounded(level: jax.Array) -> Bits:
        wanted = scores - level
        near = jnp.abs(wanted - bits.astype(jnp.float32)) <= 0.5 + hysteresis
        found = jnp.where(near, bits, jnp.round(wanted).astype(jnp.int32))
        return jnp.clip(found, least, most)

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        fits = jnp.sum(rounded(middle)) <= rows
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    # At the low end every page wants more than it may have; at the high end, less.
    ends = jnp.min(scores) - 10.0 - hysteresis, jnp.max(scores) + 2.0 + hysteresis
    _, level = jax.lax.fori_loop(0, _HALVINGS, halve, ends)
    return _filled(rounded(level), scores - level, bits, most, rows, hysteresis)


def _filled(
    found: Bits, wanted: Pages, bits: Bits, most: Bits, rows: int | jax.Array, hysteresis: float
) -> Bits:
    """One bit more for the pages nearest to it, while rows are left; what keeps its width has a start."""
    lack = wanted - found.astype(jnp.float32) + hysteresis * (found < bits).astype(jnp.float32)
    lack = jnp.where(found < most, lack, -jnp.inf)
    place = jnp.argsort(jnp.argsort(-lack))
    gets = (place < rows - jnp.sum(found)) & (found < most)
    return found + gets.astype(jnp.int32)

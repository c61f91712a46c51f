"""Allocate integer bits to pages by reverse water-filling, under a budget of rows."""

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
    r"""Returns the widths that minimize the total error under a budget of rows.

    The error of a page falls like 4^−b.  Let d be its error at b bits.  Σ d 4^(b − b') is minimal under
    Σ b' ≤ rows if every b' is the page's score b + log₄ d minus a common level: reverse water-filling.  The
    level is found by bisection and b' is rounded.  Rows that are left go to the pages nearest to one more
    bit.

    Args:
        scores: the score of each page, in bits; only differences matter.
        bits: the current width of each page.
        least: the minimum width of each page; the sum must be within the budget.
        most: the maximum width of each page.
        rows: the budget, in bits of pages.
        hysteresis: a page keeps its width unless the target differs by more than 0.5 + hysteresis bits.

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

    # At the low end the target of every page exceeds its maximum; at the high end it is below its minimum.
    ends = jnp.min(scores) - 10.0 - hysteresis, jnp.max(scores) + 2.0 + hysteresis
    _, level = jax.lax.fori_loop(0, _HALVINGS, halve, ends)
    return _filled(rounded(level), scores - level, bits, most, rows, hysteresis)


def _filled(
    found: Bits, wanted: Pages, bits: Bits, most: Bits, rows: int | jax.Array, hysteresis: float
) -> Bits:
    """Gives one more bit to the nearest pages while rows are left; pages that would lose a bit come first."""
    lack = wanted - found.astype(jnp.float32) + hysteresis * (found < bits).astype(jnp.float32)
    lack = jnp.where(found < most, lack, -jnp.inf)
    place = jnp.argsort(jnp.argsort(-lack))
    gets = (place < rows - jnp.sum(found)) & (found < most)
    return found + gets.astype(jnp.int32)

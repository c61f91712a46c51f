"""Reallocate bits under a budget: score pages, choose widths, and re-encode the pages whose width changes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.checks import check_whole
from jaxquant.optim import pages
from jaxquant.optim.budget import allocate
from jaxquant.optim.codecs import Codec
from jaxquant.optim.deprecated import accept_old_keywords, warn_renamed
from jaxquant.optim.plans import Plan
from jaxquant.optim.policies import Adaptation, Keep, Policy, check_budget, check_keep
from jaxquant.optim.scoring import UpdateSensitivity
from jaxquant.optim.state import (
    QuantizedState,
    bits_of,
    by_shards,
    draw_word,
    encode_blocks,
    joined,
    kept_where,
    merged,
    read_blocks,
    rooted,
)
from jaxquant.optim.traced_update import TracedUpdate

_SALT = 0x2545F491  # separates the draws of width changes from those of steps


@accept_old_keywords(stay="hysteresis")
def adaptive(
    budget_bits: float,
    interval: int = 100,
    score: Any = None,
    hysteresis: float = 0.25,
    *,
    until: int | None = None,
    keep: Keep = (),
) -> Policy:
    """Returns a policy that moves bits to the pages where they matter most, under a budget.

    Every `interval` steps, pages are scored and bits are allocated by reverse water-filling
    (`jaxquant.optim.budget`).  Pages that lose bits are re-encoded first, and their rows go to pages that
    gain bits.  The budget holds at every step.  All of it happens inside the compiled step, because the
    tables are data.  Widening a page does not restore what a narrower width lost.  Very small states are
    left unquantized, with a warning, as under `uniform`.

    Args:
        budget_bits: bits for each element of the state.  Everything is counted: codes, scales, tables, empty
            rows, unquantized leaves, and the memory of the policy.
        interval: steps between decisions.  The first decision comes with the first update.
        score: the score of a page.  `UpdateSensitivity()` by default, or `LayerStatistics()`.
        hysteresis: a page keeps its width unless the target differs by more than 0.5 + hysteresis bits.
        until: the step from which widths stay as they are; by default they always move.
        keep: regular expressions of slots and leaves to keep in full precision (`Policy`).

    Raises:
        ValueError: if the budget is not a positive number, the interval or `until` is below 1, or hysteresis
            is negative; at `init`, if the budget is below the minimum, which the message names, or if `keep`
            matches nothing.

    >>> adaptive(5.0, interval=200).name
    'adaptive, 5.0 bits'
    """
    budget_bits = check_budget(budget_bits)
    check_whole("interval", interval, 1)
    if until is not None:
        check_whole("until", until, 1)
    if (
        isinstance(hysteresis, bool)
        or not isinstance(hysteresis, int | float)
        or not 0 <= hysteresis < 8
    ):
        raise ValueError(f"hysteresis must be a number of bits from 0 to 8; got {hysteresis!r}")
    score = UpdateSensitivity() if score is None else score
    if isinstance(score, type) or not (hasattr(score, "init") and callable(score)):
        raise ValueError(
            f"score must be a score such as UpdateSensitivity() or LayerStatistics(); got {score!r}"
        )
    if not hasattr(score, "max_bit_change") and hasattr(score, "reach"):
        warn_renamed("a score's reach", "max_bit_change", stacklevel=4)
    update = Adaptation(interval, score, float(hysteresis), until)
    name = f"adaptive, {budget_bits} bits"
    return Policy(name, lambda leaf: 0, budget_bits, update, check_keep(keep))


def reallocate_bits(traced: TracedUpdate, state: QuantizedState, seed: int) -> QuantizedState:
    """Returns the state with new page widths, if a decision is due and the step allows one."""
    adaptation = state.plan.adaptation
    if adaptation is None:
        return state
    is_due = state.step - state.memory[0] >= adaptation.interval
    if adaptation.until is not None:
        is_due &= state.step < adaptation.until
    return jax.lax.cond(is_due, lambda s: _decide(traced.fork(), s, seed), lambda s: s, state)


def _decide(traced: TracedUpdate, state: QuantizedState, seed: int) -> QuantizedState:
    adaptation = state.plan.adaptation
    assert adaptation is not None
    scores, memory, usable = adaptation.score(traced, state, state.memory[1], seed)
    bits = _in_line([[pages.widths(t) for t in slots] for slots in state.tables])
    wanted = jax.vmap(
        lambda s, b, least, most: allocate(
            s, b, least, most, state.pool.shape[1] - 1, adaptation.hysteresis
        )
    )(_in_line(scores), bits, *_limits(state.plan, bits, adaptation.score))
    state_after = _moved(state, jnp.where(usable, wanted, bits), seed)
    new, old = (state.step, memory), state.memory
    return state_after._replace(memory=jax.tree.map(lambda x, y: jnp.where(usable, x, y), new, old))


def _limits(plan: Plan, bits: jax.Array, score: Any) -> tuple[jax.Array, jax.Array]:
    """Returns (minimum, maximum) bits of each page; both are 0 for pages without elements."""
    full = _in_line([[jnp.asarray(w > 0) for w in slots] for slots in plan.widths()])
    floors = [
        [jnp.full(group.grid, bits) for bits in own]
        for group, own in zip(plan.groups, plan.least_bits, strict=True)
    ]
    change = score.max_bit_change if hasattr(score, "max_bit_change") else score.reach
    least = jnp.maximum(_in_line(floors), bits - change)
    most = jnp.minimum(pages.PLANES, bits + change)
    return jnp.where(full, least, 0), jnp.where(full, most, 0)


def _in_line(nested: Any) -> jax.Array:
    """Flattens values by group and slot to [shards, pages]."""
    return jnp.concatenate([x.reshape(x.shape[0], -1) for slots in nested for x in slots], axis=1)


def _moved(state: QuantizedState, bits: jax.Array, seed: int) -> QuantizedState:
    """Changes the widths of pages within the same number of rows: first all that shrink, then the others."""
    tables = [t.reshape(t.shape[0], -1, pages.PLANES) for slots in state.tables for t in slots]
    table = jax.vmap(pages.lowered)(jnp.concatenate(tables, axis=1), bits)
    state = _recoded(state, table, seed)
    rows = state.pool.shape[1] - 1
    table = jax.vmap(lambda t, b: pages.raised(t, b, rows))(table, bits)
    return _recoded(state, table, seed)


def _recoded(state: QuantizedState, table: jax.Array, seed: int) -> QuantizedState:
    """Moves the state to the rows of another table.  Pages of the same width keep their codes."""
    pool, start = state.pool, 0
    tables, scales = [], []
    for number, codecs in enumerate(state.plan.codecs):
        new_tables, new_scales = [], []
        for i, codec in enumerate(codecs):
            old, scale = state.tables[number][i], state.scales[number][i]
            count = old.shape[1] * old.shape[2]
            new = table[:, start : start + count].reshape(old.shape)
            start += count
            word = draw_word(seed ^ _SALT, state.step, number, i)

            recode = functools.partial(_recoded_in_shards, codec)
            own = pool, old, new, scale, state.plan.groups[number].firsts()
            pool, found = by_shards(state.plan, recode, own, word)
            new_tables.append(new)
            new_scales.append(found)
        tables.append(tuple(new_tables))
        scales.append(tuple(new_scales))
    return state._replace(pool=pool, tables=tuple(tables), scales=tuple(scales))


def _recoded_in_shards(codec: Codec, own: Any, word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (pool, scales) of some shards after the pages of one slot have moved to another table."""
    pool, old, new, scales, firsts = own

    def recoded(pool: jax.Array, first: Any, old: Any, new: Any, scale: Any) -> Any:
        codes, values = read_blocks(pool, old, scale, codec)
        found = encode_blocks(values, bits_of(new), codec, word, first)
        same = jnp.broadcast_to(bits_of(old) == bits_of(new), codes.shape[:-1])
        codes, scale = kept_where(same, (codes, scale), found)
        return pages.write(pool, new, codes), scale

    def step(pool: jax.Array, xs: Any) -> Any:
        _, old, new, scale = xs
        return jax.lax.cond(jnp.any(old != new), recoded, lambda *x: (x[0], scale), pool, *xs)

    tables = [merged(rooted(table, pool.shape[1])) for table in (old, new)]
    after, found = jax.lax.scan(step, joined(pool), (merged(firsts), *tables, merged(scales)))
    return after.reshape(pool.shape), found.reshape(scales.shape)

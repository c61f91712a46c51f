"""Decisions: every so many steps pages are scored, whole bits allocated, and what changes is coded again."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

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

_SALT = 0x2545F491  # the draws of changes of width are none of the steps'


@accept_old_keywords(stay="hysteresis")
def adaptive(
    budget_bits: float,
    interval: int = 100,
    score: Any = None,
    hysteresis: float = 0.25,
    *,
    keep: Keep = (),
) -> Policy:
    """Widths that move to where they are felt, under a budget that holds at every step.

    Every `interval` steps pages are scored, whole bits are allocated by reverse water-filling
    (`jaxquant.optim.budget`), pages that lose bits are coded again in fewer rows, and those that gain take
    the rows so freed.  It all happens inside the compiled step: tables are data.  Raising brings nothing back
    that lower widths lost.  States of few elements stay exact, with a warning, as of `even`.

    Args:
        budget_bits: for each element of the state, with everything counted: codes, scales, tables, empty
            rows, the leaves that stay exact, and what the policy remembers.
        interval: steps from one decision to the next; the first comes with the first update.
        score: what pages are worth, `Felt()` where not given, or `Statistics()`.
        stay: a page keeps its width while what it wants is within a half and so much more of it, in bits.
        keep: the slots and leaves that stay in full precision, as regular expressions (`Policy`).

    Raises:
        ValueError: a budget that is no positive number, an interval below 1, a negative stay; at `init`, a
            budget below the least possible, which it names, or a `keep` of nothing.

    >>> adaptive(5.0, interval=200).name
    'adaptive, 5.0 bits'
    """
    budget_bits = check_budget(budget_bits)
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval must be an integer of at least 1; got {interval!r}")
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
    update = Adaptation(interval, score, float(hysteresis))
    name = f"adaptive, {budget_bits} bits"
    return Policy(name, lambda leaf: 0, budget_bits, update, check_keep(keep))


def reallocate_bits(traced: TracedUpdate, state: QuantizedState, seed: int) -> QuantizedState:
    """The state, its pages' widths chosen anew where a decision is due and the step allows one."""
    adaptation = state.plan.adaptation
    if adaptation is None:
        return state
    is_due = state.step - state.memory[0] >= adaptation.interval
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
    """(least, most) bits of each page, none for pages without elements."""
    full = _in_line([[jnp.asarray(w > 0) for w in slots] for slots in plan.widths()])
    codecs = [
        [jnp.full(group.grid, c.least_bits) for c in own]
        for group, own in zip(plan.groups, plan.codecs, strict=True)
    ]
    change = score.max_bit_change if hasattr(score, "max_bit_change") else score.reach
    least = jnp.maximum(_in_line(codecs), bits - change)
    most = jnp.minimum(pages.PLANES, bits + change)
    return jnp.where(full, least, 0), jnp.where(full, most, 0)


def _in_line(nested: Any) -> jax.Array:
    """Values of pages by run and slot, as [shards, pages]."""
    return jnp.concatenate([x.reshape(x.shape[0], -1) for slots in nested for x in slots], axis=1)


def _moved(state: QuantizedState, bits: jax.Array, seed: int) -> QuantizedState:
    """The state with other widths, at most so many rows in all: first all that shrink, then all that grow."""
    tables = [t.reshape(t.shape[0], -1, pages.PLANES) for slots in state.tables for t in slots]
    table = jax.vmap(pages.lowered)(jnp.concatenate(tables, axis=1), bits)
    state = _recoded(state, table, seed)
    rows = state.pool.shape[1] - 1
    table = jax.vmap(lambda t, b: pages.raised(t, b, rows))(table, bits)
    return _recoded(state, table, seed)


def _recoded(state: QuantizedState, table: jax.Array, seed: int) -> QuantizedState:
    """The state in the rows of another table; pages of the same width keep their codes."""
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
    """(pool, scales) of some shards once a slot's pages are in the rows of another table."""
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

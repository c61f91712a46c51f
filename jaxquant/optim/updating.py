"""One update of quantized state: decode, inner update, encode, some pages at a time."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.optim import pages
from jaxquant.optim.blocks import BlockStep, Step, block_step, by_group, draw_words
from jaxquant.optim.inner import Component, Inner, Piece, pieces_by_run
from jaxquant.optim.leaves import Leaf
from jaxquant.optim.plans import Plan
from jaxquant.optim.state import (
    QuantizedState,
    bits_of,
    by_shards,
    decoded,
    joined,
    merged,
    rooted,
    with_exact,
    with_leaf,
)

# ---------------------------------------------------------------------------------------------------
# By groups of pages


def by_groups(
    inner: Inner, state: QuantizedState, number: int, pieces: Sequence[Piece], seed: int
) -> QuantizedState:
    """The update of a run of parameters, group after group; its results become known to `inner`.

    Each device goes through the groups of its own shards.
    """
    run = state.plan.runs[number]
    inner.evaluate(n for piece in pieces for n in (*piece.scalars, *piece.wide.values()))
    own = by_group(inner, run, pieces)
    shared = {n: inner.known[n] for piece in pieces for n in piece.scalars}
    shared = shared, draw_words(state, number, seed)
    blocks = block_step(state.plan, number, pieces)
    scan = functools.partial(_scanned, blocks, _in_place(inner, pieces[0]))
    stored = state.pool, state.tables[number], state.scales[number]
    pool, results, scales = by_shards(state.plan, scan, (*stored, own), shared)
    for kind, flat in zip(pieces[0].results, results, strict=True):
        for piece, value in zip(pieces, run.unflatten(flat), strict=True):
            inner.known[piece.produced[kind]] = value
    scales = (*state.scales[:number], tuple(scales), *state.scales[number + 1 :])
    return state._replace(pool=pool, scales=scales)


def _in_place(inner: Inner, piece: Piece) -> tuple[Hashable | None, ...]:
    """For each result, its kind where it can take the place of an operand of that kind, or None."""
    specs = inner.program.specs

    def takes(kind: Hashable) -> bool:
        own = piece.wide.get(kind)
        return own is not None and specs[own].dtype == specs[piece.produced[kind]].dtype

    return tuple(kind if takes(kind) else None for kind in piece.results)


def _scanned(
    blocks: BlockStep,
    in_place: tuple[Hashable | None, ...],
    own: Any,
    shared: Any,
) -> tuple[jax.Array, Any, Any]:
    """(pool, results, scales) of some shards after the update, group after group.

    Updates are written where gradients were, which needs no memory of its own.
    """
    pool, tables, scales, given = own
    known, words = shared
    firsts, programs, wide = jax.tree.map(merged, given)
    xs = (
        jnp.arange(firsts.size),
        [merged(rooted(table, pool.shape[1])) for table in tables],
        [merged(scale) for scale in scales],
    )

    held = {kind: wide.pop(kind) for kind in in_place if kind is not None}

    def compute(group: jax.Array, own: dict, codes: list, bits: list, scales: list) -> Step:
        values = own | {kind: x[group] for kind, x in wide.items()}
        return blocks.compute(codes, bits, scales, values, known, programs[group])

    def step(carry: Any, xs: Any) -> Any:
        (pool, held), (group, tables, scales) = carry, xs
        apart = functools.partial(pages.apart, pages.is_real(tables[0]))
        codes, bits = pages.read_all(pool, tables), list(map(bits_of, tables))
        operands = group, {kind: x[group] for kind, x in held.items()}, codes, bits, scales
        start = firsts[group]
        codes, scales, results = blocks(apart, compute, operands, codes, bits, scales, words, start)
        for table, new in zip(tables, codes, strict=True):
            pool = pages.write(pool, table, new)
        pairs = list(zip(in_place, results, strict=True))
        held = held | {k: held[k].at[group].set(x) for k, x in pairs if k is not None}
        return (pool, held), ([x for kind, x in pairs if kind is None], scales)

    (after, held), (rest, new) = jax.lax.scan(step, (joined(pool), held), xs)
    shape, others = tables[0].shape[:2], iter(rest)
    results = [next(others) if kind is None else held[kind] for kind in in_place]
    results, new = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), (results, new))
    return after.reshape(pool.shape), results, new


# ---------------------------------------------------------------------------------------------------
# Whole


def _whole(inner: Inner, state: QuantizedState, component: Component, seed: int) -> QuantizedState:
    """The update of parameters whose state must be at hand together."""
    own = members(state.plan, component)
    known = dict(inner.known)
    for run, slot, place, leaf in own:
        known[inner.state(leaf.index)] = decoded(state, run, slot, place)
    after = [inner.leaves[leaf.index] for *_, leaf in own]
    env = inner.program.evaluate([*component.results, *after], known)
    inner.known |= {n: env[n] for n in component.results}
    for (run, slot, place, _), n in zip(own, after, strict=True):
        state = with_leaf(state, run, slot, place, env[n], seed)
    return state


def members(plan: Plan, component: Component) -> list[tuple[int, int, int, Leaf]]:
    """(run, slot, place, leaf) of a component's coded leaves."""
    return [
        (run, slot, place, leaf)
        for run, layout in enumerate(plan.runs)
        for slot, leaves in enumerate(layout.leaves)
        for place, leaf in enumerate(leaves)
        if leaf.parameter in component.parameters
    ]


# ---------------------------------------------------------------------------------------------------
# All


RunUpdate = Callable[[Inner, QuantizedState, int, Sequence[Piece], int], QuantizedState]


def updated(
    inner: Inner, state: QuantizedState, seed: int, update_run: RunUpdate = by_groups
) -> tuple[list[Any], QuantizedState]:
    """The updates, and the state after them; `update_run` does it for a run whose parameters have pieces."""
    inner.evaluate(inner.untouched())
    by_run, _ = pieces_by_run(inner, state.plan)
    for number, pieces in by_run.items():
        state = update_run(inner, state, number, pieces, seed)
    rest = {p for n, run in enumerate(state.plan.runs) if n not in by_run for p in run.parameters}
    for component in inner.components():
        if rest & set(component.parameters):
            state = _whole(inner, state, component, seed)
    exact = [inner.known[inner.leaves[leaf.index]] for leaf in state.plan.exact]
    updates = [inner.known[n] for n in inner.updates]
    return updates, state._replace(step=state.step + 1, exact=with_exact(state.exact, exact))

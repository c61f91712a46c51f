"""One update of quantized state: decode, inner update, encode, some pages at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import pages
from jaxquant.optim.blocks import block_step, draw_words, in_line, programs_of, wide_of
from jaxquant.optim.inner import Component, Inner, Piece, pieces_by_run
from jaxquant.optim.state import QuantizedState, bits_of, decoded, joined, rooted, with_leaf

# ---------------------------------------------------------------------------------------------------
# By groups of pages


def by_groups(
    inner: Inner, state: QuantizedState, number: int, pieces: Sequence[Piece], seed: int
) -> QuantizedState:
    """The update of a run of parameters, group after group; its results become known to `inner`."""
    run = state.plan.runs[number]
    inner.evaluate(n for piece in pieces for n in (*piece.scalars, *piece.wide.values()))
    rows, groups = state.pool.shape[1], run.grid[0] * run.grid[1]
    xs = (
        jnp.arange(groups),
        [in_line(rooted(table, rows)) for table in state.tables[number]],
        [in_line(scale) for scale in state.scales[number]],
    )
    step = _group_step(inner, state, number, pieces, seed)
    pool, (results, scales) = jax.lax.scan(step, joined(state.pool), xs)
    for kind, flat in zip(pieces[0].results, results, strict=True):
        for piece, value in zip(pieces, run.unflatten(flat), strict=True):
            inner.known[piece.produced[kind]] = value
    shapes = [scale.shape for scale in state.scales[number]]
    scales = tuple(x.reshape(shape) for x, shape in zip(scales, shapes, strict=True))
    scales = (*state.scales[:number], scales, *state.scales[number + 1 :])
    return state._replace(pool=pool.reshape(state.pool.shape), scales=scales)


def _group_step(
    inner: Inner, state: QuantizedState, number: int, pieces: Sequence[Piece], seed: int
) -> Callable:
    """Decodes, updates and encodes one group of a run's pages."""
    run, own = state.plan.runs[number], block_step(state.plan, number, pieces)
    programs, wide = programs_of(run, pieces), wide_of(inner, run, pieces)
    words = draw_words(state, number, seed)

    def compute(group: jax.Array, codes: list, tables: list, scales: list) -> Any:
        values = {kind: x[group] for kind, x in wide.items()}
        bits = list(map(bits_of, tables))
        return own.compute(codes, bits, scales, values, inner.known, programs[group])

    def encode(group: jax.Array, after: list, codes: list, tables: list, scales: list) -> Any:
        start = group.astype(jnp.uint32) * jnp.uint32(run.grid[2] * pages.PAGE % 2**32)
        bits = list(map(bits_of, tables))
        return own.encode(after, codes, bits, scales, words, start)

    def step(pool: jax.Array, xs: Any) -> Any:
        group, tables, scales = xs
        always = pages.is_real(tables[0])
        codes = [pages.read(pool, table) for table in tables]
        after, results = pages.apart(always, compute, group, codes, tables, scales)
        kept = pages.apart(always, encode, group, after, codes, tables, scales)
        for table, (new, _) in zip(tables, kept, strict=True):
            pool = pages.write(pool, table, new)
        return pool, (results, [scale for _, scale in kept])

    return step


# ---------------------------------------------------------------------------------------------------
# Whole


def _whole(inner: Inner, state: QuantizedState, component: Component, seed: int) -> QuantizedState:
    """The update of parameters whose state must be at hand together."""
    own = [
        (run, slot, place, leaf)
        for run, layout in enumerate(state.plan.runs)
        for slot, leaves in enumerate(layout.leaves)
        for place, leaf in enumerate(leaves)
        if leaf.parameter in component.parameters
    ]
    known = dict(inner.known)
    for run, slot, place, leaf in own:
        known[inner.state(leaf.index)] = decoded(state, run, slot, place)
    after = [inner.leaves[leaf.index] for *_, leaf in own]
    env = inner.program.evaluate([*component.results, *after], known)
    inner.known |= {n: env[n] for n in component.results}
    for (run, slot, place, _), n in zip(own, after, strict=True):
        state = with_leaf(state, run, slot, place, env[n], seed)
    return state


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
    exact = tuple(inner.known[inner.leaves[leaf.index]] for leaf in state.plan.exact)
    updates = [inner.known[n] for n in inner.updates]
    return updates, state._replace(step=state.step + 1, exact=exact)

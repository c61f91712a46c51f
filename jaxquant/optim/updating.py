"""One update of quantized state: decode, inner update, encode, some pages at a time."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import pages
from jaxquant.optim.codecs import Codec
from jaxquant.optim.inner import Component, Inner, Piece, pieces_by_run
from jaxquant.optim.layout import Run
from jaxquant.optim.leaves import Leaf
from jaxquant.optim.plans import Plan
from jaxquant.optim.state import (
    QuantizedState,
    bits_of,
    decoded,
    draw_word,
    encode_blocks,
    joined,
    kept_where,
    merged,
    rooted,
    with_leaf,
)


def updated(inner: Inner, state: QuantizedState, seed: int) -> tuple[list[Any], QuantizedState]:
    """The updates, and the state after them."""
    inner.evaluate(inner.untouched())
    by_run, _ = pieces_by_run(inner, state.plan)
    for number, pieces in by_run.items():
        state = _by_groups(inner, state, number, pieces, seed)
    rest = {p for n, run in enumerate(state.plan.runs) if n not in by_run for p in run.parameters}
    for component in inner.components():
        if rest & set(component.parameters):
            state = _whole(inner, state, component, seed)
    exact = tuple(inner.known[inner.leaves[leaf.index]] for leaf in state.plan.exact)
    updates = [inner.known[n] for n in inner.updates]
    return updates, state._replace(step=state.step + 1, exact=exact)


# ---------------------------------------------------------------------------------------------------
# By groups of pages


def _by_groups(
    inner: Inner, state: QuantizedState, number: int, pieces: Sequence[Piece], seed: int
) -> QuantizedState:
    """The update of a run of parameters, group after group; its results become known to `inner`."""
    run = state.plan.runs[number]
    inner.evaluate(n for piece in pieces for n in (*piece.scalars, *piece.wide.values()))
    rows, groups = state.pool.shape[1], run.grid[0] * run.grid[1]
    xs = (
        jnp.arange(groups),
        [merged(rooted(table, rows)) for table in state.tables[number]],
        [merged(scale) for scale in state.scales[number]],
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


def wide_of(inner: Inner, run: Run, pieces: Sequence[Piece]) -> dict[Hashable, jax.Array]:
    """What the pieces take besides coded state, in groups of pages; zeros where one takes none of a kind."""
    found = {}
    for kind in dict.fromkeys(kind for piece in pieces for kind in piece.wide):
        dtype = next(inner.program.specs[p.wide[kind]].dtype for p in pieces if kind in p.wide)
        arrays = [
            inner.known[piece.wide[kind]] if kind in piece.wide else jnp.zeros(size, dtype)
            for piece, size in zip(pieces, run.sizes, strict=True)
        ]
        found[kind] = merged(run.flatten(arrays))
    return found


def programs_of(owners: np.ndarray, pieces: Sequence[Piece]) -> np.ndarray:
    """For each block, the first of the pieces that is like its own."""
    firsts: dict[Hashable, int] = {}
    like = [firsts.setdefault(piece.signature, i) for i, piece in enumerate(pieces)]
    return np.array(like, np.int32)[owners].reshape(-1, *owners.shape[2:])


def _group_step(
    inner: Inner, state: QuantizedState, number: int, pieces: Sequence[Piece], seed: int
) -> Callable:
    """Decodes, updates and encodes one group of a run's pages."""
    run, codecs = state.plan.runs[number], state.plan.codecs[number]
    distinct = {p.signature: (i, p) for i, p in reversed(list(enumerate(pieces)))}
    programs, wide = jnp.asarray(programs_of(run.owners(), pieces)), wide_of(inner, run, pieces)
    words = [draw_word(seed, state.step, number, i) for i in range(len(codecs))]
    dtypes = [slot[0].dtype for slot in run.leaves]

    def compute(group: jax.Array, codes: list, tables: list, scales: list) -> Any:
        before = decoded_group(codes, tables, scales, codecs, dtypes)
        own = {kind: x[group] for kind, x in wide.items()}
        found = [(i, piece(before, own, inner.known)) for i, piece in distinct.values()]
        return chosen(found, programs[group])

    def encode(group: jax.Array, after: list, codes: list, tables: list, scales: list) -> Any:
        before = decoded_group(codes, tables, scales, codecs, dtypes)
        start = group.astype(jnp.uint32) * jnp.uint32(run.grid[2] * pages.PAGE % 2**32)
        kept = []
        for i, table in enumerate(tables):
            is_same = jnp.all(after[i] == before[i], axis=-1)
            values = after[i].astype(jnp.float32)
            new = encode_blocks(values, table, codecs[i], words[i], start)
            kept.append(kept_where(is_same, (codes[i], scales[i]), new))
        return kept

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


def decoded_group(
    codes: Sequence[jax.Array],
    tables: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    codecs: Sequence[Codec],
    dtypes: Sequence[Any],
) -> list[jax.Array]:
    """The values of each slot of a group, in the state's types."""
    found = zip(codes, tables, scales, codecs, dtypes, strict=True)
    return [
        codec.decode(code, scale, bits_of(table)).astype(dtype)
        for code, table, scale, codec, dtype in found
    ]


def chosen(found: list[tuple[int, Any]], programs: jax.Array) -> Any:
    """Each block's results from the piece of the parameter that it belongs to."""
    (_, results), *others = found
    for number, alternatives in others:
        is_own = (programs == number)[..., None]
        results = jax.tree.map(
            lambda new, old, own=is_own: jnp.where(own, new, old), alternatives, results
        )
    return results


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

"""Update quantized state: decode, apply the wrapped update, and encode, one group of pages at a time."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.optim import pages
from jaxquant.optim.blocks import (
    BlockStep,
    Step,
    block_step,
    by_page_group,
    draw_words,
    programs_of,
    wide_leaves,
)
from jaxquant.optim.leaves import Leaf
from jaxquant.optim.plans import Plan
from jaxquant.optim.spans import update_spans
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
from jaxquant.optim.traced_update import (
    Component,
    ElementwiseUpdate,
    TracedUpdate,
    elementwise_by_group,
)

# ---------------------------------------------------------------------------------------------------
# By groups of pages


def by_page_groups(
    traced: TracedUpdate,
    state: QuantizedState,
    number: int,
    update_fns: Sequence[ElementwiseUpdate],
    seed: int,
) -> QuantizedState:
    """Updates a paged group, and adds its results to the known values.

    It goes through one group of pages after another, on GPUs through whole leaves.  Each device of a mesh
    updates its own shards.
    """
    group = state.plan.groups[number]
    traced.evaluate(
        n for update_fn in update_fns for n in (*update_fn.scalars, *update_fn.wide.values())
    )
    blocks, in_place = block_step(state.plan, number, update_fns), _in_place(traced, update_fns[0])
    known = {n: traced.known[n] for update_fn in update_fns for n in update_fn.scalars}
    programs, wide = programs_of(group, update_fns), wide_leaves(traced, group, update_fns)
    operands = (state.pool, state.tables[number], state.scales[number], programs, wide)
    shared = known, draw_words(state, number, seed)

    def by_groups(pool: Any, tables: Any, scales: Any, programs: Any, wide: Any) -> Any:
        scan = functools.partial(_scanned, blocks, tuple(in_place.values()))
        own = pool, tables, scales, by_page_group(group, programs, wide)
        pool, results, scales = by_shards(state.plan, scan, own, shared)
        return pool, [group.unflatten(flat) for flat in results], list(scales)

    def by_spans(pool: Any, tables: Any, scales: Any, programs: Any, wide: Any) -> Any:
        stored = jax.tree.map(lambda x: merged(merged(x)), (list(tables), list(scales)))
        programs = merged(programs)
        pool, results, new = update_spans(
            blocks, group, in_place, (joined(pool), *stored), programs, wide, *shared
        )
        after = [x.reshape(scale.shape) for x, scale in zip(new, scales, strict=True)]
        return pool.reshape(state.pool.shape), results, after

    if state.plan.mesh is None and group.shards == 1:
        forms: Any = {"default": by_groups, "cuda": by_spans, "rocm": by_spans}
        pool, results, scales = jax.lax.platform_dependent(*operands, **forms)
    else:
        pool, results, scales = by_groups(*operands)
    for kind, leaves in zip(in_place, results, strict=True):
        for update_fn, value in zip(update_fns, leaves, strict=True):
            traced.known[update_fn.produced[kind]] = value
    scales = (*state.scales[:number], tuple(scales), *state.scales[number + 1 :])
    return state._replace(pool=pool, scales=scales)


def _in_place(
    traced: TracedUpdate, update_fn: ElementwiseUpdate
) -> dict[Hashable, Hashable | None]:
    """Returns, for each result, the kind of the operand that it can overwrite, or None."""
    specs = traced.program.specs

    def overwritten(kind: Hashable) -> Hashable | None:
        target = traced.onto if kind == "update" else kind
        own = update_fn.wide.get(target)
        if own is None or specs[own].dtype != specs[update_fn.produced[kind]].dtype:
            return None
        return target

    return {kind: overwritten(kind) for kind in update_fn.results}


def _scanned(
    blocks: BlockStep,
    in_place: tuple[Hashable | None, ...],
    own: Any,
    shared: Any,
) -> tuple[jax.Array, Any, Any]:
    """Returns (pool, results, scales) of some shards after the update, one group of pages after another.

    Updates overwrite gradients, or new parameters the old ones, so no additional memory is needed.
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
        separately = functools.partial(pages.separately, pages.is_real(tables[0]))
        codes, bits = pages.read_all(pool, tables), list(map(bits_of, tables))
        operands = group, {kind: x[group] for kind, x in held.items()}, codes, bits, scales
        start = firsts[group]
        codes, scales, results = blocks(
            separately, compute, operands, codes, bits, scales, words, start
        )
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
# Decoded at once


def _update_fully_decoded(
    traced: TracedUpdate, state: QuantizedState, component: Component, seed: int
) -> QuantizedState:
    """Updates parameters whose state must be decoded together."""
    own = members(state.plan, component)
    known = dict(traced.known)
    for number, slot, place, leaf in own:
        known[traced.state(leaf.index)] = decoded(state, number, slot, place)
    after = [traced.leaves[leaf.index] for *_, leaf in own]
    env = traced.program.evaluate([*component.results, *after], known)
    traced.known |= {n: env[n] for n in component.results}
    for (number, slot, place, _), n in zip(own, after, strict=True):
        state = with_leaf(state, number, slot, place, env[n], seed)
    return state


def members(plan: Plan, component: Component) -> list[tuple[int, int, int, Leaf]]:
    """Returns (group, slot, place, leaf) of each coded leaf of a component."""
    return [
        (number, slot, place, leaf)
        for number, layout in enumerate(plan.groups)
        for slot, leaves in enumerate(layout.leaves)
        for place, leaf in enumerate(leaves)
        if leaf.parameter in component.parameters
    ]


# ---------------------------------------------------------------------------------------------------
# All groups


GroupUpdate = Callable[
    [TracedUpdate, QuantizedState, int, Sequence[ElementwiseUpdate], int], QuantizedState
]


def apply_update(
    traced: TracedUpdate,
    state: QuantizedState,
    seed: int,
    update_group: GroupUpdate = by_page_groups,
) -> tuple[list[Any], QuantizedState]:
    """Returns the updates and the state after them.  `update_group` updates a group element by element."""
    traced.evaluate(traced.untouched())
    elementwise, _ = elementwise_by_group(traced, state.plan)
    for number, update_fns in elementwise.items():
        state = update_group(traced, state, number, update_fns, seed)
    rest = {
        p
        for n, group in enumerate(state.plan.groups)
        if n not in elementwise
        for p in group.parameters
    }
    for component in traced.components():
        if rest & set(component.parameters):
            state = _update_fully_decoded(traced, state, component, seed)
    exact = [traced.known[traced.leaves[leaf.index]] for leaf in state.plan.exact]
    updates = [traced.known[n] for n in traced.updates]
    return updates, state._replace(step=state.step + 1, exact=with_exact(state.exact, exact))

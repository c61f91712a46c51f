"""Represent quantized state as arrays: pages of codes, their scales, and unquantized leaves."""

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.numerics.rounding import mix_bits
from jaxquant.optim import pages
from jaxquant.optim.codecs import BLOCK, Codec
from jaxquant.optim.layout import BLOCKS
from jaxquant.optim.leaves import Exact, Leaf, path_of
from jaxquant.optim.named import Coded, OwnNames, bare, fields_of, in_codes, is_coded
from jaxquant.optim.plans import Plan
from jaxquant.optim.sharding_axes import to_shards


class _Arrays(NamedTuple):
    step: jax.Array
    pool: jax.Array
    tables: tuple[tuple[jax.Array, ...], ...]
    scales: tuple[tuple[jax.Array, ...], ...]
    exact: Any
    memory: Any
    plan: Plan


class _Fields:
    """`_fields` of the class; for a state, an `OwnNames`."""

    def __get__(self, state: Any, cls: type) -> tuple[str, ...]:
        return _Arrays._fields if state is None else OwnNames(_Arrays._fields, state.exact)


class QuantizedState(_Arrays):
    """The state of `quantize_state`: a pytree of arrays, for jit, scan and checkpoints.

    Named fields of the wrapped transformation's state are fields of this one: `state.hyperparams` of
    `inject_hyperparams`, `state.mini_step` of `MultiSteps`.  optax's `tree_get` and `tree_set` find and set
    them, wherever they are.  Coded fields are decoded when they are read as attributes.  If only codes could
    be found or set, a ValueError says so.

    Attributes:
        step: the number of updates so far, which keys the draws.
        pool: the bits of all pages (`jaxquant.optim.pages`), uint8[shards, rows + 1, 8, 128].
        tables: for each group and slot of the plan, the rows of its pages within their shard,
            int32[shards, groups, pages, 8].
        scales: for each group and slot, the scale of each block, [shards, groups, pages, 8, 8, entries].
        exact: the plain state with `jaxquant.optim.named.Coded` in place of the coded parts.  Its leaves are
            the unquantized ones, in the order of the plan.
        memory: the step of the last decision and the memory of the policy, if widths change; else empty.
        plan: what is known from shapes; it holds no arrays.

    >>> import optax
    >>> from jaxquant.optim import fixed, quantize_state
    >>> inner = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
    >>> state = quantize_state(inner, fixed(5, 4)).init(jnp.ones((64, 64)))
    >>> state = optax.tree_utils.tree_set(state, learning_rate=1e-4)
    >>> state.hyperparams["learning_rate"], optax.tree_utils.tree_get(state, "b2")
    (0.0001, Array(0.999, dtype=float32))
    """

    __slots__ = ()
    _fields = _Fields()  # pyright: ignore[reportAssignmentType]

    def __getattr__(self, name: str) -> Any:
        exact = self.exact
        if name not in fields_of(exact):
            raise AttributeError(
                f"neither quantized state nor the wrapped state has a field {name!r}"
            )
        # Parts without codes are returned themselves, so that items set in their dictionaries persist.
        return jax.tree.map(
            lambda x: _filled(self, x) if is_coded(x) else x,
            getattr(exact, name),
            is_leaf=lambda x: is_coded(x) or not _has_codes(x),
        )

    # Fields of the plain state, not the methods of tuples.
    count = property(lambda self: self.__getattr__("count"))  # pyright: ignore
    index = property(lambda self: self.__getattr__("index"))  # pyright: ignore

    def _replace(self, **fields: Any) -> "QuantizedState":  # pyright: ignore
        """Returns the state with other fields, its own or those of the wrapped transformation."""
        own = {name: x for name, x in fields.items() if name in _Arrays._fields}
        for name in fields.keys() - own.keys():
            if is_coded(getattr(self.exact, name, None)):
                raise in_codes(name)
        rest = {name: x for name, x in fields.items() if name not in own}
        exact = {"exact": self.exact._replace(**rest)} if rest else {}
        return super()._replace(**own, **exact)


def _has_codes(tree: Any) -> bool:
    return any(map(is_coded, jax.tree.leaves(tree, is_leaf=is_coded)))


@jax.jit
def _filled(state: QuantizedState, part: Coded) -> Any:
    """Decodes a part of the plain state."""
    places = {
        leaf.index: (number, slot, place)
        for number, group in enumerate(state.plan.groups)
        for slot, leaves in enumerate(group.leaves)
        for place, leaf in enumerate(leaves)
    }
    return part.filled(lambda i: decoded(state, *places[i]), places.keys())


# ---------------------------------------------------------------------------------------------------
# flax.serialization: what `to_bytes` and `from_bytes` do with the parts that are no arrays


def _coded_from(target: Coded, content: dict[str, Any]) -> Coded:
    places = range(len(target.exact))
    exact = (
        serialization.from_state_dict(target.exact[i], content[str(i)], name=str(i)) for i in places
    )
    return Coded(tuple(exact), target.slot, target.structure, target.first)


def _layout_of(plan: Plan) -> dict[str, str]:
    """Returns a hash of the names, shapes and places of all leaves: without them, codes mean nothing."""
    content = [(leaf.slot, leaf.path, leaf.shape, str(leaf.dtype)) for leaf in plan.leaves]
    grids = [group.grid for group in plan.groups]
    return {"layout": hashlib.sha256(repr((content, grids)).encode()).hexdigest()[:16]}


def _plan_from(target: Plan, content: dict[str, str]) -> Plan:
    if content != _layout_of(target):
        raise ValueError(
            "the quantized state was saved for parameters of other names or shapes, or for another layout"
        )
    return target


serialization.register_serialization_state(
    Coded,
    lambda part: {str(i): serialization.to_state_dict(x) for i, x in enumerate(part.exact)},
    _coded_from,
)
serialization.register_serialization_state(Plan, _layout_of, _plan_from)


def with_exact(exact: Any, leaves: Sequence[Any]) -> Any:
    """Returns the same containers with other leaves."""
    return jax.tree.unflatten(jax.tree.structure(exact), leaves)


def unquantized(state: QuantizedState) -> list[jax.Array]:
    """Returns the unquantized leaves, in the plan's order and types.

    Raises:
        ValueError: if a leaf was set to another shape or kind of number, or the containers have changed.
    """
    found, wanted = jax.tree.leaves_with_path(state.exact), state.plan.exact
    names = [path_of(keys) for keys, _ in found]
    if len(names) != len(wanted) or not all(map(_is_place_of, names, wanted)):
        raise ValueError(
            f"the state's unquantized leaves must be those of its transformation, "
            f"{', '.join(leaf.path for leaf in wanted[:8])}; got {', '.join(names[:8])}"
        )
    return [_of_type(x, leaf) for (_, x), leaf in zip(found, wanted, strict=True)]


def _is_place_of(path: str, leaf: Exact) -> bool:
    """Returns whether an unquantized leaf belongs at a path; in a part with codes its place is a number."""
    return bare(path) == bare(leaf.path) or path.rpartition("/")[0] == leaf.slot


def _of_type(x: Any, leaf: Exact) -> jax.Array:
    try:
        found = jnp.result_type(x)
    except TypeError:
        found = type(x).__name__
    if np.shape(x) != leaf.shape or not _holds(leaf.dtype, found):
        raise ValueError(
            f"{leaf.path} of the state must be {leaf.dtype}{list(leaf.shape)}; got {found}{list(np.shape(x))}"
        )
    return x if getattr(x, "dtype", None) == leaf.dtype else jnp.asarray(x, leaf.dtype)


def _holds(dtype: Any, other: Any) -> bool:
    """Returns whether a type holds the kind of numbers of another."""
    wider = {jnp.integer: (jnp.integer,), jnp.floating: (jnp.integer, jnp.floating)}
    if isinstance(other, str):
        return False
    return dtype == other or any(
        jnp.issubdtype(dtype, kind) and jnp.issubdtype(other, own)
        for kind, others in wider.items()
        for own in others
    )


def empty(plan: Plan, exact: Any) -> QuantizedState:
    """Returns a state of zeros at the plan's initial widths; `exact` is from `without_codes`."""
    widths = plan.widths()
    shards = plan.shards
    by_shard = [
        np.concatenate([np.zeros(0, int), *(w[s].ravel() for slots in widths for w in slots)])
        for s in range(shards)
    ]
    stores = [pages.empty(bits, plan.rows) for bits in by_shard]
    table = jnp.stack([store.table for store in stores])
    ends = np.cumsum([w[0].size for slots in widths for w in slots])[:-1]
    parts = iter(jnp.split(table, ends, axis=1))
    tables, scales = [], []
    for group, codecs in zip(plan.groups, plan.codecs, strict=True):
        tables.append(tuple(next(parts).reshape(*group.grid, pages.PLANES) for _ in codecs))
        scales.append(
            tuple(jnp.zeros((*group.grid, *BLOCKS, *c.scale.shape), c.scale.dtype) for c in codecs)
        )
    pool = jnp.stack([store.pool for store in stores])
    adaptation, memory = plan.adaptation, ()
    if adaptation is not None:
        memory = jnp.int32(-adaptation.interval), adaptation.score.init(plan)
    arrays = tuple(tables), tuple(scales), exact, memory
    return QuantizedState(jnp.int32(0), pool, *arrays, plan)


def layout(state: QuantizedState) -> QuantizedState:
    """Returns the sharding of each array on the plan's mesh; arrays of shards are split along that axis."""
    mesh, axis, shards = state.plan.mesh, state.plan.axis, state.plan.shards
    assert mesh is not None
    spread, alike = NamedSharding(mesh, P(axis)), NamedSharding(mesh, P())

    def of(x: Any) -> NamedSharding:
        return spread if x.ndim > 2 and x.shape[0] == shards else alike

    own = {name: jax.tree.map(of, getattr(state, name)) for name in ("pool", "tables", "scales")}
    exact, memory = jax.tree.map(lambda x: alike, (state.exact, state.memory))
    return state._replace(step=alike, exact=exact, memory=memory, **own)


def first_specs(plan: Plan, exact: Any, tx: Any, params: Any) -> QuantizedState:
    """Returns the partition of a first state: by `layout`, or unquantized leaves as in the plain state."""
    spread = P() if plan.mesh is None else P(plan.axis)
    own = leaf_specs(tx, params)
    specs = [own[leaf.index] if plan.mesh is None else P() for leaf in plan.exact]
    placed: Any = with_exact(exact, specs)
    split: Any = spread
    return QuantizedState(P(), split, split, split, placed, P(), plan)  # pyright: ignore[reportArgumentType]


def leaf_specs(tx: Any, params: Any) -> list[P]:
    """Returns the partition of the leaves of a transformation's own first state."""
    return [x.sharding.spec for x in jax.make_jaxpr(tx.init)(params).out_avals]


def by_shards(plan: Plan, function: Callable[..., Any], own: Any, shared: Any) -> Any:
    """Returns function(own, shared); on a mesh, each device computes it for its own shards.

    Args:
        plan: the plan of the state.
        function: a function whose results have the axis of shards first, as all arrays of `own` have.
        own: arrays with an axis of shards.
        shared: arrays that all shards need completely.
    """
    if plan.mesh is None:
        return function(own, shared)
    spread, alike = P(plan.axis), P()
    # The branches of `pages.separately` contain constants, which do not vary over devices: the check is off.
    mapped = jax.shard_map(
        function, mesh=plan.mesh, in_specs=(spread, alike), out_specs=spread, check_vma=False
    )
    return mapped(own, shared)


def joined(pool: jax.Array) -> jax.Array:
    """Concatenates the pools of the shards; `rooted` gives the rows."""
    return pool.reshape(-1, *pages.LANES)


def merged(x: jax.Array) -> jax.Array:
    """Merges shards and groups of pages into one axis."""
    return x.reshape(-1, *x.shape[2:])


def rooted(table: jax.Array, rows: int) -> jax.Array:
    """Returns a table [shards, ..., 8] with rows of the concatenated pools, each of which has `rows`."""
    first = jnp.arange(table.shape[0], dtype=jnp.int32) * rows
    first = first.reshape(-1, *(1,) * (table.ndim - 1))
    return jnp.where(table == 0, 0, table + first)


def read_blocks(
    pool: jax.Array, table: jax.Array, scale: jax.Array, codec: Codec
) -> tuple[jax.Array, jax.Array]:
    """Returns (codes, values) of some pages, uint8 and float32 [pages, 8, 8, 128]."""
    codes = pages.read(pool, table)
    return codes, codec.decode(codes, scale, bits_of(table))


def bits_of(table: jax.Array) -> jax.Array:
    """Returns the width of each page, with axes for its blocks: int32[pages, 1, 1]."""
    return pages.widths(table)[:, None, None]


def decoded(state: QuantizedState, number: int, slot: int, place: int) -> jax.Array:
    """Returns the leaf of one slot of the parameter at `place` of a group, in full precision."""
    layout, codec = state.plan.groups[number], state.plan.codecs[number][slot]
    own = layout.pages_of(place)
    read = jax.vmap(lambda pool, table, scale: read_blocks(pool, table, scale, codec)[1])
    values = read(*_span(state, number, slot, own)).reshape(layout.lines, -1)
    found = layout.from_shards(values, place, layout.starts[place] - own.start * pages.PAGE)
    return found.astype(layout.leaves[slot][place].dtype)


def _span(
    state: QuantizedState, number: int, slot: int, own: slice
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (pool, table, scale) of some pages of a slot, for each line of the group."""
    layout = state.plan.groups[number]
    shards, rows = layout.shards // layout.lines, state.pool.shape[1]
    table = state.tables[number][slot]
    table = table.reshape(layout.lines, shards, *table.shape[1:])
    table = layout.lined(jax.vmap(lambda t: rooted(t, rows))(table).reshape(-1, *table.shape[2:]))
    pool = state.pool.reshape(layout.lines, -1, *pages.LANES)
    return pool, table[:, own], layout.lined(state.scales[number][slot])[:, own]


def with_leaf(
    state: QuantizedState, number: int, slot: int, place: int, value: jax.Array, seed: int
) -> QuantizedState:
    """Returns the state with another value of one leaf.  Blocks that do not change keep their codes."""
    layout, leaf = state.plan.groups[number], state.plan.groups[number].leaves[slot][place]
    own, size = layout.pages_of(place), layout.sizes[place]
    word = draw_word(seed, state.step, number, slot)
    start = layout.starts[place] - own.start * pages.PAGE
    set_ = functools.partial(
        _set, state.plan.codecs[number][slot], leaf, word, slice(start, start + size)
    )
    whole = state.scales[number][slot]
    length = math.prod(layout.grid) // layout.lines
    elements = (np.arange(layout.lines) * length + own.start) * pages.PAGE % 2**32
    pool, scale = jax.vmap(set_)(
        *_span(state, number, slot, own),
        to_shards(value.astype(jnp.float32), layout.shard_axes[place]),
        jnp.asarray(elements, jnp.uint32),
    )
    lined = layout.lined(whole).at[:, own].set(scale).reshape(whole.shape)
    scales = _replaced(state.scales, number, slot, lined)
    return state._replace(pool=pool.reshape(state.pool.shape), scales=scales)


def _set(
    codec: Codec,
    leaf: Leaf,
    word: jax.Array,
    where: slice,
    pool: jax.Array,
    table: jax.Array,
    scale: jax.Array,
    values: jax.Array,
    element: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns (pool, scale) of consecutive pages after some of their elements are set."""
    codes, before = read_blocks(pool, table, scale, codec)
    after = before.ravel().at[where].set(values).reshape(before.shape)
    same = _round_trip(before, leaf) == after
    encoded = encode_blocks(after, bits_of(table), codec, word, element)
    first, last = where.start // BLOCK, -(-where.stop // BLOCK)
    block = jnp.arange(math.prod(codes.shape[:-1])).reshape(codes.shape[:-1])
    keeps = jnp.all(same, axis=-1) | (block < first) | (block >= last)
    codes, scale = kept_where(keeps, (codes, scale), encoded)
    return pages.write(pool, table, codes), scale


def _round_trip(values: jax.Array, leaf: Leaf) -> jax.Array:
    return values.astype(leaf.dtype).astype(jnp.float32)


def _replaced(nested: tuple, number: int, slot: int, value: jax.Array) -> tuple:
    """Returns nested tuples with one entry replaced."""
    own = (*nested[number][:slot], value, *nested[number][slot + 1 :])
    return (*nested[:number], own, *nested[number + 1 :])


def kept_where(keeps: jax.Array, old: Sequence[jax.Array], new: Sequence[jax.Array]) -> list:
    """Returns the old (codes, scale) of blocks that keep them, and the new ones of the others."""
    pairs = zip(old, new, strict=True)
    return [jnp.where(jnp.expand_dims(keeps, -1), before, after) for before, after in pairs]


def encode_blocks(
    values: jax.Array, bits: jax.Array, codec: Codec, word: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (codes, scale) of the values [..., 8, 8, 128] of pages that begin at `start` of their group."""
    return codec.encode(values, bits, draws_of(word, start, values.shape))


def draw_word(seed: int, step: jax.Array, number: int, slot: int) -> jax.Array:
    """Returns a random word for each step, group and slot."""
    place = jnp.uint32(((number * 97 + slot) * 0x9E3779B9 + seed * 0x85EBCA6B) % 2**32)
    return mix_bits(mix_bits(step.astype(jnp.uint32)) ^ place)


def draws_of(word: jax.Array, start: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns a low-discrepancy sequence in [0, 1): the fractional parts of word / 2^32 + place / φ."""
    place, stride = start, 1
    for axis in reversed(range(len(shape))):
        along = jax.lax.broadcasted_iota(jnp.int32, shape, axis).astype(jnp.uint32)
        place, stride = place + along * jnp.uint32(stride), stride * shape[axis]
    steps = (word + place * jnp.uint32(0x9E3779B9)) >> jnp.uint32(8)
    # Below 2^24, so int32 is non-negative; not every compiler converts a uint32.
    return steps.astype(jnp.int32).astype(jnp.float32) * jnp.float32(2.0**-24)

"""Decode, update and encode the blocks of a paged group, wherever their codes are stored."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.optim.codecs import Codec, largest_of
from jaxquant.optim.layout import PagedGroup
from jaxquant.optim.plans import Plan
from jaxquant.optim.state import QuantizedState, draw_word, draws_of, merged
from jaxquant.optim.traced_update import ElementwiseUpdate, TracedUpdate

Arrays = Sequence[jax.Array]
Separately = Callable[..., Any]  # evaluates (function, *operands) separately


@dataclasses.dataclass(frozen=True)
class Step:
    """The result of a step on some blocks [..., 128] of a paged group.

    Attributes:
        before: the values of each slot before the step, in the types of the state.
        after: the values of each slot after the step.
        results: the other outputs of the update.
    """

    before: list[jax.Array]
    after: list[jax.Array]
    results: list[jax.Array]


@dataclasses.dataclass(frozen=True)
class BlockStep:
    """Decodes, updates and encodes some blocks [..., 128] of a paged group.

    Codes and scales are returned in the types in which they are given, which may differ from those in
    memory.

    Attributes:
        codecs: the codec of each slot.
        dtypes: the type of each slot's values.
        update_fns: the distinct updates, by the first parameter of the group that has each.
        largest: returns the largest integer of each block.
    """

    codecs: tuple[Codec, ...]
    dtypes: tuple[Any, ...]
    update_fns: Mapping[int, ElementwiseUpdate]
    largest: Callable[[Sequence[jax.Array]], list[jax.Array]] = largest_of

    def compute(
        self,
        codes: Arrays,
        bits: Arrays,
        scales: Arrays,
        wide: Mapping[Hashable, jax.Array],
        known: Mapping[int, Any],
        programs: jax.Array,
    ) -> Step:
        """Decodes and updates.  `programs` selects the update of each block."""
        before = self.decode(codes, bits, scales)
        return Step(before, *self.update(before, wide, known, programs))

    def update(
        self,
        before: Arrays,
        wide: Mapping[Hashable, jax.Array],
        known: Mapping[int, Any],
        programs: jax.Array,
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Returns (new values of each slot, results), given the values of the slots."""
        found = {i: update_fn(before, wide, known) for i, update_fn in self.update_fns.items()}
        (_, results), *others = found.items()
        for number, alternatives in others:
            select = functools.partial(jnp.where, programs == number)
            results = jax.tree.map(select, alternatives, results)
        return results

    def decode(self, codes: Arrays, bits: Arrays, scales: Arrays) -> list[jax.Array]:
        """Returns the values of each slot, in the types of the state."""
        found = zip(self.codecs, codes, scales, bits, self.dtypes, strict=True)
        return [
            codec.decode(code, scale, width).astype(dtype)
            for codec, code, scale, width, dtype in found
        ]

    def __call__(
        self,
        separately: Separately,
        compute: Callable[..., Step],
        operands: Any,
        codes: Arrays,
        bits: Arrays,
        scales: Arrays,
        words: Arrays,
        start: jax.Array,
    ) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
        """Returns (codes of each slot, scales of each slot, results).

        Blocks in which no value changed keep their codes and scales.

        Args:
            separately: evaluates a function of arrays as a separate computation.
            compute: the step, as a function of the operands.  Scales, results and codes each recompute it,
                which is faster than writing full-precision values and reading them back.
            operands: arrays.
            codes: the codes of each slot.
            bits: the width of the codes.
            scales: the scales of each slot.
            words: the random word of each slot.
            start: the element of the group at which the blocks begin.
        """
        slots = range(len(self.codecs))
        found = separately(functools.partial(self._scales, compute), operands, bits, scales)
        results = separately(lambda own: compute(*own).results, operands)
        new = [
            separately(
                functools.partial(self._codes, compute, i),
                *(operands, bits[i], codes[i], *found[i], words[i], start),
            )
            for i in slots
        ]
        return new, [scale for scale, _ in found], results

    def _scales(
        self, compute: Callable[..., Step], operands: Any, bits: Arrays, scales: Arrays
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Returns (scales, whether each block is unchanged) of each slot, in one pass over the values."""
        step = compute(*operands)
        measures = []
        for codec, before, after in zip(self.codecs, step.before, step.after, strict=True):
            before, after = before.astype(jnp.float32), after.astype(jnp.float32)
            measures.append((*codec.measures(after), (before != after).astype(jnp.int32)))
        largest = iter(self.largest([x for own in measures for x in own]))
        found = []
        for codec, own, width, scale in zip(self.codecs, measures, bits, scales, strict=True):
            *most, changed = (next(largest) for _ in own)
            new = codec.scaled(most, width).astype(scale.dtype)
            found.append((jnp.where(changed == 0, scale, new), changed == 0))
        return found

    def _codes(
        self,
        compute: Callable[..., Step],
        i: int,
        operands: Any,
        bits: jax.Array,
        codes: jax.Array,
        scale: jax.Array,
        is_same: jax.Array,
        word: jax.Array,
        start: jax.Array,
    ) -> jax.Array:
        """Returns the codes of a slot."""
        values = compute(*operands).after[i].astype(jnp.float32)
        draws = draws_of(word, start, values.shape)
        new = self.codecs[i].codes(values, scale, bits, draws).astype(codes.dtype)
        return jnp.where(is_same, codes, new)


def block_step(plan: Plan, number: int, update_fns: Sequence[ElementwiseUpdate]) -> BlockStep:
    """Returns the step for the blocks of one group."""
    distinct = {p.signature: (i, p) for i, p in reversed(list(enumerate(update_fns)))}
    dtypes = tuple(slot[0].dtype for slot in plan.groups[number].leaves)
    return BlockStep(plan.codecs[number], dtypes, dict(distinct.values()))


def programs_of(group: PagedGroup, update_fns: Sequence[ElementwiseUpdate]) -> jax.Array:
    """Returns the index of the first equal update for each block, int32[groups, pages, 8, 8, 1]."""
    firsts: dict[Hashable, int] = {}
    like = [firsts.setdefault(update_fn.signature, i) for i, update_fn in enumerate(update_fns)]
    return merged(jnp.asarray(np.array(like, np.int32)[group.owners()])[..., None])


def wide_of(
    traced: TracedUpdate, group: PagedGroup, update_fns: Sequence[ElementwiseUpdate]
) -> dict[Hashable, jax.Array]:
    """Returns the uncoded operands of the updates, in groups of pages; zeros where an update takes none."""
    found = wide_leaves(traced, group, update_fns)
    return {kind: merged(group.flatten(arrays)) for kind, arrays in found.items()}


def wide_leaves(
    traced: TracedUpdate, group: PagedGroup, update_fns: Sequence[ElementwiseUpdate]
) -> dict[Hashable, list[jax.Array]]:
    """Returns the same operands in the shapes of the leaves."""
    found = {}
    for kind in dict.fromkeys(kind for update_fn in update_fns for kind in update_fn.wide):
        dtype = next(traced.program.specs[p.wide[kind]].dtype for p in update_fns if kind in p.wide)
        found[kind] = [
            jnp.reshape(traced.known[update_fn.wide[kind]], leaf.shape)
            if kind in update_fn.wide
            else jnp.zeros(leaf.shape, dtype)
            for update_fn, leaf in zip(update_fns, group.leaves[0], strict=True)
        ]
    return found


def by_page_group(group: PagedGroup, programs: jax.Array, wide: dict[Hashable, Any]) -> Any:
    """Returns (first element, update index, operands) of each group of pages, [shards, groups, ...]."""
    found = programs, {kind: merged(group.flatten(arrays)) for kind, arrays in wide.items()}
    found = jax.tree.map(lambda x: x.reshape(*group.grid[:2], *x.shape[1:]), found)
    return group.firsts(), *found


def draw_words(state: QuantizedState, number: int, seed: int) -> list[jax.Array]:
    """Returns the random word of this step for each slot of a group."""
    return [draw_word(seed, state.step, number, i) for i in range(len(state.plan.codecs[number]))]

"""What a step does to the blocks of a run of parameters, wherever their codes are read and written."""

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
Apart = Callable[..., Any]  # of a function and its operands


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step makes of some blocks [..., 128] of a run.

    Attributes:
        before: the values of each slot, in the state's types.
        after: the new ones.
        results: what else the update gives.
    """

    before: list[jax.Array]
    after: list[jax.Array]
    results: list[jax.Array]


@dataclasses.dataclass(frozen=True)
class BlockStep:
    """Decoding, inner update and encoding of some blocks [..., 128] of a run.

    Codes and scales come back in the types in which they are given, which need not be those in memory.

    Attributes:
        codecs: of the slots.
        dtypes: of the slots' values.
        pieces: updates that differ, by the first parameter of the run that has each.
        largest: of whole numbers in each block.
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
        """Decodes and updates, each block by the piece that `programs` names."""
        before = self.decode(codes, bits, scales)
        return Step(before, *self.update(before, wide, known, programs))

    def update(
        self,
        before: Arrays,
        wide: Mapping[Hashable, jax.Array],
        known: Mapping[int, Any],
        programs: jax.Array,
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """(new values of each slot, results) from the slots' values."""
        found = {i: update_fn(before, wide, known) for i, update_fn in self.update_fns.items()}
        (_, results), *others = found.items()
        for number, alternatives in others:
            select = functools.partial(jnp.where, programs == number)
            results = jax.tree.map(select, alternatives, results)
        return results

    def decode(self, codes: Arrays, bits: Arrays, scales: Arrays) -> list[jax.Array]:
        """The values of each slot, in the state's types."""
        found = zip(self.codecs, codes, scales, bits, self.dtypes, strict=True)
        return [
            codec.decode(code, scale, width).astype(dtype)
            for codec, code, scale, width, dtype in found
        ]

    def __call__(
        self,
        apart: Apart,
        compute: Callable[..., Step],
        operands: Any,
        codes: Arrays,
        bits: Arrays,
        scales: Arrays,
        words: Arrays,
        start: jax.Array,
    ) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
        """(codes of each slot, scales of each, results); blocks of which no value changed keep theirs.

        Args:
            apart: evaluates a function of arrays by itself.
            compute: the step, from the operands.  Scales, results and codes each compute what they need of
                it anew, which takes less time than writing values in full precision and reading them again.
            operands: arrays.
            codes: of each slot.
            bits: of the codes.
            scales: of each slot.
            words: what keys the draws of each slot.
            start: the element of the run with which the blocks begin.
        """
        slots = range(len(self.codecs))
        found = [
            apart(functools.partial(self._scale, compute, i), operands, bits[i], scales[i])
            for i in slots
        ]
        results = apart(lambda own: compute(*own).results, operands)
        new = [
            apart(
                functools.partial(self._codes, compute, i),
                *(operands, bits[i], codes[i], *found[i], words[i], start),
            )
            for i in slots
        ]
        return new, [scale for scale, _ in found], results

    def _scale(
        self, compute: Callable[..., Step], i: int, operands: Any, bits: jax.Array, scale: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(a slot's scales, whether a block's values are the same), from one pass over them."""
        step, codec = compute(*operands), self.codecs[i]
        before, after = (x.astype(jnp.float32) for x in (step.before[i], step.after[i]))
        changed = (before != after).astype(jnp.int32)
        *largest, changed = self.largest((*codec.measures(after), changed))
        new = codec.scaled(largest, bits).astype(scale.dtype)
        return jnp.where(changed == 0, scale, new), changed == 0

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
        """A slot's codes."""
        values = compute(*operands).after[i].astype(jnp.float32)
        draws = draws_of(word, start, values.shape)
        new = self.codecs[i].codes(values, scale, bits, draws).astype(codes.dtype)
        return jnp.where(is_same, codes, new)


def block_step(plan: Plan, number: int, update_fns: Sequence[ElementwiseUpdate]) -> BlockStep:
    """What happens to the blocks of one run."""
    distinct = {p.signature: (i, p) for i, p in reversed(list(enumerate(update_fns)))}
    dtypes = tuple(slot[0].dtype for slot in plan.groups[number].leaves)
    return BlockStep(plan.codecs[number], dtypes, dict(distinct.values()))


def programs_of(group: PagedGroup, update_fns: Sequence[ElementwiseUpdate]) -> jax.Array:
    """For each block, the first of the pieces that is like its own, int32[groups, pages, 8, 8, 1]."""
    firsts: dict[Hashable, int] = {}
    like = [firsts.setdefault(update_fn.signature, i) for i, update_fn in enumerate(update_fns)]
    return merged(jnp.asarray(np.array(like, np.int32)[group.owners()])[..., None])


def wide_of(
    traced: TracedUpdate, group: PagedGroup, update_fns: Sequence[ElementwiseUpdate]
) -> dict[Hashable, jax.Array]:
    """What the pieces take besides coded state, in groups of pages; zeros where one takes none of a kind."""
    found = {}
    for kind in dict.fromkeys(kind for update_fn in update_fns for kind in update_fn.wide):
        dtype = next(traced.program.specs[p.wide[kind]].dtype for p in update_fns if kind in p.wide)
        arrays = [
            traced.known[update_fn.wide[kind]]
            if kind in update_fn.wide
            else jnp.zeros(leaf.shape, dtype)
            for update_fn, leaf in zip(update_fns, group.leaves[0], strict=True)
        ]
        found[kind] = merged(group.flatten(arrays))
    return found


def by_page_group(
    traced: TracedUpdate, group: PagedGroup, update_fns: Sequence[ElementwiseUpdate]
) -> Any:
    """(first element, pieces, operands) of each group, [shards, groups, ...]."""
    found = programs_of(group, update_fns), wide_of(traced, group, update_fns)
    found = jax.tree.map(lambda x: x.reshape(*group.grid[:2], *x.shape[1:]), found)
    return group.firsts(), *found


def draw_words(state: QuantizedState, number: int, seed: int) -> list[jax.Array]:
    """What keys the draws of this step in each slot of a run."""
    return [draw_word(seed, state.step, number, i) for i in range(len(state.plan.codecs[number]))]

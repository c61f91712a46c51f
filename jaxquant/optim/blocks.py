"""What a step does to the blocks of a run of parameters, wherever their codes are read and written."""

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.optim.codecs import Codec
from jaxquant.optim.inner import Inner, Piece
from jaxquant.optim.layout import Run
from jaxquant.optim.plans import Plan
from jaxquant.optim.state import QuantizedState, draw_word, encode_blocks, kept_where, merged

Arrays = Sequence[jax.Array]


@dataclasses.dataclass(frozen=True)
class BlockStep:
    """Decoding, inner update and encoding of some blocks [..., 128] of a run.

    Codes and scales come back in the types in which they are given, which need not be those in memory.

    Attributes:
        codecs: of the slots.
        dtypes: of the slots' values.
        pieces: updates that differ, by the first parameter of the run that has each.
    """

    codecs: tuple[Codec, ...]
    dtypes: tuple[Any, ...]
    pieces: Mapping[int, Piece]

    def compute(
        self,
        codes: Arrays,
        bits: Arrays,
        scales: Arrays,
        wide: Mapping[Hashable, jax.Array],
        known: Mapping[int, Any],
        programs: jax.Array,
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """(new values of each slot, results), each block's from the piece that `programs` names."""
        return self.update(self.decode(codes, bits, scales), wide, known, programs)

    def update(
        self,
        before: Arrays,
        wide: Mapping[Hashable, jax.Array],
        known: Mapping[int, Any],
        programs: jax.Array,
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """(new values of each slot, results) from the slots' values."""
        found = {i: piece(before, wide, known) for i, piece in self.pieces.items()}
        (_, results), *others = found.items()
        for number, alternatives in others:
            select = functools.partial(jnp.where, programs == number)
            results = jax.tree.map(select, alternatives, results)
        return results

    def encode(
        self,
        after: Arrays,
        codes: Arrays,
        bits: Arrays,
        scales: Arrays,
        words: Arrays,
        start: jax.Array,
    ) -> list[Any]:
        """(codes, scale) of each slot; blocks of which no value changed keep theirs."""
        before, kept = self.decode(codes, bits, scales), []
        for i, codec in enumerate(self.codecs):
            values = after[i].astype(jnp.float32)
            is_same = jnp.all(values == before[i].astype(jnp.float32), axis=-1)
            old = (codes[i], scales[i])
            new = encode_blocks(values, bits[i], codec, words[i], start)
            new = [x.astype(y.dtype) for x, y in zip(new, old, strict=True)]
            kept.append(kept_where(is_same, old, new))
        return kept

    def decode(self, codes: Arrays, bits: Arrays, scales: Arrays) -> list[jax.Array]:
        """The values of each slot, in the state's types."""
        found = zip(self.codecs, codes, scales, bits, self.dtypes, strict=True)
        return [
            codec.decode(code, scale, width).astype(dtype)
            for codec, code, scale, width, dtype in found
        ]


def block_step(plan: Plan, number: int, pieces: Sequence[Piece]) -> BlockStep:
    """What happens to the blocks of one run."""
    distinct = {p.signature: (i, p) for i, p in reversed(list(enumerate(pieces)))}
    dtypes = tuple(slot[0].dtype for slot in plan.runs[number].leaves)
    return BlockStep(plan.codecs[number], dtypes, dict(distinct.values()))


def programs_of(run: Run, pieces: Sequence[Piece]) -> jax.Array:
    """For each block, the first of the pieces that is like its own, int32[groups, pages, 8, 8, 1]."""
    firsts: dict[Hashable, int] = {}
    like = [firsts.setdefault(piece.signature, i) for i, piece in enumerate(pieces)]
    return merged(jnp.asarray(np.array(like, np.int32)[run.owners()])[..., None])


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


def draw_words(state: QuantizedState, number: int, seed: int) -> list[jax.Array]:
    """What keys the draws of this step in each slot of a run."""
    return [draw_word(seed, state.step, number, i) for i in range(len(state.plan.codecs[number]))]

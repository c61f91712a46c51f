"""Update whole leaves at once, as GPUs want: few launches, and parameters are not copied into pages.

A span is the pages that one leaf fills, up to `MOST` of them; the pages that leaves share are one further
span.  A CPU goes through groups of pages instead, which fit its cache (`jaxquant.optim.updating`).
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.optim import pages
from jaxquant.optim.blocks import BlockStep
from jaxquant.optim.layout import PagedGroup
from jaxquant.optim.pages import PAGE, PAGE_SHAPE
from jaxquant.optim.state import bits_of

LEAST, MOST = (
    64,
    4096,
)  # pages of a span; the codes and planes of an element take four bytes meanwhile
Leaves = dict[Hashable, list[jax.Array]]  # by kind, an array for each parameter of a group


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive elements of a leaf in a span: `place` in the group, and where they begin in either."""

    place: int
    in_leaf: int
    in_span: int
    count: int


@dataclasses.dataclass(frozen=True)
class Span:
    """Pages that are updated at once.

    Attributes:
        pages: their indices in the group, in order.
        pieces: the elements that they hold; there is padding between them.
    """

    pages: np.ndarray
    pieces: tuple[Piece, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the pages are consecutive."""
        return bool((np.diff(self.pages) == 1).all())

    def of(self, x: jax.Array) -> jax.Array:
        """Returns the span's rows of an array [pages, ...]."""
        if self.is_whole:
            return x[int(self.pages[0]) : int(self.pages[-1]) + 1]
        return x[self.pages]

    def starts(self) -> jax.Array:
        """Returns the element of the group at which each page begins, less its place in the span."""
        first = (self.pages - np.arange(len(self.pages))) * PAGE % 2**32
        return jnp.asarray(first.astype(np.uint32).reshape(-1, 1, 1, 1))

    def gathered(self, leaves: Sequence[jax.Array]) -> jax.Array:
        """Returns the elements of the span, [pages, 8, 8, 128], zeros between them."""
        total, end, parts = len(self.pages) * PAGE, 0, []
        for piece in self.pieces:
            parts.append(jnp.zeros(piece.in_span - end, leaves[0].dtype))
            parts.append(leaves[piece.place].ravel()[piece.in_leaf : piece.in_leaf + piece.count])
            end = piece.in_span + piece.count
        parts.append(jnp.zeros(total - end, leaves[0].dtype))
        parts = [x for x in parts if x.size]
        whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        return whole.reshape(-1, *PAGE_SHAPE)

    def scattered(self, leaves: Sequence[jax.Array], values: jax.Array) -> list[jax.Array]:
        """Returns the leaves with the span's elements replaced."""
        found, flat = list(leaves), values.ravel()
        for piece in self.pieces:
            leaf, own = found[piece.place], flat[piece.in_span : piece.in_span + piece.count]
            if piece.count < leaf.size:
                own = leaf.ravel().at[piece.in_leaf : piece.in_leaf + piece.count].set(own)
            found[piece.place] = own.reshape(leaf.shape)
        return found


def spans(group: PagedGroup, least: int = LEAST, most: int = MOST) -> list[Span]:
    """Returns the spans of a group of one shard, which together hold all of its pages.

    Args:
        group: the group.
        least: pages that a leaf fills, at least, to have spans of its own.
        most: pages of a span of one leaf.
    """
    free, found = np.ones(np.prod(group.grid), bool), []
    for place, (start, size) in enumerate(zip(group.starts, group.sizes, strict=True)):
        first, last = -(-start // PAGE), (start + size) // PAGE
        if last - first < least:
            continue
        for own in np.array_split(np.arange(first, last), -(-(last - first) // most)):
            piece = Piece(place, int(own[0]) * PAGE - start, 0, len(own) * PAGE)
            found.append(Span(own, (piece,)))
        free[first:last] = False
    rest = np.flatnonzero(free)
    return [*found, Span(rest, tuple(_pieces(group, rest)))] if rest.size else found


def _pieces(group: PagedGroup, own: np.ndarray) -> list[Piece]:
    """Returns the elements that some pages of a group hold, in order."""
    found = []
    runs = np.split(np.arange(len(own)), np.flatnonzero(np.diff(own) != 1) + 1)
    for run in runs:
        first, last = int(own[run[0]]) * PAGE, (int(own[run[-1]]) + 1) * PAGE
        for place, (start, size) in enumerate(zip(group.starts, group.sizes, strict=True)):
            a, b = max(first, start), min(last, start + size)
            if a < b:
                found.append(Piece(place, a - start, int(run[0]) * PAGE + a - first, b - a))
    return found


def update_spans(
    blocks: BlockStep,
    group: PagedGroup,
    in_place: Mapping[Hashable, Hashable | None],
    stored: tuple[jax.Array, Sequence[jax.Array], Sequence[jax.Array]],
    programs: jax.Array,
    wide: Leaves,
    known: Mapping[int, Any],
    words: Sequence[jax.Array],
) -> tuple[jax.Array, list[list[jax.Array]], list[jax.Array]]:
    """Returns (pool, leaves of each result, scales) of a group of one shard, updated span after span.

    Args:
        blocks: the step for its blocks.
        group: the group.
        in_place: for each kind of result, the kind of operand that it overwrites, or None.
        stored: the pool, [rows, 8, 128]; the tables of each slot, [pages, 8]; the scales of each slot,
            [pages, 8, 8, entries].
        programs: the update of each block, [pages, 8, 8, 1].
        wide: the uncoded operands.
        known: scalar operands.
        words: the random word of each slot.
    """
    (pool, tables, scales), held, fresh, new = stored, dict(wide), Leaves(), []

    def compute(codes: Any, bits: Any, scales: Any, values: Any, programs: Any) -> Any:
        return blocks.compute(codes, bits, scales, values, known, programs)

    order = spans(group)
    for span in order:
        own, before = [span.of(x) for x in tables], [span.of(x) for x in scales]
        codes, bits = pages.read_all(pool, own), list(map(bits_of, own))
        values = {kind: span.gathered(held[kind]) for kind in wide}
        operands, start = (codes, bits, before, values, span.of(programs)), span.starts()
        codes, after, results = blocks(
            _at_once, compute, operands, codes, bits, before, words, start
        )
        for table, code in zip(own, codes, strict=True):
            pool = pages.write(pool, table, code)
        for (kind, target), found in zip(in_place.items(), results, strict=True):
            if target is None:
                empty = [jnp.zeros(leaf.shape, found.dtype) for leaf in group.leaves[0]]
                fresh[kind] = span.scattered(fresh.get(kind, empty), found)
            else:
                held[target] = span.scattered(held[target], found)
        new.append(after)
        # Otherwise results of all spans might be held at once, before any is written where it belongs.
        pool, held, fresh = jax.lax.optimization_barrier((pool, held, fresh))
    where = np.argsort(np.concatenate([span.pages for span in order]))
    joined = [jnp.concatenate(slot)[where] for slot in zip(*new, strict=True)]
    return pool, [fresh[k] if t is None else held[t] for k, t in in_place.items()], joined


def _at_once(function: Callable[..., Any], *operands: Any) -> Any:
    return function(*operands)

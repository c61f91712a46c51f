"""Assign coded leaves to pages.  Leaves with the same slots are neighbours, and each starts a new block.

Each shard holds a part of each leaf, split along the leaf's own axes (`jaxquant.optim.sharding_axes`).
Leaves that cannot be split that way are laid out across all shards in one line.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.optim.codecs import BLOCK
from jaxquant.optim.leaves import Leaf
from jaxquant.optim.pages import PAGE, PAGE_SHAPE
from jaxquant.optim.sharding_axes import ShardAxes, from_shards, to_shards

GROUP = 64  # pages that are decoded at once, which fit the cache of a core
BLOCKS = PAGE_SHAPE[:-1]  # blocks of a page: (8, 8)


@dataclasses.dataclass(frozen=True)
class PagedGroup:
    """Parameters whose state has the same slots and types, concatenated in lines of pages.

    Attributes:
        slots: the slots of their state, in order.
        parameters: the indices of the parameters.
        leaves: for each slot, the state's leaf of each parameter.
        starts: the element of a line at which each parameter begins, a multiple of a block.
        shards: the number of equal parts, which devices can share.
        shard_axes: how each parameter is split into shards; empty if parameters span all shards in one line.
    """

    slots: tuple[str, ...]
    parameters: tuple[int, ...]
    leaves: tuple[tuple[Leaf, ...], ...]
    starts: tuple[int, ...]
    shards: int
    shard_axes: tuple[ShardAxes, ...]

    @property
    def lines(self) -> int:
        """The number of lines of pages.  Each line holds one part of every parameter."""
        return self.shards if any(self.shard_axes) else 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of elements of each parameter in a line."""
        return tuple(leaf.size // self.lines for leaf in self.leaves[0])

    @property
    def pages(self) -> int:
        """The number of pages of a line that hold elements."""
        return -(-(self.starts[-1] + self.sizes[-1]) // PAGE)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(shards, groups of pages in each, pages in each); the last pages may be without elements."""
        own = -(-self.pages * self.lines // self.shards)
        groups = -(-own // GROUP)
        return self.shards, groups, -(-own // groups)

    def lined(self, x: Any) -> Any:
        """Reshapes [shards, groups, pages, ...] to [lines, pages of each, ...]."""
        return x.reshape(self.lines, -1, *x.shape[3:])

    def flatten(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """Concatenates arrays as [shards, groups, pages, 8, 8, 128], padded with zeros."""
        total = math.prod(self.grid) * PAGE // self.lines
        ends = (*self.starts[1:], total)
        parts = [
            jnp.pad(to_shards(x, axes), ((0, 0), (0, end - start - size)))
            for x, axes, start, end, size in zip(
                arrays, self.shard_axes, self.starts, ends, self.sizes, strict=True
            )
        ]
        whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        return whole.reshape(*self.grid, *PAGE_SHAPE)

    def unflatten(self, flat: jax.Array) -> list[jax.Array]:
        """Inverts `flatten`."""
        lines = flat.reshape(self.lines, -1)
        return [self.from_shards(lines, place, s) for place, s in enumerate(self.starts)]

    def from_shards(self, lines: jax.Array, place: int, start: int) -> jax.Array:
        """Returns the array of the parameter at `place`, given lines [lines, elements] and its start."""
        own = jax.lax.slice_in_dim(lines, start, start + self.sizes[place], axis=1)
        return from_shards(own, self.leaves[0][place].shape, self.shard_axes[place])

    def firsts(self) -> jax.Array:
        """Returns the first element of each group of pages, modulo 2^32, uint32[shards, groups]."""
        shards, groups, size = self.grid
        found = jnp.arange(shards * groups, dtype=jnp.uint32) * jnp.uint32(size * PAGE % 2**32)
        return found.reshape(shards, groups)

    def owners(self) -> np.ndarray:
        """Returns the parameter that each block belongs to, int32[shards, groups, pages, 8, 8]."""
        firsts = np.array(self.starts) // BLOCK
        blocks = np.arange(math.prod(self.grid) * PAGE // self.lines // BLOCK)
        found = np.searchsorted(firsts, blocks, side="right") - 1
        return np.tile(found.astype(np.int32), self.lines).reshape(*self.grid, *BLOCKS)

    def pages_of(self, place: int) -> slice:
        """Returns the pages of each line that hold elements of the parameter at `place`."""
        start, size = self.starts[place], self.sizes[place]
        return slice(start // PAGE, -(-(start + size) // PAGE))

    def by_page(self, values: Sequence[int]) -> np.ndarray:
        """Returns the largest value of the parameters in each page, int[shards, groups, pages]; 0 if none."""
        found = np.zeros((self.lines, math.prod(self.grid) // self.lines), int)
        for place, value in enumerate(values):
            own = self.pages_of(place)
            found[:, own] = np.maximum(found[:, own], value)
        return found.reshape(self.grid)


def arrange(
    leaves: Sequence[Leaf],
    dtypes: Sequence[np.dtype],
    shards: int,
    axes_of: Callable[[Leaf], ShardAxes | None],
) -> tuple[PagedGroup, ...]:
    """Returns the paged groups of some leaves.

    Args:
        leaves: the leaves to be coded.
        dtypes: the types of the parameters, by index.
        shards: the number of parts of each group.
        axes_of: returns how a leaf is split into shards; None if it cannot be.
    """
    slots: dict[int, list[Leaf]] = {}
    for leaf in leaves:
        slots.setdefault(leaf.parameter, []).append(leaf)
    shard_axes = {p: axes_of(own[0]) if shards > 1 else None for p, own in slots.items()}
    alike: dict[tuple, list[int]] = {}
    for parameter, own in slots.items():
        # Vectors and matrices have separate pages, because their updates often differ (decay masks).
        kind = (shard_axes[parameter] is None, len(own[0].shape) > 1, dtypes[parameter])
        alike.setdefault((kind, *((x.slot, x.dtype) for x in own)), []).append(parameter)
    return tuple(
        _paged_group(parameters, slots, shard_axes, shards) for parameters in alike.values()
    )


def _paged_group(
    parameters: Sequence[int],
    slots: dict[int, list[Leaf]],
    shard_axes: dict[int, ShardAxes | None],
    shards: int,
) -> PagedGroup:
    own = tuple(shard_axes[p] or () for p in parameters)
    lines = shards if any(own) else 1
    whole = [-(-slots[p][0].size // lines // BLOCK) * BLOCK for p in parameters]
    starts = np.concatenate([[0], np.cumsum(whole)[:-1]])
    return PagedGroup(
        slots=tuple(leaf.slot for leaf in slots[parameters[0]]),
        parameters=tuple(parameters),
        leaves=tuple(zip(*(slots[p] for p in parameters), strict=True)),
        starts=tuple(int(s) for s in starts),
        shards=shards,
        shard_axes=own,
    )

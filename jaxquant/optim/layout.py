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

GROUP = 64  # pages that are decoded at once: what a core's cache holds
BLOCKS = PAGE_SHAPE[:-1]  # of a page: (8, 8)


@dataclasses.dataclass(frozen=True)
class PagedGroup:
    """Parameters whose state has the same slots and types, one after another in lines of pages.

    Attributes:
        slots: of their state, in order.
        parameters: their indices.
        leaves: for each slot, the state's leaf of each parameter.
        starts: the element of a line at which each parameter begins, a multiple of a block.
        shards: parts of as many pages each, which devices can share among them.
        cuts: of each parameter; empty where they go through all shards in one line.
    """

    slots: tuple[str, ...]
    parameters: tuple[int, ...]
    leaves: tuple[tuple[Leaf, ...], ...]
    starts: tuple[int, ...]
    shards: int
    shard_axes: tuple[ShardAxes, ...]

    @property
    def lines(self) -> int:
        """Lines of pages, through which parts of each parameter go side by side."""
        return self.shards if any(self.shard_axes) else 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each parameter in a line."""
        return tuple(leaf.size // self.lines for leaf in self.leaves[0])

    @property
    def pages(self) -> int:
        """Pages of a line that hold elements."""
        return -(-(self.starts[-1] + self.sizes[-1]) // PAGE)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(shards, groups in each, pages in each); the last pages may be without elements."""
        own = -(-self.pages * self.lines // self.shards)
        groups = -(-own // GROUP)
        return self.shards, groups, -(-own // groups)

    def lined(self, x: Any) -> Any:
        """An array [shards, groups, pages, ...] as [lines, pages of each, ...]."""
        return x.reshape(self.lines, -1, *x.shape[3:])

    def flatten(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """The parameters' arrays as [shards, groups, pages, 8, 8, 128]; zeros between and behind them."""
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
        """The parameters' arrays back from `flatten`'s."""
        lines = flat.reshape(self.lines, -1)
        return [self.from_shards(lines, place, s) for place, s in enumerate(self.starts)]

    def from_shards(self, lines: jax.Array, place: int, start: int) -> jax.Array:
        """The array of the parameter at `place`, which begins at an element of lines [lines, elements]."""
        own = jax.lax.slice_in_dim(lines, start, start + self.sizes[place], axis=1)
        return from_shards(own, self.leaves[0][place].shape, self.shard_axes[place])

    def firsts(self) -> jax.Array:
        """The element, modulo 2^32, with which each group of pages begins, uint32[shards, groups]."""
        shards, groups, size = self.grid
        found = jnp.arange(shards * groups, dtype=jnp.uint32) * jnp.uint32(size * PAGE % 2**32)
        return found.reshape(shards, groups)

    def owners(self) -> np.ndarray:
        """Which of the run's parameters each block belongs to, int32[shards, groups, pages, 8, 8]."""
        firsts = np.array(self.starts) // BLOCK
        blocks = np.arange(math.prod(self.grid) * PAGE // self.lines // BLOCK)
        found = np.searchsorted(firsts, blocks, side="right") - 1
        return np.tile(found.astype(np.int32), self.lines).reshape(*self.grid, *BLOCKS)

    def pages_of(self, place: int) -> slice:
        """The pages of each line that hold elements of the run's parameter at `place`."""
        start, size = self.starts[place], self.sizes[place]
        return slice(start // PAGE, -(-(start + size) // PAGE))

    def by_page(self, values: Sequence[int]) -> np.ndarray:
        """The largest value among the parameters of each page, int[shards, groups, pages]; 0 where none."""
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
    """The runs of some leaves.

    Args:
        leaves: to be coded.
        dtypes: of the parameters, by their index.
        shards: parts of each run.
        cut: how a leaf is dealt out to them; None where it cannot be.
    """
    slots: dict[int, list[Leaf]] = {}
    for leaf in leaves:
        slots.setdefault(leaf.parameter, []).append(leaf)
    shard_axes = {p: axes_of(own[0]) if shards > 1 else None for p, own in slots.items()}
    alike: dict[tuple, list[int]] = {}
    for parameter, own in slots.items():
        # Pages of vectors apart from those of matrices: their updates differ more often (decay's mask).
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

"""How coded leaves lie in pages: leaves with the same slots side by side, each from a new block on."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.optim.codecs import BLOCK
from jaxquant.optim.leaves import Leaf
from jaxquant.pages import PAGE, PAGE_SHAPE

GROUP = 64  # pages that are decoded at once: what a core's cache holds
BLOCKS = PAGE_SHAPE[:-1]  # of a page: (8, 8)


@dataclasses.dataclass(frozen=True)
class Run:
    """Parameters whose state has the same slots and types, one after another in pages.

    Attributes:
        slots: of their state, in order.
        parameters: their indices.
        leaves: for each slot, the state's leaf of each parameter.
        starts: the element of the run at which each parameter begins, a multiple of a block.
        shards: parts of as many pages each, which devices can share among them.
    """

    slots: tuple[str, ...]
    parameters: tuple[int, ...]
    leaves: tuple[tuple[Leaf, ...], ...]
    starts: tuple[int, ...]
    shards: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return tuple(leaf.size for leaf in self.leaves[0])

    @property
    def pages(self) -> int:
        """Pages that hold elements."""
        return -(-(self.starts[-1] + self.sizes[-1]) // PAGE)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(shards, groups in each, pages in each); the last pages may be without elements."""
        own = -(-self.pages // self.shards)
        groups = -(-own // GROUP)
        return self.shards, groups, -(-own // groups)

    def flatten(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """The parameters' arrays as [shards, groups, pages, 8, 8, 128]; zeros between and behind them."""
        total = math.prod(self.grid) * PAGE
        if len(arrays) == 1 and self.sizes[0] == total:
            return arrays[0].reshape(*self.grid, *PAGE_SHAPE)
        ends = (*self.starts[1:], total)
        parts = [
            jnp.pad(x.ravel(), (0, end - start - size))
            for x, start, end, size in zip(arrays, self.starts, ends, self.sizes, strict=True)
        ]
        return jnp.concatenate(parts).reshape(*self.grid, *PAGE_SHAPE)

    def unflatten(self, flat: jax.Array) -> list[jax.Array]:
        """The parameters' arrays back from `flatten`'s."""
        flat = flat.ravel()
        return [
            jax.lax.slice(flat, (start,), (start + leaf.size,)).reshape(leaf.shape)
            for start, leaf in zip(self.starts, self.leaves[0], strict=True)
        ]

    def firsts(self) -> jax.Array:
        """The element, modulo 2^32, with which each group of pages begins, uint32[shards, groups]."""
        shards, groups, size = self.grid
        found = jnp.arange(shards * groups, dtype=jnp.uint32) * jnp.uint32(size * PAGE % 2**32)
        return found.reshape(shards, groups)

    def owners(self) -> np.ndarray:
        """Which of the run's parameters each block belongs to, int32[shards, groups, pages, 8, 8]."""
        firsts = np.array(self.starts) // BLOCK
        blocks = np.arange(math.prod(self.grid) * PAGE // BLOCK)
        found = np.searchsorted(firsts, blocks, side="right") - 1
        return found.astype(np.int32).reshape(*self.grid, *BLOCKS)

    def pages_of(self, place: int) -> slice:
        """The pages that hold elements of the run's parameter at `place`."""
        start, size = self.starts[place], self.sizes[place]
        return slice(start // PAGE, -(-(start + size) // PAGE))

    def by_page(self, values: Sequence[int]) -> np.ndarray:
        """The largest value among the parameters of each page, int[shards, groups, pages]; 0 where none."""
        found = np.zeros(math.prod(self.grid), int)
        for place, value in enumerate(values):
            own = self.pages_of(place)
            found[own] = np.maximum(found[own], value)
        return found.reshape(self.grid)


def arrange(leaves: Sequence[Leaf], dtypes: Sequence[np.dtype], shards: int) -> tuple[Run, ...]:
    """The runs of some leaves.

    Args:
        leaves: to be coded.
        dtypes: of the parameters, by their index.
        shards: parts of each run.
    """
    slots: dict[int, list[Leaf]] = {}
    for leaf in leaves:
        slots.setdefault(leaf.parameter, []).append(leaf)
    alike: dict[tuple, list[int]] = {}
    for parameter, own in slots.items():
        # Pages of vectors apart from those of matrices: their updates differ more often (decay's mask).
        kind = (len(own[0].shape) > 1, dtypes[parameter])
        alike.setdefault((kind, *((x.slot, x.dtype) for x in own)), []).append(parameter)
    return tuple(_run(parameters, slots, shards) for parameters in alike.values())


def _run(parameters: Sequence[int], slots: dict[int, list[Leaf]], shards: int) -> Run:
    sizes = [slots[p][0].size for p in parameters]
    whole = [-(-size // BLOCK) * BLOCK for size in sizes]
    starts = np.concatenate([[0], np.cumsum(whole)[:-1]])
    return Run(
        slots=tuple(leaf.slot for leaf in slots[parameters[0]]),
        parameters=tuple(parameters),
        leaves=tuple(zip(*(slots[p] for p in parameters), strict=True)),
        starts=tuple(int(s) for s in starts),
        shards=shards,
    )

"""Arrange the pages of a paged group for kernels, and count the bytes that the kernels move.

A parameter that fills whole pages, and whose rows fill whole tiles, is updated in place.  Other parameters
are copied into pages first.

On a CPU, interpreted kernels give the same bits as XLA, except that XLA may round a result otherwise if it
computes the updates of the group's other parameters together with it.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.optim import pages
from jaxquant.optim.blocks import block_step, draw_words, programs_of, wide_of
from jaxquant.optim.codecs import BLOCK
from jaxquant.optim.kernels import LANES, STEP, Kernel, numbers, unit_of
from jaxquant.optim.layout import PagedGroup
from jaxquant.optim.state import QuantizedState, joined, merged, rooted
from jaxquant.optim.traced_update import ElementwiseUpdate, TracedUpdate, elementwise_by_group
from jaxquant.optim.updating import apply_update

# Element-wise operations that Pallas does not lower for TPUs.
LACKING = {"cbrt", "copy", "copy_p", "cosh", "expm1", "real", "reduce_precision", "sinh"}


def apply_update_with_kernels(
    traced: TracedUpdate, state: QuantizedState, seed: int
) -> tuple[list[Any], QuantizedState]:
    """Returns the updates and the state after them.

    Raises:
        ValueError: if a kernel cannot update the state of some parameter.
    """
    _check(traced, state)
    return apply_update(traced, state, seed, update_with_kernels)


def update_with_kernels(
    traced: TracedUpdate,
    state: QuantizedState,
    number: int,
    update_fns: Sequence[ElementwiseUpdate],
    seed: int,
) -> QuantizedState:
    """Updates a paged group, span after span, and adds its results to the known values."""
    traced.evaluate(
        n for update_fn in update_fns for n in (*update_fn.scalars, *update_fn.wide.values())
    )
    words = draw_words(state, number, seed)
    for span in spans(traced, state, number, update_fns):
        state = span.apply_update(traced, state, number, words)
    return state


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive parameters of a group that one kernel updates.

    Attributes:
        group: the group of these parameters alone.
        update_fns: their updates.
        kernel: the kernel that updates their pages.
    """

    group: PagedGroup
    update_fns: tuple[ElementwiseUpdate, ...]
    kernel: Kernel

    def apply_update(
        self, traced: TracedUpdate, state: QuantizedState, number: int, words: list[jax.Array]
    ) -> QuantizedState:
        """Returns the state after the update, and adds its results to the known values."""
        kernel, rows = self.kernel, state.pool.shape[1]
        tables = [self._own(rooted(table, rows)) for table in state.tables[number]]
        scales = [self._own(scale) for scale in state.scales[number]]
        programs = [merged(programs_of(self.group, self.update_fns))] * (
            len(kernel.blocks.update_fns) > 1
        )
        pool, new, results = kernel(
            joined(state.pool),
            jnp.concatenate([self._stepped(t).reshape(kernel.steps, 1, -1) for t in tables], -1),
            [self._along_lanes(x) for x in scales],
            [self._along_lanes(x) for x in programs],
            self._operands(traced),
            numbers(words, [jnp.reshape(traced.known[n], ()) for n in kernel.scalars]),
        )
        for kind, flat in zip(self.update_fns[0].produced, results, strict=True):
            for update_fn, value in zip(self.update_fns, self._by_parameter(flat), strict=True):
                traced.known[update_fn.produced[kind]] = value
        before = state.scales[number]
        own = tuple(self._with_own(x, self._by_page(y)) for x, y in zip(before, new, strict=True))
        scales = (*state.scales[:number], own, *state.scales[number + 1 :])
        return state._replace(pool=pool.reshape(state.pool.shape), scales=scales)

    def _operands(self, traced: TracedUpdate) -> list[jax.Array]:
        if self.kernel.width is None:
            return [merged(x) for x in wide_of(traced, self.group, self.update_fns).values()]
        known = [traced.known[n] for n in self.update_fns[0].wide.values()]
        return [_tiles(x, self.kernel.width) for x in known]

    def _by_parameter(self, flat: jax.Array) -> list[jax.Array]:
        """Splits a flat result by parameter."""
        if self.kernel.width is None:
            return self.group.unflatten(flat)
        tiles = flat.reshape(-1, self.kernel.width, 8, BLOCK)
        return [jnp.swapaxes(tiles, 1, 2).reshape(self.group.leaves[0][0].shape)]

    def _own(self, x: jax.Array) -> jax.Array:
        """Returns the span's pages of an array [shards, groups, pages, ...], padded with zeros."""
        first, count = self.kernel.first, self.group.pages
        own = merged(merged(x))[first : first + count]
        return _padded(own, self.kernel.pages)

    def _with_own(self, x: jax.Array, own: jax.Array) -> jax.Array:
        """Returns the array with the span's pages replaced."""
        first, count = self.kernel.first, self.group.pages
        return merged(merged(x)).at[first : first + count].set(own[:count]).reshape(x.shape)

    def _stepped(self, x: jax.Array) -> jax.Array:
        """Reshapes [pages, ...] to [steps, pages of a step, ...]."""
        steps, step = self.kernel.steps, self.kernel.step
        return _padded(x, steps * step).reshape(steps, step, *x.shape[1:])

    def _along_lanes(self, x: jax.Array) -> jax.Array:
        """Transposes [pages, 8, 8, n] to [steps, n, 8, 128]."""
        x = jnp.transpose(self._stepped(x), (0, 4, 3, 1, 2))
        x = x.reshape(*x.shape[:3], -1)
        return jnp.pad(x, [(0, 0)] * 3 + [(0, LANES - x.shape[-1])])

    def _by_page(self, x: jax.Array) -> jax.Array:
        """Inverts `_along_lanes`; the last step may have additional pages."""
        x = x[..., : 8 * self.kernel.step]
        x = x.reshape(*x.shape[:3], self.kernel.step, 8)
        return merged(jnp.transpose(x, (0, 3, 4, 2, 1)))


def _tiles(x: jax.Array, width: int) -> jax.Array:
    """Returns a matrix in the TPU's tiled order, [blocks, 128]; the compiler moves nothing for this."""
    return jnp.swapaxes(x.reshape(-1, 8, width, BLOCK), 1, 2).reshape(-1, BLOCK)


def _padded(x: jax.Array, count: int) -> jax.Array:
    return jnp.pad(x, [(0, count - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


# ---------------------------------------------------------------------------------------------------
# Which parameters are updated together


def spans(
    traced: TracedUpdate,
    state: QuantizedState,
    number: int,
    update_fns: Sequence[ElementwiseUpdate],
) -> Iterator[Span]:
    """Yields the spans of a group, in order."""
    group = state.plan.groups[number]
    widths = [_tiled(traced, group, i, update_fn) for i, update_fn in enumerate(update_fns)]
    first = 0
    while first < len(update_fns):
        last = first + 1
        while widths[first] is None and last < len(update_fns) and widths[last] is None:
            last += 1
        yield _span(traced, state, number, update_fns, slice(first, last), widths[first])
        first = last


def _tiled(
    traced: TracedUpdate, group: PagedGroup, place: int, update_fn: ElementwiseUpdate
) -> int | None:
    """Returns the number of tiles in a row of a parameter that can be updated in place; None if it cannot."""
    shape, start, size = group.leaves[0][place].shape, group.starts[place], group.sizes[place]
    if len(shape) < 2 or shape[-2] % 8 or shape[-1] % (8 * BLOCK):
        return None
    specs = [
        traced.program.specs[n] for n in (*update_fn.wide.values(), *update_fn.produced.values())
    ]
    # A TPU packs several rows of a narrower type into one.
    if start % pages.PAGE or size % pages.PAGE or any(x.dtype != jnp.float32 for x in specs):
        return None
    width = shape[-1] // BLOCK
    return width if unit_of(width) <= STEP else None


def _span(
    traced: TracedUpdate,
    state: QuantizedState,
    number: int,
    update_fns: Sequence[ElementwiseUpdate],
    own: slice,
    width: int | None,
) -> Span:
    group, update_fns = state.plan.groups[number], tuple(update_fns[own])
    first = group.starts[own.start] // pages.PAGE
    group = dataclasses.replace(
        group,
        parameters=group.parameters[own],
        leaves=tuple(slot[own] for slot in group.leaves),
        starts=tuple(start - first * pages.PAGE for start in group.starts[own]),
        shard_axes=group.shard_axes[own],
    )
    known = {n: traced.known.get(n) for update_fn in update_fns for n in update_fn.scalars}
    constants = {n: x for n, x in known.items() if not isinstance(x, jax.Array | None)}
    specs = traced.program.specs
    kernel = Kernel(
        blocks=block_step(state.plan, number, update_fns),
        first=first,
        pages=group.pages if width is not None else math.prod(group.grid),
        width=width,
        wide={
            kind: specs[n].dtype for update_fn in update_fns for kind, n in update_fn.wide.items()
        },
        results=tuple(specs[n].dtype for n in update_fns[0].produced.values()),
        scalars={n: specs[n].dtype for n in known if n not in constants},
        constants={n: np.asarray(x).reshape(())[()] for n, x in constants.items()},
    )
    return Span(group, update_fns, kernel)


def _check(traced: TracedUpdate, state: QuantizedState) -> None:
    """Raises a ValueError on a platform without kernels, or for the first parameter that none can update."""
    platform = jax.default_backend()
    if platform not in ("tpu", "cpu"):
        raise ValueError(
            f"kernel='pallas' has kernels for TPUs, which CPUs interpret; got {platform!r}, "
            "where kernel='xla' runs"
        )
    elementwise, reasons = elementwise_by_group(traced, state.plan)
    where = "kernel='pallas' cannot update"
    for path, reason in reasons.items():
        raise ValueError(f"{where} {path} page by page: {reason}; kernel='xla' can")
    for number, update_fns in elementwise.items():
        for leaf, update_fn in zip(state.plan.groups[number].leaves[0], update_fns, strict=True):
            lacking = sorted({o.name for o in update_fn.operations} & LACKING)
            if lacking:
                names = ", ".join(lacking)
                raise ValueError(
                    f"{where} {leaf.path}: TPU kernels have no {names}; kernel='xla' can"
                )


# ---------------------------------------------------------------------------------------------------
# Bytes


def bytes_per_element(traced: TracedUpdate, state: QuantizedState) -> dict[str, float]:
    """Returns the bytes that an update moves between a TPU's memory and its core, per element, by purpose."""
    found, elements = collections.Counter(), 0
    elementwise, _ = elementwise_by_group(traced, state.plan)
    for number, update_fns in elementwise.items():
        elements += sum(state.plan.groups[number].sizes)
        rows = sum(int(np.count_nonzero(table)) for table in state.tables[number])
        found["codes"] += 2 * rows * pages.ROW  # read and written
        for span in spans(traced, state, number, update_fns):
            found.update(_bytes(span.kernel))
    return {name: moved / elements for name, moved in found.items()}


def _bytes(kernel: Kernel) -> dict[str, int]:
    """Returns the bytes that a kernel moves, except rows of the pool."""
    found = {
        name: sum(kernel.steps * _block_bytes(*block) for block in blocks)
        for name, blocks in kernel.moved().items()
    }
    found["scales"] *= 2  # read and written
    moved = found["operands"] + found["results"]
    return {**found, "copies": 2 * moved if kernel.width is None else 0}


def _block_bytes(spec: Any, dtype: Any) -> int:
    return math.prod(spec.block_shape) * np.dtype(dtype).itemsize

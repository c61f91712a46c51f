"""A run's pages as kernels take them, and the bytes that this moves.

A parameter that fills whole pages, and whose rows fill whole tiles, is updated where it lies.  Those between
such parameters are put together in pages first, which copies them.

Interpreted on a CPU, kernels give the bits that XLA gives there, except that XLA may round a result otherwise
where it computes the update of the run's other parameters beside it.
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
from jaxquant.optim.inner import Inner, Piece, pieces_by_run
from jaxquant.optim.kernels import LANES, STEP, Kernel, numbers, unit_of
from jaxquant.optim.layout import Run
from jaxquant.optim.state import QuantizedState, joined, merged, rooted
from jaxquant.optim.updating import updated

# Elementwise operations that Pallas does not lower for TPUs.
LACKING = {"cbrt", "copy", "copy_p", "cosh", "expm1", "real", "reduce_precision", "sinh"}


def updated_by_kernels(
    inner: Inner, state: QuantizedState, seed: int
) -> tuple[list[Any], QuantizedState]:
    """The updates, and the state after them.

    Raises:
        ValueError: a parameter's state that no kernel can take.
    """
    _check(inner, state)
    return updated(inner, state, seed, by_kernels)


def by_kernels(
    inner: Inner, state: QuantizedState, number: int, pieces: Sequence[Piece], seed: int
) -> QuantizedState:
    """The update of a run of parameters, span after span; its results become known to `inner`."""
    inner.evaluate(n for piece in pieces for n in (*piece.scalars, *piece.wide.values()))
    words = draw_words(state, number, seed)
    for span in spans(inner, state, number, pieces):
        state = span.updated(inner, state, number, words)
    return state


@dataclasses.dataclass(frozen=True)
class Span:
    """Parameters of a run that one kernel updates.

    Attributes:
        run: they alone.
        pieces: theirs.
        kernel: of their pages.
    """

    run: Run
    pieces: tuple[Piece, ...]
    kernel: Kernel

    def updated(
        self, inner: Inner, state: QuantizedState, number: int, words: list[jax.Array]
    ) -> QuantizedState:
        """The state with their update in it; its results become known to `inner`."""
        kernel, rows = self.kernel, state.pool.shape[1]
        tables = [self._own(rooted(table, rows)) for table in state.tables[number]]
        scales = [self._own(scale) for scale in state.scales[number]]
        programs = [merged(programs_of(self.run, self.pieces))] * (len(kernel.blocks.pieces) > 1)
        pool, new, results = kernel(
            joined(state.pool),
            jnp.concatenate([self._stepped(t).reshape(kernel.steps, 1, -1) for t in tables], -1),
            [self._along_lanes(x) for x in scales],
            [self._along_lanes(x) for x in programs],
            self._operands(inner),
            numbers(words, [jnp.reshape(inner.known[n], ()) for n in kernel.scalars]),
        )
        for kind, flat in zip(self.pieces[0].produced, results, strict=True):
            for piece, value in zip(self.pieces, self._apart(flat), strict=True):
                inner.known[piece.produced[kind]] = value
        before = state.scales[number]
        own = tuple(self._with_own(x, self._by_page(y)) for x, y in zip(before, new, strict=True))
        scales = (*state.scales[:number], own, *state.scales[number + 1 :])
        return state._replace(pool=pool.reshape(state.pool.shape), scales=scales)

    def _operands(self, inner: Inner) -> list[jax.Array]:
        if self.kernel.width is None:
            return [merged(x) for x in wide_of(inner, self.run, self.pieces).values()]
        known = [inner.known[n] for n in self.pieces[0].wide.values()]
        return [_tiles(x, self.kernel.width) for x in known]

    def _apart(self, flat: jax.Array) -> list[jax.Array]:
        """The parameters' results."""
        if self.kernel.width is None:
            return self.run.unflatten(flat)
        tiles = flat.reshape(-1, self.kernel.width, 8, BLOCK)
        return [jnp.swapaxes(tiles, 1, 2).reshape(self.run.leaves[0][0].shape)]

    def _own(self, x: jax.Array) -> jax.Array:
        """Of an array [shards, groups, pages, ...] the span's pages; zeros where there are no more."""
        first, count = self.kernel.first, self.run.pages
        own = merged(merged(x))[first : first + count]
        return _padded(own, self.kernel.pages)

    def _with_own(self, x: jax.Array, own: jax.Array) -> jax.Array:
        """`_own` set."""
        first, count = self.kernel.first, self.run.pages
        return merged(merged(x)).at[first : first + count].set(own[:count]).reshape(x.shape)

    def _stepped(self, x: jax.Array) -> jax.Array:
        """[pages, ...] as [steps, pages of a step, ...]."""
        steps, step = self.kernel.steps, self.kernel.step
        return _padded(x, steps * step).reshape(steps, step, *x.shape[1:])

    def _along_lanes(self, x: jax.Array) -> jax.Array:
        """[pages, 8, 8, n] as [steps, n, 8, 128]."""
        x = jnp.transpose(self._stepped(x), (0, 4, 3, 1, 2))
        x = x.reshape(*x.shape[:3], -1)
        return jnp.pad(x, [(0, 0)] * 3 + [(0, LANES - x.shape[-1])])

    def _by_page(self, x: jax.Array) -> jax.Array:
        """`_along_lanes` undone, with the last step's pages that there are not."""
        x = x[..., : 8 * self.kernel.step]
        x = x.reshape(*x.shape[:3], self.kernel.step, 8)
        return merged(jnp.transpose(x, (0, 3, 4, 2, 1)))


def _tiles(x: jax.Array, width: int) -> jax.Array:
    """A matrix in the order in which a TPU holds it, [blocks, 128]: its compiler moves nothing for this."""
    return jnp.swapaxes(x.reshape(-1, 8, width, BLOCK), 1, 2).reshape(-1, BLOCK)


def _padded(x: jax.Array, count: int) -> jax.Array:
    return jnp.pad(x, [(0, count - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


# ---------------------------------------------------------------------------------------------------
# Which parameters are updated together


def spans(
    inner: Inner, state: QuantizedState, number: int, pieces: Sequence[Piece]
) -> Iterator[Span]:
    """The spans of a run, in order."""
    run = state.plan.runs[number]
    widths = [_tiled(inner, run, i, piece) for i, piece in enumerate(pieces)]
    first = 0
    while first < len(pieces):
        last = first + 1
        while widths[first] is None and last < len(pieces) and widths[last] is None:
            last += 1
        yield _span(inner, state, number, pieces, slice(first, last), widths[first])
        first = last


def _tiled(inner: Inner, run: Run, place: int, piece: Piece) -> int | None:
    """Tiles in a row of a parameter that can be updated where it lies; None where it cannot."""
    shape, start, size = run.leaves[0][place].shape, run.starts[place], run.sizes[place]
    if len(shape) < 2 or shape[-2] % 8 or shape[-1] % (8 * BLOCK):
        return None
    specs = [inner.program.specs[n] for n in (*piece.wide.values(), *piece.produced.values())]
    # Of narrower types a TPU holds several rows in one.
    if start % pages.PAGE or size % pages.PAGE or any(x.dtype != jnp.float32 for x in specs):
        return None
    width = shape[-1] // BLOCK
    return width if unit_of(width) <= STEP else None


def _span(
    inner: Inner,
    state: QuantizedState,
    number: int,
    pieces: Sequence[Piece],
    own: slice,
    width: int | None,
) -> Span:
    run, pieces = state.plan.runs[number], tuple(pieces[own])
    first = run.starts[own.start] // pages.PAGE
    run = dataclasses.replace(
        run,
        parameters=run.parameters[own],
        leaves=tuple(slot[own] for slot in run.leaves),
        starts=tuple(start - first * pages.PAGE for start in run.starts[own]),
        cuts=run.cuts[own],
    )
    known = {n: inner.known.get(n) for piece in pieces for n in piece.scalars}
    constants = {n: x for n, x in known.items() if not isinstance(x, jax.Array | None)}
    specs = inner.program.specs
    kernel = Kernel(
        blocks=block_step(state.plan, number, pieces),
        first=first,
        pages=run.pages if width is not None else math.prod(run.grid),
        width=width,
        wide={kind: specs[n].dtype for piece in pieces for kind, n in piece.wide.items()},
        results=tuple(specs[n].dtype for n in pieces[0].produced.values()),
        scalars={n: specs[n].dtype for n in known if n not in constants},
        constants={n: np.asarray(x).reshape(())[()] for n, x in constants.items()},
    )
    return Span(run, pieces, kernel)


def _check(inner: Inner, state: QuantizedState) -> None:
    """Raises ValueError for the first parameter that no kernel can take."""
    by_run, reasons = pieces_by_run(inner, state.plan)
    where = "kernel='pallas' cannot update"
    for path, reason in reasons.items():
        raise ValueError(f"{where} {path} page by page: {reason}; kernel='xla' can")
    for number, pieces in by_run.items():
        for leaf, piece in zip(state.plan.runs[number].leaves[0], pieces, strict=True):
            lacking = sorted({o.name for o in piece.operations} & LACKING)
            if lacking:
                names = ", ".join(lacking)
                raise ValueError(
                    f"{where} {leaf.path}: TPU kernels have no {names}; kernel='xla' can"
                )


# ---------------------------------------------------------------------------------------------------
# Bytes


def bytes_moved(inner: Inner, state: QuantizedState) -> dict[str, float]:
    """Bytes an element that an update moves between a TPU's memory and its core, by what they are."""
    found, elements = collections.Counter(), 0
    by_run, _ = pieces_by_run(inner, state.plan)
    for number, pieces in by_run.items():
        elements += sum(state.plan.runs[number].sizes)
        rows = sum(int(np.count_nonzero(table)) for table in state.tables[number])
        found["codes"] += 2 * rows * pages.ROW  # read and written
        for span in spans(inner, state, number, pieces):
            found.update(_bytes(span.kernel))
    return {name: moved / elements for name, moved in found.items()}


def _bytes(kernel: Kernel) -> dict[str, int]:
    """Bytes that a kernel moves besides rows of the pool."""
    found = {
        name: sum(kernel.steps * _block_bytes(*block) for block in blocks)
        for name, blocks in kernel.moved().items()
    }
    found["scales"] *= 2  # read and written
    moved = found["operands"] + found["results"]
    return {**found, "copies": 2 * moved if kernel.width is None else 0}


def _block_bytes(spec: Any, dtype: Any) -> int:
    return math.prod(spec.block_shape) * np.dtype(dtype).itemsize

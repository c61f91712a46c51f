"""Update pages with one Pallas kernel for TPUs: decoded state never leaves the core.

A grid step takes up to 16 pages.  While it computes, the rows of the next step's pages are copied from the
pool, wherever the tables place them, and the rows of the last step are copied back: the pool is updated in
place.  Absent rows are not copied, so the traffic of a page is proportional to its width.

The kernel uses other layouts than the state in four places:

- Tables are copied to scalar memory step by step, together with those of the next step.  Prefetching them at
  once would fill it: a page of two slots takes 64 bytes there.
- What belongs to a block of 128 elements, such as its scale, lies along lanes: block [i, j] of page p is at
  [j, 8 p + i] of [8, 128].  In an array [8, 8] for each page, every row would be padded to 128 lanes.
- Gradients and parameters have the TPU's tiled layout, 8 rows by 128 columns.  Tiles are split into blocks
when
  they are loaded into registers.  As pages they would have to be copied first.
- Bytes are int32 in registers, where all needed operations exist.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant.optim import pages
from jaxquant.optim.blocks import BlockStep
from jaxquant.optim.codecs import BLOCK, largest_of_each

STEP = 16  # maximum pages of a step: their blocks' 8 · 16 columns are the lanes
LANES = 128
_BLOCKS = pages.PAGE // BLOCK  # blocks of a page
Moved = tuple[pl.BlockSpec, Any]  # the block that each grid step moves, and its type


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The update of consecutive pages.

    Attributes:
        blocks: the step for their blocks.
        first: the index of the first page in its group.
        pages: the number of pages.
        width: blocks in a row of the operands, which are tiled, [pages · 64, 128]; None if operands are
            [pages, 8, 8, 128].
        wide: types of the uncoded operands, by kind.
        results: types of the results besides state.
        scalars: types of the scalar operands, by number.
        constants: scalars that are known, by number.
    """

    blocks: BlockStep
    first: int
    pages: int
    width: int | None
    wide: dict[Hashable, Any]
    results: tuple[Any, ...]
    scalars: dict[int, Any]
    constants: dict[int, Any]

    @property
    def slots(self) -> int:
        return len(self.blocks.codecs)

    @property
    def step(self) -> int:
        """The number of pages in a grid step: whole rows of tiles."""
        unit = unit_of(self.width)
        return unit * max(1, min(STEP, self.pages) // unit)

    @property
    def steps(self) -> int:
        return -(-self.pages // self.step)

    def moved(self) -> dict[str, list[Moved]]:
        """Returns all that is moved between the chip's memory and the core, except rows of the pool."""
        table = functools.partial(
            pl.BlockSpec, (1, 1, self.slots * self.step * pages.PLANES), memory_space=pltpu.SMEM
        )
        own, following = (
            table(lambda i, *_: (i, 0, 0)),
            table(lambda i, *_: (jnp.minimum(i + 1, self.steps - 1), 0, 0)),
        )
        scales = [codec.scale for codec in self.blocks.codecs]
        program = [(_along((1, 1, 8, LANES)), jnp.int32)] * (len(self.blocks.update_fns) > 1)
        operand = _along(
            (self.step, *pages.PAGE_SHAPE) if self.width is None else (self.step * _BLOCKS, BLOCK)
        )
        return {
            "tables": [(own, jnp.int32), (following, jnp.int32)],
            "scales": [(_along((1, x.shape[0], 8, LANES)), x.dtype) for x in scales],
            "programs": program,
            "operands": [(operand, dtype) for dtype in self.wide.values()],
            "results": [(operand, dtype) for dtype in self.results],
        }

    def __call__(
        self,
        pool: jax.Array,
        tables: jax.Array,
        scales: list[jax.Array],
        programs: list[jax.Array],
        wide: list[jax.Array],
        numbers: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
        """Returns (pool, scales, results) after the update.  On CPUs the kernel is interpreted."""
        specs = {name: [spec for spec, _ in found] for name, found in self.moved().items()}
        anywhere = pl.BlockSpec(memory_space=pl.ANY)
        inputs = (anywhere, *specs["tables"], specs["scales"], specs["programs"], specs["operands"])
        rows = pltpu.VMEM((2, self.slots * self.step * pages.PLANES, *pages.LANES), jnp.uint8)
        direction = [rows, pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((2,), jnp.int32)]
        shape = (
            (self.pages, *pages.PAGE_SHAPE) if self.width is None else (self.pages * _BLOCKS, BLOCK)
        )

        def call(is_cpu: bool) -> Callable[..., Any]:
            return pl.pallas_call(
                functools.partial(self._run, is_cpu),
                out_shape=(
                    jax.ShapeDtypeStruct(pool.shape, pool.dtype),
                    [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in scales],
                    [jax.ShapeDtypeStruct(shape, dtype) for dtype in self.results],
                ),
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=len(numbers),
                    grid=(self.steps,),
                    in_specs=inputs,
                    out_specs=(anywhere, specs["scales"], specs["results"]),
                    scratch_shapes=2 * direction,
                ),
                input_output_aliases={len(numbers): 0},
                interpret=is_cpu,
            )

        operands = (*numbers, pool, tables, tables, scales, programs, wide)
        return jax.lax.platform_dependent(*operands, tpu=call(False), cpu=call(True))

    def _run(
        self, is_cpu, whole, real, _, table, following, scales, programs, wide, pool, *refs
    ) -> None:
        """Computes one step of the grid."""
        new_scales, results, *scratch = refs
        step, last = pl.program_id(0), pl.num_programs(0) - 1
        side = jax.lax.rem(step, 2)
        arriving, leaving = _Rows(pool, *scratch[:3]), _Rows(pool, *scratch[3:], leaves=True)
        pl.when(step == 0)(lambda: arriving.start(table, side))
        pl.when(step < last)(lambda: arriving.start(following, 1 - side))
        arriving.wait(side)
        before, program = ([_widened(ref[0]) for ref in own] for own in (scales, programs))
        numbers = (
            [whole[i].astype(jnp.uint32) for i in range(self.slots)],
            self._known(whole, real),
        )

        def page(p: jax.Array, kept: list[jax.Array]) -> list[jax.Array]:
            entries = [(slot * self.step + p) * pages.PLANES for slot in range(self.slots)]
            widths = [_width(table, entry) for entry in entries]
            codes = [arriving.codes(side, *x) for x in zip(entries, widths, strict=True)]
            state = (codes, [jnp.full((1, 1), w) for w in widths], [_column(x, p) for x in before])
            values = {k: self._block_values(ref, p) for k, ref in zip(self.wide, wide, strict=True)}
            own = _column(program[0], p) if program else None
            place = self.first + step * self.step + p
            always = table[0, 0, 0] >= 0 if is_cpu else None
            new, found = self._page(always, state, values, own, place, *numbers)
            for ref, x in zip(results, found, strict=True):
                self._put_values(ref, p, x)
            for entry, (code, _) in zip(entries, new, strict=True):
                leaving.put(side, entry, code)
            return [_with_column(x, p, scale) for x, (_, scale) in zip(kept, new, strict=True)]

        kept = jax.lax.fori_loop(0, self.step, page, before)
        for ref, x in zip(new_scales, kept, strict=True):
            ref[0] = x.astype(ref.dtype)
        leaving.start(table, side)
        pl.when(step > 0)(lambda: leaving.wait(1 - side))
        pl.when(step == last)(lambda: leaving.wait(side))

    def _page(self, always, state, values, program, place, words, known) -> tuple[Any, list]:
        """Returns (codes and scales, results) of one page.

        On a CPU each part is a separate computation, as in the XLA path, so both give the same bits.  On a
        TPU all values are at hand and are computed once.
        """
        start = place.astype(jnp.uint32) * jnp.uint32(pages.PAGE)
        codes, bits, scales = state
        operands, compute = (codes, bits, scales, values, known, program), self.blocks.compute
        separately = functools.partial(_separately, always)
        if always is None:
            found = compute(*operands)
            compute = lambda *_: found  # noqa: E731
        # Pallas reduces one array at a time.
        blocks = dataclasses.replace(self.blocks, largest=largest_of_each)
        codes, scales, found = blocks(
            separately, compute, operands, codes, bits, scales, words, start
        )
        return list(zip(codes, scales, strict=True)), found

    def _known(self, whole: Any, real: Any) -> dict[int, Any]:
        """Returns the scalars: constants, and those that `numbers` has packed."""
        places, found = {True: 0, False: self.slots}, dict(self.constants)
        for n, dtype in self.scalars.items():
            x = (real if is_real(dtype) else whole)[places[is_real(dtype)]]
            found[n] = x != 0 if jnp.issubdtype(dtype, jnp.bool_) else x.astype(dtype)
            places[is_real(dtype)] += 1
        return found

    def _block_values(self, ref: Any, p: jax.Array) -> jax.Array:
        """Returns a page of an operand, [8, 8, 128]."""
        if self.width is None:
            return ref[p]
        return jnp.stack([ref[self._eight(p, i), :] for i in range(8)])

    def _put_values(self, ref: Any, p: jax.Array, values: jax.Array) -> None:
        if self.width is None:
            ref[p] = values
            return
        for i in range(8):
            ref[self._eight(p, i), :] = values[i]

    def _eight(self, p: jax.Array, i: int) -> Any:
        """Returns where eight consecutive blocks lie in tiles: in one row of as many tiles."""
        assert self.width is not None
        row, column = jnp.divmod(p * _BLOCKS + 8 * i, self.width)
        band, row = jnp.divmod(row, 8)
        return pl.ds(band * 8 * self.width + column * 8 + row, 8, stride=8)


def _separately(always: jax.Array | None, function: Callable[..., Any], *operands: Any) -> Any:
    return function(*operands) if always is None else pages.as_branch(always, function, *operands)


def unit_of(width: int | None) -> int:
    """Returns the number of pages that fill whole rows of tiles."""
    return 1 if width is None else math.lcm(8, width) // 8


def numbers(words: list[jax.Array], scalars: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Packs scalars for scalar memory: (integers with the random words first, floats)."""
    whole = [jax.lax.bitcast_convert_type(word, jnp.int32) for word in words]
    whole += [x.astype(jnp.int32) for x in scalars if not is_real(x.dtype)]
    real = [x.astype(jnp.float32) for x in scalars if is_real(x.dtype)]
    return jnp.stack(whole), jnp.stack(real or [jnp.float32(0)])


def is_real(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


# ---------------------------------------------------------------------------------------------------
# Rows of the pool


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows that are copied from the pool or to it, double-buffered.

    Attributes:
        pool: the pool, in the chip's memory.
        held: the buffered rows, uint8[2, entries, 8, 128].
        done: the semaphores of the copies of each side.
        started: the number of copies of each side.
        leaves: whether rows are copied to the pool.
    """

    pool: Any
    held: Any
    done: Any
    started: Any
    leaves: bool = False

    def start(self, table: Any, side: jax.Array) -> None:
        """Starts the copies of the present rows of a step."""

        def one(entry: jax.Array, count: jax.Array) -> jax.Array:
            row = table[0, 0, entry]
            pl.when(row != 0)(lambda: self._copy(row, side, entry).start())
            return count + (row != 0).astype(jnp.int32)

        self.started[side] = jax.lax.fori_loop(0, table.shape[-1], one, jnp.int32(0))

    def wait(self, side: jax.Array) -> None:
        """Waits for all copies that were started."""

        def one(_: jax.Array, nothing: None) -> None:
            self._copy(0, side, 0).wait()

        jax.lax.fori_loop(0, self.started[side], one, None)

    def codes(self, side: jax.Array, first: jax.Array, width: jax.Array) -> jax.Array:
        """Returns the codes of a page, int32[8, 8, 128]."""
        planes = [self.held[side, first + i].astype(jnp.int32) for i in range(pages.PLANES)]
        # Absent rows hold whatever was there before.
        return jnp.stack(pages.transposed(planes)) & (jnp.left_shift(jnp.int32(1), width) - 1)

    def put(self, side: jax.Array, first: jax.Array, codes: jax.Array) -> None:
        """Writes the rows of a page from its codes."""
        for i, plane in enumerate(pages.transposed(list(codes))):
            self.held[side, first + i] = plane.astype(jnp.uint8)

    def _copy(self, row: Any, side: jax.Array, entry: Any) -> Any:
        there, here = self.pool.at[row], self.held.at[side, entry]
        source, target = (here, there) if self.leaves else (there, here)
        return pltpu.make_async_copy(source, target, self.done.at[side])


# ---------------------------------------------------------------------------------------------------
# Values of blocks


def _along(shape: tuple[int, ...]) -> pl.BlockSpec:
    """Returns the specification of blocks that follow one another along the first axis."""
    return pl.BlockSpec(shape, lambda i, *_: (i, *(0,) * (len(shape) - 1)))


def _width(table: Any, first: jax.Array) -> jax.Array:
    """Returns the width of the page whose entries begin at `first`."""
    present = [(table[0, 0, first + i] != 0).astype(jnp.int32) for i in range(pages.PLANES)]
    return functools.reduce(jnp.add, present)


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32 if is_real(x.dtype) else jnp.int32)


def _column(x: jax.Array, p: jax.Array) -> jax.Array:
    """Returns the values of page p's blocks, [8, 8, n], from [n, 8, 128]."""
    back = jax.lax.rem(LANES - 8 * p, LANES)
    first = [pltpu.roll(x[n], back, 1) for n in range(x.shape[0])]
    columns = [jnp.stack([entry[:, i : i + 1] for i in range(8)]) for entry in first]
    return jnp.concatenate(columns, axis=-1)


def _with_column(x: jax.Array, p: jax.Array, column: jax.Array) -> jax.Array:
    """Returns x with the values of page p's blocks replaced."""
    lane, entries = jax.lax.broadcasted_iota(jnp.int32, x.shape[1:], 1), []
    for n in range(x.shape[0]):
        entry = x[n]
        for i in range(8):
            entry = jnp.where(lane == 8 * p + i, column[i, :, n : n + 1], entry)
        entries.append(entry)
    return jnp.stack(entries)

"""Store codes of variable width in a fixed budget of bit planes, with a table of where each page's bits are.

This is virtual memory for codes of few bits.  A *page* holds `PAGE` codes.  At b bits it owns b rows of the
pool, `ROW` bytes each, in any order; the table lists them.  The shape of the pool is the budget and the
table is data, so the width of a page changes without a change of shape, and nothing is recompiled.

The codes of a page are an array [8, 8, 128].  Code [i, j, k] is stored in bit i of byte [j, k] of each of
the page's rows, the lowest bit in the first row.  Eight codes and eight bytes are a bit matrix and its
transpose, which takes three rounds of exchanges between rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np

PLANES = 8  # maximum bits of a code
LANES = (8, 128)  # bytes in a row
ROW = 8 * 128
PAGE_SHAPE = (8, *LANES)
PAGE = 8 * ROW  # codes in a page
_NOWHERE = np.iinfo(np.int32).max  # an index that a scatter drops


@functools.partial(jax.tree_util.register_dataclass, data_fields=["pool", "table"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Store:
    """Pages of codes, each with its own width.

    Attributes:
        pool: the budget, uint8[rows + 1, 8, 128].  Row 0 stays zero and represents absent bits.
        table: the rows of each page's bits, the lowest bit first; 0 if absent.
    """

    pool: jt.UInt8[jax.Array, "rows 8 128"]
    table: jt.Int32[jax.Array, "pages planes"]

    @property
    def bits(self) -> jt.Int32[jax.Array, " pages"]:
        """The width of each page."""
        return widths(self.table)

    @property
    def rows(self) -> int:
        """The budget in rows."""
        return self.pool.shape[0] - 1


def widths(table: jt.Int32[jax.Array, "pages planes"]) -> jt.Int32[jax.Array, " pages"]:
    """Returns the width of each page."""
    return jnp.sum(table != 0, axis=-1, dtype=jnp.int32)


def empty(bits: jt.Int[np.ndarray, " pages"], rows: int | None = None) -> Store:
    """Returns pages of zeros.

    Args:
        bits: the width of each page, 0 to 8; 0 is a page without elements.
        rows: the budget; by default the sum of the widths.

    Raises:
        ValueError: if bits are out of range, or exceed the rows.

    >>> store = empty(np.array([2, 5]), rows=9)
    >>> store.bits, store.pool.nbytes
    (Array([2, 5], dtype=int32), 10240)
    """
    bits = np.asarray(bits)
    if bits.ndim != 1 or not np.issubdtype(bits.dtype, np.integer):
        raise ValueError(f"bits must be one integer for each page; got {bits!r}")
    if bits.size and not 0 <= bits.min() <= bits.max() <= PLANES:
        raise ValueError(f"bits must be from 0 to {PLANES}; got {bits.min()} to {bits.max()}")
    needed = int(bits.sum())
    rows = needed if rows is None else rows
    if rows < needed:
        raise ValueError(f"these bits take {needed} rows of {ROW} bytes; the budget is {rows}")
    present = np.arange(PLANES)[None, :] < bits[:, None]
    table = np.where(present, np.cumsum(present).reshape(present.shape), 0)
    return Store(jnp.zeros((rows + 1, *LANES), jnp.uint8), jnp.asarray(table, jnp.int32))


def read(
    pool: jt.UInt8[jax.Array, "rows 8 128"], table: jt.Int32[jax.Array, "pages planes"]
) -> jt.UInt8[jax.Array, "pages 8 8 128"]:
    """Returns the codes of some pages.

    >>> store = empty(np.array([3]))
    >>> codes = jnp.arange(PAGE, dtype=jnp.uint8).reshape(1, *PAGE_SHAPE) % jnp.uint8(8)
    >>> bool((read(write(store.pool, store.table, codes), store.table) == codes).all())
    True
    """
    return read_all(pool, [table])[0]


def read_all(
    pool: jt.UInt8[jax.Array, "rows 8 128"],
    tables: Sequence[jt.Int32[jax.Array, "pages planes"]],
) -> list[jt.UInt8[jax.Array, "pages 8 8 128"]]:
    """Returns the codes of the pages of each table.  All are read before any write, to avoid a copy."""
    always = is_real(tables[0])
    planes = separately(always, lambda pool, tables: [pool[t] for t in tables], pool, list(tables))
    return [separately(always, _transposed, x) for x in planes]


def write(
    pool: jt.UInt8[jax.Array, "rows 8 128"],
    table: jt.Int32[jax.Array, "pages planes"],
    codes: jt.UInt8[jax.Array, "pages 8 8 128"],
) -> jt.UInt8[jax.Array, "rows 8 128"]:
    """Returns the pool with the codes of some pages replaced.  Bits for which there is no row are dropped."""
    planes = separately(is_real(table), _transposed, codes)
    rows = jnp.where(table == 0, _NOWHERE, table).ravel()
    return pool.at[rows].set(planes.reshape(-1, *LANES), mode="drop", unique_indices=True)


def _transposed(rows_Px8x8x128: jax.Array) -> jax.Array:
    return jnp.stack(transposed([rows_Px8x8x128[:, i] for i in range(PLANES)]), axis=1)


def transposed(rows: Sequence[jax.Array]) -> list[jax.Array]:
    """Transposes bits: bit i of an entry in row j becomes bit j of the entry in row i.

    Args:
        rows: eight arrays of bytes, or of integers below 256.
    """
    found, number = list(rows), rows[0].dtype.type
    for shift, low in ((4, 0x0F), (2, 0x33), (1, 0x55)):
        by, low, high = number(shift), number(low), number(0xFF - low)
        for i in (i for i in range(PLANES) if not i & shift):
            a, b = found[i], found[i + shift]
            found[i] = (a & low) | ((b << by) & high)
            found[i + shift] = (b & high) | ((a >> by) & low)
    return found


def is_real(table: jt.Int32[jax.Array, "pages planes"]) -> jax.Array:
    """Returns True for any table, in a way that the compiler cannot see; for `separately`."""
    return table[0, 0] >= 0


def separately(always: jax.Array, function: Callable[..., Any], *operands: Any) -> Any:
    """Returns function(*operands); on CPUs it is a separate computation that is fused with no other.

    XLA's CPU compiler recomputes a cheap chain of operations for each of its uses, and packing bits uses
    every code eight times.  An optimization barrier does not prevent this; a branch does.

    Args:
        always: true, but unknown to the compiler.
        function: a function of arrays.
        operands: its arguments.
    """

    branch = functools.partial(as_branch, always, function)
    return jax.lax.platform_dependent(*operands, cpu=branch, default=function)


def as_branch(always: jax.Array, function: Callable[..., Any], *operands: Any) -> Any:
    """Returns function(*operands), computed in a branch that is taken if `always` is true."""
    shapes = jax.eval_shape(function, *operands)
    zeros = lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # noqa: E731
    return jax.lax.cond(always, function, zeros, *operands)


def lowered(
    table: jt.Int32[jax.Array, "pages planes"], bits: jt.Int32[jax.Array, " pages"]
) -> jt.Int32[jax.Array, "pages planes"]:
    """Returns the table with every page limited to `bits`.  No row is allocated, and some become free."""
    place = jnp.arange(PLANES, dtype=jnp.int32)[None, :]
    return jnp.where(place < bits[:, None], table, 0)


def raised(
    table: jt.Int32[jax.Array, "pages planes"],
    bits: jt.Int32[jax.Array, " pages"],
    rows: int,
) -> jt.Int32[jax.Array, "pages planes"]:
    """Returns the table with every page widened to at least `bits`, with rows that are free.

    If too few rows are left for a page, it and all later pages keep their width, so the budget always holds.

    Args:
        table: a table, as `lowered` returns it.
        bits: the width of each page, at most `PLANES`.
        rows: the budget.

    >>> store, bits = empty(np.array([4, 2])), jnp.array([1, 5])
    >>> widths(raised(lowered(store.table, bits), bits, store.rows))
    Array([1, 5], dtype=int32)
    """
    if rows == 0:
        return table
    place = jnp.arange(PLANES, dtype=jnp.int32)[None, :]
    wanted = (place < bits[:, None]) & (table == 0)
    taken = jnp.zeros(rows + 1, bool).at[table].set(True).at[0].set(True)
    free = jnp.nonzero(~taken, size=rows, fill_value=0)[0].astype(jnp.int32)
    left = jnp.sum(~taken, dtype=jnp.int32)
    # A page gets all of its rows or none, so rows are counted up to the end of each page.
    served = jnp.cumsum(jnp.sum(wanted, axis=1, dtype=jnp.int32)) <= left
    wanted &= served[:, None]
    order = jnp.cumsum(wanted.ravel(), dtype=jnp.int32).reshape(wanted.shape) - 1
    return jnp.where(wanted, free[jnp.maximum(order, 0)], table)

"""A fixed budget of bit planes, and the table that says where each page's bits lie.

Virtual memory for codes of few bits.  A *page* is `PAGE` codes; at b bits it owns b rows of the pool,
`ROW` bytes each, wherever they lie; the table names them.  The pool's shape is the budget and the table is
data, so that a page's precision changes without a change of shape, and nothing is compiled again.

Code i · ROW + w of a page is spread over bit i of byte w in each of its rows, the lowest bit in the first.
Eight codes and eight bytes are a matrix of bits and its transpose, which is three exchanges of whole rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np

ROW = 1024  # bytes in a row
PAGE = 8 * ROW  # codes in a page
PLANES = 8  # bits of a code at most
_NOWHERE = np.iinfo(np.int32).max  # an index that a scatter drops


@functools.partial(jax.tree_util.register_dataclass, data_fields=["pool", "table"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Store:
    """Pages of codes, each of its own width.

    Attributes:
        pool: the budget: uint8[rows + 1, ROW]; row 0 stays zero and stands for bits that are absent.
        table: rows of each page's bits, the lowest bit first; 0 where absent.
    """

    pool: jt.UInt8[jax.Array, "rows width"]
    table: jt.Int32[jax.Array, "pages planes"]

    @property
    def bits(self) -> jt.Int32[jax.Array, " pages"]:
        """Bits of each page's codes."""
        return widths(self.table)

    @property
    def rows(self) -> int:
        """The budget in rows."""
        return self.pool.shape[0] - 1


def widths(table: jt.Int32[jax.Array, "pages planes"]) -> jt.Int32[jax.Array, " pages"]:
    """Bits of each page's codes."""
    return jnp.sum(table != 0, axis=-1, dtype=jnp.int32)


def empty(bits: jt.Int[np.ndarray, " pages"], rows: int | None = None) -> Store:
    """Pages of zeros.

    Args:
        bits: of each page, 0 to 8; 0 is a page without elements.
        rows: the budget; where not given, what these bits take.

    Raises:
        ValueError: bits out of range, or more of them than rows.

    >>> store = empty(np.array([2, 5]), rows=9)
    >>> store.bits, store.pool.nbytes
    (Array([2, 5], dtype=int32), 10240)
    """
    bits = np.asarray(bits)
    if bits.ndim != 1 or not np.issubdtype(bits.dtype, np.integer):
        raise ValueError(f"bits are one integer for each page; got {bits!r}")
    if bits.size and not 0 <= bits.min() <= bits.max() <= PLANES:
        raise ValueError(f"a page has 0 to {PLANES} bits; got {bits.min()} to {bits.max()}")
    needed = int(bits.sum())
    rows = needed if rows is None else rows
    if rows < needed:
        raise ValueError(f"these bits take {needed} rows of {ROW} bytes; the budget is {rows}")
    present = np.arange(PLANES)[None, :] < bits[:, None]
    table = np.where(present, np.cumsum(present).reshape(present.shape), 0)
    return Store(jnp.zeros((rows + 1, ROW), jnp.uint8), jnp.asarray(table, jnp.int32))


def read(
    pool: jt.UInt8[jax.Array, "rows width"], table: jt.Int32[jax.Array, "pages planes"]
) -> jt.UInt8[jax.Array, "pages codes"]:
    """The codes of some pages.

    >>> store = empty(np.array([3]))
    >>> codes = jnp.arange(PAGE, dtype=jnp.uint8).reshape(1, PAGE) % jnp.uint8(8)
    >>> bool((read(write(store.pool, store.table, codes), store.table) == codes).all())
    True
    """
    return _transposed(pool[table]).reshape(table.shape[0], PAGE)


def write(
    pool: jt.UInt8[jax.Array, "rows width"],
    table: jt.Int32[jax.Array, "pages planes"],
    codes: jt.UInt8[jax.Array, "pages codes"],
) -> jt.UInt8[jax.Array, "rows width"]:
    """The pool with some pages' codes in it; bits for which a page has no row are dropped."""
    planes = _transposed(codes.reshape(-1, PLANES, ROW)).reshape(-1, ROW)
    rows = jnp.where(table == 0, _NOWHERE, table).ravel()
    return pool.at[rows].set(planes, mode="drop", unique_indices=True)


def _transposed(rows_Px8xW: jax.Array) -> jax.Array:
    """Bit i of byte w in row j becomes bit j of byte w in row i."""
    x = rows_Px8xW
    for shift, mask in ((4, 0x0F), (2, 0x33), (1, 0x55)):
        pairs = x.reshape(x.shape[0], PLANES // (2 * shift), 2, shift, ROW)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        by = jnp.uint8(shift)
        moved = ((low >> by) ^ high) & jnp.uint8(mask)
        x = jnp.stack([low ^ (moved << by), high ^ moved], axis=2).reshape(rows_Px8xW.shape)
    return x


def lowered(
    table: jt.Int32[jax.Array, "pages planes"], bits: jt.Int32[jax.Array, " pages"]
) -> jt.Int32[jax.Array, "pages planes"]:
    """The table once every page has at most so many bits: no row is taken, and some become free."""
    place = jnp.arange(PLANES, dtype=jnp.int32)[None, :]
    return jnp.where(place < bits[:, None], table, 0)


def raised(
    table: jt.Int32[jax.Array, "pages planes"],
    bits: jt.Int32[jax.Array, " pages"],
    rows: int,
) -> jt.Int32[jax.Array, "pages planes"]:
    """The table once every page has at least so many bits, in rows that none owned.

    A page for which too few rows are left keeps what it has, and so do those after it: the budget holds
    whatever is asked for.

    Args:
        table: as `lowered` gives it.
        bits: of each page, at most `PLANES`.
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
    # A page gets all that it wants or nothing, so its rows are counted up to its end.
    served = jnp.cumsum(jnp.sum(wanted, axis=1, dtype=jnp.int32)) <= left
    wanted &= served[:, None]
    order = jnp.cumsum(wanted.ravel(), dtype=jnp.int32).reshape(wanted.shape) - 1
    return jnp.where(wanted, free[jnp.maximum(order, 0)], table)

"""`Codebook`: any sorted values as a grid, and the known ones among them."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np

from jaxquant.formats.base import code_dtype, is_concrete, known_name, rebuild

# Up to so many values a comparison with each is cheaper than a binary search's gathers.
_COMPARE_ALL = 32


@functools.partial(jax.tree_util.register_pytree_node_class)
@dataclasses.dataclass(frozen=True)
class Codebook:
    """Any values in rising order; a code is an index into them.

    A value between two neighbours lies at the fraction t of the way, and t is what is rounded: to
    nearest, a tie takes the smaller one; stochastically, the mean is kept.

    Args:
        values: 2 to 65536 rising numbers, or an array of them (whose order is the caller's to keep where
            it is traced).

    Raises:
        ValueError: values that are not finite and rising, or too few or too many.

    >>> Codebook((-1.0, 0.0, 2.0)).round(jnp.array([-0.6, 0.9, 1.1, 9.0]), jnp.round)
    Array([-1.,  0.,  2.,  2.], dtype=float32)
    """

    values: Sequence[float] | jt.Float[jax.Array, " values"]

    def __post_init__(self):
        if isinstance(self.values, jax.Array):
            if self.values.ndim != 1 or not 2 <= self.values.size <= 2**16:
                raise ValueError(
                    f"Codebook takes one row of 2 to 65536 values; got shape {self.values.shape}"
                )
            if is_concrete(self.values):
                _checked(np.asarray(self.values))
            return
        object.__setattr__(self, "values", _checked(self.values))

    @property
    def _is_static(self) -> bool:
        return isinstance(self.values, tuple)

    @property
    def _table(self) -> jax.Array:
        return jnp.asarray(self.values, jnp.float32)

    @property
    def _size(self) -> int:
        return len(self.values)

    @property
    def bits(self) -> int:
        return (self._size - 1).bit_length()

    @property
    def max_value(self):
        if isinstance(self.values, tuple):
            return max(abs(self.values[0]), abs(self.values[-1]))
        return jnp.maximum(jnp.abs(self.values[0]), jnp.abs(self.values[-1]))

    @property
    def min_value(self):
        return self.values[0]

    @property
    def dtype(self) -> np.dtype:
        if not self._is_static:
            raise ValueError(
                "a Codebook with traced values can be simulated with fake_quant but not stored; "
                "give its values as Python numbers"
            )
        return code_dtype(self.bits)

    def _index(self, x, rounding):
        table, last = self._table, self._size - 2
        if self._size <= _COMPARE_ALL:
            # Summed one by one: elementwise, so that nothing of x's size times the table's is made.
            low = sum((x >= table[i]).astype(jnp.int32) for i in range(1, last + 1))
        else:
            low = jnp.searchsorted(table, x, side="right") - 1
        low = jnp.clip(jnp.asarray(low, jnp.int32), 0, last)
        x = jnp.clip(x, table[0], table[-1])  # or the fraction below might be Inf over Inf
        left, right = _looked_up(table, low), _looked_up(table, low + 1)
        fraction = jnp.clip((x - left) / (right - left), 0, 1)
        return low + rounding(fraction).astype(jnp.int32)

    def round(self, x, rounding):
        return _looked_up(self._table, self._index(x, rounding))

    def store(self, grid):
        return self.encode(grid).astype(self.dtype)

    def load(self, stored):
        return self.decode(stored)

    def encode(self, x):
        """Returns indices of the nearest values; NaN is encoded as the first."""
        codes = self._index(jnp.nan_to_num(x, nan=self.values[0]), jnp.round)
        return codes.astype(code_dtype(self.bits))

    def decode(self, codes):
        """Returns the values at the indices; one beyond the last gives the last."""
        return _looked_up(self._table, jnp.minimum(codes.astype(jnp.int32), self._size - 1))

    def __str__(self):
        return known_name(self) or f"codebook({','.join(map(repr, self.values))})"

    def tree_flatten(self):
        return ((), self.values) if self._is_static else ((self.values,), None)

    @classmethod
    def tree_unflatten(cls, static, traced):
        return rebuild(cls, values=traced[0] if traced else static)


def _checked(values: Any) -> tuple[float, ...]:
    """Returns values as float32, in which they are computed; raises a ValueError if they form no codebook."""
    try:
        with np.errstate(over="ignore"):  # an infinite value is named below
            found = tuple(float(np.float32(v)) for v in values)
    except (TypeError, ValueError):
        raise ValueError(f"Codebook takes rising numbers; got {values!r}") from None
    rising = all(a < b for a, b in itertools.pairwise(found))
    gaps = np.diff(found) if rising else np.zeros(1)
    apart = (gaps >= np.finfo(np.float32).tiny) & (gaps <= np.finfo(np.float32).max)
    if not 2 <= len(found) <= 2**16 or not apart.all():
        raise ValueError(
            "Codebook takes 2 to 65536 finite, rising values whose differences are normal float32 "
            f"numbers; got {values!r}"
        )
    return found


def _looked_up(table: jax.Array, index: jax.Array) -> jax.Array:
    """Returns table[index]; selects small tables bit by bit, which is elementwise, fuses and shards."""
    if len(table) > _COMPARE_ALL:
        return table[index]
    values = [table[i] for i in range(len(table))]
    bit = 0
    while len(values) > 1:
        is_set = (index >> bit) & 1 == 1
        last = [values[-1]] if len(values) % 2 else []
        pairs = zip(values[::2], values[1::2], strict=False)
        values = [jnp.where(is_set, high, low) for low, high in pairs] + last
        bit += 1
    return jnp.broadcast_to(values[0], index.shape)


def dynamic_map(bits: int = 8, signed: bool = True) -> Codebook:
    """Returns the dynamic map: a power of ten per leading zero, linear in between.

    For each i from 0 to e − 1 with e = bits − 1: 10^(i − e + 1) times the midpoints of 2^i (signed) or
    2^(i+1) (unsigned) equal intervals of [0.1, 1], with 0 and 1, and the negatives where signed.

    Args:
        bits: 2 to 8.
        signed: whether negative values are on the map.

    Raises:
        ValueError: other bits.

    Source: Dettmers 2016, arXiv 1511.04561; Dettmers et al. 2022, arXiv 2110.02861, section 1.3, in the
    form that bitsandbytes computes.

    >>> len(dynamic_map(8).values), dynamic_map(4, signed=False).values[:3]
    (256, (0.0, 0.0032500000670552254, 0.00774999987334013))
    """
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"dynamic_map takes 2 to 8 bits; got {bits!r}")
    exponents = bits - 1
    values: list[Any] = [0.0, 1.0]
    for i in range(exponents):
        ends = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        means = 10.0 ** (i - exponents + 1) * (ends[1:] + ends[:-1]) / 2
        values += [*means, *(-means if signed else ())]
    return Codebook(tuple(sorted(values)))


def normal_float(bits: int = 4) -> Codebook:
    """NormalFloat: quantiles of the unit normal, rescaled to [−1, 1], with an exact zero.

    2^(b−1) + 1 quantiles of the positive half and 2^(b−1) of the negative, evenly spaced in
    probability up to 1 − ½ (1/2·(2^b) + 1/2·(2^b − 1)).

    Args:
        bits: b, 2 to 8.

    Source: Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E, whose rounded table `NF4` is.
    """
    from statistics import NormalDist

    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"normal_float takes 2 to 8 bits; got {bits!r}")
    levels, quantile = 2**bits, NormalDist().inv_cdf
    offset = (1 - 1 / (2 * (levels - 1)) + 1 - 1 / (2 * levels)) / 2
    positive = [quantile(p) for p in np.linspace(0.5, offset, levels // 2 + 1)[1:]]
    negative = [-quantile(p) for p in np.linspace(0.5, offset, levels // 2)[1:]]
    top = positive[-1]
    return Codebook(tuple(sorted(v / top for v in (*negative, 0.0, *positive))))

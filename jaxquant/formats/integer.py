"""`Int`: evenly spaced integers, signed and unsigned, with and without a zero."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np

from jaxquant.formats.base import (
    check_int,
    check_scalar,
    code_dtype,
    is_static,
    rebuild,
    traced_message,
)

Levels = Literal["symmetric", "full", "unsigned", "midrise"]

INT_BITS = (1, 16)
_LEVELS = ("symmetric", "full", "unsigned", "midrise")


@functools.partial(jax.tree_util.register_pytree_node_class)
@dataclasses.dataclass(frozen=True)
class Int:
    r"""Integers of b bits, evenly spaced.

    `levels` says which:

    * ``"symmetric"``: {−(2^(b−1) − 1), …, 0, …, 2^(b−1) − 1}.  The most negative two's-complement code
      is left out, so that the grid is symmetric about zero (Jacob et al. 2018, section 3; Kumar et al.
      2024).  Default; needs b ≥ 2, where b = 2 is ternary.
    * ``"full"``: two's complement, {−2^(b−1), …, 2^(b−1) − 1}; needs b ≥ 2, for a value above zero.
    * ``"unsigned"``: {0, …, 2^b − 1}.
    * ``"midrise"``: the odd integers {±1, ±3, …, ±(2^b − 1)}: 2^b levels, symmetric, without a zero
      (Max 1960, "Quantizing for Minimum Distortion"); b = 1 is binary.

    Args:
        bits: b, 1 to 16 as a Python integer, or a scalar array (between whole widths 2^(b−1) is rounded;
            where it is traced, its range is the caller's to keep).
        levels: as above.

    Raises:
        ValueError: a static `bits` that is not an integer from 1 to 16 (2 to 16 where symmetric or full),
            an array out of that range or with axes; unknown `levels`.

    >>> Int(4).max_value, Int(4, "full").min_value, Int(4, "unsigned").max_value
    (7, -8, 15)
    >>> Int(4).round(jnp.array([-9.0, 0.5, 1.5, 3.2]), jnp.round)
    Array([-7.,  0.,  2.,  3.], dtype=float32)
    >>> Int(1, "midrise").round(jnp.array([-9.0, 0.5]), jnp.round)
    Array([-1.,  1.], dtype=float32)
    """

    bits: int | jt.Num[jax.Array, ""]
    levels: Levels = "symmetric"

    def __post_init__(self):
        if self.levels not in _LEVELS:
            raise ValueError(
                f"Int takes levels {', '.join(map(repr, _LEVELS))}; got {self.levels!r}"
            )
        lowest = 2 if self.levels in ("symmetric", "full") else INT_BITS[0]
        owner = f"{'An' if self.levels == 'unsigned' else 'A'} {self.levels} Int"
        if isinstance(self.bits, jax.Array):
            check_scalar(owner, "bits", self.bits, lowest, INT_BITS[1])
        else:
            object.__setattr__(
                self, "bits", check_int(owner, "bits", self.bits, lowest, INT_BITS[1])
            )

    @property
    def _half(self) -> Any:
        """2^(b−1)."""
        if is_static(self.bits):
            return 2 ** (self.bits - 1)
        # exp2 is inexact on some platforms; between whole widths the nearest number of levels stands in.
        return jnp.round(jnp.exp2(jnp.asarray(self.bits, jnp.float32) - 1))

    @property
    def step(self) -> int:
        """The distance between neighbours."""
        return 2 if self.levels == "midrise" else 1

    @property
    def max_value(self):
        return self._half * (1 if self.levels in ("symmetric", "full") else 2) - 1

    @property
    def min_value(self):
        if self.levels == "unsigned":
            return 0
        return -self._half if self.levels == "full" else -self.max_value

    @property
    def dtype(self) -> np.dtype:
        if not is_static(self.bits):
            raise ValueError(traced_message("Int", "bits", self.bits))
        if self.levels == "unsigned":
            return code_dtype(self.bits)  # uint4 arrays do not survive a checkpoint
        if self.bits <= 4:
            return np.dtype(jnp.int4)
        return np.dtype(np.int8 if self.bits <= 8 else np.int16)

    def round(self, x, rounding):
        x = self._odd(x, rounding) if self.levels == "midrise" else rounding(x)
        return jnp.clip(x, self.min_value, self.max_value)

    @staticmethod
    def _odd(x, rounding):
        """Rounds to odd integers by magnitude, so that ties and values near zero are symmetric."""
        return jnp.where(x < 0, -1, 1) * (2 * rounding((jnp.abs(x) - 1) / 2) + 1)

    def store(self, grid):
        if self.levels == "midrise":  # q = 2k + 1 is held as k
            grid = (grid - 1) / 2
        return grid.astype(self.dtype)

    def load(self, stored):
        grid = stored.astype(jnp.float32)
        return 2 * grid + 1 if self.levels == "midrise" else grid

    def encode(self, x):
        """Two's complement in the low b bits; midrise and unsigned codes count from the smallest value.

        NaN is encoded as 0, as in a cast; Inf saturates.
        """
        stored = self.store(self.round(jnp.nan_to_num(x, nan=0.0), jnp.round)).astype(jnp.int32)
        if self.levels == "midrise":
            stored = stored + self._half
        return (stored & (2 * self._half - 1)).astype(code_dtype(self.bits))

    def decode(self, codes):
        """Returns the grid's value of each code; a symmetric grid's left-out code gives −2^(b−1)."""
        codes = codes.astype(jnp.int32)
        if self.levels == "unsigned":
            return codes.astype(jnp.float32)
        if self.levels == "midrise":
            return (2 * codes + 1 - 2 * self._half).astype(jnp.float32)
        return ((codes ^ self._half) - self._half).astype(jnp.float32)  # sign extension

    def __str__(self):
        if self.levels == "unsigned":
            return f"uint{self.bits}"
        return f"int{self.bits}" + ("" if self.levels == "symmetric" else self.levels)

    def tree_flatten(self):
        static = is_static(self.bits)
        return (() if static else (self.bits,)), (self.bits if static else None, self.levels)

    @classmethod
    def tree_unflatten(cls, static, traced):
        bits, levels = static
        return rebuild(cls, bits=traced[0] if traced else bits, levels=levels)

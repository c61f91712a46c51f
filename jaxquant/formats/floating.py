"""`Float`: binary floating point of any exponent and mantissa width, with its conventions as data."""

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
    exp2,
    exponent_of,
    is_concrete,
    is_static,
    known_name,
    rebuild,
    times_exp2,
    traced_message,
)

ConventionName = Literal["ieee", "fn", "fnuz", "finite", "fnu"]


@dataclasses.dataclass(frozen=True)
class Convention:
    """The special codes of a float format: infinities, NaN and negative zero.

    Attributes:
        bias: added to the usual bias 2^(e−1) − 1.
        top_binade: whether the topmost exponent holds numbers.
        missing: how many codes at the very top are no numbers although their binade is.
        signed: whether there is a sign bit.
        negative_zero: whether −0 has a code.
        inf: whether ±Inf have codes.
        nan: where NaN is: within the ``"binade"`` above the numbers, at the ``"top"`` code, in the
            place of the negative ``"zero"``, or nowhere.
    """

    bias: int = 0
    top_binade: bool = True
    missing: int = 0
    signed: bool = True
    negative_zero: bool = True
    inf: bool = False
    nan: Literal["binade", "top", "zero"] | None = None


CONVENTIONS: dict[str, Convention] = {
    "ieee": Convention(top_binade=False, inf=True, nan="binade"),
    "fn": Convention(missing=1, nan="top"),
    "fnuz": Convention(bias=1, negative_zero=False, nan="zero"),
    "finite": Convention(),
    "fnu": Convention(missing=1, signed=False, negative_zero=False, nan="top"),
}

# Array types whose values are exactly the grid of a static Float, by (exponent, mantissa, convention).
_FLOAT_DTYPES = {
    (4, 3, "fn"): jnp.float8_e4m3fn,
    (4, 3, "ieee"): jnp.float8_e4m3,
    (4, 3, "fnuz"): jnp.float8_e4m3fnuz,
    (5, 2, "ieee"): jnp.float8_e5m2,
    (5, 2, "fnuz"): jnp.float8_e5m2fnuz,
    (3, 4, "ieee"): jnp.float8_e3m4,
    (8, 0, "fnu"): jnp.float8_e8m0fnu,
    (5, 10, "ieee"): jnp.float16,
    (8, 7, "ieee"): jnp.bfloat16,
}
_E8M0 = (8, 0, "fnu")


@functools.partial(jax.tree_util.register_pytree_node_class)
@dataclasses.dataclass(frozen=True)
class Float:
    r"""Binary floating point with e exponent bits, m mantissa bits, and subnormals.

    With bias β the grid is {± 2^(E−β) (1 + k/2^m)} ∪ {± 2^(1−β) k/2^m}, 0 ≤ k < 2^m, 1 ≤ E ≤ E_max.
    `convention` says the rest (see `CONVENTIONS`, where it is data):

    ============ ================ ======================================= ==================================
    convention   bias β           which codes are not numbers             examples
    ============ ================ ======================================= ==================================
    ``ieee``     2^(e−1) − 1      the whole top binade: Inf and NaN       float16, bfloat16, E5M2
    ``fn``       2^(e−1) − 1      the topmost code alone: NaN             OCP E4M3 (largest value 448)
    ``fnuz``     2^(e−1)          the code of −0: NaN                     E4M3FNUZ, E5M2FNUZ
    ``finite``   2^(e−1) − 1      none                                    OCP MX's E2M1, E2M3, E3M2
    ``fnu``      2^(e−1) − 1      the topmost: NaN; no sign, no zero      OCP MX's scale E8M0
    ============ ================ ======================================= ==================================

    Rounding saturates: no finite input becomes Inf or NaN.

    Args:
        exponent_bits: e, 2 to 8, or a traced scalar.
        mantissa_bits: m, 1 to 10, or a traced scalar; 0 in E8M0 alone.
        convention: as above; "ieee" where nothing is said.

    Raises:
        ValueError: parameters out of range, or arrays with axes; an unknown convention; 8 exponent bits
            with another convention than "ieee"; "fnu" with other widths than E8M0's.

    Source: IEEE 754-2019 section 3.4; OCP Microscaling Formats v1.0, section 5.3; for FNUZ, Noune et al.
    2022, arXiv 2206.02915.

    >>> Float(4, 3, "fn").max_value, Float(5, 2).max_value, Float(2, 1, "finite").max_value
    (448.0, 57344.0, 6.0)
    >>> Float(2, 1, "finite").round(jnp.array([0.2, 0.3, 2.4, 2.6, 100.0]), jnp.round)
    Array([0. , 0.5, 2. , 3. , 6. ], dtype=float32)
    """

    exponent_bits: int | jt.Num[jax.Array, ""]
    mantissa_bits: int | jt.Num[jax.Array, ""]
    convention: ConventionName = "ieee"

    def __post_init__(self):
        if self.convention not in CONVENTIONS:
            names = ", ".join(map(repr, CONVENTIONS))
            raise ValueError(f"Float takes convention {names}; got {self.convention!r}")
        parameters = (self.exponent_bits, self.mantissa_bits, self.convention)
        if self.convention == "fnu":
            if not self._is_static or parameters != _E8M0:
                raise ValueError(
                    f"Float takes convention 'fnu' as Float(8, 0, 'fnu') only; got {self!r}"
                )
            return
        known = is_static(self.exponent_bits) or is_concrete(self.exponent_bits)
        if self.convention != "ieee" and known and self.exponent_bits == 8:
            raise ValueError(
                "Float takes exponent_bits 8 with convention 'ieee' only, since its values beyond "
                f"float32's cannot be computed with; got convention {self.convention!r}"
            )
        for name, low, high in (("exponent_bits", 2, 8), ("mantissa_bits", 1, 10)):
            value = getattr(self, name)
            if isinstance(value, jax.Array):
                check_scalar("Float", name, value, low, high, whole=True)
            else:
                object.__setattr__(self, name, check_int("Float", name, value, low, high))

    @property
    def _is_static(self) -> bool:
        return is_static(self.exponent_bits) and is_static(self.mantissa_bits)

    @property
    def _rules(self) -> Convention:
        return CONVENTIONS[self.convention]

    @property
    def bits(self):
        return int(self._rules.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def _bias(self) -> Any:
        if is_static(self.exponent_bits):
            return 2 ** (self.exponent_bits - 1) - 1 + self._rules.bias
        one = jnp.int32(1)
        return (one << (jnp.asarray(self.exponent_bits, jnp.int32) - 1)) - 1 + self._rules.bias

    @property
    def _exponents(self) -> tuple[Any, Any]:
        """The exponents of the smallest normal and of the topmost binade that holds numbers."""
        if self.convention == "fnu":
            return -127, 127
        # The topmost field 2^e − 1 stands for 2^e − 1 − β, and 2^e = 2 (β + 1 − shift).
        top = self._bias + 1 - 2 * self._rules.bias
        return 1 - self._bias, top - (0 if self._rules.top_binade else 1)

    @property
    def max_value(self):
        _, top = self._exponents
        if self.convention == "fnu":
            return 2.0**top
        missing = 1 + self._rules.missing  # steps below the next binade's start
        if self._is_static:
            return float(2.0**top * (2 - missing * 2.0**-self.mantissa_bits))
        mantissa = jnp.asarray(self.mantissa_bits, jnp.int32)
        return exp2(jnp.asarray(top)) * (2 - missing * exp2(-mantissa))

    @property
    def min_value(self):
        return -self.max_value if self._rules.signed else 2.0 ** self._exponents[0]

    @property
    def _code_dtype(self) -> np.dtype:
        if not self._is_static:
            names, values = (
                "exponent_bits and mantissa_bits",
                (self.exponent_bits, self.mantissa_bits),
            )
            raise ValueError(traced_message("Float", names, values))
        return code_dtype(self.bits)

    @property
    def _key(self) -> Any:
        return (self.exponent_bits, self.mantissa_bits, self.convention)

    @property
    def dtype(self) -> np.dtype:
        """The float type with this grid where JAX has one, else unsigned integers that hold the codes."""
        codes = self._code_dtype
        return np.dtype(_FLOAT_DTYPES.get(self._key, codes))

    def round(self, x, rounding):
        lowest, _ = self._exponents
        # Scaled by 2^shift, the step between neighbours of x is 1; below the smallest normal the step
        # stays as it is there.
        shift = jnp.asarray(self.mantissa_bits, jnp.int32) - jnp.maximum(exponent_of(x), lowest)
        rounded = times_exp2(rounding(times_exp2(x, shift)), -shift)
        return jnp.clip(rounded, self.min_value, self.max_value)

    def store(self, grid):
        if self.dtype == self._code_dtype:
            return self.encode(grid)
        stored = grid.astype(self.dtype)
        if self.convention != "fnu":
            return stored
        # 2^−127 is subnormal in float32, and may have been flushed; a cast of zero gives NaN.
        smallest = jax.lax.bitcast_convert_type(jnp.uint8(0), self.dtype)
        return jnp.where(grid < jnp.finfo(jnp.float32).tiny, smallest, stored)

    def load(self, stored):
        if self.dtype == self._code_dtype:
            return self.decode(stored)
        return stored.astype(jnp.float32)

    def encode(self, x):
        """Codes: sign, exponent and mantissa from the top, of the nearest value, ties to even.

        Finite values beyond the largest saturate.  ±Inf becomes Inf where the convention has it, else
        NaN where it has that, else the largest value.  NaN becomes the quiet NaN; "finite" has none
        and gives −0, whatever the NaN's sign.  Where there is no −0 it becomes 0.  E8M0, which
        has neither sign nor zero, gives NaN for what is not positive, and ties go up.
        """
        rules, mantissa, lowest = self._rules, self.mantissa_bits, self._exponents[0]
        dtype = self._code_dtype
        if self.convention == "fnu":
            # Read as integers, since subnormal inputs may be flushed: from 1.5 on the mantissa's first
            # bit carries into the exponent; below 2^−126 steps are linear and 0.75 · 2^−126 is halfway.
            bits = jnp.minimum(jax.lax.bitcast_convert_type(x, jnp.int32), 255 << 23)
            field = jnp.where(
                bits < 1 << 23, (bits >= 3 << 21).astype(jnp.int32), (bits + (1 << 22)) >> 23
            )
            positive = (bits > 0) & (bits < 255 << 23)
            return jnp.where(positive, jnp.minimum(field, 254), 255).astype(dtype)
        grid = jnp.abs(self.round(x, jnp.round))
        exponent = jnp.maximum(exponent_of(grid), lowest)
        # Counting in steps of the binade: a normal value's implicit bit is the binade's own count.
        steps = times_exp2(grid, mantissa - exponent).astype(jnp.int32)
        code = ((exponent - lowest) << mantissa) + steps
        above = ((2**self.exponent_bits - 1) << mantissa) if self._is_static else 0
        code = self._specials(x, code, above)
        negative = jnp.signbit(x) if rules.negative_zero else jnp.signbit(x) & (code != 0)
        sign = negative.astype(jnp.int32) << (self.exponent_bits + mantissa)
        if rules.nan is None:
            sign = jnp.where(jnp.isnan(x), 1 << (self.exponent_bits + mantissa), sign)
        if rules.nan == "zero":
            not_a_number = jnp.isnan(x) | jnp.isinf(x)
            return jnp.where(
                not_a_number, 1 << (self.exponent_bits + mantissa), code | sign
            ).astype(dtype)
        return (code | sign).astype(dtype)

    def _specials(self, x, code, above):
        """Returns the magnitude's code with those of Inf and NaN; `above` is the top binade's first code."""
        rules, mantissa = self._rules, self.mantissa_bits
        if rules.nan == "binade":
            code = jnp.where(jnp.isinf(x), above, code)
            return jnp.where(jnp.isnan(x), above + (1 << (mantissa - 1)), code)
        if rules.nan == "top":
            return jnp.where(jnp.isfinite(x), code, above + (1 << mantissa) - 1)
        return jnp.where(jnp.isnan(x), 0, code)

    def decode(self, codes):
        """Returns the float32 values of codes, exactly; Inf and NaN where the convention has them.

        Values below float32's normal range become zero on hardware that flushes subnormals.
        """
        rules, mantissa, lowest = self._rules, self.mantissa_bits, self._exponents[0]
        codes = codes.astype(jnp.int32)
        if self.convention == "fnu":
            # 2^−127 is subnormal in float32: its bits are written, not computed.
            bits = jnp.where(codes == 0, 1 << 22, codes << 23)
            return jnp.where(codes == 255, jnp.nan, jax.lax.bitcast_convert_type(bits, jnp.float32))
        width = self.exponent_bits + mantissa
        magnitude, negative = codes & ((1 << width) - 1), (codes >> width) & 1
        field, fraction = magnitude >> mantissa, magnitude & ((1 << mantissa) - 1)
        steps = fraction + jnp.where(field > 0, 1 << mantissa, 0)
        exponent = lowest + jnp.maximum(field, 1) - 1 - mantissa
        value = times_exp2(steps.astype(jnp.float32), exponent)
        top = (1 << self.exponent_bits) - 1
        if rules.nan == "binade":
            special = jnp.where(fraction == 0, jnp.inf, jnp.nan)
            value = jnp.where(field == top, special, value)
        elif rules.nan == "top":
            value = jnp.where(magnitude == (1 << width) - 1, jnp.nan, value)
        value = jnp.where(negative == 1, -value, value)
        if rules.nan == "zero":
            value = jnp.where(codes == 1 << width, jnp.nan, value)
        return value

    def __str__(self):
        suffix = "" if self.convention == "ieee" else self.convention
        return known_name(self) or f"e{self.exponent_bits}m{self.mantissa_bits}{suffix}"

    def tree_flatten(self):
        parameters = (self.exponent_bits, self.mantissa_bits)
        static = tuple(p if is_static(p) else None for p in parameters)
        return tuple(p for p in parameters if not is_static(p)), (static, self.convention)

    @classmethod
    def tree_unflatten(cls, static, traced):
        (parameters, convention), leaves = static, iter(traced)
        exponent, mantissa = (next(leaves) if p is None else p for p in parameters)
        return rebuild(cls, exponent_bits=exponent, mantissa_bits=mantissa, convention=convention)

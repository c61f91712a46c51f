"""Number formats as grids: the values that a format can represent, and nothing about where they are used.

A format is a frozen pytree.  Its precision is *data*: parameters given as Python numbers are static,
and such a format can be stored; parameters given as arrays are traced, one compiled program serves
all their values, and such a format can only be simulated.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np

Reserved = Literal["ieee", "nan", "none"]

INT_BITS = (2, 16)


@runtime_checkable
class Format(Protocol):
    """What a quantizer needs to know of a grid."""

    @property
    def max_value(self) -> float | jt.Float[jax.Array, ""]:
        """The largest value on the grid; the calibrated range is mapped onto it."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """The array type whose values hold the grid exactly; ValueError where there is none."""
        ...

    def round(
        self, x: jt.Float[jax.Array, "*shape"], rounding: Callable[[jax.Array], jax.Array]
    ) -> jt.Float[jax.Array, "*shape"]:
        """Takes float32 values to the grid, saturating at ±max_value."""
        ...


def is_static(parameter: Any) -> bool:
    """Whether a format's parameter is a Python number, known when a program is traced."""
    return isinstance(parameter, int | np.integer)


def _check_int(owner: str, name: str, value: Any, lowest: int, highest: int) -> int:
    """Returns `value` as an int in [lowest, highest], or raises a ValueError that says what is valid."""
    valid = f"{owner} takes {name} from {lowest} to {highest} as an integer (or a traced array)"
    if isinstance(value, bool):
        raise ValueError(f"{valid}; got {value!r}")
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{valid}; got {value!r}") from None
    if not lowest <= value <= highest:
        raise ValueError(f"{valid}; got {value!r}")
    return value


def _check_scalar(owner: str, name: str, value: jax.Array) -> None:
    if value.ndim or value.dtype == bool:
        raise ValueError(
            f"{owner} takes one traced {name}, a scalar number; got {value.dtype}{list(value.shape)}"
        )


def _rebuild(cls: type, **fields: Any) -> Any:
    """An instance without checks: tree transformations put batches and placeholders where arrays stood."""
    instance = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(instance, name, value)
    return instance


@functools.partial(jax.tree_util.register_pytree_node_class)
@dataclasses.dataclass(frozen=True)
class Int:
    r"""Signed integers on a symmetric grid: {−(2^(b−1) − 1), …, −1, 0, 1, …, 2^(b−1) − 1}.

    The most negative two's-complement code is left out, so that the grid is symmetric about zero
    (as in Kumar et al. 2024 and Jacob et al. 2018, section 3).

    Args:
        bits: b, 2 to 16 as a Python integer, or a traced scalar (its range is then the caller's to keep;
            between whole widths 2^(b−1) is rounded).

    Raises:
        ValueError: a static `bits` that is not an integer from 2 to 16, or a traced one with axes.

    >>> Int(4).max_value
    7
    >>> Int(4).round(jnp.array([-9.0, 0.5, 1.5, 3.2]), jnp.round)
    Array([-7.,  0.,  2.,  3.], dtype=float32)
    """

    bits: int | jt.Num[jax.Array, ""]

    def __post_init__(self):
        if isinstance(self.bits, jax.Array):
            _check_scalar("Int", "bits", self.bits)
        else:
            object.__setattr__(self, "bits", _check_int("Int", "bits", self.bits, *INT_BITS))

    @property
    def max_value(self):
        if is_static(self.bits):
            return 2 ** (self.bits - 1) - 1
        # exp2 is inexact on some platforms; between whole widths the nearest number of levels stands in.
        return jnp.round(jnp.exp2(jnp.asarray(self.bits, jnp.float32) - 1)) - 1

    @property
    def dtype(self) -> np.dtype:
        if not is_static(self.bits):
            raise ValueError(_traced_message("Int", "bits", self.bits))
        return np.dtype(np.int8 if self.bits <= 8 else np.int16)

    def round(self, x, rounding):
        return jnp.clip(rounding(x), -self.max_value, self.max_value)

    def __str__(self):
        return f"int{self.bits}"

    def tree_flatten(self):
        return ((), (self.bits,)) if is_static(self.bits) else ((self.bits,), ())

    @classmethod
    def tree_unflatten(cls, static, traced):
        (bits,) = (*static, *traced)
        return _rebuild(cls, bits=bits)


# Array types whose values are exactly the grid of a static Float, by (exponent, mantissa, reserved).
_FLOAT_DTYPES = {
    (4, 3, "nan"): jnp.float8_e4m3fn,
    (4, 3, "ieee"): jnp.float8_e4m3,
    (5, 2, "ieee"): jnp.float8_e5m2,
    (3, 4, "ieee"): jnp.float8_e3m4,
    (5, 10, "ieee"): jnp.float16,
    (8, 7, "ieee"): jnp.bfloat16,
}


@functools.partial(jax.tree_util.register_pytree_node_class)
@dataclasses.dataclass(frozen=True)
class Float:
    r"""Binary floating point with a sign, e exponent bits, m mantissa bits, and subnormals.

    With bias β = 2^(e−1) − 1 the grid is {± 2^(E−β) (1 + k/2^m)} ∪ {± 2^(1−β) k/2^m}, 0 ≤ k < 2^m,
    1 ≤ E ≤ E_max.  `reserved` says which of the topmost codes are not numbers:

    * ``"ieee"``: the whole top binade is Inf and NaN (IEEE 754; float16, bfloat16, E5M2).  Default.
    * ``"nan"``: the topmost code alone is NaN (OCP E4M3: largest value 448).
    * ``"none"``: every code is a number (OCP MX's E2M1, E2M3, E3M2).

    Rounding saturates: no finite input becomes Inf or NaN.

    Args:
        exponent_bits: e, 2 to 8, or a traced scalar.
        mantissa_bits: m, 1 to 10, or a traced scalar.
        reserved: as above.

    Raises:
        ValueError: parameters out of range, or traced with axes; an unknown `reserved`; 8 exponent bits
            with another `reserved` than "ieee".

    Source: IEEE 754-2019 section 3.4; OCP Microscaling Formats v1.0, section 5.3.

    >>> Float(4, 3, "nan").max_value, Float(5, 2).max_value, Float(2, 1, "none").max_value
    (448.0, 57344.0, 6.0)
    >>> E2M1.round(jnp.array([0.2, 0.3, 2.4, 2.6, 100.0]), jnp.round)
    Array([0. , 0.5, 2. , 3. , 6. ], dtype=float32)
    """

    exponent_bits: int | jt.Num[jax.Array, ""]
    mantissa_bits: int | jt.Num[jax.Array, ""]
    reserved: Reserved = "ieee"

    def __post_init__(self):
        if self.reserved not in ("ieee", "nan", "none"):
            raise ValueError(f"Float takes reserved 'ieee', 'nan' or 'none'; got {self.reserved!r}")
        if self.reserved != "ieee" and is_static(self.exponent_bits) and self.exponent_bits == 8:
            raise ValueError(
                "Float takes exponent_bits 8 with reserved 'ieee' only, since its values beyond float32's "
                f"cannot be computed with; got reserved {self.reserved!r}"
            )
        for name, low, high in (("exponent_bits", 2, 8), ("mantissa_bits", 1, 10)):
            value = getattr(self, name)
            if isinstance(value, jax.Array):
                _check_scalar("Float", name, value)
            else:
                object.__setattr__(self, name, _check_int("Float", name, value, low, high))

    @property
    def _is_static(self) -> bool:
        return is_static(self.exponent_bits) and is_static(self.mantissa_bits)

    @property
    def _exponents(self) -> tuple[Any, Any]:
        """The exponents of the smallest normal and of the topmost binade that holds numbers."""
        one = 1 if is_static(self.exponent_bits) else jnp.int32(1)
        bias = (
            2 ** (self.exponent_bits - 1) - 1
            if is_static(self.exponent_bits)
            else ((one << (jnp.asarray(self.exponent_bits, jnp.int32) - 1)) - 1)
        )
        return 1 - bias, bias + (0 if self.reserved == "ieee" else 1)

    @property
    def max_value(self):
        _, top = self._exponents
        missing = 2 if self.reserved == "nan" else 1  # steps below the next binade's start
        if self._is_static:
            return float(2.0**top * (2 - missing * 2.0**-self.mantissa_bits))
        mantissa = jnp.asarray(self.mantissa_bits, jnp.int32)
        return _exp2(jnp.asarray(top)) * (2 - missing * _exp2(-mantissa))

    @property
    def dtype(self) -> np.dtype:
        if not self._is_static:
            raise ValueError(
                _traced_message(
                    "Float",
                    "exponent_bits and mantissa_bits",
                    (self.exponent_bits, self.mantissa_bits),
                )
            )
        key: Any = (self.exponent_bits, self.mantissa_bits, self.reserved)
        if key not in _FLOAT_DTYPES:
            names = ", ".join(f"Float({e}, {m}, {r!r})" for e, m, r in _FLOAT_DTYPES)
            raise ValueError(
                f"{self!r} has no array type to be stored in; storable are {names}. "
                "fake_quant simulates every Float."
            )
        return np.dtype(_FLOAT_DTYPES[key])

    def round(self, x, rounding):
        lowest, _ = self._exponents
        # Scaled by 2^shift, the step between neighbours of x is 1; below the smallest normal the step
        # stays as it is there.
        shift = jnp.asarray(self.mantissa_bits, jnp.int32) - jnp.maximum(_exponent(x), lowest)
        rounded = _times_exp2(rounding(_times_exp2(x, shift)), -shift)
        return jnp.clip(rounded, -self.max_value, self.max_value)

    def __str__(self):
        suffix = {"ieee": "", "nan": "fn", "none": "finite"}[self.reserved]
        return f"e{self.exponent_bits}m{self.mantissa_bits}{suffix}"

    def tree_flatten(self):
        parameters = (self.exponent_bits, self.mantissa_bits)
        static = tuple(p if is_static(p) else None for p in parameters)
        return tuple(p for p in parameters if not is_static(p)), (static, self.reserved)

    @classmethod
    def tree_unflatten(cls, static, traced):
        (parameters, reserved), leaves = static, iter(traced)
        exponent, mantissa = (next(leaves) if p is None else p for p in parameters)
        return _rebuild(cls, exponent_bits=exponent, mantissa_bits=mantissa, reserved=reserved)


def _exp2(exponent: jax.Array) -> jax.Array:
    """2^exponent exactly, for −126 ≤ exponent ≤ 127: written into the float's own exponent field."""
    return jax.lax.bitcast_convert_type((jnp.int32(127) + exponent) << 23, jnp.float32)


def _times_exp2(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x · 2^exponent for |exponent| ≤ 252, in two exact factors: one alone might not be a float32."""
    half = exponent // 2
    return x * _exp2(half) * _exp2(exponent - half)


def _exponent(x: jax.Array) -> jax.Array:
    """floor(log2 |x|) of normal float32 values, read from the exponent field; −127 for 0 and subnormals."""
    return ((jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF) - 127


def _traced_message(owner: str, names: str, value: Any) -> str:
    return (
        f"{owner} with traced {names} ({value}) can be simulated with fake_quant but not stored: "
        f"a stored array's type is fixed when the program is traced. Give {names} as Python integers."
    )


INT4, INT8 = Int(4), Int(8)
E2M1, E4M3, E5M2 = Float(2, 1, "none"), Float(4, 3, "nan"), Float(5, 2)
FP16, BF16 = Float(5, 10), Float(8, 7)

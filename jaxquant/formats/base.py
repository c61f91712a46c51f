"""The protocol that all formats share, and exact powers of two."""

import operator
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np
from jax.core import Tracer


class Format(Protocol):
    """A grid of values, with a code of `bits` bits for each."""

    @property
    def min_value(self) -> float | jt.Float[jax.Array, ""]:
        """The smallest value on the grid."""
        ...

    @property
    def max_value(self) -> float | jt.Float[jax.Array, ""]:
        """The grid value onto which a calibrated range is mapped: the largest, or a Codebook's longer end.

        What a grid has less of on the other side is clipped: of Codebook((-3.0, 0.0, 1.0)) all above a
        third of the range.
        """
        ...

    @property
    def bits(self) -> Any:
        """Bits of a code."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """The array type that holds the grid exactly; ValueError where there is none."""
        ...

    def round(
        self, x: jt.Float[jax.Array, "*shape"], rounding: Callable[[jax.Array], jax.Array]
    ) -> jt.Float[jax.Array, "*shape"]:
        """Rounds float32 values to the grid; saturates at its ends."""
        ...

    def store(self, grid: jt.Float[jax.Array, "*shape"]) -> jt.Shaped[jax.Array, "*shape"]:
        """Returns grid values as an array of `dtype`."""
        ...

    def load(self, stored: jt.Shaped[jax.Array, "*shape"]) -> jt.Float[jax.Array, "*shape"]:
        """Returns the float32 grid values of what `store` gave."""
        ...

    def encode(self, x: jt.Float[jax.Array, "*shape"]) -> jt.UInt[jax.Array, "*shape"]:
        """Returns the codes of float32 values, rounded to nearest."""
        ...

    def decode(self, codes: jt.UInt[jax.Array, "*shape"]) -> jt.Float[jax.Array, "*shape"]:
        """Returns the float32 values of codes."""
        ...


# Usual names of formats with many parameters, filled in by `names`: what `str` gives and `parse` takes.
KNOWN: dict[Any, str] = {}


def known_name(format: Any) -> str | None:
    """Returns the usual name of a static format, None where it has none."""
    try:
        return KNOWN.get(format)
    except TypeError:  # traced parameters have no hash
        return None


def is_format(value: Any) -> bool:
    """Returns whether a value is a grid; asked of its type, since a traced format's dtype is an error."""
    names = ("min_value", "max_value", "dtype", "round", "store", "load", "encode", "decode")
    return all(hasattr(type(value), name) for name in names)


def is_static(parameter: Any) -> bool:
    """Returns whether a format's parameter is a Python number, known when a program is traced."""
    return isinstance(parameter, int | np.integer)


def is_concrete(value: Any) -> bool:
    """Returns whether an array's numbers are known here, as they are outside of a traced function."""
    is_array = isinstance(value, jax.Array) and not isinstance(value, Tracer)
    return is_array and value.is_fully_addressable


def check_int(owner: str, name: str, value: Any, lowest: int, highest: int) -> int:
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


def check_scalar(
    owner: str, name: str, value: jax.Array, lowest: int, highest: int, whole: bool = False
) -> None:
    """Raises a ValueError where an array given as a parameter has axes or is no number within bounds.

    What is traced has no number yet, and its bounds are the caller's to keep.
    """
    if value.ndim or value.dtype == bool:
        raise ValueError(
            f"{owner} takes one traced {name}, a scalar number; got {value.dtype}{list(value.shape)}"
        )
    if not is_concrete(value):
        return
    number = float(value)
    if not lowest <= number <= highest or (whole and not number.is_integer()):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{owner} takes {name} from {lowest} to {highest}, {kind}; got {value!r}")


def rebuild(cls: type, **fields: Any) -> Any:
    """Returns an instance without checks: tree transformations replace arrays by batches and placeholders."""
    instance = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(instance, name, value)
    return instance


def traced_message(owner: str, names: str, value: Any) -> str:
    """Returns the error message for storing a format with traced parameters."""
    return (
        f"{owner} with traced {names} ({value}) can be simulated with fake_quant but not stored: "
        f"a stored array's type is fixed when the program is traced. Give {names} as Python integers."
    )


def code_dtype(bits: Any) -> np.dtype:
    """Returns the unsigned integers that hold codes of so many bits."""
    return np.dtype(np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32)


def divide(x: jax.Array, divisor: Any) -> jax.Array:
    """Returns x / divisor, correctly rounded in every program.

    Where a divisor is broadcast, XLA multiplies by its reciprocal, and whether it is broadcast depends on
    the program around (vmap and sharding included): the same tensor would get other scales.  So the
    divisor takes x's own shape, behind a barrier that keeps the compiler from seeing that it is constant.
    """
    return x / barrier_off_gpu(jnp.where(jnp.isnan(x), x, jnp.asarray(divisor, x.dtype)))


def barrier_off_gpu(x: jax.Array) -> jax.Array:
    """Returns x behind a barrier; on GPUs, where it would be a kernel and change nothing, as it is."""
    return jax.lax.platform_dependent(x, cuda=unchanged, default=jax.lax.optimization_barrier)


def unchanged(x: jax.Array) -> jax.Array:
    """Returns x."""
    return x


def in_float32(x: jax.Array) -> jax.Array:
    """Returns x in float32, a finite value beyond its range as the largest."""
    top = float(jnp.finfo(jnp.float32).max)
    if float(jnp.finfo(x.dtype).max) <= top:
        return x.astype(jnp.float32)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -top, top), x).astype(jnp.float32)


def exp2(exponent: jax.Array) -> jax.Array:
    """Returns 2^exponent exactly, for −126 ≤ exponent ≤ 127: written into the float's own exponent field."""
    return jax.lax.bitcast_convert_type((jnp.int32(127) + exponent) << 23, jnp.float32)


def times_exp2(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """Returns x · 2^exponent for |exponent| ≤ 252, in two exact factors: one alone might not be a float32."""
    half = exponent // 2
    return x * exp2(half) * exp2(exponent - half)


def exponent_of(x: jax.Array) -> jax.Array:
    """Returns floor(log2 |x|) of normal float32 values from their bits; −127 for 0 and subnormals."""
    return ((jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF) - 127

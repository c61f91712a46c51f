"""Three verbs on one noun: `quantize` gives a `QArray`, `dequantize` takes one back, `fake_quant` is both.

For each group of elements that share a scale s (a tensor, a channel, a block):

    s = calibration(x) / format.max_value,    q = format.round(x / s),    x̂ = s · q

computed in float32.  A group that holds a NaN or an Inf has no scale and decodes to NaN as a whole.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np

from jaxquant import calibration as calibrations
from jaxquant import rounding as roundings
from jaxquant.formats import Format

Granularity = Literal["tensor", "channel"] | int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How one tensor is quantized: the grid, what shares a scale, how its range is found, how it rounds.

    A pytree whose only leaves are the format's traced parameters, so a Quantizer is an argument of a
    jitted function like any array.

    Args:
        format: the grid.
        granularity: what shares one scale: ``"tensor"``, everything; ``"channel"``, what is summed
            over together (the contracting axes); a block size, that many neighbours along the
            contracting axis.
        calibration: from (x, axes) to the range; see `jaxquant.calibration`.
        rounding: from (x, key) to integers; see `jaxquant.rounding`.

    Raises:
        ValueError: an argument of the wrong kind.

    >>> from jaxquant.formats import Int
    >>> Quantizer(Int(4), "channel").granularity
    'channel'
    """

    format: Format
    granularity: Granularity = dataclasses.field(default="tensor", metadata={"static": True})
    calibration: calibrations.Calibration = dataclasses.field(
        default=calibrations.absmax, metadata={"static": True}
    )
    rounding: Callable[..., jax.Array] = dataclasses.field(
        default=roundings.nearest, metadata={"static": True}
    )

    def __post_init__(self):
        size = self.granularity
        if not isinstance(size, str) or size not in ("tensor", "channel"):
            if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1:
                raise ValueError(
                    f"granularity is 'tensor', 'channel' or a block size of at least 1; got {size!r}"
                )
            object.__setattr__(self, "granularity", int(size))
        for name in ("calibration", "rounding"):
            if not callable(getattr(self, name)):
                raise ValueError(
                    f"{name} is a function, as in jaxquant.{name}; got {getattr(self, name)!r}"
                )
        is_grid = all(hasattr(type(self.format), name) for name in ("max_value", "dtype", "round"))
        if not is_grid:
            raise ValueError(f"format is a grid such as Int(4); got {self.format!r}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """A quantized array: values on the grid and their scales.

    Attributes:
        qvalue: the grid's values in the format's storage type, in the array's shape.
        scale: float32; of the array's rank, each dimension dividing the array's.
        dtype: the type that `dequantize` returns.
    """

    qvalue: jt.Shaped[jax.Array, "*shape"]
    scale: jt.Float[jax.Array, "*groups"]
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        return self.qvalue.ndim

    @property
    def nbytes(self) -> int:
        """Bytes that are really held, scales included."""
        return self.qvalue.nbytes + self.scale.nbytes

    @property
    def bits_per_element(self) -> float:
        """8 · nbytes / number of elements.

        >>> from jaxquant.formats import INT8
        >>> quantize(jnp.ones((64, 64)), Quantizer(INT8, 32)).bits_per_element
        9.0
        """
        return 8 * self.nbytes / max(1, self.qvalue.size)


def scale_shape(
    shape: tuple[int, ...], granularity: Granularity, axis: int | Sequence[int]
) -> tuple[int, ...]:
    """The shape of an array's scales: one entry per group along each axis.

    Args:
        shape: the array's.
        granularity: as in `Quantizer`.
        axis: the contracting axis or axes, negative ones counted from the end.

    Raises:
        ValueError: an axis that the array lacks; a block size that does not divide its axis, or that
            is asked for with several contracting axes.

    >>> scale_shape((8, 64), "channel", 1), scale_shape((8, 64), 16, 1)
    ((8, 1), (8, 4))
    """
    if not shape and isinstance(granularity, str):
        return ()  # a scalar has no axes and one scale
    try:
        axes = [operator.index(a) for a in (axis if isinstance(axis, Sequence) else (axis,))]
    except TypeError:
        raise ValueError(f"axis is an integer or a tuple of integers; got {axis!r}") from None
    for a in axes:
        if not -len(shape) <= a < len(shape):
            raise ValueError(f"axis {a} is not an axis of an array of shape {shape}")
    axes = {a % len(shape) for a in axes}
    if granularity == "tensor":
        return (1,) * len(shape)
    if granularity == "channel":
        return tuple(1 if a in axes else n for a, n in enumerate(shape))
    if len(axes) != 1:
        raise ValueError(
            f"granularity {granularity} (a block size) needs one contracting axis; got {len(axes)}"
        )
    (a,) = axes
    if shape[a] % granularity:
        raise ValueError(
            f"granularity {granularity} does not divide axis {a} of shape {shape}: "
            f"{shape[a]} elements are not a whole number of blocks"
        )
    return (*shape[:a], shape[a] // granularity, *shape[a + 1 :])


def _grouped(x: jax.Array, groups: tuple[int, ...]) -> jax.Array:
    """Views each axis n as (groups, n / groups); the odd axes of the view lie within a group."""
    return x.reshape([d for n, g in zip(x.shape, groups, strict=True) for d in (g, n // max(g, 1))])


def _per_group(scale: jax.Array) -> jax.Array:
    """Views scales so that they broadcast against `_grouped`'s view."""
    return scale.reshape([d for g in scale.shape for d in (g, 1)])


def _to_grid(
    x: jax.Array, quantizer: Quantizer, axis: int | Sequence[int], key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The waist of the library: float32 (grid values, scales), both in `_grouped`'s view of x."""
    if not jnp.issubdtype(getattr(x, "dtype", type(None)), jnp.floating):
        kind = getattr(x, "dtype", type(x).__name__)
        raise ValueError(f"only floating-point arrays can be quantized; got {kind}")
    if not isinstance(quantizer, Quantizer):
        raise ValueError(f"quantizer is a Quantizer, as in Quantizer(Int(8)); got {quantizer!r}")
    view = _grouped(x.astype(jnp.float32), scale_shape(x.shape, quantizer.granularity, axis))
    # Behind the barrier the divisor is no constant, which XLA would replace by an inexact reciprocal
    # in some programs and not in others: the same tensor has the same scale everywhere.
    max_value = jax.lax.optimization_barrier(jnp.float32(quantizer.format.max_value))
    scale = quantizer.calibration(view, tuple(range(1, view.ndim, 2))) / max_value
    # A group of zeros, or of values whose scale would be subnormal (flushed on most hardware), gets
    # scale 1: its elements round to zero instead of dividing by it.  A scale of NaN stays.
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1, scale)
    return quantizer.format.round(view / scale, lambda v: quantizer.rounding(v, key)), scale


def quantize(
    x: jt.Float[jax.Array, "*shape"],
    quantizer: Quantizer,
    axis: int | Sequence[int] = -1,
    key: jax.Array | None = None,
) -> QArray:
    """Lays an array onto a grid and stores it: q = format.round(x / s) in the format's array type.

    Args:
        x: values, floating point.
        quantizer: how; its format must be static.
        axis: the contracting axis or axes, along which the product that follows will sum.
        key: PRNG key, for a rounding that needs one.

    Raises:
        ValueError: x is not floating point; traced precision or a format without an array type;
            a granularity that does not fit x's shape and `axis`; a missing key.

    >>> from jaxquant.formats import INT8
    >>> quantize(jnp.array([[0.5, -1.0], [20.0, 10.0]]), Quantizer(INT8, "channel")).qvalue
    Array([[  64, -127],
           [ 127,   64]], dtype=int8)
    """
    if not isinstance(quantizer, Quantizer):
        raise ValueError(f"quantizer is a Quantizer, as in Quantizer(Int(8)); got {quantizer!r}")
    storage = quantizer.format.dtype
    grid, scale = _to_grid(x, quantizer, axis, key)
    qvalue = grid.reshape(x.shape).astype(storage)
    return QArray(qvalue, scale.reshape(scale.shape[::2]), np.dtype(x.dtype))


def dequantize(qarray: QArray) -> jt.Float[jax.Array, "*shape"]:
    """The values that a QArray stands for: x̂ = s · q, computed in float32, in the original type.

    >>> from jaxquant.formats import Int
    >>> dequantize(quantize(jnp.array([0.2, -1.4, 7.0]), Quantizer(Int(4))))
    Array([ 0., -1.,  7.], dtype=float32)
    """
    if not isinstance(qarray, QArray):
        raise ValueError(
            f"dequantize takes a QArray, as quantize gives it; got {type(qarray).__name__}"
        )
    view = _grouped(qarray.qvalue.astype(jnp.float32), qarray.scale.shape)
    return (view * _per_group(qarray.scale)).reshape(qarray.shape).astype(qarray.dtype)


def fake_quant(
    x: jt.Float[jax.Array, "*shape"],
    quantizer: Quantizer,
    axis: int | Sequence[int] = -1,
    key: jax.Array | None = None,
) -> jt.Float[jax.Array, "*shape"]:
    """Simulates storage: dequantize(quantize(x)) exactly, at any precision, with x's gradient.

    The gradient is straight-through: ∂x̂/∂x = 1 (absmax clips nothing), none to the scale.

    Args:
        x: values, floating point.
        quantizer: how; its format may be traced, so that one program serves every precision.
        axis: the contracting axis or axes, along which the product that follows will sum.
        key: PRNG key, for a rounding that needs one.

    Raises:
        ValueError: as `quantize`, except that any precision is taken.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.

    >>> from jaxquant.formats import Int
    >>> at = jax.jit(lambda bits: fake_quant(jnp.array([2.0, -4.0, 21.0]), Quantizer(Int(bits))))
    >>> at(4), at(3)  # one compilation
    (Array([ 3., -3., 21.], dtype=float32), Array([ 0., -7., 21.], dtype=float32))
    """
    grid, scale = _to_grid(jax.lax.stop_gradient(x), quantizer, axis, key)
    return roundings.straight_through(x, (grid * scale).reshape(x.shape).astype(x.dtype))

"""`quantize` returns a `QArray`, `dequantize` inverts it, and `fake_quant` does both.

For each group of elements that share a scale s (a tensor, a channel, a block, a tile):

    s = r / format.max_value,    q = format.round(x · (1/s)),    x̂ = s · q

with the range r by calibration, computed in float32.  With an asymmetric range [l, h] there is a zero
point too:  s = (h − l) / (max − min),  z = round(min − l / s),  q = format.round(x / s + z),
x̂ = s · (q − z).  A group that contains a NaN or an Inf, or whose given range is negative, decodes to NaN.
A group of zeros has the scale 0 and decodes to zeros, also on a grid without a zero.

Values beyond float32 saturate: a float64 value is rounded to float32, and to the largest if it is larger.
Hardware may flush values below the smallest normal one to zero.  Inf and NaN are kept.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np
from jax.sharding import PartitionSpec

from jaxquant.formats import Block, Codebook, Format, in_float32
from jaxquant.numerics import calibration as calibrations
from jaxquant.numerics import estimators
from jaxquant.numerics import rounding as roundings
from jaxquant.numerics.eden import correct_scales
from jaxquant.numerics.groups import (
    axes_within_groups,
    broadcast_scale,
    normalize_axes,
    scale_shape,
    split_groups,
)
from jaxquant.numerics.hadamard import rotate, rotate_back
from jaxquant.numerics.opaque import DirectRead, Opaque, Owner
from jaxquant.numerics.packing import pack_bits, packed_bytes, unpack_bits
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.numerics.scales import (
    TINY,
    TOP,
    Scales,
    compute_scales,
    divide_by_scale,
    flush_subnormal,
)
from jaxquant.numerics.sharding import call_with_auto_axes, drop_repeated, spec_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray(Opaque):
    """A quantized array: values on the grid and their scales.

    Attributes:
        qvalue: what the format stores of the grid's values, in the array's shape; or, packed, its codes
            as bit planes along an axis, the last where nothing else is said.
        scale: of the array's rank, each dimension dividing the array's; float32, or what a Block's
            scale format stores.
        zero_point: None, or the grid's value that stands for zero, float32 in the scale's shape.
        tensor_scale: None, or the float32 scale above a two-level Block's.
        format: the grid, static.
        dtype: the type that `dequantize` returns.
        hadamard: None, or (block, axis) of the rotation in whose coordinates the values are.
        length: None, or the length of the packed axis of a packed array.
        packed_axis: along which it is packed.
        owner: the parameter that it was stored for, which errors name.
    """

    qvalue: jt.Shaped[jax.Array, "*shape"]
    scale: jt.Shaped[jax.Array, "*groups"]
    zero_point: jax.Array | None = None
    tensor_scale: jax.Array | None = None
    format: Any = dataclasses.field(default=None, metadata={"static": True})
    dtype: Any = dataclasses.field(default=np.dtype(np.float32), metadata={"static": True})
    hadamard: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})
    length: int | None = dataclasses.field(default=None, metadata={"static": True})
    packed_axis: int = dataclasses.field(default=-1, metadata={"static": True})
    owner: Owner = dataclasses.field(default=Owner(), metadata={"static": True}, repr=False)

    @property
    def element(self) -> Format:
        """The grid of the elements: a Block's, or the format itself."""
        return self.format.element if isinstance(self.format, Block) else self.format

    @property
    def shape(self) -> tuple[int, ...]:
        if self.length is None:
            return self.qvalue.shape
        shape = list(self.qvalue.shape)
        shape[self.packed_axis] = self.length
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.qvalue.ndim

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes that are really held: values, scales, zero points and a codebook's table."""
        buffers = (self.qvalue, self.scale, self.zero_point, self.tensor_scale)
        table = 4 * len(self.element.values) if isinstance(self.element, Codebook) else 0
        return table + sum(b.size * b.dtype.itemsize for b in buffers if b is not None)

    @property
    def bits_per_element(self) -> float:
        """8 · nbytes / number of elements.

        >>> from jaxquant.formats import INT8, Int
        >>> quantize(jnp.ones((64, 64)), Quantizer(INT8, 32)).bits_per_element
        9.0
        >>> quantize(jnp.ones((64, 64)), Quantizer(Int(5), 32)).pack().bits_per_element
        6.0
        """
        return 8 * self.nbytes / max(1, self.size)

    def __getitem__(self, rows: Any) -> "QArray":
        """Rows, taken along the first axis by integers, with their scales; all of it for ``...``.

        Raises:
            ValueError: another index, or an array without a row to take.

        >>> from jaxquant.formats import INT8
        >>> dequantize(quantize(jnp.eye(3), Quantizer(INT8, "channel"))[jnp.array([2])])
        Array([[0., 0., 1.]], dtype=float32)
        """
        if rows is Ellipsis:
            return self
        if self.ndim < 2 or not jnp.issubdtype(getattr(rows, "dtype", type(None)), jnp.integer):
            if self.owner.path:
                raise DirectRead(self.not_an_array(f"the index {rows!r}"))
            raise ValueError(
                f"a QArray is indexed by ... or by an array of integers, with 2 axes or more; got {rows!r}"
            )
        parts = (self.qvalue, self.scale, self.zero_point, self.tensor_scale)
        # Counted from the end, axes stay what they were.
        rotation, packed_axis = self.hadamard, self.packed_axis
        if rotation is not None and rotation[1] >= 0:
            rotation = (rotation[0], rotation[1] - self.ndim)
        packed_axis = packed_axis - self.ndim if packed_axis >= 0 else packed_axis

        def taken(parts: Any, rows: jax.Array) -> Any:
            return jax.tree.map(lambda part: _take(part, rows, self.shape[0]), parts)

        def specs() -> Any:
            own = jax.tree.map(lambda part: (*spec_of(rows), *tuple(spec_of(part))[1:]), parts)
            return tuple(None if spec is None else drop_repeated(spec) for spec in own)

        qvalue, scale, zero_point, tensor_scale = call_with_auto_axes(taken, (parts, rows), specs)
        return dataclasses.replace(
            self,
            qvalue=qvalue,
            scale=scale,
            zero_point=zero_point,
            tensor_scale=tensor_scale,
            hadamard=rotation,
            packed_axis=packed_axis,
        )

    def pack(self) -> "QArray":
        """Packs the values into exactly `format.bits` bits each, rounded up to whole bytes for each row.

        Raises:
            ValueError: a scalar, which has no row.
        """
        if self.length is not None:
            return self
        if self.ndim == 0:
            raise ValueError("a scalar cannot be packed: it has no row of codes")
        element = self.element
        row = packed_bytes(self.shape[-1], element.bits)
        packed = call_with_auto_axes(
            lambda stored: pack_bits(element.encode(element.load(stored)), element.bits),
            (self.qvalue,),
            lambda: spec_of(self.qvalue, (*self.shape[:-1], row)),
        )
        return dataclasses.replace(self, qvalue=packed, length=self.shape[-1])

    def unpack(self) -> "QArray":
        """Returns the same array with its values in the format's array type."""
        if self.length is None:
            return self
        element, length, axis = self.element, self.length, self.packed_axis
        is_last = axis % self.ndim == self.ndim - 1

        def unpacked(packed: jax.Array) -> jax.Array:
            packed = packed if is_last else jnp.moveaxis(packed, axis, -1)
            stored = element.store(element.decode(unpack_bits(packed, element.bits, length)))
            return stored if is_last else jnp.moveaxis(stored, -1, axis)

        stored = call_with_auto_axes(
            unpacked, (self.qvalue,), lambda: spec_of(self.qvalue, self.shape)
        )
        return dataclasses.replace(self, qvalue=stored, length=None, packed_axis=-1)

    def float_scale(self) -> jt.Float[jax.Array, "*groups"]:
        """Returns the scales in float32, a Block's decoded."""
        if not isinstance(self.format, Block):
            return self.scale
        scale = self.format.scale.load(self.scale)
        return flush_subnormal(scale if self.tensor_scale is None else scale * self.tensor_scale)


def _take(part: jax.Array, rows: jax.Array, n: int) -> jax.Array:
    """Takes rows of an array of n rows, or of one with a row for each group."""
    if part.shape[0] == n:
        return part[rows]
    return part[jnp.where(rows < 0, rows + n, rows) // (n // part.shape[0])]


def _check(x: Any, quantizer: Any) -> None:
    if not jnp.issubdtype(getattr(x, "dtype", type(None)), jnp.floating):
        kind = getattr(x, "dtype", type(x).__name__)
        raise ValueError(f"only floating-point arrays can be quantized; got {kind}")
    if not isinstance(quantizer, Quantizer):
        raise ValueError(f"quantizer is a Quantizer, as in Quantizer(Int(8)); got {quantizer!r}")


def to_float32_rotated(x: jax.Array, quantizer: Quantizer, axis: int | Sequence[int]) -> jax.Array:
    """Returns x in float32, in the coordinates that it is quantized in."""
    x = in_float32(x)
    if quantizer.hadamard is None:
        return x
    return rotate(x, quantizer.hadamard, _last_axis(x, axis))


def _last_axis(x: jax.Array, axis: int | Sequence[int]) -> int:
    """Returns the axis along which a rotation runs: the last of the contracting ones."""
    axes = normalize_axes(x.shape, axis)
    if not axes:
        raise ValueError("a Hadamard rotation needs a contracting axis; got none")
    return axes[-1]


def to_grid(
    x: jax.Array, quantizer: Quantizer, axis: int | Sequence[int], key: Any
) -> tuple[jax.Array, Scales, jax.Array]:
    """Computes the float32 (grid values, scales, x), all in `split_groups`'s view of x."""
    groups = scale_shape(x.shape, quantizer.granularity, axis)  # pyright: ignore[reportArgumentType]
    view, axes = split_groups(x, groups), axes_within_groups(x.shape, groups)
    found = quantizer.calibration(jax.lax.stop_gradient(view), axes, quantizer.element)
    scales = compute_scales(found, quantizer)
    if not calibrations.propagates_nonfinite(quantizer.calibration):
        # Zeros are zeros, whatever range was given.
        size = calibrations.absmax(jax.lax.stop_gradient(view), axes)
        scale = jnp.where(size < TINY, 0, scales.scale)
        scales = dataclasses.replace(scales, scale=jnp.where(jnp.isfinite(size), scale, jnp.nan))
    ratio = divide_by_scale(*jax.lax.stop_gradient((view, scales.whole)), quantizer)
    if callable(key):
        key = key(scales.scale) if roundings.needs_key(quantizer.rounding) else None

    def rounding(values: jax.Array) -> jax.Array:
        rounded = quantizer.rounding(values, key)
        # Added after rounding: fused with the product above, the sum would be rounded another way.
        return rounded if scales.zero is None else rounded + scales.zero

    grid = quantizer.element.round(ratio, rounding)
    if isinstance(quantizer.rounding, roundings.Eden):
        scales = correct_scales(ratio, grid, scales, groups, x.shape, quantizer, axis, key)
    return grid, scales, view


def _finite(x: jax.Array, dtype: Any) -> jax.Array:
    """Returns x in another type, kept from overflowing it: s · q of the largest value may round beyond."""
    top = min(float(jnp.finfo(dtype).max), TOP)
    return jnp.clip(x, -top, top).astype(dtype)


def calibrate(
    x: jt.Float[jax.Array, "*shape"], quantizer: Quantizer, axis: int | Sequence[int] = -1
) -> Any:
    """Returns the range that a quantizer's calibration finds, one for each group.

    Args:
        x: values, floating point.
        quantizer: whose calibration and granularity.
        axis: as of `quantize`.

    Returns:
        What the calibration returns, in the shape of the scales: a magnitude, or (low, high); a
        `calibration.Range` of it gives the same scales again.

    >>> from jaxquant.formats import INT8
    >>> calibrate(jnp.array([[0.5, -1.0], [20.0, 10.0]]), Quantizer(INT8, "channel"))
    Array([[ 1.],
           [20.]], dtype=float32)
    """
    _check(x, quantizer)
    groups = scale_shape(x.shape, quantizer.granularity, axis)  # pyright: ignore[reportArgumentType]
    calibrated = functools.partial(_calibrate, groups=groups, axis=axis)
    return call_with_auto_axes(calibrated, (x, quantizer), lambda: spec_of(x, groups))


def _calibrate(x: jax.Array, quantizer: Quantizer, groups: tuple[int, ...], axis: Any) -> Any:
    x = to_float32_rotated(x, quantizer, axis)
    found = quantizer.calibration(
        split_groups(x, groups), axes_within_groups(x.shape, groups), quantizer.element
    )
    found = found.value if isinstance(found, calibrations.Scale) else found
    return jax.tree.map(lambda range_: range_.reshape(groups), found)


def quantize(
    x: jt.Float[jax.Array, "*shape"],
    quantizer: Quantizer,
    axis: int | Sequence[int] = -1,
    key: jax.Array | Callable[[jax.Array], jax.Array] | None = None,
) -> QArray:
    """Quantizes an array: q = format.round(x / s) in the format's array type.

    Args:
        x: values, floating point.
        quantizer: how; its format must be static.
        axis: the contracting axis or axes, along which the product that follows will sum.
        key: PRNG key, for a rounding that needs one; or a function that makes one of the scales, as
            `rounding.key_of`.

    Raises:
        ValueError: x is not floating point; traced precision; a granularity or a rotation that does
            not fit x's shape and `axis`; an asymmetric range for a grid without a zero point; a missing
            key.

    >>> from jaxquant.formats import INT8
    >>> quantize(jnp.array([[0.5, -1.0], [20.0, 10.0]]), Quantizer(INT8, "channel")).qvalue
    Array([[  64, -127],
           [ 127,   64]], dtype=int8)
    """
    _check(x, quantizer)
    _ = quantizer.element.dtype  # a traced format is refused before anything is computed
    groups = scale_shape(x.shape, quantizer.granularity, axis)  # pyright: ignore[reportArgumentType]

    def specs() -> Any:
        scale = spec_of(x, groups)
        return spec_of(x), scale, scale, PartitionSpec()

    stored = functools.partial(_quantize, groups=groups, axis=axis)
    parts = call_with_auto_axes(stored, (x, quantizer, key), specs)
    rotation = None
    if quantizer.hadamard is not None:
        # Counted from the end, so that a leading axis may come or go.
        rotation = (quantizer.hadamard, _last_axis(x, axis) - x.ndim)
    return QArray(*parts, format=quantizer.format, dtype=np.dtype(x.dtype), hadamard=rotation)


def _quantize(
    x: jax.Array, quantizer: Quantizer, key: Any, groups: tuple[int, ...], axis: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Returns a QArray's arrays."""
    element = quantizer.element
    rotated = to_float32_rotated(x, quantizer, axis)
    grid, scales, _ = to_grid(rotated, quantizer, axis, key)
    stored = element.store(grid.reshape(x.shape))
    scale = scales.scale.reshape(groups)
    if isinstance(quantizer.format, Block):
        scale = quantizer.format.scale.store(scale)
    return (
        stored,
        scale,
        None if scales.zero is None else element.store(scales.zero.reshape(groups)),
        None if scales.tensor is None else scales.tensor.reshape((1,) * x.ndim),
    )


def dequantize(qarray: QArray) -> jt.Float[jax.Array, "*shape"]:
    """Returns a QArray's values in the original type: x̂ = s · (q − z), computed in float32.

    >>> from jaxquant.formats import Int
    >>> dequantize(quantize(jnp.array([0.2, -1.4, 7.0]), Quantizer(Int(4))))
    Array([ 0., -1.,  7.], dtype=float32)
    """
    if not isinstance(qarray, QArray):
        raise ValueError(
            f"dequantize takes a QArray, as quantize gives it; got {type(qarray).__name__}"
        )
    return call_with_auto_axes(_dequantize, (qarray,), lambda: spec_of(qarray.qvalue, qarray.shape))


def _dequantize(qarray: QArray) -> jax.Array:
    qarray = qarray.unpack()
    view = split_groups(qarray.element.load(qarray.qvalue), qarray.scale.shape)
    if qarray.zero_point is not None:
        view = view - broadcast_scale(qarray.element.load(qarray.zero_point), qarray.shape)
    values = (view * broadcast_scale(qarray.float_scale(), qarray.shape)).reshape(qarray.shape)
    if qarray.hadamard is not None:
        values = rotate_back(values, *qarray.hadamard)
    return _finite(values, qarray.dtype)


def fake_quant(
    x: jt.Float[jax.Array, "*shape"],
    quantizer: Quantizer,
    axis: int | Sequence[int] = -1,
    key: jax.Array | Callable[[jax.Array], jax.Array] | None = None,
) -> jt.Float[jax.Array, "*shape"]:
    """Simulates storage: dequantize(quantize(x)) exactly, at any precision, with the estimator's gradient.

    By default the gradient is straight-through: ∂x̂/∂x = 1, none to the scale.

    Args:
        x: values, floating point.
        quantizer: how; its format may be traced, so that one program serves every precision.
        axis: the contracting axis or axes, along which the product that follows will sum.
        key: as of `quantize`.

    Raises:
        ValueError: as `quantize`, except that any precision is taken.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.

    >>> from jaxquant.formats import Int
    >>> at = jax.jit(lambda bits: fake_quant(jnp.array([2.0, -4.0, 21.0]), Quantizer(Int(bits))))
    >>> at(4), at(3)  # one compilation
    (Array([ 3., -3., 21.], dtype=float32), Array([ 0., -7., 21.], dtype=float32))
    """
    _check(x, quantizer)
    simulated = functools.partial(_fake_quant, axis=axis)
    return call_with_auto_axes(simulated, (x, quantizer, key), lambda: spec_of(x))


def _fake_quant(x: jax.Array, quantizer: Quantizer, key: Any, axis: Any) -> jax.Array:
    rotated = to_float32_rotated(x, quantizer, axis)
    if quantizer.estimator is estimators.straight_through:
        # The rotation is orthogonal, so that passing the gradient whole within it passes it whole.
        rotated = jax.lax.stop_gradient(rotated)
    grid, scales, view = to_grid(rotated, quantizer, axis, key)
    low, high = quantizer.element.min_value, quantizer.element.max_value
    if scales.zero is not None:
        grid, low, high = (v - scales.zero for v in (grid, low, high))
    if quantizer.estimator is estimators.straight_through:
        values = grid * scales.whole
    else:
        group = estimators.group_size(view.shape, scales.scale.shape)
        # A group that rounds to zero as a whole has the gradient of one on whole numbers.
        empty = scales.whole == 0
        scale, grid = jnp.where(empty, 1, scales.whole), jnp.where(empty, 0, grid)
        parts = (view, jax.lax.stop_gradient(grid), scale, low, high, quantizer.element, group)
        values = quantizer.estimator(estimators.GridTensor(*parts))
    values = values.reshape(x.shape)
    if quantizer.hadamard is not None:
        values = rotate_back(values, quantizer.hadamard, _last_axis(x, axis))
    if quantizer.estimator is estimators.straight_through:
        return roundings.straight_through(x, _finite(values, x.dtype))
    return _finite(values, x.dtype)

"""Three verbs on one noun: `quantize` gives a `QArray`, `dequantize` takes one back, `fake_quant` is both.

For each group of elements that share a scale s (a tensor, a channel, a block, a tile):

    s = r / format.max_value,    q = format.round(x / s),    x̂ = s · q

with the range r by calibration, computed in float32.  With an asymmetric range [l, h] there is a zero
point too:  s = (h − l) / (max − min),  z = round(min − l / s),  q = format.round(x / s + z),
x̂ = s · (q − z).  A group that holds a NaN or an Inf has no scale and decodes to NaN as a whole.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np

from jaxquant import calibration as calibrations
from jaxquant import estimators
from jaxquant import rounding as roundings
from jaxquant.formats import Block, Codebook, Format, Int, divide, is_format
from jaxquant.hadamard import check_block, hadamard
from jaxquant.packing import pack_bits, unpack_bits

Granularity = Literal["tensor", "channel"] | int | tuple[int, int]

_TINY = jnp.finfo(jnp.float32).tiny
# Beyond this a scale's reciprocal, which XLA may multiply by instead of dividing, is subnormal.
_HUGE = 2.0**100


@functools.partial(jax.tree_util.register_pytree_node_class)
@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How one tensor is quantized: the grid, what shares a scale, how its range is found, how it rounds.

    A pytree whose leaves are the format's traced parameters and the calibration's, so a Quantizer is an
    argument of a jitted function like any array.

    Args:
        format: the grid, or a `Block`, which brings its own granularity.
        granularity: what shares one scale: ``"tensor"`` (default), everything; ``"channel"``, what is
            summed over together (the contracting axes); a block size, that many neighbours along the
            contracting axis; a tile (m, n), m along the contracting axis by n along the last other axis.
        calibration: from (x, axes, format) to the range; see `jaxquant.calibration`.
        rounding: from (x, key) to integers; see `jaxquant.rounding`.
        estimator: the gradient of `fake_quant`; see `jaxquant.estimators`.
        hadamard: None, or the block size of a Hadamard rotation along the contracting axis, in whose
            coordinates the tensor is quantized.

    Raises:
        ValueError: an argument of the wrong kind; a granularity beside a Block's.

    >>> from jaxquant.formats import MXFP4, Int
    >>> Quantizer(Int(4), "channel").granularity, Quantizer(MXFP4).granularity
    ('channel', 32)
    """

    format: Format | Block
    granularity: Granularity | None = None
    calibration: calibrations.Calibration = calibrations.absmax
    rounding: Callable[..., jax.Array] = roundings.nearest
    estimator: Callable[[estimators.Laid], jax.Array] = estimators.straight_through
    hadamard: int | None = None

    def __post_init__(self):
        if not isinstance(self.format, Block) and not is_format(self.format):
            raise ValueError(f"format is a grid such as Int(4); got {self.format!r}")
        object.__setattr__(self, "granularity", _granularity(self.granularity, self.format))
        for name in ("calibration", "rounding", "estimator"):
            if not callable(getattr(self, name)):
                raise ValueError(
                    f"{name} is a function, as in jaxquant.{name.replace('estimator', 'estimators')}; "
                    f"got {getattr(self, name)!r}"
                )
        if self.hadamard is not None:
            object.__setattr__(self, "hadamard", check_block(self.hadamard))

    @property
    def element(self) -> Format:
        """The grid of the elements: a Block's, or the format itself."""
        return self.format.element if isinstance(self.format, Block) else self.format

    def tree_flatten(self):
        # A calibration that is a pytree holds data; another is a function, and static.
        is_data = not jax.tree_util.all_leaves([self.calibration])
        data = self.calibration if is_data else None
        static = (self.granularity, self.rounding, self.estimator, self.hadamard)
        return (self.format, data), (*static, None if is_data else self.calibration)

    @classmethod
    def tree_unflatten(cls, static, children):
        granularity, rounding, estimator, rotation, function = static
        instance = object.__new__(cls)
        for name, value in (
            ("format", children[0]),
            ("granularity", granularity),
            ("calibration", children[1] if function is None else function),
            ("rounding", rounding),
            ("estimator", estimator),
            ("hadamard", rotation),
        ):
            object.__setattr__(instance, name, value)
        return instance


def _granularity(size: Any, format: Format | Block) -> Granularity:
    """A checked granularity; a Block's own where none is given."""
    if isinstance(format, Block):
        if size not in (None, format.size):
            raise ValueError(
                f"granularity of {format} is its block size {format.size}; got {size!r}"
            )
        return format.size
    if size is None:
        return "tensor"
    if isinstance(size, str) and size in ("tensor", "channel"):
        return size  # pyright: ignore[reportReturnType]
    sizes: tuple[Any, ...] = size if isinstance(size, tuple) and len(size) == 2 else (size,)
    for n in sizes:
        if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1:
            raise ValueError(
                "granularity is 'tensor', 'channel', a block size of at least 1 or a tile (m, n) of such; "
                f"got {size!r}"
            )
    return (int(sizes[0]), int(sizes[1])) if len(sizes) == 2 else int(sizes[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """A quantized array: values on the grid and their scales.

    Attributes:
        qvalue: what the format stores of the grid's values, in the array's shape; or, packed, its codes
            as bit planes along the last axis.
        scale: of the array's rank, each dimension dividing the array's; float32, or what a Block's
            scale format stores.
        zero_point: None, or the grid's value that stands for zero, float32 in the scale's shape.
        tensor_scale: None, or the float32 scale above a two-level Block's.
        format: the grid, static.
        dtype: the type that `dequantize` returns.
        hadamard: None, or (block, axis) of the rotation in whose coordinates the values are.
        length: None, or the length of the last axis of a packed array.
    """

    qvalue: jt.Shaped[jax.Array, "*shape"]
    scale: jt.Shaped[jax.Array, "*groups"]
    zero_point: jax.Array | None = None
    tensor_scale: jax.Array | None = None
    format: Any = dataclasses.field(default=None, metadata={"static": True})
    dtype: Any = dataclasses.field(default=np.dtype(np.float32), metadata={"static": True})
    hadamard: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})
    length: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def element(self) -> Format:
        """The grid of the elements: a Block's, or the format itself."""
        return self.format.element if isinstance(self.format, Block) else self.format

    @property
    def shape(self) -> tuple[int, ...]:
        if self.length is None:
            return self.qvalue.shape
        return (*self.qvalue.shape[:-1], self.length)

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

    def pack(self) -> "QArray":
        """The same array with its values in exactly `format.bits` bits each, rounded up to whole bytes a row.

        Raises:
            ValueError: a scalar, which has no row.
        """
        if self.length is not None:
            return self
        if self.ndim == 0:
            raise ValueError("a scalar cannot be packed: it has no row of codes")
        codes = self.element.encode(self.element.load(self.qvalue))
        return dataclasses.replace(
            self, qvalue=pack_bits(codes, self.element.bits), length=self.shape[-1]
        )

    def unpack(self) -> "QArray":
        """The same array with its values in the format's array type."""
        if self.length is None:
            return self
        codes = unpack_bits(self.qvalue, self.element.bits, self.length)
        qvalue = self.element.store(self.element.decode(codes))
        return dataclasses.replace(self, qvalue=qvalue, length=None)

    def float_scale(self) -> jt.Float[jax.Array, "*groups"]:
        """The scales in float32, a Block's decoded."""
        if not isinstance(self.format, Block):
            return self.scale
        scale = self.format.scale.load(self.scale)
        return scale if self.tensor_scale is None else scale * self.tensor_scale


def scale_shape(
    shape: tuple[int, ...], granularity: Granularity, axis: int | Sequence[int]
) -> tuple[int, ...]:
    """The shape of an array's scales: one entry per group along each axis.

    Args:
        shape: the array's.
        granularity: as in `Quantizer`.
        axis: the contracting axis or axes, negative ones counted from the end.

    Raises:
        ValueError: an axis that the array lacks; a block or tile size that does not divide its axis; a
            block without a contracting axis; a tile with several, or without another axis.

    With several contracting axes a block lies along the last of them, and each place on the others has
    its own.

    >>> scale_shape((8, 64), "channel", 1), scale_shape((8, 64), 16, 1), scale_shape((8, 64), (16, 4), 1)
    ((8, 1), (8, 4), (2, 4))
    """
    if not shape and isinstance(granularity, str):
        return ()  # a scalar has no axes and one scale
    axes = normalized_axes(shape, axis)
    if granularity == "tensor":
        return (1,) * len(shape)
    if granularity == "channel":
        return tuple(1 if a in axes else n for a, n in enumerate(shape))
    if not axes:
        raise ValueError(
            f"granularity {granularity} (a block size) needs a contracting axis; got none"
        )
    if isinstance(granularity, int):
        return _divided(shape, {axes[-1]: granularity}, granularity)
    if len(axes) != 1:
        raise ValueError(f"a tile {granularity} needs one contracting axis; got {len(axes)}")
    (along,) = axes
    others = [a for a in range(len(shape)) if a != along]
    if not others:
        raise ValueError(
            f"a tile {granularity} needs an array of at least two axes; got shape {shape}"
        )
    return _divided(shape, {along: granularity[0], others[-1]: granularity[1]}, granularity)


def normalized_axes(shape: tuple[int, ...], axis: int | Sequence[int]) -> tuple[int, ...]:
    """Axes counted from the start, in the order given, each checked to be one of the array's."""
    try:
        axes = [operator.index(a) for a in (axis if isinstance(axis, Sequence) else (axis,))]
    except TypeError:
        raise ValueError(f"axis is an integer or a tuple of integers; got {axis!r}") from None
    for a in axes:
        if not -len(shape) <= a < len(shape):
            raise ValueError(f"axis {a} is not an axis of an array of shape {shape}")
    return tuple(a % len(shape) for a in axes)


def _divided(shape: tuple[int, ...], sizes: dict[int, int], granularity: Any) -> tuple[int, ...]:
    for a, size in sizes.items():
        if shape[a] % size:
            raise ValueError(
                f"granularity {granularity} does not divide axis {a} of shape {shape}: "
                f"{shape[a]} elements are not a whole number of blocks of {size}"
            )
    return tuple(n // sizes.get(a, 1) for a, n in enumerate(shape))


def _grouped(x: jax.Array, groups: tuple[int, ...]) -> jax.Array:
    """Views each axis n that holds several groups as (groups, n / groups), and leaves the others.

    Axes of size 1 are not added: reductions over views that have them are slow.
    """
    shape: list[int] = []
    for n, g in zip(x.shape, groups, strict=True):
        shape += [n] if g in (1, n) else [g, n // g]
    return x.reshape(shape)


def _within(shape: tuple[int, ...], groups: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of `_grouped`'s view that lie within a group."""
    axes, place = [], 0
    for n, g in zip(shape, groups, strict=True):
        split = g not in (1, n)
        place += split
        if split or (g == 1 and n != 1):
            axes.append(place)
        place += 1
    return tuple(axes)


def per_group(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Views scales so that they broadcast against `_grouped`'s view of an array of such a shape."""
    view: list[int] = []
    for n, g in zip(shape, scale.shape, strict=True):
        view += [g] if g in (1, n) else [g, 1]
    return scale.reshape(view)


@dataclasses.dataclass(frozen=True)
class _Scales:
    """What stands beside the grid's values, in `_grouped`'s view.

    Attributes:
        scale: float32, a Block's own before storage.
        tensor: the scale above a two-level Block's.
        zero: the zero point of an asymmetric range.
    """

    scale: jax.Array
    tensor: jax.Array | None = None
    zero: jax.Array | None = None

    @property
    def whole(self) -> jax.Array:
        """What the grid's values are multiplied with."""
        return self.scale if self.tensor is None else self.scale * self.tensor


def _scales(found: Any, quantizer: Quantizer) -> _Scales:
    """From a calibrated range to scales."""
    if isinstance(found, tuple):
        low, high = found
        return _asymmetric(low, high, quantizer)
    if isinstance(found, calibrations.Scale):
        scale = found.value
    else:
        scale = divide(found, quantizer.element.max_value)
    scale = jnp.where(jnp.isinf(scale), jnp.nan, scale)
    if isinstance(quantizer.format, Block):
        return _Scales(*quantizer.format.scales(scale))
    # A group of zeros, or of values whose scale would be subnormal (flushed on most hardware), gets
    # scale 1: its elements round to zero instead of dividing by it.  A scale of NaN stays.
    return _Scales(jnp.where(scale < _TINY, 1, scale))


def _asymmetric(low: jax.Array, high: jax.Array, quantizer: Quantizer) -> _Scales:
    element = quantizer.format
    if not isinstance(element, Int) or element.levels == "midrise":
        raise ValueError(
            "an asymmetric range needs an Int with a zero, whose steps a zero point counts; "
            f"got format {element}"
        )
    levels = jnp.float32(element.max_value) - jnp.float32(element.min_value)
    # Zero is always within the range, so that it has a value of its own; the difference of the ends
    # might not be a float32, half of it is.
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    scale = 2 * divide(high / 2 - low / 2, levels)
    scale = jnp.where(jnp.isinf(scale), jnp.nan, scale)
    scale = jnp.where(scale < _TINY, 1, scale)
    zero = jnp.round(element.min_value - low / scale)
    return _Scales(scale, None, jnp.clip(zero, element.min_value, element.max_value))


def _divide(view: jax.Array, scale: jax.Array) -> jax.Array:
    """view / scale without an intermediate that is no float32, whatever the scale."""
    scale = jnp.where(scale < _TINY, 1, scale)  # two levels' product may be less than either
    shrink = jnp.where(scale > _HUGE, 2.0**-64, 1)
    # XLA would multiply by the reciprocal anyway, in some programs and not in others (see `divide`).
    return (view * shrink) * (1 / (scale * shrink))


def _check(x: Any, quantizer: Any) -> None:
    if not jnp.issubdtype(getattr(x, "dtype", type(None)), jnp.floating):
        kind = getattr(x, "dtype", type(x).__name__)
        raise ValueError(f"only floating-point arrays can be quantized; got {kind}")
    if not isinstance(quantizer, Quantizer):
        raise ValueError(f"quantizer is a Quantizer, as in Quantizer(Int(8)); got {quantizer!r}")


def _rotated(x: jax.Array, quantizer: Quantizer, axis: int | Sequence[int]) -> jax.Array:
    """x in the coordinates that it is quantized in."""
    if quantizer.hadamard is None:
        return x
    return hadamard(x, quantizer.hadamard, _last_axis(x, axis))


def _last_axis(x: jax.Array, axis: int | Sequence[int]) -> int:
    """The axis along which a rotation runs: the last of the contracting ones."""
    axes = normalized_axes(x.shape, axis)
    if not axes:
        raise ValueError("a Hadamard rotation needs a contracting axis; got none")
    return axes[-1]


def _to_grid(
    x: jax.Array, quantizer: Quantizer, axis: int | Sequence[int], key: Any
) -> tuple[jax.Array, _Scales, jax.Array]:
    """The waist of the library: float32 (grid values, scales, x), all in `_grouped`'s view of x."""
    groups = scale_shape(x.shape, quantizer.granularity, axis)  # pyright: ignore[reportArgumentType]
    view, axes = _grouped(x, groups), _within(x.shape, groups)
    found = quantizer.calibration(jax.lax.stop_gradient(view), axes, quantizer.element)
    scales = _scales(found, quantizer)
    if not calibrations.sees_all(quantizer.calibration):
        finite = jnp.isfinite(calibrations.absmax(jax.lax.stop_gradient(view), axes))
        scales = dataclasses.replace(scales, scale=jnp.where(finite, scales.scale, jnp.nan))
    ratio = _divide(*jax.lax.stop_gradient((view, scales.whole)))
    if callable(key) and quantizer.rounding in roundings.NEEDS_KEY:
        key = key(scales.scale)

    def rounding(values: jax.Array) -> jax.Array:
        rounded = quantizer.rounding(values, key)
        # Added after rounding: fused with the product above, the sum would be rounded another way.
        return rounded if scales.zero is None else rounded + scales.zero

    return quantizer.element.round(ratio, rounding), scales, view


def _finite(x: jax.Array, dtype: Any) -> jax.Array:
    """x in another type, kept from overflowing it: s · q of the largest value may round beyond."""
    top = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -top, top).astype(dtype)


def quantize(
    x: jt.Float[jax.Array, "*shape"],
    quantizer: Quantizer,
    axis: int | Sequence[int] = -1,
    key: jax.Array | Callable[[jax.Array], jax.Array] | None = None,
) -> QArray:
    """Lays an array onto a grid and stores it: q = format.round(x / s) in the format's array type.

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
    element = quantizer.element
    _ = element.dtype  # a traced format is refused before anything is computed
    rotated = _rotated(x.astype(jnp.float32), quantizer, axis)
    grid, scales, _ = _to_grid(rotated, quantizer, axis, key)
    stored = element.store(grid.reshape(x.shape))
    scale = scales.scale.reshape(scale_shape(x.shape, quantizer.granularity, axis))  # pyright: ignore
    if isinstance(quantizer.format, Block):
        scale = quantizer.format.scale.store(scale)
    rotation = None
    if quantizer.hadamard is not None:
        # Counted from the end, so that a leading axis may come or go.
        rotation = (quantizer.hadamard, _last_axis(x, axis) - x.ndim)
    return QArray(
        stored,
        scale,
        zero_point=None if scales.zero is None else element.store(scales.zero.reshape(scale.shape)),
        tensor_scale=None if scales.tensor is None else scales.tensor.reshape((1,) * x.ndim),
        format=quantizer.format,
        dtype=np.dtype(x.dtype),
        hadamard=rotation,
    )


def dequantize(qarray: QArray) -> jt.Float[jax.Array, "*shape"]:
    """The values that a QArray stands for: x̂ = s · (q − z), computed in float32, in the original type.

    >>> from jaxquant.formats import Int
    >>> dequantize(quantize(jnp.array([0.2, -1.4, 7.0]), Quantizer(Int(4))))
    Array([ 0., -1.,  7.], dtype=float32)
    """
    if not isinstance(qarray, QArray):
        raise ValueError(
            f"dequantize takes a QArray, as quantize gives it; got {type(qarray).__name__}"
        )
    qarray = qarray.unpack()
    view = _grouped(qarray.element.load(qarray.qvalue), qarray.scale.shape)
    if qarray.zero_point is not None:
        view = view - per_group(qarray.element.load(qarray.zero_point), qarray.shape)
    values = (view * per_group(qarray.float_scale(), qarray.shape)).reshape(qarray.shape)
    if qarray.hadamard is not None:
        values = hadamard(values, *qarray.hadamard)
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
    rotated = _rotated(x.astype(jnp.float32), quantizer, axis)
    if quantizer.estimator is estimators.straight_through:
        # The rotation is orthogonal, so that passing the gradient whole within it passes it whole.
        rotated = jax.lax.stop_gradient(rotated)
    grid, scales, view = _to_grid(rotated, quantizer, axis, key)
    low, high = quantizer.element.min_value, quantizer.element.max_value
    if scales.zero is not None:
        grid, low, high = (v - scales.zero for v in (grid, low, high))
    if quantizer.estimator is estimators.straight_through:
        values = grid * scales.whole
    else:
        group = estimators.group_size(view.shape, scales.scale.shape)
        fixed = jax.lax.stop_gradient(grid)
        values = quantizer.estimator(
            estimators.Laid(view, fixed, scales.whole, low, high, quantizer.element, group)
        )
    values = values.reshape(x.shape)
    if quantizer.hadamard is not None:
        values = hadamard(values, quantizer.hadamard, _last_axis(x, axis))
    if quantizer.estimator is estimators.straight_through:
        return roundings.straight_through(x, _finite(values, x.dtype))
    return _finite(values, x.dtype)

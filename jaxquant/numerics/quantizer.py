"""`Quantizer`: everything that is said about how one tensor is quantized."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxquant.formats import Block, Format, is_format
from jaxquant.numerics import calibration as calibrations
from jaxquant.numerics import estimators
from jaxquant.numerics import rounding as roundings
from jaxquant.numerics.groups import Granularity
from jaxquant.numerics.hadamard import check_block


@functools.partial(jax.tree_util.register_pytree_node_class)
@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How to quantize one tensor: format, granularity, calibration and rounding.

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
    estimator: Callable[[estimators.GridTensor], jax.Array] = estimators.straight_through
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
    """Returns a checked granularity; a Block's own where none is given."""
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

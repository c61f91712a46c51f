"""Layers that `nnx.vmap` has stacked: along which axes, and how arrays of one lie in arrays of all.

A weight [n, m] of three layers that are stacked along axis 1 is [n, 3, m].
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.numerics.qarray import QArray


@dataclasses.dataclass(frozen=True)
class Stacking:
    """The position of the stacked layers in a weight.

    Attributes:
        axes: along which layers are stacked, rising; none of a single layer.
        sizes: how many layers along each.
        rank: axes of the whole weight.
    """

    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    rank: int

    @classmethod
    def along(cls, axes: Sequence[int], shape: Sequence[int]) -> "Stacking":
        """Returns the stacking of a weight of a given shape along given axes."""
        return cls(tuple(axes), tuple(shape[a] for a in axes), len(shape))

    def own(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns one layer's part of a shape."""
        return tuple(n for a, n in enumerate(shape) if a not in self.axes)

    def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Maps a function of one layer's arrays over all layers; results are stacked along the same axes."""
        for axis in self.axes:
            function = jax.vmap(function, in_axes=axis, out_axes=axis)
        return function

    def front(self, whole: jax.Array) -> jax.Array:
        """Returns an array of the weight's rank with the layers' axes first."""
        return jnp.moveaxis(whole, self.axes, range(len(self.axes)))

    def back(self, array: jax.Array) -> jax.Array:
        """Inverts `front`."""
        return jnp.moveaxis(array, range(len(self.axes)), self.axes)

    def with_layer_axes(self, stored: QArray) -> QArray:
        """Returns a stored weight of all layers whose axis fields hold for it and for each layer's part.

        Args:
            stored: as `each` makes it of a function of one layer, whose axes it counts from the end.

        Raises:
            ValueError: layers both before and behind an axis of which it says something.
        """
        rotation = stored.hadamard
        if rotation is not None:
            rotation = (rotation[0], self._layer_axis(rotation[1]))
        packed_axis = stored.packed_axis if stored.length is None else self._layer_axis(-1)
        return dataclasses.replace(stored, hadamard=rotation, packed_axis=packed_axis)

    def _layer_axis(self, axis: int) -> int:
        """Returns one layer's axis, given from the end, counted from where no layers are."""
        whole = [a for a in range(self.rank) if a not in self.axes][axis]
        if all(a < whole for a in self.axes):
            return whole - self.rank
        if all(a > whole for a in self.axes):
            return whole
        raise ValueError(
            f"layers are stacked along axes {self.axes}, on both sides of axis {whole}, along which weights "
            "are packed or rotated; stack them all before it, or take a format of 8 bits without rotation"
        )


def candidate_axes(whole: Sequence[int], own: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns the axes along which layers may be stacked: those whose removal leaves one layer's shape.

    >>> candidate_axes((8, 3, 16), (8, 16)), candidate_axes((3, 3, 3, 8), (3, 3, 8))
    ([(1,)], [(0,), (1,), (2,)])
    """
    extra = max(0, len(whole) - len(own))
    subsets = itertools.combinations(range(len(whole)), extra)
    return [axes for axes in subsets if Stacking.along(axes, whole).own(whole) == tuple(own)]


def common_axes(
    found: list[tuple[int, ...]], rank: int, others: list[tuple[int, ...]], other_rank: int
) -> list[tuple[int, ...]]:
    """Returns those axes that another array of the same layers also allows, counted from either end."""

    def agrees(axes: tuple[int, ...]) -> bool:
        from_end = tuple(a - rank + other_rank for a in axes)
        return axes in others or from_end in others

    return [axes for axes in found if agrees(axes)]

"""Groups: the elements of an array that share a scale, and views with an axis for each."""

import operator
from collections.abc import Sequence
from typing import Any, Literal

import jax

Granularity = Literal["tensor", "channel"] | int | tuple[int, int]


def scale_shape(
    shape: tuple[int, ...], granularity: Granularity, axis: int | Sequence[int]
) -> tuple[int, ...]:
    """Returns the shape of an array's scales: one entry per group along each axis.

    Args:
        shape: the array's.
        granularity: as in `Quantizer`.
        axis: the contracting axis or axes, negative ones counted from the end.

    Raises:
        ValueError: an axis that the array lacks; a block or tile size that does not divide its axis; a
            block or tile without a contracting axis; a tile without another axis.

    With several contracting axes a block or tile lies along the last of them, and each place on the
    others has its own.

    >>> scale_shape((8, 64), "channel", 1), scale_shape((8, 64), 16, 1), scale_shape((8, 64), (16, 4), 1)
    ((8, 1), (8, 4), (2, 4))
    """
    if not shape and isinstance(granularity, str):
        return ()  # a scalar has no axes and one scale
    axes = normalize_axes(shape, axis)
    if granularity == "tensor":
        return (1,) * len(shape)
    if granularity == "channel":
        return tuple(1 if a in axes else n for a, n in enumerate(shape))
    if not axes:
        raise ValueError(
            f"granularity {granularity} (a block size) needs a contracting axis; got none"
        )
    if isinstance(granularity, int):
        return _divide(shape, {axes[-1]: granularity}, granularity)
    others = [a for a in range(len(shape)) if a not in axes]
    if not others:
        raise ValueError(
            f"a tile {granularity} needs an axis that is not summed over; got shape {shape} with "
            f"contracting axes {axes}"
        )
    return _divide(shape, {axes[-1]: granularity[0], others[-1]: granularity[1]}, granularity)


def normalize_axes(shape: tuple[int, ...], axis: int | Sequence[int]) -> tuple[int, ...]:
    """Returns axes counted from the start, in the order given, each checked to be one of the array's."""
    try:
        axes = [operator.index(a) for a in (axis if isinstance(axis, Sequence) else (axis,))]
    except TypeError:
        raise ValueError(f"axis is an integer or a tuple of integers; got {axis!r}") from None
    if isinstance(axis, bool) or len({a % max(1, len(shape)) for a in axes}) != len(axes):
        raise ValueError(
            f"axes are integers that differ; got {axis!r} for an array of shape {shape}"
        )
    for a in axes:
        if not -len(shape) <= a < len(shape):
            raise ValueError(f"axis {a} is not an axis of an array of shape {shape}")
    return tuple(a % len(shape) for a in axes)


def _divide(shape: tuple[int, ...], sizes: dict[int, int], granularity: Any) -> tuple[int, ...]:
    for a, size in sizes.items():
        if shape[a] % size:
            raise ValueError(
                f"granularity {granularity} does not divide axis {a} of shape {shape}: "
                f"{shape[a]} elements are not a whole number of blocks of {size}"
            )
    return tuple(n // sizes.get(a, 1) for a, n in enumerate(shape))


def split_groups(x: jax.Array, groups: tuple[int, ...]) -> jax.Array:
    """Views each axis n that holds several groups as (groups, n / groups), and leaves the others.

    Axes of size 1 are not added: reductions over views that have them are slow.
    """
    shape: list[int] = []
    for n, g in zip(x.shape, groups, strict=True):
        shape += [n] if g in (1, n) else [g, n // g]
    return x.reshape(shape)


def axes_within_groups(shape: tuple[int, ...], groups: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the axes of `split_groups`'s view that lie within a group."""
    axes, place = [], 0
    for n, g in zip(shape, groups, strict=True):
        split = g not in (1, n)
        place += split
        if split or (g == 1 and n != 1):
            axes.append(place)
        place += 1
    return tuple(axes)


def broadcast_scale(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Views scales so that they broadcast against `split_groups`'s view of an array of such a shape."""
    view: list[int] = []
    for n, g in zip(shape, scale.shape, strict=True):
        view += [g] if g in (1, n) else [g, 1]
    return scale.reshape(view)

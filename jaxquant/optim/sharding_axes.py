"""Split the elements of a parameter into shards, along the axes that its own sharding splits."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import PartitionSpec as P

from jaxquant.numerics.sharding import names
from jaxquant.optim.codecs import BLOCK

# For each mesh axis in order: the array axis that it splits, and the number of parts.
ShardAxes = tuple[tuple[int, int], ...]
Spec = Callable[[str, tuple[int, ...]], P]  # from the path and shape of a parameter to its sharding


def shard_axes_of(shape: Sequence[int], spec: P, shards: Mapping[str, int]) -> ShardAxes | None:
    """Returns how to split an array into shards so that each device already holds its own elements.

    Each mesh axis splits the array axis that `spec` assigns to it.  If `spec` does not name it, it splits
    the longest array axis that it divides.

    Args:
        shape: the shape of the array.
        spec: the sharding of the array.
        shards: the number of shards along each mesh axis.

    Returns:
        The axes, or None if a mesh axis divides no array axis, or if the parts are smaller than a block.

    >>> shard_axes_of((64, 96), P(None, "fsdp"), {"fsdp": 4, "tensor": 2})
    ((1, 4), (0, 2))
    >>> shard_axes_of((63, 5), P(), {"fsdp": 4}) is None
    True
    """
    rest, found = list(shape), []
    for name, count in shards.items():
        named = [axis for axis, own in enumerate(spec) if name in names(own)]
        able = [axis for axis in named or range(len(rest)) if rest[axis] % count == 0]
        if not able:
            return None
        axis = max(able, key=lambda a: rest[a])
        rest[axis] //= count
        found.append((axis, count))
    return tuple(found) if math.prod(rest) >= BLOCK else None


def to_shards(x: jax.Array, axes: ShardAxes) -> jax.Array:
    """Splits an array into its shards, each in row-major order, [shards, elements of each].

    >>> to_shards(jax.numpy.arange(8).reshape(2, 4), ((1, 2),))
    Array([[0, 1, 4, 5],
           [2, 3, 6, 7]], dtype=int32)
    """
    split, order = _split(x.shape, axes)
    shards = math.prod(count for _, count in axes)
    return x.reshape(split).transpose(order).reshape(shards, -1)


def from_shards(parts: jax.Array, shape: Sequence[int], axes: ShardAxes) -> jax.Array:
    """Returns the array whose shards `to_shards` gave."""
    split, order = _split(shape, axes)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return parts.reshape([split[i] for i in order]).transpose(inverse).reshape(tuple(shape))


def _split(shape: Sequence[int], axes: ShardAxes) -> tuple[list[int], list[int]]:
    """Returns (shape with each split axis as (parts, rest), permutation that puts the parts first)."""
    split, firsts, others = [], dict[int, int](), []
    for axis, size in enumerate(shape):
        for number, (_, count) in ((i, c) for i, c in enumerate(axes) if c[0] == axis):
            firsts[number] = len(split)
            split.append(count)
            size //= count
        others.append(len(split))
        split.append(size)
    return split, [*(firsts[i] for i in range(len(axes))), *others]

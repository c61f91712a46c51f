"""How a parameter's elements are dealt out to shards: along the axes that its own sharding splits."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import PartitionSpec as P

from jaxquant.numerics.sharding import names
from jaxquant.optim.codecs import BLOCK

# For each axis of the shards, in order: the array's axis that it cuts, and into how many parts.
ShardAxes = tuple[tuple[int, int], ...]
Spec = Callable[[str, tuple[int, ...]], P]  # of a parameter's path and shape


def shard_axes_of(shape: Sequence[int], spec: P, shards: Mapping[str, int]) -> ShardAxes | None:
    """How an array is cut into shards of which each device holds its own elements already.

    Each axis of the shards cuts the axis that `spec` gives it, or where `spec` does not name it, the longest
    that it divides.

    Args:
        shape: of the array.
        spec: of its sharding.
        shards: how many there are along each axis of a mesh.

    Returns:
        The cut, or None where one of them divides no axis, or the parts are smaller than a block.

    >>> cut_of((64, 96), P(None, "fsdp"), {"fsdp": 4, "tensor": 2})
    ((1, 4), (0, 2))
    >>> cut_of((63, 5), P(), {"fsdp": 4}) is None
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
    """The parts of an array, each in row-major order, [shards, elements of each].

    >>> dealt(jax.numpy.arange(8).reshape(2, 4), ((1, 2),))
    Array([[0, 1, 4, 5],
           [2, 3, 6, 7]], dtype=int32)
    """
    split, order = _split(x.shape, axes)
    shards = math.prod(count for _, count in axes)
    return x.reshape(split).transpose(order).reshape(shards, -1)


def from_shards(parts: jax.Array, shape: Sequence[int], axes: ShardAxes) -> jax.Array:
    """The array whose parts `dealt` gave."""
    split, order = _split(shape, axes)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return parts.reshape([split[i] for i in order]).transpose(inverse).reshape(tuple(shape))


def _split(shape: Sequence[int], axes: ShardAxes) -> tuple[list[int], list[int]]:
    """(the shape with each cut axis as its parts and what is left of it, the order with the parts first)."""
    split, firsts, others = [], dict[int, int](), []
    for axis, size in enumerate(shape):
        for number, (_, count) in ((i, c) for i, c in enumerate(axes) if c[0] == axis):
            firsts[number] = len(split)
            split.append(count)
            size //= count
        others.append(len(split))
        split.append(size)
    return split, [*(firsts[i] for i in range(len(axes))), *others]

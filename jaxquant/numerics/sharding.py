"""Explicit sharding: what is computed where each array's type says how it is split.

Under a mesh with axes of the type Explicit, `jax.make_mesh`'s default, the sharding of a result follows from
its operands', and where several are possible, as after a reshape or a sum over a split axis, JAX refuses.
Groups, blocks and packed bits are such reshapes.  So whole operations are computed with the axes as Auto,
where the compiler decides, and their results get the sharding that the operation is known to have.
Derivatives come back in the operands' own shardings.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Result = TypeVar("Result")


def call_with_auto_axes(
    function: Callable[..., Result], arguments: Sequence[Any], specs: Callable[[], Any]
) -> Result:
    """Returns function(*arguments), where axes of the type Explicit are the compiler's to use.

    Without such axes it is that call and nothing else, in the program too.

    Args:
        function: of pytrees, whose arrays all come in by `arguments`.
        arguments: pytrees.
        specs: gives the results' PartitionSpecs, a tree or a prefix of one; called where there are such axes.

    >>> call_with_auto_axes(lambda x: x.reshape(2, 3), (jax.numpy.zeros(6),), PartitionSpec).shape
    (2, 3)
    """
    leaves, structure = jax.tree.flatten(arguments)
    places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]
    arrays = [leaves[i] for i in places]
    mesh = explicit_mesh(*arrays)
    if mesh is None:
        return function(*arguments)

    def inside(*arrays: jax.Array) -> Result:
        given = dict(zip(places, arrays, strict=True))
        whole = [given.get(i, x) for i, x in enumerate(leaves)]
        return function(*jax.tree.unflatten(structure, whole))

    out = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs(),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    computed: Any = jax.sharding.auto_axes(inside, axes=explicit_axes(mesh), out_sharding=out)
    if AxisType.Manual in mesh.axis_types:
        # What a derivative keeps leaves a shard_map and comes back with Explicit axes, where Auto ones are
        # wanted, and JAX refuses.  Computed again, it is kept nowhere.
        computed = jax.checkpoint(computed)
    return computed(*arrays)


def explicit_mesh(*arrays: Any) -> Any:
    """Returns the mesh that is set here, or else the arrays', if axes of it are Explicit; None otherwise."""
    mesh = jax.sharding.get_abstract_mesh()
    others = (jax.typeof(x).sharding.mesh for x in arrays)
    while mesh.empty:
        mesh = next(others, None)
        if mesh is None:
            return None
    return mesh if explicit_axes(mesh) else None


def explicit_axes(mesh: Any) -> tuple[str, ...]:
    """Returns a mesh's axes of the type Explicit."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def spec_of(x: jax.Array, shape: Sequence[int] | None = None) -> PartitionSpec:
    """Returns an array's PartitionSpec; for another shape, only along the axes that still divide evenly.

    Args:
        x: the array.
        shape: None, or a shape of the same rank, such as that of its scales.
    """
    sharding = jax.typeof(x).sharding
    if shape is None:
        return sharding.spec
    sizes = sharding.mesh.shape

    def kept(part: Any, n: int) -> Any:
        count = 1
        for name in names(part):
            count *= sizes[name]
        return part if n % count == 0 else None

    return PartitionSpec(*map(kept, sharding.spec, shape))


def names(part: Any) -> tuple[str, ...]:
    """Returns the mesh's axes along which one axis of an array is split."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def drop_repeated(parts: Sequence[Any]) -> PartitionSpec:
    """Drops parts whose mesh axes occur earlier: a mesh axis splits at most one axis of an array."""
    used: set[str] = set()
    found = []
    for part in parts:
        kept = None if used & set(names(part)) else part
        used |= set(names(kept))
        found.append(kept)
    return PartitionSpec(*found)

"""Sharding rules for language and vision models and their optimizers' state.

The mesh has the axes ``data``, ``fsdp`` and ``tensor``.  A batch's rows are spread over data and fsdp.  Of a
parameter, the axis that `_TENSOR` names is split over tensor, as Megatron does it (Shoeybi et al. 2019, arXiv
1909.08053), and the largest other one over fsdp (Rajbhandari et al. 2020, arXiv 1910.02054).  Optimizer state
lies as the parameter that it is of; state in pages is cut into shards as its parameter is, over fsdp and
tensor.  Numbers agree between layouts to float accumulation.
"""

import contextlib
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.optim import QuantizedState
from jaxquant.optim.state import layout

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))  # of a batch, and of activations

# From a parameter's path to the axis that tensor splits, counted from the last: heads and hidden units on
# their way out and, after them, in; the vocabulary.
_TENSOR = (
    (r"(query|key|value|gate|up|head)/(kernel|bias)", -1),
    (r"(out|down)/kernel", -2),
    (r"embed/embedding", -2),
)


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Returns a mesh over all devices with the axes (data, fsdp, tensor); one of them may be −1, "the rest".

    Args:
        data, fsdp, tensor: sizes.
        devices: all that there are where not given.

    Raises:
        ValueError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count, sizes = len(devices), [data, fsdp, tensor]
    open_ = [i for i, size in enumerate(sizes) if size == -1]
    use_mesh = int(np.prod([size for size in sizes if size != -1]))
    if len(open_) == 1 and use_mesh > 0 and count % use_mesh == 0:
        sizes[open_[0]] = count // use_mesh
    if min(sizes) < 1 or int(np.prod(sizes)) != count:
        raise ValueError(
            f"a mesh of data={data} × fsdp={fsdp} × tensor={tensor} does not cover {count} device(s) exactly"
        )
    return Mesh(np.array(devices).reshape(sizes), AXES)


def batch_size(mesh: Mesh) -> int:
    """Returns the number of parts that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def of_state(mesh: Mesh, state: Any) -> Any:
    """Returns the sharding of each array of a train state, real or abstract.

    Raises:
        ValueError: a parameter that tensor does not divide.
    """
    is_coded = lambda x: isinstance(x, QuantizedState)  # noqa: E731

    def of(path: Any, x: Any) -> Any:
        if not is_coded(x):
            return NamedSharding(mesh, spec(mesh, _name(path), x.shape))
        if x.plan.mesh is not None:
            return layout(x)
        return jax.tree.map(lambda _: NamedSharding(mesh, P()), x)

    return jax.tree_util.tree_map_with_path(of, state, is_leaf=is_coded)


def of_pages(mesh: Mesh, shards: Sequence[int] = ()) -> dict[str, Any]:
    """Returns `quantize_state`'s arguments for the sharding of state in pages.

    Args:
        mesh: whose devices share the state.
        shards: of it along fsdp and tensor; as many as the mesh has where not given.  The state's bits depend
            on them and not on the mesh, of which they are multiples.
    """
    axes = AXES[1:]
    sizes = tuple(shards) or tuple(mesh.shape[axis] for axis in axes)
    if math.prod(sizes) == 1:
        return {}
    cut = AbstractMesh((1, *sizes), AXES)
    found = {"shards": sizes, "axis": axes, "spec": functools.partial(spec, cut)}
    return found | ({"mesh": mesh} if mesh.size > 1 else {})


def spec(mesh: Mesh | AbstractMesh, name: str, shape: Sequence[int]) -> P:
    """Returns the PartitionSpec of one array.

    Args:
        mesh: with `AXES`.
        name: its path, of words with slashes between.
        shape: of it.

    Raises:
        ValueError: a parameter that tensor does not divide.

    >>> mesh = AbstractMesh((1, 4, 2), AXES)
    >>> spec(mesh, "blocks/0/attention/query/kernel", (64, 64)) == P("fsdp", "tensor")
    True
    >>> spec(mesh, "norm/scale", (3,)) == P()
    True
    """
    parts: list[str | None] = [None] * len(shape)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    axis = next((a for pattern, a in _TENSOR if re.search(rf"(^|/){pattern}(/|$)", name)), None)
    if axis is not None and tensor > 1 and len(shape) >= -axis:
        if shape[axis] % tensor:
            raise ValueError(
                f"a mesh with tensor={tensor} does not divide {name}, {tuple(shape)}, along axis {axis}"
            )
        parts[axis] = "tensor"
    free = [a for a in range(len(shape)) if parts[a] is None and shape[a] % fsdp == 0]
    free = [a for a in free if shape[a] >= fsdp]
    if fsdp > 1 and free:
        parts[max(free, key=lambda a: shape[a])] = "fsdp"
    while parts and parts[-1] is None:
        parts.pop()
    return P(*parts)


def _name(path: Any) -> str:
    """Returns a path's words with slashes between."""
    words = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
    return "/".join(words)


def use_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Sets the mesh for tracing: long integer sums then have one part for each device.

    Versions of JAX that cannot say so within a compiled function, as 0.7, add up fewer and longer parts: the
    same numbers to float32's rounding, and more bytes between devices.
    """
    use = getattr(jax.sharding, "use_abstract_mesh", None)
    return contextlib.nullcontext() if use is None else use(mesh.abstract_mesh)


def rows(x: Any, mesh: Mesh | None) -> Any:
    """Activations or a batch, their first axis spread over data and fsdp; as they are without a mesh."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, ROWS))


def share(mesh: Mesh) -> tuple[int, int]:
    """Returns (which, of how many) equal parts of a batch's rows this process's devices hold.

    Raises:
        ValueError: a mesh on which they hold no such part.
    """
    count = batch_size(mesh)
    rows = NamedSharding(mesh, ROWS).addressable_devices_indices_map((count,)).values()
    own = sorted({found[0].start or 0 for found in rows if found is not None})
    shares, rest = divmod(count, len(own))
    first, position = own[0], own[0] // len(own)
    if rest or own != list(range(position * len(own), (position + 1) * len(own))):
        raise ValueError(
            f"a mesh of {dict(mesh.shape)} gives process {jax.process_index()} the rows {own} of {count}, "
            "which are no whole part; make fsdp a multiple of a process's devices, or tensor a divisor"
        )
    assert first == position * len(own)
    return position, shares


def place(mesh: Mesh, batch: Any) -> Any:
    """Spreads a batch's rows over all devices; each process brings its `share`."""
    sharding = NamedSharding(mesh, ROWS)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

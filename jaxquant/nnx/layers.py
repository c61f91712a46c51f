"""Flax's own layers called by themselves, in shapes alone: so they say what they multiply.

A layer that is stacked with others is called in a scan over them, as models do.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant.engine.walking import Trace
from jaxquant.nnx.calls import Call, called
from jaxquant.nnx.modules import read
from jaxquant.nnx.sites import Site, sites
from jaxquant.rules import ATTENTION


@dataclasses.dataclass(frozen=True)
class Scanned:
    """A method of layers that are stacked along axes, of one after the other.

    Attributes:
        method: its name.
        axes: along which the layers are, rising; negative ones are counted from the end.
        sizes: how many along each.
    """

    method: str
    axes: tuple[int, ...]
    sizes: tuple[int, ...]

    def __call__(self, layers: nnx.Module, inputs: Any) -> Any:
        graphdef, state = nnx.split(layers)
        leaves, tree = jax.tree.flatten(state)

        def run(leaves: list[Any], axes: tuple[int, ...], sizes: tuple[int, ...]) -> Any:
            if not axes:
                return getattr(nnx.merge(graphdef, tree.unflatten(leaves)), self.method)(inputs)
            axis = axes[0]
            stacked = [-x.ndim <= axis < x.ndim and x.shape[axis] == sizes[0] for x in leaves]
            turns = [jnp.moveaxis(x, axis, 0) for x, s in zip(leaves, stacked, strict=True) if s]

            def turn(carry: None, own: list[Any]) -> tuple[None, Any]:
                parts = iter(own)
                whole = [next(parts) if s else x for x, s in zip(leaves, stacked, strict=True)]
                return carry, run(whole, tuple(a - (a >= 0) for a in axes[1:]), sizes[1:])

            return jax.lax.scan(turn, None, turns)[1]

        return run(leaves, self.axes, self.sizes)


def layer_calls(
    model: nnx.Module, path: str, first: tuple[tuple[str, str], ...]
) -> Iterator[tuple[Call, list[Any], Trace]]:
    """Calls of each of Flax's layers in a model that has weights, their arrays, and their traces.

    Methods that take other inputs than the layer's own are passed over.

    Args:
        model: an NNX model.
        path: its own, in what it is a part of.
        first: as of `jaxquant.nnx.calls.Call`.
    """
    for site in layers(model):
        for method in ("__call__", "attend"):
            found = _tried(site, method, path, first) if hasattr(site.module, method) else None
            if found is not None:
                yield found


def layers(model: nnx.Module) -> list[Site]:
    """Flax's layers in a model that have weights."""
    try:
        return [site for site in sites(model).values() if site.kind != ATTENTION]
    except ValueError:  # there are none
        return []


def _tried(
    site: Site, method: str, above: str, first: tuple
) -> tuple[Call, list[Any], Trace] | None:
    try:
        stacking = site.stacking
        shapes = list(_inputs(site, method))
    except Exception:  # settings that are not those of Flax's own
        return None
    axes, sizes, rank = stacking.axes, stacking.sizes, stacking.rank
    if not axes:
        ways: list[Any] = [method]
    else:  # biases are stacked where weights are, counted from the beginning or from the end
        ends = tuple(a - rank for a in axes)
        ways = [Scanned(method, places, sizes) for places in (axes, ends)]
    for how, inputs in itertools.product(ways, shapes):
        path = "/".join(part for part in (above, site.path) if part)
        call, arrays, _ = called(site.module, path, how, (inputs,), {}, first)
        try:
            return call, arrays, call.traced(arrays)
        except Exception:  # a method that takes something else
            continue
    return None


def _inputs(site: Site, method: str) -> Iterator[Any]:
    """Shapes of inputs that a layer takes."""
    module = site.module
    if site.kind == "embed" and method == "__call__":
        yield from (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), (1, 2)))
        return
    if site.kind in ("conv", "conv_transpose"):  # on inputs large enough for any dilation
        shapes = [(1, *(64 * n for n in module.kernel_size), module.in_features)]
    elif site.kind == "einsum":
        left, right = module.einsum_str.replace(" ", "").split("->")[0].split(",")
        sizes = dict(zip(right.replace("...", ""), module.kernel_shape, strict=False))
        shapes = [tuple(sizes.get(label, 2) for label in left.replace("...", ""))]
    elif isinstance(module, nnx.LinearGeneral):
        sizes = dict(zip(module.axis, module.in_features, strict=True)) | dict(module.batch_axis)
        rank = max(max(sizes) + 1, -min(sizes), len(sizes) + 1)
        shapes = [
            tuple(sizes.get(a, sizes.get(a - r, 2)) for a in range(r)) for r in (rank, rank + 1)
        ]
    else:
        features = module.features if site.kind == "embed" else module.in_features
        shapes = [(2, features), (1, 2, features), (1, 1, 2, features)]
    for shape in shapes:
        yield jax.ShapeDtypeStruct(shape, read(site.variable).dtype)

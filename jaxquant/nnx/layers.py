"""Flax's own layers called by themselves, in shapes alone: so they say what they multiply.

A layer that is stacked with others is called in a scan over them, as models do.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant.engine.walking import Trace
from jaxquant.nnx.calls import Call, called
from jaxquant.nnx.modules import read
from jaxquant.numerics.stacking import Stacking, candidate_axes, common_axes

# A subclass before its base: the first that fits counts.
_KINDS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose, nnx.Embed)


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


@dataclasses.dataclass(frozen=True)
class Layer:
    """One of Flax's layers.

    Attributes:
        path: with slashes.
        module: itself.
        weights: of all layers of its model: path, shape, and the shape of one layer's.
    """

    path: str
    module: Any
    weights: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]] = ()

    @property
    def variable(self) -> Any:
        """The weight's variable."""
        return self.module.embedding if isinstance(self.module, nnx.Embed) else self.module.kernel

    @property
    def shape(self) -> tuple[int, ...]:
        """One layer's weight, as the module's settings have it."""
        module = self.module
        if isinstance(module, nnx.Embed):
            return (module.num_embeddings, module.features)
        if isinstance(module, nnx.Conv | nnx.ConvTranspose | nnx.Einsum):
            return tuple(module.kernel_shape)
        if isinstance(module, nnx.LinearGeneral):
            return (*module.batch_axis.values(), *module.in_features, *module.out_features)
        return (module.in_features, module.out_features)

    @property
    def stacking(self) -> Stacking:
        """Along which axes vmap has stacked layers, where it has.

        The weight's shape beside one layer's tells; where that allows several places, the bias', and then
        that of the nearest layers; where these leave several too, the first counts.

        Raises:
            ValueError: a weight that is none of a layer's own shape, nor several of them.
        """
        whole = tuple(read(self.variable).shape)
        found = candidate_axes(whole, self.shape) if len(whole) != len(self.shape) else [()]
        if not found:
            raise ValueError(
                f"{self.path or 'the model'} has weights of shape {whole}, and one layer's is {self.shape}: "
                "they are no layers that nnx.vmap has stacked"
            )
        for rank, others in self._witnesses() if len(found) > 1 else ():
            found = common_axes(found, len(whole), others, rank) or found
        return Stacking.along(found[0], whole)

    def _witnesses(self) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
        """Returns the ranks and the candidate stacking axes of other arrays of the same layers."""
        bias, own = getattr(self.module, "bias", None), self._bias_shape()
        if bias is not None and own is not None:
            yield len(bias.shape), candidate_axes(bias.shape, own)
        parts = self.path.split("/")

        def nearness(path: str) -> int:
            pairs = zip(parts, path.split("/"), strict=False)
            return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

        for _, shape, own in sorted(self.weights, key=lambda w: nearness(w[0]), reverse=True):
            found = candidate_axes(shape, own)
            if len(found) == 1 and found != [()]:
                yield len(shape), found

    def _bias_shape(self) -> tuple[int, ...] | None:
        """Returns one layer's bias; None where the module's settings do not tell."""
        module = self.module
        if isinstance(module, nnx.Einsum):
            return None
        if isinstance(module, nnx.LinearGeneral):
            return (*module.batch_axis.values(), *module.out_features)
        return (module.out_features,) if hasattr(module, "out_features") else None


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
    for layer in layers(model):
        for method in ("__call__", "attend"):
            found = _tried(layer, method, path, first) if hasattr(layer.module, method) else None
            if found is not None:
                yield found


def layers(model: nnx.Module) -> list[Layer]:
    """Returns Flax's layers in a model."""
    found: list[Layer] = []
    weights: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for path, module in nnx.iter_graph(model):
        if isinstance(module, _KINDS):
            found.append(Layer("/".join(map(str, path)), module, weights))
            if isinstance(found[-1].variable, nnx.Variable):
                shape = tuple(read(found[-1].variable).shape)
                weights.append((found[-1].path, shape, found[-1].shape))
    return found


def _tried(
    layer: Layer, method: str, above: str, first: tuple
) -> tuple[Call, list[Any], Trace] | None:
    try:
        stacking = layer.stacking
        shapes = list(_inputs(layer, method))
    except Exception:  # settings that are not those of Flax's own
        return None
    axes, sizes, rank = stacking.axes, stacking.sizes, stacking.rank
    if not axes:
        ways: list[Any] = [method]
    else:  # biases are stacked where weights are, counted from the beginning or from the end
        ends = tuple(a - rank for a in axes)
        ways = [Scanned(method, candidate_axes, sizes) for candidate_axes in (axes, ends)]
    for how, inputs in itertools.product(ways, shapes):
        path = "/".join(part for part in (above, layer.path) if part)
        call, arrays, _ = called(layer.module, path, how, (inputs,), {}, first)
        try:
            return call, arrays, call.trace(arrays)
        except Exception:  # a method that takes something else
            continue
    return None


def _inputs(layer: Layer, method: str) -> Iterator[Any]:
    """Shapes of inputs that a layer takes."""
    module = layer.module
    if isinstance(module, nnx.Embed) and method == "__call__":
        yield from (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), (1, 2)))
        return
    if isinstance(module, nnx.Conv | nnx.ConvTranspose):  # on inputs large enough for any dilation
        shapes = [(1, *(64 * n for n in module.kernel_size), module.in_features)]
    elif isinstance(module, nnx.Einsum):
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
        features = module.features if isinstance(module, nnx.Embed) else module.in_features
        shapes = [(2, features), (1, 2, features), (1, 1, 2, features)]
    for shape in shapes:
        yield jax.ShapeDtypeStruct(shape, read(layer.variable).dtype)

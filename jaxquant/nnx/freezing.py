"""Weights of Flax's layers as the integers that they were multiplied as."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from jaxquant.functions.freezing import packed
from jaxquant.nnx.modules import KeepStored, Learned, Stored, operation_of, read, with_forward
from jaxquant.nnx.sites import Site, put, sites
from jaxquant.opaque import Owner
from jaxquant.qarray import QArray, quantize
from jaxquant.quantizer import Quantizer
from jaxquant.recipes import describe
from jaxquant.stacking import Stacking

Model = TypeVar("Model", bound=nnx.Module)


def tied(model: nnx.Module) -> list[list[Site]]:
    """The modules with weights, those that share one variable together."""
    groups: dict[int, list[Site]] = {}
    for site in sites(model).values():
        if isinstance(site.variable, nnx.Variable):
            groups.setdefault(id(site.variable), []).append(site)
    return list(groups.values())


def check_tied(model: nnx.Module, groups: Iterable[Sequence[Site]]) -> None:
    """Raises a ValueError where a shared weight cannot be stored once, for all that use it.

    Args:
        model: quantized.
        groups: of its modules, as of `tied`, whose weights are to be stored.
    """
    groups = list(groups)
    for first, *others in groups:
        for site in others:
            if not _is_stored_alike(first, site):
                raise ValueError(
                    f"{first.path} and {site.path} share one weight, which their rules would store in two "
                    f"ways: {_label(first)} and {_label(site)}; give both the same recipe, or None to both"
                )
    for path, site in _held_elsewhere(model, groups):
        raise ValueError(
            f"{path} is the weight of {site.path or 'the model'} too, and no layer's own: it would be held "
            "twice, stored and in float; have what reads it call the layer (an Embed's `attend` for a head), "
            f"or leave it in float by a rule ('{site.path}', None) before the others"
        )


def _is_stored_alike(one: Site, other: Site) -> bool:
    def how(site: Site) -> Any:
        dtype = np.dtype(site.module.dtype or read(site.variable).dtype)
        leaves, tree = jax.tree.flatten(
            (weight_quantizer(site), getattr(site.module, "mask", None))
        )
        return (site.axes, site.stacking, dtype), tree, leaves

    (*static, leaves), (*other_static, others) = how(one), how(other)
    if static != other_static:
        return False
    return all(a is b or np.array_equal(a, b) for a, b in zip(leaves, others, strict=True))


def _label(site: Site) -> str:
    operation = operation_of(site.operation)
    return f"{site.path} in " + ("float" if operation is None else describe(operation))


def _held_elsewhere(
    model: nnx.Module, groups: Sequence[Sequence[Site]]
) -> Iterator[tuple[str, Site]]:
    """Where else in a model weights are, and a module of each."""
    users = {id(group[0].variable): group[0] for group in groups}
    taken = [(s.module, s.weight, s.variable) for group in groups for s in group]
    try:
        for module, name, _ in taken:
            object.__setattr__(module, name, None)
        for path, value in nnx.iter_graph(model):
            if id(value) in users:
                yield "/".join(map(str, path)), users[id(value)]
    finally:
        for module, name, variable in taken:
            object.__setattr__(module, name, variable)


def share(group: Sequence[Site]) -> None:
    """Gives all modules of a group the first one's variable."""
    for site in group[1:]:
        setattr(site.module, site.weight, group[0].variable)


def shared_copy(model: Model) -> Model:
    """Another module tree, with variables of its own over the same arrays."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda array: array, state))


def check_weight(path: str, weight: Any) -> None:
    """Raises a ValueError for a weight with a NaN or an Inf, where its numbers are known."""
    if isinstance(weight, Tracer | jax.ShapeDtypeStruct | QArray):
        return
    if not bool(_all_finite(weight)):
        raise ValueError(f"the weights of {path or 'the model'} hold a NaN or an Inf")


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def weight_quantizer(site: Site) -> Quantizer | None:
    """How a module's weight is quantized now; None where it is not."""
    if site.variable is None:
        return None
    operation = operation_of(site.operation)
    return None if operation is None else operation.forward.rhs


def frozen_nbytes(site: Site) -> int:
    """Bytes of a module's weight once it is frozen, of which only the shapes are computed."""
    quantizer = weight_quantizer(site)
    assert quantizer is not None
    return jax.eval_shape(lambda: quantize_weight(site, quantizer)).nbytes


def quantize_weight(site: Site, quantizer: Quantizer) -> QArray:
    """A module's weight under a quantizer, packed."""
    weight, dtype = read(site.variable), site.module.dtype
    mask = getattr(site.module, "mask", None)
    # The layer multiplies in its own type, so that is what is quantized.
    static = (site.axes, site.stacking, None if dtype is None else np.dtype(dtype))
    if isinstance(weight, jax.ShapeDtypeStruct):
        weight = jnp.zeros(weight.shape, weight.dtype)  # within eval_shape, where nothing is made
    return quantize_stacked(*static, weight, mask, quantizer)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def quantize_stacked(
    axes: tuple[int, ...], stacking: Stacking, dtype: Any, weight: Any, mask: Any, quantizer: Any
) -> QArray:
    """The weight of one or several layers, quantized each by itself and packed.

    Args:
        axes: what the product sums over, in one layer's weight.
        stacking: where the layers are.
        dtype: the type that the weight is multiplied in; None for its own.
        weight: of all layers.
        mask: what it is multiplied by before, of one layer or of all; None for nothing.
        quantizer: whose own arrays, as learned steps are, are stacked as the weights are.
    """

    weight = stacking.masked(weight if dtype is None else weight.astype(dtype), mask)
    one = stacking.each(lambda weight, quantizer: packed(quantize(weight, quantizer, axes)))
    return stacking.marked(one(weight, quantizer))


def store(site: Site, weight: QArray) -> None:
    """Puts a stored weight into a module, whose product then multiplies it as it is."""
    module, operation = site.module, site.operation
    if isinstance(operation, Learned):
        operation = operation.resolved()
    put(site, _for_stored(operation))
    owner = Owner(f"{site.path}/{site.weight}".lstrip("/"))
    setattr(module, site.weight, Stored(dataclasses.replace(weight, owner=owner)))
    if getattr(module, "mask", None) is not None:
        module.mask = None  # the stored weight is masked
    is_stacked = bool(site.stacking.axes)
    scale_shape = site.stacking.own(weight.scale.shape) if is_stacked else None
    module.promote_dtype = KeepStored(module.promote_dtype, scale_shape)


def _for_stored(operation: Any) -> Any:
    """An operation that is given its weight stored, and so needs no arrays to quantize it."""
    forward = operation_of(operation).forward
    if not jax.tree.leaves(forward.rhs):
        return operation
    return with_forward(operation, dataclasses.replace(forward, rhs=None))

"""Freezing: weights become the integers that they were multiplied as."""

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from jaxquant.nnx.modules import KeepStored, Learned, Stored, operation_of, read, with_forward
from jaxquant.nnx.sites import Site, put, sites
from jaxquant.nnx.stacking import Stacking
from jaxquant.qarray import QArray, quantize
from jaxquant.quantizer import Quantizer

Model = TypeVar("Model", bound=nnx.Module)


def freeze(model: Model, *, donate: bool = False) -> Model:
    """The model for serving: every quantized weight stored as packed integers with its scales.

    Its outputs equal the quantized model's bit for bit.  Ranges and steps that were calibrated or learned
    are kept.  A frozen weight is a `Stored` variable with a `QArray`, which optimizers pass over.

    Args:
        model: as `jaxquant.nnx.quantize` made it.
        donate: free each weight's array once its integers are there, so that at no time more than one
            layer is held twice; `model`, and whatever shares its arrays, is then of no more use.

    Returns:
        A new module tree; without `donate`, `model` stays as it is.

    Raises:
        ValueError: a model in which nothing is quantized, that is frozen already, or whose precision is
            traced; weights with a NaN or an Inf; learned steps that were never calibrated.

    >>> from jaxquant.nnx import quantize
    >>> model = quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), {".*": "w4a16"})
    >>> from jaxquant.nnx.modules import read
    >>> read(freeze(model).kernel).bits_per_element
    4.5
    """
    model = shared_copy(model)
    quantized = [s for s in sites(model).values() if weight_quantizer(s) is not None]
    if not quantized:
        raise ValueError(
            f"{type(model).__name__} has no quantized weights to freeze; call jaxquant.nnx.quantize first"
        )
    for site in quantized:
        if isinstance(read(site.variable), QArray):
            raise ValueError(f"{site.path} is frozen already")
        weight = read(site.variable)
        check_weight(site.path, weight)
        store(site, stored_weight(site))
        if donate:
            weight.delete()
    return model


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


def stored_weight(site: Site) -> QArray:
    """A module's weight as its quantized product multiplies it.

    Raises:
        ValueError: learned steps without a start; a precision that is traced.
    """
    if isinstance(site.operation, Learned):
        site.operation.resolved()
    quantizer = weight_quantizer(site)
    assert quantizer is not None
    if jax.tree.leaves(quantizer.format):
        raise ValueError(
            f"{site.path} cannot be frozen: its precision is traced, and stored numbers need static widths"
        )
    try:
        return quantize_weight(site, quantizer)
    except ValueError as error:
        raise ValueError(f"{site.path} cannot be frozen: {error}") from None


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


def packed(x: QArray) -> QArray:
    """x in as few bytes as its format's codes need."""
    element = x.element
    is_whole = np.dtype(element.dtype).itemsize * 8 == element.bits and element.dtype != jnp.int4
    return x if is_whole else x.pack()


def store(site: Site, weight: QArray) -> None:
    """Puts a stored weight into a module, whose product then multiplies it as it is."""
    module, operation = site.module, site.operation
    if isinstance(operation, Learned):
        operation = operation.resolved()
    put(site, _for_stored(operation))
    variable: Any = Stored(weight)
    if site.kind == "embed":
        module.embedding = variable
    else:
        module.kernel = variable
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

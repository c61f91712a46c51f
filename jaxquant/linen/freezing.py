"""Freezing: weights become the integers that they were multiplied as."""

from typing import Any

import jax
from flax import core
from flax import linen as nn

from jaxquant.linen.quantizing import Quantized, used_weights
from jaxquant.linen.sites import Use
from jaxquant.linen.weights import Weight, abstractly, at
from jaxquant.nnx.freezing import check_weight
from jaxquant.opaque import DirectRead


def freeze(
    quantized: Quantized, variables: Any, *inputs: Any, donate: bool = False, **options: Any
) -> Any:
    """Variables for serving: every quantized weight stored as packed integers with its scales.

    `quantized.apply` with them gives the same outputs bit for bit.  Weights that the call does not reach stay
    as they are, and so do calibrated ranges.  A frozen weight is a `QArray` in the place of its array; boxes
    with names of its axes, as of `nn.with_partitioning`, are taken off it.

    Args:
        quantized: as `jaxquant.linen.quantize` made it.
        variables: the module's; not changed.
        inputs: arguments of its call, arrays or `jax.ShapeDtypeStruct`s: the call is traced, not run.
        donate: free each weight's array once its integers are there, so that at no time more than one
            layer is held twice; `variables` are then of no more use.
        options: further arguments of `quantized.apply`.

    Raises:
        ValueError: a model in which nothing is quantized, that is frozen already, or whose precision is
            traced; layers stacked along other than leading axes; a weight that the module's own code reads
            in another way than by its layer's call; variables or inputs that do not fit the module, or
            weights with a NaN or an Inf.

    >>> from jaxquant.linen import quantize
    >>> quantized, x = quantize(nn.Dense(8), {".*": "w4a16"}), jax.numpy.ones((2, 64))
    >>> frozen = freeze(quantized, quantized.init(jax.random.key(0), x), x)
    >>> frozen["params"]["kernel"].bits_per_element
    4.5
    """
    if not isinstance(quantized, Quantized):
        raise ValueError(
            f"freeze takes what jaxquant.linen.quantize made; got {type(quantized).__name__}"
        )
    weights = used_weights(quantized, variables, *inputs, **options).values()
    if not weights:
        raise ValueError(
            f"{type(quantized.module).__name__} has no quantized weights to freeze under {quantized.rules}"
        )
    for weight in weights:
        if weight.is_stored:
            raise ValueError(f"{weight.path} is frozen already")
    frozen = core.unfreeze(variables)
    places = [_place(frozen, weight) for weight in weights]
    arrays = [
        nn.meta.unbox(place[weight.name]) for place, weight in zip(places, weights, strict=True)
    ]
    scales = {}  # of one layer's weight
    for place, weight, array in zip(places, weights, arrays, strict=True):
        stored = place[weight.name] = jax.eval_shape(weight.stored, array)
        scales[weight.path] = weight.stacking(array).own(stored.scale.shape)
    _check(quantized, scales, frozen, *inputs, **options)
    for place, weight, array in zip(places, weights, arrays, strict=True):
        check_weight(weight.path, array)
        place[weight.name] = weight.stored(array)
        if donate:
            array.delete()
    return core.freeze(frozen) if isinstance(variables, core.FrozenDict) else frozen


def _place(variables: Any, weight: Weight) -> Any:
    """What holds a weight among the variables."""
    found = at(variables.get("params", {}), weight.path)
    if found is None or weight.name not in found:
        raise ValueError(f"{weight.path} has no {weight.name} of its own among the variables")
    return found


def _check(quantized: Quantized, scales: Any, frozen: Any, *inputs: Any, **options: Any) -> None:
    """Raises a ValueError where stored weights do not take the way that arrays took through the model."""

    def watch(use: Use) -> Any:
        path, expected = use.site.path, scales.get(use.site.path)
        if expected is not None and use.rhs.scale.shape != expected:
            raise ValueError(f"{path} gets scales {use.rhs.scale.shape}, not {expected}")
        return use.lhs

    def run(variables: Any, *inputs: Any, **options: Any) -> None:
        apply = quantized.module.apply
        quantized.call(apply, variables, variables, *inputs, watch=watch, **options)

    try:
        abstractly(run, frozen, *inputs, **options)
    except DirectRead as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        raise ValueError(
            f"the stored weights cannot be applied, as where layers are stacked along another axis: {error}"
        ) from error

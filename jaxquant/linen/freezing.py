"""Freezing: weights become the integers that they were multiplied as."""

from typing import Any

from flax import core

from jaxquant.functions import freezing, quantizing
from jaxquant.linen.calls import replace_parameters
from jaxquant.linen.quantizing import Quantized, trace_call


def freeze(
    quantized: Quantized, variables: Any, *inputs: Any, donate: bool = False, **options: Any
) -> Any:
    """Returns variables for serving: every quantized weight stored as packed integers with its scales.

    `quantized.apply` with them gives the same outputs bit for bit.  Weights that the call does not reach stay
    as they are, and so do calibrated ranges.  In the place of an array is a `QArray`, or, of a weight that is
    multiplied in another way than it is held, a `jaxquant.numerics.stored.Stored`; boxes with names of its
    axes, as of `nn.with_partitioning`, are taken off it.

    Args:
        quantized: as `jaxquant.linen.quantize` made it.
        variables: the module's; not changed.
        inputs: arguments of its call, arrays or `jax.ShapeDtypeStruct`s: the call is traced, not run.
        donate: free each weight's array once its integers are there, so that at no time more than one
            layer is held twice; `variables` are then of no more use.
        options: further arguments of `quantized.apply`.

    Raises:
        ValueError: a model in which nothing is quantized, that is frozen already, or whose precision is
            traced; a weight that something else than a product reads, or that two products would store in
            two ways; variables or inputs that do not fit the module, or weights with a NaN or an Inf.

    >>> import jax
    >>> from flax import linen as nn
    >>> from jaxquant.linen import quantize
    >>> quantized, x = quantize(nn.Dense(8), {".*": "w4a16"}), jax.numpy.ones((2, 64))
    >>> frozen = freeze(quantized, quantized.init(jax.random.key(0), x), x)
    >>> frozen["params"]["kernel"].bits_per_element
    4.5
    """
    check_quantized("freeze", quantized)
    if options.get("mutable") is True:  # which would return the parameters: a use of each
        options["mutable"] = core.DenyList("params")
    trace, decisions, call, arrays = trace_call(quantized, variables, inputs, options)
    if quantized.on_unsupported == "error":
        quantizing.check(decisions)
    stored = freezing.freeze_parameters(trace.reads, decisions, call.values(arrays), donate)
    return replace_parameters(
        variables, {p: freezing.unwrap_stored(p, x) for p, x in stored.items()}
    )


def check_quantized(verb: str, quantized: Any) -> None:
    """Raises a ValueError for what `jaxquant.linen.quantize` did not make."""
    if not isinstance(quantized, Quantized):
        raise ValueError(
            f"{verb} takes what jaxquant.linen.quantize made; got {type(quantized).__name__}"
        )

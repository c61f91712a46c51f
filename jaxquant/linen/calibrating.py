"""Ranges of a Linen model's activations, found over batches and held among its variables."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import core

from jaxquant.engine.batches import check_each, check_range, fitting
from jaxquant.functions import quantizing
from jaxquant.functions.calibrating import accumulate, record_inputs
from jaxquant.linen.calls import RANGES, Call, called, check_variables, collection
from jaxquant.linen.freezing import check_quantized
from jaxquant.linen.quantizing import Quantized


def calibrate(quantized: Quantized, variables: Any, batches: Iterable[Any], **options: Any) -> Any:
    """Returns variables with fixed ranges of activations, in place of those found anew at each call.

    An activation's range is its quantizer's own calibration, the largest over all batches.  Products of one
    weight share a range, and layers under one `nn.scan` or `nn.vmap` have one each.  Quantizers whose scales
    belong to single rows or blocks of activations stay as they are, since a fixed range would not fit other
    rows; so do products of weights that are made of several parameters, as `nn.OptimizedLSTMCell` joins its.

    Args:
        quantized: as `jaxquant.linen.quantize` made it.
        variables: the module's, not frozen or frozen; ranges that are among them are found anew.
        batches: inputs like those that it will serve, each an array or a tuple of arguments.
        options: further arguments of `quantized.apply`, the same for all batches.

    Returns:
        The variables and, in the collection ``"quantization"``, a range at the path of each weight with
        ``_input_range``: the magnitude, or of an asymmetric range ``{"0": low, "1": high}``.

    Raises:
        ValueError: nothing to calibrate; no batches, or one that is empty, does not fit or has a NaN or an
            Inf; a layer that was given zeros alone.

    >>> from flax import linen as nn
    >>> from jaxquant.linen import quantize
    >>> quantized, x = quantize(nn.Dense(8), {".*": "w8a8"}), jnp.array([[1.0, -3.0]])
    >>> variables = quantized.init(jax.random.key(0), x)
    >>> float(calibrate(quantized, variables, [x, x / 2])["quantization"]["kernel_input_range"])
    3.0
    """
    check_quantized("calibrate", quantized)
    check_variables(variables)
    kept = {name: tree for name, tree in variables.items() if name != RANGES}
    run = jax.jit(functools.partial(_seen, quantized), static_argnums=0)
    found = dict[str, Any]()
    for index, arguments in check_each(batches):
        with fitting(index, arguments):
            call, _, arrays = called(kept, arguments, options)
            ranges = run(call, arrays)
        for path, use in ((path, use) for path, uses in ranges.items() for use in uses):
            found[path] = accumulate(found.get(path), use, "input_range", None)
    if not found:
        raise ValueError(
            "no activations have a range to calibrate: none is quantized per tensor under "
            f"{quantized.rules}"
        )
    for path, (total, weight) in found.items():
        check_range(path.rpartition("/")[0] or path, total, weight)
    used = {p: total for p, (total, weight) in found.items() if bool(jnp.all(weight > 0))}
    calibrated = {**core.unfreeze(kept), RANGES: collection(used)}
    return core.freeze(calibrated) if isinstance(variables, core.FrozenDict) else calibrated


def _seen(quantized: Quantized, call: Call, arrays: list[Any]) -> dict[str, Any]:
    """Returns, by weight, statistics of each of its products' activations in a call."""
    trace = call.trace(quantized.module, arrays)
    stored = quantizing.stored_among(call.origins, arrays)
    decisions = quantized.decide(call, trace, stored, {})
    how = call.origins, quantized.on_unsupported, None
    _, found = record_inputs(trace, decisions, arrays, *how)
    return found.get("input_range", {})

"""Ranges of a Linen model's activations, found over batches and held among its variables."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import core

from jaxquant.linen.quantizing import RANGES, Quantized, finds_one_range
from jaxquant.linen.sites import Use
from jaxquant.nnx.observing import check_range, checked, fitting
from jaxquant.qarray import calibrate as range_of


def calibrate(quantized: Quantized, variables: Any, batches: Iterable[Any], **options: Any) -> Any:
    """Variables with fixed ranges of activations, in place of those found anew at each call.

    An activation's range is its quantizer's own calibration, the largest over all batches.  Quantizers whose
    scales belong to single rows or blocks of activations stay as they are, since a fixed range would not fit
    other rows.  Layers under one `nn.scan` or `nn.vmap` share a range.

    Args:
        quantized: as `jaxquant.linen.quantize` made it.
        variables: the module's, not frozen or frozen; ranges that are among them are found anew.
        batches: inputs like those that it will serve, each an array or a tuple of arguments.
        options: further arguments of `quantized.apply`, the same for all batches.

    Returns:
        The variables and, in the collection ``"quantization"``, ``range`` by module path: the magnitude, or
        of an asymmetric range (low, high).

    Raises:
        ValueError: nothing to calibrate; no batches, or one that is empty, does not fit or has a NaN or an
            Inf; a layer that was given zeros alone.

    >>> from flax import linen as nn
    >>> from jaxquant.linen import quantize
    >>> quantized, x = quantize(nn.Dense(8), {".*": "w8a8"}), jnp.array([[1.0, -3.0]])
    >>> variables = quantized.init(jax.random.key(0), x)
    >>> float(calibrate(quantized, variables, [x, x / 2])["quantization"]["range"])
    3.0
    """
    if not isinstance(quantized, Quantized):
        raise ValueError(
            f"calibrate takes what jaxquant.linen.quantize made; got {type(quantized).__name__}"
        )
    if not isinstance(variables, Mapping):
        raise ValueError(
            f"variables are what the module's init gives; got {type(variables).__name__}"
        )
    found: dict[str, tuple[Any, ...]] = {}

    def add(path: str, *bounds: Any) -> np.ndarray:
        high = [np.asarray(bound) for bound in bounds]
        before = found.get(path, high)
        ends = (np.minimum, np.maximum) if len(high) == 2 else (np.maximum,)
        found[path] = tuple(end(a, b) for end, a, b in zip(ends, before, high, strict=True))
        return np.array(True)

    def watch(use: Use) -> Any:
        quantizer = use.operation.forward.lhs
        if use.lhs is None or quantizer is None or not finds_one_range(quantizer):
            return use.lhs
        bounds = jax.tree.leaves(range_of(use.lhs, quantizer, use.axes[0]))
        seen = jax.pure_callback(
            functools.partial(add, use.site.path),
            jax.ShapeDtypeStruct((), jnp.bool),
            *(bound.reshape(()) for bound in bounds),
            vmap_method="sequential",
        )
        # The layer may be within a scan, which lets nothing out but what its output depends on.
        return jnp.where(seen, use.lhs, jnp.nan)

    kept = {name: tree for name, tree in variables.items() if name != RANGES}

    @jax.jit
    def run(variables: Any, arguments: Any) -> list[jax.Array]:
        apply = quantized.module.apply
        outputs = quantized.call(apply, variables, variables, *arguments, watch=watch, **options)
        return [leaf for leaf in jax.tree.leaves(outputs) if isinstance(leaf, jax.Array)]

    for index, arguments in checked(batches):
        with fitting(index, arguments):
            jax.block_until_ready(run(kept, arguments))
    if not found:
        raise ValueError(
            "no activations have a range to calibrate: none is quantized per tensor under "
            f"{quantized.rules}"
        )
    for path, bounds in found.items():
        check_range(path, [jnp.asarray(bound) for bound in bounds])
    ranges = _nested(found)
    calibrated = {**core.unfreeze(kept), RANGES: ranges}
    return core.freeze(calibrated) if isinstance(variables, core.FrozenDict) else calibrated


def _nested(found: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Ranges by path as a collection has them."""
    tree: dict[str, Any] = {}
    for path, bounds in found.items():
        node = tree
        for name in path.split("/") if path else ():
            node = node.setdefault(name, {})
        node["range"] = jnp.asarray(bounds[0] if len(bounds) == 1 else np.stack(bounds))
    return tree

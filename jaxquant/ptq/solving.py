"""One layer of a model after another: statistics of what it is given, and its weight rounded by them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.functions.freezing import packed, stored_operand
from jaxquant.nnx.observing import Statistic
from jaxquant.numerics.qarray import QArray
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.operations.smoothed import multiplied
from jaxquant.ptq.layers import Layer, Matrices, operation_of, quantizer_of
from jaxquant.ptq.smooth import awq_scale, rescale, smoothquant_scale
from jaxquant.ptq.solvers import gptq, rtn
from jaxquant.ptq.statistics import InputStatistics, merge, statistics, update

Method = frozenset[str]


def needs_statistics(layer: Layer, method: Method) -> bool:
    """Returns whether a layer's inputs are looked at."""
    return not layer.is_table and bool(method - {"rtn", "hadamard"})


def statistics_bytes(layer: Layer, method: Method) -> int:
    """Returns bytes of the statistics of a layer's inputs."""
    if not needs_statistics(layer, method):
        return 0
    return sum(4 * m.inputs * (m.inputs + 2) * m.count for m in layer.matrices.values())


def statistic(inputs: int, method: Method) -> Statistic:
    """Returns the statistic of one matrix's inputs."""
    start = statistics(inputs, bool(method & {"gptq", "awq"}))

    def measure(rows: jax.Array, count: Any) -> Any:
        if start.products is not None and rows.shape[0] < inputs:
            return rows, count  # which are fewer numbers
        return _add_count(update(start, rows), count)

    def add(state: InputStatistics, found: Any) -> InputStatistics:
        if isinstance(found, InputStatistics):
            return merge(state, found)
        return _add_count(update(state, found[0]), state.count + found[1])

    return Statistic(start, measure, add)


def _add_count(state: InputStatistics, count: Any) -> InputStatistics:
    return dataclasses.replace(state, count=jnp.asarray(count, jnp.int32))


def check_seen(layer: Layer, states: Sequence[InputStatistics]) -> None:
    """Raises a ValueError where a layer's inputs tell nothing, or no number."""
    for state in states:
        if int(jnp.sum(state.nonfinite)):
            raise ValueError(
                f"the inputs of {layer.label} hold a NaN or an Inf on the calibration data"
            )
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state)):
            raise ValueError(
                f"the inputs of {layer.label} are so large on the calibration data that sums of their"
                " squares are beyond float32"
            )
        if int(jnp.min(state.count)) == 0:
            raise ValueError(not_called(layer))


def not_called(layer: Layer) -> str:
    return (
        f"{layer.label} is not called on the calibration data; a rule ('{layer.name}', None) leaves it in "
        "float"
    )


def solve(layer: Layer, states: Mapping[str, InputStatistics], method: Method) -> dict[str, Any]:
    """Returns a layer's stored weight, and its channel scales if the method has any.

    Args:
        layer: of which
        states: are the statistics, by how each of its weights is made; none where they are not looked at.
        method: its parts.
    """
    solved: dict[str, Any] = {}
    for place, (key, decision) in enumerate(layer.decisions.items()):
        if key not in states:
            solved[f"weight{place}"] = stored_operand(decision, layer.values)
            continue
        made = operation_of(decision).stored
        assert made is not None
        how = Matrices.of(decision), quantizer_of(decision), method, layer.is_dot
        needed = {path: layer.values[path] for path in made.paths}
        found = made.of(needed, functools.partial(_solve, *how), states[key])
        solved[f"weight{place}"] = found.pop("weight")
        solved |= found
    return solved


def _solve(
    matrices: Matrices,
    quantizer: Quantizer,
    method: Method,
    is_scaled: bool,
    weight: jax.Array,
    state: InputStatistics,
) -> dict[str, Any]:
    """Returns the stored weight of one turn, and its channel scales if the method has any."""

    def each(function: Callable[..., Any], *arguments: Any) -> Any:
        for _ in matrices.stacking.axes:
            function = jax.vmap(function)
        return function(*arguments)

    flat, scales = matrices.flat(weight), {}
    order = np.argsort(matrices.batch).tolist()  # as the weight has its matrices
    state = jax.tree.map(lambda x: _permute(x, order), state)
    if is_scaled and method & {"awq", "smoothquant"}:
        find = functools.partial(awq_scale, quantizer=quantizer)
        scale = each(find if "awq" in method else smoothquant_scale, flat, state)
        scales = {"scale": _permute(scale, matrices.batch)}
        flat = each(lambda w, s: multiplied(w, s, (0,)), flat, scale)
        state = each(rescale, state, scale)
    if "gptq" in method:
        stored = each(lambda w, s: gptq(w, s.hessian, quantizer), flat, state)
    else:
        stored = each(lambda w: rtn(w, quantizer), flat)
    return {"weight": _merge_parts(matrices, stored), **scales}


def _permute(x: jax.Array, order: Sequence[int]) -> jax.Array:
    """Returns x with its first axes in another order."""
    return jnp.transpose(x, (*order, *range(len(order), x.ndim)))


def _merge_parts(matrices: Matrices, x: QArray) -> QArray:
    """Returns stored matrices with the weight's own axes, packed."""
    own, axes, order, stacking = matrices.own, matrices.axes, matrices.order, matrices.stacking
    sizes, count, lead = [own[a] for a in order], len(axes), stacking.sizes
    back = [order.index(a) for a in range(len(own))]

    def unflatten(part: jax.Array | None) -> jax.Array | None:
        if part is None:
            return None
        rows, columns = part.shape[len(lead) :]
        shape = [*_split_groups(rows, sizes[:count]), *_split_groups(columns, sizes[count:])]
        view = part.reshape(*lead, *shape)
        view = jnp.transpose(view, (*range(len(lead)), *(len(lead) + a for a in back)))
        return stacking.back(view)

    rotation = x.hadamard
    if rotation is not None:
        rotation = (rotation[0], axes[-1] - len(own))
    qvalue, scale, zero_point, tensor_scale = map(
        unflatten, (x.qvalue, x.scale, x.zero_point, x.tensor_scale)
    )
    assert qvalue is not None
    assert scale is not None
    unpacked = QArray(qvalue, scale, zero_point, tensor_scale, x.format, x.dtype, hadamard=rotation)
    return stacking.with_layer_axes(stacking.each(packed)(unpacked))


def _split_groups(groups: int, sizes: Sequence[int]) -> list[int]:
    """Splits groups of flattened axes over the axes: one group for all, or blocks along the last."""
    if groups == 1:
        return [1] * len(sizes)
    first = math.prod(sizes[:-1])
    return [*sizes[:-1], groups // first]

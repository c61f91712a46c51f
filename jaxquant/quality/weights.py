"""Each layer's stored weights beside those that they stand for."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxquant.artifacts.plain import plain
from jaxquant.functions.freezing import wrap_stored
from jaxquant.nnx.calls import value
from jaxquant.nnx.doors import quantized_copy
from jaxquant.nnx.planning import planned
from jaxquant.numerics.qarray import QArray, dequantize
from jaxquant.numerics.stored import Stored
from jaxquant.operations.smoothed import multiplied


@dataclasses.dataclass(frozen=True)
class WeightRow:
    """One layer's stored weight ŵ beside its weight w.

    Attributes:
        path: the layer's, with its place in brackets where layers are stacked.
        gain: ⟨w, ŵ⟩ / ⟨w, w⟩: 1 where the error has no share in the direction of w, as rounding's hardly has.
        error: ‖ŵ − w‖ / ‖w‖.
        elements: of w.
    """

    path: str
    gain: float
    error: float
    elements: int


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """All layers with stored weights, in the model's order.

    Attributes:
        rows: one for each layer.
    """

    rows: tuple[WeightRow, ...]

    @property
    def worst(self) -> WeightRow:
        """The layer whose gain is farthest from 1; one that is not finite before all."""
        return max(self.rows, key=lambda row: np.nan_to_num(abs(row.gain - 1), nan=np.inf))

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as JSON has them."""
        return plain(self)

    def __str__(self) -> str:
        width = max(len(row.path) for row in self.rows)
        lines = [f"{'layer':{width}}    gain   error"]
        lines += [f"{row.path:{width}}  {row.gain:.4f}  {row.error:.4f}" for row in self.rows]
        return "\n".join(lines)


def compare_weights(reference: Any, quantized: Any) -> WeightReport:
    """Measures the error of each layer's stored weight, without data.

    A mistake in one layer's scales can be too small to show in outputs that rounding changes too; here it
    shows as a gain.  Scales of channels (`jaxquant.ptq.Smoothed`) and rotations are taken off.  In a
    Linen model each entry of a first axis with scales of its own is a row, as layers under `nn.scan` are.

    Args:
        reference: an NNX model in floating point, or a Linen model's variables.
        quantized: the same, frozen or quantized after training, without training in between.

    Raises:
        ValueError: nothing that is stored; a stored weight without its like in the reference.

    >>> from jaxquant.nnx import freeze, quantize
    >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    >>> report = compare_weights(model, freeze(quantize(model, {".*": "w8a16"})))
    >>> round(report.worst.gain, 2)
    1.0
    """
    is_nnx = isinstance(reference, nnx.Module), isinstance(quantized, nnx.Module)
    if any(is_nnx) and not all(is_nnx):
        raise ValueError(
            "compare_weights takes two NNX models, or the variables of two Linen models; got"
            f" {type(reference).__name__} and {type(quantized).__name__}"
        )
    pairs = _of_nnx(reference, quantized) if all(is_nnx) else _of_linen(reference, quantized)
    rows = [row for path, w, stored in pairs for row in _rows(path, w, stored)]
    if not rows:
        raise ValueError("no weights are stored; freeze the model first")
    return WeightReport(tuple(rows))


def _of_nnx(reference: nnx.Module, quantized: nnx.Module) -> Iterator[tuple[str, Any, Any]]:
    floats, frozen = _variables(reference), _variables(quantized)
    plan = planned(quantized_copy(reference, [(".*", "w8a16")], "float"), (), {})
    found = (d.operation for d in plan.decisions if d.operation is not None)
    operations = {o.stored.key: o for o in found if o.stored is not None}
    paths = [path for path, held in frozen.items() if isinstance(held, QArray | Stored)]
    holders = [path.rpartition("/")[0] for path in paths]
    for path in paths:
        if path not in floats or isinstance(floats[path], QArray | Stored):
            raise ValueError(f"{path} is stored, and the reference has no such weight in float")
        held, holder = frozen[path], path.rpartition("/")[0]
        label = holder if holders.count(holder) == 1 else path
        operands = wrap_stored(path, held).operands
        known = {key: operand for key, operand in operands.items() if key in operations}
        if not known or (isinstance(held, Stored) and len(known) < len(operands)):
            raise ValueError(
                f"{path} is stored as {', '.join(operands)}, which no layer of Flax's in the reference "
                "multiplies by"
            )
        for key, operand in known.items():
            yield label, *_pair(operations[key], plan.values, operand, frozen.get(f"{path}_scale"))


def _variables(model: nnx.Module) -> dict[str, Any]:
    found = nnx.to_flat_state(nnx.split(model)[1])
    return {"/".join(map(str, path)): value(leaf) for path, leaf in found}


def _pair(operation: Any, values: Mapping[str, Any], operand: QArray, scale: Any) -> Any:
    """Returns a weight with as many axes as its layers, and its stored value without channel scales."""

    def one(operand: QArray, scale: Any) -> jax.Array:
        found = dequantize(operand)
        return found if scale is None else multiplied(found, 1 / scale, operation.axes)

    for _ in operation.stored.turns:
        one = jax.vmap(one)
    needed = {path: values[path] for path in operation.stored.paths}
    return (operation.stored.of(needed), len(operation.stored.turns)), one(operand, scale)


def _of_linen(reference: Any, quantized: Any) -> Iterator[tuple[str, Any, Any]]:
    floats = _by_path(reference)
    for path, leaf in _by_path(quantized).items():
        if not isinstance(leaf, QArray | Stored):
            continue
        if path not in floats or isinstance(floats[path], QArray | Stored):
            raise ValueError(f"{path} is stored, and the reference has no such weight in float")
        operand = _as_it_is(path, leaf)
        name = path.removeprefix("params/").rpartition("/")[0] or "(the model)"
        # Of a matrix each row may have a scale; of more axes, each layer that is stacked along the first.
        is_stacked = operand.ndim > 2 and operand.scale.shape[0] == operand.shape[0] > 1
        yield name, (floats[path], int(is_stacked)), dequantize(operand)


def _as_it_is(path: str, leaf: QArray | Stored) -> QArray:
    """Returns the stored value of a parameter that is multiplied as it is, or in another type."""
    if isinstance(leaf, QArray):
        return leaf
    own = re.escape(path.removeprefix("params/"))
    is_cast = re.compile(rf"((turn|convert_element_type\[[^\]]*\])\()*{own}\)*").fullmatch
    if len(leaf.operands) != 1 or not is_cast(next(iter(leaf.operands))):
        raise ValueError(
            f"{path} is stored as {', '.join(leaf.operands) or 'a part of another weight'}, which is not how "
            "the reference holds it"
        )
    return leaf.operand


def _by_path(variables: Any) -> dict[str, Any]:
    if not isinstance(variables, Mapping):
        raise ValueError(
            "compare_weights takes NNX models, or the variables of Linen models; got"
            f" {type(variables).__name__}"
        )
    found = jax.tree.leaves_with_path(variables, is_leaf=lambda x: isinstance(x, QArray | Stored))
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in found}


def _rows(path: str, weight: Any, values: jax.Array) -> Iterator[WeightRow]:
    array, stacked = weight
    if array.shape != values.shape:
        raise ValueError(
            f"{path} is stored with shape {values.shape}, and the reference's is {array.shape}"
        )
    layers = array.shape[:stacked]
    for place in np.ndindex(layers):
        w, stored = (np.asarray(x[place], np.float64).ravel() for x in (array, values))
        square = max(float(w @ w), np.finfo(np.float64).tiny)
        error = float(np.linalg.norm(stored - w)) / square**0.5
        label = "".join(f"[{i}]" for i in place)
        yield WeightRow(path + label, float(w @ stored) / square, error, w.size)

"""Folders of before rules were saved: operations in the slots of Flax's layers."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant import artifacts
from jaxquant.attention import Attention
from jaxquant.conv import ConvGeneralDilated
from jaxquant.nnx.freezing import share, shared_copy, store, tied
from jaxquant.nnx.modules import Einsum, operation_of, read
from jaxquant.nnx.sites import Site, put, sites
from jaxquant.qarray import QArray
from jaxquant.rules import ATTENTION
from jaxquant.settings import Types, check_types, types_from_array, types_of
from jaxquant.smoothed import Smoothed
from jaxquant.specification import is_operation

Model = TypeVar("Model", bound=nnx.Module)

# What belongs to a call or a run: streams of random numbers, caches, what was sown.
_OF_A_RUN = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)
_SAVED = {"variables", "operations"}
_TYPES = "types"  # folders of before they were noted have none


def load(folder: str | os.PathLike, model: Model) -> Model:
    """The model that was saved, made of the plain architecture.

    Its outputs equal the saved model's bit for bit.  Streams of random numbers, caches and intermediates
    are those of `model`; where it is abstract they start at zero.

    That `model` is the architecture that was saved is checked by the names and shapes of its variables, by
    where operations have a place, and by the types that its modules compute in (``dtype`` and
    ``preferred_element_type``; folders written before these were noted do not tell).  What no file tells is
    not checked: its code, the functions between its layers, settings such as strides or an epsilon.

    Args:
        folder: what `save` wrote.
        model: the architecture in floating point, as it was before `quantize`, with arrays or abstract
            (`nnx.eval_shape`); it is left as it is, and its numbers and their types do not matter.

    Returns:
        A new module tree with the folder's arrays, in their own types, and operations.

    Raises:
        ValueError: a folder that is not whole, or not of an NNX model; a model that is quantized, or whose
            modules, variables, shapes or types to compute in are not those of the saved one.
    """
    tree, _ = artifacts.load(folder)
    if not isinstance(tree, Mapping) or set(tree) - {_TYPES} != _SAVED:
        raise ValueError(f"{folder} is not of an NNX model")
    values = _flat(tree["variables"], lambda value: isinstance(value, QArray | jax.Array))
    operations = _flat(tree["operations"], is_operation)
    model = shared_copy(model)
    by_slot = {_slot_path(site): site for site in _slotted(model)}
    for site in by_slot.values():
        if _is_quantized(site):
            raise ValueError(f"{site.path} is quantized; load takes the architecture in float")
    if unknown := sorted(set(operations) - set(by_slot)):
        raise ValueError(f"{folder} has operations where the model has no place: {_few(unknown)}")
    if _TYPES in tree:
        check_types(_types(model), types_from_array(tree[_TYPES]))
    for path, operation in operations.items():
        _install(by_slot[path], operation)
    for group in tied(model):
        _store(group, values)
    return _filled(model, values, str(folder))


def _types(model: nnx.Module) -> Types:
    """The types that each module computes in, by path."""
    modules = (pair for pair in nnx.iter_graph(model) if isinstance(pair[1], nnx.Module))
    found = {"/".join(map(str, path)): types_of(module) for path, module in modules}
    return {path: types for path, types in found.items() if types}


def _is_quantized(site: Site) -> bool:
    operation = site.operation
    is_ours = isinstance(operation, Attention | Einsum | Smoothed)
    return is_ours or operation_of(operation) is not None


def _slotted(model: nnx.Module) -> list[Site]:
    """The modules with a place for an operation."""
    return [site for site in sites(model).values() if site.kind != "conv_transpose"]


def _slot_path(site: Site) -> str:
    return f"{site.path}/{site.slot}".strip("/")


def _weight_path(site: Site) -> str:
    return f"{site.path}/{site.weight}".strip("/")


def _install(site: Site, operation: Any) -> None:
    wanted = {"conv": ConvGeneralDilated, ATTENTION: Attention}.get(site.kind)
    others = (ConvGeneralDilated, Attention)
    if not isinstance(operation, wanted) if wanted else isinstance(operation, others):
        raise ValueError(
            f"{site.path} is of kind {site.kind}, which takes no {type(operation).__name__}"
        )
    put(site, Einsum(operation) if site.kind == "einsum" else operation)


def _store(group: Sequence[Site], values: Mapping[str, Any]) -> None:
    """Puts a stored weight into the modules that share it, where the saved ones have one."""
    paths = {_weight_path(site): site for site in group}
    found = {p: values[p] for p in paths if isinstance(values.get(p), QArray)}
    if not found:
        return
    for path, site in paths.items():
        if operation_of(site.operation) is None:
            raise ValueError(f"{site.path} has a stored weight and no operation that multiplies it")
        weight = found.get(path, next(iter(found.values())))
        _check_shape(path, weight.shape, read(site.variable).shape)
        store(site, weight)
    if len(found) == 1:  # folders of before weights were shared have one for each
        share(group)


def _variables(model: nnx.Module) -> list[tuple[str, Any]]:
    """Variables by path, without those of a run and of operations, which are saved by themselves."""
    slots = [_slot_path(site) for site in _slotted(model)]
    found = []
    for path, leaf in nnx.to_flat_state(nnx.split(model)[1]):
        name = "/".join(map(str, path))
        if not isinstance(leaf, _OF_A_RUN) and not _is_within(name, slots):
            found.append((name, leaf))
    return found


def _is_within(name: str, slots: list[str]) -> bool:
    return any(name == slot or name.startswith(f"{slot}/") for slot in slots)


def _value(leaf: Any) -> Any:
    return read(leaf) if isinstance(leaf, nnx.Variable) else leaf


def _filled(model: Model, values: Mapping[str, Any], folder: str) -> Model:
    """The model with the values in its variables."""
    wanted = {name for name, leaf in _variables(model) if _value(leaf) is not None}
    if missing := sorted(wanted - set(values)):
        raise ValueError(f"{folder} lacks the model's {_few(missing)}")
    if extra := sorted(set(values) - wanted):
        raise ValueError(f"{folder} has what the model does not: {_few(extra)}")
    graphdef, state = nnx.split(model)
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        if name in values:
            leaf = _with_value(name, leaf, values[name])
        elif isinstance(leaf, _OF_A_RUN):
            leaf = jax.tree.map(_started, leaf)
        filled.append((path, leaf))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _with_value(name: str, leaf: Any, value: Any) -> Any:
    if not isinstance(value, QArray):
        _check_shape(name, value.shape, _value(leaf).shape)
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def _started(value: Any) -> Any:
    """What is of a run as it starts, where the model is abstract."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jnp.zeros(value.shape, value.dtype)  # of a key, jax.random.key(0)
    return value


def _check_shape(name: str, saved: Any, wanted: Any) -> None:
    if tuple(saved) != tuple(wanted):
        raise ValueError(
            f"{name} has shape {tuple(wanted)} here, and was saved with {tuple(saved)}"
        )


def _few(paths: list[str], most: int = 5) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if paths[most:] else "")


def _flat(tree: Any, is_leaf: Callable[[Any], bool], path: str = "") -> dict[str, Any]:
    if is_leaf(tree):
        return {path: tree}
    if not isinstance(tree, Mapping):
        raise ValueError(f"what is saved as {path} is a {type(tree).__name__}, which is none there")
    found = {}
    for key, value in tree.items():
        found |= _flat(value, is_leaf, f"{path}/{key}".strip("/"))
    return found

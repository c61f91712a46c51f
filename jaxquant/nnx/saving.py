"""NNX models on disk, quantized or frozen: their variables and rules, put into the architecture again."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from jaxquant import artifacts
from jaxquant.artifacts.plain import plain
from jaxquant.artifacts.rule_files import rule_tree, rules_from
from jaxquant.artifacts.settings import (
    Types,
    check_types,
    types_from_array,
    types_of,
    types_to_array,
)
from jaxquant.functions.saving import (
    check_shape,
    describe_stored,
    few,
    flat,
    load_stored,
    nested,
    unsupported_of,
)
from jaxquant.nnx.calls import DOOR, OF_A_STATE, at, state_part, value
from jaxquant.nnx.doors import door_of, install, modules, on_unsupported_of, rules_within
from jaxquant.nnx.modules import (
    Adapter,
    AdapterGain,
    ChannelScale,
    DelayedScales,
    InputRange,
    StepSize,
)
from jaxquant.nnx.modules import Stored as StoredWeight
from jaxquant.nnx.quantizing import coverage
from jaxquant.nnx.storing import holder_of, replace_parameters
from jaxquant.numerics.opaque import Owner
from jaxquant.numerics.qarray import QArray
from jaxquant.numerics.stored import Stored

Model = TypeVar("Model", bound=nnx.Module)

# What belongs to a call or a run: streams of random numbers, caches, what was sown.
_OF_A_RUN = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)
_SAVED = {"variables", "rules", "stored", "types", "on_unsupported"}
_OPTIONAL = {
    "types",
    "on_unsupported",
}  # not in folders of earlier versions, or where it is "error"
_STATES = {
    "input_range": InputRange,
    "input_step": StepSize,
    "step": StepSize,
    "scale": ChannelScale,
    "lora_a": Adapter,
    "lora_b": Adapter,
    "lora_gain": AdapterGain,
}


def save(
    folder: str | os.PathLike,
    model: nnx.Module,
    card: artifacts.Card | None = None,
    *,
    format: Literal["safetensors", "orbax"] = "safetensors",
) -> None:
    """Writes a frozen model, or a quantized one, as a new folder (`jaxquant.artifacts`).

    Saved are all variables, stored weights as their integers, ranges, steps and scales of channels among
    them, and the rules with their recipes.  The types that modules compute in are noted beside them, for
    `load` to compare.  Streams of random numbers, caches of keys and values and intermediates are not saved.

    Args:
        folder: where; nothing is there yet.
        model: as `freeze` or `quantize` made it.
        card: what it is.  Its coverage and calibrated ranges are filled in where it states none.
        format: of the arrays: a safetensors file, or an Orbax checkpoint.

    Raises:
        ValueError: nothing is quantized; a recipe with a function that a file has no name for; a rule's
            expression that is not matched in a rule of a file; ranges by delayed scaling; a folder that
            exists.
    """
    rules = rules_within(model) if isinstance(model, nnx.Module) else []
    if not rules:
        raise ValueError(
            f"nothing in this {type(model).__name__} is quantized; call jaxquant.nnx.quantize first"
        )
    variables = dict[str, Any]()
    for name, leaf in _variables(model):
        held = value(leaf)
        if isinstance(leaf, DelayedScales):
            raise ValueError(
                f"{name} are ranges that a training run carries from step to step, which no folder holds; "
                "checkpoint nnx.state(model), or quantize with fp8_train before saving"
            )
        is_pair = isinstance(leaf, OF_A_STATE) and isinstance(held, tuple)
        own = {f"{name}/{i}": part for i, part in enumerate(held)} if is_pair else {name: held}
        variables |= {n: x for n, x in own.items() if x is not None}
    variables, stored = describe_stored(variables)
    tree = {
        "variables": nested(variables),
        "rules": {i: rule_tree(rule) for i, rule in enumerate(rules)},
        "stored": stored,
        "types": types_to_array(_types(model)),
    }
    if (unsupported := on_unsupported_of(model)) != "error":
        tree["on_unsupported"] = np.frombuffer(unsupported.encode(), np.uint8)
    artifacts.save(folder, tree, _filled_card(card, model), format=format)


def load(folder: str | os.PathLike, model: Model) -> Model:
    """Returns the model that was saved, made of the plain architecture.

    Its outputs equal the saved model's bit for bit, in the mode that `model` is in: call `.eval()` where
    dropout must be off.  Streams of random numbers, caches and intermediates are those of `model`; where it
    is abstract they start at zero.

    That `model` is the architecture that was saved is checked by the names and shapes of its variables and
    by the types that its modules compute in (``dtype`` and ``preferred_element_type``).  What no file tells
    is not checked: its code, the functions between its layers, settings such as strides or an epsilon.
    A frozen weight that the code multiplies in another way than it was stored for is an error of the call.

    Args:
        folder: what `save` wrote.
        model: the architecture in floating point, as it was before `quantize`, with arrays or abstract
            (`nnx.eval_shape`); it is left as it is, and its numbers and their types do not matter.

    Returns:
        A new module tree with the folder's arrays, in their own types, and its rules.

    Raises:
        ValueError: a folder that is not whole, not of an NNX model, or of before rules were saved; a model
            that is quantized, or whose modules, variables, shapes or types to compute in are not those of the
            saved one.
    """
    tree, _ = artifacts.load(folder)
    for path, module in modules(model):
        if door_of(module) is not None:
            raise ValueError(
                f"{path or 'the model'} is quantized; load takes the architecture in float"
            )
    if isinstance(tree, Mapping) and "operations" in tree:
        raise ValueError(
            f"{folder} was written by a jaxquant from before 0.1.0, which saved an operation for each layer "
            "and no rules; save the model again, of the weights that it was made of, with this version"
        )
    if not isinstance(tree, Mapping) or set(tree) | _OPTIONAL != _SAVED:
        raise ValueError(f"{folder} is not of an NNX model")
    values: dict[str, Any] = flat(tree["variables"])
    stored = load_stored(str(folder), tree["stored"], values)
    if "types" in tree:
        check_types(_types(model), types_from_array(tree["types"]))
    model = _filled(model, values, stored, str(folder))
    rules = rules_from(str(folder), tree["rules"])
    unsupported = unsupported_of(str(folder), tree)
    install(model, [rule._replace(is_earlier=True) for rule in rules], unsupported)
    return model


def _types(model: nnx.Module) -> Types:
    """Returns the types that each module computes in, by path."""
    found = {path: types_of(module) for path, module in modules(model)}
    return {path: types for path, types in found.items() if types}


def _variables(model: nnx.Module) -> list[tuple[str, Any]]:
    """Returns variables by path, without those of a run and the rules'."""
    found = nnx.to_flat_state(nnx.split(model)[1])
    return [
        ("/".join(map(str, path)), leaf)
        for path, leaf in found
        if not isinstance(leaf, _OF_A_RUN) and DOOR[1] not in path
    ]


def _filled(
    model: Model, values: dict[str, Any], stored: Mapping[str, Stored], folder: str
) -> Model:
    """Returns the model with the values in its variables, and what belongs to them beside them."""
    own = dict(_variables(model))
    states = _states(values, own)
    of_states = {name for names in states.values() for name in names}
    taken = {name: x for name, x in values.items() if name not in of_states}
    wanted = {name for name, leaf in own.items() if value(leaf) is not None}
    if missing := sorted(wanted - set(taken) - set(stored)):
        raise ValueError(f"{folder} lacks the model's {few(missing)}")
    unmade = {n: x for n, x in taken.items() if n not in wanted and _is_unmade(model, n)}
    if extra := sorted((set(taken) | set(stored)) - wanted - set(unmade)):
        raise ValueError(f"{folder} has what the model does not: {few(extra)}")
    graphdef, state = nnx.split(model)
    filled, leaves = [], {}
    for path, leaf in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        if name in stored:
            check_shape(name, stored[name].shape, value(leaf).shape)
            leaves[path] = StoredWeight(stored[name])
        elif isinstance(taken.get(name), QArray):
            check_shape(name, taken[name].shape, value(leaf).shape)
            leaves[path] = StoredWeight(dataclasses.replace(taken[name], owner=Owner(name)))
        elif name in taken:
            check_shape(name, taken[name].shape, value(leaf).shape)
            leaf = leaf.replace(taken[name]) if isinstance(leaf, nnx.Variable) else taken[name]
        elif isinstance(leaf, _OF_A_RUN):
            leaf = jax.tree.map(_started, leaf)
        filled.append((path, leaf))
    model = replace_parameters(nnx.merge(graphdef, nnx.from_flat_state(filled)), leaves)
    for name, held in unmade.items():
        setattr(at(model, name.split("/")[:-1]), name.split("/")[-1], nnx.data(held))
    for (path, part), names in states.items():
        holder = holder_of(model, path)
        if holder is None:
            raise ValueError(f"{folder} has what the model does not: {path}_{part}")
        parts = tuple(values[name] for name in names)
        held: Any = parts if len(parts) > 1 else values[names[0]]
        setattr(holder[0], f"{holder[1]}_{part}", _STATES[part](held))
    return model


def _is_unmade(model: nnx.Module, name: str) -> bool:
    """Returns whether `nnx.eval_shape` left an array abstract, as it does for one that no variable holds."""
    *above, last = name.split("/")
    try:
        module = at(model, above)
    except (AttributeError, KeyError, IndexError, TypeError):
        return False
    return isinstance(vars(module).get(last), Tracer | jax.ShapeDtypeStruct)


def _states(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[tuple[str, str], list[str]]:
    """Returns the names of values that are parts of a `State`, by the path of the weight and the part."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in (n for n in values if n not in own):
        whole = name.removesuffix("/0").removesuffix("/1")
        part = next((part for part in _STATES if whole.endswith(f"_{part}")), None)
        if part is not None and whole.removesuffix(f"_{part}") in own:
            found.setdefault((whole.removesuffix(f"_{part}"), part), []).append(name)
    return {key: sorted(names) for key, names in found.items()}


def _started(value: Any) -> Any:
    """Returns the state that a run starts with, for an abstract model."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jnp.zeros(value.shape, value.dtype)  # of a key, jax.random.key(0)
    return value


def _filled_card(card: artifacts.Card | None, model: nnx.Module) -> artifacts.Card:
    card = artifacts.Card.empty() if card is None else card
    if not isinstance(card, artifacts.Card):
        raise ValueError(f"card is a Card, such as Card.empty(); got {card!r}")
    if card.coverage is None:
        card = dataclasses.replace(card, coverage=coverage(model))
    if card.calibration is None and (ranges := _ranges(model)):
        card = dataclasses.replace(card, calibration=ranges)
    return card


def _ranges(model: nnx.Module) -> dict[str, Any]:
    """Returns calibrated ranges and steps of activations, by weight."""
    found = {}
    for name, leaf in _variables(model):
        part = state_part(name.rpartition("/")[2], leaf)
        if part in ("input_range", "input_step"):
            held = jax.tree.map(lambda v: np.asarray(v).tolist(), value(leaf))
            path = name.removesuffix(f"_{part}")
            found[path] = {part.removeprefix("input_"): plain(held)}
    return found

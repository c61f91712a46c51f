"""Linen models on disk: their variables, frozen or not, and the rules that they are applied by."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import core
from flax import linen as nn

from jaxquant import artifacts
from jaxquant.artifacts.rule_files import rule_tree, rules_from
from jaxquant.artifacts.settings import (
    Types,
    check_types,
    types_from_array,
    types_of,
    types_to_array,
)
from jaxquant.engine.rules import parse_rules
from jaxquant.functions.saving import describe_stored, flat, load_stored, nested, unsupported_of
from jaxquant.linen.calls import RANGES, abstractly, states
from jaxquant.linen.quantizing import Quantized, coverage
from jaxquant.numerics.opaque import Owner
from jaxquant.numerics.qarray import QArray
from jaxquant.numerics.stored import Stored

_SAVED = {"variables", "rules"}
_NOTES = {"types", "stored", "on_unsupported"}  # folders of before they were noted have none


def save(
    folder: str | os.PathLike,
    quantized: Quantized,
    variables: Any,
    *inputs: Any,
    card: artifacts.Card | None = None,
    format: Literal["safetensors", "orbax"] = "safetensors",
    **options: Any,
) -> None:
    """Writes a quantized model's variables and rules as a new folder (`jaxquant.artifacts`).

    Saved are all variables, stored weights as their integers and calibrated ranges among them, and the
    operation of each rule.  The types that modules compute in are noted beside them, for `load` to compare.
    Boxes with names of axes, as of `nn.with_partitioning`, are taken off.

    Args:
        folder: where; nothing is there yet.
        quantized: as `quantize` made it.
        variables: those of the model, as of `freeze`.
        inputs: arguments of its call, arrays or `jax.ShapeDtypeStruct`s: the call is traced, not run, and
            what does not fit is found before anything is written.
        card: what it is.  Its coverage, rules and calibrated ranges are filled in where it states none.
        format: of the arrays: a safetensors file, or an Orbax checkpoint.
        options: further arguments of `quantized.apply`.

    Raises:
        ValueError: variables that the model cannot be applied with; an operation with a function that a
            file has no name for; an expression that is not matched in a rule of a file; a folder that
            exists.

    >>> import tempfile, jax
    >>> from jaxquant.linen import freeze, quantize
    >>> quantized, x = quantize(nn.Dense(8), {".*": "w4a16"}), jax.numpy.ones((2, 64))
    >>> frozen = freeze(quantized, quantized.init(jax.random.key(0), x), x)
    >>> with tempfile.TemporaryDirectory() as root:
    ...     save(f"{root}/model", quantized, frozen, x)
    ...     again, variables = load(f"{root}/model", nn.Dense(8), x)
    >>> bool((again.apply(variables, x) == quantized.apply(frozen, x)).all())
    True
    """
    if not isinstance(quantized, Quantized):
        raise ValueError(f"save takes what jaxquant.linen.quantize made; got {quantized!r}")
    variables = nn.meta.unbox(core.unfreeze(variables))
    with nn.intercept_methods(types := _CalledTypes()):
        table = coverage(quantized.module, quantized.rules, *inputs, variables=variables, **options)
    found = jax.tree.leaves_with_path(variables, is_leaf=_is_leaf)
    arrays, stored = describe_stored({_name(path): leaf for path, leaf in found})
    rules = {i: rule_tree(rule) for i, rule in enumerate(parse_rules(quantized.rules))}
    card = artifacts.Card.empty() if card is None else card
    filled = {"coverage": table, "rules": quantized.rules}
    if RANGES in variables:
        filled["calibration"] = _ranges(variables[RANGES])
    missing = {name: value for name, value in filled.items() if getattr(card, name) is None}
    card = dataclasses.replace(card, **missing)
    tree = {"variables": nested(arrays), "rules": rules, "stored": stored}
    tree["types"] = types_to_array(types.found)
    if quantized.on_unsupported != "error":
        tree["on_unsupported"] = np.frombuffer(quantized.on_unsupported.encode(), np.uint8)
    artifacts.save(folder, tree, card, format=format)


def load(
    folder: str | os.PathLike, module: nn.Module, *inputs: Any, rngs: Any = None, **options: Any
) -> tuple[Quantized, Any]:
    """Returns the quantized model and the variables that were saved, of the same module.

    Its outputs equal the saved model's bit for bit.  The rules' expressions, which are the folder's, are
    matched within a bound on time (`jaxquant.engine.expressions`).

    That `module` is the one that was saved is checked by the names and shapes of its variables, and by the
    types that the modules that both calls reach compute in (``dtype`` and ``preferred_element_type``; folders
    written before these were noted do not tell).  What no file tells is not checked: its code, the functions
    between its layers, settings such as strides or an epsilon.

    Args:
        folder: what `save` wrote.
        module: the Linen module, not bound, that was quantized.
        inputs: arguments of its call, arrays or `jax.ShapeDtypeStruct`s: `module.init` is traced, not run, to
            see that its parameters are those that were saved.
        rngs: as of `flax.linen.Module.init`.
        options: further arguments of `module.init`.

    Returns:
        The module with its rules, and the variables to apply it with, in their own types.

    Raises:
        ValueError: a folder that is not whole, or not of a Linen model; no Linen module, or one whose
            parameters, their shapes or the types to compute in are not those of the saved one.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module must be a flax.linen.Module; got {module!r}")
    tree, _ = artifacts.load(folder)
    is_saved = isinstance(tree, Mapping) and set(tree) - _NOTES == _SAVED
    if not is_saved or not isinstance(tree["variables"], Mapping):
        raise ValueError(f"{folder} is not of a Linen model")
    rules = tuple((rule.pattern, rule.value) for rule in rules_from(str(folder), tree["rules"]))
    rngs = jax.random.key(0) if rngs is None else rngs
    with nn.intercept_methods(types := _CalledTypes()):
        expected = nn.meta.unbox(abstractly(module.init, rngs, *inputs, **options))
    variables = _variables(str(folder), tree)
    _check_same(str(folder), _shapes(expected), _shapes(variables))
    if "types" in tree:
        check_types(types.found, types_from_array(tree["types"]))
    return Quantized(module, rules, unsupported_of(str(folder), tree)), variables


def _variables(folder: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables of a folder, whose stored weights know where they are from."""
    values: dict[str, Any] = flat(tree["variables"])
    stored = load_stored(folder, tree["stored"], values) if "stored" in tree else {}
    for name, held in {**values, **stored}.items():
        if _is_leaf(held):
            owner = Owner(name.partition("/")[2])  # without the collection
            values[name] = dataclasses.replace(held, owner=owner)
    return {**{name: {} for name in tree["variables"]}, **nested(values)}


class _CalledTypes:
    """Notes the types that each module that is called computes in, by path."""

    def __init__(self):
        self.found: Types = {}

    def __call__(self, call: Any, args: Any, options: Any, context: Any) -> Any:
        module = context.module
        _mark(module, self)
        # A lifted transform's class is called in its parent's scope, and the module within it in its own.
        is_own = module.scope is not None and (
            module.parent is None or module.path[-1:] == (module.name,)
        )
        if is_own and (types := types_of(module)):
            self.found.setdefault("/".join(module.path), types)
        return call(*args, **options)


def _mark(module: nn.Module, token: object) -> None:
    """Makes `nn.jit` trace its functions again: it does not know about interceptors."""
    scope = module.scope
    if scope is not None and scope.flags.get("jaxquant") is not token:
        scope.flags = {**scope.flags, "jaxquant": token}  # pyright: ignore


def _is_leaf(x: Any) -> bool:
    return isinstance(x, QArray | Stored)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _shapes(variables: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter and of what stands beside them, but for ranges, by path."""
    kept = {name: tree for name, tree in variables.items() if name != RANGES}
    found = jax.tree.leaves_with_path(kept, is_leaf=_is_leaf)
    return {_name(path): tuple(leaf.shape) for path, leaf in found}


def _check_same(folder: str, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises a ValueError unless a module has what was saved, of the same shapes."""
    if missing := sorted(set(wanted) - set(saved)):
        raise ValueError(f"{folder} lacks the module's {', '.join(missing[:5])}")
    if extra := sorted(set(saved) - set(wanted)):
        raise ValueError(f"{folder} has what the module does not: {', '.join(extra[:5])}")
    for path, shape in wanted.items():
        if saved[path] != shape:
            raise ValueError(
                f"{path} has shape {shape} in the module, and was saved with {saved[path]}"
            )


def _ranges(collection: Any) -> dict[str, Any]:
    """Returns calibrated ranges by weight, as a card has them."""
    of = lambda held: jax.tree.map(lambda x: np.asarray(x).tolist(), held)  # noqa: E731
    return {path: {"range": of(state.input_range)} for path, state in states(collection).items()}

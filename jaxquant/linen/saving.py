"""Linen models on disk: their variables, frozen or not, and the rules that they are applied by."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from flax import core
from flax import linen as nn

from jaxquant import artifacts
from jaxquant.linen.quantizing import RANGES, Quantized, coverage
from jaxquant.rules import parse_rules

_SAVED = {"variables", "rules"}


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
    operation of each rule.  Boxes with names of axes, as of `nn.with_partitioning`, are taken off.

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
            file has no name for; a folder that exists.

    >>> import tempfile, jax
    >>> from jaxquant.linen import freeze, quantize
    >>> quantized, x = quantize(nn.Dense(8), {".*": "w4a16"}), jax.numpy.ones((2, 64))
    >>> frozen = freeze(quantized, quantized.init(jax.random.key(0), x), x)
    >>> with tempfile.TemporaryDirectory() as root:
    ...     save(f"{root}/model", quantized, frozen, x)
    ...     again, variables = load(f"{root}/model", nn.Dense(8))
    >>> bool((again.apply(variables, x) == quantized.apply(frozen, x)).all())
    True
    """
    if not isinstance(quantized, Quantized):
        raise ValueError(f"save takes what jaxquant.linen.quantize made; got {quantized!r}")
    variables = nn.meta.unbox(core.unfreeze(variables))
    table = coverage(quantized.module, quantized.rules, *inputs, variables=variables, **options)
    rules = {i: _rule_tree(rule) for i, rule in enumerate(parse_rules(quantized.rules))}
    card = artifacts.Card.empty() if card is None else card
    filled = {"coverage": table, "rules": quantized.rules}
    if RANGES in variables:
        filled["calibration"] = _by_module(variables[RANGES])
    missing = {name: value for name, value in filled.items() if getattr(card, name) is None}
    card = dataclasses.replace(card, **missing)
    artifacts.save(folder, {"variables": variables, "rules": rules}, card, format=format)


def load(folder: str | os.PathLike, module: nn.Module) -> tuple[Quantized, Any]:
    """The quantized model and the variables that were saved, of the same module.

    Its outputs equal the saved model's bit for bit.

    Args:
        folder: what `save` wrote.
        module: the Linen module, not bound, that was quantized.

    Returns:
        The module with its rules, and the variables to apply it with, in their own types.

    Raises:
        ValueError: a folder that is not whole, or not of a Linen model; no Linen module.  A module whose
            variables are not those of the saved one is refused by Flax when it is applied.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module is a flax.linen.Module; got {module!r}")
    tree, _ = artifacts.load(folder)
    if not isinstance(tree, Mapping) or set(tree) != _SAVED:
        raise ValueError(f"{folder} is not of a Linen model")
    rules = tuple(_rule(tree["rules"][i]) for i in range(len(tree["rules"])))
    return Quantized(module, rules), tree["variables"]


def _rule_tree(rule: Any) -> dict[str, Any]:
    """A rule as a tree of arrays and operations: its expression as text in UTF-8."""
    expression = rule.pattern.pattern
    if rule.pattern.flags != re.compile(expression).flags:
        raise ValueError(
            f"rule {expression!r} is compiled with flags, which a file does not hold; write them into the "
            "expression, as in '(?i)head'"
        )
    tree = {"pattern": np.frombuffer(expression.encode(), np.uint8)}
    return tree if rule.value is None else {**tree, "value": rule.value}


def _rule(tree: Mapping[str, Any]) -> tuple[str, Any]:
    return bytes(np.asarray(tree["pattern"])).decode(), tree.get("value")


def _by_module(ranges: Any, path: str = "") -> dict[str, Any]:
    """Calibrated ranges by module, as a card has them."""
    found = {}
    for name, value in ranges.items():
        if isinstance(value, Mapping):
            found |= _by_module(value, f"{path}/{name}".strip("/"))
        else:
            found[path or "(the model)"] = {"range": np.asarray(value).tolist()}
    return found

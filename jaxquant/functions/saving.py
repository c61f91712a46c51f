"""Frozen parameters of a function on disk: a folder that is put into a tree of the same structure again."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import numpy as np

from jaxquant import artifacts
from jaxquant.artifacts import files
from jaxquant.artifacts.settings import text_of
from jaxquant.engine.walking import ARRAYS
from jaxquant.numerics.opaque import Owner
from jaxquant.numerics.qarray import QArray
from jaxquant.numerics.stored import Stored

__all__ = ["load", "save"]

Tree = TypeVar("Tree")
_ALONE = "parameters"  # the name of a tree that is one array


def save(
    folder: str | os.PathLike,
    parameters: Any,
    card: artifacts.Card | None = None,
    *,
    format: Literal["safetensors", "orbax"] = "safetensors",
) -> None:
    """Writes parameters as `freeze` made them as a new folder (`jaxquant.artifacts`).

    Saved are the arrays, stored ones as their integers.  The function and its rules are the caller's code.

    Args:
        folder: where; nothing is there yet.
        parameters: a pytree of arrays and `jaxquant.numerics.stored.Stored`s; other leaves, such as an
            Equinox model's functions, are not saved.
        card: what it is.
        format: of the arrays: a safetensors file, or an Orbax checkpoint.

    Raises:
        ValueError: two parameters of one path; a folder that exists; a tree without arrays.
    """
    held = dict[str, Any]()
    for name, leaf in _named(parameters):
        if isinstance(leaf, ARRAYS):
            if name in held:
                raise ValueError(f"two parameters are called {name!r}")
            held[name] = leaf
    if not held:
        raise ValueError(
            f"parameters are a tree of arrays; got none in {type(parameters).__name__}"
        )
    arrays, note = describe_stored(held)
    card = artifacts.Card.empty() if card is None else card
    artifacts.save(folder, {"parameters": nested(arrays), "stored": note}, card, format=format)


def load(folder: str | os.PathLike, parameters: Tree) -> Tree:
    """Returns the parameters that were saved, in the places of those of a tree.

    Args:
        folder: what `save` wrote.
        parameters: the function's parameters in floating point, as they were before `freeze`, with arrays or
            `jax.ShapeDtypeStruct`s; it is left as it is, and its numbers and their types do not matter.

    Returns:
        The tree with the folder's arrays, in their own types.

    Raises:
        ValueError: a folder that is not whole, or of something else; parameters of other paths or shapes.

    >>> import tempfile
    >>> import jax
    >>> from jaxquant.functions import freeze, quantize
    >>> model, x = lambda w, x: x @ w["up"], jax.numpy.ones((1, 64))
    >>> w = {"up": jax.numpy.ones((64, 8))}
    >>> with tempfile.TemporaryDirectory() as root:
    ...     save(f"{root}/model", freeze(model, {"up": "w4a16"}, w, x))
    ...     frozen = load(f"{root}/model", w)
    >>> quantize(model, {"up": "w4a16"})(frozen, x)[0, 0], frozen["up"].bits_per_element
    (Array(64., dtype=float32), 4.5)
    """
    tree, _ = artifacts.load(folder)
    if not isinstance(tree, Mapping) or set(tree) != {"parameters", "stored"}:
        raise ValueError(f"{folder} is not of a function's parameters")
    values: dict[str, Any] = flat(tree["parameters"])
    values |= load_stored(str(folder), tree["stored"], values)
    leaves, taken = [], set[str]()
    for name, leaf in _named(parameters):
        if isinstance(leaf, ARRAYS):
            taken.add(name)
            leaf = _of_shape(name, values.get(name), leaf.shape, str(folder))
        leaves.append(leaf)
    if extra := sorted(set(values) - taken):
        raise ValueError(f"{folder} has what the parameters do not: {few(extra)}")
    return jax.tree.unflatten(jax.tree.structure(parameters, is_leaf=_is_stored), leaves)


def _is_stored(x: Any) -> bool:
    return isinstance(x, Stored)


def _named(tree: Any) -> list[tuple[str, Any]]:
    """Returns the leaves of a tree by their paths, as products have them."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_stored)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    return [(name or _ALONE, leaf) for name, (_, leaf) in zip(names, pairs, strict=True)]


def _of_shape(name: str, value: Any, shape: tuple[int, ...], folder: str) -> Any:
    if value is None:
        raise ValueError(f"{folder} lacks the parameter {name}")
    check_shape(name, value.shape, shape)
    return value


# ---------------------------------------------------------------------------------------------------
# What models' folders have too


def describe_stored(values: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """Returns arrays by path, those of stored parameters by operand number, and their description."""
    arrays, notes = dict[str, Any](), {}
    for name, held in values.items():
        if isinstance(held, Stored):
            dtype, shape = np.dtype(held.dtype).name, list(held.shape)
            notes[name] = {"keys": list(held.operands), "shape": shape, "dtype": dtype}
            parts = enumerate(held.operands.values())
            arrays |= {f"{name}/{i}": part for i, part in parts}
        else:
            arrays[name] = held
    return arrays, np.frombuffer(json.dumps(notes).encode(), np.uint8)


def load_stored(folder: str, note: Any, values: dict[str, Any]) -> dict[str, Stored]:
    """Returns the stored parameters among the values of a folder, which are taken out."""
    found = {}
    try:
        notes = files.parse_json(text_of(note), "the note of stored weights").items()
        for name, own in notes:
            operands = {key: values.pop(f"{name}/{i}") for i, key in enumerate(own["keys"])}
            if not all(isinstance(x, QArray) for x in operands.values()):
                raise TypeError
            shape, dtype = tuple(own["shape"]), np.dtype(own["dtype"])
            found[name] = Stored(operands, shape, dtype, Owner(name))
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{folder} notes stored weights that it does not hold") from None
    return found


def unsupported_of(folder: str, tree: Mapping[str, Any]) -> Any:
    """Returns a folder's `on_unsupported`; raises an error if the folder has none.

    Raises:
        ValueError: a folder that says something else.
    """
    found = text_of(tree["on_unsupported"]) if "on_unsupported" in tree else "error"
    if found not in ("error", "float"):
        raise ValueError(f"{folder} says {found!r} where 'error' or 'float' is expected")
    return found


def check_shape(name: str, saved: Any, wanted: Any) -> None:
    """Raises a ValueError where an array was saved with another shape."""
    if tuple(saved) != tuple(wanted):
        raise ValueError(
            f"{name} has shape {tuple(wanted)} here, and was saved with {tuple(saved)}"
        )


def few(paths: Sequence[str], most: int = 5) -> str:
    """Returns the first of some paths, and how many more there are."""
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if paths[most:] else "")


def nested(by_path: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by path as nested dictionaries.

    Raises:
        ValueError: a path that another one goes through.
    """
    tree: dict[str, Any] = {}
    for path, held in by_path.items():
        *above, last = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise ValueError(f"{path!r} is the path of one array and a part of another one's")
        node[last] = held
    return tree


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Flattens what `nested` made, by path.

    Raises:
        ValueError: something else than arrays in it.
    """
    if isinstance(tree, QArray | jax.Array):
        return {path: tree}
    if not isinstance(tree, Mapping):
        raise ValueError(f"what is saved as {path} is a {type(tree).__name__}, which is none there")
    found = {}
    for key, held in tree.items():
        found |= flat(held, f"{path}/{key}".strip("/"))
    return found

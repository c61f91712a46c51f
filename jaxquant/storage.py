"""Trees with quantized arrays as named arrays and text, for any checkpoint format.

`to_arrays` gives two flat dictionaries: arrays that every writer takes (Orbax, safetensors, npz), quantized
values packed to their bits, and a line of JSON for each entry.  `from_arrays` builds the tree again and
takes nothing on trust: another version, type or shape than was written is an error, never a cast.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.formats import Block, parse
from jaxquant.qarray import QArray

VERSION = 1
_PARTS = ("scale", "zero_point", "tensor_scale")


def to_arrays(tree: Any) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """A tree's arrays and descriptions, by path.

    Args:
        tree: nested dictionaries of arrays and `QArray`s, whose keys are strings without a slash.

    Returns:
        Arrays by name (``layer/kernel`` or, of a quantized one, ``layer/kernel/qvalue``,
        ``layer/kernel/scale`` …), and a JSON description by path.

    Raises:
        ValueError: another node than a dictionary, an array or a QArray; a key with a slash.

    >>> from jaxquant.formats import INT4
    >>> from jaxquant.qarray import quantize
    >>> from jaxquant.quantizer import Quantizer
    >>> arrays, _ = to_arrays({"w": quantize(jnp.ones((2, 16)), Quantizer(INT4))})
    >>> {name: array.nbytes for name, array in arrays.items()}
    {'w/qvalue': 16, 'w/scale': 4}
    """
    arrays: dict[str, jax.Array] = {}
    descriptions: dict[str, str] = {}
    for path, leaf in _leaves(tree):
        if isinstance(leaf, QArray):
            parts, description = _flatten(leaf)
        else:
            parts = {"": jnp.asarray(leaf)}
            description: dict[str, Any] = {"kind": "array"}
        named = {f"{path}/{name}".rstrip("/"): part for name, part in parts.items()}
        arrays.update(named)
        description["arrays"] = {
            name: [str(part.dtype), list(part.shape)] for name, part in parts.items()
        }
        descriptions[path] = json.dumps({"version": VERSION, **description}, sort_keys=True)
    return arrays, descriptions


def from_arrays(arrays: Mapping[str, Any], descriptions: Mapping[str, str]) -> Any:
    """The tree that `to_arrays` flattened.

    Raises:
        ValueError: a description that is not understood, another version, an array that is missing, not
            described, or of another type or shape than described.

    >>> from jaxquant.formats import NF4
    >>> from jaxquant.qarray import dequantize, quantize
    >>> from jaxquant.quantizer import Quantizer
    >>> tree = {"w": quantize(jnp.array([0.1, -0.9, 0.4]), Quantizer(NF4))}
    >>> dequantize(from_arrays(*to_arrays(tree))["w"])
    Array([ 0.07162227, -0.9       ,  0.39663884], dtype=float32)
    """
    tree: Any = {}
    used: set[str] = set()
    for path, text in descriptions.items():
        description = _description(path, text)
        parts = {}
        for name, (dtype, shape) in description["arrays"].items():
            full = f"{path}/{name}".rstrip("/")
            parts[name] = _checked(full, arrays, dtype, shape)
            used.add(full)
        leaf = parts[""] if description["kind"] == "array" else _rebuild(path, parts, description)
        if not path:
            tree = leaf
            continue
        node = tree
        *above, last = path.split("/")
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    if extra := sorted(set(arrays) - used):
        raise ValueError(f"arrays without a description: {', '.join(extra)}")
    return tree


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        found = []
        for key, value in tree.items():
            if not isinstance(key, str) or "/" in key or not key:
                raise ValueError(
                    f"keys are strings without a slash; got {key!r} under {path or 'the root'}"
                )
            found += _leaves(value, f"{path}/{key}".lstrip("/"))
        return found
    if isinstance(tree, QArray | jax.Array | np.ndarray | np.generic):
        return [(path, tree)]
    raise ValueError(
        "a tree to store has dictionaries, arrays and QArrays; "
        f"got {type(tree).__name__} at {path or 'the root'}"
    )


def _flatten(x: QArray) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """A quantized array's buffers in types that every writer takes, and what they mean."""
    packed = x.unpack() if x.ndim == 0 else x.pack()
    parts: dict[str, jax.Array] = {"qvalue": packed.qvalue}
    if packed.length is None:
        parts["qvalue"] = x.element.encode(x.element.load(packed.qvalue))
    for name in _PARTS:
        if (part := getattr(x, name)) is not None:
            parts[name] = part
    if isinstance(x.format, Block):
        parts["scale"] = x.format.scale.encode(x.format.scale.load(x.scale))
    if x.zero_point is not None:
        parts["zero_point"] = x.element.encode(x.element.load(x.zero_point))
    return parts, {
        "kind": "qarray",
        "format": str(x.format),
        "dtype": str(np.dtype(x.dtype)),
        "shape": list(x.shape),
        "hadamard": None if x.hadamard is None else list(x.hadamard),
        "packed": x.length is not None,
    }


def _rebuild(path: str, parts: dict[str, jax.Array], description: dict[str, Any]) -> QArray:
    format, shape = parse(description["format"]), tuple(description["shape"])
    element = format.element if isinstance(format, Block) else format
    scale = parts["scale"]
    if scale.ndim != len(shape) or any(
        g and n % g for n, g in zip(shape, scale.shape, strict=True)
    ):
        raise ValueError(
            f"{path}: scales of shape {scale.shape} do not divide an array of shape {shape}"
        )
    if isinstance(format, Block):
        scale = format.scale.store(format.scale.decode(scale))
    zero = parts.get("zero_point")
    qarray = QArray(
        parts["qvalue"] if shape else element.store(element.decode(parts["qvalue"])),
        scale,
        None if zero is None else element.store(element.decode(zero)),
        parts.get("tensor_scale"),
        format=format,
        dtype=jnp.dtype(description["dtype"]),
        hadamard=None if description["hadamard"] is None else tuple(description["hadamard"]),
        length=shape[-1] if shape else None,
    )
    if qarray.shape != shape:
        raise ValueError(f"{path}: {qarray.shape} values are stored for an array of shape {shape}")
    return qarray if description["packed"] or not shape else qarray.unpack()


def _description(path: str, text: str) -> dict[str, Any]:
    try:
        description = json.loads(text)
        version = description["version"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: the description {text!r} is not one of to_arrays") from None
    if version != VERSION:
        raise ValueError(f"{path}: stored in version {version}; this is version {VERSION}")
    wanted = {"kind", "arrays"}
    if description.get("kind") == "qarray":
        wanted |= {"format", "dtype", "shape", "hadamard", "packed"}
    if description.get("kind") not in ("array", "qarray") or not wanted <= set(description):
        raise ValueError(
            f"{path}: the description lacks {sorted(wanted - set(description)) or 'a known kind'}"
        )
    return description


def _checked(name: str, arrays: Mapping[str, Any], dtype: str, shape: list[int]) -> jax.Array:
    if name not in arrays:
        raise ValueError(f"{name} is described and not among the arrays")
    array = arrays[name]
    if str(array.dtype) != dtype or list(array.shape) != shape:
        raise ValueError(
            f"{name} is {dtype}{shape} by its description; got {array.dtype}{list(array.shape)}"
        )
    return jnp.asarray(array)

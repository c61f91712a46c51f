"""Trees with quantized arrays as named arrays and text, for any checkpoint format.

`to_arrays` gives two flat dictionaries: arrays that every writer takes (Orbax, safetensors, npz), quantized
values packed to their bits, and a line of JSON for each entry.  `from_arrays` builds the tree again;
another version, type or shape than was written, or parts that do not fit together, are an error, never a
cast.  (That the numbers themselves are those that were written is for the file format's checksums.)
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.artifacts import files
from jaxquant.formats import Block, Int, code_dtype, parse
from jaxquant.formats.names import is_named
from jaxquant.numerics.hadamard import check_block
from jaxquant.numerics.qarray import QArray

VERSION = 1
_INTEGER = re.compile(r"\[-?\d+\]")
_PARTS = ("scale", "zero_point", "tensor_scale")


def to_arrays(tree: Any) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """Returns a tree's arrays and descriptions, by path.

    Args:
        tree: nested dictionaries of arrays and `QArray`s, whose keys are strings without a slash or
            integers (as in `nnx.to_pure_dict`), written in brackets.

    Returns:
        Arrays by name (``layer/kernel`` or, of a quantized one, ``layer/kernel/qvalue``,
        ``layer/kernel/scale`` …), and a JSON description by path.

    Raises:
        ValueError: another node than a dictionary, an array or a QArray; a key with a slash; a format of
            one's own, which has no name.

    >>> from jaxquant.formats import INT4
    >>> from jaxquant.numerics.qarray import quantize
    >>> from jaxquant.numerics.quantizer import Quantizer
    >>> arrays, _ = to_arrays({"w": quantize(jnp.ones((2, 16)), Quantizer(INT4))})
    >>> {name: array.nbytes for name, array in arrays.items()}
    {'w/qvalue': 16, 'w/scale': 4}
    """
    arrays: dict[str, jax.Array] = {}
    descriptions: dict[str, str] = {}
    for path, leaf in _leaves(tree):
        if isinstance(leaf, QArray):
            parts, description = _flatten(leaf)
        elif isinstance(leaf, Mapping):
            parts, description = {}, {"kind": "empty"}
        else:
            parts = {"": _as_array(path, leaf)}
            description: dict[str, Any] = {"kind": "array"}
        named = {f"{path}/{name}".rstrip("/"): part for name, part in parts.items()}
        arrays.update(named)
        description["arrays"] = {
            name: [str(part.dtype), list(part.shape)] for name, part in parts.items()
        }
        descriptions[path] = json.dumps({"version": VERSION, **description}, sort_keys=True)
    return arrays, descriptions


def from_arrays(arrays: Mapping[str, Any], descriptions: Mapping[str, str]) -> Any:
    """Returns the tree that `to_arrays` flattened.

    Raises:
        ValueError: a description that is not understood, another version, an array that is missing, not
            described, or of another type or shape than described.

    >>> from jaxquant.formats import NF4
    >>> from jaxquant.numerics.qarray import dequantize, quantize
    >>> from jaxquant.numerics.quantizer import Quantizer
    >>> tree = {"w": quantize(jnp.array([0.1, -0.9, 0.4]), Quantizer(NF4))}
    >>> dequantize(from_arrays(*to_arrays(tree))["w"])
    Array([ 0.07162227, -0.9       ,  0.39663884], dtype=float32)
    """
    tree: Any = {}
    used: set[str] = set()
    _check_paths(descriptions)
    for path, text in descriptions.items():
        description = _description(path, text)
        parts = {}
        for name, (dtype, shape) in description["arrays"].items():
            full = f"{path}/{name}".rstrip("/")
            parts[name] = _check_array(full, arrays, dtype, shape)
            used.add(full)
        _place(tree, path, _leaf(path, parts, description))
    if extra := sorted(set(arrays) - used):
        raise ValueError(f"arrays without a description: {', '.join(extra)}")
    return tree.get("", tree) if set(tree) == {""} else tree


def _check_paths(descriptions: Any) -> None:
    """Raises a ValueError where one entry lies within another."""
    if not isinstance(descriptions, Mapping):
        raise ValueError(f"descriptions are texts by path; got {type(descriptions).__name__}")
    for path in descriptions:
        if path.count("/") >= files.DEPTH:
            raise ValueError(f"{path[:40]}… lies deeper than {files.DEPTH} levels")
        above = path
        while "/" in above:
            above = above.rsplit("/", 1)[0]
            if above in descriptions:
                raise ValueError(f"{above} is described as an entry and holds {path}")


def _place(tree: dict, path: str, leaf: Any) -> None:
    *above, last = path.split("/")
    for key in above:
        tree = tree.setdefault(_decode_key(key), {})
    tree[_decode_key(last)] = leaf


def _leaf(path: str, parts: dict[str, jax.Array], description: dict[str, Any]) -> Any:
    if description["kind"] == "empty":
        return {}
    if description["kind"] == "array":
        if set(parts) != {""}:
            raise ValueError(f"{path}: an array has one part; got {sorted(parts)}")
        return parts[""]
    return _rebuild(path, parts, description)


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        found = []
        for key, value in tree.items():
            found += _leaves(value, f"{path}/{_encode_key(key, path)}".lstrip("/"))
        return found
    if isinstance(tree, Mapping | QArray | jax.Array | np.ndarray | np.generic):
        return [(path, tree)]
    raise ValueError(
        "a tree to store has dictionaries, arrays and QArrays; "
        f"got {type(tree).__name__} at {path or 'the root'}"
    )


def _encode_key(key: Any, path: str) -> str:
    """Returns a key as a part of a path; integers in brackets, so that they come back as such."""
    if isinstance(key, int) and not isinstance(key, bool):
        return f"[{key}]"
    if not isinstance(key, str) or "/" in key or not key or _INTEGER.fullmatch(key):
        raise ValueError(
            "keys are integers, or strings without a slash that are no integer in brackets; "
            f"got {key!r} under {path or 'the root'}"
        )
    return key


def _decode_key(key: str) -> str | int:
    return int(key[1:-1]) if _INTEGER.fullmatch(key) else key


def _as_array(path: str, leaf: Any) -> jax.Array:
    array = jnp.asarray(leaf)
    if array.dtype != leaf.dtype or jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise ValueError(
            f"{path} is {leaf.dtype}, which is not stored as it is; cast it, or take key_data of a key"
        )
    return array


def _flatten(x: QArray) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Returns a quantized array's buffers in types that every writer takes, and what they mean."""
    _check_named(x.format)
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
    # Written where it is not the last, so that all else reads as it always did.
    along = {} if packed.packed_axis == -1 else {"packed_axis": packed.packed_axis}
    return parts, {
        "kind": "qarray",
        "format": str(x.format),
        "dtype": str(np.dtype(x.dtype)),
        "shape": list(x.shape),
        "hadamard": None if x.hadamard is None else list(x.hadamard),
        "packed": x.length is not None,
        **along,
    }


def _check_named(format: Any) -> None:
    if not is_named(format):
        raise ValueError(
            f"formats to store must be the library's own, which jaxquant.parse knows by name; got {format!r}"
        )


def _rebuild(path: str, parts: dict[str, jax.Array], description: dict[str, Any]) -> QArray:
    format, shape = parse(description["format"]), _shape(path, description["shape"])
    element = format.element if isinstance(format, Block) else format
    _check_parts(path, parts, format, shape)
    scale, zero = parts["scale"], parts.get("zero_point")
    along = _packed_axis(path, description.get("packed_axis", -1), shape)
    if isinstance(format, Block):
        scale = format.scale.store(format.scale.decode(scale))
    qarray = QArray(
        parts["qvalue"] if shape else element.store(element.decode(parts["qvalue"])),
        scale,
        None if zero is None else element.store(element.decode(zero)),
        parts.get("tensor_scale"),
        format=format,
        dtype=_dtype(path, description["dtype"]),
        hadamard=_rotation(path, description["hadamard"], shape),
        length=shape[along] if shape else None,
        packed_axis=along,
    )
    if qarray.shape != shape:
        raise ValueError(f"{path}: {qarray.shape} values are stored for an array of shape {shape}")
    unpacked = qarray.unpack()  # raises where the bytes are not those of so many codes
    return qarray if description["packed"] is True else unpacked


def _check_parts(path: str, parts: dict, format: Any, shape: tuple[int, ...]) -> None:
    """Raises a ValueError where the parts do not make an array of that format and shape."""
    is_block = isinstance(format, Block)
    two_levels = is_block and format.has_tensor_scale
    wanted = {"qvalue", "scale"} | ({"tensor_scale"} if two_levels else set())
    if set(parts) - ({"zero_point"} if isinstance(format, Int) else set()) != wanted:
        raise ValueError(f"{path}: {format} has parts {sorted(wanted)}; got {sorted(parts)}")
    scale = parts["scale"]
    dtype = code_dtype(format.scale.bits) if is_block else np.dtype(np.float32)
    if scale.dtype != dtype:
        raise ValueError(f"{path}: scales of {format} are {dtype}; got {scale.dtype}")
    divides = scale.ndim == len(shape) and all(
        n == g or (g and n % g == 0) for n, g in zip(shape, scale.shape, strict=True)
    )
    if not divides:
        raise ValueError(
            f"{path}: scales of shape {scale.shape} do not divide an array of shape {shape}"
        )
    if is_block and scale.size * int(np.prod(format.size)) != int(np.prod(shape)):
        raise ValueError(
            f"{path}: {scale.size} scales of blocks of {format.size} do not cover an array of shape {shape}"
        )
    if "zero_point" in parts and parts["zero_point"].shape != scale.shape:
        raise ValueError(
            f"{path}: zero points of shape {parts['zero_point'].shape}, scales of {scale.shape}"
        )
    if not two_levels:
        return
    tensor = parts["tensor_scale"].shape
    # One for the tensor, or for each of several that are stacked.
    if len(tensor) != len(shape) or any(
        t not in (1, n) for t, n in zip(tensor, shape, strict=True)
    ):
        raise ValueError(f"{path}: a tensor's scale of shape {tensor}")


def _shape(path: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{path}: a shape is a list of sizes; got {shape!r}")
    return tuple(shape)


def _dtype(path: str, name: Any) -> np.dtype:
    if name not in ("float32", "bfloat16", "float16", "float64"):
        raise ValueError(f"{path}: quantized arrays stand for a float type; got {name!r}")
    return jnp.dtype(name)


def _rotation(path: str, rotation: Any, shape: tuple[int, ...]) -> tuple[int, int] | None:
    if rotation is None:
        return None
    block = axis = 0
    try:
        block, axis = rotation
        check_block(block)
        fits = -len(shape) <= axis < len(shape) and shape[axis] % block == 0
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{path}: {rotation!r} is no (block, axis) of an array of shape {shape}")
    return block, axis


def _packed_axis(path: str, axis: Any, shape: tuple[int, ...]) -> int:
    if type(axis) is not int or (axis != -1 and not -len(shape) <= axis < len(shape)):
        raise ValueError(f"{path}: {axis!r} is no axis of an array of shape {shape}")
    return axis


def _description(path: str, text: str) -> dict[str, Any]:
    try:
        description = files.parse_json(text, path)
        version = description["version"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: the description {text!r} is not one of to_arrays") from None
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{path}: stored in version {version}; this is version {VERSION}")
    wanted = {"kind", "arrays"}
    if description.get("kind") == "qarray":
        wanted |= {"format", "dtype", "shape", "hadamard", "packed"}
    if description.get("kind") not in ("array", "qarray", "empty") or not wanted <= set(
        description
    ):
        raise ValueError(
            f"{path}: the description lacks {sorted(wanted - set(description)) or 'a known kind'}"
        )
    arrays = description["arrays"]
    if not isinstance(arrays, dict) or not all(
        isinstance(spec, list) and len(spec) == 2 for spec in arrays.values()
    ):
        raise ValueError(f"{path}: arrays are described by type and shape; got {arrays!r}")
    if not isinstance(description.get("packed", False), bool):
        raise ValueError(f"{path}: packed is true or false; got {description['packed']!r}")
    return description


def _check_array(name: str, arrays: Mapping[str, Any], dtype: str, shape: list[int]) -> jax.Array:
    if name not in arrays:
        raise ValueError(f"{name} is described and not among the arrays")
    array = arrays[name]
    if str(array.dtype) != dtype or list(array.shape) != shape:
        raise ValueError(
            f"{name} is {dtype}{shape} by its description; got {array.dtype}{list(array.shape)}"
        )
    return jnp.asarray(array)

"""The types that a model's modules compute in, which none of its arrays tells: noted, written, compared."""

import inspect
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.artifacts import files

# Flax's names for them.  Types of parameters are those of the arrays that are saved.
_NAMES = ("dtype", "preferred_element_type")
_MISSING = object()

# By path of a module and name of its setting; None where it goes by its inputs.
Types = dict[str, dict[str, str | None]]


def types_of(module: Any) -> dict[str, str | None]:
    """Returns the types that a Flax module computes in, by the name of the setting.

    >>> from flax import linen as nn
    >>> types_of(nn.Dense(8, dtype="bfloat16"))["dtype"]
    'bfloat16'
    """
    found = {}
    for name in _NAMES:
        # A property, and what Linen's setup has yet to make, are no settings.
        value = inspect.getattr_static(module, name, _MISSING)
        try:
            found[name] = None if value is None else np.dtype(value).name
        except (TypeError, ValueError):
            continue  # none, or something else of this name
    return found


def types_to_array(types: Types) -> np.ndarray:
    """Returns types as an array, which is what a file holds: JSON in UTF-8."""
    return np.frombuffer(json.dumps(types).encode(), np.uint8)


def types_from_array(array: Any) -> Types:
    """Returns the types that `types_to_array` encoded.

    Raises:
        ValueError: an array of something else.

    >>> types_from_array(types_to_array({"up": {"dtype": "bfloat16"}}))
    {'up': {'dtype': 'bfloat16'}}
    """
    found = files.parse_json(text_of(array), "the note of types")
    entries = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(types, dict) for types in entries):
        raise ValueError("the note of types has, for each module, names and types")
    return found


def text_of(array: Any) -> str:
    """Returns the text that an array of bytes holds, in UTF-8.

    Raises:
        ValueError: another array, or other bytes.

    >>> text_of(np.frombuffer(b"head", np.uint8))
    'head'
    """
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim != 1:
        raise ValueError(f"text is held as bytes in line; got {array.dtype}{list(array.shape)}")
    return array.tobytes().decode()


def check_types(here: Types, saved: Mapping[str, Any]) -> None:
    """Raises a ValueError where a module computes in another type than when it was saved.

    Modules and settings of only one side are passed over.

    >>> check_types({"up": {"dtype": None}}, {"up": {"dtype": "bfloat16"}})
    Traceback (most recent call last):
    ValueError: up has dtype None here, and was saved with bfloat16; load takes the model that was quantized
    """
    different = [
        f"{path or 'the model'} has {name} {found} here, and was saved with {saved[path][name]}"
        for path, types in here.items()
        for name, found in types.items()
        if name in saved.get(path, {}) and saved[path][name] != found
    ]
    if different:
        more = f" (and {len(different) - 1} more differ)" if different[1:] else ""
        raise ValueError(f"{different[0]}{more}; load takes the model that was quantized")

"""Stored parameters as a folder holds them: their operands among its arrays, and a note of what they are."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant import files
from jaxquant.opaque import Owner
from jaxquant.qarray import QArray
from jaxquant.settings import text_of
from jaxquant.stored import Stored


def note_of(stored: Mapping[str, Stored]) -> np.ndarray:
    """What is noted beside the operands, which a folder holds as ``path/0``, ``path/1``, …: JSON in UTF-8.

    Args:
        stored: parameters by path.
    """
    notes = {
        path: {
            "keys": list(held.operands),
            "shape": list(held.shape),
            "dtype": np.dtype(held.dtype).name,
        }
        for path, held in stored.items()
    }
    return np.frombuffer(json.dumps(notes).encode(), np.uint8)


def stored_from(folder: str, note: Any, values: dict[str, Any]) -> dict[str, Stored]:
    """The stored parameters of a folder, by path.

    Args:
        folder: its name, for errors.
        note: what `note_of` made.
        values: by path, of which the operands are taken out.

    Raises:
        ValueError: a note of what is not there.
    """
    found = {}
    try:
        notes = files.parse_json(text_of(note), "the note of stored weights").items()
        for path, own in notes:
            operands = {key: values.pop(f"{path}/{i}") for i, key in enumerate(own["keys"])}
            if not all(isinstance(x, QArray) for x in operands.values()):
                raise TypeError
            found[path] = Stored(operands, tuple(own["shape"]), np.dtype(own["dtype"]), Owner(path))
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{folder} notes stored weights that it does not hold") from None
    return found

"""Operations as text and arrays, so that a file can hold them.

`to_config` writes an operation as nested dictionaries that JSON takes, with its arrays (calibrated
ranges, steps, smoothing scales) beside; `from_config` reads it back.  Formats are written by the names
that `jaxquant.parse` takes, functions and classes by their public names here.  Nothing is pickled, so that
reading runs no code of the file's, and a function without such a name cannot be written.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxquant.formats import Block, is_format, parse
from jaxquant.formats.names import is_named
from jaxquant.numerics import calibration, delayed, estimators, rounding
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.operations.attention import Attention
from jaxquant.operations.backward import BackwardOperands
from jaxquant.operations.conv import ConvGeneralDilated
from jaxquant.operations.dot import DotGeneral
from jaxquant.operations.operands import Operands
from jaxquant.operations.ragged import RaggedDot
from jaxquant.operations.smoothed import Smoothed
from jaxquant.stats import renamed_names

VERSION = 1

__getattr__ = renamed_names(
    globals(), {"describe_operation": "to_config", "operation_from": "from_config"}
)

_TYPES: dict[str, type] = {
    "Attention": Attention,
    "BackwardOperands": BackwardOperands,
    "ConvGeneralDilated": ConvGeneralDilated,
    "DotGeneral": DotGeneral,
    "Operands": Operands,
    "Quantizer": Quantizer,
    "RaggedDot": RaggedDot,
    "Smoothed": Smoothed,
    "calibration.Range": calibration.Range,
    "calibration.Step": calibration.Step,
    "calibration.delayed_absmax": delayed.delayed_absmax,
    "calibration.mse": calibration.mse,
    "calibration.percentile": calibration.percentile,
    "calibration.scaled_absmax": calibration.scaled_absmax,
    "calibration.scaled_rms": calibration.scaled_rms,
    "rounding.Eden": rounding.Eden,
}
_FUNCTIONS: dict[str, Any] = {
    "calibration.absmax": calibration.absmax,
    "calibration.gaussian": calibration.gaussian,
    "calibration.learned": calibration.learned,
    "calibration.minmax": calibration.minmax,
    "estimators.clipped": estimators.clipped,
    "estimators.lsq": estimators.lsq,
    "estimators.pact": estimators.pact,
    "estimators.straight_through": estimators.straight_through,
    "estimators.trust": estimators.trust,
    "lax.dot_general": jax.lax.dot_general,
    "rounding.dithered": rounding.dithered,
    "rounding.nearest": rounding.nearest,
    "rounding.stochastic": rounding.stochastic,
}
# A Quantizer takes any callable for these, so what is read is held to its own kind here.
_KINDS = {"calibration": "calibration.", "rounding": "rounding.", "estimator": "estimators."}


def is_operation(value: Any) -> bool:
    """Returns whether a value is of a class that `to_config` writes."""
    return type(value) in _TYPES.values()


def to_config(operation: Any) -> tuple[dict[str, Any], list[jax.Array]]:
    """Returns an operation as a dictionary that JSON takes, and the arrays that it holds.

    Args:
        operation: a `DotGeneral`, `ConvGeneralDilated`, `RaggedDot`, `Attention` or
            `jaxquant.ptq.smooth.Smoothed`, or a part of one: `Operands`, a `Quantizer`, a calibration.

    Returns:
        The description, and the arrays to which it refers by their places.

    Raises:
        ValueError: a function, class or format that has no name here; a traced precision or array.

    >>> from jaxquant.operations.recipes import recipe
    >>> description, arrays = to_config(recipe("kv8"))
    >>> description["operation"]["fields"]["kv"]["fields"]["format"], arrays
    ({'format': 'int8'}, [])
    """
    if not is_operation(operation):
        raise ValueError(_no_name("the operation", operation))
    arrays: list[jax.Array] = []
    return {"version": VERSION, "operation": _encode(operation, "", arrays)}, arrays


def from_config(description: Mapping[str, Any], arrays: Sequence[Any] = ()) -> Any:
    """Returns the operation that `to_config` wrote.

    Raises:
        ValueError: another version; a name or field that is not known, or is missing; arrays that are not
            there, or that nothing refers to; whatever the operation itself refuses.

    >>> from jaxquant.operations.recipes import recipe
    >>> from_config(*to_config(recipe("w4a16g128"))) == recipe("w4a16g128")
    True
    """
    if not isinstance(description, Mapping) or set(description) != {"version", "operation"}:
        raise ValueError(f"an operation's description has a version and it; got {description!r}")
    version = description["version"]
    if type(version) is not int or version != VERSION:
        raise ValueError(f"the operation is of version {version}; this is version {VERSION}")
    used: set[int] = set()
    operation = _decode(description["operation"], "", arrays, used)
    if not is_operation(operation):
        raise ValueError(f"the description is of no operation; got {description['operation']!r}")
    if unused := sorted(set(range(len(arrays))) - used):
        raise ValueError(f"the operation's description does not refer to its arrays {unused}")
    return operation


def _encode(value: Any, path: str, arrays: list[jax.Array]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{_at(path)} is {value}, which JSON does not hold")
        return float(value)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if isinstance(value, jax.core.Tracer):
            raise ValueError(f"{_at(path)} is traced; describe operations outside of jit")
        arrays.append(jnp.asarray(value))
        return {"array": len(arrays) - 1}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v, f"{path}[{i}]", arrays) for i, v in enumerate(value)]}
    if isinstance(value, Block) or is_format(value):
        return {"format": _format_name(value, path)}
    for name, function in _FUNCTIONS.items():
        if value is function:
            return {"function": name}
    for name, cls in _TYPES.items():
        if type(value) is cls:
            fields = {
                field.name: _encode(
                    getattr(value, field.name), f"{path}.{field.name}".lstrip("."), arrays
                )
                for field in dataclasses.fields(cls)
            }
            return {"type": name, "fields": fields}
    raise ValueError(_no_name(_at(path), value))


def _format_name(format: Any, path: str) -> str:
    """Returns a format's name, which is certain to give the format again."""
    if any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(format)):
        raise ValueError(
            f"{_at(path)} is {format!r}, whose precision is an array; what is saved has Python integers"
        )
    if not is_named(format):
        raise ValueError(
            f"{_at(path)} is {format!r}, which jaxquant.parse has no name for; the library's own formats do"
        )
    return str(format)


def _no_name(where: str, value: Any) -> str:
    named = value if inspect.isroutine(value) or isinstance(value, type) else type(value)
    name = f"{named.__module__}.{named.__qualname__}"
    return (
        f"{where} is {name}, which a file has no name for; what can be saved are the classes "
        f"{', '.join(_TYPES)} and the functions {', '.join(_FUNCTIONS)}"
    )


def _at(path: str) -> str:
    return path or "the operation"


def _decode(description: Any, path: str, arrays: Sequence[Any], used: set[int]) -> Any:
    if description is None or isinstance(description, bool | int | float | str):
        return description
    keys = set(description) if isinstance(description, Mapping) else set()
    if keys == {"array"}:
        index = description["array"]
        if type(index) is not int or not 0 <= index < len(arrays):
            raise ValueError(f"{_at(path)} is array {index!r} of {len(arrays)}")
        used.add(index)
        return arrays[index]
    if keys == {"tuple"} and isinstance(description["tuple"], list):
        parts = enumerate(description["tuple"])
        return tuple(_decode(part, f"{path}[{i}]", arrays, used) for i, part in parts)
    if keys == {"format"}:
        return parse(description["format"])
    if keys == {"function"}:
        return _lookup(_FUNCTIONS, "function", description["function"], path)
    if keys == {"type", "fields"}:
        return _decode_type(description, path, arrays, used)
    raise ValueError(f"{_at(path)} is described by {description!r}, which is not understood")


def _decode_type(description: Mapping, path: str, arrays: Sequence[Any], used: set[int]) -> Any:
    cls = _lookup(_TYPES, "class", description["type"], path)
    fields, wanted = description["fields"], {field.name for field in dataclasses.fields(cls)}
    if not isinstance(fields, Mapping) or set(fields) != wanted:
        raise ValueError(f"{_at(path)} has the fields {sorted(wanted)}; got {fields!r}")
    if cls is Quantizer:
        _check_kinds(fields, path)
    values = {
        name: _decode(part, f"{path}.{name}".lstrip("."), arrays, used)
        for name, part in fields.items()
    }
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_at(path)} is no {description['type']}: {error}") from None


def _check_kinds(fields: Mapping, path: str) -> None:
    for name, kind in _KINDS.items():
        part = fields[name]
        found = part.get("function", part.get("type")) if isinstance(part, Mapping) else part
        if not isinstance(found, str) or not found.startswith(kind):
            raise ValueError(f"{f'{path}.{name}'.lstrip('.')} is one of {kind}*; got {part!r}")


def _lookup(table: Mapping[str, Any], kind: str, name: Any, path: str) -> Any:
    if not isinstance(name, str) or name not in table:
        raise ValueError(
            f"{_at(path)} is the {kind} {name!r}, which is not known; known are {', '.join(table)}"
        )
    return table[name]

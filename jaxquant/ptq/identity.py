"""Hash models, data and functions, so that a folder's results are not reused for another call.

A function is its code, constants, defaults, the values that it closes over, and, where it is of the same
module as what is asked for, the globals that it uses.  What it reaches in other modules is known by name.
"""

import enum
import functools
import hashlib
import inspect
import reprlib
import types
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxquant.nnx.modules import read

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))
_LIBRARIES = ("builtins", "flax", "functools", "jax", "jaxlib", "jaxquant", "numpy", "optax")
# What Flax and Python keep beside an object's own attributes.
_BOOKKEEPING = ("_object__", "_pytree__", "_abc_")


def identity(what: str, value: Any) -> str:
    """Returns a hash that is the same for the same content and code, in another process too.

    An object that has a string as its attribute ``fingerprint`` is known by it.

    Args:
        what: the argument's name, for the error.
        value: arrays, containers, dataclasses, modules, functions, …

    Raises:
        ValueError: something within it has a content that cannot be told, such as an open file.

    >>> def power(n):
    ...     return lambda x: x**n
    >>> identity("loss", power(2)) == identity("loss", power(2))
    True
    >>> identity("loss", power(2)) == identity("loss", power(3))
    False
    """
    walk = _Walk(what, getattr(value, "__module__", None))
    walk.add(value)
    return walk.digest.hexdigest()


def difference(known: Any, parts: Mapping[str, str]) -> str | None:
    """Returns the first part that is another than the one that is known; None where all are alike.

    >>> difference({"model": "a", "loss": "b"}, {"model": "a", "loss": "c"})
    'loss'
    """
    known = known if isinstance(known, Mapping) else {}
    return next((name for name, found in parts.items() if known.get(name) != found), None)


class _Walk:
    """The hash of what has been walked through so far."""

    def __init__(self, what: str, home: str | None):
        self.digest = hashlib.sha256()
        root = (home or "").partition(".")[0]
        self._what, self._home = what, None if root in _LIBRARIES else home
        self._open: list[int] = []
        # Objects are held, so that no other one gets their id.
        self._known: dict[int, tuple[bytes, Any]] = {}
        self._variables: dict[int, int] = {}

    def _say(self, *words: Any) -> None:
        for word in words:
            content = word if isinstance(word, bytes) else str(word).encode()
            self.digest.update(b"%d:" % len(content) + content)

    def _all(self, kind: str, values: Iterable[Any]) -> None:
        values = list(values)
        self._say(kind, len(values))
        for value in values:
            self.add(value)

    def _named(self, items: Iterable[tuple[Any, Any]]) -> None:
        for name, value in items:
            self.add(name)
            self.add(value)
        self._say("end")

    def add(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            return self._say(type(value).__name__, repr(value))
        if id(value) in self._open:
            return self._say("around", len(self._open) - self._open.index(id(value)))
        if id(value) not in self._known:
            outer, self.digest = self.digest, hashlib.sha256()
            self._open.append(id(value))
            self._describe(value)
            self._open.pop()
            self._known[id(value)] = self.digest.digest(), value
            self.digest = outer
        return self._say(self._known[id(value)][0])

    def _describe(self, value: Any) -> None:
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            self._array(value)
        elif isinstance(given := getattr(value, "fingerprint", None), str):
            self._say("fingerprint", given)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, enum.Enum):
            self._say("enum", type(value).__qualname__, value.name)
        elif isinstance(value, jax.sharding.Mesh | jax.sharding.Sharding | jax.Device):
            self._say("layout", value)
        else:
            self._container(value)

    def _array(self, value: Any) -> None:
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            self._say("key", jax.random.key_impl(value))
            value = jax.random.key_data(value)
        array = np.asarray(value)
        if array.dtype == object:
            return self._all("objects", array.ravel().tolist())
        self._say("array", array.dtype.name, array.shape, array.tobytes())

    def _container(self, value: Any) -> None:
        if type(value) in (list, tuple):
            self._all(type(value).__name__, value)
        elif isinstance(value, set | frozenset):
            self._all("set", sorted(value, key=repr))
        elif type(value) in (dict, types.MappingProxyType):
            self._say("dict")
            self._named(value.items())
        elif isinstance(value, nnx.Variable):
            # A variable in two places is another model than two that are alike.
            self._say("variable", self._variables.setdefault(id(value), len(self._variables)))
            self._all("of", (type(value), read(value)))
        else:
            self._callable(value)

    def _callable(self, value: Any) -> None:
        if isinstance(value, types.ModuleType):
            self._say("module", value.__name__)
        elif isinstance(value, functools.partial):
            self._all("partial", (value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self._all("method", (value.__func__, value.__self__))
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif isinstance(value, property):
            self._all("property", (value.fget, value.fset))
        elif isinstance(value, staticmethod | classmethod):
            self._all(type(value).__name__, (value.__func__,))
        elif isinstance(value, types.BuiltinFunctionType):
            self._say("builtin", value.__module__, value.__qualname__)
            self.add(value.__self__)
        elif (wrapped := getattr(value, "__wrapped__", None)) is not None:
            self._all(type(value).__qualname__, (wrapped,))  # as of jax.jit
        else:
            self._object(value)

    def _function(self, function: types.FunctionType) -> None:
        cells = [_content(cell) for cell in function.__closure__ or ()]
        self._say("function", function.__module__, function.__qualname__)
        self._code(function.__code__)
        self._all("held", (function.__defaults__, function.__kwdefaults__, *cells))
        if function.__module__ == self._home:
            known = function.__globals__
            self._named((n, known[n]) for n in _names(function.__code__) if n in known)

    def _code(self, code: types.CodeType) -> None:
        self._say("code", code.co_code, code.co_names, code.co_varnames, code.co_freevars)
        self._all("constants", code.co_consts)

    def _class(self, cls: type) -> None:
        self._say("class", cls.__module__, cls.__qualname__)
        for base in cls.__mro__:
            if base.__module__ == self._home:
                self._named((n, v) for n, v in vars(base).items() if _is_own(n, v))

    def _object(self, value: Any) -> None:
        cls = type(value)
        names = [n for c in cls.__mro__ for n in _slots(c)]
        is_open = hasattr(value, "__dict__") or any("__slots__" in vars(c) for c in cls.__mro__)
        if is_open or cls is object:
            self._all("object", (cls, _items(value)))
            names = dict.fromkeys([*names, *getattr(value, "__dict__", ())])
            names = [n for n in names if hasattr(value, n) and not n.startswith(_BOOKKEEPING)]
            return self._named((name, getattr(value, name)) for name in names)
        if cls.__repr__ is object.__repr__ or " at 0x" in repr(value):
            raise ValueError(
                f"{self._what} holds {reprlib.repr(value)}, whose content cannot be told, so that what lies "
                f"in workdir might be another's; give {self._what} an attribute `fingerprint`, a string that "
                "says what it is, or give no workdir"
            )
        return self._say("repr", cls.__qualname__, repr(value))


def _items(value: Any) -> Any:
    """Returns the builtin value of an instance of a subclass of a container, number or string."""
    if isinstance(value, Mapping):
        return [*value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [*value]
    return str(value) if isinstance(value, str | int | float | complex | bytes) else None


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return "unbound"


def _names(code: types.CodeType) -> list[str]:
    """Returns the global names that code, and code nested in it, may look up."""
    within = [n for c in code.co_consts if isinstance(c, types.CodeType) for n in _names(c)]
    return [*dict.fromkeys([*code.co_names, *within])]


def _is_own(name: str, value: Any) -> bool:
    """Returns whether a class's attribute was written with it."""
    is_dunder = name.startswith("__") and name.endswith("__")
    is_code = isinstance(value, types.FunctionType | property | staticmethod | classmethod)
    return is_code if is_dunder else not (name.startswith(_BOOKKEEPING) or _is_slot(value))


def _is_slot(value: Any) -> bool:
    return inspect.ismemberdescriptor(value) or inspect.isgetsetdescriptor(value)


def _slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    return tuple(s for s in ((slots,) if isinstance(slots, str) else slots) if s[:2] != "__")

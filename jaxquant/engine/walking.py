"""`walk`: a function with other products in the place of its own.

The function is traced, every product's operands are followed back to the parameters that they come from,
and the trace is computed again with what `visit` gives in the products' place.  Nothing is patched: what
comes out is an ordinary function, and jit, gradients, scan, remat and vmap are taken of it as of any other.
"""

import collections
import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxquant.engine.analysis import Found, Where, analyze, flat
from jaxquant.engine.origins import INPUT, Origin
from jaxquant.engine.products import Product
from jaxquant.engine.rebuilding import Use, Within, evaluate
from jaxquant.numerics.stored import Stored

ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, Stored)
Replacement = Callable[..., jax.Array]


@jax.tree_util.register_static
class Constant:
    """A value that is not an array.  It equals values of the same type only: True is not 1, nor 0.0 −0.0."""

    def __init__(self, value: Any):
        self.value = value
        self._key = type(value), repr(value) if isinstance(value, float | complex) else value

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._key == other._key


@dataclasses.dataclass(frozen=True)
class Call:
    """A call without its arrays: its structure, where its arrays come from, and what else it is given."""

    structure: Any
    origins: tuple[Origin, ...]
    constants: tuple[tuple[int, Constant], ...]

    def of(self, function: Callable[..., Any], arrays: Sequence[Any]) -> Any:
        """Calls the function with these arrays."""
        constants, rest = dict(self.constants), iter(arrays)
        places = range(self.structure.num_leaves)
        leaves = [constants[i].value if i in constants else next(rest) for i in places]
        args, kwargs = jax.tree.unflatten(self.structure, leaves)
        return function(*args, **kwargs)

    def trace(self, function: Callable[..., Any], arrays: Sequence[Any]) -> "Trace":
        """Returns the function's trace."""
        return Trace.of(functools.partial(self.of, function), arrays, self.origins)


@dataclasses.dataclass(frozen=True)
class Trace:
    """A function's trace, to be computed with other products.

    Attributes:
        products: in order.
        results: where each array of the function's result comes from.
        passed: which of these are given to nobody, so that they read nothing.
    """

    products: tuple[Product, ...]
    results: tuple[Origin, ...]
    _reads: Mapping[str, str]
    _closed: Any
    _found: list[Found]
    _structure: Any
    passed: frozenset[int] = frozenset()

    @property
    def reads(self) -> dict[str, str]:
        """The parameters that something else than a product reads, each with the line."""
        where = Where(dict(self._reads))
        where.notes(
            [o for i, o in enumerate(self.results) if i not in self.passed], "in the result"
        )
        return where.reads

    def structured(self, leaves: Sequence[Any]) -> Any:
        """Returns a result as the function gives it, with such leaves."""
        return jax.tree.unflatten(self._structure, leaves)

    @classmethod
    def of(
        cls,
        function: Callable[[Sequence[Any]], Any],
        arrays: Sequence[Any],
        origins: Sequence[Origin],
    ) -> "Trace":
        """Returns the trace of a function of arrays, each of an origin; they may be `jax.ShapeDtypeStruct`s.

        Raises:
            ValueError: a function that takes gradients, or one with products whose result holds objects
                that are neither pytrees nor text.
        """
        arrays = [x.abstract if isinstance(x, Stored) else x for x in arrays]
        opaque: list[str] = []
        whole = lambda *xs: _with_constants(function(xs), opaque)  # noqa: E731
        closed, shape = jax.make_jaxpr(whole, return_shape=True)(*arrays)
        where = Where({})
        found, results = analyze(closed, origins, where)
        structure = jax.tree.structure(shape)
        found_products = [
            dataclasses.replace(p, keys=where.keys.get(p.number)) for p in flat(found)
        ]
        if found_products and opaque:
            raise ValueError(
                f"what is traced returns arrays, numbers and text alone; got {', '.join(opaque)}: register "
                "its class as a pytree, as flax.struct.dataclass does, or leave it out of the result"
            )
        return cls(tuple(found_products), tuple(results), where.reads, closed, found, structure)

    def evaluate(
        self,
        arrays: Sequence[Any],
        uses: Sequence[Use | None],
        data: Mapping[int, Any],
        taps: Mapping[int, Any] = MappingProxyType({}),
    ) -> tuple[Any, dict[int, Any]]:
        """Returns the function's result, and what was recorded.

        Args:
            arrays: what it takes; of a `Stored` only the shape and type take part.
            uses: for each product.
            data: what they are given, by the products' numbers.
            taps: likewise, with an axis in front for each scan around the product.
        """
        given = _assign(self._found, iter(uses))
        arrays = [jnp.zeros(x.shape, x.dtype) if isinstance(x, Stored) else x for x in arrays]
        results, records = evaluate(self._closed, arrays, given, Within(data, taps=taps))
        return self.structured(results), records


def _with_constants(result: Any, opaque: list[str]) -> Any:
    """Returns a result whose text and other objects are static; for an opaque object, records its path."""

    def own(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, (*ARRAYS, Tracer, bool, int, float, complex)):
            return leaf
        if not isinstance(
            leaf, str | bytes | enum.Enum | type
        ):  # which may hold arrays of the trace
            opaque.append(f"{type(leaf).__name__} at result{jax.tree_util.keystr(path)}")
        return Constant(leaf)

    return jax.tree.map_with_path(own, result)


def as_returned(result: Any) -> Any:
    """Returns a traced function's result with its constants as the function returned them."""
    is_constant = lambda x: isinstance(x, Constant)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_constant(x) else x, result, is_leaf=is_constant)


def called(args: tuple, kwargs: dict) -> tuple[Call, list[Any]]:
    """Returns a call, of which the first argument holds parameters, and its arrays.

    Raises:
        ValueError: no positional argument, or one that is neither an array nor hashable.
    """
    if not args:
        raise ValueError("the parameters are the first positional argument; got none")
    pairs, structure = jax.tree_util.tree_flatten_with_path(
        (args, kwargs), is_leaf=lambda x: isinstance(x, Stored)
    )
    constants, arrays, origins = [], [], []
    for index, (path, leaf) in enumerate(pairs):
        if not isinstance(leaf, ARRAYS):
            constants.append((index, constant(path, leaf)))
            continue
        arrays.append(leaf)
        is_parameter = [getattr(key, "idx", None) for key in path[:2]] == [0, 0]
        name = jax.tree_util.keystr(path[2:], simple=True, separator="/")
        origins.append(Origin.parameter(name) if is_parameter else INPUT)
    check_paths(path for origin in origins for path in origin.nearest)
    return Call(structure, tuple(origins), tuple(constants)), arrays


def check_paths(paths: Iterable[str]) -> None:
    """Raises a ValueError where two parameters have one path, as with keys that hold a slash."""
    counts = collections.Counter(paths)
    if twice := [path for path, count in counts.items() if count > 1]:
        raise ValueError(
            f"each parameter must have a path of its own; {counts[twice[0]]} have {twice[0]!r}: rename a key "
            "that holds a slash"
        )


def constant(path: Any, leaf: Any) -> Constant:
    constant = Constant(leaf)
    try:
        hash(constant)
    except TypeError:
        raise ValueError(
            f"argument {jax.tree_util.keystr(path[1:])} is neither an array nor hashable; got "
            f"{type(leaf).__name__}; close over it, or make it hashable (as a frozen dataclass is)"
        ) from None
    return constant


def products(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Product, ...]:
    """Returns the products of a function of a pytree of parameters, in order; it is traced, not run.

    Args:
        function: of a pytree of parameters first.
        args, kwargs: what it is called with; arrays may be `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: a function that takes gradients.

    >>> square = jax.ShapeDtypeStruct((4, 4), "float32")
    >>> model = lambda w, x: jax.nn.relu(x @ w["up"]) @ w["down"]
    >>> [p.path for p in products(model, {"up": square, "down": square}, square)]
    ['up', 'down']
    """
    call, arrays = called(args, kwargs)
    return call.trace(function, arrays).products


def walk(
    function: Callable[..., Any],
    visit: Callable[[tuple[Product, ...]], Sequence[Replacement | None]],
) -> Callable[..., Any]:
    """Returns the same function with other products.

    It takes what the function takes.  Arrays are traced, everything else counts as a constant, and each
    combination of shapes and constants is traced once.

    Args:
        function: of a pytree of parameters first.
        visit: from the products to what takes each one's place, of the same operands and with a result of
            the same shape; None leaves it.  It is called once for each trace.

    >>> halved = walk(lambda w, x: x @ w, lambda found: [lambda x, w: 0.5 * (x @ w) for _ in found])
    >>> halved(jax.numpy.eye(2), jax.numpy.ones((1, 2)))
    Array([[0.5, 0.5]], dtype=float32)
    """

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def run(call: Call, arrays: list[Any]) -> Any:
        trace = call.trace(function, arrays)
        uses = [
            use if use is None else plain(i, use) for i, use in enumerate(visit(trace.products))
        ]
        return trace.evaluate(arrays, uses, {})[0]

    @functools.wraps(function)
    def walked(*args: Any, **kwargs: Any) -> Any:
        return as_returned(run(*called(args, kwargs)))

    return walked


def plain(index: int, replacement: Replacement) -> Use:
    """Returns a replacement that depends on the operands alone."""
    return Use(index, lambda _, __, *operands: (replacement(*operands), None))


def _assign(found: Sequence[Found], given: Any) -> list[Any]:
    """Puts each product's replacement where the product was found."""
    return [
        next(given) if isinstance(x, Product) else None if x is None else _assign(x, given)
        for x in found
    ]

"""Calls of Linen modules as functions of arrays, so that their products can be found and replaced."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import core
from flax import linen as nn

from jaxquant.engine import walking
from jaxquant.engine.origins import INPUT, Origin
from jaxquant.engine.walking import Trace
from jaxquant.functions.freezing import wrap_stored
from jaxquant.functions.states import State
from jaxquant.numerics.qarray import QArray
from jaxquant.numerics.stored import Stored

RANGES = "quantization"  # the collection of calibrated ranges
_RANGE = "_input_range"


@dataclasses.dataclass(frozen=True)
class Call:
    """A call without its arrays.

    Attributes:
        plain: its structure, and where its arrays come from.
        weights: paths of the parameters of 2 axes or more.
        is_initial: whether the module makes its variables, but for the parameters, which are given.
        is_own: whether it is the module's ``__call__``.
    """

    plain: walking.Call
    weights: tuple[str, ...]
    is_initial: bool
    is_own: bool = True

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The origin of each array."""
        return self.plain.origins

    @property
    def parameters(self) -> list[str]:
        """Paths of the module's parameters that are among the arrays."""
        return [path for origin in self.origins if origin.is_weight for path in origin.nearest]

    def values(self, arrays: list[Any]) -> dict[str, Any]:
        """Returns the parameters among the arrays, by path."""
        pairs = zip(self.origins, arrays, strict=True)
        return {path: x for origin, x in pairs if origin.is_weight for path in origin.nearest}

    def trace(self, module: nn.Module, arrays: list[Any]) -> Trace:
        """Returns the trace of a module's call."""
        function = _initial if self.is_initial else nn.Module.apply
        return self.plain.trace(lambda *args, **options: function(module, *args, **options), arrays)


def called(
    variables: Any, args: tuple, options: Mapping[str, Any], is_initial: bool = False
) -> tuple[Call, dict[str, State], list[Any]]:
    """Returns a call, the states of parameters among the variables, and its arrays.

    Args:
        variables: the module's first argument, ranges among them.
        args, options: the others of `flax.linen.Module.apply`.
        is_initial: as of `Call`.

    Raises:
        ValueError: no variables, or an argument that is neither an array nor hashable.
    """
    check_variables(variables)
    kept = {name: tree for name, tree in variables.items() if name != RANGES}
    places = list(_places(kept))
    leaves = [
        wrap_stored(path, x) if isinstance(x, QArray) and path is not None else x
        for path, x in places
    ]
    is_leaf = lambda x: isinstance(x, Stored | QArray)  # noqa: E731
    kept = jax.tree.unflatten(jax.tree.structure(kept, is_leaf=is_leaf), leaves)
    plain, arrays = walking.called((kept, *args), hashable(options))
    own = [INPUT if path is None else Origin.parameter(path) for path, _ in places]
    plain = dataclasses.replace(plain, origins=(*own, *plain.origins[len(own) :]))
    weights = tuple(p for (p, _), x in zip(places, arrays, strict=False) if p and len(x.shape) > 1)
    is_own = options.get("method") is None
    return Call(plain, weights, is_initial, is_own), states(variables.get(RANGES, {})), arrays


def hashable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a call's options with filters of collections that can be hashed, as sets and lists cannot."""

    def own(given: Any) -> Any:
        if isinstance(given, core.DenyList):
            return core.DenyList(own(given.deny))
        return tuple(sorted(given)) if isinstance(given, list | set) else given

    filters = ("mutable", "capture_intermediates")
    return {name: own(x) if name in filters else x for name, x in options.items()}


def check_variables(variables: Any) -> None:
    """Raises a ValueError for what are no variables of a module."""
    if not isinstance(variables, Mapping):
        raise ValueError(
            f"variables are what the module's init gives; got {type(variables).__name__}"
        )


def _places(variables: Any) -> Iterator[tuple[str | None, Any]]:
    """Returns the leaves of variables, each with its path if it is a parameter; boxes are removed."""
    for keys, held in jax.tree.leaves_with_path(variables, is_leaf=_is_box):
        inner = [held] if isinstance(held, Stored | QArray) else jax.tree.leaves(held)
        for leaf in inner:
            yield _path(keys), leaf


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.meta.AxisMetadata | Stored | QArray)


def _path(keys: Any) -> str | None:
    """Returns the path of a parameter among variables; None of what is none."""
    collection, *names = (jax.tree_util.keystr((key,), simple=True) for key in keys)
    return "/".join(names) if collection == "params" else None


def replace_parameters(variables: Any, stored: Mapping[str, Any]) -> Any:
    """Returns variables with others in the places of some parameters, whose boxes are taken off.

    Args:
        variables: of a module.
        stored: what takes the parameters' places, by path.
    """

    def own(keys: Any, held: Any) -> Any:
        path = _path(keys)
        return held if path is None else stored.get(path, held)

    return jax.tree.map_with_path(own, variables, is_leaf=_is_box)


def states(ranges: Any) -> dict[str, State]:
    """Returns the states that a collection of ranges holds, by the path of the weight.

    Raises:
        ValueError: ranges of another kind.
    """
    found = {}
    for keys, held in jax.tree.leaves_with_path(ranges):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        name, _, end = path.rpartition(_RANGE)
        if not name or end not in ("", "/0", "/1"):
            raise ValueError(
                f"the collection {RANGES!r} holds {path}, and a range is at its weight's path with "
                f"{_RANGE}, as in up/kernel_input_range; calibrate finds those of earlier versions anew"
            )
        found.setdefault(name, []).append(held)
    parts = {name: x[0] if len(x) == 1 else tuple(x) for name, x in found.items()}
    return {name: State(input_range=held) for name, held in parts.items()}


def collection(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ranges by the path of the weight as a collection has them."""
    tree: dict[str, Any] = {}
    for path, held in found.items():
        *above, name = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        ends = {str(i): x for i, x in enumerate(held)} if isinstance(held, tuple) else held
        node[f"{name}{_RANGE}"] = ends
    return tree


def _initial(module: nn.Module, variables: Any, rngs: Any, *args: Any, **options: Any) -> Any:
    """Returns the result of a module's `init_with_output` for parameters that exist already."""

    def initializing(call: Callable[..., Any], args: Any, options: Any, context: Any) -> Any:
        scope = context.module.scope
        if scope is not None and not scope.get_flag("initializing", False):
            scope.flags = {**scope.flags, "initializing": True}
        return call(*args, **options)

    rngs = rngs if isinstance(rngs, Mapping) else {"params": rngs}
    with nn.intercept_methods(initializing):
        return module.apply(variables, *args, rngs=rngs, mutable=True, **options)[0]


def abstractly(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Returns the shapes of a function's results; arguments that are not arrays are static."""
    call, arrays = walking.called(({}, *args), options)
    return jax.eval_shape(lambda xs: call.of(lambda _, *a, **o: function(*a, **o), xs), arrays)

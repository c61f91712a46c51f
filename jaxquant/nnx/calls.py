"""Calls of NNX modules as functions of arrays, so that their products can be found and replaced.

A call is split into its arrays and everything else.  What it changes of its module, as running means, caches
and counts of random streams, comes back as a result and is then written to the module.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.core import Tracer

from jaxquant.engine.origins import INPUT, Origin
from jaxquant.engine.walking import ARRAYS, Constant, Trace, check_paths, constant
from jaxquant.functions.freezing import wrap_stored
from jaxquant.functions.states import State
from jaxquant.nnx.modules import (
    Adapter,
    AdapterGain,
    ChannelScale,
    DelayedScales,
    InputRange,
    StepSize,
    read,
)
from jaxquant.nnx.modules import Stored as StoredWeight
from jaxquant.numerics.qarray import QArray
from jaxquant.numerics.stored import Stored

# What belongs to a call or a run, and is no weight.
OF_A_RUN = (nnx.RngState, nnx.Cache, nnx.BatchStat, nnx.Intermediate, nnx.Perturbation)
# What belongs to the quantization of a parameter, by whose name it goes.
OF_A_STATE = (InputRange, StepSize, ChannelScale, Adapter, AdapterGain, DelayedScales)


@dataclasses.dataclass(frozen=True)
class Call:
    """A method's call without its arrays.

    Attributes:
        method: its name, or a function that calls the module, given first.
        path: of the module in the model.
        graph: of the module and of the modules among its arguments.
        state: the structure of their variables.
        structure: of the arguments, in which modules and what is no array are leaves too.
        leaves: of each of these an index of a module, a `Constant`, or None for an array.
        first: pairs of a variable's path and that of the first place in the model that has it too.
    """

    method: str | Callable[..., Any]
    path: str
    # Not hashed: settings that modules hold may be compared alone, as a config with a list is.
    graph: Any = dataclasses.field(hash=False)
    state: Any
    structure: Any
    leaves: tuple[int | Constant | None, ...]
    first: tuple[tuple[str, str], ...] = ()

    def result(self, arrays: Sequence[Any]) -> tuple[Any, "Changes"]:
        """Returns the method's result for these arrays, and what it changed."""
        held, _ = self._split(arrays)
        (module, *others), args, kwargs = self.bind(arrays)
        plainly(module)
        settings = _settings((module, *others))
        if isinstance(self.method, str):
            result = getattr(module, self.method)(*args, **kwargs)
        else:
            result = self.method(module, *args, **kwargs)
        before = {id(x) for x in held}
        known = {
            path for path, _ in nnx.to_flat_state(self.state.unflatten(list(range(len(held)))))
        }
        after = list(nnx.to_flat_state(nnx.split((module, *others))[1]))
        changed = [
            (path, leaf)
            for path, leaf in after
            if path in known and any(id(x) not in before for x in jax.tree.leaves(value(leaf)))
        ]
        added = [(path, leaf) for path, leaf in after if path not in known]
        other = _other_settings(settings, _settings((module, *others)))
        return result, Changes(
            nnx.from_flat_state(changed), nnx.from_flat_state(added), Constant(other)
        )

    def bind(self, arrays: Sequence[Any]) -> tuple[list[Any], tuple, dict[str, Any]]:
        """Returns the module with its arrays, and all arguments."""
        held, given = self._split(arrays)
        nodes = list(nnx.merge(self.graph, self.state.unflatten(held)))
        args, kwargs = jax.tree.unflatten(self.structure, self._filled(nodes[1:], given))
        return nodes, args, kwargs

    def _split(self, arrays: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        count = self.state.num_leaves
        return list(arrays[:count]), list(arrays[count:])

    def _filled(self, modules: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
        rest = iter(arrays)
        return [
            next(rest) if x is None else modules[x] if isinstance(x, int) else x.value
            for x in self.leaves
        ]

    @property
    def origins(self) -> list[Origin]:
        """The origin of each array."""
        count = self.state.num_leaves
        found = [INPUT] * count
        flat = nnx.to_flat_state(self.state.unflatten(list(range(count))))
        check_paths("/".join(map(str, path[1:])) for path, _ in flat if path[0] == 0)
        for path, leaf in flat:
            for place in jax.tree.leaves(value(leaf)) if path[0] == 0 else ():
                found[place] = _origin(self.name_of(path[1:]), leaf)
        return found + [INPUT] * sum(x is None for x in self.leaves)

    def states(self, arrays: Sequence[Any]) -> dict[str, State]:
        """Returns calibrated and learned states of parameters, by path."""
        held, _ = self._split(arrays)
        found: dict[str, dict[str, Any]] = {}
        for path, leaf in nnx.to_flat_state(self.state.unflatten(held)):
            if path[0] == 0 and (part := state_part(path[-1], leaf)) is not None:
                weight = str(path[-1]).removesuffix(f"_{part}")
                found.setdefault(self.name_of((*path[1:-1], weight)), {})[part] = value(leaf)
        return {path: State(**parts) for path, parts in found.items()}

    def with_stored(self, held: Sequence[Any]) -> list[Any]:
        """Returns the variables' values with a `Stored` for each weight that is held as it is multiplied."""
        found = list(held)
        for path, leaf in nnx.to_flat_state(self.state.unflatten(list(range(len(held))))):
            for place in jax.tree.leaves(value(leaf)):
                if isinstance(held[place], QArray):
                    found[place] = wrap_stored(self.name_of(path[1:]), held[place])
        return found

    def name_of(self, path: Sequence[Any]) -> str:
        """Returns a variable of the module's by its path in the model."""
        name = "/".join(part for part in (self.path, *map(str, path)) if part)
        return dict(self.first).get(name, name)

    def trace(self, arrays: Sequence[Any]) -> Trace:
        """Returns the call's trace; its result is that of `result`."""
        trace = Trace.of(self.result, arrays, self.origins)
        # Loops hand on all that they are given, changed or not.
        passed = frozenset(i for _, places in self._passed(trace) for i in places)
        return dataclasses.replace(trace, passed=passed)

    def changed(self, trace: Trace, changes: "Changes") -> "Changes":
        """Returns the changes in a trace's result that differ from before."""
        passed = {path for path, _ in self._passed(trace)}
        pairs = nnx.to_flat_state(changes.state)
        return changes._replace(
            state=nnx.from_flat_state([(path, leaf) for path, leaf in pairs if path not in passed])
        )

    def _passed(self, trace: Trace) -> Iterator[tuple[Any, list[int]]]:
        """Returns variables among a trace's results that are what they were, and where they are."""
        _, changes = trace.structured(range(len(trace.results)))
        for path, leaf in nnx.to_flat_state(changes.state):
            places = jax.tree.leaves(value(leaf))
            made = [trace.results[i].derivation for i in places]
            if path[0] == 0 and all(d and d.key == self.name_of(path[1:]) for d in made):
                yield path, places


class Changes(NamedTuple):
    """The changes that a call makes to its modules.

    Attributes:
        state: variables that are other than before.
        added: variables and arrays that were not there.
        settings: a `Constant` of attributes that are no arrays: their place, name and value.
    """

    state: Any
    added: Any
    settings: Constant

    def write(self, nodes: Sequence[Any]) -> None:
        """Writes what is changed to the modules that the call was given.

        Raises:
            ValueError: something added that is no attribute of a module that is there.
        """
        added = [(_node(nodes, path), path[-1], x) for path, x in nnx.to_flat_state(self.added)]
        settings = [(_node(nodes, (*p, n)), n, x) for p, n, x in self.settings.value]
        if self.state:
            nnx.update(nodes, self.state)
        for node, name, setting in settings:
            delattr(node, name) if setting is _GONE else setattr(node, name, setting)
        for node, name, leaf in added:
            if isinstance(node, nnx.List):
                node.append(leaf)
            else:
                setattr(node, str(name), nnx.data(leaf))


def _node(nodes: Sequence[Any], path: Any) -> Any:
    """Returns the module that has an attribute at a path."""
    try:
        node = at(nodes, path[:-1])
    except (AttributeError, KeyError, IndexError, TypeError):
        node = None
    if isinstance(node, nnx.Module):
        return node
    raise ValueError(
        f"the call makes {'/'.join(map(str, path[1:]))}, within a module that is made by the call too; make "
        "that module before the model is quantized"
    )


_GONE = type("Gone", (), {"__repr__": lambda _: "an attribute that is gone"})()


def _settings(nodes: Sequence[Any]) -> dict[tuple[Any, str], Any]:
    """Returns the attributes of modules that are no variables, arrays or modules, by place and name."""
    return {
        (path, name): held
        for path, node in nnx.iter_graph(tuple(nodes))
        if isinstance(node, nnx.Module) and not isinstance(node, nnx.List)
        for name, held in vars(node).items()
        if not name.startswith(("_pytree__", "_object__")) and name not in DOOR
        if not isinstance(held, nnx.Variable | nnx.Pytree | jax.Array | np.ndarray)
    }


def _other_settings(before: dict[Any, Any], after: dict[Any, Any]) -> tuple[Any, ...]:
    """Returns the settings that have changed, and those that are gone."""
    found = []
    for (path, name), held in after.items():
        if (path, name) in before and _is_same(before[path, name], held):
            continue
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(held)):
            raise ValueError(
                f"a call sets the attribute {name!r} to arrays outside of what Flax knows of; hold them in "
                "nnx.data or in an nnx.Variable"
            )
        found.append((path, name, held))
    gone = [(path, name, _GONE) for path, name in before if (path, name) not in after]
    return (*found, *gone)


def _is_same(one: Any, other: Any) -> bool:
    try:
        return one is other or (type(one) is type(other) and bool(one == other))
    except (TypeError, ValueError):  # of objects that compare by elements
        return False


def _origin(path: str, leaf: Any) -> Origin:
    if isinstance(leaf, (*OF_A_RUN, *OF_A_STATE)):
        return INPUT
    is_parameter = isinstance(leaf, nnx.Param | StoredWeight)
    return Origin.parameter(path) if is_parameter else Origin.buffer(path)


def state_part(name: Any, variable: Any) -> str | None:
    """Returns which field of a parameter's `State` a variable is; None if it is not one."""
    parts = (field.name for field in dataclasses.fields(State))
    is_one = isinstance(variable, OF_A_STATE) and isinstance(name, str)
    return next((part for part in parts if is_one and name.endswith(f"_{part}")), None)


def at(node: Any, path: Any) -> Any:
    """Returns the object at a path of names and numbers in a model."""
    for name in (int(p) if isinstance(p, str) and p.isdecimal() else p for p in path):
        node = getattr(node, name) if isinstance(name, str) and hasattr(node, name) else node[name]
    return node


def value(leaf: Any) -> Any:
    """Returns the value of a state's leaf."""
    return read(leaf) if isinstance(leaf, nnx.Variable) else leaf


def called(
    module: nnx.Module,
    path: str,
    method: str | Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    first: tuple[tuple[str, str], ...] = (),
) -> tuple[Call, list[Any], tuple[Any, ...]]:
    """Returns a call, its arrays, and the module with those among its arguments.

    Raises:
        ValueError: an argument that is neither an array nor hashable.
    """
    pairs, structure = jax.tree_util.tree_flatten_with_path((args, dict(kwargs)), is_leaf=_is_node)
    nodes: list[Any] = [module]
    leaves: list[int | Constant | None] = []
    arrays = []
    for place, leaf in pairs:
        if _is_node(leaf):
            leaves.append(len(nodes) - 1)
            nodes.append(leaf)
        elif isinstance(leaf, ARRAYS):
            leaves.append(None)
            arrays.append(leaf)
        else:
            leaves.append(constant(place, leaf))
    graph, state = nnx.split(tuple(nodes))
    held, tree = jax.tree.flatten(state, is_leaf=lambda x: isinstance(x, Stored | QArray))
    call = Call(method, path, graph, tree, structure, tuple(leaves), first)
    if any(isinstance(x, QArray) for x in held):
        held = call.with_stored(held)
    return call, [*held, *arrays], tuple(nodes)


def _is_node(x: Any) -> bool:
    return isinstance(x, nnx.Module | nnx.Rngs | nnx.RngStream | nnx.Variable)


def plainly(module: nnx.Module) -> None:
    """Restores the original classes of a module and its submodules, from which quantized ones were made."""
    for _, each in list(nnx.iter_graph(module)):
        own = getattr(type(each), "plain_class", None)
        if own is not None:
            object.__setattr__(each, "__class__", own)
        if own is not None or isinstance(each, nnx.List):
            held = vars(each)
            for name in [n for n, x in held.items() if n in DOOR or state_part(n, x)]:
                del held[name]


# The attributes of a quantized module that are not its own.
DOOR = ("quantized_by", "quantized_with")

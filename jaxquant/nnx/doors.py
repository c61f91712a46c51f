"""Quantized NNX models by the engine: each module's call is traced, and its products are replaced.

A quantized model is a tree of modules of its own over the same variables.  Each module that holds weights is
of a subclass of its own class, in which every method is a call of the original one with other products: so
parts of a model that are called by themselves are quantized too, and the user's objects and classes stay.
"""

import copyreg
import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import jax
from flax import nnx

from jaxquant.engine.analysis import TakesGradients
from jaxquant.engine.rules import ATTENTION, Rule, Rules, Subject, choose, parse_rules
from jaxquant.engine.walking import as_returned
from jaxquant.functions import quantizing
from jaxquant.nnx.calls import DOOR, OF_A_STATE, Call, at, called, state_part
from jaxquant.nnx.modules import Stored as StoredWeight
from jaxquant.nnx.modules import read

Model = TypeVar("Model", bound=nnx.Module)
# What code raises that needs the numbers themselves, which a trace has not.
_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
    TakesGradients,
)


class _NothingToQuantize(Exception):
    """A method multiplies nothing."""


@dataclasses.dataclass(frozen=True)
class Door:
    """A quantized module's position in its model, and its rules.

    Attributes:
        path: of the module.
        rules: without their arrays.
        structure: of the rules' values.
        on_unsupported: as of `quantize`.
        first: pairs of the path of a variable and that of the first place in the model that has it too.
        taps: what gives the taps of a call's products (`jaxquant.nnx.monitoring.Taps`), while they are
            monitored.
    """

    path: str
    rules: tuple[tuple[Any, ...], ...]
    structure: Any
    on_unsupported: str
    first: tuple[tuple[str, str], ...] = ()
    taps: Any = None

    @property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Other names of variables that are in several places, by the path of the first."""
        return aliases_of(self.first)

    def __repr__(self) -> str:
        return f"Door({self.path!r})"

    def parsed(self, arrays: Any) -> list[Rule]:
        """Returns the rules."""
        values = jax.tree.unflatten(self.structure, arrays)
        return [Rule(p, v, *rest) for (p, *rest), v in zip(self.rules, values, strict=True)]


def door_of(module: Any) -> Door | None:
    """Returns a quantized module's `Door`; None for any other module."""
    door = vars(module).get(DOOR[0]) if isinstance(module, nnx.Module) else None
    return door if isinstance(door, Door) else None


def on_unsupported_of(model: nnx.Module) -> str:
    """Returns a model's `on_unsupported`: "float" if any part says so."""
    doors = (door_of(module) for _, module in modules(model))
    is_float = any(door is not None and door.on_unsupported == "float" for door in doors)
    return "float" if is_float else "error"


def rules_of(module: Any) -> list[Rule]:
    """Returns the rules that a module is quantized by; none of one that is not."""
    door = door_of(module)
    return [] if door is None else door.parsed(getattr(module, DOOR[1], ()))


def quantized_copy(
    model: Model, rules: Rules, on_unsupported: Literal["error", "float"] = "error"
) -> Model:
    """Returns the same model with quantized products, without what is learned.

    Args:
        model: an NNX model; not changed.
        rules: as of `jaxquant.nnx.quantize`.
        on_unsupported: likewise.

    Raises:
        ValueError: as `jaxquant.nnx.quantize`.
    """
    check_model(model)
    if on_unsupported not in ("error", "float"):
        raise ValueError(f"on_unsupported is 'error' or 'float'; got {on_unsupported!r}")
    model = copied(model)
    parsed = parse_rules(rules)
    taken = check_used(model, parsed)
    _drop_states(model, taken)
    install(model, [*parsed, *rules_within(model)], on_unsupported)
    return model


def _drop_states(model: nnx.Module, taken: set[str]) -> None:
    """Removes calibrated and learned states that earlier recipes left on some weights."""
    for path, module in modules(model):
        for name, held in _variables(module):
            part = state_part(name, held)
            if part is not None and not part.startswith("lora"):
                weight = f"{path}/{name.removesuffix(f'_{part}')}".strip("/")
                if weight in taken:
                    delattr(module, name)


def check_model(model: Any) -> None:
    """Raises a ValueError for what is no NNX model."""
    if not isinstance(model, nnx.Module):
        hint = "; Linen modules go to jaxquant.linen" if hasattr(model, "apply") else ""
        raise ValueError(f"an NNX model is wanted; got {type(model).__name__}{hint}")


def copied(model: Model) -> Model:
    """Copies a module tree: new variables that share the arrays."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda array: array, state))


def install(model: nnx.Module, rules: list[Rule], on_unsupported: str = "error") -> None:
    """Makes each module of a model that holds weights one that is quantized by rules."""
    arrays, structure = jax.tree.flatten([rule.value for rule in rules])
    first = first_places(model)
    kept = tuple((rule.pattern, *rule[2:]) for rule in rules)
    for path, module in modules(model):
        if type(module) is not nnx.List and any(True for _ in weights(module)):
            object.__setattr__(module, "__class__", quantized_class(type(module)))
            door = Door(path, kept, structure, on_unsupported, first)
            setattr(module, DOOR[0], nnx.static(door))
            vars(module).pop(DOOR[1], None)
            if arrays:
                setattr(module, DOOR[1], nnx.data(tuple(arrays)))


def modules(model: nnx.Module) -> list[tuple[str, Any]]:
    """Returns the modules of a model, by their paths."""
    found = nnx.iter_graph(model)
    return [("/".join(map(str, path)), m) for path, m in found if isinstance(m, nnx.Module)]


def _variables(module: nnx.Module) -> list[tuple[str, nnx.Variable]]:
    """Returns the variables that a module's attributes hold."""
    own = vars(module).items()
    return [(n, x) for n, x in own if isinstance(n, str) and isinstance(x, nnx.Variable)]


def first_places(model: nnx.Module) -> tuple[tuple[str, str], ...]:
    """Pairs of the path of a variable and that of the first place in a model that has it too."""
    paths = [path for path, _ in nnx.to_flat_state(nnx.split(model)[1])]
    places = {id(at(model, path)): "/".join(map(str, path)) for path in paths}
    found = []
    for path, module in modules(model):
        for name, held in _variables(module):
            own = f"{path}/{name}".strip("/")
            if places.get(id(held), own) != own:
                found.append((own, places[id(held)]))
    return tuple(found)


def aliases_of(first: tuple[tuple[str, str], ...]) -> dict[str, tuple[str, ...]]:
    """Returns other names of variables, and of what holds them there, by the path of their first place."""
    found: dict[str, tuple[str, ...]] = {}
    for name, path in first:
        found[path] = (*found.get(path, ()), name, name.rpartition("/")[0])
    return found


def rules_within(model: nnx.Module) -> list[Rule]:
    """Returns the rules of a quantized model or of its parts, with paths relative to the model."""
    found: list[Rule] = []
    for path, module in modules(model):
        door = door_of(module)
        if door is None:
            continue
        here, there = path.split("/") if path else [], door.path.split("/") if door.path else []
        while here and there and here[-1] == there[-1]:
            here, there = here[:-1], there[:-1]
        strip, add = ("".join(f"{name}/" for name in names) for names in (here, there))
        for rule in rules_of(module):
            moved = rule._replace(strip=strip + rule.strip, add=rule.add + add, is_earlier=True)
            if not any(_is_same(moved, other) for other in found):
                found.append(moved)
    return found


def _is_same(one: Rule, other: Rule) -> bool:
    values = zip(*(jax.tree.leaves(rule.value) for rule in (one, other)), strict=False)
    return one._replace(value=None) == other._replace(value=None) and all(a is b for a, b in values)


def weights(module: nnx.Module) -> Iterator[tuple[str, Any]]:
    """Returns the parameters of a module that products may multiply by, with their paths."""
    for path, leaf in nnx.iter_graph(module):
        is_one = isinstance(leaf, nnx.Param | StoredWeight) and not isinstance(leaf, OF_A_STATE)
        if is_one and len(read(leaf).shape) > 1:
            yield "/".join(map(str, path)), leaf


def check_used(model: nnx.Module, rules: list[Rule]) -> set[str]:
    """Returns the weights that rules take.

    Raises:
        ValueError: a rule that no weight or module's path matches, or that takes a weight that is stored.
    """
    subjects, leaves, aliases = [], [], aliases_of(first_places(model))
    for path, leaf in weights(model):
        names = (path, path.rpartition("/")[0]) if "/" in path else (path,)
        names = (*names, *aliases.get(path, ()))
        subjects.append(Subject(names, "weight"))
        leaves.append(leaf)
    if not subjects:
        raise ValueError(
            f"{type(model).__name__} has no weight to quantize: no parameter of 2 axes or more"
        )
    own = len(subjects)
    subjects += [Subject((path,), ATTENTION) for path, _ in modules(model)]
    chosen, taken = choose(subjects, rules)[:own], set[str]()
    for subject, leaf, rule in zip(subjects, leaves, chosen, strict=False):
        if rule is not None and rule.value is not None and isinstance(leaf, StoredWeight):
            raise ValueError(
                f"{subject.path} is frozen already; quantize the model that it was made of"
            )
        if rule is not None:
            taken.add(subject.path)
    return taken


# ---------------------------------------------------------------------------------------------------
# Classes


@functools.cache
def quantized_class(cls: type) -> type:
    """Returns a subclass in which every method of a module's class is a call with other products."""
    if hasattr(cls, "plain_class"):
        return cls
    methods = {name: _walked(name, method) for name, method in _methods(cls)}
    named = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    made = _made_by(type(cls))
    return made(cls.__name__, (cls,), {**named, **methods, "plain_class": cls})


@functools.cache
def _made_by(metaclass: type) -> type:
    """Returns a metaclass whose classes are pickled by reference to their original class."""
    made = type(metaclass.__name__, (metaclass,), {})
    copyreg.pickle(made, lambda cls: (quantized_class, (cls.plain_class,)))  # pyright: ignore
    return made


def _methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Returns the methods of a class that are none of Flax's bookkeeping."""
    for name in dir(cls):
        owner = next((c for c in cls.__mro__ if name in vars(c)), object)
        is_bookkeeping = owner in nnx.Module.__mro__ or owner is nnx.List
        is_special = name.startswith("__") and name != "__call__"
        if not is_bookkeeping and not is_special and inspect.isfunction(vars(owner)[name]):
            yield name, vars(owner)[name]


def _walked(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def walked(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return run(self, name, args, kwargs)
        except _NothingToQuantize:
            return method(self, *args, **kwargs)
        except _UNTRACEABLE as error:
            result = method(self, *args, **kwargs)  # first: it may be none of the model's doing
            _warn_of_own(self, name, error)
            return result

    return walked


def _warn_of_own(module: Any, name: str, error: Exception) -> None:
    reason = str(error).split("\n")[0]
    warnings.warn(
        f"{type(module).__name__}.{name} cannot be traced, so that products of its own stay in float, and "
        f"only those of modules within it are quantized: {reason}",
        stacklevel=3,
    )


def run(module: Any, method: str | Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """Returns a method of a quantized module, or a function that calls it, with other products."""
    door = door_of(module)
    assert door is not None
    call, given, nodes = called(module, door.path, method, args, kwargs, door.first)
    # What is monitored is traced anew: taps are of one trace.
    compute = _compiled if door.taps is None else _computed
    result, changed = compute(door, call, getattr(module, DOOR[1], ()), given)
    changed.write(nodes)
    return as_returned(result)


def _computed(door: Door, call: Call, rule_arrays: Any, arrays: Any) -> Any:
    trace = call.trace(arrays)
    if not any(product.is_quantizable for product in trace.products):
        raise _NothingToQuantize
    rules, states = door.parsed(rule_arrays), call.states(arrays)
    stored = quantizing.stored_among(call.origins, arrays)
    decisions = quantizing.decide(
        trace.products, rules, True, states, stored, aliases=door.aliases, is_tried=False
    )
    if not door.path and call.method == "__call__":
        quantizing.warn_of_untaken(decisions, rules)
    taps = {} if door.taps is None else door.taps.of(decisions)
    how = call.origins, door.on_unsupported, lambda *_: None
    (result, changes), _ = quantizing.evaluate_recording(trace, decisions, arrays, *how, taps=taps)
    return result, call.changed(trace, changes)


_compiled = jax.jit(_computed, static_argnums=(0, 1), inline=True)

"""Quantized NNX models by the engine: each module's call is traced, and its products are replaced.

A quantized model is a tree of modules of its own over the same variables.  Each module that holds weights is
of a subclass of its own class, in which every method is a call of the original one with other products: so
parts of a model that are called by themselves are quantized too, and the user's objects and classes stay.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import jax
from flax import nnx

from jaxquant.functions import freezing, quantizing
from jaxquant.functions.coverage import Coverage, table
from jaxquant.nnx.calls import DOOR, Call, called
from jaxquant.nnx.modules import Stored as StoredWeight
from jaxquant.nnx.modules import read
from jaxquant.rules import ATTENTION, Rule, Rules, Subject, choose, parse_rules

Model = TypeVar("Model", bound=nnx.Module)


class _NothingToQuantize(Exception):
    """A method multiplies nothing."""


@dataclasses.dataclass(frozen=True)
class Door:
    """What a quantized module knows: where it stands in its model, and by what rules.

    Attributes:
        path: of the module.
        rules: without their arrays.
        structure: of the rules' values.
        on_unsupported: as of `quantize`.
    """

    path: str
    rules: tuple[tuple[Any, str], ...]
    structure: Any
    on_unsupported: str

    def parsed(self, arrays: Any) -> list[Rule]:
        """The rules."""
        values = jax.tree.unflatten(self.structure, arrays)
        return [Rule(p, v, label) for (p, label), v in zip(self.rules, values, strict=True)]


def quantize(
    model: Model, rules: Rules, *, on_unsupported: Literal["error", "float"] = "error"
) -> Model:
    """The same model with quantized matrix products; parameters are shared, not copied.

    Every product of a parameter goes by the parameter's path, whoever wrote the layer; `jaxquant.functions`
    says how, and what becomes of products of activations.

    Args:
        model: an NNX model; not changed.
        rules: as in `jaxquant.rules`.
        on_unsupported: what becomes of a product that cannot take its recipe, when it is called: ``"error"``
            names all of them, ``"float"`` leaves them.

    Returns:
        A new module tree with variables of its own over the same arrays.

    Raises:
        ValueError: no NNX model, or one without weights; rules that cannot be read; a rule that no weight
            or module's path matches.
    """
    if not isinstance(model, nnx.Module):
        hint = "; Linen modules go to jaxquant.linen" if hasattr(model, "apply") else ""
        raise ValueError(f"an NNX model is wanted; got {type(model).__name__}{hint}")
    if on_unsupported not in ("error", "float"):
        raise ValueError(f"on_unsupported is 'error' or 'float'; got {on_unsupported!r}")
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda array: array, state))
    parsed = parse_rules(rules)
    _check_used(model, parsed)
    arrays, structure = jax.tree.flatten([rule.value for rule in parsed])
    kept = tuple((rule.pattern, rule.label) for rule in parsed)
    for path, module in list(nnx.iter_graph(model)):
        if isinstance(module, nnx.Module) and any(True for _ in weights(module)):
            door = Door("/".join(map(str, path)), kept, structure, on_unsupported)
            if type(module) is not nnx.List:
                object.__setattr__(module, "__class__", quantized_class(type(module)))
            setattr(module, DOOR[0], nnx.static(door))
            if arrays:
                setattr(module, DOOR[1], nnx.data(tuple(arrays)))
    return model


def weights(module: nnx.Module) -> Iterator[tuple[str, Any]]:
    """The parameters of a module that products may multiply by, with their paths."""
    for path, leaf in nnx.iter_graph(module):
        if isinstance(leaf, nnx.Param | StoredWeight) and len(read(leaf).shape) > 1:
            yield "/".join(map(str, path)), leaf


def _check_used(model: nnx.Module, rules: list[Rule]) -> None:
    subjects = [
        Subject((path, path.rpartition("/")[0]) if "/" in path else (path,), "weight")
        for path, _ in weights(model)
    ]
    if not subjects:
        raise ValueError(
            f"{type(model).__name__} has no weight to quantize: no parameter of 2 axes"
        )
    modules = (p for p, m in nnx.iter_graph(model) if isinstance(m, nnx.Module))
    subjects += [Subject(("/".join(map(str, path)),), ATTENTION) for path in modules]
    choose(subjects, rules)


# ---------------------------------------------------------------------------------------------------
# Classes


@functools.cache
def quantized_class(cls: type) -> type:
    """A subclass in which every method of a module's class is a call with other products."""
    if hasattr(cls, "plain_class"):
        return cls
    methods = {name: _walked(name, method) for name, method in _methods(cls)}
    named = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, (cls,), {**named, **methods, "plain_class": cls})


def _methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The methods of a class that are none of Flax's bookkeeping."""
    for name in dir(cls):
        owner = next((c for c in cls.__mro__ if name in vars(c)), object)
        is_bookkeeping = owner in nnx.Module.__mro__ or owner is nnx.List
        is_special = name.startswith("__") and name != "__call__"
        if not is_bookkeeping and not is_special and inspect.isfunction(vars(owner)[name]):
            yield name, vars(owner)[name]


def _walked(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def walked(self: Any, *args: Any, **kwargs: Any) -> Any:
        door: Door = getattr(self, DOOR[0])
        arrays = getattr(self, DOOR[1], ())
        call, given, nodes = called(self, door.path, name, args, kwargs)
        try:
            result, changed = _run(door, call, arrays, given)
        except _NothingToQuantize:
            return method(self, *args, **kwargs)
        if changed:
            nnx.update(nodes, changed)
        return result

    return walked


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _run(door: Door, call: Call, rule_arrays: Any, arrays: Any) -> Any:
    trace = call.traced(arrays)
    if not any(product.is_quantizable for product in trace.products):
        raise _NothingToQuantize
    decisions = quantizing.decided(trace.products, door.parsed(rule_arrays), is_part=True)
    if door.on_unsupported == "error":
        quantizing.check(decisions)
    result, state = quantizing.computed(trace, decisions, arrays, call.origins)
    return result, call.changed(trace, state)


# ---------------------------------------------------------------------------------------------------
# Freezing and coverage


def freeze(model: Model, *inputs: Any, donate: bool = False, **options: Any) -> Model:
    """The model for serving: every quantized weight stored as packed integers with its scales.

    Args:
        model: as `quantize` made it.
        inputs, options: what it is called with, arrays or `jax.ShapeDtypeStruct`s; it is traced, not run.
        donate: free each weight's array once its integers are there.

    Raises:
        ValueError: as `jaxquant.functions.freeze`.
    """
    trace, decisions, call, arrays = _decided(model, inputs, options)
    if getattr(model, DOOR[0]).on_unsupported == "error":
        quantizing.check(decisions)
    pairs = zip(call.origins, arrays, strict=True)
    values = {p: x for origin, x in pairs if origin.derivation for p in origin.derivation.paths}
    stored = freezing.frozen(trace, decisions, values, donate)
    leaves = []
    for path, leaf in nnx.to_flat_state(nnx.split(model)[1]):
        name = call.named(path)
        leaves.append((path, StoredWeight(stored[name]) if name in stored else leaf))
    return _replaced(model, dict(leaves))


def _replaced(model: Model, leaves: dict[Any, Any]) -> Model:
    """Another module tree with other variables, each in all the places of the one that it replaces."""
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda array: array, state))
    by_id: dict[int, Any] = {}
    for path, new in leaves.items():
        if isinstance(new, StoredWeight):
            by_id[id(_at(model, path))] = new
    done = set()
    for _, module in list(nnx.iter_graph(model)):
        if isinstance(module, nnx.Module):
            for name, held in list(vars(module).items()):
                if id(held) in by_id:
                    setattr(module, name, by_id[id(held)])
                    done.add(id(by_id[id(held)]))
    if missed := [new.owner.path for v in by_id.values() if id(v) not in done for new in [read(v)]]:
        raise ValueError(
            f"{', '.join(missed)} cannot be frozen: no module's attribute holds it, but a list or dict; "
            "a rule (path, None) before the others leaves it in float"
        )
    return model


def _at(node: Any, path: Any) -> Any:
    for name in path:
        node = getattr(node, name) if isinstance(name, str) and hasattr(node, name) else node[name]
    return node


def coverage(model: nnx.Module, rules: Rules, *inputs: Any, **options: Any) -> Coverage:
    """What `quantize` makes of each product of a call; it is traced, not run."""
    quantized = quantize(model, rules, on_unsupported="float")
    _, decisions, call, _ = _decided(quantized, inputs, options)
    parameters = [p for o in call.origins if o.is_weight for p in o.nearest]
    return table(decisions, parameters)


def _decided(model: Any, inputs: tuple, options: dict) -> Any:
    door = getattr(model, DOOR[0], None)
    if not isinstance(door, Door):
        raise ValueError(f"a quantized model is wanted; got {type(model).__name__}")
    call, arrays, _ = called(model, door.path, "__call__", inputs, options)
    trace = call.traced(arrays)
    rules = door.parsed(getattr(model, DOOR[1], ()))
    return trace, quantizing.decided(trace.products, rules), call, arrays

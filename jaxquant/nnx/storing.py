"""Freezing: a model's weights become the integers that its products multiply."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx

from jaxquant.engine.rules import Subject, choose
from jaxquant.functions import freezing
from jaxquant.functions.freezing import unwrap_stored
from jaxquant.nnx.calls import at, state_part
from jaxquant.nnx.doors import copied, door_of, rules_of, weights
from jaxquant.nnx.modules import Stored as StoredWeight
from jaxquant.nnx.modules import read
from jaxquant.nnx.planning import Plan, planned

Model = TypeVar("Model", bound=nnx.Module)


def freeze(
    model: Model,
    *inputs: Any,
    donate: bool = False,
    call: Callable[..., Any] | None = None,
    **options: Any,
) -> Model:
    """Returns the model for serving: every quantized weight stored as packed integers with its scales.

    Its outputs equal the quantized model's bit for bit.  Ranges and steps that were calibrated or learned
    are kept.  A frozen weight is a `jaxquant.nnx.Stored` variable, which optimizers pass over.

    With example inputs the model's call says what is multiplied, and a weight that is read by something else
    than a product is named here.  Without, each of Flax's layers says it by itself: weights of other
    modules are left as they are, with a warning, and quantized at each call.

    Args:
        model: as `jaxquant.nnx.quantize` made it.
        inputs, options: what it is called with, arrays or `jax.ShapeDtypeStruct`s; it is traced, not run.
        donate: free each weight's array once its integers are there, so that at no time more than one
            layer is held twice; `model`, and whatever shares its arrays, is then of no more use.
        call: from (model, *inputs, **options); the model's own call where not given.

    Returns:
        A new module tree; without `donate`, `model` stays as it is.

    Raises:
        ValueError: a model in which nothing is quantized, that is frozen already, or whose precision is
            traced; weights with a NaN or an Inf; learned steps that were never calibrated; a weight that
            is read by more than products, or that two products would store in two ways; one that no
            module's attribute holds; all at once.

    >>> from jaxquant.nnx import quantize
    >>> model = quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), {".*": "w4a16"})
    >>> from jaxquant.nnx.modules import read
    >>> read(freeze(model).kernel).bits_per_element
    4.5
    """
    plan = planned(model, inputs, options, call)
    door = door_of(model)
    if door is not None and door.on_unsupported == "error":
        plan.check()
    if not inputs and not options:
        _warn_of_left(model, plan)
    stored = freezing.freeze_parameters(plan.reads, plan.decisions, plan.values, donate)
    leaves = {}
    for path, _ in nnx.to_flat_state(nnx.split(model)[1]):
        name = "/".join(part for part in (door.path if door else "", *map(str, path)) if part)
        if name in stored:
            leaves[path] = StoredWeight(unwrap_stored(name, stored[name]))
    return replace_parameters(model, leaves)


def _warn_of_left(model: nnx.Module, plan: Plan) -> None:
    """Warns of weights that rules match but no Flax layer multiplies."""
    known = set(plan.parameters)
    names = [(p, p.rpartition("/")[0]) if "/" in p else (p,) for p, _ in weights(model)]
    chosen = choose([Subject(n, "weight") for n in names], rules_of(model), is_part=True)
    left = [
        n[0]
        for n, rule in zip(names, chosen, strict=True)
        if rule is not None and rule.value is not None and n[0] not in known
    ]
    if left:
        warnings.warn(
            f"{', '.join(left)} are left as they are: none of Flax's layers multiplies them, and without "
            "example inputs it is not known what does; freeze(model, *inputs) stores them",
            stacklevel=3,
        )


def replace_parameters(model: Model, leaves: dict[Any, Any]) -> Model:
    """Copies a module tree with other variables, each in all positions of the one that it replaces.

    Learned steps of what is stored are dropped: the stored numbers have them.
    """
    model = copied(model)
    by_id = {id(at(model, path)): new for path, new in leaves.items()}
    done = set()
    for _, module in list(nnx.iter_graph(model)):
        if isinstance(module, nnx.Module):
            for name, held in list(vars(module).items()):
                if id(held) in by_id:
                    setattr(module, name, by_id[id(held)])
                    done.add(id(held))
                    if state_part(f"{name}_step", vars(module).get(f"{name}_step")):
                        delattr(module, f"{name}_step")
    if missed := [read(new).owner.path for i, new in by_id.items() if i not in done]:
        raise ValueError(
            f"{', '.join(missed)} cannot be frozen: no module's attribute holds it, but a list or dict; "
            "a rule (path, None) before the others leaves it in float"
        )
    return model


def holder_of(model: nnx.Module, path: str) -> tuple[Any, str] | None:
    """Returns the module that has a parameter as an attribute, and its name; None inside a list or dict."""
    *above, name = path.split("/")
    try:
        module = at(model, above)
    except (AttributeError, KeyError, IndexError, TypeError):
        return None
    is_own = isinstance(module, nnx.Module) and not isinstance(module, nnx.List)
    is_held = is_own and isinstance(vars(module).get(name), nnx.Variable)
    return (module, name) if is_held else None

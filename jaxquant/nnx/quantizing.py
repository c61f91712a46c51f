"""Rules applied to a model, and the table of what they do."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from flax import nnx

from jaxquant.engine.rules import Rules, parse_rules
from jaxquant.functions.coverage import Coverage, table
from jaxquant.functions.states import is_learned
from jaxquant.nnx.calibrating import add_learned
from jaxquant.nnx.delaying import add_delayed
from jaxquant.nnx.doors import check_model, copied, door_of, install, quantized_copy, rules_of
from jaxquant.nnx.planning import planned
from jaxquant.operations.delaying import is_delayed

Model = TypeVar("Model", bound=nnx.Module)


def quantize(
    model: Model,
    rules: Rules,
    *inputs: Any,
    on_unsupported: Literal["error", "float"] = "error",
    call: Callable[..., Any] | None = None,
    **options: Any,
) -> Model:
    """Returns the same model with quantized matrix products; parameters are shared, not copied.

    Every product goes by the path of its parameter, whoever wrote the layer, as ``blocks/0/up/kernel``, and
    by that of what holds it, ``blocks/0/up``; it takes a recipe such as ``"w8a8"``.  A product of two
    activations goes by what the parameters nearest above it have in common, as ``blocks/0/attention``, and
    takes one such as ``"a8"``.  Rows that integers take of a table are quantized as the table is.
    Layers under `nnx.scan`, stacked along any axis, are quantized each by itself.

    Each module's calls are traced, once for each combination of shapes: a method of a part of the model is
    quantized when it is called by itself.  The given model is not changed; one that is quantized already
    keeps its recipes where the new rules take nothing.  Formats may be traced when this is called within the
    jitted function that uses the model.

    Args:
        model: an NNX model.
        rules: as in `jaxquant.engine.rules`: from regular expressions on paths to recipes; the first that
            matches counts, and None leaves a product as it is.
        inputs, options: what the model is called with, arrays or `jax.ShapeDtypeStruct`s.  They are needed
            for learned steps and delayed ranges of weights that other code than Flax's own layers multiplies.
        on_unsupported: what becomes of a product that cannot take its recipe, when it is called: ``"error"``
            names all of them, ``"float"`` leaves them.
        call: from (model, *inputs, **options); the model's own call where not given.

    Returns:
        A new module tree with variables of its own over the same arrays.

    Raises:
        ValueError: no NNX model, or one without weights; rules that cannot be read; a rule that no weight
            or module's path matches; a weight that is frozen already.  At a call, products that cannot take
            their recipes.

    >>> import jax
    >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    >>> quantize(model, {".*": "w8a8"})(jax.numpy.ones((2, 64))).shape
    (2, 8)
    """
    model = quantized_copy(model, rules, on_unsupported)
    forwards = [getattr(rule.value, "forward", None) for rule in rules_of(model)]
    if any(forward is not None and is_learned(forward.rhs) for forward in forwards):
        add_learned(model, inputs, options, call)
    if any(is_delayed(rule.value) for rule in parse_rules(rules)):
        add_delayed(model, inputs, options, call)
    return model


def coverage(
    model: nnx.Module,
    rules: Rules | None = None,
    *inputs: Any,
    call: Callable[..., Any] | None = None,
    **options: Any,
) -> Coverage:
    """Returns a table of how each product of a model is, or would be, computed.

    With example inputs all products of the model's call are listed, with their multiplications; without,
    those of Flax's own layers.  A product that cannot take its recipe is a row with the reason.

    Args:
        model: an NNX model, float, quantized or frozen.
        rules: what it would be quantized by; None for what it is quantized by already.
        inputs, options: what it is called with, arrays or `jax.ShapeDtypeStruct`s; it is traced, not run.
        call: from (model, *inputs, **options); the model's own call where not given.

    Raises:
        ValueError: rules that cannot be read, or that match nothing; inputs that do not fit the model.

    >>> import jax
    >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    >>> print(coverage(model, {".*": "w4a16"}, jax.ShapeDtypeStruct((2, 64), "float32")))
    100 % of 1,024 MACs are quantized
    path    kind  operands     rule  recipe  bytes before  after   MACs
    kernel  dot   2×64 · 64×8  .*    w4a16          2,048    288  1,024
    total                                           2,048    288
    multiplied with nothing: bias
    """
    if rules is not None:
        model = quantized_copy(model, rules, "float")
    elif door_of(model) is None:
        check_model(model)
        model = copied(model)
        install(model, [], "float")
    plan = planned(model, inputs, options, call, is_shown=True)
    return table(plan.decisions, plan.parameters, plan.values, bool(inputs or options))

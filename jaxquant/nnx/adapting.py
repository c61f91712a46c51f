"""Training on from a frozen model: low-rank adapters beside its weights (QLoRA), or all weights again."""

import math
import re
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant.checks import check_number, check_whole
from jaxquant.engine.rules import Rule, Subject, choose, parse_rules
from jaxquant.functions.freezing import wrap_stored
from jaxquant.functions.operations import Operation, operation
from jaxquant.functions.states import is_learned
from jaxquant.nnx.calibrating import held
from jaxquant.nnx.calls import at, plainly, value
from jaxquant.nnx.doors import (
    check_model,
    copied,
    door_of,
    install,
    on_unsupported_of,
    rules_within,
    weights,
)
from jaxquant.nnx.doors import modules as modules_of
from jaxquant.nnx.modules import Adapter, AdapterGain, StepSize, read
from jaxquant.nnx.modules import Stored as StoredWeight
from jaxquant.nnx.planning import Plan, planned
from jaxquant.nnx.storing import replace_parameters
from jaxquant.numerics.qarray import dequantize
from jaxquant.numerics.stored import Stored
from jaxquant.operations.adapters import Adapted
from jaxquant.operations.dot import DotGeneral

Model = TypeVar("Model", bound=nnx.Module)


def add_lora(
    model: Model,
    modules: str = ".*",
    *inputs: Any,
    rank: int,
    alpha: float | None = None,
    rngs: nnx.Rngs,
    dtype: Any = jnp.float32,
    call: Callable[..., Any] | None = None,
    **options: Any,
) -> Model:
    """Adds a trainable low-rank product to each weight's product: x · W + α / rank · (x · A) · B.

    A is drawn from a normal of variance 1 / n, B is zero, so that nothing changes at first.  Where the model
    is frozen this is QLoRA: the base is stored in few bits and stays as it is.  Train the adapters alone:
    ``nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)`` with gradients of ``nnx.DiffState(0, nnx.LoRAParam)``.

    Args:
        model: an NNX model: float, quantized, or frozen; not changed.
        modules: a regular expression on the paths of weights, or of what holds them.  Tables that rows are
            taken of have no adapters: ``".*"`` passes them by, also where a head is tied to them.
        inputs, options: what the model is called with, arrays or `jax.ShapeDtypeStruct`s.  They are needed
            for weights that other code than Flax's own layers multiplies.
        rank: of A · B.
        alpha: α; `rank` where not given.
        rngs: what A is drawn by, from its stream ``params``.
        dtype: of A and B.
        call: from (model, *inputs, **options); the model's own call where not given.

    Raises:
        ValueError: an expression that matches no weight of a product of matrices; a rank below 1; adapters
            that are there already; a weight of convolutions, of several matrices, or that no module's
            attribute holds.

    Source: Hu et al. 2021, arXiv 2106.09685; Dettmers et al. 2023, arXiv 2305.14314.

    >>> from jaxquant.nnx import freeze, quantize
    >>> base = freeze(quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), {".*": "nf4dq"}))
    >>> adapted = add_lora(base, rank=4, rngs=nnx.Rngs(1))
    >>> adapted.kernel_lora_a.shape, adapted.kernel_lora_b.shape
    ((64, 4), (4, 8))
    """
    check_model(model)
    check_whole("rank", rank, 1)
    alpha = rank if alpha is None else alpha
    check_number("alpha", alpha)
    if not isinstance(rngs, nnx.Rngs) or not ({"params", "default"} & set(vars(rngs))):
        raise ValueError(f"rngs are nnx.Rngs with a stream for params; got {rngs!r}")
    if not isinstance(modules, str):
        raise ValueError(
            f"modules is a regular expression, before any inputs; got {type(modules).__name__}"
        )
    model = copied(model)
    rules = rules_within(model)
    unsupported = on_unsupported_of(model)
    install(model, rules, unsupported)
    (wanted,) = parse_rules({modules: DotGeneral()})
    plan = planned(model, inputs, options, call)
    tables = {p for d in plan.decisions if d.product.kind == "lookup" for p in d.product.parameters}
    found = {}
    for path, one in _products(plan).items():
        names = (path, path.rpartition("/")[0])
        if wanted.matches(Subject(names, "dot")) and not (path in tables and modules == ".*"):
            found[path] = one
    if not found:
        raise ValueError(f"{modules!r} matches no weight of a product of matrices")
    if both := [path for path in found if path in tables]:
        raise ValueError(
            f"rows are taken of {', '.join(both)} too, which would lack the adapters; leave it out of "
            f"modules={modules!r}"
        )
    if not inputs and not options:
        _warn_of_left(model, plan, wanted)
    floats = []
    for path, (one, shape) in found.items():
        module, name = held(model, path)
        if hasattr(module, f"{name}_lora_a"):
            raise ValueError(f"{path} has adapters already; merge them with merge_lora")
        if one.stacking is not None or one.stored is None or one.stored.turns:
            raise ValueError(
                f"{path} is of several matrices, which have no adapters here; leave it out of {modules!r}"
            )
        n = math.prod(shape[a] for a in one.axes)
        m = math.prod(shape) // n
        a = jax.random.normal(rngs.params(), (n, rank), dtype) / math.sqrt(n)
        setattr(module, f"{name}_lora_a", Adapter(a))
        setattr(module, f"{name}_lora_b", Adapter(jnp.zeros((rank, m), dtype)))
        setattr(module, f"{name}_lora_gain", AdapterGain(jnp.asarray(alpha / rank, dtype)))
        if one.recipe == DotGeneral():
            floats.append(Rule(re.compile(re.escape(path)), DotGeneral(), "float with adapters"))
    install(model, [*floats, *rules], unsupported)
    return model


def _warn_of_left(model: nnx.Module, plan: Plan, wanted: Rule) -> None:
    """Warns of weights that an expression matches but no Flax layer multiplies."""
    known = set(plan.parameters)
    names = [(p, p.rpartition("/")[0]) for p, _ in weights(model) if p not in known]
    if left := [n[0] for n in names if wanted.matches(Subject(n, "dot"))]:
        warnings.warn(
            f"{', '.join(left)} get no adapters: none of Flax's layers multiplies them, and without example "
            "inputs it is not known what does; add_lora(model, modules, *inputs, ...) reaches them",
            stacklevel=3,
        )


def _products(plan: Plan) -> dict[str, tuple[Operation, tuple[int, ...]]]:
    """Returns, by weight, the matrix product's replacement and the weight's shape as stored."""
    found = {}
    for decision in plan.decisions:
        product = decision.product
        if product.kind != "dot" or len(product.parameters) != 1:
            continue
        one = decision.operation or operation(product, DotGeneral())
        assert one is not None
        weight = product.operands[one.right]
        order = one.order or range(len(weight.shape))
        shape = {a: n for a, n in zip(order, weight.shape, strict=True)}
        found[product.parameters[0]] = one, tuple(shape[a] for a in range(len(shape)))
    return found


def merge_lora(
    model: Model, *inputs: Any, call: Callable[..., Any] | None = None, **options: Any
) -> Model:
    """Returns the model in floating point, its adapters added to its weights: W + α / rank · A · B.

    Weights that are stored in few bits are decoded; quantize and freeze it again to serve it in few bits.

    Args:
        model: as `add_lora` made it; not changed.
        inputs, options, call: as of `add_lora`.

    Raises:
        ValueError: no adapters; a weight that is stored in another form than the model's own, such as
            transposed or masked.
    """
    check_model(model)
    if door_of(model) is None:
        raise ValueError(f"{type(model).__name__} has no adapters; add_lora adds them")
    products = _products(planned(model, inputs, options, call))
    leaves, merged = _decoded_weights(model), set[str]()
    for place, leaf in nnx.to_flat_state(nnx.split(model)[1]):
        path = "/".join(map(str, place))
        if path not in products or not hasattr(*_adapter(model, path)):
            continue
        (one, shape), (module, name) = products[path], held(model, path)
        a, b, gain = (value(getattr(module, f"{name}_lora_{x}")) for x in ("a", "b", "gain"))
        delta = Adapted(jax.lax.dot_general, a, b, gain).delta(shape, one.axes)
        weight = value(leaves.get(place, leaf))
        if weight.shape != delta.shape:
            raise ValueError(f"{path} is multiplied in another form than the model's own")
        whole = weight.astype(jnp.float32) + delta.astype(jnp.float32)
        leaves[place] = nnx.Param(whole.astype(weight.dtype))
        merged.add(path)
    left = [
        f"{path}/{name}".strip("/").removesuffix("_lora_a")
        for path, module in modules_of(model)
        for name in vars(module)
        if isinstance(name, str) and name.endswith("_lora_a")
    ]
    left = [path for path in left if path not in merged]
    if left:
        raise ValueError(
            f"{', '.join(left)} have adapters, and what multiplies them is not known without example inputs; "
            "give them, as to add_lora"
        )
    if not merged:
        raise ValueError(f"{type(model).__name__} has no adapters; add_lora adds them")
    model = replace_parameters(model, leaves)
    plainly(model)
    return model


def _adapter(model: nnx.Module, path: str) -> tuple[Any, str]:
    module, name = held(model, path)
    return module, f"{name}_lora_a"


def unfreeze(model: Model) -> Model:
    """Returns the quantized model with its weights in floating point again, to train all of them on.

    Each stored weight is decoded, w = s · (q − z), and quantized anew at each call by the rules that the
    model has.  Where ranges are the largest magnitudes, that finds the same numbers, and its outputs are the
    frozen model's; where they follow from how values are distributed, as QuEST's, it rounds once more.
    Ranges of activations and adapters are kept, and learned steps are the stored scales.  What was rounded
    away when it was frozen does not come back; adapters (`add_lora`) leave the stored weights as they are.

    Args:
        model: as `freeze` made it, or `load`; not changed.

    Raises:
        ValueError: a model that is not frozen; a weight that is stored in another form than the model's own,
            such as in several parts.

    >>> from jaxquant.nnx import freeze, quantize
    >>> frozen = freeze(quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), {".*": "w4a16"}))
    >>> type(unfreeze(frozen).kernel).__name__, unfreeze(frozen).kernel.shape
    ('Param', (64, 8))
    """
    check_model(model)
    leaves = _decoded_weights(model)
    if not leaves:
        raise ValueError(
            f"a frozen model is wanted; this {type(model).__name__} has no stored weight"
        )
    names = ["/".join(map(str, place)) for place in leaves]
    # Rules are asked once more which of these learn their steps.
    subjects = [Subject((name, name.rpartition("/")[0]), "weight") for name in names]
    chosen = choose(subjects, rules_within(model), is_part=True)
    thawed = replace_parameters(model, leaves)
    for name, rule in zip(names, chosen, strict=True):
        forward = None if rule is None else getattr(rule.value, "forward", None)
        if forward is not None and is_learned(forward.rhs):
            module, attribute = held(thawed, name)
            stored = wrap_stored(name, read(at(model, name.split("/"))))
            step = next(iter(stored.operands.values())).float_scale()
            setattr(module, f"{attribute}_step", StepSize(step))
    return thawed


def _decoded_weights(model: nnx.Module) -> dict[Any, nnx.Param]:
    """Returns the quantized weights in floating point, by path."""
    found = {}
    for place, leaf in nnx.to_flat_state(nnx.split(model)[1]):
        if isinstance(leaf, StoredWeight):
            path = "/".join(map(str, place))
            found[place] = nnx.Param(_decoded(path, wrap_stored(path, read(leaf))))
    return found


def _decoded(path: str, stored: Stored) -> jax.Array:
    parts = {id(x): x for x in stored.operands.values()}
    operand = next(iter(parts.values()), None)
    if operand is None or operand.shape != stored.shape or len(parts) > 1:
        raise ValueError(
            f"{path} is stored in another form than the model's own, as "
            f"{', '.join(stored.operands) or 'a part of what another parameter holds'}"
        )
    return dequantize(operand).astype(stored.dtype)

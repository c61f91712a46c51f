"""Low-rank adapters beside a model's weights, which may be stored in few bits (LoRA, QLoRA)."""

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant.adapters import Adapted
from jaxquant.dot import DotGeneral
from jaxquant.functions.operations import Operation, operation
from jaxquant.nnx.calibrating import held
from jaxquant.nnx.calls import as_stored, plainly, value
from jaxquant.nnx.doors import check_model, copied, install, on_unsupported_of, rules_within
from jaxquant.nnx.modules import Adapter, AdapterGain, read
from jaxquant.nnx.modules import Stored as StoredWeight
from jaxquant.nnx.planning import planned
from jaxquant.qarray import QArray, dequantize
from jaxquant.rules import Rule, Subject, parse_rules
from jaxquant.stored import Stored

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
    """The model with a trainable low-rank product beside each weight's: x · W + α / rank · (x · A) · B.

    A is drawn from a normal of variance 1 / n, B is zero, so that nothing changes at first.  Where the model
    is frozen this is QLoRA: the base is stored in few bits and stays as it is.  Train the adapters alone:
    ``nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)`` with gradients of ``nnx.DiffState(0, nnx.LoRAParam)``.

    Args:
        model: an NNX model: float, quantized, or frozen; not changed.
        modules: a regular expression on the paths of weights, or of what holds them.
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
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is a whole number of at least 1; got {rank!r}")
    alpha = rank if alpha is None else alpha
    model = copied(model)
    rules = rules_within(model)
    unsupported = on_unsupported_of(model)
    install(model, rules, unsupported)
    (wanted,) = parse_rules({modules: DotGeneral()})
    found = {}
    for path, one in _products(model, inputs, options, call).items():
        names = (path, path.rpartition("/")[0])
        if wanted.matches(Subject(names, "dot")):
            found[path] = one
    if not found:
        raise ValueError(f"{modules!r} matches no weight of a product of matrices")
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


def _products(
    model: nnx.Module, inputs: Any, options: Any, call: Any
) -> dict[str, tuple[Operation, tuple[int, ...]]]:
    """By weight, what takes the place of a product of matrices, and the weight's shape as it is stored."""
    found = {}
    for decision in planned(model, inputs, options, call).decisions:
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
    """The model in floating point, its adapters added to its weights: W + α / rank · A · B.

    Weights that are stored in few bits are decoded; quantize and freeze it again to serve it in few bits.

    Args:
        model: as `add_lora` made it; not changed.
        inputs, options, call: as of `add_lora`.

    Raises:
        ValueError: no adapters; a weight that is stored in another form than the model's own, such as
            transposed or masked.
    """
    model = copied(model)
    products = _products(model, inputs, options, call)
    is_merged = False
    for path, (one, shape) in products.items():
        module, name = held(model, path)
        if not hasattr(module, f"{name}_lora_a"):
            continue
        a, b, gain = (value(getattr(module, f"{name}_lora_{x}")) for x in ("a", "b", "gain"))
        delta = Adapted(jax.lax.dot_general, a, b, gain).delta(shape, one.axes)
        weight = _decoded(path, read(getattr(module, name)))
        if weight.shape != delta.shape:
            raise ValueError(f"{path} is multiplied in another form than the model's own")
        merged = (weight.astype(jnp.float32) + delta.astype(jnp.float32)).astype(weight.dtype)
        setattr(module, name, nnx.Param(merged))
        is_merged = True
    if not is_merged:
        raise ValueError(f"{type(model).__name__} has no adapters; add_lora adds them")
    for path, module in nnx.iter_graph(model):
        for name, variable in vars(module).items() if isinstance(module, nnx.Module) else ():
            if isinstance(variable, StoredWeight):
                decoded = _decoded("/".join(map(str, (*path, name))), read(variable))
                setattr(module, name, nnx.Param(decoded))
    plainly(model)
    return model


def _decoded(path: str, weight: Any) -> jax.Array:
    if not isinstance(weight, QArray | Stored):
        return weight
    stored = as_stored(path, weight)
    operand = stored.operands.get(path) or stored.operand
    if operand.shape != stored.shape:
        raise ValueError(f"{path} is stored in another form than the model's own")
    return dequantize(operand).astype(stored.dtype)

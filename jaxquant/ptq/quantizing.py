"""Post-training quantization of a whole model, layer after layer, from a few batches of its inputs."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from tqdm.auto import tqdm

from jaxquant.checks import check_whole
from jaxquant.engine.batches import check_each, fitting
from jaxquant.engine.products import Product
from jaxquant.engine.rules import Rule, Rules
from jaxquant.functions.freezing import unwrap_stored
from jaxquant.functions.quantizing import Decision
from jaxquant.nnx.doors import copied, install, quantized_copy, rules_of, rules_within
from jaxquant.nnx.modules import ChannelScale
from jaxquant.nnx.modules import Stored as StoredWeight
from jaxquant.nnx.observing import Statistic, observe
from jaxquant.nnx.storing import holder_of, replace_parameters
from jaxquant.numerics.opaque import Owner
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.numerics.stored import Stored
from jaxquant.operations.dot import DotGeneral
from jaxquant.ptq.identity import identity
from jaxquant.ptq.layers import Layer, layers_of, operation_of, quantizer_of
from jaxquant.ptq.resuming import Store
from jaxquant.ptq.solving import (
    Method,
    check_seen,
    needs_statistics,
    not_called,
    solve,
    statistic,
    statistics_bytes,
)
from jaxquant.ptq.statistics import InputStatistics

Model = TypeVar("Model", bound=nnx.Module)
Batches = Sequence[Any] | Callable[[], Iterable[Any]]

METHODS = ("rtn", "gptq", "awq", "smoothquant", "hadamard")
_LARGEST_ROTATION = 512


@dataclasses.dataclass(eq=False)
class SharedStatistics:
    """Statistics that calls of `quantize` on the same model and batches share.

    Args:
        model: of the calls, which must not change between them.
        batches: of the calls.
        call: of the calls.

    >>> import jax
    >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    >>> batches = [jax.random.normal(jax.random.key(0), (32, 64))]
    >>> shared = SharedStatistics(model, batches)
    >>> for recipe in ("w2a16", "w4a16"):  # the batches are gone through once
    ...     frozen = quantize(model, {".*": recipe}, batches, shared=shared, progress=False)
    """

    model: nnx.Module
    batches: Batches
    call: Callable[..., Any] | None = None
    found: dict[tuple[str, bool], InputStatistics] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    def check(self, model: nnx.Module, batches: Batches, call: Callable[..., Any] | None) -> None:
        """Raises a ValueError unless all three are those that the statistics are of."""
        given = {"model": model, "batches": batches, "call": call}
        for name, value in given.items():
            if value is not getattr(self, name):
                raise ValueError(
                    f"shared statistics are of another {name}; make SharedStatistics({', '.join(given)}) "
                    "for this one"
                )


def quantize(
    model: Model,
    rules: Rules,
    batches: Batches,
    method: str = "gptq",
    *,
    memory: int = 2**24,
    call: Callable[..., Any] | None = None,
    workdir: str | os.PathLike | None = None,
    shared: "SharedStatistics | None" = None,
    progress: bool = True,
) -> Model:
    """Returns the model frozen, its weights rounded with regard to the inputs that each layer gets.

    Layers are taken in the order in which they are called, as many at once as their statistics fit into
    `memory`; each sees its inputs as the layers quantized before it leave them.  A batch's activations are
    gone with the batch.

    The method is one of these, or several joined by ``+``, as in ``"hadamard+gptq"``:

    - ``"rtn"``: round to nearest; inputs are not looked at.
    - ``"gptq"``: rounding that makes up for its errors (`solvers.gptq`).
    - ``"awq"``: channels scaled by what they carry (`smooth.awq_scale`).
    - ``"smoothquant"``: channels scaled so that weights and activations are alike hard
      (`smooth.smoothquant_scale`).
    - ``"hadamard"``: weights, and activations where they are quantized, in rotated coordinates.  It spreads
      single large channels, and gathers a common mean, as behind a ReLU, in one coordinate: those layers are
      better left to another method.

    Weights are found in the model's calls on the batches, whoever wrote the layers; those of layers that are
    stacked, of experts and of heads that are multiplied side by side are rounded each by itself, by what each
    is given.  Scales of channels and rotations are for products of matrices; convolutions and ragged products
    have neither.  A table is rounded to nearest whatever the method, since its rows are looked up too.

    Args:
        model: an NNX model in floating point, which stays as it is.
        rules: as of `jaxquant.nnx.quantize`.
        batches: a list of inputs, each an array or a tuple of arguments; or a function that starts such a
            series from its beginning, since it is gone through several times.
        method: as above.
        memory: bytes of statistics held at once; n² · 4 for a layer of n inputs.  Fewer means more passes,
            and layers that see more of what those before them became, which at few bits is worth it.
        call: from (model, *batch); the model's own call where not given.
        workdir: a folder in which finished layers are kept, so that the same call goes on where it stopped.
            `call` is known by its code and what it closes over, or by its string ``fingerprint``.
        shared: statistics that calls on the same model and batches share, so that only the first of them goes
            through the batches for the layers that fit into `memory` first.
        progress: whether a bar is shown.

    Returns:
        A frozen model, as of `jaxquant.nnx.freeze`.

    Raises:
        ValueError: whatever `jaxquant.nnx.quantize` refuses; an unknown method, or two that scale channels;
            no batches, or one with a NaN; recipes with learned steps or traced widths; a layer that the
            batches do not reach, or that the method does not take; a weight of several layers; a workdir of
            another model, method, data, call or other rules, or a call whose content cannot be told;
            shared statistics of another model, batches or call.

    >>> import jax
    >>> from jaxquant.nnx import read
    >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    >>> batches = [jax.random.normal(jax.random.key(i), (32, 64)) for i in range(2)]
    >>> frozen = quantize(model, {".*": "w3a16"}, batches, progress=False)
    >>> read(frozen.kernel).bits_per_element
    3.5
    """
    chosen = _parse(method)
    check_batches(batches)
    check_whole("memory", memory, 1, unit="bytes")
    if shared is not None:
        shared.check(model, batches, call)
    if workdir is not None and not isinstance(workdir, str | os.PathLike):
        raise ValueError(f"workdir is a folder; got {workdir!r}")
    target = quantized_copy(model, rules)
    index, arguments = next(check_each(series(batches)))
    with fitting(index, arguments):
        layers, decisions = layers_of(target, arguments, call)
    for layer in layers:
        if holder_of(target, layer.path) is None:
            raise ValueError(
                f"{layer.path} cannot be stored: no module's attribute holds it, but a list or dict; a rule "
                f"({layer.path!r}, None) before the others leaves it in float"
            )
        _check(layer, chosen, method)
    if "hadamard" in chosen:
        rotated = [_rotated(layer) for layer in layers if layer.is_dot]
        install(target, [*rotated, *rules_of(target)])
        layers, decisions = layers_of(target, arguments, call)
    store = Store(workdir, lambda: _identities(model, decisions, batches, method, call))
    working, done = copied(model), list[Rule]()
    install(working, rules_within(model))
    with tqdm(total=len(layers), disable=not progress, desc=f"quantizing by {method}") as bar:
        for stage in _stages(layers, memory, chosen):
            paths = [layer.path for layer in stage]
            store.enter(paths)
            solved = store.read(paths)
            if solved is None:
                # Those of later stages depend on how the layers before were rounded.
                found = None if done or shared is None else shared
                seen = _statistics(working, stage, batches, chosen, call, found)
                solved = {layer.path: solve(layer, seen, chosen) for layer in stage}
                store.write(paths, solved)
            working = _with_layers(working, stage, solved)
            done += [_rule(layer, _recipe(layer)) for layer in stage]
            install(working, [*done, *rules_within(model)])
            bar.update(len(stage))
    install(working, [rule._replace(is_earlier=True) for rule in rules_of(target)])
    return working


# ---------------------------------------------------------------------------------------------------
# What was asked for


def _parse(method: Any) -> frozenset[str]:
    parts = method.split("+") if isinstance(method, str) else [method]
    for part in parts:
        if part not in METHODS:
            raise ValueError(
                f"method is one of {', '.join(METHODS)}, or several joined by +; got {method!r}"
            )
    if len(set(parts)) < len(parts):
        raise ValueError(f"method names each part once; got {method!r}")
    if {"awq", "smoothquant"} <= set(parts):
        raise ValueError(f"awq and smoothquant both scale channels; choose one; got {method!r}")
    if {"rtn", "gptq"} <= set(parts):
        raise ValueError(f"rtn and gptq both round; choose one; got {method!r}")
    return frozenset(parts)


def check_batches(batches: Any) -> None:
    is_series = hasattr(batches, "__len__") and hasattr(batches, "__iter__")
    if not callable(batches) and (not is_series or isinstance(batches, str | bytes)):
        raise ValueError(
            "batches are gone through several times: give a list, or a function that starts them anew; "
            f"got {type(batches).__name__}"
        )


def series(batches: Any) -> Iterable[Any]:
    """Returns the batches from their beginning."""
    started: Any = batches() if callable(batches) else batches
    return started


def _check(layer: Layer, chosen: Method, method: str) -> None:
    """Raises a ValueError for a layer that a method does not take, or whose weight is no number."""
    for path in {p for d in layer.decisions.values() for p in operation_of(d).stored.paths}:  # pyright: ignore
        if not bool(jnp.isfinite(layer.values[path]).all()):
            raise ValueError(f"the weights of {layer.label} hold a NaN or an Inf")
    are_tables = all(isinstance(module, nnx.Embed) for module in layer.holders.values())
    if len(layer.holders) > 1 and not are_tables and chosen - {"rtn"}:
        raise ValueError(
            f"{' and '.join(layer.holders)} share one weight, and method {method!r} rounds for one layer's "
            "inputs; method 'rtn' takes it, and a rule with None for each leaves it in float"
        )
    if not needs_statistics(layer, chosen):
        return
    if not layer.is_called:
        raise ValueError(not_called(layer))
    if found := _unsuited(layer, chosen):
        raise ValueError(
            f"{layer.label} has {found}, which method {method!r} does not take; method 'rtn' does, and a "
            f"rule ('{layer.name}', None) before the others leaves the layer in float"
        )


def _unsuited(layer: Layer, chosen: Method) -> str:
    """Returns what solvers cannot handle in a layer (they round matrices of all inputs), or ""."""
    for decision in layer.decisions.values():
        settings = decision.product.settings
        groups = settings.get("feature_group_count", 1) * settings.get("batch_group_count", 1)
        if groups != 1:
            return f"feature_group_count {groups} (a grouped convolution)"
        if _is_masked(layer, decision):
            return "a mask"
    parts = {path for d in layer.decisions.values() for path in d.product.parameters}
    is_one = len(parts) == len(layer.decisions) == 1
    if layer.is_dot and chosen & {"awq", "smoothquant"} and not is_one:
        return "several weights, which would share one scale for each channel,"
    return ""


def _is_masked(layer: Layer, decision: Decision) -> bool:
    """Returns whether a weight is zero where its parameter is not: error feedback would fill such zeros."""
    made = operation_of(decision).stored
    assert made is not None
    if made.key.replace("turn(", "").rstrip(")") == layer.path:
        return False
    values = {path: layer.values[path] for path in made.paths}
    own = sum(int(jnp.sum(values[path] == 0)) for path in decision.product.parameters)
    return int(jnp.sum(made.of(values) == 0)) > own


def _rotated(layer: Layer) -> Rule:
    """Returns a layer's rule in Hadamard coordinates, in the largest blocks that divide its inputs."""
    size = _LARGEST_ROTATION
    for matrices in layer.matrices.values():
        size = math.gcd(size, matrices.own[matrices.axes[-1]])
    recipe = _recipe(layer)
    granularity = quantizer_of(next(iter(layer.decisions.values()))).granularity
    if not isinstance(granularity, str):
        size = math.gcd(size, granularity if isinstance(granularity, int) else 1)
    if size == 1:
        raise ValueError(
            f"{layer.label} cannot be rotated: its inputs are not divided by any power of two"
        )

    def rotated(quantizer: Quantizer | None) -> Quantizer | None:
        return None if quantizer is None else dataclasses.replace(quantizer, hadamard=size)

    forward = recipe.forward
    changed = dataclasses.replace(forward, lhs=rotated(forward.lhs), rhs=rotated(forward.rhs))
    return _rule(layer, dataclasses.replace(recipe, forward=changed))


def _recipe(layer: Layer) -> DotGeneral:
    rule = next(iter(layer.decisions.values())).rule
    assert rule is not None
    assert isinstance(rule.value, DotGeneral)
    return rule.value


def _rule(layer: Layer, recipe: DotGeneral) -> Rule:
    """Returns a rule for one layer alone."""
    rule = next(iter(layer.decisions.values())).rule
    assert rule is not None
    return Rule(re.compile(re.escape(layer.path)), recipe, rule.label, is_earlier=True)


def _stages(ordered: Sequence[Layer], memory: int, chosen: Method) -> list[list[Layer]]:
    """Neighbours whose statistics fit into memory together."""
    stages: list[list[Layer]] = [[]]
    held = 0
    for layer in ordered:
        size = statistics_bytes(layer, chosen)
        if stages[-1] and held + size > memory:
            stages.append([])
            held = 0
        stages[-1].append(layer)
        held += size
    return stages


def _statistics(
    model: nnx.Module,
    stage: Sequence[Layer],
    batches: Any,
    chosen: Method,
    call: Any,
    shared: "SharedStatistics | None",
) -> dict[str, InputStatistics]:
    """Returns statistics by the derivation of each weight of a stage."""
    wanted = {
        key: statistic(matrices.inputs, chosen)
        for layer in stage
        if needs_statistics(layer, chosen)
        for key, matrices in layer.matrices.items()
    }
    if not wanted:
        return {}

    def statistics(product: Product) -> Statistic | None:
        made = product.derivation
        return None if made is None else wanted.get(made.stored.key)

    kinds = {key: (key, one.start.products is not None) for key, one in wanted.items()}
    if shared is not None and shared.found.keys() >= set(kinds.values()):
        return {key: shared.found[kind] for key, kind in kinds.items()}
    found = observe(model, series(batches), statistics, call)
    for layer in stage:
        check_seen(layer, [found[key] for key in layer.decisions if key in found])
    if shared is not None:
        shared.found.update({kinds[key]: state for key, state in found.items()})
    return found


def _with_layers(model: Model, stage: Sequence[Layer], solved: Mapping[str, Any]) -> Model:
    """Returns the model with layers' weights as they are stored, and their channels' scales beside them."""
    paths = {"/".join(map(str, path)): path for path, _ in nnx.to_flat_state(nnx.split(model)[1])}
    leaves = {}
    for layer in stage:
        found, plain = solved[layer.path], layer.values[layer.path]
        operands = {key: found[f"weight{place}"] for place, key in enumerate(layer.decisions)}
        stored = Stored(operands, plain.shape, plain.dtype, Owner(layer.path))
        leaves[paths[layer.path]] = StoredWeight(unwrap_stored(layer.path, stored))
    model = replace_parameters(model, leaves)
    for layer in stage:
        if "scale" in solved[layer.path]:
            holder = holder_of(model, layer.path)
            assert holder is not None
            setattr(holder[0], f"{holder[1]}_scale", ChannelScale(solved[layer.path]["scale"]))
    return model


# ---------------------------------------------------------------------------------------------------
# Going on where it stopped


def _identities(
    model: Any, decisions: Sequence[Decision], batches: Any, method: str, call: Any
) -> dict[str, str]:
    """Hashes of all that decides the result."""
    rules = [(d.product.path, d.rule.value) for d in decisions if d.rule is not None]
    return {
        "model": identity("model", model),
        "rules": identity("rules", rules),
        "data": identity("batches", list(series(batches))),
        "method": method,
        "call": identity("call", call),
    }

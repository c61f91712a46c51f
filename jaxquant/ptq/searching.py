"""The search for mixed precision: each layer's loss in each recipe is measured, then a budget is spent."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from jaxquant.artifacts import files
from jaxquant.checks import check_number
from jaxquant.engine.batches import check_each, fitting
from jaxquant.engine.products import Product
from jaxquant.engine.rebuilding import Use
from jaxquant.functions.freezing import stored_operand
from jaxquant.functions.operations import Operation
from jaxquant.nnx.calls import Call, called
from jaxquant.nnx.doors import first_places, quantized_copy, weights
from jaxquant.numerics.qarray import QArray, dequantize
from jaxquant.ptq.identity import difference, identity
from jaxquant.ptq.layers import Layer, layers_of, operation_of
from jaxquant.ptq.quantizing import check_batches, series
from jaxquant.ptq.search import Allocation, allocate

Loss = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
        rules: one for each layer, for `jaxquant.ptq.quantize` or `jaxquant.nnx.quantize`.
        groups: the layers that are given one recipe together, by name.
        choices: recipes by name.
        costs: bytes of each group in each choice, int[groups, choices].
        losses: what each group loses in each choice, alone, float[groups, choices].
        allocation: which choice each group got, with the bytes and the loss that add up.
    """

    rules: tuple[tuple[str, Any], ...]
    groups: dict[str, tuple[str, ...]]
    choices: tuple[str, ...]
    costs: np.ndarray
    losses: np.ndarray
    allocation: Allocation

    def __str__(self) -> str:
        lines = [
            f"{self.allocation.bytes:,} bytes, loss {self.allocation.loss:.4g} if losses add up"
        ]
        for name, choice, losses in zip(
            self.groups, self.allocation.choices, self.losses, strict=True
        ):
            measured = "  ".join(f"{c} {v:.3g}" for c, v in zip(self.choices, losses, strict=True))
            lines.append(f"{name}: {self.choices[choice]}  ({measured})")
        return "\n".join(lines)


def search(
    model: nnx.Module,
    choices: Sequence[str],
    batches: Any,
    budget: int,
    *,
    modules: str = ".*",
    group: Callable[[str], str] | None = None,
    loss: Loss | None = None,
    workdir: str | os.PathLike | None = None,
    progress: bool = True,
) -> Search:
    """Finds a recipe for each layer, so that the weights take at most `budget` bytes.

    Each group of layers is quantized alone in each recipe, its weights rounded to nearest, and what the model
    then loses on the batches is measured; the losses are taken to add up, and `search.allocate` spends the
    budget.  What a recipe does to activations is not part of this measurement.

    Args:
        model: an NNX model in floating point, which stays as it is.
        choices: recipes' names, such as ``("w2a16", "w3a16", "w4a16", "w8a16")``.
        batches: as of `jaxquant.ptq.quantize`.
        budget: bytes for the weights of all layers that `modules` matches, scales included.
        modules: a regular expression on the paths of the layers to choose for.
        group: from a path to the name of its group, such as its block's; every layer by itself where not
            given.
        loss: from (model, *batch) to a scalar; where not given, the mean Kullback-Leibler divergence of the
            model's softmax from what it was in floating point.
        workdir: a folder in which measurements are kept, so that the same call goes on where it stopped.
            `loss` is known by its code and what it closes over, or by its string ``fingerprint``.
        progress: whether a bar is shown.

    Raises:
        ValueError: no batches; a budget below what the cheapest recipes take; an expression that matches
            nothing; a layer that cannot take a recipe; a workdir of another model, data or loss, or a loss
            whose content cannot be told.

    >>> import jax
    >>> model = nnx.Sequential(*[nnx.Linear(32, 32, rngs=nnx.Rngs(i)) for i in range(2)])
    >>> batches = [jax.random.normal(jax.random.key(0), (8, 32))]
    >>> found = search(model, ("w2a16", "w8a16"), batches, 1600, progress=False)
    >>> sorted(name for _, name in found.rules)
    ['w2a16', 'w8a16']
    """
    check_batches(batches)
    for what, function in (("group", group), ("loss", loss)):
        if function is not None and not callable(function):
            raise ValueError(f"{what} is a function; got {function!r}")
    check_number("budget", budget, unit="bytes")
    if not isinstance(choices, list | tuple) or not choices or len(set(choices)) != len(choices):
        raise ValueError(f"choices are recipes, each once; got {choices!r}")
    known = _Known(workdir, lambda: _identities(model, batches, loss))
    reference, first = _references(model, batches, loss)
    layers, costs = _search_result(model, choices, modules, first, loss)
    paths = list(layers)
    named = {p: p if group is None else group(p) for p in paths}
    if odd := [(p, name) for p, name in named.items() if not isinstance(name, str)]:
        raise ValueError(
            f"group gives a layer's group by name; for {odd[0][0]!r} it gave {odd[0][1]!r}"
        )
    groups = {
        name: tuple(p for p in paths if named[p] == name) for name in dict.fromkeys(named.values())
    }
    total = np.array(
        [[sum(costs[p][i] for p in g) for i in range(len(choices))] for g in groups.values()]
    )
    smallest = int(total.min(axis=1).sum())
    if budget < smallest:
        raise ValueError(
            f"a budget of {budget} bytes is less than the smallest of these, {smallest}"
        )
    measure = _Measure(model, layers, batches, loss, reference)
    losses = np.zeros(total.shape)
    with tqdm(total=losses.size, disable=not progress, desc="measuring sensitivity") as bar:
        for i, (name, members) in enumerate(groups.items()):
            for j, choice in enumerate(choices):
                key = f"{name} {choice} {' '.join(members)}"
                losses[i, j] = known.get(key, lambda m=members, c=j: measure(m, c))
                bar.update(1)
    # A little less than nothing, as noise may have it, is no gain to be bought.
    allocation = allocate(total, np.maximum(losses, 0), budget)
    rules = tuple(
        (re.escape(path), choices[choice])
        for members, choice in zip(groups.values(), allocation.choices, strict=True)
        for path in members
    )
    return Search(rules, groups, tuple(choices), total, losses, allocation)


def _search_result(
    model: nnx.Module, choices: Sequence[str], modules: str, arguments: Any, loss: Loss | None
) -> tuple[dict[str, list[Layer]], dict[str, list[int]]]:
    """Returns each layer in all recipes, by its name in the model's order, and its bytes in them."""
    found: dict[str, list[Layer]] = {}
    order = [path for path, _ in weights(model)]
    for choice in choices:
        target = quantized_copy(model, {modules: choice})
        with fitting(0, arguments):
            layers, _ = layers_of(target, arguments, loss)
        for layer in sorted(layers, key=lambda layer: order.index(layer.path)):
            found.setdefault(layer.name, []).append(layer)
    short = [name for name, each in found.items() if len(each) != len(choices)]
    if short:
        raise ValueError(
            f"{short[0]} has quantized weights in some of the choices and not in others"
        )
    return found, {name: [_bytes(layer) for layer in each] for name, each in found.items()}


def _bytes(layer: Layer) -> int:
    """Returns a frozen layer's bytes, from shapes alone."""
    found = [
        jax.eval_shape(lambda d=d: stored_operand(d, layer.values))
        for d in layer.decisions.values()
    ]
    return sum(x.nbytes for x in found)


class _Measure:
    """The model's loss with some of its weights quantized: one program for all."""

    def __init__(
        self,
        model: nnx.Module,
        layers: Mapping[str, Sequence[Layer]],
        batches: Any,
        loss: Loss | None,
        reference: list[jax.Array] | None,
    ):
        self._model, self._batches, self._layers = model, batches, layers
        self._reference = reference
        if loss is None:
            self._call = lambda model, reference, *batch: _divergence(model(*batch), reference)
        else:
            self._call = lambda model, *batch: _scalar(loss(model, *batch))
        self._weights = {
            key: operation_of(decision).stored.of(layer.values)  # pyright: ignore
            for layer, *_ in layers.values()
            for key, decision in layer.decisions.items()
        }
        self._run = jax.jit(_with_weights, static_argnums=0)
        self._base = self._mean({}) if loss is not None else 0.0

    def __call__(self, names: Sequence[str], choice: int) -> float:
        changed = {}
        for name in names:
            layer = self._layers[name][choice]
            for key, decision in layer.decisions.items():
                stored = _decode(operation_of(decision), stored_operand(decision, layer.values))
                changed[key] = stored.astype(self._weights[key].dtype)
        return self._mean(changed) - self._base

    def _mean(self, changed: Mapping[str, jax.Array]) -> float:
        found, weights = [], {**self._weights, **changed}
        for index, arguments in check_each(series(self._batches)):
            with fitting(index, arguments):
                known = () if self._reference is None else (self._reference[index],)
                given = (*known, *arguments)
                first = first_places(self._model)
                call, arrays, _ = called(self._model, "", self._call, given, {}, first)
                found.append(float(self._run(call, arrays, weights)))
        return float(np.mean(found))


def _decode(operation: Operation, stored: QArray) -> jax.Array:
    """Returns a layer's weight as it comes back from storage."""
    decode = dequantize if operation.stacking is None else operation.stacking.each(dequantize)
    for _ in operation.stored.turns if operation.stored is not None else ():
        decode = jax.vmap(decode)
    return decode(stored)


def _with_weights(call: Call, arrays: Any, weights: Mapping[str, jax.Array]) -> jax.Array:
    """Returns a call's result with other weights in its products, by how each is made of parameters."""
    trace = call.trace(arrays)
    uses: list[Use | None] = []
    data = {}
    for index, product in enumerate(trace.products):
        made = product.derivation
        given = None if made is None else weights.get(made.stored.key)
        uses.append(None if given is None else _use(index, product))
        if given is not None:
            data[index] = given
    (result, _), _ = trace.evaluate(arrays, uses, data)
    return result


def _use(index: int, product: Product) -> Use:
    """Returns the product of other operands: with another weight in the place of its own."""
    place, made = product.weight, product.derivation
    assert made is not None

    def apply(given: jax.Array, _: None, *operands: jax.Array) -> Any:
        weight = given if made.order is None else jnp.transpose(given, made.order)
        return tuple(weight if i == place else x for i, x in enumerate(operands)), None

    return Use(index, apply, frozenset(scan for scan, _ in made.stored.turns))


def _references(
    model: nnx.Module, batches: Any, loss: Loss | None
) -> tuple[list[jax.Array] | None, tuple[Any, ...]]:
    """Returns the model's outputs for the batches (a custom loss needs none), and the first of them."""
    if loss is not None:
        return None, next(check_each(series(batches)))[1]
    found, first = [], ()
    for index, arguments in check_each(series(batches)):
        with fitting(index, arguments):
            found.append(_logits(model, arguments))
        first = first or arguments
    return found, first


@nnx.jit
def _forward(model: nnx.Module, *batch: Any) -> jax.Array:
    return model(*batch)  # pyright: ignore[reportCallIssue]


def _scalar(loss: Any) -> Any:
    if jnp.shape(loss) != ():
        raise ValueError(f"loss gives a scalar; it gave shape {jnp.shape(loss)}")
    return loss


def _logits(model: nnx.Module, arguments: tuple[Any, ...]) -> jax.Array:
    found = _forward(model, *arguments)
    if not bool(jnp.isfinite(found).all()):
        raise ValueError("the model's outputs on the calibration data hold a NaN or an Inf")
    return found


def _divergence(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns mean Kullback-Leibler divergence of softmax(logits) from softmax(reference)."""
    log_p, log_q = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def _identities(model: nnx.Module, batches: Any, loss: Loss | None) -> dict[str, str]:
    """Hashes of all that decides what is measured."""
    return {
        "model": identity("model", model),
        "data": identity("batches", list(series(batches))),
        "loss": identity("loss", loss),
    }


class _Known:
    """Measurements in a file, or nowhere."""

    def __init__(self, workdir: Any, identities: Callable[[], Mapping[str, str]]):
        self._path = None if workdir is None else Path(workdir) / "sensitivity.json"
        self._values: dict[str, float] = {}
        if self._path is None:
            return
        self._identities = dict(identities())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            try:
                content = files.read_json(self._path)
                known, self._values = content["fingerprint"], content["losses"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"'{self._path}' is damaged; delete it, and it is made anew"
                ) from None
            if other := difference(known, self._identities):
                raise ValueError(
                    f"workdir '{workdir}' holds measurements of another {other}, or of another version of "
                    "jaxquant; choose another"
                )

    def get(self, key: str, compute: Callable[[], float]) -> float:
        if key not in self._values:
            self._values[key] = compute()
            if self._path is not None:
                content = {"fingerprint": self._identities, "losses": self._values}
                files.write(self._path, json.dumps(content))
        return self._values[key]

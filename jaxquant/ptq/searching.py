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

from jaxquant import files
from jaxquant.nnx.freezing import frozen_nbytes, quantize_weight, shared_copy, weight_quantizer
from jaxquant.nnx.modules import read, write
from jaxquant.nnx.observing import checked, fitting
from jaxquant.nnx.sites import sites
from jaxquant.nnx.slots import quantize as apply_rules
from jaxquant.ptq.identity import difference, identity
from jaxquant.ptq.quantizing import check_batches, series
from jaxquant.ptq.search import Allocation, allocate
from jaxquant.qarray import dequantize

Loss = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Search:
    """What a search found.

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
    """Which recipe each layer should get, so that the weights take at most `budget` bytes.

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
    if isinstance(budget, bool) or not isinstance(budget, int | float | np.number):
        raise ValueError(f"budget is a number of bytes; got {budget!r}")
    if not isinstance(choices, list | tuple) or not choices or len(set(choices)) != len(choices):
        raise ValueError(f"choices are recipes, each once; got {choices!r}")
    paths, costs = _costs(model, choices, modules)
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
    measure = _Measure(model, batches, loss)
    known = _Known(workdir, lambda: _identities(model, batches, loss))
    losses = np.zeros(total.shape)
    with tqdm(total=losses.size, disable=not progress, desc="measuring sensitivity") as bar:
        for i, (name, members) in enumerate(groups.items()):
            for j, choice in enumerate(choices):
                key = f"{name} {choice} {' '.join(members)}"
                losses[i, j] = known.get(key, lambda m=members, c=choice: measure(m, c))
                bar.update(1)
    # A little less than nothing, as noise may have it, is no gain to be bought.
    allocation = allocate(total, np.maximum(losses, 0), budget)
    rules = tuple(
        (re.escape(path), choices[choice])
        for members, choice in zip(groups.values(), allocation.choices, strict=True)
        for path in members
    )
    return Search(rules, groups, tuple(choices), total, losses, allocation)


def _costs(
    model: Any, choices: Sequence[str], modules: str
) -> tuple[list[str], dict[str, list[int]]]:
    """Bytes of each layer in each recipe."""
    costs: dict[str, list[int]] = {}
    for choice in choices:
        for path, site in sites(apply_rules(model, {modules: choice})).items():
            if weight_quantizer(site) is not None:
                costs.setdefault(path, []).append(frozen_nbytes(site))
    short = [path for path, found in costs.items() if len(found) != len(choices)]
    if short:
        raise ValueError(
            f"{short[0]} has quantized weights in some of the choices and not in others"
        )
    return list(costs), costs


class _Measure:
    """What the model loses with some of its weights quantized: one program for all."""

    def __init__(self, model: nnx.Module, batches: Any, loss: Loss | None):
        self._model, self._batches = model, batches
        self._rounded: dict[str, Any] = {}
        if loss is None:
            self._reference = []
            for index, arguments in checked(series(batches)):
                with fitting(index, arguments):
                    self._reference.append(_logits(model, arguments))
            self._run = nnx.jit(
                lambda model, reference, *batch: _divergence(model(*batch), reference)
            )
        else:
            self._reference = None
            self._run = nnx.jit(lambda model, *batch: _scalar(loss(model, *batch)))
        self._base = self._mean(model) if loss is not None else 0.0

    def __call__(self, paths: Sequence[str], choice: str) -> float:
        model = shared_copy(self._model)
        for path in paths:
            site = sites(model)[path]
            quantized = sites(apply_rules(model, {re.escape(path): choice}))[path]
            quantizer = weight_quantizer(quantized)
            assert quantizer is not None
            values = quantized_values(quantized, quantizer)
            write(site.variable, values.astype(read(site.variable).dtype))
        return self._mean(model) - self._base

    def _mean(self, model: nnx.Module) -> float:
        found = []
        for index, arguments in checked(series(self._batches)):
            with fitting(index, arguments):
                known = () if self._reference is None else (self._reference[index],)
                found.append(float(self._run(model, *known, *arguments)))
        return float(np.mean(found))


def quantized_values(site: Any, quantizer: Any) -> jax.Array:
    """A layer's weight as it comes back from storage."""
    return site.stacking.each(dequantize)(quantize_weight(site, quantizer))


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
    """Mean Kullback-Leibler divergence of softmax(logits) from softmax(reference)."""
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

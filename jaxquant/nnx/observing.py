"""What a model's activations are like: statistics over batches."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
from flax import nnx

from jaxquant.batches import checked, fitting
from jaxquant.nnx.freezing import shared_copy
from jaxquant.nnx.modules import (
    Activations,
    Observer,
)
from jaxquant.nnx.sites import Site, put, sites
from jaxquant.rules import ATTENTION

Model = TypeVar("Model", bound=nnx.Module)
# (state to start from, from (state, activations) to the next state)
Statistic = tuple[Any, Callable[[Any, Activations], Any]]


def observe(
    model: nnx.Module,
    batches: Iterable[Any],
    statistics: Callable[[Site], Statistic | None],
    call: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Statistics of the activations that each module multiplies, gathered over batches.

    The model runs as it is, compiled once, and each batch's activations are gone with it.

    Args:
        model: an NNX model, float or quantized.
        batches: inputs, each an array or a tuple of arguments.
        statistics: from a module's `Site` to its statistic, a pair (state to start from, update); None for
            a module that is not looked at.
        call: from (model, *batch); the model's own call where not given.

    Returns:
        The last state of each module's statistic, by path; stacked modules' are stacked along leading axes.

    Raises:
        ValueError: no batches; a batch that holds a NaN or an Inf; no module to look at.
    """
    # With its variables and arrays shared: nothing of the given model is written to.
    model = shared_copy(model)
    watched = {}
    for path, site in sites(model).items():
        found = None if site.kind in (ATTENTION, "conv_transpose") else statistics(site)
        if found is not None:
            operation = site.operation
            operation = jax.lax.dot_general if operation is None else operation
            watched[path] = Observer(site.kind, operation, *found, site.stacking)
            put(site, watched[path])
    if not watched:
        raise ValueError("no module's activations are to be observed")
    run = nnx.jit(_run, static_argnums=0)
    for index, arguments in checked(batches):
        with fitting(index, arguments):
            run(call, model, *arguments)
    return {path: observer.found() for path, observer in watched.items()}


def _run(call: Any, model: nnx.Module, *arguments: Any) -> None:
    (model if call is None else lambda *a: call(model, *a))(*arguments)  # pyright: ignore

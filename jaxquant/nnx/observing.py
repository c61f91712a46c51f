"""What a model's activations are like: statistics over batches."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import FlaxError

from jaxquant.nnx.freezing import shared_copy
from jaxquant.nnx.modules import (
    Activations,
    Observer,
)
from jaxquant.nnx.sites import Site, put, sites
from jaxquant.rules import ATTENTION

Model = TypeVar("Model", bound=nnx.Module)
# What a model raises that is given other arguments than it takes.
_MISFITS = (TypeError, ValueError, AttributeError, LookupError, ZeroDivisionError, FlaxError)
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


def checked(batches: Iterable[Any]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Each batch's number and arguments.

    Raises:
        ValueError: no batches; one with something else than arrays, or with a NaN or an Inf.
    """
    if not isinstance(batches, Iterable) or hasattr(batches, "dtype"):
        shape = getattr(batches, "shape", None)
        found = repr(batches) if shape is None else f"one array of shape {shape}"
        raise ValueError(f"batches are several inputs, as in a list of arrays; got {found}")
    index = -1
    for index, batch in enumerate(batches):
        arguments = batch if isinstance(batch, tuple) else (batch,)
        leaves = jax.tree.leaves(arguments)
        if not leaves:
            raise ValueError(f"batch {index} of the calibration data holds {batch!r}, no array")
        for leaf in leaves:
            if not _is_array(leaf):
                raise ValueError(f"batch {index} of the calibration data holds {leaf!r}, no array")
            if jnp.size(leaf) == 0:
                found = f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
                raise ValueError(f"batch {index} of the calibration data is empty: {found}")
            if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and not bool(
                jnp.isfinite(leaf).all()
            ):
                raise ValueError(f"batch {index} of the calibration data holds a NaN or an Inf")
        yield index, arguments
    if index < 0:
        raise ValueError("calibration needs at least one batch; got none")


def _is_array(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, bool | int | float)
    kinds = (jnp.number, jnp.bool_, jax.dtypes.prng_key)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


@contextlib.contextmanager
def fitting(index: int, arguments: Any) -> Iterator[None]:
    """Within it, what a model says of arguments that do not fit it is a ValueError of the batch."""
    try:
        yield
    except _MISFITS as error:
        if isinstance(error, ValueError) and index == 0:
            raise  # of the model more likely than of the batch; where batches went well before, of the batch
        shapes = [f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in jax.tree.leaves(arguments)]
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(
            f"batch {index} of the calibration data, {', '.join(shapes)}, does not fit the model: {reason}"
        ) from error


def check_range(path: str, bounds: Any, weight: Any = 1) -> None:
    """Raises a ValueError for a range of nothing but zero, which would make zeros of all activations, or
    one that is not finite, which would make NaN of them."""
    found = jnp.stack([jnp.abs(bound) for bound in jax.tree.leaves(bounds)])
    is_used = jnp.broadcast_to(jnp.asarray(weight) > 0, found.shape[1:])
    if bool(jnp.any(~jnp.isfinite(found) & is_used[None])):
        raise ValueError(
            f"{path or 'the model'} was given a NaN or an Inf on the calibration data, which is no range; "
            "give a model and batches without, or a rule that leaves its activations in float"
        )
    if bool(jnp.any(jnp.all(found == 0, axis=0) & is_used)):
        raise ValueError(
            f"{path or 'the model'} was given zeros alone, which is no range; give batches that reach it, or "
            "a rule before the others that leaves its activations in float"
        )

"""What a model's activations are like: statistics over batches, and the ranges or steps that follow."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import FlaxError

from jaxquant import calibration as calibrations
from jaxquant.nnx.freezing import shared_copy
from jaxquant.nnx.modules import (
    Activations,
    Learned,
    Observer,
    first_step,
    is_learned,
    operation_of,
    with_forward,
    write,
)
from jaxquant.nnx.sites import Site, put, sites
from jaxquant.qarray import calibrate as range_of
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


def calibrate(
    model: Model,
    batches: Iterable[Any],
    *,
    decay: float | None = None,
    call: Callable[..., Any] | None = None,
) -> Model:
    """Gives activations fixed ranges in place of those found anew at each call; starts learned steps.

    An activation's range is its quantizer's own calibration, over all batches: the largest that was seen,
    or with `decay` an exponential average.  Quantizers whose scales belong to single rows or blocks of
    activations stay as they are, since a fixed range would not fit other rows.

    Args:
        model: as `quantize` made it; changed in place, and returned.
        batches: inputs like those that it will serve, each an array or a tuple of arguments.
        decay: from 0, the last batch alone, to 1, the mean of all; None for the largest.
        call: from (model, *batch); the model's own call where not given.

    Raises:
        ValueError: nothing to calibrate; no batches, or one that is empty, does not fit or has a NaN or an
            Inf; a layer that was given zeros alone.
    """
    is_number = isinstance(decay, int | float) and not isinstance(decay, bool)
    if decay is not None and not (is_number and 0 <= decay <= 1):
        raise ValueError(f"decay is from 0 to 1; got {decay!r}")
    if not any(_lhs(site) is not None for site in sites(model).values()):
        raise ValueError(
            "no activations have a range to calibrate: none is quantized per tensor (as by "
            'quantize(model, {".*": "w8a8"})), or all are calibrated'
        )
    waiting = _started(model)
    found = observe(waiting, batches, lambda site: _range_statistic(site, decay), call)
    for path, (total, weight) in found.items():
        check_range(path, total, weight)
    for path, site in sites(model).items():
        if path in found:
            _fix(site, found[path])
    return model


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


def _lhs(site: Site) -> Any:
    """A module's quantizer of activations where it has one range for all of them, and still finds it."""
    if isinstance(site.operation, Learned):
        return None if site.operation.calibrated else _forward(site.operation.operation).lhs
    operation = operation_of(site.operation)
    quantizer = None if operation is None else operation.forward.lhs
    if quantizer is None or quantizer.granularity != "tensor":
        return None
    return None if isinstance(quantizer.calibration, calibrations.Range) else quantizer


def _forward(operation: Any) -> Any:
    return operation_of(operation).forward


def _started(model: Model) -> Model:
    """The model with any start for learned steps, so that it runs while they are looked for."""
    model = shared_copy(model)
    for site in sites(model).values():
        if isinstance(site.operation, Learned) and not site.operation.calibrated:
            operation = site.operation
            forward = _forward(operation.operation)
            # Activations are left in float until their steps are known.
            operation.operation = with_forward(
                operation.operation, dataclasses.replace(forward, lhs=None)
            )
            operation.lhs_step, operation.calibrated = nnx.data(None), True
            operation.wanted = forward.lhs
    return model


def _range_statistic(site: Site, decay: float | None) -> Statistic | None:
    learned = isinstance(site.operation, Learned)
    quantizer = site.operation.wanted if learned else _lhs(site)
    if quantizer is None:
        return None

    def find(seen: Activations) -> Any:
        if is_learned(quantizer):
            return first_step(seen.lhs, quantizer)
        found = range_of(seen.lhs, quantizer, seen.axes)
        return jax.tree.map(lambda r: r.reshape(()), found)

    zero = jnp.zeros((), jnp.float32)
    low_high = not is_learned(quantizer) and isinstance(
        jax.eval_shape(lambda: range_of(jnp.ones((1, 2)), quantizer, 1)), tuple
    )
    start = (zero, zero) if low_high else zero

    def update(state: Any, seen: Activations) -> Any:
        total, weight = state
        new = find(seen)
        if is_learned(quantizer):  # a mean, whatever ranges do
            return total + new, weight + 1
        if decay is not None:
            return jax.tree.map(lambda a, b: decay * a + b, total, new), decay * weight + 1
        if low_high:
            return (jnp.minimum(total[0], new[0]), jnp.maximum(total[1], new[1])), jnp.ones(())
        return jnp.maximum(total, new), jnp.ones(())

    return (start, zero), update


def _fix(site: Site, state: Any) -> None:
    total, weight = state
    if not bool(jnp.all(weight > 0)):
        # Never multiplied, as an Embed's rows are not, so there is nothing to fix.
        if isinstance(site.operation, Learned):
            site.operation.calibrated = True
        return
    value = jax.tree.map(lambda x: site.stacking.placed(x / weight), total)
    operation = site.operation
    if isinstance(operation, Learned):
        assert operation.lhs_step is not None
        write(operation.lhs_step, value)
        operation.calibrated = True
        return
    forward = _forward(operation)
    lhs = dataclasses.replace(forward.lhs, calibration=calibrations.Range(value))
    put(site, with_forward(operation, dataclasses.replace(forward, lhs=lhs)))

"""Batches of inputs that calibration goes through: whether they are fit for it, and what is found of them."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.errors import FlaxError

# What a model raises that is given other arguments than it takes.
_MISFITS = (TypeError, ValueError, AttributeError, LookupError, ZeroDivisionError, FlaxError)


def check_each(batches: Iterable[Any]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Returns each batch's number and arguments.

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
    """Turns a model's errors about arguments that do not fit into ValueErrors that name the batch."""
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

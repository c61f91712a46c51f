"""Convert quantized state to and from plain optax state, and save and load it.

    state.json           the version of the format, the identity of the state (`jaxquant.optim.identity`),
    shapes
                         and types of the arrays, SHA-256 of their file
    arrays.safetensors   the arrays

A folder appears complete or not at all.  Arrays are stored in one form regardless of sharding, so a state
that eight devices saved can be loaded on two, bit for bit.
"""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxquant.artifacts import checksums, files, folders
from jaxquant.numerics.sharding import call_with_auto_axes, spec_of
from jaxquant.optim.checks import check_parameters, check_plain, check_state
from jaxquant.optim.identity import difference, from_version_3, identity
from jaxquant.optim.state import (
    QuantizedState,
    decoded,
    leaf_specs,
    unquantized,
    with_exact,
    with_leaf,
)

VERSION = 4  # covers the meaning of codes too
_KIND = "jaxquant optimizer state"
_HEAD, _ARRAYS = "state.json", "arrays.safetensors"


def to_optax(tx: optax.GradientTransformation, state: QuantizedState, params: Any) -> Any:
    """Returns the plain state of the wrapped transformation, in full precision.

    Args:
        tx: the wrapped transformation.
        state: the state of `quantize_state(tx, …)`.
        params: the parameters, or their shapes.

    Raises:
        ValueError: if the state is of another transformation or of other parameters.

    >>> from jaxquant.optim import fixed, quantize_state
    >>> params = {"w": jnp.ones((64, 64))}
    >>> state = quantize_state(optax.trace(0.9), fixed(4)).init(params)
    >>> jax.tree.map(jnp.shape, to_optax(optax.trace(0.9), state, params))
    TraceState(trace={'w': (64, 64)})
    """
    check_state(state)
    check_parameters(state.plan, params, "params")
    specs, structure = jax.tree.flatten(jax.eval_shape(tx.init, params))
    leaves = call_with_auto_axes(_all_decoded, (state,), lambda: leaf_specs(tx, params))
    _check_alike(specs, leaves, "the state of tx for these parameters")
    return structure.unflatten(leaves)


@jax.jit
def _all_decoded(state: QuantizedState) -> list[jax.Array]:
    """Returns the leaves of the plain state, in its order."""
    found = {leaf.index: x for leaf, x in zip(state.plan.exact, unquantized(state), strict=True)}
    for number, group in enumerate(state.plan.groups):
        for i, slot in enumerate(group.leaves):
            for place, leaf in enumerate(slot):
                found[leaf.index] = decoded(state, number, i, place)
    return [found[i] for i in range(len(found))]


def from_optax(state: QuantizedState, plain: Any, *, seed: int = 0) -> QuantizedState:
    """Encodes a plain state.  Each leaf is rounded once, at the widths of `state`.

    Args:
        state: a fresh state, from `quantize_state(tx, …).init(params)`.
        plain: a state of `tx`.
        seed: the seed of stochastic rounding.

    Raises:
        ValueError: if the plain state is of another transformation or of other parameters.
    """
    check_state(state)
    leaves = jax.tree.leaves(plain)
    own = {leaf.index: leaf for leaf in (*state.plan.leaves, *state.plan.exact)}
    specs = [jax.ShapeDtypeStruct(own[i].shape, own[i].dtype) for i in range(len(own))]
    _check_alike(specs, leaves, "the plain state that this one quantizes")
    check_plain(state.plan, plain)
    encode = functools.partial(_all_encoded, seed=seed)
    return call_with_auto_axes(encode, (state, leaves), lambda: jax.tree.map(spec_of, state))


@functools.partial(jax.jit, static_argnames="seed")
def _all_encoded(state: QuantizedState, leaves: list[jax.Array], seed: int) -> QuantizedState:
    """Returns the state with all leaves of a plain state in it."""
    exact = [jnp.asarray(leaves[leaf.index]) for leaf in state.plan.exact]
    state = state._replace(exact=with_exact(state.exact, exact))
    for number, group in enumerate(state.plan.groups):
        for i, slot in enumerate(group.leaves):
            for place, leaf in enumerate(slot):
                state = with_leaf(state, number, i, place, leaves[leaf.index], seed)
    return state


def _check_alike(specs: list[Any], leaves: list[Any], what: str) -> None:
    wanted = [(x.shape, np.dtype(x.dtype)) for x in specs]
    found = [(np.shape(x), np.dtype(jnp.result_type(x))) for x in leaves]
    if len(wanted) != len(found):
        raise ValueError(f"{what} must have {len(wanted)} leaves; got {len(found)}")
    for place, (one, other) in enumerate(zip(wanted, found, strict=True)):
        if one != other:
            raise ValueError(
                f"leaf {place} of {what} must be {one[1]}{list(one[0])}; got {other[1]}{list(other[0])}"
            )


def save(folder: str | os.PathLike, state: QuantizedState) -> None:
    """Saves a state as a new folder, which appears when it is complete.

    For checkpoints of a whole training state, Orbax saves quantized state as it saves any other pytree.

    Raises:
        ValueError: if the folder exists, or if the argument is not a quantized state.
        OSError: if the folder cannot be written (no space, no permission); nothing of it remains.

    >>> import tempfile
    >>> from jaxquant.optim import fixed, quantize_state
    >>> state = quantize_state(optax.adam(1e-3), fixed(4)).init(jnp.ones((64, 64)))
    >>> with tempfile.TemporaryDirectory() as root:
    ...     save(f"{root}/state", state)
    ...     bool((load(f"{root}/state", state).pool == state.pool).all())
    True
    """
    if not isinstance(state, QuantizedState):
        raise ValueError(f"the state must be that of a quantize_state; got {type(state).__name__}")
    folder = Path(folder)
    if os.path.lexists(folder):
        raise ValueError(f"{folder} exists already; the folder must be new")
    with folders.temporary_folder(folder.parent) as temporary, files.writing(folder):
        stored = {name: folders.as_stored(x) for name, x in _named(state).items()}
        folders.write_safetensors(temporary / _ARRAYS, stored)
        body = {
            "state": identity(state.plan),
            "arrays": _described(state),
            "not_finite": folders.not_finite(_named(state)),
            "files": checksums.digests(temporary),
        }
        files.write(temporary / _HEAD, checksums.with_checksum(_KIND, VERSION, body))
        if not folders.move_into_place(temporary, folder):
            raise ValueError(f"{folder} exists already; the folder must be new")


def load(folder: str | os.PathLike, like: QuantizedState) -> QuantizedState:
    """Loads the state that `save` wrote, bit for bit, with the sharding of `like`.

    Args:
        folder: the folder to read.
        like: a state of the same transformation, policy and parameters, such as a fresh one, or its shapes.

    Raises:
        ValueError: if `save` did not write the folder, its version is not supported, or a file is missing or
            was changed; if the state has another plan or other shapes.
    """
    folder = Path(folder)
    body = _read_head(folder)
    checksums.check_digests(folder, body["files"], (_ARRAYS,))
    wanted = _described(like)
    if body["arrays"] != wanted:
        names = sorted(set(wanted) ^ set(body["arrays"])) or [
            name for name in wanted if wanted[name] != body["arrays"][name]
        ]
        kept, asked = body["arrays"].get(names[0], "absent"), wanted.get(names[0], "absent")
        raise ValueError(
            f"{folder} holds {names[0]} as {kept}; the state to load into has it {asked}"
        )
    if differs := difference(body["state"], identity(like.plan)):
        raise ValueError(
            f"{folder} was saved of another transformation, policy or set of parameters: {differs}"
        )
    stored, named = folders.read_safetensors(folder / _ARRAYS), _named(like)
    renamed = {old: new for new, old in body["names"].items()}
    stored = {renamed.get(name, name): x for name, x in stored.items()}
    types = {name: (x.dtype, x.shape) for name, x in named.items()}
    structure = jax.tree.structure(like)
    try:
        arrays = folders.all_from_stored(stored, types, body["not_finite"])
        _check_tables(structure.unflatten(arrays[name] for name in named))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / _ARRAYS} holds no such state: {error}") from None
    return structure.unflatten(_placed(arrays[name], x) for name, x in named.items())


def _check_tables(state: QuantizedState) -> None:
    """Raises a ValueError unless each row belongs to at most one page, and lies within the pool."""
    rows = state.pool.shape[1]
    for shard in range(state.pool.shape[0]):
        own = [table[shard].ravel() for table in jax.tree.leaves(state.tables)]
        used = np.concatenate(own) if own else np.zeros(0, np.int32)
        used = used[used != 0]
        if used.size and not 0 < used.min() <= used.max() < rows:
            raise ValueError(f"its tables name rows {used.min()} to {used.max()} of {rows}")
        if np.unique(used).size < used.size:
            raise ValueError("its tables give a row to two pages")


def _read_head(folder: Path) -> dict[str, Any]:
    """Reads the description of a saved state, in the terms of this version.

    For arrays of an older version, "names" maps each name to the name in the file.
    """
    path = folder / _HEAD
    body = checksums.read_checked(path, _KIND, 3, VERSION)
    body.setdefault("not_finite", None)  # absent in early files
    for part, kind in (("arrays", dict), ("state", dict), ("plan", str)):
        if part in body and not isinstance(body[part], kind):
            raise ValueError(f"{path} holds {body[part]!r} as its {part}")
    body["names"] = {}
    try:
        if body["version"] == 3:
            body["names"] = {name.removeprefix("."): name for name in body["arrays"]}
            body["arrays"] = {n: body["arrays"][old] for n, old in body["names"].items()}
            body["state"] = from_version_3(body["plan"])
        return {part: body[part] for part in ("arrays", "state", "files", "names", "not_finite")}
    except KeyError as error:
        raise ValueError(f"{path} does not say its {error}") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _named(state: QuantizedState) -> dict[str, Any]:
    """Returns the arrays by their names in files, in the order of the state.

    Unquantized leaves are named by their place in the plan.  Only the memory of a score is named by its own
    fields.
    """
    nested = [("tables", state.tables), ("scales", state.scales)]
    nested = [
        (f"{part}[{number}][{slot}]", x)
        for part, groups in nested
        for number, slots in enumerate(groups)
        for slot, x in enumerate(slots)
    ]
    exact = [(f"exact[{i}]", x) for i, x in enumerate(unquantized(state))]
    memory = jax.tree.leaves_with_path(state.memory)
    memory = [(f"memory{jax.tree_util.keystr(keys)}", x) for keys, x in memory]
    return dict([("step", state.step), ("pool", state.pool), *nested, *exact, *memory])


def _described(state: QuantizedState) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in _named(state).items()}


def _placed(array: np.ndarray, like: Any) -> jax.Array:
    sharding = getattr(like, "sharding", None)
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)

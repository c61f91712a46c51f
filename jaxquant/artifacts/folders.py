"""Frozen models on disk: a folder with arrays, what they mean, and a card that says where they come from.

    card.json            the card, the format's version, and SHA-256 of every other file
    card.md              the card for people; not read
    tree.json            what each array is (`jaxquant.storage`), and each operation's description
    arrays.safetensors   or arrays/, an Orbax checkpoint

A folder appears whole or not at all, and what is read is what was written, or a ValueError says which file
is not.  Types that a file format lacks (int4, float8 …) are held as their bytes.  Seals and digests are
checksums, which find damage; whoever may write to the folder may write others.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from orbax import checkpoint

from jaxquant.artifacts import files
from jaxquant.artifacts.cards import Card, versions_now
from jaxquant.artifacts.checksums import (
    check_digests,
    check_links,
    digests,
    read_checked,
    with_checksum,
)
from jaxquant.artifacts.files import write
from jaxquant.artifacts.specification import from_config, is_operation, to_config
from jaxquant.artifacts.storage import from_arrays, to_arrays

VERSION = 1
CARD, CARD_TEXT, TREE = "card.json", "card.md", "tree.json"
_KIND = "jaxquant artifact"
_ARRAYS = {"safetensors": "arrays.safetensors", "orbax": "arrays"}
_NATIVE = {"bool", "bfloat16", "float16", "float32", "float64"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def save(
    folder: str | os.PathLike,
    tree: Any,
    card: Card,
    *,
    format: Literal["safetensors", "orbax"] = "safetensors",
) -> None:
    """Writes a tree and its card as a new folder, which appears when it is whole.

    Args:
        folder: where; nothing is there yet.
        tree: nested dictionaries, keyed as in `jaxquant.storage.to_arrays`, of arrays, `QArray`s and
            operations (`jaxquant.specification`).
        card: what it is; its versions are filled in.
        format: of the arrays: a safetensors file, or an Orbax checkpoint.

    Raises:
        ValueError: a folder that exists; a tree without arrays, or with something else; another format.
        OSError: it cannot be written (no space, no permission); nothing of it stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     save(f"{root}/model", {"layer": {"bias": jnp.ones(3)}}, Card.empty())
    ...     load(f"{root}/model")[0]
    {'layer': {'bias': Array([1., 1., 1.], dtype=float32)}}
    """
    folder = _path(folder)
    if format not in _ARRAYS:
        raise ValueError(f"format is one of {', '.join(map(repr, _ARRAYS))}; got {format!r}")
    if not isinstance(card, Card):
        raise ValueError(f"card is a Card; got {card!r}")
    if os.path.lexists(folder):
        raise ValueError(f"{folder} exists already; give a new folder")
    card = dataclasses.replace(card, versions=versions_now())
    operations: list[dict[str, Any]] = []
    arrays, descriptions = to_arrays(_without_operations(tree, (), operations))
    if not arrays:
        raise ValueError("a tree to save has at least one array; this one has none")
    _check_readable(arrays, descriptions)
    stored = {name: as_stored(array) for name, array in arrays.items()}
    index = {
        "descriptions": descriptions,
        "operations": operations,
        "not_finite": not_finite(arrays),
    }
    with temporary_folder(folder.parent) as temporary, files.writing(folder):
        _write_arrays(temporary / _ARRAYS[format], stored, format)
        write(temporary / TREE, json.dumps(index, indent=1, allow_nan=False))
        body = {"format": format, "files": digests(temporary), "card": card.to_dict()}
        write(temporary / CARD, with_checksum(_KIND, VERSION, body))
        write(temporary / CARD_TEXT, card.to_markdown())
        if not move_into_place(temporary, folder):
            raise ValueError(f"{folder} exists already; give a new folder")


def load(folder: str | os.PathLike) -> tuple[Any, Card]:
    """Returns the tree and the card of a folder, both exactly as they were saved.

    Raises:
        ValueError: a folder that `save` did not write, of another version, or of which a file is missing,
            truncated or changed; it says which.
    """
    folder = _path(folder)
    body = read_checked(folder / CARD, _KIND, VERSION)
    card = _card(folder / CARD, body)
    if body.get("format") not in _ARRAYS:
        raise ValueError(f"{folder / CARD} names the format {body.get('format')!r}, not known here")
    name = _ARRAYS[body["format"]]
    check_digests(folder, body.get("files"), (TREE, name))
    index = files.read_json(folder / TREE)
    try:
        known = index.get("not_finite")  # folders of before it was noted have none
        arrays = _read_arrays(folder / name, _parse_types(index["descriptions"]), known)
        tree = from_arrays(arrays, index["descriptions"])
        for operation in index["operations"]:
            tree = _with_operation(tree, operation["path"], operation["description"])
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise ValueError(f"{folder} does not hold what its tree describes: {error}") from error
    return tree, card


def load_card(folder: str | os.PathLike) -> Card:
    """Returns the card of a folder alone, of which no array is read.

    Raises:
        ValueError: as `load`, as far as the card tells.
    """
    path = _path(folder) / CARD
    return _card(path, read_checked(path, _KIND, VERSION))


def _path(folder: Any) -> Path:
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(f"folder is a path; got {folder!r}")
    return Path(folder)


def _card(path: Path, body: Mapping[str, Any]) -> Card:
    try:
        return Card.from_dict(body.get("card", {}))
    except ValueError as error:
        raise ValueError(f"{path} holds no card: {error}") from None


# ---------------------------------------------------------------------------------------------------
# Operations within a tree


def _without_operations(tree: Any, path: tuple, found: list[dict[str, Any]]) -> Any:
    """Returns the tree with each operation's arrays in its place, by number."""
    if isinstance(tree, Mapping):
        return {key: _without_operations(v, (*path, key), found) for key, v in tree.items()}
    if not is_operation(tree):
        return tree
    description, arrays = to_config(tree)
    found.append({"path": list(path), "description": description})
    return dict(enumerate(arrays))


def _with_operation(tree: Any, path: list, description: Any) -> Any:
    if not path:
        return from_config(description, [tree[i] for i in range(len(tree))])
    below = _with_operation(tree[path[0]], path[1:], description)
    return {**tree, path[0]: below}


# ---------------------------------------------------------------------------------------------------
# Arrays


def as_stored(array: Any) -> np.ndarray:
    """Returns an array in a type that every file format has: its own, or its bytes."""
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    return array if array.dtype.name in _NATIVE else array.reshape(-1).view(np.uint8)


def not_finite(arrays: Mapping[str, Any]) -> list[str]:
    """Returns the names of arrays that contain a NaN or an Inf; the other arrays must not contain any."""
    return sorted(name for name, array in arrays.items() if not _is_finite(np.asarray(array)))


def from_stored(
    stored: Any,
    dtype: Any,
    shape: Sequence[int],
    name: str = "the array",
    *,
    finite: bool = False,
) -> np.ndarray:
    """Returns the array that `as_stored` wrote.

    Args:
        stored: what was read.
        dtype: of the array.
        shape: of it.
        name: what it is called in messages.
        finite: whether it had neither NaN nor Inf.

    Raises:
        ValueError: another type or shape, bytes that are no numbers of the type, or a NaN where none was.

    >>> from_stored(as_stored(jnp.arange(3).astype(jnp.int4)), "int4", (3,))
    array([0, 1, 2], dtype=int4)
    """
    dtype, shape = jnp.dtype(dtype), tuple(shape)
    held = _stored_spec(dtype, shape)
    if (stored.dtype, stored.shape) != held:
        raise ValueError(
            f"{name} is {_spec_text(dtype, shape)}, held as {_spec_text(*held)}; "
            f"got {_spec_text(stored.dtype, stored.shape)}"
        )
    array = stored if dtype.name in _NATIVE else stored.view(dtype).reshape(shape)
    if not _is_of_its_type(array):
        raise ValueError(f"{name} has bytes that are no {dtype}")
    if finite and not _is_finite(array):
        raise ValueError(f"{name} has a NaN or an Inf, and had none when it was written")
    return array


def all_from_stored(
    stored: Mapping[str, Any],
    types: Mapping[str, tuple[Any, Sequence[int]]],
    known: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Returns all arrays of a file, of which each is there and no other.

    Args:
        stored: what was read, by name.
        types: each array's type and shape.
        known: what `not_finite` gave; None where nobody noted it.

    Raises:
        ValueError: an array that is missing or not described, or as of `from_stored`.
    """
    if missing := [name for name in types if name not in stored]:
        raise ValueError(f"arrays that are missing: {', '.join(missing[:5])}")
    if unknown := [name for name in stored if name not in types]:
        raise ValueError(f"arrays without a description: {', '.join(unknown[:5])}")
    if known is not None and not set(known) <= set(types):
        raise ValueError(f"arrays with a NaN or an Inf are some of those there; got {known!r}")
    return {
        name: from_stored(stored[name], *spec, name, finite=known is not None and name not in known)
        for name, spec in types.items()
    }


def _stored_spec(dtype: Any, shape: Sequence[int]) -> tuple[np.dtype, tuple[int, ...]]:
    """Returns the type and shape that `as_stored` gives an array."""
    dtype = jnp.dtype(dtype)
    if dtype.name in _NATIVE:
        return dtype, tuple(shape)
    return np.dtype(np.uint8), (math.prod(shape) * dtype.itemsize,)


def _spec_text(dtype: Any, shape: Sequence[int]) -> str:
    return f"{dtype}{list(shape)}"


def _is_finite(array: np.ndarray) -> bool:
    return not jnp.issubdtype(array.dtype, jnp.inexact) or bool(np.isfinite(array).all())


def _is_of_its_type(array: np.ndarray) -> bool:
    """Returns whether each element's byte is one that its type has, where not every byte is."""
    bits = _bits(array.dtype)
    if bits >= 8:
        return True
    codes = array.reshape(-1).view(np.uint8)
    fits = codes < 2**bits
    if jnp.issubdtype(array.dtype, jnp.signedinteger):
        fits |= codes >= 256 - 2 ** (bits - 1)  # negative ones may be held with their sign spread
    return bool(fits.all())


def _bits(dtype: np.dtype) -> int:
    if dtype.kind == "b":
        return 1
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    return (jnp.iinfo if is_integer else jnp.finfo)(dtype).bits


def _check_readable(arrays: Mapping[str, jax.Array], descriptions: Mapping[str, str]) -> None:
    """Raises a ValueError for a tree that `load` would refuse, of which only the shapes are computed."""

    def read(arrays: Mapping[str, jax.Array]) -> None:
        from_arrays(arrays, descriptions)

    try:
        jax.eval_shape(read, arrays)
    except ValueError as error:
        raise ValueError(
            f"the tree could not be read back, so it is not written: {error}"
        ) from None


def _parse_types(descriptions: Mapping[str, str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns each array's type and shape, by name."""
    return {
        f"{path}/{part}".rstrip("/"): (dtype, tuple(shape))
        for path, text in descriptions.items()
        for part, (dtype, shape) in files.parse_json(text, path)["arrays"].items()
    }


def _write_arrays(path: Path, stored: Mapping[str, np.ndarray], format: str) -> None:
    if format == "safetensors":
        write_safetensors(path, stored)
        return
    with checkpoint.StandardCheckpointer() as checkpointer:
        # Orbax takes no empty arrays, whose shape says all there is.
        checkpointer.save(path.absolute(), {n: array for n, array in stored.items() if array.size})
        checkpointer.wait_until_finished()


def _read_arrays(
    path: Path, types: Mapping[str, Any], known: Sequence[str] | None
) -> dict[str, np.ndarray]:
    is_one_file = path.suffix == ".safetensors"
    stored = read_safetensors(path) if is_one_file else _read_orbax(path, types)
    return all_from_stored(stored, types, known)


def write_safetensors(path: Path, stored: Mapping[str, np.ndarray]) -> None:
    """Writes arrays of `as_stored`.

    Raises:
        OSError: as the system says.
    """
    with files.writing(path):
        safetensors.numpy.save_file(dict(stored), path)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Returns all arrays of a safetensors file.

    Raises:
        ValueError: a file that is none.
    """
    files.check_regular(path)
    try:
        with safetensors.safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (
        Exception
    ) as error:  # its own type, and others for a header that is not JSON or a type of no array
        raise ValueError(f"{path} is no safetensors file: {error}") from None


def _read_orbax(path: Path, types: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Reads the arrays, after a check of types and shapes: Orbax would cast silently."""
    check_links(path)
    held = {name: _stored_spec(*spec) for name, spec in types.items()}
    empty = {name: np.zeros(shape, dtype) for name, (dtype, shape) in held.items() if 0 in shape}
    wanted = {name: spec for name, spec in held.items() if name not in empty}
    with checkpoint.StandardCheckpointer() as checkpointer:
        there = checkpointer.metadata(path.absolute())
        there = getattr(there, "item_metadata", there)
        there = getattr(there, "tree", there)
        found = {name: (np.dtype(x.dtype), tuple(x.shape)) for name, x in there.items()}
        for name in {**wanted, **found}:
            one, other = wanted.get(name), found.get(name)
            if one != other:
                texts = ["absent" if spec is None else _spec_text(*spec) for spec in (one, other)]
                raise ValueError(f"{name} is {texts[0]} by its description; got {texts[1]}")
        like = {name: np.zeros(shape, dtype) for name, (dtype, shape) in wanted.items()}
        return empty | checkpointer.restore(path.absolute(), like)


# ---------------------------------------------------------------------------------------------------
# Files that are whole or not there


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yields a new folder to write in; deletes it afterwards unless `move_into_place` has moved it."""
    parent.mkdir(parents=True, exist_ok=True)
    path = files.beside(parent / "folder")
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def move_into_place(temporary: Path, folder: Path) -> bool:
    """Renames a written folder atomically; returns False if the name is taken."""
    for path in (temporary, *temporary.rglob("*")):
        _sync(path)
    try:
        # A folder is never put in the place of one with files in it, also not by two at a time.
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    _sync(folder.parent)
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

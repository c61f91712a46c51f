"""Frozen models on disk: a folder with arrays, what they mean, and a card that says where they come from.

    card.json            the card, the format's version, and SHA-256 of every other file
    card.md              the card for people; not read
    tree.json            what each array is (`jaxquant.storage`), and each operation's description
    arrays.safetensors   or arrays/, an Orbax checkpoint

A folder appears whole or not at all, and what is read is what was written, or a ValueError says which file
is not.  Types that a file format lacks (int4, float8 …) are held as their bytes.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from orbax import checkpoint

from jaxquant.cards import Card, versions_now
from jaxquant.specification import describe_operation, is_operation, operation_from
from jaxquant.storage import from_arrays, to_arrays

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
    index = {"descriptions": descriptions, "operations": operations}
    with temporary_folder(folder.parent) as temporary:
        _write_arrays(temporary / _ARRAYS[format], arrays, format)
        write(temporary / TREE, json.dumps(index, indent=1, allow_nan=False))
        body = {"format": format, "files": digests(temporary), "card": card.to_dict()}
        write(temporary / CARD, sealed(_KIND, VERSION, body))
        write(temporary / CARD_TEXT, card.to_markdown())
        if not placed(temporary, folder):
            raise ValueError(f"{folder} exists already; give a new folder")


def load(folder: str | os.PathLike) -> tuple[Any, Card]:
    """The tree and the card of a folder, both exactly as they were saved.

    Raises:
        ValueError: a folder that `save` did not write, of another version, or of which a file is missing,
            truncated or changed; it says which.
    """
    folder = _path(folder)
    body = unsealed(folder / CARD, _KIND, VERSION)
    card = _card(folder / CARD, body)
    if body.get("format") not in _ARRAYS:
        raise ValueError(f"{folder / CARD} names the format {body.get('format')!r}, not known here")
    name = _ARRAYS[body["format"]]
    check_digests(folder, body.get("files"), (TREE, name))
    index = read_json(folder / TREE)
    try:
        arrays = _read_arrays(folder / name, _described_types(index["descriptions"]))
        tree = from_arrays(arrays, index["descriptions"])
        for operation in index["operations"]:
            tree = _with_operation(tree, operation["path"], operation["description"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} does not hold what its tree describes: {error}") from error
    return tree, card


def load_card(folder: str | os.PathLike) -> Card:
    """The card of a folder alone, of which no array is read.

    Raises:
        ValueError: as `load`, as far as the card tells.
    """
    path = _path(folder) / CARD
    return _card(path, unsealed(path, _KIND, VERSION))


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
    """The tree with each operation's arrays in its place, by number."""
    if isinstance(tree, Mapping):
        return {key: _without_operations(v, (*path, key), found) for key, v in tree.items()}
    if not is_operation(tree):
        return tree
    description, arrays = describe_operation(tree)
    found.append({"path": list(path), "description": description})
    return dict(enumerate(arrays))


def _with_operation(tree: Any, path: list, description: Any) -> Any:
    if not path:
        return operation_from(description, [tree[i] for i in range(len(tree))])
    below = _with_operation(tree[path[0]], path[1:], description)
    return {**tree, path[0]: below}


# ---------------------------------------------------------------------------------------------------
# Arrays


def as_stored(array: Any) -> np.ndarray:
    """An array in a type that every file format has: its own, or its bytes."""
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    return array if array.dtype.name in _NATIVE else array.reshape(-1).view(np.uint8)


def from_stored(stored: np.ndarray, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The array that `as_stored` wrote; its type and shape are checked by who asks for them."""
    dtype = jnp.dtype(dtype)
    return stored if dtype.name in _NATIVE else stored.view(dtype).reshape(shape)


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


def _described_types(descriptions: Mapping[str, str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each array's type and shape, by name."""
    return {
        f"{path}/{part}".rstrip("/"): (dtype, tuple(shape))
        for path, text in descriptions.items()
        for part, (dtype, shape) in json.loads(text)["arrays"].items()
    }


def _write_arrays(path: Path, arrays: Mapping[str, jax.Array], format: str) -> None:
    stored = {name: as_stored(array) for name, array in arrays.items()}
    if format == "safetensors":
        safetensors.numpy.save_file(stored, path)
        return
    with checkpoint.StandardCheckpointer() as checkpointer:
        # Orbax takes no empty arrays, whose shape says all there is.
        checkpointer.save(path.absolute(), {n: array for n, array in stored.items() if array.size})
        checkpointer.wait_until_finished()


def _read_arrays(path: Path, types: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        stored = read_safetensors(path)
        unknown = [name for name in stored if name not in types]
        if unknown:
            raise ValueError(f"arrays without a description: {', '.join(unknown)}")
    else:
        stored = _read_orbax(path, types)
    return {name: from_stored(array, *types[name]) for name, array in stored.items()}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file.

    Raises:
        ValueError: a file that is none.
    """
    try:
        with safetensors.safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None


def _read_orbax(path: Path, types: Mapping[str, Any]) -> dict[str, np.ndarray]:
    like = {name: as_stored(np.zeros(shape, jnp.dtype(d))) for name, (d, shape) in types.items()}
    filled = {name: array for name, array in like.items() if array.size}
    with checkpoint.StandardCheckpointer() as checkpointer:
        return like | checkpointer.restore(path.absolute(), filled)


# ---------------------------------------------------------------------------------------------------
# Files that are whole or not there


def write(path: Path, content: str) -> None:
    """Writes a new file."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(content)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder to write in, gone afterwards unless it was `placed`."""
    parent.mkdir(parents=True, exist_ok=True)
    path = parent / f".{uuid.uuid4().hex}.tmp"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def placed(temporary: Path, folder: Path) -> bool:
    """Gives a written folder its name, at once; False where something has that name."""
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


def digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file in a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
        for path in files
    }


def check_digests(folder: Path, files: Any, needed: tuple[str, ...] = ()) -> None:
    """Raises a ValueError where a file is not as it was when `digests` was taken.

    Args:
        folder: where the files are.
        files: what `digests` gave.
        needed: files, or folders with files, that must be among them.
    """
    entries = files.values() if isinstance(files, Mapping) else [None]
    if not all(isinstance(e, dict) and set(e) == {"bytes", "sha256"} for e in entries):
        raise ValueError(f"{folder} does not say which files it has; got {files!r}")
    for name in needed:
        if not any(file == name or file.startswith(f"{name}/") for file in files):
            raise ValueError(f"{folder} does not list its file {name}")
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise ValueError(f"{path} has {size:,} bytes; {wanted['bytes']:,} were written")
        if _sha256(path) != wanted["sha256"]:
            raise ValueError(f"{path} is damaged: its SHA-256 is not that of what was written")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(kind: str, version: int, body: Mapping[str, Any]) -> str:
    """JSON that says what it is, with its own SHA-256."""
    content = {"kind": kind, "version": version, **body}
    return json.dumps({**content, "sha256": _seal(content)}, indent=1, allow_nan=False) + "\n"


def unsealed(path: Path, kind: str, *versions: int) -> dict[str, Any]:
    """What `sealed` wrote to a file, in one of these versions.

    Raises:
        ValueError: no such file, or one of another kind or version, or one that was changed.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ValueError(f"{path} is not of a {kind}")
    version = content.get("version")
    if type(version) is not int or version not in versions:
        raise ValueError(f"{path} is of version {version}; this is version {max(versions)}")
    seal = content.pop("sha256", None)
    if seal != _seal(content):
        raise ValueError(f"{path} is damaged: its SHA-256 is not that of what was written")
    return content


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: no file, or one that is not whole JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from None

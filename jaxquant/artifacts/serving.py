"""A model as one file that needs neither its code nor this library: a StableHLO program and its weights.

    program                 of `jax.export`: (list of weights, *inputs) → outputs
    weights.safetensors     the weights, by their places in that list

in a zip archive without compression.  Weights are the program's arguments, not constants in it: a compiler
folds constants, which changes the last bits and unpacks what is stored packed.  The program is code, and runs
when it is called: load what you would run.
"""

import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from jaxquant.artifacts import files
from jaxquant.artifacts.folders import all_from_stored, as_stored, not_finite

VERSION = 1
_KIND = "jaxquant program"
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_MANIFEST, _PROGRAM, _WEIGHTS = "manifest.json", "program", "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Program:
    """A loaded program, called with the inputs alone.

    Attributes:
        exported: as `jax.export` has it: platforms, types and shapes.
        weights: its first argument.
    """

    exported: jax.export.Exported
    weights: list[jax.Array]
    _call: Callable[..., Any]

    @property
    def platforms(self) -> tuple[str, ...]:
        """The platforms that it runs on."""
        return tuple(self.exported.platforms)

    def __call__(self, *inputs: Any) -> Any:
        return self._call(self.weights, *inputs)


def export(
    model: nnx.Module | Callable[..., Any],
    *inputs: Any,
    weights: Any = None,
    path: str | os.PathLike | None = None,
    platforms: Sequence[str] | None = None,
    batch: str | None = None,
) -> bytes:
    """Returns a model's call, compiled for some inputs' shapes, with its weights.

    What it computes equals the model under `jax.jit`, with its weights as arguments, bit for bit.  Changes
    that a call makes to an NNX model's state are not kept.

    Args:
        model: an NNX model, as `freeze` made it; or a function of (weights, *inputs), or of (*inputs)
            alone, whose arrays are then constants of the program.
        inputs: examples of what it will be called with: arrays or `jax.ShapeDtypeStruct`s in dictionaries,
            lists and tuples.
        weights: a pytree of arrays, for a function that takes it.
        path: a file to write, which appears when it is whole; nothing is there yet.
        platforms: such as ("cpu", "tpu"); where this runs, if not given.
        batch: a name such as "b" for the leading axis of every input with axes: the program then takes any
            size there, the same for all.  On a CPU a program for one size of up to four rows may sum their
            products with stored weights in another order than this one.

    Returns:
        The file's bytes.

    Raises:
        OSError: the file cannot be written.
        ValueError: weights beside an NNX model; no arrays among them; an unknown platform; a path where
            something is; a model that cannot be exported so, such as one whose operations need to know the
            size of the batch.

    >>> layer = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    >>> load(export(layer, jnp.ones((1, 4)), batch="b"))(jnp.ones((3, 4))).shape
    (3, 2)
    """
    if platforms is not None and not _are_platforms(platforms):
        raise ValueError(f"platforms are some of {', '.join(_PLATFORMS)}; got {platforms!r}")
    if batch is not None and not (isinstance(batch, str) and batch.isidentifier()):
        raise ValueError(f"batch is a name, such as 'b'; got {batch!r}")
    if path is not None and os.path.lexists(path):
        raise ValueError(f"{path} exists already; give a new file")
    leaves, program = _program(model, weights)
    try:
        specs = _specs(inputs, batch)
        exported = jax.export.export(jax.jit(program), platforms=platforms)(leaves, *specs)
        content = bytes(exported.serialize())
    except Exception as error:
        # The reasons are JAX's own and of many types; each is one of what was asked for.
        size = "" if batch is None else f" for any batch {batch!r}"
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"the model cannot be exported{size}: {lines[0]}") from error
    data = _archive(content, leaves)
    if path is not None:
        files.write(path, data)
    return data


def _are_platforms(platforms: Any) -> bool:
    is_series = isinstance(platforms, list | tuple)
    return is_series and bool(platforms) and all(name in _PLATFORMS for name in platforms)


def load(source: str | os.PathLike | bytes) -> Program:
    """Returns the program of a file, or of its bytes, ready to be called.

    Raises:
        ValueError: no file, or one that `export` did not write, of another version, truncated or damaged.
    """
    if not isinstance(source, str | os.PathLike | bytes | bytearray):
        raise ValueError(
            f"a program is loaded from a file or its bytes; got {type(source).__name__}"
        )
    is_data = isinstance(source, bytes | bytearray)
    name = "the program" if is_data else str(source)
    data = bytes(source) if is_data else files.read_bytes(source)
    try:
        parts = _unzip(data)
        manifest = files.parse_json(parts[_MANIFEST], _MANIFEST)
    except Exception as error:  # a damaged directory can surface as almost any exception
        raise ValueError(f"{name} is no whole program of jaxquant.serving: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != _KIND:
        raise ValueError(f"{name} is not of a {_KIND}")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{name} is of version {manifest.get('version')}; this is version {VERSION}"
        )
    try:
        exported = jax.export.deserialize(bytearray(parts[_PROGRAM]))
        weights = _weights(exported, parts[_WEIGHTS], manifest.get("not_finite"))
    except Exception as error:
        # A program of a later JAX, or with types that this one lacks, fails in ways of its own.
        raise ValueError(f"{name} cannot be read by JAX {jax.__version__}: {error}") from error
    return Program(exported, weights, jax.jit(exported.call))


def _unzip(data: bytes) -> dict[str, bytes]:
    """Returns the parts by name, each as long in the archive as it is: nothing in it grows."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        names = sorted(entry.filename for entry in entries)
        if names != sorted((_MANIFEST, _PROGRAM, _WEIGHTS)):
            raise ValueError(f"it holds {', '.join(names[:5]) or 'nothing'}")
        files.check_stored(archive)
        return {entry.filename: archive.read(entry) for entry in entries}


def _program(model: Any, weights: Any) -> tuple[list[Any], Callable[..., Any]]:
    """Returns a model's weights as a list, and its call as a function of that and the inputs."""
    if isinstance(model, nnx.Module):
        if weights is not None:
            raise ValueError("an NNX model has its weights; give weights with a function alone")
        graphdef, weights = nnx.split(model)
        # Merged within the trace, or nnx would take its variables for those of another.
        call = lambda state, *inputs: nnx.merge(graphdef, state)(*inputs)  # noqa: E731
    else:
        call = model if weights is not None else lambda _, *inputs: model(*inputs)
    leaves, structure = jax.tree.flatten(weights)
    kinds = (jax.Array, np.ndarray, np.generic)
    if any(not isinstance(leaf, kinds) for leaf in leaves):
        raise ValueError("weights to export are arrays; load an abstract model's first")
    keys = {i: jax.random.key_impl(leaf) for i, leaf in enumerate(leaves) if _is_key(leaf)}
    arrays = [jax.random.key_data(x) if i in keys else jnp.asarray(x) for i, x in enumerate(leaves)]

    def program(arrays: list[jax.Array], *inputs: Any) -> Any:
        leaves = [
            jax.random.wrap_key_data(x, impl=keys[i]) if i in keys else x
            for i, x in enumerate(arrays)
        ]
        return call(jax.tree.unflatten(structure, leaves), *inputs)

    return arrays, program


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _specs(inputs: tuple[Any, ...], batch: str | None) -> Any:
    size = None if batch is None else jax.export.symbolic_shape(batch)

    def spec(x: Any) -> jax.ShapeDtypeStruct:
        shape = jnp.shape(x)
        if size is not None and shape:
            shape = (*size, *shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype if hasattr(x, "dtype") else jnp.result_type(x))

    return jax.tree.map(spec, inputs)


def _archive(program: bytes, leaves: list[Any]) -> bytes:
    named = {str(i): leaf for i, leaf in enumerate(leaves)}
    kept = {"kind": _KIND, "version": VERSION, "not_finite": not_finite(named)}
    manifest = json.dumps(kept)
    stored = safetensors.numpy.save({name: as_stored(leaf) for name, leaf in named.items()})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in ((_MANIFEST, manifest), (_PROGRAM, program), (_WEIGHTS, stored)):
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def _weights(
    exported: jax.export.Exported, content: bytes, known: Sequence[str] | None
) -> list[jax.Array]:
    """Returns the stored weights, in the types and shapes that the program takes."""
    (arguments, _) = exported.in_tree.children()
    count = arguments.children()[0].num_leaves
    types = {str(i): (x.dtype, x.shape) for i, x in enumerate(exported.in_avals[:count])}
    stored = {
        name: np.frombuffer(x["data"], _type(x["dtype"])).reshape(x["shape"])
        for name, x in safetensors.deserialize(content)
    }
    return [jnp.asarray(x) for x in all_from_stored(stored, types, known).values()]


def _type(name: str) -> np.dtype:
    """Returns the type that safetensors calls so: BF16, F32, I8, U8, BOOL …"""
    kinds = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint", "BOOL": "bool"}
    kind = name.rstrip("0123456789")
    return jnp.dtype(kinds[kind] + name.removeprefix(kind))

"""Weight files that are whole and of their kind, and models made from them without random weights."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

import gguf
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from experiments.harness.pretrained import gguf_header
from jaxquant.artifacts import files as regular

Model = TypeVar("Model", bound=nnx.Module)


def packaged(package: str, member: str, install: str, sha256: str = "") -> Path:
    """Returns the path of a file inside an installed package, which is found but not imported.

    Args:
        package: top-level name as imported.
        member: path within the package.
        install: the command that installs it, for the message where it is missing.
        sha256: the digest that the file must have; empty leaves it unchecked.

    Raises:
        ValueError: no such package, no such file in it, or a file of another content.

    >>> packaged("json", "decoder.py", "").name
    'decoder.py'
    """
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    if not folders:
        raise ValueError(f"package {package!r} is not installed: run '{install}', or give path=")
    path = Path(folders[0]) / member
    if not path.is_file():
        raise ValueError(
            f"the installed package {package!r} has no {member}: run '{install}', or give path="
        )
    if sha256:
        found = regular.sha256(path)
        if found != sha256:
            raise ValueError(
                f"'{path}' is damaged or another version: its SHA-256 is {found[:16]}…, "
                f"not {sha256[:16]}…; run '{install}', or give path= to use other weights"
            )
    return path


@dataclasses.dataclass(frozen=True)
class Weights:
    """Named arrays of a file, read one at a time.

    Attributes:
        path: of the file, for messages.
        names: of all arrays that it holds.
        metadata: what else it says.
        read: from a name to the array; linear weights are [fan out, fan in].
    """

    path: Path
    names: Set[str]
    metadata: Mapping[str, Any]
    read: Callable[[str], np.ndarray]

    def value(self, key: str, kind: type) -> Any:
        """Returns the metadata's value under `key`.

        Raises:
            ValueError: there is none, or it is not of this kind.
        """
        if key not in self.metadata:
            raise ValueError(f"'{self.path}' lacks the metadata {key!r}")
        value = self.metadata[key]
        if not isinstance(value, kind):
            raise ValueError(
                f"'{self.path}' has {str(value)[:40]!r} for {key!r}; it must be of type {kind.__name__}"
            )
        return value


def _head(path: Path, size: int) -> bytes:
    try:
        with regular.open_regular(path, None, f"weight file '{path}'") as file:
            return file.read(size)
    except regular.Missing:
        raise ValueError(f"weight file '{path}' does not exist") from None


def read_gguf(path: Path | str) -> Weights:
    """Opens a GGUF file; its arrays are dequantized to float32 as they are read.

    Source: the format's specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

    Raises:
        ValueError: a file that is missing, unreadable, not GGUF, or not whole.
    """
    path = Path(path)
    magic = _head(path, 4)
    if magic != b"GGUF":
        raise ValueError(f"'{path}' is not a GGUF file: it begins with {magic!r}, not b'GGUF'")
    try:
        gguf_header.check(path)
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # a damaged header can surface as almost any exception
        raise ValueError(
            f"GGUF file '{path}' ({path.stat().st_size} bytes) is truncated or damaged: {error}"
        ) from None

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ValueError(
                f"'{path}' stores {name} as {tensor.tensor_type.name}, which cannot be dequantized here"
            ) from None
        return np.asarray(array, np.float32)

    return Weights(path, tensors.keys(), metadata, read)


def read_safetensors(path: Path | str) -> Weights:
    """Opens a safetensors file; its arrays are converted to float32 as they are read.

    Raises:
        ValueError: a file that is missing, unreadable, not safetensors, or not whole.
    """
    path = Path(path)
    _head(path, 1)
    try:
        file = safetensors.safe_open(path, "numpy")
        names, metadata = set(file.keys()), file.metadata() or {}
    except Exception as error:  # its own error type, and others for a header that is not JSON
        raise ValueError(
            f"'{path}' ({path.stat().st_size} bytes) is not a whole safetensors file: {error}"
        ) from None

    def read(name: str) -> np.ndarray:
        try:
            return np.asarray(file.get_tensor(name), np.float32)
        except Exception as error:  # a number format that NumPy lacks
            raise ValueError(f"'{path}': {name} cannot be read: {error}") from None

    return Weights(path, names, metadata, read)


def build(
    make: Callable[[], Model],
    weights: Weights,
    name_of: Callable[[str], str],
    convert: Callable[[str, np.ndarray], np.ndarray],
    unused: Set[str] = frozenset(),
) -> Model:
    """Returns a model whose parameters are a file's arrays; no initial values are drawn.

    Arrays are read and moved to the device one after another, so at most one is held twice.

    Args:
        make: makes the model; it is only traced.
        weights: the file.
        name_of: from a parameter's path, such as ``"blocks/0/mlp/up/kernel"``, to its name in the file.
        convert: from such a path and the file's array to the parameter.
        unused: names in the file that the model has no need of.

    Raises:
        ValueError: an array that is missing, that the model has no place for, or of another shape.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    variables = {"/".join(map(str, path)): (path, v) for path, v in nnx.to_flat_state(state)}
    names = {path: name_of(path) for path in variables}
    if missing := sorted(set(names.values()) - weights.names):
        raise ValueError(f"'{weights.path}' lacks {len(missing)} arrays, the first {missing[0]!r}")
    if extra := sorted(weights.names - set(names.values()) - unused):
        raise ValueError(
            f"'{weights.path}' has {len(extra)} arrays that this model has no place for, "
            f"the first {extra[0]!r}"
        )
    filled = []
    for path, (key, variable) in variables.items():
        array = convert(path, weights.read(names[path]))
        if array.shape != variable.shape:
            raise ValueError(
                f"'{weights.path}': {names[path]} gives {path} the shape {list(array.shape)}; "
                f"it must be {list(variable.shape)}"
            )
        filled.append((key, variable.replace(jnp.asarray(array))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))

"""Stages of post-training quantization that are finished, kept in a folder."""

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from jaxquant.artifacts import files, storage
from jaxquant.ptq.identity import difference


class Store:
    """Finished stages in a folder, or nowhere."""

    def __init__(self, workdir: Any, identities: Callable[[], Mapping[str, str]]):
        self.folder = None if workdir is None else Path(workdir)
        self._stage = ""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        marker = self.folder / "quantization.json"
        parts = identities()
        if not marker.exists():
            files.write(marker, json.dumps({"fingerprint": parts}))
        try:
            known = files.read_json(marker)["fingerprint"]
        except (ValueError, KeyError, TypeError):
            known = None
        if other := difference(known, parts):
            raise ValueError(
                f"workdir '{self.folder}' holds the layers of another {other}, or of another version of "
                "jaxquant; choose another"
            )

    def enter(self, paths: Sequence[str]) -> None:
        """Comes to a stage: what it sees depends on how the layers before it were staged."""
        self._stage = hashlib.sha256("\n".join([self._stage, *paths]).encode()).hexdigest()[:16]

    def _path(self) -> Path:
        assert self.folder is not None
        return self.folder / f"{self._stage}.npz"

    def read(self, paths: Sequence[str]) -> dict[str, Any] | None:
        if self.folder is None or not self._path().exists():
            return None
        try:
            with files.open_regular(self._path()) as opened, np.load(opened) as file:
                files.check_stored(file.zip)
                arrays = {name: file[name] for name in file.files}
            descriptions = files.parse_json(str(arrays.pop("descriptions")), "what they are")
            found = storage.from_arrays(arrays, descriptions)
        except (ValueError, OSError, KeyError, EOFError, BadZipFile, zlib.error) as error:
            raise ValueError(
                f"'{self._path()}' is damaged ({error}); delete it, and it is made anew"
            ) from None
        return {path: found[_key(path)] for path in paths}

    def write(self, paths: Sequence[str], solved: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        arrays, descriptions = storage.to_arrays({_key(p): dict(solved[p]) for p in paths})
        named: dict[str, Any] = {k: np.asarray(v) for k, v in arrays.items()}
        with files.replacing(self._path()) as file:
            np.savez(file, descriptions=json.dumps(dict(descriptions)), **named)


def _key(path: str) -> str:
    return path.replace("/", ".") or "model"

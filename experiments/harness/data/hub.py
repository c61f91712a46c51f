"""Documents of Hugging Face's datasets, streamed from its hub, or from files of its kinds."""

import copy
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain.python as grain
from grain import experimental

from experiments.harness.data import paths
from experiments.harness.data.corpus import HELD_OUT_EVERY
from experiments.harness.data.documents import HELD_OUT

_WINDOW = 10_000  # documents that are shuffled together
_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}


class HubDataset:
    """`documents.Source` of a streamed dataset's training split.

    Of the first 5,000 documents every tenth is held out.  The others are shuffled within windows of 10,000,
    which may reach into the next pass: so a position is small, and exact.
    """

    def __init__(self, path: str, field: str):
        """Opens it.

        Args:
            path: NAME or NAME:CONFIGURATION on the hub; or files, a folder or a glob of them.
            field: the column that has the text; "text" where empty.

        Raises:
            ValueError: no such dataset or column, or Hugging Face's library is missing.
        """
        if importlib.util.find_spec("datasets") is None:
            raise ValueError("data source 'huggingface' needs its library: pip install -e '.[hub]'")
        library: Any = importlib.import_module("datasets")
        library.disable_progress_bars()
        field = field or "text"
        self.name, self._field = path.rstrip("/").rpartition("/")[2], field
        try:
            self._rows = library.load_dataset(**_arguments(path), split="train", streaming=True)
            columns = [*next(iter(self._rows))]
        except StopIteration:
            raise ValueError(f"dataset {path!r} has no rows") from None
        except (OSError, ValueError, RuntimeError) as error:  # a missing one is a FileNotFoundError
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"dataset {path!r} cannot be read: {reason}") from None
        if field not in columns:
            raise ValueError(
                f"config.data_field is a column of {path!r}, which has {', '.join(columns)}; got {field!r}"
            )
        self.identity = f"huggingface:{path}:{field}"

    def held_out(self) -> Iterator[bytes]:
        first = self._fresh().take(HELD_OUT * HELD_OUT_EVERY)
        for index, row in enumerate(first):
            if _is_held_out(index):
                yield self._text(row)

    def in_order(self, start: int) -> Iterator[bytes]:
        return (self._text(row) for row in self._others().skip(start))

    def shuffled(self, seed: int) -> grain.IterDataset:
        return experimental.WindowShuffleIterDataset(_Stream(self), window_size=_WINDOW, seed=seed)

    def _fresh(self) -> Any:
        """The rows from the first on: a dataset of the library keeps where it is."""
        return copy.deepcopy(self._rows)

    def _others(self) -> Any:
        """The rows that are not held out."""
        return self._fresh().filter(lambda row, i: not _is_held_out(i), with_indices=True)

    def _text(self, row: dict[str, Any]) -> bytes:
        text = row[self._field]
        if not isinstance(text, str):
            raise ValueError(
                f"column {self._field!r} of {self.name} has text; got a {type(text).__name__}"
            )
        return text.encode()


def _is_held_out(index: int) -> bool:
    return index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 and index < HELD_OUT * HELD_OUT_EVERY


def _arguments(path: str) -> dict[str, Any]:
    """Of `load_dataset`: files here by their kind, or else a name on the hub."""
    if not Path(path).exists() and not any(c in path for c in "*?["):
        name, _, configuration = path.partition(":")
        return {"path": name, "name": configuration or None}
    files = paths.files_at(path, *_KINDS)
    kinds = {file.suffix for file in files}
    if len(kinds) != 1 or not kinds <= _KINDS.keys():
        raise ValueError(
            f"files are of one kind among {', '.join(_KINDS)}; got {', '.join(sorted(kinds))}"
        )
    return {"path": _KINDS[kinds.pop()], "data_files": [str(file) for file in files]}


class _Stream(grain.IterDataset):
    """The documents that are not held out, in order, again and again."""

    def __init__(self, dataset: HubDataset):
        super().__init__()
        self._dataset = dataset

    def __iter__(self) -> grain.DatasetIterator:
        return _StreamIterator(self._dataset)


class _StreamIterator(grain.DatasetIterator):
    def __init__(self, dataset: HubDataset):
        super().__init__()
        self._dataset = dataset
        self._begin()

    def _begin(self) -> None:
        self._others = self._dataset._others()
        self._rows = iter(self._others)

    def __next__(self) -> bytes:
        row = next(self._rows, None)
        if row is None:
            self._begin()
            row = next(self._rows, None)
        if row is None:
            raise ValueError(f"{self._dataset.name} has no documents but those that are held out")
        return self._dataset._text(row)

    def get_state(self) -> dict[str, Any]:
        return copy.deepcopy(self._others.state_dict())

    def set_state(self, state: dict[str, Any]) -> None:
        self._begin()
        self._others.load_state_dict(copy.deepcopy(state))
        self._rows = iter(self._others)

"""Documents of Hugging Face's datasets, streamed from its hub, or from files of its kinds."""

import importlib
import importlib.util
from collections.abc import Iterable, Iterator
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
        field = field or "text"
        self.name, self._field = path.rstrip("/").rpartition("/")[2], field
        self._arguments = _arguments(path)
        try:
            columns = [*next(iter(self._rows()))]
        except StopIteration:
            raise ValueError(f"dataset {path!r} has no rows") from None
        except (OSError, ValueError, RuntimeError) as error:  # a missing one is a FileNotFoundError
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"dataset {path!r} cannot be read: {reason}") from None
        if field not in columns:
            raise ValueError(
                f"config.data_field is a column of {path!r}, which has {', '.join(columns)}; got {field!r}"
            )
        if next(iter(self.others()), None) is None:  # which would be repeated for ever
            raise ValueError(f"dataset {path!r} has no rows but those that are held out")
        self.identity = f"huggingface:{path}:{field}"

    def held_out(self) -> Iterator[bytes]:
        first = self._rows().take(HELD_OUT * HELD_OUT_EVERY)
        for index, row in enumerate(self.unbroken(first)):
            if _is_held_out(index):
                yield self.text(row)

    def in_order(self, start: int) -> Iterator[bytes]:
        return (self.text(row) for row in self.unbroken(self.others().skip(start)))

    def shuffled(self, seed: int) -> grain.IterDataset:
        return experimental.WindowShuffleIterDataset(_Stream(self), window_size=_WINDOW, seed=seed)

    def _rows(self) -> Any:
        """Returns the rows from the first on; opened anew, for the library's datasets keep where they are."""
        library: Any = importlib.import_module("datasets")
        library.disable_progress_bars()
        return library.load_dataset(**self._arguments, split="train", streaming=True)

    def others(self) -> Any:
        """Returns the rows that are not held out, as the library has them."""
        return self._rows().filter(lambda row, i: not _is_held_out(i), with_indices=True)

    def unbroken(self, rows: Iterable[Any]) -> Iterator[Any]:
        """Returns the rows; the library itself tries again, for minutes, where a connection is lost.

        Raises:
            RuntimeError: they cannot be read on.
        """
        try:
            yield from rows
        except Exception as error:  # of the network's libraries, and of each kind of file's
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise RuntimeError(
                f"dataset {self.name} broke off: {reason}; the same command goes on from what is saved"
            ) from error

    def text(self, row: dict[str, Any]) -> bytes:
        """Returns a row's document."""
        text = row[self._field]
        if not isinstance(text, str):
            raise ValueError(
                f"column {self._field!r} of {self.name} has text; got a {type(text).__name__}"
            )
        return text.encode()


def _is_held_out(index: int) -> bool:
    return index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 and index < HELD_OUT * HELD_OUT_EVERY


def _arguments(path: str) -> dict[str, Any]:
    """Returns the arguments of `load_dataset`: local files by their type, or a name on the hub."""
    is_here = Path(path).exists() or Path(path).suffix in _KINDS or any(c in path for c in "*?[")
    if not is_here:
        name, _, configuration = path.partition(":")
        return {"path": name, "name": configuration or None}
    files = paths.files_at(path, *_KINDS)
    for file in files:
        paths.size(file)
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
        self._dataset, self._others = dataset, dataset.others().repeat(None)
        self._rows = dataset.unbroken(self._others)

    def __next__(self) -> bytes:
        return self._dataset.text(next(self._rows))

    def get_state(self) -> dict[str, Any]:
        return self._others.state_dict()

    def set_state(self, state: dict[str, Any]) -> None:
        self._others = self._dataset.others().repeat(None)
        self._others.load_state_dict(state)
        self._rows = self._dataset.unbroken(self._others)

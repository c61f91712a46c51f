"""Documents in ArrayRecord files: text, or TensorFlow's Example messages with a field of text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain.python as grain

from experiments.harness.data import paths
from experiments.harness.data.documents import HELD_OUT

_LENGTH_DELIMITED = 2


class ArrayRecords:
    """`documents.Source` of files whose records are read in any order."""

    def __init__(self, path: str, field: str):
        """Opens them.

        Args:
            path: of a file, a folder or a glob.
            field: of Example messages; empty where records are text.

        Raises:
            ValueError: files that are missing or none of these.
        """
        files = paths.files_at(path, ".array_record", ".arrayrecord")
        for file in files:
            paths.size(file)
        self.name, self._field = Path(path).name, field
        try:
            self._records: Any = grain.ArrayRecordDataSource([str(file) for file in files])
            count = len(self._records)
        except Exception as error:  # the library raises RuntimeError and others
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path!r} is no ArrayRecord file: {reason}") from None
        if count < 2:
            raise ValueError(
                f"{path!r} has {count} records; at least one is held out, and one is not"
            )
        self.identity = f"arrayrecord:{count}:{field}"
        self._every = max(10, count // HELD_OUT) if count >= 10 else count

    def held_out(self) -> Iterator[bytes]:
        return (self._text(i) for i in range(self._every - 1, len(self._records), self._every))

    def in_order(self, start: int) -> Iterator[bytes]:
        others = _Others(self)
        return (others[i] for i in range(start, len(others)))

    def shuffled(self, seed: int) -> grain.IterDataset:
        documents = grain.MapDataset.source(_Others(self)).shuffle(seed=seed)
        documents = documents.repeat(2**60 // len(documents))
        return documents.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64))

    def _text(self, index: int) -> bytes:
        record = self._records[index]
        text = example_field(record, self._field) if self._field else record
        try:
            text.decode()
        except UnicodeDecodeError:
            raise ValueError(
                f"record {index} of {self.name} is not UTF-8 text; of Example messages, config.data_field "
                "names the field"
            ) from None
        return text


class _Others(grain.RandomAccessDataSource):
    """The documents that are not held out."""

    def __init__(self, documents: ArrayRecords):
        self._documents = documents

    def __len__(self) -> int:
        total = len(self._documents._records)
        return total - total // self._documents._every

    def __getitem__(self, index) -> bytes:
        return self._documents._text(int(index) + int(index) // (self._documents._every - 1))


def example_field(message: bytes, name: str) -> bytes:
    """Returns the first value of a field of bytes in a serialized tf.train.Example.

    Example {features = 1 {map feature = 1 {key = 1, value = 2 {bytes_list = 1 {value = 1}}}}}.

    Raises:
        ValueError: no such message, or no such field in it.
    """
    known = []
    try:
        for features in _fields(message, 1):
            for entry in _fields(features, 1):
                key = next(_fields(entry, 1)).decode()
                known.append(key)
                if key == name:
                    return next(_fields(next(_fields(next(_fields(entry, 2)), 1)), 1))
    except (StopIteration, IndexError, UnicodeDecodeError, OverflowError):
        raise ValueError(
            f"a record is no tf.train.Example with a field of bytes {name!r}; where records are text, leave "
            "config.data_field empty"
        ) from None
    raise ValueError(
        f"config.data_field is one of the records' {', '.join(sorted(known)) or 'none'}; got {name!r}"
    )


def _fields(message: bytes, number: int) -> Iterator[bytes]:
    """Returns the length-delimited fields of a number in a protocol buffer, which has no others here."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 != _LENGTH_DELIMITED:
            raise IndexError
        size, at = _varint(message, at)
        if at + size > len(message):
            raise IndexError
        if tag >> 3 == number:
            yield message[at : at + size]
        at += size


def _varint(message: Sequence[int], at: int) -> tuple[int, int]:
    """Returns (a number of seven bits a byte, the least first; where the next one begins)."""
    value, shift = 0, 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at

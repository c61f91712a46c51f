"""Read the header of a GGUF file, and check its counts, lengths and shapes against the file's size.

Source: the format's specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import struct
from pathlib import Path
from typing import IO

import gguf

from jaxquant.artifacts.files import open_regular

MOST_VALUES = 2**22  # of metadata, in all; the largest vocabularies have 2^18 words
MOST_TENSORS = 2**20
MOST_AXES = 4
_DEEPEST = 4  # arrays within each other
_STRING, _ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
_SIZES = {
    0: 1,
    1: 1,
    2: 2,
    3: 2,
    4: 4,
    5: 4,
    6: 4,
    7: 1,
    10: 8,
    11: 8,
    12: 8,
}  # of numbers, by type


def check(path: Path) -> None:
    """Raises a ValueError where a file declares more than it has, or than any model needs."""
    with open_regular(path, None) as file:
        _Header(file).check()


class _Header:
    def __init__(self, file: IO[bytes]):
        self._file = file
        self._size = file.seek(0, 2)
        file.seek(0)
        self._values = 0
        self._order = "<"

    def check(self) -> None:
        self._take(4)
        if not struct.unpack("<I", self._take(4))[0] & 0xFFFF:
            self._order = ">"
        tensors, pairs = self._number(8), self._number(8)
        if tensors > MOST_TENSORS or pairs > MOST_VALUES:
            raise ValueError(
                f"it declares {tensors:,} arrays and {pairs:,} values of metadata; at most "
                f"{MOST_TENSORS:,} and {MOST_VALUES:,} are read"
            )
        for _ in range(pairs):
            self._skip(self._number(8))
            self._value(self._number(4), 0)
        total = sum(self._tensor() for _ in range(tensors))
        if total > self._size:
            raise ValueError(
                f"its arrays have {total:,} bytes by their shapes; it has {self._size:,}"
            )

    def _value(self, kind: int, depth: int) -> None:
        if kind == _STRING:
            self._skip(self._number(8))
        elif kind == _ARRAY and depth < _DEEPEST:
            inner, length = self._number(4), self._number(8)
            if inner in _SIZES:
                self._count(length)
                self._skip(length * _SIZES[inner])
                return
            for _ in range(length):
                self._count(1)
                self._value(inner, depth + 1)
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise ValueError(f"a value of metadata is of type {kind}, which is none")

    def _tensor(self) -> int:
        """Returns bytes of an array."""
        self._skip(self._number(8))
        axes = self._number(4)
        if axes > MOST_AXES:
            raise ValueError(f"an array has {axes:,} axes; at most {MOST_AXES} are read")
        elements = math.prod(self._number(8) for _ in range(axes))
        kind, offset = self._number(4), self._number(8)
        block, size = gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        found = elements * size // block
        if offset + found > self._size:
            raise ValueError(
                f"an array has {elements:,} elements from byte {offset:,} on; it has {self._size:,} bytes"
            )
        return found

    def _count(self, more: int) -> None:
        self._values += more
        if self._values > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values of metadata")

    def _number(self, size: int) -> int:
        return struct.unpack(self._order + {4: "I", 8: "Q"}[size], self._take(size))[0]

    def _take(self, size: int) -> bytes:
        found = self._file.read(size)
        if len(found) < size:
            raise ValueError("it is cut off within its header")
        return found

    def _skip(self, size: int) -> None:
        if self._file.tell() + size > self._size:
            raise ValueError(f"it declares {size:,} bytes in a row where it has fewer")
        self._file.seek(size, 1)

"""Several files of tokens as one sequence."""

from collections.abc import Sequence

import numpy as np

_BLOCKS = 1024


class Shards:
    """Arrays of one type as one sequence, none of which is copied before it is read.

    >>> shards = Shards([np.arange(3), np.arange(3, 5)])
    >>> shards.size, shards[1:4], shards[::2]
    (5, array([1, 2, 3]), array([0, 2, 4]))
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self._parts = [part for part in parts if part.size] or list(parts[:1])
        self._ends = np.cumsum([part.size for part in self._parts])
        self.size, self.dtype = int(self._ends[-1]), parts[0].dtype

    def __getitem__(self, at: slice) -> np.ndarray:
        start, stop, step = at.indices(self.size)
        found = self._views(start, stop)
        tokens = found[0] if len(found) == 1 else np.concatenate(found)
        return tokens if step == 1 else tokens[::step]

    def cut(self, start: int, stop: int) -> "Shards":
        """Returns a part of it, which is not copied either.

        >>> Shards([np.arange(3), np.arange(3, 9)]).cut(2, 5)[:]
        array([2, 3, 4])
        """
        return Shards(self._views(start, stop))

    def sample(self, count: int) -> np.ndarray:
        """Returns at most `count` tokens: all, or evenly spaced blocks, which touch few pages.

        >>> Shards([np.arange(5000), np.arange(5000)]).sample(2048)[:4]
        array([ 0,  1,  9, 10])
        """
        if self.size <= count:
            return self[:]
        length = count // _BLOCKS
        starts = np.linspace(0, self.size - length, _BLOCKS).astype(np.int64).tolist()
        return np.concatenate([self[start : start + length] for start in starts])

    def _views(self, start: int, stop: int) -> list[np.ndarray]:
        """Returns the parts from one position to another; an empty one where there is nothing."""
        found = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        for part, end in zip(self._parts[index:], self._ends[index:].tolist(), strict=True):
            begin = end - part.size
            if begin >= stop:
                break
            found.append(part[max(start - begin, 0) : stop - begin])
        return found or [self._parts[0][:0]]

"""Pipelines of windows: deterministic in the seed, with a small position, each process its own share."""

from typing import Any

import grain.python as grain
import numpy as np

from experiments.harness.data.corpus import Corpus, Documents, Tokens
from experiments.harness.data.markov import MarkovSource


class _TextWindows(grain.RandomAccessDataSource):
    """Windows of length + 1 tokens at every multiple of length: inputs, and targets one further on."""

    def __init__(self, tokens: Tokens, length: int, vocab_size: int):
        self._tokens, self._length, self._vocab_size = tokens, length, vocab_size

    def __len__(self) -> int:
        return (self._tokens.size - 1) // self._length

    def __getitem__(self, index) -> np.ndarray:
        start = int(index) * self._length
        return check_tokens(self._tokens[start : start + self._length + 1], self._vocab_size)


def check_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Returns tokens as int32; an embedding would clip those that are beyond the vocabulary, silently."""
    if tokens.max() >= vocab_size:
        raise ValueError(
            f"a vocabulary of {vocab_size} has no token {tokens.max()}, which was read"
        )
    return np.asarray(tokens, np.int32)


class _MarkovWindows(grain.RandomAccessDataSource):
    """Fresh windows without end, from a range of their own for each seed."""

    def __init__(self, source: MarkovSource, length: int, seed: int):
        self._source, self._length, self._first = source, length, seed * len(self)

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index) -> np.ndarray:
        return self._source.window(self._first + int(index), self._length + 1)


def train_batches(
    corpus: Corpus,
    length: int,
    batch_size: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
) -> Any:
    """Returns an endless iterator of training batches, int32[batch_size / shares, length + 1].

    Text is read in windows, shuffled anew in each epoch; documents are shuffled, and packed into windows.
    The global batch holds the same windows for any number of shares, one after another.  ``get_state()`` and
    ``set_state()`` checkpoint its position.

    Args:
        corpus: what to read.
        length: tokens predicted per window.
        batch_size: windows per batch over all processes.
        seed: of the order, and for a generated source of the tokens themselves.
        share: (which, of how many) equal parts of each batch this process reads.

    Raises:
        ValueError: less text than one window, or a batch that does not come apart evenly.
    """
    index, shares = share
    if batch_size % shares:
        raise ValueError(f"a batch of {batch_size} cannot be shared by {shares} processes")
    check_length(corpus, length)
    if isinstance(corpus.train, MarkovSource):
        windows = grain.MapDataset.source(_MarkovWindows(corpus.train, length, seed))
    elif isinstance(corpus.train, Documents):
        return corpus.train.batches(length, batch_size, seed, share)
    else:
        windows = grain.MapDataset.source(_TextWindows(corpus.train, length, corpus.vocab_size))
        # As good as endless; repeat() without a number overflows Grain's lengths at a batch of one.
        windows = windows.shuffle(seed=seed).repeat(2**60 // len(windows))
    own = windows.batch(batch_size // shares)[index::shares]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    return iter(own.to_iter_dataset(options))


def check_length(corpus: Corpus, length: int) -> None:
    """Raises a ValueError unless every split holds at least one window of `length` + 1 tokens."""
    for name, split in {"train": corpus.train, **corpus.evaluation}.items():
        size = getattr(split, "size", None)
        if size is not None and size < length + 1:
            raise ValueError(
                f"the {name} split of {corpus.name} has {size} tokens, "
                f"fewer than one sequence of {length + 1}"
            )


def evaluation_windows(corpus: Corpus, split: str, length: int, count: int) -> np.ndarray:
    """Returns up to `count` evenly spaced windows of an evaluation split, int32[count, length + 1]."""
    check_length(corpus, length)
    source = corpus.evaluation[split]
    if isinstance(source, MarkovSource):
        return np.stack([source.window(i, length + 1) for i in range(count)])
    windows = _TextWindows(source, length, corpus.vocab_size)
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int))
    return np.stack([windows[i] for i in chosen])

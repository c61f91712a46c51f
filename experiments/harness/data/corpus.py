"""Corpora: token sequences by split, and their metadata."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from experiments.harness.data.markov import MarkovSource
from experiments.harness.data.shards import Shards

HELD_OUT_EVERY = 10  # every tenth training document is held out for `valid`
LARGEST_VOCABULARY = 2**20
_HASHED_TOKENS = 2**26  # a corpus beyond this is known by a sample spread evenly


class Tokens(Protocol):
    """A sequence of tokens, in memory or not: an array of one axis, or files one after another."""

    @property
    def size(self) -> int: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, at: slice, /) -> np.ndarray: ...


@runtime_checkable
class Documents(Protocol):
    """Documents that are read, and tokenized, as they are wanted."""

    def batches(self, length: int, batch_size: int, seed: int, share: tuple[int, int]) -> Any:
        """Returns batches as `windows.train_batches` does."""
        ...

    def in_order(self, start: int) -> Iterator[np.ndarray]:
        """Yields the tokens of each document from `start` on, each with its separator."""
        ...


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token sequences by split.

    Attributes:
        name: what the text is, for reports.
        train: tokens, a source of windows that never repeats, or documents.
        evaluation: tokens by split, ``valid`` first.
        vocab_size: tokens are 0 … vocab_size − 1.
        fingerprint: hash of the content (of samples of it where it is large), so that a trial names its
            data by what it holds.
        entropy_rate: nats per token, where it is known exactly.
    """

    name: str
    train: Tokens | MarkovSource | Documents
    evaluation: dict[str, Tokens | MarkovSource]
    vocab_size: int
    fingerprint: str
    entropy_rate: float | None = None

    def epochs(self, tokens_seen: int) -> float | None:
        """Passes over the training text, tokens seen / its tokens: above 1, tokens were repeated.

        0 for a source whose tokens never repeat, None for documents, whose tokens nobody has counted.
        """
        if isinstance(self.train, MarkovSource):
            return 0.0
        return None if isinstance(self.train, Documents) else tokens_seen / self.train.size


def of_splits(
    name: str, train: Tokens, valid: Tokens, shift: Tokens | None, vocab_size: int
) -> Corpus:
    """Returns a corpus of tokens at hand."""
    nothing = np.empty(0, train.dtype)
    shift = nothing if shift is None else shift
    evaluation = {"valid": valid} | ({"shift": shift} if shift.size else {})
    digest = hashlib.sha256()
    for split in (train, valid, shift):
        sample = _sample(split)
        digest.update(f"{split.size}:{split.dtype}:".encode() + sample.tobytes())
    return Corpus(name, train, evaluation, vocab_size, digest.hexdigest()[:16])


def _sample(tokens: Tokens) -> np.ndarray:
    """Returns a part of a large sequence; a strided sample would touch all pages of a file."""
    if isinstance(tokens, Shards):
        return tokens.sample(_HASHED_TOKENS)
    return tokens[:: 1 + tokens.size // _HASHED_TOKENS]


def hold_out(documents: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Splits by document; a single document gives its last tenth."""
    if len(documents) == 1:
        (text,) = documents
        cut = len(text) - len(text) // HELD_OUT_EVERY
        return [text[:cut]], [text[cut:]]
    valid = list(documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]) or [documents[-1]]
    return [text for text in documents if not any(text is v for v in valid)], valid

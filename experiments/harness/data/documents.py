"""Documents that are tokenized as they are read: of ArrayRecord files, and of Hugging Face's datasets.

Some are held out.  The others are shuffled, tokenized and packed: one after another with the tokenizer's
separator behind each, cut into windows.  Every process reads all of them and keeps its rows of each batch, so
that a batch does not depend on their number; `experiments.tokenize` writes tokens that each reads its own
share of.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grain.python as grain
import numpy as np

from experiments.harness.data.corpus import Corpus
from experiments.harness.data.tokenizers import Tokenizer
from experiments.harness.data.windows import check_tokens

HELD_OUT = 500  # documents, at most


class Source(Protocol):
    """A source of documents, as UTF-8.

    Attributes:
        name: for reports.
        identity: what tells it from another, beside the documents that are held out.
    """

    name: str
    identity: str

    def held_out(self) -> Iterator[bytes]: ...

    def in_order(self, start: int) -> Iterator[bytes]:
        """Returns the others, once, from the one with this number on."""
        ...

    def shuffled(self, seed: int) -> grain.IterDataset:
        """Returns the others, again and again, each time in another order."""
        ...


class TokenizedDocuments:
    """`corpus.Documents` of a source."""

    def __init__(self, source: Source, tokenizer: Tokenizer):
        self._source, self._tokenizer = source, tokenizer

    def batches(self, length: int, batch_size: int, seed: int, share: tuple[int, int]) -> Any:
        windows = _Packed(self._source.shuffled(seed), self._ended, length)
        index, shares = share
        rows = batch_size // shares
        own = slice(index * rows, (index + 1) * rows)
        vocab_size = self._tokenizer.vocab_size
        batches = windows.batch(batch_size).map(lambda batch: check_tokens(batch[own], vocab_size))
        return iter(batches)

    def in_order(self, start: int) -> Iterator[np.ndarray]:
        return (self._ended(text) for text in self._source.in_order(start))

    def _ended(self, text: bytes) -> np.ndarray:
        tokens = self._tokenizer.encode(text)
        return np.append(tokens, np.array(self._tokenizer.separator, tokens.dtype))


def of_source(source: Source, tokenizer: Tokenizer) -> Corpus:
    """Returns a corpus of documents, of which some are held out.

    Raises:
        ValueError: there are none.
    """
    held_out = [*source.held_out()]
    if not held_out:
        raise ValueError(f"{source.name} has no documents")
    valid = tokenizer.joined(held_out)
    known = f"{source.identity}:{tokenizer.fingerprint}:{valid.size}:".encode() + valid.tobytes()
    return Corpus(
        source.name,
        TokenizedDocuments(source, tokenizer),
        {"valid": valid},
        tokenizer.vocab_size,
        hashlib.sha256(known).hexdigest()[:16],
    )


class _Packed(grain.IterDataset):
    """Windows of length + 1 tokens from documents; the first token of one is the last of the one before."""

    def __init__(
        self, parent: grain.IterDataset, tokenize: Callable[[bytes], np.ndarray], length: int
    ):
        super().__init__(parent)
        self._tokenize, self._length = tokenize, length

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(iter(self._parent), self._tokenize, self._length)


class _PackedIterator(grain.DatasetIterator):
    def __init__(self, parent: Any, tokenize: Callable[[bytes], np.ndarray], length: int):
        super().__init__(parent)
        self._documents, self._tokenize, self._length = parent, tokenize, length
        self._rest = np.empty(0, np.int64)

    def __next__(self) -> np.ndarray:
        parts, size = [self._rest], self._rest.size
        while size < self._length + 1:
            parts.append(self._tokenize(next(self._documents)))
            size += parts[-1].size
        tokens = np.concatenate(parts)
        self._rest = tokens[self._length :]
        return tokens[: self._length + 1]

    def get_state(self) -> dict[str, Any]:
        return {"documents": self._documents.get_state(), "rest": self._rest.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._documents.set_state(state["documents"])
        self._rest = np.array(state["rest"], np.int64)

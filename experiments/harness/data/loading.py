"""Load a corpus by the name of its source."""

import hashlib
from typing import Protocol, TypeVar

from experiments.harness.data import documents, text, tokenizers
from experiments.harness.data.array_records import ArrayRecords
from experiments.harness.data.corpus import Corpus
from experiments.harness.data.hub import HubDataset
from experiments.harness.data.markov import markov_source
from experiments.harness.data.tokens import load_tokens

SOURCES = ("sotu", "text", "tokens", "generated")
DOCUMENTS = ("arrayrecord", "huggingface")
_WITH_PATH = ("text", "tokens")


class _HasFingerprint(Protocol):
    @property
    def fingerprint(self) -> str: ...


_Named = TypeVar("_Named", bound=_HasFingerprint)


def load(
    source: str, path: str = "", shift_path: str = "", tokenizer: str = "", vocab_size: int = 0
) -> Corpus:
    """Loads a corpus whose tokens are at hand.

    Args:
        source: ``"sotu"``, US presidents' State of the Union addresses 1790–1999, shifted to 2000 on
            (the `sotu` package); ``"text"``, UTF-8 files at `path`; ``"tokens"``, integers in ``.npy`` files,
            or in nanoGPT's or llm.c's ``.bin`` files; ``"generated"``, fresh tokens of a Markov source.
        path: a file, a folder or a glob; of sotu 1/k, to train on every k-th document,
            or nothing.
        shift_path: text or tokens to evaluate on that are unlike the training text; may be empty.
        tokenizer: of text: a ``tokenizer.json``, a folder with one, or a name on Hugging Face's hub; bytes
            where empty.
        vocab_size: of tokens too many to be looked through, as of `load_tokens`; else not used.

    Raises:
        ValueError: an unknown source; a path missing, empty, unreadable or not of the source's kind; a
            tokenizer that cannot be read.
    """
    if source in DOCUMENTS:
        raise ValueError(
            f"data source is one of {', '.join(SOURCES)} here; got {source!r}, of which python -m "
            "experiments.tokenize makes tokens"
        )
    if source not in SOURCES:
        raise ValueError(f"data source is one of {', '.join(SOURCES)}; got {source!r}")
    _check_paths(source, path, shift_path)
    if source in ("tokens", "generated") and tokenizer:
        raise ValueError(f"data source {source!r} takes no tokenizer; got {tokenizer!r}")
    if source == "sotu":
        return text.load_sotu(tokenizers.load(tokenizer), text.parse_share(path))
    if source == "text":
        return text.load_text(path, shift_path, tokenizers.load(tokenizer))
    return _generated() if source == "generated" else load_tokens(path, shift_path, vocab_size)


def _check_paths(source: str, path: str, shift_path: str) -> None:
    if source in _WITH_PATH:
        if not path:
            raise ValueError(f"data source {source!r} needs a path (--config.data_path)")
        return
    if shift_path or (path and source != "sotu"):
        kind = "path" if path and source != "sotu" else "shift_path"
        raise ValueError(
            f"data source {source!r} takes no {kind}; got {(path if kind == 'path' else shift_path)!r} "
            "(did you mean --config.data=text?)"
        )


def unchanged(loaded: _Named, fingerprint: str, source: str) -> _Named:
    """What was loaded, if it is still what a trial was made for.

    Raises:
        RuntimeError: it has another fingerprint.
    """
    if loaded.fingerprint != fingerprint:
        raise RuntimeError(f"the data at {source!r} changed while the study was running")
    return loaded


def load_documents(source: str, path: str, tokenizer: str = "", field: str = "") -> Corpus:
    """Loads a corpus of documents, which are tokenized as they are read.

    Args:
        source: ``"arrayrecord"``, ArrayRecord files; ``"huggingface"``, a dataset, streamed.
        path: a file, a folder or a glob; of huggingface also NAME or NAME:CONFIGURATION on its hub.
        tokenizer: as of `load`.
        field: huggingface's column, "text" where empty; arrayrecord's field of Example messages, empty where
            records are the text itself.

    Raises:
        ValueError: an unknown source; a path missing, unreadable or not of the source's kind; no such
            field; a tokenizer that cannot be read.
    """
    if source not in DOCUMENTS:
        raise ValueError(f"a source of documents is one of {', '.join(DOCUMENTS)}; got {source!r}")
    if not path:
        raise ValueError(f"data source {source!r} needs a path (--config.data_path)")
    encoder = tokenizers.load(tokenizer)
    kind = ArrayRecords if source == "arrayrecord" else HubDataset
    return documents.of_source(kind(path, field), encoder)


def load_any(
    source: str, path: str, shift_path: str, tokenizer: str, field: str, vocab_size: int = 0
) -> Corpus:
    """Returns `load` or `load_documents`.

    Raises:
        ValueError: as they do, or an argument that the source does not take.
    """
    if source not in SOURCES + DOCUMENTS:
        raise ValueError(f"data source is one of {', '.join(SOURCES + DOCUMENTS)}; got {source!r}")
    if source in SOURCES:
        if field:
            raise ValueError(f"data source {source!r} has no fields; got {field!r}")
        return load(source, path, shift_path, tokenizer, vocab_size)
    if shift_path:
        raise ValueError(f"data source {source!r} takes no shift_path; got {shift_path!r}")
    return load_documents(source, path, tokenizer, field)


def _generated() -> Corpus:
    train, valid = markov_source(0), markov_source(1)
    digest = hashlib.sha256(train.outcomes.tobytes()).hexdigest()[:16]
    return Corpus(
        "generated Markov source",
        train,
        {"valid": valid},
        train.vocab_size,
        digest,
        train.entropy_rate,
    )

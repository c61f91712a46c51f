"""Metrics of pretrained models: bits per byte of text, and agreement with human judgements."""

import csv
import dataclasses
import functools
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import tokenizers
from flax import nnx

from experiments.harness import data
from experiments.harness.pretrained import files, smollm2
from jaxquant.artifacts.files import read_bytes

_LARGEST = 2**26  # bytes of a file of judgements, at most

# ---------------------------------------------------------------------------------------------------
# Text


@dataclasses.dataclass(frozen=True)
class TextWindows:
    """Windows of text.

    Attributes:
        tokens: int32[windows, length].
        predicted_bytes: int[windows], UTF-8 bytes of each window's tokens but the first, which nothing
            predicts.
    """

    tokens: np.ndarray
    predicted_bytes: np.ndarray


def text_windows(
    tokenizer: tokenizers.Tokenizer, corpus: data.Corpus, split: str, length: int, count: int
) -> TextWindows:
    """Returns `count` windows spread evenly over a split, none of which spans two documents.

    Each document is cut into windows from its beginning; what is left at its end is not used.  No token is
    put before a window.

    Args:
        tokenizer: byte-level, as `smollm2.load` gives.
        corpus: text, as ``data.load("sotu")`` gives.
        split: ``"train"``, ``"valid"`` or ``"shift"``.
        length: tokens per window.
        count: windows.

    Raises:
        ValueError: a corpus that is not text, an unknown split, or one with too few windows.
    """
    parts = {"train": corpus.train, **corpus.evaluation}
    if split not in parts:
        raise ValueError(f"a split of {corpus.name} is one of {', '.join(parts)}; got {split!r}")
    part = parts[split]
    if not isinstance(part, np.ndarray) or part.dtype != np.uint8:
        raise ValueError(f"{corpus.name} is not text")
    # A split of a single document may begin in the middle of a character, which is left out.
    documents = [text.decode(errors="ignore") for text in part.tobytes().split(data.SEPARATOR)]
    windows = []
    for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
        ids = np.array(encoding.ids, np.int32)
        windows.append(ids[: ids.size // length * length].reshape(-1, length))
    tokens = np.concatenate(windows)
    if not 1 <= count <= len(tokens):
        raise ValueError(
            f"the {split} split of {corpus.name} has {len(tokens)} windows of {length} tokens; "
            f"got a count of {count}"
        )
    tokens = tokens[np.linspace(0, len(tokens) - 1, count).astype(int)]
    return TextWindows(tokens, token_bytes(tokenizer)[tokens[:, 1:]].sum(1))


def token_bytes(tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """Returns UTF-8 bytes that each token stands for, int[vocabulary], under a byte-level tokenizer."""
    # Such a tokenizer writes every byte as a character of its own.
    size = tokenizer.get_vocab_size()
    return np.array([len(tokenizer.id_to_token(i) or "") for i in range(size)])


def bits_per_byte(model: nnx.Module, windows: TextWindows) -> np.ndarray:
    """Returns bits that a model needs per byte of each window, float64[windows].

    −Σ_{t ≥ 1} log₂ p(token t | tokens 0 … t − 1) / the bytes of tokens 1 … length − 1.

    Args:
        model: gives logits [B, T, vocabulary] of int32[B, T] tokens.
        windows: the text; logits of one window at a time are held.
    """
    graphdef, state = nnx.split(model)
    nats = np.asarray(_window_nats(graphdef, state, windows.tokens), np.float64)
    return nats / math.log(2) / windows.predicted_bytes


@functools.partial(jax.jit, static_argnums=0)
def _window_nats(graphdef, state, tokens_WxT: jax.Array) -> jax.Array:
    def nats(tokens_T: jax.Array) -> jax.Array:
        logits_TxV = nnx.merge(graphdef, state)(tokens_T[None, :-1])[0].astype(jnp.float32)
        target_T = jnp.take_along_axis(logits_TxV, tokens_T[1:, None], axis=1)[:, 0]
        return jnp.sum(jax.nn.logsumexp(logits_TxV, axis=1) - target_T)

    return jax.lax.map(nats, tokens_WxT)


def residual_sizes(model: smollm2.SmolLM2, tokens_BxT: jax.Array) -> np.ndarray:
    """Returns the largest and median |x| of the residual stream, float[layers + 1, 2]."""
    stream = model.embed(tokens_BxT)
    streams = [stream]
    for block in model.blocks:
        stream, _ = block(stream)
        streams.append(stream)
    return np.array([(np.abs(x).max(), np.median(np.abs(x))) for x in streams])


# ---------------------------------------------------------------------------------------------------
# Human judgements

INSTALL_JUDGEMENTS = "pip install --no-deps gensim"
JUDGEMENTS = ("lee", "wordsim353", "simlex999")


@dataclasses.dataclass(frozen=True)
class Judgements:
    """Pairs of texts, and how alike people find them.

    Attributes:
        name: one of `JUDGEMENTS`.
        texts: each once.
        pairs: int[pairs, 2], into `texts`.
        human: float[pairs], a mean over people.
    """

    name: str
    texts: tuple[str, ...]
    pairs: np.ndarray
    human: np.ndarray


def judgements(name: str, path: Path | str | None = None) -> Judgements:
    """Reads pairs that people have judged.

    ``"lee"``: all 1,225 pairs of 50 news texts (Lee, Pincombe and Welsh 2005); ``"wordsim353"``: 353 pairs
    of words, relatedness (Finkelstein et al. 2002); ``"simlex999"``: 999 pairs of words, similarity in the
    narrow sense (Hill, Reichart and Korhonen 2015, arXiv 1408.3456).

    Args:
        name: one of `JUDGEMENTS`.
        path: a folder with lee.cor and similarities0-1.txt, wordsim353.tsv or simlex999.txt; None takes
            those in the tests of the installed `gensim` package, which is not imported.

    Raises:
        ValueError: an unknown name; neither path nor package; files of another form.
    """
    if name not in JUDGEMENTS:
        raise ValueError(f"judgements are one of {', '.join(JUDGEMENTS)}; got {name!r}")
    member = {"lee": "lee.cor", "wordsim353": "wordsim353.tsv", "simlex999": "simlex999.txt"}[name]
    if path is None:
        file = files.packaged("gensim", f"test/test_data/{member}", INSTALL_JUDGEMENTS)
    else:
        file = Path(path) / member
    try:
        return _lee(file) if name == "lee" else _words(name, file)
    except (ValueError, IndexError) as error:
        raise ValueError(f"'{file}' does not hold the judgements of {name}: {error}") from None


def _lee(file: Path) -> Judgements:
    texts = tuple(_text(file, "latin-1").rstrip("\n").split("\n"))
    human = np.loadtxt(io.StringIO(_text(file.with_name("similarities0-1.txt"))))
    if len(texts) != 50 or human.shape != (50, 50):
        raise ValueError(
            f"it has {len(texts)} texts and {human.shape} similarities, not 50 and (50, 50)"
        )
    upper = np.triu_indices(50, 1)
    return Judgements("lee", texts, np.stack(upper, 1), human[upper])


def _text(file: Path, encoding: str = "utf-8") -> str:
    return read_bytes(file, _LARGEST).decode(encoding)


def _words(name: str, file: Path) -> Judgements:
    lines = io.StringIO(_text(file), newline="")
    rows = [row for row in csv.reader(lines, delimiter="\t") if not row[0].startswith("#")]
    if len(rows) != int(name[-3:]):
        raise ValueError(f"it has {len(rows)} pairs, not {name[-3:]}")
    texts = tuple(dict.fromkeys(word for row in rows for word in row[:2]))
    index = {word: i for i, word in enumerate(texts)}
    pairs = np.array([[index[word] for word in row[:2]] for row in rows])
    return Judgements(name, texts, pairs, np.array([float(row[2]) for row in rows]))


def similarities(judged: Judgements, encode: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
    """Returns the cosine of each pair under an encoder that gives unit vectors, float[pairs]."""
    vectors = encode(judged.texts)
    first, second = (vectors[judged.pairs[:, side]] for side in (0, 1))
    return np.sum(first * second, axis=1)


def correlation(judged: Judgements, cosines: np.ndarray) -> float:
    """Returns agreement with people as each set is usually reported: Pearson for lee, Spearman for words."""
    human = judged.human
    if judged.name != "lee":
        human, cosines = scipy.stats.rankdata(human), scipy.stats.rankdata(cosines)
    return float(np.corrcoef(human, cosines)[0, 1])

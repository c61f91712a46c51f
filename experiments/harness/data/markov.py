"""Fresh tokens from a source whose entropy rate is known exactly."""

import dataclasses
import functools

import numpy as np

RESOLUTION = 256
_MARKOV_VOCAB = 64


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
        """Returns the least mean loss of predicting tokens 1 … length of a window from those before, in nats.

        It lies above the rate since the window's first prediction knows one token, not two.
        """
        v = self.vocab_size
        pairs = self.stationary.reshape(v, v)
        first = pairs / pairs.sum(1, keepdims=True)
        entropy = -np.sum(pairs * np.log(np.where(first > 0, first, 1)))
        return float((entropy + (length - 1) * self.entropy_rate) / length)

    def window(self, index: int, length: int) -> np.ndarray:
        """Returns `length` tokens, determined by the stream and the index alone."""
        rng = np.random.Generator(np.random.Philox(key=[self.stream, index]))
        v = self.vocab_size
        state = int(np.searchsorted(np.cumsum(self.stationary), rng.random(), side="right"))
        tokens = [state // v, state % v]
        for draw in rng.integers(RESOLUTION, size=length - 2).tolist():
            tokens.append(int(self.outcomes[state, draw]))
            state = (state % v) * v + tokens[-1]
        return np.array(tokens[:length], np.int32)


@functools.lru_cache(maxsize=4)
def markov_source(stream: int = 0) -> MarkovSource:
    """Returns the generated source; every stream has the same law and tokens of its own."""
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

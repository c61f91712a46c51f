"""An encoder beside its quantized twin: embeddings have no labels, but angles, and people's judgments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np

from jaxquant.artifacts.plain import plain
from jaxquant.checks import check_whole
from jaxquant.quality.intervals import (
    Interval,
    as_array,
    mean_interval,
    pairs_interval,
    quantile_interval,
)
from jaxquant.stats import check_confidence_level, percentile_interval, renamed


@dataclasses.dataclass(frozen=True)
class PairReport:
    """Similarities of pairs of embeddings under both models.

    Attributes:
        n: pairs.
        difference: mean of the quantized cosine similarity less the reference's.
        absolute_mean, absolute_max: of the difference's magnitude.
    """

    n: int
    difference: Interval
    absolute_mean: float
    absolute_max: float


@dataclasses.dataclass(frozen=True)
class JudgmentReport:
    """Correlation of the similarities with people's scores, and its paired change."""

    reference_pearson: float
    pearson: float
    pearson_difference: Interval
    reference_spearman: float
    spearman: float
    spearman_difference: Interval


@renamed("level", "confidence_level")
@dataclasses.dataclass(frozen=True)
class EmbeddingReport:
    """The result of `compare_embeddings`; print it, or call `to_dict()`.

    Attributes:
        confidence_level: of the intervals, two-sided.
        n, dimensions: embeddings and their length.
        distance: mean of 1 − cos between an embedding and its twin.
        distance_median, distance_p99, distance_max: its distribution.
        norm_ratio: mean of ‖quantized‖/‖reference‖.
        pairs: None without pairs.
        judgments: None without scores.
    """

    confidence_level: float
    n: int
    dimensions: int
    distance: Interval
    distance_median: float
    distance_p99: Interval
    distance_max: float
    norm_ratio: Interval
    pairs: PairReport | None
    judgments: JudgmentReport | None

    @property
    def cosine(self) -> float:
        """Mean cosine similarity between twins."""
        return 1 - self.distance.estimate

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as JSON has them, None where a figure is not finite."""
        return plain(self) | {"cosine": self.cosine}

    def __str__(self) -> str:
        rows = [
            ("cosine of twins, mean", f"{self.cosine:.5f}"),
            ("1 − cosine, mean", f"{self.distance:.2e}"),
            ("1 − cosine, 99 %", f"{self.distance_p99:.2e}"),
            ("1 − cosine, median, max", f"{self.distance_median:.2e}, {self.distance_max:.2e}"),
            ("norm ratio", f"{self.norm_ratio:.4f}"),
        ]
        if self.pairs:
            rows += [
                ("pairs", f"{self.pairs.n:,}"),
                ("similarity difference", f"{self.pairs.difference:+.2e}"),
                (
                    "its magnitude, mean, max",
                    f"{self.pairs.absolute_mean:.2e}, {self.pairs.absolute_max:.2e}",
                ),
            ]
        if self.judgments:
            j = self.judgments
            rows += [
                ("Pearson with scores", f"{j.reference_pearson:.4f} → {j.pearson:.4f}"),
                ("  difference", f"{j.pearson_difference:+.4f}"),
                ("Spearman with scores", f"{j.reference_spearman:.4f} → {j.spearman:.4f}"),
                ("  difference", f"{j.spearman_difference:+.4f}"),
            ]
        header = (
            f"{self.n:,} embeddings of {self.dimensions:,};"
            f" intervals at {100 * self.confidence_level:g} %"
        )
        return "\n".join([header, "", *(f"{name:26}{value}" for name, value in rows)])


@renamed("level", "confidence_level")
def compare_embeddings(
    reference: jt.Float[jax.Array | np.ndarray, "n dimensions"],
    embeddings: jt.Float[jax.Array | np.ndarray, "n dimensions"],
    pairs: jt.Integer[jax.Array | np.ndarray, "pairs 2"] | None = None,
    scores: jt.Shaped[Any, " pairs"] | None = None,
    *,
    confidence_level: float = 0.9,
    resamples: int = 1000,
    seed: int = 0,
) -> EmbeddingReport:
    """Compares an encoder's embeddings with its quantized twin's.

    Twins are compared by 1 − cos = ½‖a/‖a‖ − b/‖b‖‖², pairs by the change of their cosine similarity,
    and scores by the change of its correlation with them.  Rows that are alike under both models are one
    text.  Where no text is in two pairs the correlation's interval is the percentile bootstrap's over pairs;
    else pairs that share a text depend on each other, and it is Student's of the correlation's influence
    function, by `intervals.pairs_interval`.

    Args:
        reference: of the reference.
        embeddings: of the quantized model, row by row of the same texts.
        pairs: rows whose similarity counts.
        scores: people's judgments of the pairs' similarity, in any units.
        confidence_level: of the intervals, two-sided.
        resamples: of the bootstrap, 100 or more.
        seed: of the bootstrap.

    Raises:
        ValueError: shapes that differ, embeddings that are zero or not finite, pairs out of range,
            scores without pairs, of another length, or all alike; a level outside (0, 1), or resamples and
            seed that are no such numbers.

    Sources: correlation with judgments, Cer et al. 2017 (STS-B); bootstrap, Efron & Tibshirani 1993;
    influence functions of correlations, Croux & Dehon 2010.

    >>> a = jax.random.normal(jax.random.key(0), (500, 16))
    >>> round(compare_embeddings(a, a + 0.01).cosine, 4)
    0.9999
    """
    check_confidence_level(confidence_level)
    _check_whole("resamples", resamples, 100)
    _check_whole("seed", seed, 0)
    _check_embeddings(reference, embeddings)
    a, b = np.asarray(reference, np.float64), np.asarray(embeddings, np.float64)
    a_norm, b_norm = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    for name, norm in (("reference", a_norm), ("embeddings", b_norm)):
        bad = np.flatnonzero(~np.isfinite(norm) | (norm == 0))
        if len(bad):
            raise ValueError(
                f"{name} are finite and not zero; {len(bad)} rows are not, the first row {bad[0]}"
            )
    texts = _texts(a, b)
    clusters = texts if texts.max() + 1 < len(texts) else None
    a, b = a / a_norm[:, None], b / b_norm[:, None]
    distance = np.sum((a - b) ** 2, axis=1) / 2
    pair_report, judgments = None, None
    if scores is not None and pairs is None:
        raise ValueError("scores are judgments of pairs; give pairs too")
    if pairs is not None:
        rows = _check_pairs(pairs, len(a))
        before, after = (np.sum(e[rows[:, 0]] * e[rows[:, 1]], axis=1) for e in (a, b))
        change = after - before
        pair_report = PairReport(
            len(rows),
            pairs_interval(change, texts[rows], confidence_level),
            float(np.abs(change).mean()),
            float(np.abs(change).max()),
        )
        if scores is not None:
            judgments = _judgments(
                before, after, scores, texts[rows], confidence_level, resamples, seed
            )
    return EmbeddingReport(
        confidence_level=confidence_level,
        n=len(a),
        dimensions=a.shape[1],
        distance=mean_interval(distance, clusters, confidence_level),
        distance_median=float(np.median(distance)),
        distance_p99=quantile_interval(distance, 0.99, clusters, confidence_level),
        distance_max=float(distance.max()),
        norm_ratio=mean_interval(b_norm / a_norm, clusters, confidence_level),
        pairs=pair_report,
        judgments=judgments,
    )


def _check_whole(name: str, value: Any, least: int) -> None:
    check_whole(f"{name} of the bootstrap", value, least)


def _check_embeddings(reference: Any, embeddings: Any) -> None:
    for name, array in (("reference", reference), ("embeddings", embeddings)):
        if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} are a floating array; got {getattr(array, 'dtype', type(array))}"
            )
    if reference.shape != embeddings.shape or reference.ndim != 2 or not reference.size:
        raise ValueError(
            "embeddings of both models have one shape [n, dimensions], not empty; got"
            f" {reference.shape} and {embeddings.shape}"
        )


def _check_pairs(pairs: Any, n: int) -> np.ndarray:
    rows = as_array("pairs", pairs)
    if rows.ndim != 2 or rows.shape[1] != 2 or not len(rows):
        raise ValueError(f"pairs have shape [pairs, 2], at least one; got {rows.shape}")
    if not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"pairs are integer rows from 0 to {n - 1}; got {rows.dtype}")
    if rows.min() < 0 or rows.max() >= n:
        raise ValueError(
            f"pairs are integer rows from 0 to {n - 1}; got {rows.dtype} from {rows.min()} to {rows.max()}"
        )
    return rows


def _texts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns a number for each row, the same where both models give the same embedding."""
    seen: dict[bytes, int] = {}
    return np.array(
        [seen.setdefault(x.tobytes() + y.tobytes(), len(seen)) for x, y in zip(a, b, strict=True)]
    )


def _judgments(
    before: np.ndarray,
    after: np.ndarray,
    scores: Any,
    pairs: np.ndarray,
    confidence_level: float,
    resamples: int,
    seed: int,
) -> JudgmentReport:
    scores = as_array("scores", scores, np.float64)
    if scores.shape != before.shape or not np.all(np.isfinite(scores)):
        raise ValueError(
            f"scores are finite, one for each of {len(before)} pairs; got shape {scores.shape}"
        )
    if len(scores) < 3 or scores.min() == scores.max():
        raise ValueError(
            "a correlation needs three pairs or more, and scores that are not all alike"
        )
    columns = np.stack([scores, before, after])
    found = _correlations(columns)
    if len(np.unique(pairs)) == pairs.size:
        rng = np.random.default_rng(seed)
        draws = (rng.integers(0, len(scores), len(scores)) for _ in range(resamples))
        sampled = np.stack([_correlations(columns[:, rows]) for rows in draws])
        intervals = [
            _bootstrap_interval(found[:, i], sampled[:, :, i], confidence_level) for i in range(2)
        ]
    else:
        intervals = [
            _influence_interval(found[:, i], _influences(columns, i == 1), pairs, confidence_level)
            for i in range(2)
        ]
    pearson, spearman = intervals
    return JudgmentReport(
        float(found[0, 0]), float(found[1, 0]), pearson,
        float(found[0, 1]), float(found[1, 1]), spearman,
    )  # fmt: skip


def _correlations(columns: np.ndarray) -> np.ndarray:
    """Returns [reference, quantized] × [Pearson, Spearman] with the first row; NaN for a constant row."""
    both = columns, _ranks(columns)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([np.corrcoef(rows)[0, 1:] for rows in both], axis=-1)


def _ranks(columns: np.ndarray) -> np.ndarray:
    """Ranks within each row from 1, equal values sharing the mean of theirs."""
    from scipy import stats  # which takes a second to import

    return stats.rankdata(columns, axis=1)


def _influences(columns: np.ndarray, ranked: bool) -> np.ndarray:
    """Returns each pair's influence on n · (the correlation of each column after the first with it).

    Pearson's: z_x·z_y − r/2·(z_x² + z_y²), of standardized columns.  Spearman's is that of the ranks, and
    what a pair adds to the ranks of those above it.
    """
    values = _ranks(columns) if ranked else columns
    scales = values.std(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = (values - values.mean(axis=1, keepdims=True)) / scales
        added = []
        for row, scale in zip(z[1:], scales[1:, 0], strict=True):
            r = float(np.mean(z[0] * row))
            direct = z[0] * row - r / 2 * (z[0] ** 2 + row**2)
            if ranked:
                direct = direct + _above(values[0], (row - r * z[0]) / scales[0, 0])
                direct += _above(row, (z[0] - r * row) / scale)
            added.append(direct - direct.mean())
    return np.stack(added)


def _above(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns, for each value, the weight of larger values plus half of that of equal ones."""
    _, index = np.unique(values, return_inverse=True)
    totals = np.bincount(index.reshape(-1), weights)
    return (totals[::-1].cumsum()[::-1] - totals / 2)[index.reshape(-1)]


def _influence_interval(
    found: np.ndarray, influences: np.ndarray, pairs: np.ndarray, confidence_level: float
) -> Interval:
    """Returns the interval of quantized minus reference, from each pair's influence."""
    estimate, added = float(found[1] - found[0]), influences[1] - influences[0]
    if not np.all(np.isfinite(added)):
        return Interval(estimate, np.inf, -np.inf, np.inf)
    spread = pairs_interval(added, pairs, confidence_level)
    return Interval(estimate, spread.se, estimate + spread.low, estimate + spread.high)


def _bootstrap_interval(
    found: np.ndarray, sampled: np.ndarray, confidence_level: float
) -> Interval:
    """Returns the percentile interval of quantized less reference."""
    differences = sampled[:, 1] - sampled[:, 0]
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return Interval(float(found[1] - found[0]), np.inf, -np.inf, np.inf)
    low, high = percentile_interval(differences, confidence_level)
    estimate = float(found[1] - found[0])
    return Interval(estimate, float(np.std(differences, ddof=1)), low, high)

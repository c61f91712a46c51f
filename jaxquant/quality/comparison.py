"""A model beside its quantized twin on the same labelled examples: the figures of the paired report.

Accuracy hides what quantization does: as many answers may turn right as turn wrong.  So both directions
are counted, the distributions are compared without the labels, and every figure that a decision may
rest on has an interval that respects the pairing and the correlation within a window of text.
"""

import dataclasses
import math
from typing import Any

import jax
import jaxtyping as jt
import numpy as np
from scipy import special

from jaxquant.quality.examples import Examples, per_example
from jaxquant.quality.intervals import (
    Interval,
    as_array,
    holm,
    mcnemar,
    mean_interval,
    paired_difference,
    paired_ratio,
    proportion,
    quantile_interval,
    ratio_interval,
    sign_tail,
)
from jaxquant.quality.report import (
    ECE_BINS,
    Divergence,
    Flips,
    Group,
    MarginBin,
    Report,
    Scores,
)
from jaxquant.stats import check_confidence_level, renamed

# With more classes than this the labels are tokens, and are no groups unless asked for.
MOST_CLASSES_AS_GROUPS = 1000
# Shares of the examples by rising margin: fine where quantization decides, coarse where it cannot.
MARGIN_EDGES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)


@renamed("level", "confidence_level")
def compare(
    reference_logits: jt.Float[jax.Array | np.ndarray, "*batch classes"],
    logits: jt.Float[jax.Array | np.ndarray, "*batch classes"],
    labels: jt.Integer[jax.Array | np.ndarray, "*batch"],
    groups: jt.Shaped[Any, "*batch"] | None = None,
    *,
    mask: jt.Bool[jax.Array | np.ndarray, "*batch"] | None = None,
    clusters: jt.Integer[jax.Array | np.ndarray, "*batch"] | None = None,
    confidence_level: float = 0.9,
) -> Report:
    """Compares a quantized model with its reference on the same labelled examples.

    For more batches than fit at once, `per_example` on each, `Examples.concatenate`, and `summarize`.

    Args:
        reference_logits: float[..., n_classes] of the reference.
        logits: of the quantized model, on the same examples.
        labels: the right classes, or next tokens.
        groups: names by example; by default the labels, up to 1000 classes.
        mask: False where an example does not count, such as padding.
        clusters: integers that correlated examples share; by default the first of several leading axes.
        confidence_level: of the intervals, two-sided.

    Returns:
        A `Report`.

    Raises:
        ValueError: as `per_example` and `summarize`.

    Sources: flips, Dutta et al. 2024, "Accuracy is Not All You Need"; McNemar 1947; intervals, see
    `jaxquant.quality.intervals`.

    >>> import jax.numpy as jnp
    >>> reference = jax.random.normal(jax.random.key(0), (4000, 3))
    >>> report = compare(reference, reference.round(1), jnp.argmax(reference, axis=-1))
    >>> report.flips.gained, report.agreement.estimate > 0.95
    (0, True)
    """
    examples = per_example(reference_logits, logits, labels, groups, mask=mask, clusters=clusters)
    return summarize(examples, confidence_level=confidence_level)


@renamed("level", "confidence_level")
def summarize(examples: Examples, groups: Any = None, *, confidence_level: float = 0.9) -> Report:
    """Returns the report of examples' figures.

    Args:
        examples: from `per_example`, perhaps concatenated.
        groups: [n] names that replace those in `examples`.
        confidence_level: of the intervals, two-sided; between 0 and 1.

    Raises:
        ValueError: no `Examples` or none in them, groups of another length or of several types,
            or a level outside (0, 1).

    >>> logits = np.eye(3, dtype=np.float32)
    >>> summarize(per_example(logits, logits, np.arange(3))).kl.maximum
    0.0
    """
    if not isinstance(examples, Examples):
        raise ValueError(
            f"summarize takes the Examples of per_example; got {type(examples).__name__}"
        )
    if not len(examples):
        raise ValueError("there are no examples to summarize")
    check_confidence_level(confidence_level)
    if groups is not None:
        groups = as_array("groups", groups)
        if groups.shape != (len(examples),):
            raise ValueError(f"groups have shape {(len(examples),)}; got {groups.shape}")
        examples = dataclasses.replace(examples, groups=groups)
    clusters = None
    if examples.clusters is not None:
        clusters = np.unique(examples.clusters, return_inverse=True)[1].reshape(-1)
    return _summarize(examples, clusters, confidence_level)


def _summarize(examples: Examples, clusters: np.ndarray | None, confidence_level: float) -> Report:
    after = (examples.prediction == examples.label).astype(np.float64)
    before = (examples.reference_prediction == examples.label).astype(np.float64)
    covariance = examples.covariance.astype(np.float64)
    variance = examples.variance.astype(np.float64)
    lost, gained = int(np.sum(before > after)), int(np.sum(after > before))
    same = (examples.prediction == examples.reference_prediction).astype(np.float64)
    nll_change = examples.nll.astype(np.float64) - examples.reference_nll
    return Report(
        confidence_level=confidence_level,
        n=len(examples),
        n_classes=examples.n_classes,
        n_clusters=None if clusters is None else int(clusters.max()) + 1,
        reference=_scores(
            before, examples.reference_nll, examples.reference_brier, examples.reference_confidence
        ),
        quantized=_scores(after, examples.nll, examples.brier, examples.confidence),
        accuracy_difference=paired_difference(after, before, clusters, confidence_level),
        retained_accuracy=paired_ratio(after, before, clusters, confidence_level),
        flips=Flips(lost, gained, (lost + gained) / len(examples), *mcnemar(lost, gained)),
        agreement=proportion(same, clusters, confidence_level),
        kl=_divergence(examples.kl.astype(np.float64), clusters, confidence_level),
        log_perplexity_ratio=mean_interval(nll_change, clusters, confidence_level),
        logit_gain=ratio_interval(covariance, variance, clusters, confidence_level)
        if variance.sum() > 0
        else None,
        groups=_groups(examples, after, before, clusters, confidence_level),
        groups_given=examples.groups is not None,
        margins=_margins(examples.margin, same, after, before),
    )


def _scores(
    correct: np.ndarray, nll: np.ndarray, brier: np.ndarray, confidence: np.ndarray
) -> Scores:
    return Scores(
        accuracy=float(correct.mean()),
        nll=float(nll.mean(dtype=np.float64)),
        brier=float(brier.mean(dtype=np.float64)),
        ece=calibration_error(confidence, correct),
    )


def calibration_error(
    confidence: jt.Float[np.ndarray, " n"], correct: jt.Float[np.ndarray, " n"]
) -> float:
    """Returns expected calibration error over 15 bins of equal width, each open below and closed above.

    ECE = Σ_b n_b/n · |accuracy_b − confidence_b|.  Source: Guo et al. 2017, section 2.

    >>> calibration_error(np.array([0.75, 0.75, 0.75, 0.75]), np.array([1.0, 1.0, 1.0, 0.0]))
    0.0
    """
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gaps = np.bincount(bins, correct - confidence.astype(np.float64), ECE_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def _divergence(kl: np.ndarray, clusters: np.ndarray | None, confidence_level: float) -> Divergence:
    return Divergence(
        mean=mean_interval(kl, clusters, confidence_level),
        median=float(np.median(kl)),
        p99=quantile_interval(kl, 0.99, clusters, confidence_level),
        p999=float(np.quantile(kl, 0.999)),
        maximum=float(kl.max()),
    )


def _groups(
    examples: Examples,
    after: np.ndarray,
    before: np.ndarray,
    clusters: np.ndarray | None,
    confidence_level: float,
) -> tuple[Group, ...]:
    names = examples.groups
    if names is None:
        if examples.n_classes > MOST_CLASSES_AS_GROUPS:
            return ()
        names = examples.label
    try:
        unique, index = np.unique(names, return_inverse=True)
    except TypeError:
        kinds = ", ".join(sorted({type(name).__name__ for name in names}))
        raise ValueError(f"groups are strings or integers, one kind for all; got {kinds}") from None
    order = np.argsort(index.reshape(-1), kind="stable")
    members = np.split(order, np.cumsum(np.bincount(index.reshape(-1)))[:-1])
    simultaneous = 1 - (1 - confidence_level) / len(unique)
    groups, p_values = [], []
    for name, rows in zip(unique, members, strict=True):
        a, b = after[rows], before[rows]
        ids = None if clusters is None else np.unique(clusters[rows], return_inverse=True)[1]
        change = paired_difference(a, b, ids, simultaneous)
        p_values.append(_loss_p_value(a, b, ids, change))
        groups.append(Group(str(name), len(rows), float(b.mean()), float(a.mean()), change, 1.0))
    groups = [
        dataclasses.replace(group, p_value=p)
        for group, p in zip(groups, holm(p_values), strict=True)
    ]
    return tuple(sorted(groups, key=lambda group: (group.change.estimate, group.p_value)))


def _loss_p_value(
    after: np.ndarray, before: np.ndarray, clusters: np.ndarray | None, change: Interval
) -> float:
    """Returns one-sided p of accuracy lost: exact for independent examples."""
    lost, gained = int(np.sum(before > after)), int(np.sum(after > before))
    if clusters is None:
        return sign_tail(lost, lost + gained)
    if math.isinf(change.se):
        return 1.0
    middle = (change.low + change.high) / 2
    return float(special.stdtr(int(clusters.max()) + 2, middle / change.se))


def _margins(
    margin: np.ndarray, same: np.ndarray, after: np.ndarray, before: np.ndarray
) -> tuple[MarginBin, ...]:
    """Bins between quantiles of the margin; equal margins share a bin, so one may hold more or nothing."""
    edges = np.quantile(margin, MARGIN_EDGES)
    place = np.searchsorted(edges[1:-1], margin, side="left")
    bins = []
    for i in range(len(edges) - 1):
        rows = place == i
        if rows.any():
            bins.append(
                MarginBin(
                    low=float(edges[i]),
                    high=float(edges[i + 1]),
                    n=int(rows.sum()),
                    changed=int(np.sum(rows & (same == 0))),
                    lost=int(np.sum(rows & (before > after))),
                    gained=int(np.sum(rows & (after > before))),
                )
            )
    return tuple(bins)

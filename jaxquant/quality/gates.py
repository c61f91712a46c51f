"""May this quantized model stand in for its reference?  A verdict with its reasons.

A check passes where its whole interval lies on the good side of the bound, fails where the whole interval
lies on the other, and is inconclusive between: too few examples are never a pass.  The verdict fails if
any check fails, and passes if all pass; since all must, no correction for their number is needed there.
(An interval at 90 % gives each side 5 %.)

What labels tell and what they do not are both asked.  Accuracy and perplexity cannot see answers that
change without turning wrong; the KL divergence ranks by volume of disagreement and cannot order candidates
near the reference (arXiv 2606.19558).
"""

import dataclasses
import math
from typing import Any, Literal

from jaxquant.artifacts.plain import plain
from jaxquant.quality.embeddings import EmbeddingReport
from jaxquant.quality.intervals import Interval
from jaxquant.quality.report import Group, Report
from jaxquant.quality.weights import WeightReport
from jaxquant.stats import critical

Status = Literal["pass", "fail", "inconclusive"]


@dataclasses.dataclass(frozen=True)
class Tier:
    """Bounds on what may be lost.  A tier of one's own: ``dataclasses.replace(TIERS["99"], ...)``.

    Attributes:
        name: as verdicts show it.
        retained_accuracy: at least this share of the reference's accuracy (the MLPerf tiers).
        log_perplexity_ratio: ln(PPL/PPL_ref) at most, nats.
        kl_mean: mean KL at most, nats: the rise of NLL if the reference itself wrote the labels.
        kl_p99: 99 % quantile of KL at most, nats.
        agreement: the same top class at least this often.
        logit_gain: |gain − 1| at most.
        group_loss: accuracy that any group may lose, as a share of its examples.
        over_baseline: divergence at most this many times that of a trusted quantization.
        distance_mean, distance_p99: of embeddings, 1 − cos between twins at most.
        spearman_loss: correlation with people's scores that may be lost.
        weight_gain: |gain − 1| of any layer's stored weights at most.
    """

    name: str
    retained_accuracy: float
    log_perplexity_ratio: float
    kl_mean: float
    kl_p99: float
    agreement: float
    logit_gain: float
    group_loss: float
    over_baseline: float
    distance_mean: float
    distance_p99: float
    spearman_loss: float
    weight_gain: float


# −ln 0.99 and −ln 0.999 bound perplexity and, read as the reference's own labels, the mean KL.  Between
# KL and disagreement llama.cpp's tables of one 8B model have 1 − agreement ≈ 0.5·√KL (Q8_0 0.00024, 0.78 %;
# Q5_K_M 0.0047, 3.45 %; Q3_K_M 0.051, 10.4 %), which gives the bounds on agreement: Q5_K_M lies within "99",
# Q8_0 within "99.9", Q3_K_M in neither.  The bounds on tails, groups, gain and embeddings are choices.
TIERS: dict[str, Tier] = {
    "99": Tier(
        name="99",
        retained_accuracy=0.99,
        log_perplexity_ratio=0.01,
        kl_mean=0.01,
        kl_p99=0.2,
        agreement=0.95,
        logit_gain=0.02,
        group_loss=0.05,
        over_baseline=2.0,
        distance_mean=0.01,
        distance_p99=0.03,
        spearman_loss=0.01,
        weight_gain=0.05,
    ),
    "99.9": Tier(
        name="99.9",
        retained_accuracy=0.999,
        log_perplexity_ratio=0.001,
        kl_mean=0.001,
        kl_p99=0.02,
        agreement=0.984,
        logit_gain=0.005,
        group_loss=0.02,
        over_baseline=2.0,
        distance_mean=0.001,
        distance_p99=0.003,
        spearman_loss=0.001,
        weight_gain=0.02,
    ),
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One bound: its name, how it came out, and a sentence with figure, interval and bound."""

    name: str
    status: Status
    reason: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The decision of `gate`.  True only for a pass.

    Attributes:
        status: "pass", "fail" or "inconclusive".
        tier: the tier's name.
        checks: those that failed first, then the inconclusive.
    """

    status: Status
    tier: str
    checks: tuple[Check, ...]

    def __post_init__(self):
        if self.status not in ("pass", "fail", "inconclusive"):
            raise ValueError(f"status is 'pass', 'fail' or 'inconclusive'; got {self.status!r}")

    @property
    def reasons(self) -> tuple[str, ...]:
        """A sentence for each check, those that failed first."""
        return tuple(check.reason for check in self.checks)

    def __bool__(self) -> bool:
        return self.status == "pass"

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as JSON has them."""
        return plain(self) | {"reasons": list(self.reasons)}

    def __str__(self) -> str:
        lines = [f"{self.status} at tier {self.tier}"]
        return "\n".join(lines + [f"  {c.status:13}{c.reason}" for c in self.checks])


def gate(
    report: Report | EmbeddingReport,
    tier: str | Tier = "99",
    *,
    baseline: Report | EmbeddingReport | None = None,
    weights: WeightReport | None = None,
) -> Verdict:
    """Decides whether a quantized model retains enough of its reference.

    Args:
        report: from `compare`, `summarize` or `compare_embeddings`.
        tier: "99", "99.9" or a `Tier`.
        baseline: the report of a trusted quantization at the same precision, on the same examples.  The
            divergence is then also bounded by a multiple of its divergence, which tells a mistake from
            the rounding that the precision entails, at any precision.
        weights: from `compare_weights`.  A layer whose stored weights are all too large or too small is then
            a failure of its own.  Without either, a mistake whose damage lies within the tier (a scale of
            one layer off by a tenth, often) is none.

    Returns:
        A `Verdict`.

    Raises:
        ValueError: an unknown tier, or a baseline of another kind or on other examples.

    >>> import numpy as np
    >>> from jaxquant.quality.comparison import compare
    >>> logits = np.random.default_rng(0).normal(size=(8000, 5))
    >>> labels = logits.argmax(axis=-1)
    >>> gate(compare(logits, logits, labels), "99.9").status
    'pass'
    >>> gate(compare(logits[:50], logits[:50], labels[:50]), "99.9").status
    'inconclusive'
    """
    if isinstance(tier, str):
        if tier not in TIERS:
            raise ValueError(
                f"tier is one of {', '.join(map(repr, TIERS))} or a Tier; got {tier!r}"
            )
        tier = TIERS[tier]
    if not isinstance(tier, Tier) or not isinstance(report, Report | EmbeddingReport):
        raise ValueError(
            "gate takes a Report or an EmbeddingReport, and a tier; got"
            f" {type(report).__name__} and {type(tier).__name__}"
        )
    checks = (
        _model_checks(report, tier) if isinstance(report, Report) else _twin_checks(report, tier)
    )
    if baseline is not None:
        checks.append(_against_baseline(report, baseline, tier))
    if weights is not None:
        checks.append(_weights_check(weights, tier))
    order: tuple[Status, ...] = ("fail", "inconclusive", "pass")
    checks.sort(key=lambda check: order.index(check.status))
    return Verdict(checks[0].status, tier.name, tuple(checks))


def _model_checks(report: Report, tier: Tier) -> list[Check]:
    n, retained, gain = report.n, report.retained_accuracy, report.logit_gain
    perplexity = report.log_perplexity_ratio
    checks = [
        _within("log-perplexity ratio", perplexity, n, ".2e", at_most=tier.log_perplexity_ratio),
        _within("mean KL", report.kl.mean, n, ".2e", at_most=tier.kl_mean),
        _within("KL 99 % quantile", report.kl.p99, n, ".2e", at_most=tier.kl_p99),
        _within("same top class", report.agreement, n, ".4f", at_least=tier.agreement),
    ]  # fmt: skip
    if retained is None:
        reason = "Retained accuracy is undefined: the reference is never right."
        checks.insert(0, Check("retained accuracy", "inconclusive", reason))
    else:
        bound = tier.retained_accuracy
        checks.insert(0, _within("retained accuracy", retained, n, ".4f", at_least=bound))
    if gain is not None:
        low, high = 1 - tier.logit_gain, 1 + tier.logit_gain
        checks.append(_within("logit gain", gain, n, ".4f", at_least=low, at_most=high))
    if report.groups:
        checks.append(_worst_group(report, tier))
    return checks


def _twin_checks(report: EmbeddingReport, tier: Tier) -> list[Check]:
    n = report.n
    checks = [
        _within("1 − cosine of twins, mean", report.distance, n, ".2e", at_most=tier.distance_mean),
        _within("1 − cosine, 99 % quantile", report.distance_p99, n, ".2e", at_most=tier.distance_p99),
    ]  # fmt: skip
    if report.pairs and report.judgments:
        change, bound = report.judgments.spearman_difference, -tier.spearman_loss
        name = "change of Spearman's correlation with scores"
        checks.append(_within(name, change, report.pairs.n, "+.4f", at_least=bound))
    return checks


def _weights_check(weights: WeightReport, tier: Tier) -> Check:
    """Judges a layer by all of its weights, so that nothing is uncertain."""
    if not isinstance(weights, WeightReport):
        raise ValueError(f"weights is a WeightReport; got {type(weights).__name__}")
    worst, bound = weights.worst, tier.weight_gain
    status: Status = "pass" if abs(worst.gain - 1) <= bound else "fail"
    return Check(
        "weights' gain",
        status,
        f"The stored weights of {worst.path} are {worst.gain:.4f} times the model's, to be within"
        f" {bound:g} of 1; the worst of {len(weights.rows):,} layers.",
    )


def _within(
    name: str,
    interval: Interval,
    n: int,
    spec: str,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> Check:
    """Returns whether the interval lies within the bounds, outside, or across one."""
    status: Status = "inconclusive"
    if interval.low >= at_least and interval.high <= at_most:
        status = "pass"
    elif interval.high < at_least or interval.low > at_most:
        status = "fail"
    bounds = [
        f"{word} {bound:{spec}}"
        for word, bound in (("at least", at_least), ("at most", at_most))
        if math.isfinite(bound)
    ]
    hint = ""
    if status == "inconclusive":
        crossed = at_least if interval.low < at_least else at_most
        hint = _examples_needed(interval, crossed, n)
    shown = name[0].upper() + name[1:]
    return Check(name, status, f"{shown} is {interval:{spec}}, to be {' and '.join(bounds)}{hint}.")


def _examples_needed(interval: Interval, bound: float, n: int) -> str:
    """Returns how many examples would decide if the estimate holds: widths shrink as 1/√n."""
    gap = abs(interval.estimate - bound)
    side = interval.low if bound < interval.estimate else interval.high
    half = abs(side - interval.estimate)
    if not (gap > 0 and math.isfinite(half)):
        return f"; {n:,} examples do not decide"
    if (needed := n * min(half / gap, 1e9) ** 2) > 1e9:
        return f"; {n:,} examples do not decide, and a billion would not"
    digits = 10 ** max(0, math.floor(math.log10(needed)) - 1)
    return f"; {n:,} examples do not decide, about {math.ceil(needed / digits) * digits:,} would"


def _worst_group(report: Report, tier: Tier) -> Check:
    """Fails where a group evidently lost more than it may.

    A group is large enough to pass if it would do so without any flip.  Smaller ones can fail; that
    they do not is no evidence, which only matters where groups were asked for.
    """
    level = 1 - (1 - report.confidence_level) / len(report.groups)

    def judged(group: Group) -> bool:
        return critical(level, group.n + 1) * math.sqrt(2) / (group.n + 2) <= tier.group_loss

    large = [group for group in report.groups if judged(group)]
    failed = [group for group in report.groups if group.change.high < -tier.group_loss]
    unsure = [group for group in large if group.change.low < -tier.group_loss]
    status: Status = "fail" if failed else "inconclusive" if unsure else "pass"
    if status == "pass" and report.groups_given and len(large) < len(report.groups):
        status = "inconclusive"
    named = failed or unsure or report.groups[:1]
    shown = named[0]
    note = f" of {len(report.groups):,} groups"
    if len(named) > 1:
        note += f", as others do: {', '.join(group.name for group in named[1:6])}"
    if len(large) < len(report.groups):
        note += f"; {len(report.groups) - len(large):,} are too small to be cleared"
    if shown in report.silent_regressions:
        note += "; the overall accuracy does not show it"
    return Check(
        "worst group",
        status,
        f"Accuracy of group {shown.name} changed by {shown.change:+.4f} (p = {shown.p_value:.2g}, adjusted),"
        f" to be at least {-tier.group_loss:+.4f}; the worst{note}.",
    )


def _against_baseline(
    report: Report | EmbeddingReport, baseline: Report | EmbeddingReport, tier: Tier
) -> Check:
    """Returns the ratio of divergences; their errors are taken as independent, which is conservative."""
    if isinstance(report, Report) and isinstance(baseline, Report):
        if baseline.n != report.n or not math.isclose(
            baseline.reference.nll, report.reference.nll, rel_tol=1e-4, abs_tol=1e-6
        ):
            raise ValueError(
                "the baseline's report is on the same examples and reference; got"
                f" {baseline.n:,} examples with a reference NLL of {baseline.reference.nll:.4f}, and"
                f" {report.n:,} with {report.reference.nll:.4f}"
            )
        name, above, below = "mean KL", report.kl.mean, baseline.kl.mean
    elif isinstance(report, EmbeddingReport) and isinstance(baseline, EmbeddingReport):
        if (baseline.n, baseline.dimensions) != (report.n, report.dimensions):
            raise ValueError(
                "the baseline's report is on the same embeddings; got"
                f" {(baseline.n, baseline.dimensions)} and {(report.n, report.dimensions)}"
            )
        name, above, below = "1 − cosine", report.distance, baseline.distance
    else:
        raise ValueError(
            f"the baseline is of the report's kind; got {type(baseline).__name__} beside"
            f" {type(report).__name__}"
        )
    if not below.estimate > 0:
        raise ValueError(
            "the baseline does not differ from its reference, so nothing can be related to it"
        )
    ratio = above.estimate / below.estimate
    error = math.hypot(below.se / below.estimate, above.se / above.estimate if ratio > 0 else 0.0)
    interval = Interval(ratio, math.inf, 0.0, math.inf)
    if (width := critical(report.confidence_level) * error) < 100:  # beyond, the limits say nothing
        factor = math.exp(width)
        interval = Interval(ratio, ratio * error, ratio / factor, ratio * factor)
    return _within(
        f"{name} over the baseline's", interval, report.n, ".3g", at_most=tier.over_baseline
    )

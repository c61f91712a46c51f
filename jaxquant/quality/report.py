"""The paired report of a model beside its quantized twin: what its figures mean, and how they are printed.

`jaxquant.quality.comparison` computes them.
"""

import dataclasses
import math
from typing import Any

from jaxquant.artifacts.plain import plain
from jaxquant.quality.intervals import Interval
from jaxquant.stats import renamed

ECE_BINS = 15


@dataclasses.dataclass(frozen=True)
class Scores:
    """One model's own figures.

    Attributes:
        accuracy: the share of right predictions.
        nll: the mean of −log p(label), nats; its exponential is the perplexity.
        brier: the mean of Σ_k (p_k − [k = label])², from 0 to 2.
        ece: expected calibration error, Σ_b n_b/n·|accuracy_b − confidence_b| over 15 bins of equal
            width of the confidence (Guo et al. 2017).
    """

    accuracy: float
    nll: float
    brier: float
    ece: float


@dataclasses.dataclass(frozen=True)
class Flips:
    """Examples whose correctness changed, and McNemar's test that both directions are as likely.

    Attributes:
        lost: correct → incorrect.
        gained: incorrect → correct.
        rate: (lost + gained)/n.
        chi2: (|lost − gained| − 1)²/(lost + gained).
        p_value: two-sided; takes examples as independent, whatever the clusters.
        exact: whether the p-value is the exact binomial one (under 25 flips) or that of χ².
    """

    lost: int
    gained: int
    rate: float
    chi2: float
    p_value: float
    exact: bool


@dataclasses.dataclass(frozen=True)
class Divergence:
    """KL(reference ‖ quantized) over examples, in nats: its mean and its tail."""

    mean: Interval
    median: float
    p99: Interval
    p999: float
    maximum: float


@dataclasses.dataclass(frozen=True)
class Group:
    """Accuracy of both models within a group.

    Attributes:
        change: the quantized model's accuracy less the reference's, with an interval that holds for all
            groups at once (Bonferroni).
        p_value: one-sided, of a loss, adjusted for looking at all groups (Holm); the exact sign test of
            the flips, or Student's where examples are clustered.
    """

    name: str
    n: int
    reference_accuracy: float
    accuracy: float
    change: Interval
    p_value: float


@dataclasses.dataclass(frozen=True)
class MarginBin:
    """Flips among examples whose reference margin (first logit less second) is in (low, high]."""

    low: float
    high: float
    n: int
    changed: int
    lost: int
    gained: int


@renamed("level", "confidence_level")
@dataclasses.dataclass(frozen=True)
class Report:
    """What `summarize` found; print it, or take `to_dict()`.

    Attributes:
        confidence_level: of the intervals, two-sided.
        n, n_classes: examples and logits.
        n_clusters: how many clusters standard errors rest on, or None where examples are independent.
        reference, quantized: each model's own figures.
        accuracy_difference: quantized less reference.
        retained_accuracy: quantized over reference; None where the reference is never right.
        flips: both directions.
        agreement: how often both predict the same class, right or wrong.
        kl: KL(reference ‖ quantized).
        log_perplexity_ratio: ln(PPL_quantized/PPL_reference), the mean of paired differences of NLL.
        logit_gain: the slope of the quantized logits on the reference's, weighted by the reference's
            probabilities.  Rounding leaves it at 1, a wrong scale moves it.  None where the reference's
            logits do not vary.
        groups: by loss, the worst first; `groups_given` says whether they were asked for.
        margins: bins of rising margin.
    """

    confidence_level: float
    n: int
    n_classes: int
    n_clusters: int | None
    reference: Scores
    quantized: Scores
    accuracy_difference: Interval
    retained_accuracy: Interval | None
    flips: Flips
    agreement: Interval
    kl: Divergence
    log_perplexity_ratio: Interval
    logit_gain: Interval | None
    groups: tuple[Group, ...]
    groups_given: bool
    margins: tuple[MarginBin, ...]

    @property
    def relative_perplexity(self) -> float:
        """PPL_quantized/PPL_reference."""
        return math.exp(min(self.log_perplexity_ratio.estimate, 700.0))

    @property
    def worst_group(self) -> Group | None:
        """The group that lost most accuracy."""
        return self.groups[0] if self.groups else None

    @property
    def regressions(self) -> tuple[Group, ...]:
        """Groups that lost significantly: adjusted one-sided p below (1 − confidence_level)/2."""
        return tuple(g for g in self.groups if g.p_value < (1 - self.confidence_level) / 2)

    @property
    def silent_regressions(self) -> tuple[Group, ...]:
        """Regressions that the overall accuracy does not show: its interval reaches zero or more."""
        return self.regressions if self.accuracy_difference.high >= 0 else ()

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON has them, None where a figure is not finite."""
        return plain(self) | {
            "relative_perplexity": plain(self.relative_perplexity),
            "silent_regressions": [group.name for group in self.silent_regressions],
        }

    def __str__(self) -> str:
        return _table(self)


def _table(report: Report) -> str:
    clustered = "" if report.n_clusters is None else f" in {report.n_clusters:,} clusters"
    reference, quantized = report.reference, report.quantized
    rows = [
        ("accuracy", f"{reference.accuracy:.4f}", f"{quantized.accuracy:.4f}"),
        ("NLL, nats", f"{reference.nll:.4f}", f"{quantized.nll:.4f}"),
        ("Brier score", f"{reference.brier:.4f}", f"{quantized.brier:.4f}"),
        (f"ECE, {ECE_BINS} bins", f"{reference.ece:.4f}", f"{quantized.ece:.4f}"),
    ]
    lines = [
        f"{report.n:,} examples{clustered}, {report.n_classes:,} classes;"
        f" intervals at {100 * report.confidence_level:g} %",
        "",
        f"{'':24}{'reference':>12}{'quantized':>12}",
        *(f"{name:24}{a:>12}{b:>12}" for name, a, b in rows),
        "",
        *_paired_lines(report),
        *_group_lines(report),
        "",
        "margin of the reference      examples   changed      lost    gained",
        *(
            f"{f'{b.low:.3g} to {b.high:.3g}':27}{b.n:10,}{b.changed:10,}{b.lost:10,}{b.gained:10,}"
            for b in report.margins
        ),
    ]
    return "\n".join(lines)


def _paired_lines(report: Report) -> list[str]:
    flips, kl = report.flips, report.kl
    test = "exact test" if flips.exact else f"χ² {flips.chi2:.2f}"
    retained, gain = report.retained_accuracy, report.logit_gain
    rows = [
        ("accuracy difference", f"{report.accuracy_difference:+.4f}"),
        ("retained accuracy", "–" if retained is None else f"{retained:.4f}"),
        (
            "flips",
            f"{flips.lost:,} lost, {flips.gained:,} gained, {100 * flips.rate:.2f} % of examples",
        ),
        ("McNemar", f"{test}, p = {flips.p_value:.3g}"),
        ("same top class", f"{report.agreement:.4f}"),
        ("ln(PPL/PPL reference)", f"{report.log_perplexity_ratio:+.2e}"),
        ("KL mean, nats", f"{kl.mean:.2e}"),
        ("KL 99 %", f"{kl.p99:.2e}"),
        ("KL median, 99.9 %, max", f"{kl.median:.2e}, {kl.p999:.2e}, {kl.maximum:.2e}"),
        ("logit gain", "–" if gain is None else f"{gain:.4f}"),
    ]
    return [f"{name:24}{value}" for name, value in rows]


def _group_lines(report: Report, most: int = 5) -> list[str]:
    if not report.groups:
        return []
    silent = report.silent_regressions
    width = max(8, *(len(group.name) for group in report.groups[:most]))
    lines = [
        "",
        f"worst of {len(report.groups):,} groups; intervals hold for all at once, p adjusted (Holm)",
        *(
            f"{g.name:{width}}  n {g.n:<7,} {g.reference_accuracy:.4f} → {g.accuracy:.4f}"
            f"  {g.change:+.4f}  p = {g.p_value:.2g}"
            for g in report.groups[:most]
        ),
    ]
    if silent:
        lines.append(f"silent regressions, not seen overall: {', '.join(g.name for g in silent)}")
    return lines

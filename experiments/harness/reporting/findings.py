"""Findings as data, and how they are written: on the page, on a terminal, and as JSON.

A study says what it asked, what the answer is, and with which interval.  The words come from here alone, so
that all studies say "agrees with" and "unresolved" by one rule.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from experiments.harness.reporting.statistics import is_discovery
from experiments.harness.reporting.values import bounds, is_missing

UNRESOLVED = "unresolved"


@dataclasses.dataclass(frozen=True)
class Published:
    """A value that others report, or a range of values.

    Attributes:
        low: the value, or the lower end of the range.
        high: the value, or the upper end.
        source: as in "Kumar et al. 2024".
        above: words for an interval that lies above, as in "steeper than".
        below: words for one that lies below.
        tolerance: how far an interval may reach beyond a range and still agree with it.
        kind: what it is, as in "published" or "known".
    """

    low: float
    high: float
    source: str
    above: str = "above"
    below: str = "below"
    tolerance: float = 0.0
    kind: str = "published"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One answer to one question.

    Attributes:
        question: ends with a question mark; findings that share it are shown together.
        quantity: what was measured, and where.
        answer: in a word or two; `UNRESOLVED` where the runs cannot say.
        estimate: None where there is none, and `note` says why.
        low: the interval's lower end; None without an interval.
        high: its upper end.
        unit: of the estimate.
        form: how its numbers are formatted.
        null: the value of no effect; None where there is no such value.
        published: what it stands beside.
        least_effect: the smallest effect whose interval would exclude `null`, with as many runs.
        note: what to know beside the number, such as a parameter that the runs do not identify.
        q_published: of the difference from `published`, corrected for many comparisons; one that does not
            reject leaves the difference unresolved.  None where it is not corrected.
    """

    question: str
    quantity: str
    answer: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    form: str = ".2f"
    null: float | None = 0.0
    published: Published | None = None
    least_effect: float | None = None
    note: str = ""
    q_published: float | None = None

    @property
    def against(self) -> str:
        """Beside the published value: "above", "below", "agrees", `UNRESOLVED`, or "" where there is none.

        An interval that excludes the value lies above or below it.  One that holds both the value and that
        of no effect says nothing, and neither does one that holds a part of a published range, nor one that
        excludes the value by no more than many comparisons would.
        """
        p = self.published
        if p is None:
            return ""
        if self.low is None or self.high is None:
            return UNRESOLVED
        if self.low > p.high or self.high < p.low:
            if self.q_published is not None and not is_discovery(self.q_published):
                return UNRESOLVED
            return "above" if self.low > p.high else "below"
        if p.low < p.high:
            is_inside = self.low >= p.low - p.tolerance and self.high <= p.high + p.tolerance
            return "agrees" if is_inside else UNRESOLVED
        holds_null = self.null is not None and self.low <= self.null <= self.high
        return UNRESOLVED if holds_null else "agrees"

    def value_text(self) -> str:
        """The estimate with its interval and unit."""
        if is_missing(self.estimate):
            return "no estimate"
        return f"{bounds(self.estimate, self.low, self.high, self.form)} {self.unit}".rstrip()

    def against_text(self) -> str:
        """How it stands to the published value, in words."""
        p = self.published
        if p is None:
            return ""
        value = f"{p.low:g}" if p.low == p.high else f"{p.low:g} to {p.high:g}"
        words = {
            "above": p.above,
            "below": p.below,
            "agrees": "agrees with",
            UNRESOLVED: "unresolved against",
        }
        return f"{words[self.against]} the {p.kind} {value} ({p.source})"

    def power_text(self) -> str:
        """What the seeds could have shown, where nothing is resolved."""
        if self.answer != UNRESOLVED or self.least_effect is None:
            return ""
        least = f"{self.least_effect:{self.form.lstrip('+')}} {self.unit}".rstrip()
        return f"the least effect that these runs could show is {least}"

    def remarks(self) -> list[str]:
        """All that stands beside the number."""
        return [text for text in (self.against_text(), self.power_text(), self.note) if text]

    def to_json(self) -> dict:
        """Its fields as JSON values, and how it stands to the published value."""
        return dataclasses.asdict(self) | {"against": self.against}


def from_mean(
    question: str, quantity: str, row: dict, positive: str, negative: str, **options
) -> Finding:
    """A finding about a mean over seeds: ``row`` has "mean", "gap" or "change", and "low" and "high"."""
    value = next(row[k] for k in ("mean", "gap", "change") if k in row)
    low, high = (None if is_missing(row[k]) else row[k] for k in ("low", "high"))
    answer = UNRESOLVED
    if low is not None and high is not None:
        answer = positive if low > 0 else negative if high < 0 else UNRESOLVED
    least = None if low is None or high is None else (high - low) / 2
    return Finding(question, quantity, answer, value, low, high, least_effect=least, **options)


def grouped(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """Findings by question, in the order in which questions come up."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.question, []).append(finding)
    return groups


def headline(group: Sequence[Finding]) -> str:
    """The answer to a question over all its findings.

    >>> headline([Finding("Q?", "a", "yes"), Finding("Q?", "b", "unresolved")])
    'yes in 1 of 2, unresolved in 1 of 2'
    """
    counts: dict[str, int] = {}
    for finding in group:
        counts[finding.answer] = counts.get(finding.answer, 0) + 1
    if len(counts) == 1:
        answer = next(iter(counts))
        return answer if len(group) == 1 else f"{answer} in all {len(group)}"
    return ", ".join(f"{answer} in {n} of {len(group)}" for answer, n in counts.items())


def sentence(finding: Finding) -> str:
    """A finding in one line.

    >>> kumar = Published(0.507, 0.507, "Kumar et al. 2024", "steeper than", "flatter than")
    >>> sentence(Finding("Q?", "21k, cosine", "yes", 0.66, 0.56, 0.76, published=kumar))
    '21k, cosine: yes, 0.66 [0.56, 0.76]; steeper than the published 0.507 (Kumar et al. 2024)'
    """
    value = "" if is_missing(finding.estimate) else f", {finding.value_text()}"
    return "; ".join([f"{finding.quantity}: {finding.answer}{value}", *finding.remarks()])


def to_text(findings: Iterable[Finding], status: Sequence[str] = ()) -> str:
    """All findings for a terminal."""
    lines = list(status)
    for question, group in grouped(findings).items():
        lines += [f"{question} {capitalized(headline(group))}."]
        lines += [f"  {sentence(finding)}" for finding in group]
    return "\n".join(lines)


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def trial_status(trials: dict) -> list[str]:
    """What of a grid is unfinished or left out."""
    said = []
    if trials["finished"] < trials["expected"]:
        said.append(f"{trials['finished']} of {trials['expected']} trials are finished.")
    if diverged := trials.get("diverged"):
        names = ", ".join(_named(one) for one in diverged[:6])
        more = f" and {len(diverged) - 6} more" if len(diverged) > 6 else ""
        are = "is" if len(diverged) == 1 else "are"
        said.append(f"{len(diverged)} of them diverged and {are} left out: {names}{more}.")
    return said


def _named(trial: dict) -> str:
    kept = [str(v) for k, v in trial.items() if k not in ("id", "seed", "step")]
    return f"{' '.join(kept)} seed {trial['seed']} at step {trial['step']}"

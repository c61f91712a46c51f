"""Exponents against zero and against the published one: p-values, and q-values where several are tested."""

from collections.abc import Sequence

import pandas as pd

from experiments.harness.reporting.findings import UNRESOLVED, Finding, Published
from experiments.harness.reporting.statistics import corrected, is_discovery, t_test
from experiments.harness.reporting.values import number
from experiments.ptq_overtraining.analysis import KUMAR_EXPONENT

KUMAR = Published(
    round(KUMAR_EXPONENT, 3),
    round(KUMAR_EXPONENT, 3),
    "Kumar et al. 2024",
    "steeper than",
    "flatter than",
)
_NULLS = {"zero": 0.0, "published": KUMAR_EXPONENT}


def p_value(fit: dict, null: float) -> float | None:
    """The two-sided p-value of an exponent of `analysis.fit_exponent`; None where it has no interval."""
    if fit["gamma"] is None or fit["error"] is None:
        return None
    return t_test(fit["gamma"] - null, fit["error"], fit["freedom"])


def tested(rows: Sequence[dict]) -> list[dict]:
    """The rows with p_zero, q_zero, p_published and q_published; all of them are one family.

    Args:
        rows: with what `analysis.fit_exponent` returns.
    """
    found = [dict(row) for row in rows]
    for name, null in _NULLS.items():
        p_values = [p_value(row, null) for row in rows]
        for row, p, q in zip(found, p_values, corrected(p_values), strict=True):
            row |= {f"p_{name}": p, f"q_{name}": q}
    return found


def sign(estimate: float | None, q: float | None, positive: str, negative: str) -> str:
    """The answer to whether an effect is there, where its q-value tells."""
    if estimate is None or not is_discovery(q):
        return UNRESOLVED
    return positive if estimate > 0 else negative


def note(row: dict) -> str:
    """The q-values of a row of `tested`, in words."""
    if row["q_zero"] is None:
        return ""
    return (
        f"q {q_text(row['q_zero'])} against 0, {q_text(row['q_published'])} against the published"
    )


def columns(row: dict) -> dict[str, str]:
    """A row of `tested` as columns of a table."""
    return {
        "p (γ_D = 0)": q_text(row["p_zero"]),
        "q": q_text(row["q_zero"]),
        f"p (γ_D = {KUMAR_EXPONENT:.3f})": q_text(row["p_published"]),
        "q ": q_text(row["q_published"]),
    }


def finding(question: str, quantity: str, row: dict, said: Sequence[str]) -> Finding:
    """Whether an exponent is above zero, beside the published one.

    Args:
        question, quantity: of the finding.
        row: of `tested`.
        said: what to know beside the number.
    """
    notes = [note(row), *said, f"no interval: {row['reason']}" if row["reason"] else ""]
    return Finding(
        question,
        quantity,
        sign(row["gamma"], row["q_zero"], "yes", "no"),
        *(row[k] for k in ("gamma", "low", "high")),
        published=KUMAR,
        q_published=row["q_published"],
        least_effect=None if row["low"] is None else (row["high"] - row["low"]) / 2,
        note="; ".join(filter(None, notes)),
    )


def q_text(value: float | None) -> str:
    """A p- or q-value.

    >>> q_text(0.0421), q_text(2e-5), q_text(None)
    ('0.042', '< 0.001', '—')
    """
    if value is None or pd.isna(value):
        return "—"
    return "< 0.001" if value < _LEAST else number(value, ".2g")


_LEAST = 1e-3

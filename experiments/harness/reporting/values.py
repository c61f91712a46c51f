"""Rows as JSON values, and numbers as text: what every report does with its figures."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd


def rows_of(table: pd.DataFrame) -> list[dict]:
    """Rows as JSON values: NaN becomes null."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(k): v for k, v in row.items()} for row in rows]


def versions_of(records: Iterable[dict]) -> list[dict]:
    """The distinct versions that records were made with."""
    return [dict(v) for v in sorted({tuple(r["versions"].items()) for r in records})]


def is_missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


def number(value: float | None, form: str = ".3f", unit: str = "") -> str:
    """A number, or a dash for none."""
    return "—" if value is None or math.isnan(value) else f"{value:{form}}{unit}"


def bounds(value: float | None, low: float | None, high: float | None, form: str = ".3g") -> str:
    """A value with its interval, where it has one.

    >>> bounds(0.5, 0.4, 0.6), bounds(0.5, None, None), bounds(None, None, None)
    ('0.5 [0.4, 0.6]', '0.5', '—')
    """
    if value is None or low is None or high is None or math.isnan(low):
        return number(value, form)
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def listed(pairs: Mapping[str, Any]) -> str:
    """Names with their values, in a line."""
    return ", ".join(f"{k} {v}" for k, v in pairs.items())

"""Fitted laws as JSON values and as tables of a report."""

import math

import pandas as pd

from jaxquant import laws

CONFIDENCE = 0.9


def fit_summary(fitted: laws.Fit) -> dict:
    """Returns a fit as JSON values."""
    return {
        "law": fitted.law.name,
        "equation": fitted.law.equation,
        "runs": fitted.runs,
        "r2": fitted.r2,
        "parameters": [
            {"name": name, "value": value, "is_held": _is_held(fitted, name)}
            | dict(zip(("low", "high"), fitted.interval(name, CONFIDENCE), strict=True))
            for name, value in fitted.params.items()
        ],
        "warnings": list(fitted.warnings),
    }


def _is_held(fitted: laws.Fit, name: str) -> bool:
    """Returns whether a bound keeps a parameter where it is, so that its interval says nothing."""
    return any(w.startswith(f"{name} = ") and "sits on its" in w for w in fitted.warnings)


def control_summary(control: laws.Control) -> dict:
    """Returns a control as JSON values."""
    return {
        "gain": control.gain,
        "largest_shuffled": float(control.shuffled.max()),
        "p_value": control.p_value,
        "is_rejected": control.is_rejected,
    }


def control_text(control: dict) -> str:
    """Returns the control's result as a sentence."""
    kept = "is rejected" if control["is_rejected"] else "stays"
    return (
        f"Control: the term of precision gains {control['gain']:.1f} in AICc over Chinchilla's law; with "
        f"bits shuffled among runs, {control['largest_shuffled']:.1f} at most (p = "
        f"{control['p_value']:.2f}): it {kept}."
    )


def laws_table(rows: list[dict]) -> pd.DataFrame:
    """Laws as `laws.Comparison.rows` has them, for reading."""
    shown = []
    for row in rows:
        held = {
            f"R² held out by {k.removeprefix('r2_by_')}": number(v)
            for k, v in row.items()
            if k.startswith("r2_by_")
        }
        head = {"law": row["law"], "parameters": row["parameters"], "R²": number(row["r2"])}
        shown.append(head | held | {"ΔAICc": number(row["delta_aicc"], ".1f")})
    return pd.DataFrame(shown)


def fit_table(fit: dict) -> pd.DataFrame:
    """Returns a fit's parameters with intervals."""
    return pd.DataFrame(
        [{"parameter": p["name"], "value [90 %]": interval(p)} for p in fit["parameters"]]
    )


def number(value: float | None, form: str = ".3f") -> str:
    """Returns a number, or a dash for none."""
    return "—" if value is None or math.isnan(value) else format(value, form)


def interval(row: dict, form: str = ".3g") -> str:
    """Returns a value with its ends, where it has any that say something."""
    if row.get("is_held"):
        return f"{row['value']:{form}}, its bound: not determined"
    if row.get("low") is None or math.isnan(row["low"]):
        return number(row["value"], form)
    return f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"

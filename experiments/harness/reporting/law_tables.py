"""Fitted laws as JSON values and as tables of a report."""

from collections.abc import Collection, Mapping

import pandas as pd

from experiments.harness.reporting.statistics import CONFIDENCE
from experiments.harness.reporting.values import bounds, number
from jaxquant import laws


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


def laws_table(rows: Mapping[str, list[dict]] | list[dict]) -> pd.DataFrame:
    """Laws as `laws.Comparison.rows` has them, for reading: of several sets of runs, by the name of each."""
    groups = rows if isinstance(rows, Mapping) else {"": rows}
    shown = []
    for name, group in groups.items():
        for row in group:
            held = {
                f"R² held out by {k.removeprefix('r2_by_')}": number(v)
                for k, v in row.items()
                if k.startswith("r2_by_")
            }
            head = {"runs of": name} if name else {}
            head |= {"law": row["law"], "parameters": row["parameters"], "R²": number(row["r2"])}
            shown.append(head | held | {"ΔAICc": number(row["delta_aicc"], ".1f")})
    return pd.DataFrame(shown)


def ranking(ranked: laws.Comparison, kept: Collection[str]) -> pd.DataFrame:
    """Returns laws by their criterion, and which of them runs reject: all but those of these names."""
    rows = [
        {
            "law": row["law"],
            "parameters": row["parameters"],
            "R²": number(row["r2"]),
            "ΔAICc": number(row["delta_aicc"], ".1f"),
            "rejected": "no" if row["law"] in kept else "yes",
        }
        for row in ranked.rows
    ]
    return pd.DataFrame(rows)


def fit_table(fits: Mapping[str, dict] | dict) -> pd.DataFrame:
    """A law's parameters with intervals and warnings beside them: a column for each fit of it."""
    fits = {"value [90 %]": fits} if "parameters" in fits else fits
    columns = {
        name: {p["name"]: interval(p) + _mark(fit, p["name"]) for p in fit["parameters"]}
        for name, fit in fits.items()
    }
    names = list(dict.fromkeys(p for column in columns.values() for p in column))
    return pd.DataFrame(
        [{"parameter": p} | {c: column.get(p, "—") for c, column in columns.items()} for p in names]
    )


def _mark(fit: dict, name: str) -> str:
    """What the runs do not tell of a parameter; of one at its bound `interval` says it."""
    said = [w for w in fit["warnings"] if w.startswith((f"{name} = ", f"{name} is "))]
    if any("sits on its" in w for w in said):
        return ""
    ends = [w.rsplit(": ", 1)[-1] for w in said]
    return "".join(f" ({end})" for end in ends)


def other_warnings(fit: dict) -> list[str]:
    """Warnings that concern no parameter."""
    names = [p["name"] for p in fit["parameters"]]
    starts = tuple(f"{n}{joint}" for n in names for joint in (" = ", " is "))
    return [w for w in fit["warnings"] if not w.startswith(starts)]


def interval(row: dict, form: str = ".3g") -> str:
    """Returns a value with its ends, where it has any that say something."""
    if row.get("is_held"):
        return f"{row['value']:{form}}, its bound: not determined"
    return bounds(row["value"], row.get("low"), row.get("high"), form)

"""The findings of the law: growth of gaps, what backward bits cost, the best split."""

import dataclasses
import math

from experiments.gradient_precision import forms
from experiments.harness.reporting import findings as said
from experiments.harness.reporting.findings import UNRESOLVED, Finding
from experiments.harness.reporting.statistics import is_discovery

_GROWS = "Does the gap of few forward or few backward bits grow with training?"
_SHRINKS = "Does it shrink with the model's size?"
_COSTS = "Do few backward bits act like fewer tokens, like fewer parameters, or neither?"
_SPLIT = "Do the best splits of a budget give the backward pass more bits than the forward pass?"
_MEASURED = "Does an uneven split beat the widest even one of no more bits?"
_CLEAR = 6.0  # in AICc: a likelihood ratio of about 20


def findings(rows: list[dict]) -> list[Finding]:
    """Of each grid."""
    found = []
    for row in rows:
        if "gap" in row:
            found += [_exponent(_GROWS, row, x, "D", "yes", "no, it shrinks") for x in forms.PASSES]
            found += [_exponent(_SHRINKS, row, x, "N", "no, it grows", "yes") for x in forms.PASSES]
        else:
            why = f"not fitted: {row['reason']}"
            found.append(Finding(_GROWS, f"γ_D, {row['name']}", UNRESOLVED, note=why))
        found.append(_costs(row))
        found += [_split(row["name"], one) for one in row.get("split", ()) if one["is_inside"]]
        uneven = [one for one in row["measured_split"] if one["best"] != one["even"]]
        found += [_measured(row["name"], one) for one in longest(uneven)]
    return found


def longest(rows: list[dict]) -> list[dict]:
    """The rows of the longest training of each size."""
    most: dict[str, float] = {}
    for row in rows:
        most[row["size"]] = max(most.get(row["size"], 0), row["d_over_n"])
    return [row for row in rows if row["d_over_n"] == most[row["size"]]]


def signed(question: str, row: dict, quantity: str, above: str, below: str, **options) -> Finding:
    """An answer by the sign of a mean, which stands only where it survives the correction for its table."""
    options = {"unit": "nats", "form": "+.4f"} | options
    note = "" if row["q_value"] is None else f"q = {row['q_value']:.2g}"
    made = said.from_mean(question, quantity, row, above, below, note=note, **options)
    if made.answer != UNRESOLVED and not is_discovery(row["q_value"]):
        note = f"{note}, which does not survive the correction for all of these".lstrip(", ")
        return dataclasses.replace(made, answer=UNRESOLVED, note=note)
    return made


def _exponent(question: str, row: dict, x: str, column: str, above: str, below: str) -> Finding:
    own = {p["name"]: p for p in row["gap"]["parameters"]}[f"gamma_{column}_{x}"]
    quantity = f"γ_{column} of the {x} pass, {row['name']}"
    if own["is_held"]:
        note = "it sits at its bound: the runs do not tell it"
        return Finding(question, quantity, UNRESOLVED, own["value"], note=note)
    mean = {"mean": own["value"], "low": own["low"], "high": own["high"]}
    return said.from_mean(question, quantity, mean, above, below, form="+.3f")


def _costs(row: dict) -> Finding:
    """Which law of paired gaps leads, and by how much in AICc."""
    quantity = f"lead of the likeliest law of gaps over the next, in AICc, {row['name']}"
    if "paired" not in row:
        return Finding(_COSTS, quantity, UNRESOLVED, note=f"not fitted: {row['reason']}")
    first, second = row["paired"][:2]
    if second["aicc"] is None or not math.isfinite(second["aicc"]):
        few = (
            f"the pairs are worth {row['independent_pairs']:.0f} independent ones: too few to tell"
        )
        return Finding(_COSTS, quantity, UNRESOLVED, note=few)
    apart = second["aicc"] - first["aicc"]
    notes = [f"R² of the gap {first['r2']:.3f}; next {second['law']}, R² {second['r2']:.3f}"]
    if apart <= _CLEAR:
        notes.insert(0, f"{first['law']} leads, by too little to tell")
    answer = first["law"] if apart > _CLEAR else UNRESOLVED
    return Finding(_COSTS, quantity, answer, apart, form=".1f", null=None, note="; ".join(notes))


def _split(name: str, row: dict) -> Finding:
    """P_backward less the budget: above 0 where the backward pass has more bits than the forward pass."""
    ends = {k: row[k] - row["budget"] for k in ("low", "high")} | {
        "mean": row["backward"] - row["budget"]
    }
    quantity = f"P_backward less {row['budget']:g} mean bits, {row['size']} at D/N {row['d_over_n']}, {name}"
    note = f"best at {row['forward']:.1f} forward, {row['backward']:.1f} backward"
    return said.from_mean(
        _SPLIT, quantity, ends, "more backward", "more forward", unit="bits", form="+.2f", note=note
    )


def _measured(name: str, row: dict) -> Finding:
    quantity = (
        f"{row['best']} over {row['even']}, at most {row['budget']:g} mean bits, {row['size']} at D/N "
        f"{row['d_over_n']}, {name}"
    )
    return signed(_MEASURED, row, quantity, "better", "worse")

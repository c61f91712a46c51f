"""What bits of the state are worth: laws of loss against them, where records have several N and D."""

# pandas' selections are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import pandas as pd

from experiments.harness.reporting.findings import UNRESOLVED, Finding
from experiments.harness.reporting.law_tables import control_summary, fit_summary
from experiments.harness.reporting.statistics import CONFIDENCE
from experiments.harness.training.arms import EXACT, fixed_bits
from jaxquant import laws
from jaxquant.artifacts.plain import plain

BOOTSTRAPS = 200
STARTS = 16


def runs(table: pd.DataFrame) -> pd.DataFrame:
    """Language runs whose two moments have one width that stays: 32 in full precision.

    One schedule, that of most runs: a law of D is of one.
    """
    own = table[table["task"] == "language"] if len(table) else table
    if own.empty:
        return own
    bits = own["arm"].map(lambda arm: 32 if arm == EXACT else fixed_bits(arm))
    own = own.assign(P_state=bits)[bits.notna()]
    return own[own["schedule"] == own["schedule"].mode().iloc[0]] if len(own) else own


def summarize(table: pd.DataFrame) -> dict | None:
    """Whether bits of the state cost N or D or raise E; None of records with one N or one D."""
    own = runs(table)
    if own.empty or own["N"].nunique() < 2 or own["D"].nunique() < 2:
        return None
    try:
        ranked = _ranked(own)
        fits = [
            laws.fit(
                law,
                own,
                bootstraps=BOOTSTRAPS,
                starts=STARTS,
                groups="pair",
                confidence_level=CONFIDENCE,
            )
            for law in _CANDIDATES
        ]
        control = laws.shuffled_bits(_likeliest(ranked), laws.CHINCHILLA, own, starts=STARTS)
        found = {
            "runs": len(own),
            "schedule": own["schedule"].iloc[0],
            "widths": sorted(map(int, own["P_state"].unique())),
            "laws": ranked.rows,
            "fits": [fit_summary(fitted) for fitted in fits],
            "control": control_summary(control),
            "without_narrowest": _without_narrowest(own),
        }
    except ValueError as error:
        return {"runs": len(own), "reason": str(error)}
    return plain(found)


def _ranked(own: pd.DataFrame) -> laws.Comparison:
    candidates = (*_CANDIDATES, laws.CHINCHILLA)
    return laws.compare(candidates, own, held_out=("N", "D", "P_state"), starts=STARTS)


def _without_narrowest(own: pd.DataFrame) -> list[dict] | None:
    """The ranking without the fewest bits, whose cost outweighs all others'; None of too few widths."""
    rest = own[own["P_state"] > own["P_state"].min()]
    return _ranked(rest).rows if rest["P_state"].nunique() > 2 else None


def _likeliest(ranked: laws.Comparison) -> laws.Law:
    """Of the laws of the state's bits."""
    return next(f.law for f in ranked.fits if "P_state" in f.law.columns)


_QUESTION = "Do few bits of the state act like fewer parameters, like fewer tokens, or neither?"


def finding(found: dict) -> Finding:
    """Which law leads, by how much in AICc, and whether it leads without the fewest bits too."""
    quantity = "lead of the likeliest law over the next, in AICc"
    if "reason" in found:
        return Finding(_QUESTION, quantity, UNRESOLVED, note=f"not fitted: {found['reason']}")
    if found["control"]["is_rejected"]:
        ends = f"{found['widths'][0]} and {found['widths'][-1]} bits"
        none = f"between {ends} these runs do not show that bits of the state cost anything"
        return Finding(_QUESTION, quantity, UNRESOLVED, note=none)
    first, second = _of_state(found["laws"])[:2]
    apart = second["aicc"] - first["aicc"]
    notes = [f"R² {first['r2']:.3f}; next {_MEANINGS[second['law']]}, R² {second['r2']:.3f}"]
    if apart <= _CLEAR:
        notes.insert(0, f"{_MEANINGS[first['law']]} leads, by too little to tell")
    if found["without_narrowest"]:
        other = _of_state(found["without_narrowest"])[0]["law"]
        rest = f"without {found['widths'][0]} bits"
        is_same = other == first["law"]
        notes.append(f"the same {rest}" if is_same else f"but {rest}, {_MEANINGS[other]}")
    answer = _MEANINGS[first["law"]] if apart > _CLEAR else UNRESOLVED
    return Finding(_QUESTION, quantity, answer, apart, form=".1f", note="; ".join(notes))


def _of_state(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["law"] in _MEANINGS]


_PLACES = {
    "N": "like fewer parameters",
    "D": "like fewer tokens",
    "E": "neither: they raise the loss",
}
_CANDIDATES = tuple(map(laws.state_law, _PLACES))
_MEANINGS = {law.name: meaning for law, meaning in zip(_CANDIDATES, _PLACES.values(), strict=True)}
_CLEAR = 6.0  # in AICc: a likelihood ratio of about 20

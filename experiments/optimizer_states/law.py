"""What bits of the state are worth: laws of loss against them, where records have several N and D."""

# pandas' selections are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import pandas as pd

from experiments.harness.law_tables import CONFIDENCE, control_summary, fit_summary, plain
from experiments.optimizer_states.arms import EXACT, fixed_bits
from jaxquant import laws

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
    """Whether bits of the state cost N or D, γ, and the control; None of records with one N and D."""
    own = runs(table)
    if own.empty or own["N"].nunique() < 2 or own["D"].nunique() < 2:
        return None
    candidates = (laws.state_law("N"), laws.state_law("D"), laws.CHINCHILLA)
    try:
        ranked = laws.compare(candidates, own, held_out=("N", "D", "P_state"), starts=STARTS)
        fits = [
            laws.fit(
                law, own, bootstraps=BOOTSTRAPS, starts=STARTS, groups="pair", confidence=CONFIDENCE
            )
            for law in candidates[:2]
        ]
        control = laws.shuffled_bits(_likelier(ranked), laws.CHINCHILLA, own, starts=STARTS)
    except ValueError as error:
        return {"runs": len(own), "reason": str(error)}
    found = {
        "runs": len(own),
        "schedule": own["schedule"].iloc[0],
        "widths": sorted(map(int, own["P_state"].unique())),
        "laws": ranked.rows,
        "fits": [fit_summary(fitted) for fitted in fits],
        "control": control_summary(control),
    }
    return plain(found)


def _likelier(ranked: laws.Comparison) -> laws.Law:
    """Of the laws of the state's bits."""
    return next(f.law for f in ranked.fits if "P_state" in f.law.columns)


def text(found: dict) -> str:
    """The finding in words."""
    if found["control"]["is_rejected"]:
        return (
            f"Between {found['widths'][0]} and {found['widths'][-1]} bits these runs do not show that bits "
            "of the state cost anything that a law of N or D could hold."
        )
    by_law = {row["law"]: row["aicc"] for row in found["laws"]}
    n, d = (by_law[laws.state_law(place).name] for place in "ND")
    fit = next(f for f in found["fits"] if f["law"] == laws.state_law("N" if n < d else "D").name)
    gamma = next(p for p in fit["parameters"] if p["name"] == "gamma_state")
    sure = "" if abs(n - d) > _CLEAR else "; the difference is too small to tell"
    return (
        f"Bits of the state act like fewer {'parameters' if n < d else 'tokens'} rather than fewer "
        f"{'tokens' if n < d else 'parameters'} (AICc less by {abs(n - d):.1f}{sure}); γ = "
        f"{gamma['value']:.2f} [{gamma['low']:.2f}, {gamma['high']:.2f}] bits."
    )


_CLEAR = 6.0  # in AICc: a likelihood ratio of about 20

"""Laws of what quantization adds, over all sizes, lengths and widths at once: fitted, ranked, held out."""

# pandas' selections are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import dataclasses

import pandas as pd

from experiments.harness.models import lm
from experiments.harness.reporting.findings import UNRESOLVED, Finding, Published
from experiments.harness.reporting.law_tables import (
    fit_summary,
    fit_table,
    laws_table,
    other_warnings,
)
from experiments.harness.reporting.layout import Section
from experiments.ptq_overtraining.analysis import SCHEDULE_NAMES, select
from jaxquant import laws

BOOTSTRAPS = 200
STARTS = 32
GRANULARITIES = ("tensor", "channel")
_CERTAIN = 2.0  # standard errors, over the evaluation's windows, that what is added has to exceed


def summaries(added: pd.DataFrame) -> list[dict]:
    """The laws of each schedule and granularity, of the blocks' linears on text like the training text."""
    own = select(added, scope="linears", split="valid")
    found = []
    for schedule in dict.fromkeys(own["schedule"]):
        for granularity in GRANULARITIES:
            table = select(own, schedule=schedule, granularity=granularity)
            if not table.empty:
                kind = {"schedule": schedule, "granularity": granularity}
                found.append(kind | _summary(table))
    return found


def runs(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `analysis.added_loss` with the columns of `jaxquant.laws`; lengths of a run share a trunk.

    A trunk is a size, a seed and a learning rate.
    """
    names = (table[k].astype(str) for k in ("size", "seed", "peak_lr"))
    return pd.DataFrame(
        {
            "N": [lm.SIZES[size].non_embedding_parameters for size in table["size"]],
            "D": table["tokens"].to_numpy(),
            "P_post": table["bits"].to_numpy(),
            "added": table["mean"].to_numpy(),
            "trunk": ["-".join(parts) for parts in zip(*names, strict=True)],
        }
    )


def _summary(table: pd.DataFrame) -> dict:
    kept = table[table["mean"] > _CERTAIN * table["se"]]
    own = runs(kept)
    found = {"runs": len(own), "left_out": len(table) - len(own)}
    try:
        ranked = laws.compare(
            (laws.KUMAR_PTQ, laws.QID), own, held_out=("N", "D", "P_post"), starts=STARTS
        )
        fitted = laws.fit(laws.KUMAR_PTQ, own, bootstraps=BOOTSTRAPS, starts=STARTS, groups="trunk")
    except ValueError as error:
        return found | {"reason": str(error)}
    return found | {"laws": ranked.rows, "fit": fit_summary(fitted)}


_QUESTION = "Are the exponents of one law over all sizes, lengths and widths the published ones?"
_EXPONENTS = ("gamma_D", "gamma_N", "gamma_post")
_ANSWERS = {"above": "no", "below": "no", "agrees": "yes"}


def findings(found: list[dict]) -> list[Finding]:
    """The exponents beside those of Kumar et al., for scales per tensor, as theirs are."""
    return [
        _exponent(one, p)
        for one in found
        if "fit" in one and one["granularity"] == "tensor"
        for p in one["fit"]["parameters"]
        if p["name"] in _EXPONENTS
    ]


def _exponent(one: dict, parameter: dict) -> Finding:
    name = parameter["name"]
    value = round(laws.KUMAR_2024_PTQ.params[name], 3)
    published = Published(value, value, "Kumar et al. 2024", "larger than", "smaller than")
    low, high = (None if parameter["is_held"] else parameter[k] for k in ("low", "high"))
    made = Finding(
        _QUESTION,
        f"{name.replace('gamma', 'γ')}, {SCHEDULE_NAMES[one['schedule']]}",
        UNRESOLVED,
        *(parameter["value"], low, high),
        published=published,
        note="its bound: not determined" if parameter["is_held"] else "",
    )
    return dataclasses.replace(made, answer=_ANSWERS.get(made.against, UNRESOLVED))


def section(found: list[dict], paragraphs: list[str]) -> Section:
    """The laws as a section of the report."""
    names = {id(o): f"{SCHEDULE_NAMES[o['schedule']]}, per {o['granularity']}" for o in found}
    fitted = {names[id(o)]: o for o in found if "fit" in o}
    said = list(paragraphs)
    said += [f"{names[id(o)]}: not fitted: {o['reason']}." for o in found if "reason" in o]
    counts = [f"{k}: {o['runs']} points, {o['left_out']} left out" for k, o in fitted.items()]
    said += [f"{'; '.join(counts)}."] if counts else []
    said += [f"Warning ({k}): {w}." for k, o in fitted.items() for w in other_warnings(o["fit"])]
    if not fitted:
        return Section(_TITLE, said)
    equation = next(iter(fitted.values()))["fit"]["equation"]
    tables = [(equation, fit_table({k: o["fit"] for k, o in fitted.items()}))]
    ranked = laws_table({k: o["laws"] for k, o in fitted.items()})
    folded = [("Laws ranked by AICc; R² of the logarithm of δ", ranked)]
    return Section(_TITLE, said, tables, folded=folded)


_TITLE = "One law for all sizes, lengths and widths"

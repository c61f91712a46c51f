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
    interval,
    laws_table,
    other_warnings,
)
from experiments.harness.reporting.layout import Section
from experiments.harness.reporting.statistics import corrected
from experiments.ptq_overtraining import corrections
from experiments.ptq_overtraining.analysis import SCHEDULE_NAMES, select
from jaxquant import laws

BOOTSTRAPS = 200
STARTS = 32
GRANULARITIES = ("tensor", "channel")
_FEWEST_UNITS = 4
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
    if (units := len(set(own["trunk"]))) < _FEWEST_UNITS:
        return found | {"reason": f"{units} runs of size and seed are too few to resample"}
    try:
        ranked = laws.compare(
            (laws.KUMAR_PTQ, laws.QID), own, held_out=("N", "D", "P_post"), starts=STARTS
        )
        fitted = laws.fit(laws.KUMAR_PTQ, own, bootstraps=BOOTSTRAPS, starts=STARTS, groups="trunk")
    except ValueError as error:
        return found | {"reason": str(error)}
    own_fit = fit_summary(fitted)
    for parameter in own_fit["parameters"]:
        parameter["p_published"] = _p_value(fitted, parameter)
    return found | {"laws": ranked.rows, "fit": own_fit}


def _p_value(fitted: laws.Fit, parameter: dict) -> float | None:
    """The level at which an exponent's interval ends at the published value; no less than bootstraps tell."""
    name = parameter["name"]
    if name not in _EXPONENTS or parameter["is_held"]:
        return None
    published = _published(name).low
    least, most = 0.0, 1.0  # an interval of level 1 − p holds the value below p, and not above

    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        low, high = fitted.interval(name, 1 - middle)
        least, most = (middle, most) if low <= published <= high else (least, middle)
    return max(least, 1 / (BOOTSTRAPS + 1))


_HALVINGS = 20


def _published(name: str) -> Published:
    value = round(laws.KUMAR_2024_PTQ.params[name], 3)
    return Published(value, value, "Kumar et al. 2024", "larger than", "smaller than")


_QUESTION = "Are the exponents of one law over all sizes, lengths and widths the published ones?"
_EXPONENTS = ("gamma_D", "gamma_N", "gamma_post")
_ANSWERS = {"above": "no", "below": "no", "agrees": "yes"}


def _tested(found: list[dict]) -> list[tuple[dict, dict, float | None]]:
    """The law, the exponent and its q-value, for scales per tensor, as those of Kumar et al. are."""
    own = [
        (one, parameter)
        for one in found
        if "fit" in one and one["granularity"] == "tensor"
        for parameter in one["fit"]["parameters"]
        if parameter["name"] in _EXPONENTS
    ]
    q_values = corrected([parameter["p_published"] for _, parameter in own])
    return [(*pair, q) for pair, q in zip(own, q_values, strict=True)]


def findings(found: list[dict]) -> list[Finding]:
    """The exponents beside those of Kumar et al."""
    return [_exponent(*tested) for tested in _tested(found)]


def _exponent(one: dict, parameter: dict, q: float | None) -> Finding:
    name = parameter["name"]
    low, high = (None if parameter["is_held"] else parameter[k] for k in ("low", "high"))
    known = f"q {corrections.q_text(q)} against the published"
    made = Finding(
        _QUESTION,
        f"{_greek(name)}, {SCHEDULE_NAMES[one['schedule']]}",
        UNRESOLVED,
        *(parameter["value"], low, high),
        published=_published(name),
        q_published=q,
        note="its bound: not determined" if parameter["is_held"] else known,
    )
    return dataclasses.replace(made, answer=_ANSWERS.get(made.against, UNRESOLVED))


def _greek(name: str) -> str:
    return name.replace("gamma", "γ")


def _tests(found: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "schedule": SCHEDULE_NAMES[one["schedule"]],
                "exponent": _greek(parameter["name"]),
                "value [90 %]": interval(parameter),
                "published": f"{_published(parameter['name']).low:g}",
                "p": corrections.q_text(parameter["p_published"]),
                "q": corrections.q_text(q),
            }
            for one, parameter, q in _tested(found)
        ]
    )


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
    if _tested(found):
        folded.append(
            ("Exponents per tensor against the published ones; q over these rows", _tests(found))
        )
    return Section(_TITLE, said, tables, folded=folded)


_TITLE = "One law for all sizes, lengths and widths"

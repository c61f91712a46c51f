"""Laws of what quantization adds, over all sizes, lengths and widths at once: fitted, ranked, held out."""

# pandas' selections are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import pandas as pd

from experiments.harness.models import lm
from experiments.harness.reporting import report
from experiments.harness.reporting.law_tables import fit_summary, fit_table, laws_table
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
    """Rows of `analysis.added_loss` with the columns of `jaxquant.laws`; lengths of a run share a trunk."""
    return pd.DataFrame(
        {
            "N": [lm.SIZES[size].non_embedding_parameters for size in table["size"]],
            "D": table["tokens"].to_numpy(),
            "P_post": table["bits"].to_numpy(),
            "added": table["mean"].to_numpy(),
            "trunk": (table["size"] + "-" + table["seed"].astype(str)).to_numpy(),
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


def section(found: list[dict]) -> report.Section:
    """The laws as a section of the report."""
    text = (
        "Kumar et al.'s law and QiD's (Ouyang et al. 2024) over all sizes, lengths and widths together, on "
        "what quantization adds to the blocks' linears; what does not exceed twice its standard error is "
        "left out. Fits are of Huber's loss on log δ, bootstraps of runs with all their lengths."
    )
    paragraphs, tables = [text], []
    for one in found:
        title = f"{SCHEDULE_NAMES[one['schedule']]}, scales per {one['granularity']}"
        counts = f"{title}: {one['runs']} points, {one['left_out']} left out"
        if "reason" in one:
            paragraphs.append(f"{counts}; not fitted: {one['reason']}.")
            continue
        warnings = "".join(f" Warning: {w}." for w in one["fit"]["warnings"])
        paragraphs.append(f"{counts}.{warnings}")
        tables.append(
            (f"{title}: ranked by AICc; R² of the logarithm of δ", laws_table(one["laws"]))
        )
        tables.append((f"{title}: {one['fit']['equation']}", fit_table(one["fit"])))
    return report.Section("One law for all sizes, lengths and widths", paragraphs, tables)

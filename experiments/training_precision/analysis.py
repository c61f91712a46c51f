"""What the records say: laws of tensors apart and of serving, and the summary of it all."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import pandas as pd
from tqdm.auto import tqdm

from experiments.harness.models import lm
from experiments.harness.reporting.law_tables import fit_summary
from experiments.harness.reporting.values import versions_of
from experiments.training_precision import one_width, robustness
from experiments.training_precision.one_width import fit, optimum_summary
from experiments.training_precision.runs import METHOD_NAMES, at_best_rate, runs, served, tied
from jaxquant import laws
from jaxquant.artifacts.plain import plain

__all__ = ["METHOD_NAMES", "fit", "runs", "served", "summarize", "tied"]

STARTS = 16  # of each fit that is ranked here
SEPARATE = (
    laws.GROWING,
    laws.KUMAR,
    laws.KUMAR_D,
    laws.ADDITIVE,
    laws.CHINCHILLA,
)


def separate_summaries(table: pd.DataFrame) -> dict[str, dict]:
    """Weights, activations and cache apart, for each method that has such runs: all of its runs."""
    apart = table[(table["P_w"] != table["P_a"]) | (table["P_a"] != table["P_kv"])]
    own = table[table["loss"].notna()]
    return {m: separate_summary(own[own["method"] == m]) for m in apart["method"].unique()}


def separate_summary(own: pd.DataFrame) -> dict:
    """The laws of three widths, ranked and fitted."""
    try:
        held_out = ("N", "D", "P_w", "P_a", "P_kv")
        ranked = laws.compare(SEPARATE, own, groups="unit", held_out=held_out, starts=STARTS)
        fitted = fit(laws.KUMAR, own)
    except ValueError as error:
        return {"reason": str(error)}
    return {
        "laws": ranked.rows,
        "fit": fit_summary(fitted),
        "optimum": optimum_summary(laws.optimal_precision(fitted)),
    }


def post_training_summary(table: pd.DataFrame) -> dict:
    """What serving in fewer bits adds to models of full precision: the laws of it, ranked and fitted.

    Where nothing is added, the logarithm of δ has no value: those runs are counted and left out.
    """
    own = tied(table, "ste")
    own = own[own["P_w"] == 16]
    kept = own[own["added"] > 0]
    found = {"runs": len(kept), "left_out": len(own) - len(kept)}
    held_out = ("N", "D", "P_post")
    try:
        ranked = laws.compare(
            (laws.KUMAR_PTQ, laws.QID), kept, groups="unit", held_out=held_out, starts=STARTS
        )
        fitted = fit(laws.KUMAR_PTQ, kept)
    except ValueError as error:
        return found | {"reason": str(error)}
    return found | {"laws": ranked.rows, "fit": fit_summary(fitted)}


def unified_summary(table: pd.DataFrame) -> dict:
    """Training and serving in one law: all straight-through models of one width, as they are served."""
    own = tied(table, "ste")
    own = own[own["P_post"] <= own["P_w"]]
    held_out = ("N", "D", "P_w", "P_post")
    try:
        ranked = laws.compare(
            (laws.UNIFIED, laws.KUMAR_UNBIASED),
            own,
            groups="unit",
            held_out=held_out,
            starts=STARTS,
        )
        fitted = fit(laws.UNIFIED, own)
    except ValueError as error:
        return {"reason": str(error)}
    return {"laws": ranked.rows, "fit": fit_summary(fitted)}


def entropy_check(table: pd.DataFrame, methods: list[dict]) -> list[dict]:
    """Where the source's entropy is known: what each method's law found as E, beside it."""
    known = table["entropy_rate"].dropna()
    if known.empty:
        return []
    rows = []
    for method in methods:
        fits = method.get("fits", {})
        growing = fits.get(laws.GROWING_ERROR.name, {}).get("parameters", ())
        parameters = {p["name"]: p for p in growing}
        if "E" in parameters:
            found = {k: parameters["E"][k] for k in ("value", "low", "high", "is_held")}
            rows.append({"method": method["method"], "entropy": float(known.iloc[0])} | found)
    return rows


def rates(table: pd.DataFrame) -> list[dict]:
    """The loss at each learning rate, of runs of one width; none where each size has one rate."""
    if table.empty or table.groupby("size")["peak_lr"].nunique().max() < 2:
        return []
    own = table[(table["P_w"] == table["P_a"]) & (table["P_a"] == table["P_kv"])]
    keys = ["size", "method", "P_w", "d_over_n", "peak_lr"]
    means = own.groupby(keys, sort=False)["loss"].agg(["mean", "count"]).reset_index()
    return means.rename(columns={"P_w": "P", "mean": "loss", "count": "seeds"}).to_dict("records")


def summarize(records: list[dict], expected: int) -> dict:
    """What ``summary.json`` holds."""
    every, after = runs(records), served(records)
    table, after = at_best_rate(every), at_best_rate(after, "trained")
    names = list(dict.fromkeys(table["method"]))
    bar = tqdm(names, desc="fitting laws", disable=not names)
    methods = [one_width.summary(table, name) for name in bar]
    diverged = [
        {"id": r["id"], "step": r["step"]}
        | {k: r["trial"][k] for k in ("size", "method", "weights", "activations", "cache", "seed")}
        for r in records
        if r["status"] == "diverged"
    ]
    return plain(
        {
            "study": "training_precision",
            "trials": {"finished": len(records), "expected": expected, "diverged": diverged},
            "runs": len(table),
            "methods": methods,
            "separate": separate_summaries(table),
            "post_training": post_training_summary(after) if "ste" in names else None,
            "unified": unified_summary(after) if "ste" in names else None,
            "robustness": robustness.rows(after),
            "rates": rates(every),
            "most_epochs": float(table["epochs"].max()) if len(table) else None,
            "entropy": entropy_check(table, methods),
            "parameters": {
                s: lm.SIZES[s].non_embedding_parameters for s in sorted(set(table["size"]))
            },
            "versions": versions_of(records),
        }
    )

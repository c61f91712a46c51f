"""What the records say: runs as a table, laws fitted and ranked, the best precision, the summary."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import pandas as pd
from tqdm.auto import tqdm

from experiments.harness.models import lm
from experiments.harness.reporting.law_tables import control_summary, fit_summary
from experiments.harness.reporting.statistics import t_interval
from experiments.harness.reporting.values import versions_of
from jaxquant import laws
from jaxquant.artifacts.plain import plain

BOOTSTRAPS = 200
STARTS = 64  # of every fit here: with one number, each law is compiled once
TENSORS = {"w": "weights", "a": "activations", "kv": "cache"}
METHOD_NAMES = {
    "ste": "straight-through",
    "lsq": "LSQ",
    "quest": "QuEST",
    "float": "floating point",
}


def runs(records: list[dict]) -> pd.DataFrame:
    """One row per run and length, with the columns of `jaxquant.laws`."""
    rows = []
    for record in records:
        own = _trial(record)
        own["entropy_rate"] = record.get("entropy_rate")
        for point in record["points"]:
            row = {"D": point["tokens"], "d_over_n": point["tokens_per_parameter"]}
            rows.append(own | row | {"loss": point["loss"]["mean"], "se": point["loss"]["se"]})
    columns = ["size", "method", "seed", *(f"P_{x}" for x in TENSORS), "N", "trunk"]
    columns += ["entropy_rate", "D", "d_over_n", "loss", "se"]
    return pd.DataFrame(rows, columns=columns).astype({"loss": float, "se": float})


def served(records: list[dict]) -> pd.DataFrame:
    """One row per run, length and serving width: the loss that serving adds."""
    rows = []
    for record in records:
        own = _trial(record)
        for point in record["points"]:
            at = {"D": point["tokens"], "d_over_n": point["tokens_per_parameter"]}
            at["trained"] = point["loss"]["mean"]
            for entry in point["served"]:
                rows.append(own | at | {"P_post": entry["bits"], "added": entry["mean"]})
    columns = ["size", "method", "seed", *(f"P_{x}" for x in TENSORS), "N", "trunk"]
    columns += ["D", "d_over_n", "trained", "P_post", "added"]
    table = pd.DataFrame(rows, columns=columns).astype({"added": float, "trained": float})
    return table.assign(loss=table["trained"] + table["added"])


def _trial(record: dict) -> dict:
    """What all rows of a record share."""
    t = record["trial"]
    own = {k: t[k] for k in ("size", "method", "seed")}
    own |= {f"P_{short}": t[name] for short, name in TENSORS.items()}
    return own | {"N": lm.SIZES[t["size"]].non_embedding_parameters, "trunk": record["id"]}


def tied(table: pd.DataFrame, method: str) -> pd.DataFrame:
    """The runs of a method whose tensors have one width, and that are finite."""
    is_one = (table["P_w"] == table["P_a"]) & (table["P_a"] == table["P_kv"])
    return table[is_one & (table["method"] == method) & table["loss"].notna()]


def candidates(widths: list[int]) -> list[laws.Law]:
    """The laws that runs of one width are given."""
    narrow = [b for b in widths if b < 16]
    return [laws.KUMAR_ONE, laws.free_efficiency(*narrow), laws.PANFEROV, laws.CHINCHILLA]


SEPARATE = (
    laws.KUMAR,
    laws.KUMAR_UNBIASED,
    laws.KUMAR_D,
    laws.KUMAR_BOTH,
    laws.KUMAR_UNTIED,
    laws.ADDITIVE,
    laws.CHINCHILLA,
)


def fit(law: laws.Law, table: pd.DataFrame) -> laws.Fit:
    """A law with its intervals: lengths of one run share a trunk, and are resampled together."""
    return laws.fit(law, table, bootstraps=BOOTSTRAPS, starts=STARTS, groups="trunk")


def method_summary(table: pd.DataFrame, method: str) -> dict:
    """A method's laws, its best precision and its control; or the reason why there are none."""
    own = tied(table, method)
    widths = sorted(map(int, own["P_w"].unique()))
    found: dict = {"method": method, "runs": len(own), "widths": widths}
    try:
        ranked = laws.compare(candidates(widths), own, starts=STARTS)
        fitted, by_error = fit(laws.KUMAR_ONE, own), fit(laws.PANFEROV, own)
        levels = fit(laws.free_efficiency(*(b for b in widths if b < 16)), own)
        control = laws.shuffled_bits(laws.KUMAR_ONE, laws.CHINCHILLA, own, starts=STARTS)
    except ValueError as error:
        return found | {"reason": str(error)}
    return found | {
        "laws": ranked.rows,
        "fit": fit_summary(fitted),
        "optimum": _optimum(laws.optimal_precision(fitted)),
        "fit_error": fit_summary(by_error),
        "optimum_error": _optimum(laws.optimal_precision(by_error)),
        "optimum_free": _optimum(laws.optimal_precision(levels)),
        "efficiencies": [
            {"bits": b, "value": levels.params[f"eff_{b}"]}
            | dict(zip(("low", "high"), levels.interval(f"eff_{b}"), strict=True))
            for b in widths
            if b < 16
        ],
        "control": control_summary(control),
    }


def separate_summaries(table: pd.DataFrame) -> dict[str, dict]:
    """Weights, activations and cache apart, for each method that has such runs: all of its runs."""
    apart = table[(table["P_w"] != table["P_a"]) | (table["P_a"] != table["P_kv"])]
    own = table[table["loss"].notna()]
    return {m: separate_summary(own[own["method"] == m]) for m in apart["method"].unique()}


def separate_summary(own: pd.DataFrame) -> dict:
    """The laws of three widths, ranked and fitted."""
    try:
        ranked = laws.compare(
            SEPARATE, own, held_out=("N", "D", "P_w", "P_a", "P_kv"), starts=STARTS
        )
        fitted = fit(laws.KUMAR, own)
    except ValueError as error:
        return {"reason": str(error)}
    return {
        "laws": ranked.rows,
        "fit": fit_summary(fitted),
        "optimum": _optimum(laws.optimal_precision(fitted)),
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
        ranked = laws.compare((laws.KUMAR_PTQ, laws.QID), kept, held_out=held_out, starts=STARTS)
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
            (laws.UNIFIED, laws.KUMAR_UNBIASED), own, held_out=held_out, starts=STARTS
        )
        fitted = fit(laws.UNIFIED, own)
    except ValueError as error:
        return {"reason": str(error)}
    return {"laws": ranked.rows, "fit": fit_summary(fitted)}


def _optimum(found: laws.Optimum) -> dict:
    return {
        "bits": found.bits,
        "low": found.low,
        "high": found.high,
        "is_determined": found.is_determined,
        "text": str(found),
    }


def robustness(table: pd.DataFrame) -> pd.DataFrame:
    """Whether training in few bits lowers what serving in fewer adds: δ of P bits less δ of 16 bits.

    Differences are paired by size, length and seed, and their intervals are Student's t over seeds, each of
    which is the mean over its sizes and lengths.  Serving widths below those of training alone.
    """
    rows = []
    is_one = (table["P_w"] == table["P_a"]) & (table["P_a"] == table["P_kv"])
    for method, own in table[is_one].groupby("method", sort=False):
        pairing = ["size", "d_over_n", "seed", "P_post"]
        wide = own[own["P_w"] == 16].set_index(pairing)["added"]
        for bits, narrow in own[own["P_w"] < 16].groupby("P_w"):
            change = narrow.set_index(pairing)["added"].sub(wide).dropna()
            for post, values in change.groupby("P_post"):
                if post < bits:
                    rows.append({"method": method, "P": bits, "P_post": post} | _over_seeds(values))
    columns = ["method", "P", "P_post", "mean", "low", "high", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def _over_seeds(values: pd.Series) -> dict:
    means = values.groupby("seed").mean().to_numpy()
    mean, low, high = t_interval(means)
    return {"mean": mean, "low": low, "high": high, "seeds": len(means)}


def entropy_check(table: pd.DataFrame, methods: list[dict]) -> list[dict]:
    """Where the source's entropy is known: what each method's law found as E, beside it."""
    known = table["entropy_rate"].dropna()
    if known.empty:
        return []
    rows = []
    for method in methods:
        parameters = {p["name"]: p for p in method.get("fit", {}).get("parameters", ())}
        if "E" in parameters:
            found = {k: parameters["E"][k] for k in ("value", "low", "high", "is_held")}
            rows.append({"method": method["method"], "entropy": float(known.iloc[0])} | found)
    return rows


def summarize(records: list[dict], expected: int) -> dict:
    """What ``summary.json`` holds."""
    table, after = runs(records), served(records)
    names = list(dict.fromkeys(table["method"]))
    bar = tqdm(names, desc="fitting laws", disable=not names)
    methods = [method_summary(table, name) for name in bar]
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
            "robustness": robustness(after).to_dict("records"),
            "entropy": entropy_check(table, methods),
            "parameters": {
                s: lm.SIZES[s].non_embedding_parameters for s in sorted(set(table["size"]))
            },
            "versions": versions_of(records),
        }
    )

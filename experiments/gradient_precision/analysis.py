"""What the records say: the summary of it all."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import pandas as pd

from experiments.gradient_precision import comparisons, law, noise
from experiments.gradient_precision.arms import FULL
from experiments.gradient_precision.runs import at_best_rate, diverged, gaps, kept, runs
from experiments.harness.models import lm
from experiments.harness.reporting.values import versions_of
from jaxquant.artifacts.plain import plain


def programs(records: list[dict], table: pd.DataFrame) -> list[dict]:
    """How often the programs of a size and an arm were compiled, at most, and for how many pairs of bits."""
    traces: dict[str, int] = {}
    for record in records:
        for point in record["points"]:
            most = max(point["traces"].values())
            traces[record["id"]] = max(traces.get(record["id"], 0), most)
    own = table.assign(most=table["trunk"].map(traces))
    return [
        {"size": size, "arm": name, "pairs": int(rows["pair"].nunique())}
        | {"compilations": int(rows["most"].max())}
        for (size, name), rows in own.groupby(["size", "name"], sort=False)
    ]


def rates(table: pd.DataFrame) -> list[dict]:
    """The mean loss at each learning rate; none where there is one rate alone."""
    if table["peak_lr"].nunique() < 2:
        return []
    keys = ["size", "name", "pair", "d_over_n", "peak_lr"]
    means = table.groupby(keys, sort=False)["loss"].agg(["mean", "count"]).reset_index()
    return means.rename(columns={"mean": "loss", "count": "seeds"}).to_dict("records")


def full_precision(table: pd.DataFrame) -> list[dict]:
    """The loss of full precision, by size and length, and its spread over seeds."""
    own = table[table["method"] == FULL]
    means = own.groupby(["size", "d_over_n"], sort=False)["loss"].agg(["mean", "std", "count"])
    columns = {"mean": "loss", "std": "sd", "count": "seeds"}
    return means.reset_index().rename(columns=columns).to_dict("records")


def summarize(records: list[dict], expected: int) -> dict:
    """What ``summary.json`` holds."""
    every = runs(records)
    best = at_best_rate(kept(every))
    apart = gaps(best)
    return plain(
        {
            "study": "gradient_precision",
            "trials": {
                "finished": len(records),
                "expected": expected,
                "diverged": diverged(records),
            },
            "runs": len(best),
            "full": full_precision(best),
            "gaps": comparisons.of_arms(apart),
            "order": comparisons.order(apart),
            "parts": comparisons.parts(apart),
            "roundings": comparisons.roundings(apart),
            "additivity": comparisons.additivity(apart),
            "noise": noise.relations(apart),
            "noise_weights": noise.weights(apart),
            "laws": law.summaries(best, apart),
            "rates": rates(kept(every)),
            "most_epochs": float(every["epochs"].max()) if len(every) else None,
            "programs": programs(records, every),
            "parameters": {
                s: lm.SIZES[s].non_embedding_parameters for s in dict.fromkeys(every["size"])
            },
            "versions": versions_of(records),
        }
    )

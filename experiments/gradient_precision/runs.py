"""Records as tables: a row for each run and length, the best rate of each, and gaps to full precision."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

import pandas as pd

from experiments.gradient_precision.arms import FULL, Arm
from experiments.harness.models import lm

ARM = ["method", "part", "rounding", "block", "hadamard"]
KIND = [*ARM, "P_forward", "P_backward"]  # what is compared: an arm with its bits
_OWN = ["size", "seed", "name", *KIND, "peak_lr", "N", "trunk", "unit", "pair"]
GRADIENT = ("bias", "variance", "least_bias", "forward")
BOUND = "the entropy of single tokens"


def runs(records: list[dict]) -> pd.DataFrame:
    """One row per run and length, with the columns of `jaxquant.laws`.

    "unit" is what all runs of a size and seed share, "pair" the bits in words.  Runs that diverged have a
    loss that is not finite, or one that `diverged` names: `kept` leaves them out.
    """
    rows = []
    for record in records:
        own = _trial(record)
        for point in record["points"]:
            row = {"D": point["tokens"], "d_over_n": point["tokens_per_parameter"]}
            row |= {"epochs": point.get("epochs"), "bound": record["unigram_entropy"]}
            row |= {"loss": point["loss"]["mean"], "se": point["loss"]["se"]}
            rows.append(own | row | {x: (point["gradient"] or {}).get(x) for x in GRADIENT})
    columns = [*_OWN, "D", "d_over_n", "epochs", "bound", "loss", "se", *GRADIENT]
    return pd.DataFrame(rows, columns=columns).astype(
        dict.fromkeys(("loss", "se", *GRADIENT), float)
    )


def _trial(record: dict) -> dict:
    """What all rows of a record share."""
    t = record["trial"]
    own = {k: t[k] for k in ("size", "seed", "peak_lr", *ARM)}
    own |= {"P_forward": t["forward"], "P_backward": t["backward"]}
    own |= {"name": Arm(*(t[k] for k in ARM)).name, "pair": f"{t['forward']}/{t['backward']}"}
    own |= {"trunk": record["id"], "unit": f"{t['size']}/{t['seed']}"}
    return own | {"N": lm.SIZES[t["size"]].non_embedding_parameters}


def diverged(records: list[dict]) -> list[dict]:
    """Every run that diverged: its loss was not finite, or ends above `BOUND`, that of no context."""
    found = []
    for record in records:
        t = record["trial"]
        own = {"id": record["id"], "size": t["size"], "arm": _trial(record)["name"]}
        own |= {"bits": f"{t['forward']}/{t['backward']}", "rate": t["peak_lr"], "seed": t["seed"]}
        if record["status"] == "diverged":
            found.append(own | {"step": record["step"], "why": "not finite"})
        for point in record["points"]:
            loss = point["loss"]["mean"]
            if loss is None or loss > record["unigram_entropy"]:
                why = "not finite" if loss is None else f"loss {loss:.2f}, above {BOUND}"
                steps = point["tokens"] // (t["batch"] * t["sequence"])
                found.append(own | {"step": steps, "why": why})
    return found


def kept(table: pd.DataFrame) -> pd.DataFrame:
    """The runs that did not diverge."""
    return table[table["loss"].notna() & (table["loss"] <= table["bound"])]


def at_best_rate(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the learning rate that is best for each size, arm, bits and length.

    The best has the least mean loss over seeds, of the rates at which no seed diverged; where one did at
    each rate, it is the best of the others.  With one rate these are all rows.
    """
    kind = ["size", *KIND, "d_over_n"]
    if table.empty or table["peak_lr"].nunique() < 2:
        return table
    means = table.groupby([*kind, "peak_lr"], as_index=False).agg(
        loss=("loss", "mean"), seeds=("seed", "count")
    )
    whole = means["seeds"] == means.groupby(kind)["seeds"].transform("max")
    means = means[whole].reset_index(drop=True)
    best = means.loc[means.groupby(kind)["loss"].idxmin(), [*kind, "peak_lr"]]
    return table.merge(best, on=[*kind, "peak_lr"])


def gaps(table: pd.DataFrame) -> pd.DataFrame:
    """Each run beside that of full precision of its size, seed and length, each at its best rate.

    Returns:
        rows of all other arms, with the columns "loss_full" and "gap".
    """
    pairing = ["size", "seed", "d_over_n"]
    full = table[table["method"] == FULL][[*pairing, "loss"]]
    found = table[table["method"] != FULL].merge(
        full.rename(columns={"loss": "loss_full"}), on=pairing
    )
    return found.assign(gap=found["loss"] - found["loss_full"])

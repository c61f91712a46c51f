"""Records as tables: a row for each run, for each width at which it is served, and for each gap."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import pandas as pd

from experiments.harness.models import lm

TENSORS = {"w": "weights", "a": "activations", "kv": "cache"}
METHOD_NAMES = {
    "ste": "straight-through",
    "lsq": "LSQ",
    "quest": "QuEST",
    "float": "floating point",
}
FULL = 16  # bits that stand for full precision
_BITS = [f"P_{x}" for x in TENSORS]
_OWN = ["size", "method", "seed", *_BITS, "peak_lr", "N", "trunk", "unit"]


def runs(records: list[dict]) -> pd.DataFrame:
    """One row per run and length, with the columns of `jaxquant.laws`.

    "trunk" is what lengths of one run share, "unit" what all runs of a size and seed share.
    """
    rows = []
    for record in records:
        own = _trial(record)
        own["entropy_rate"] = record.get("entropy_rate")
        for point in record["points"]:
            row = {"D": point["tokens"], "d_over_n": point["tokens_per_parameter"]}
            row |= {"epochs": point.get("epochs")}
            rows.append(own | row | {"loss": point["loss"]["mean"], "se": point["loss"]["se"]})
    columns = [*_OWN, "entropy_rate", "D", "d_over_n", "epochs", "loss", "se"]
    return pd.DataFrame(rows, columns=columns).astype({"loss": float, "se": float})


def served(records: list[dict]) -> pd.DataFrame:
    """One row per run, length and serving width: the loss that serving adds, and the loss with it."""
    rows = []
    for record in records:
        own = _trial(record)
        for point in record["points"]:
            at = {"D": point["tokens"], "d_over_n": point["tokens_per_parameter"]}
            at["trained"] = point["loss"]["mean"]
            for entry in point["served"]:
                rows.append(own | at | {"P_post": entry["bits"], "added": entry["mean"]})
    columns = [*_OWN, "D", "d_over_n", "trained", "P_post", "added"]
    table = pd.DataFrame(rows, columns=columns).astype({"added": float, "trained": float})
    return table.assign(loss=table["trained"] + table["added"])


def _trial(record: dict) -> dict:
    """What all rows of a record share."""
    t = record["trial"]
    own = {k: t[k] for k in ("size", "method", "seed", "peak_lr")}
    own |= {f"P_{short}": t[name] for short, name in TENSORS.items()}
    own |= {"trunk": record["id"], "unit": f"{t['size']}/{t['seed']}"}
    return own | {"N": lm.SIZES[t["size"]].non_embedding_parameters}


def at_best_rate(table: pd.DataFrame, loss: str = "loss") -> pd.DataFrame:
    """The rows of the learning rate that is best for each size, method, width and length.

    The best has the least loss as trained, in the mean over seeds.  With one rate these are all rows.

    Args:
        table: of `runs` or `served`.
        loss: the column of the loss as trained.
    """
    kind = ["size", "method", *_BITS, "d_over_n"]
    if table.groupby(kind)["peak_lr"].nunique().max() < 2 or table.empty:
        return table
    means = table.groupby([*kind, "peak_lr"], as_index=False)[loss].mean()
    best = means.loc[means.groupby(kind)[loss].idxmin(), [*kind, "peak_lr"]]
    return table.merge(best, on=[*kind, "peak_lr"])


def tied(table: pd.DataFrame, method: str) -> pd.DataFrame:
    """The runs of a method whose tensors have one width, and that are finite."""
    is_one = (table["P_w"] == table["P_a"]) & (table["P_a"] == table["P_kv"])
    return table[is_one & (table["method"] == method) & table["loss"].notna()]


def weights_alone(table: pd.DataFrame) -> pd.DataFrame:
    """The runs whose weights alone have few bits, and those of full precision."""
    return table[(table["P_a"] == FULL) & (table["P_kv"] == FULL)]


def gaps(table: pd.DataFrame, method: str) -> pd.DataFrame:
    """A method's runs of one width, each beside the run of full precision of its size, seed and length.

    Full precision is the method's own 16 bits; where it has none, those of straight-through rounding.

    Returns:
        rows below 16 bits, with the columns "loss_full" and "gap".
    """
    pairing = ["size", "seed", "D"]
    widest = pd.DataFrame(columns=[*pairing, "loss_full"])
    for name in (method, "ste"):
        own = tied(table, name)
        own = own[own["P_w"] == FULL]
        if not own.empty:
            widest = own[[*pairing, "loss"]].rename(columns={"loss": "loss_full"})
            break
    narrow = tied(table, method)
    found = narrow[narrow["P_w"] < FULL].merge(widest, on=pairing)
    return found.assign(gap=found["loss"] - found["loss_full"])

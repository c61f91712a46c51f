"""Whether the bias or the variance of a gradient goes with the loss gap, over arms and lengths."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import numpy as np
import pandas as pd
from scipy import optimize, stats

from experiments.gradient_precision.arms import FULL_BITS
from experiments.gradient_precision.comparisons import over_seeds, with_q_values

MEASURES = ("bias", "variance", "forward")
_FEWEST_ARMS = 5


def relations(table: pd.DataFrame) -> list[dict]:
    """Spearman's rank correlation of the gap with each measure over arms, by size and length.

    One of each seed, so that intervals are Student's over seeds.  "of" says of which arms: all, or those
    whose forward product has full precision, where the gradient's error alone makes the gap.

    Args:
        table: of `runs.gaps`.
    """
    found = []
    widest = table["P_forward"] == FULL_BITS
    for of, own in (("all arms", table), ("full forward precision", table[widest])):
        for place, group in own.groupby(["size", "d_over_n"], sort=False):
            row = dict(zip(("size", "d_over_n"), place, strict=True)) | {"of": of}
            found += [row | one for one in _of_place(group)]
    return with_q_values(found)


def _of_place(group: pd.DataFrame) -> list[dict]:
    known = group.dropna(subset=["gap", *MEASURES])
    found = []
    for measure in MEASURES:
        by_seed = {}
        for seed, own in known.groupby("seed"):
            if len(own) >= _FEWEST_ARMS and own[measure].nunique() > 1 and own["gap"].nunique() > 1:
                by_seed[seed] = float(stats.spearmanr(own[measure], own["gap"]).statistic)
        if by_seed:
            arms = int(known.groupby("seed").size().max())
            found.append({"measure": measure, "arms": arms} | over_seeds(pd.Series(by_seed)))
    return found


def weights(table: pd.DataFrame) -> list[dict]:
    """How much gap goes with squared bias and with variance: gap = a · bias² + b · variance, a, b ≥ 0.

    Of arms whose forward product has full precision, least squares over the arms and lengths of each size and
    seed, so that intervals are Student's over seeds.

    Args:
        table: of `runs.gaps`.
    """
    found = []
    own = table[table["P_forward"] == FULL_BITS].dropna(subset=["gap", *MEASURES])
    for size, group in own.groupby("size", sort=False):
        rows = [_solved(of_seed) for _, of_seed in group.groupby("seed")]
        rows = [row for row in rows if row is not None]
        for i, name in enumerate(("bias²", "variance")):
            if rows:
                values = pd.Series([float(row[i]) for row in rows])
                found.append({"size": size, "of": name} | over_seeds(values))
    return found


def _solved(own: pd.DataFrame) -> np.ndarray | None:
    columns = np.column_stack([own["bias"] ** 2, own["variance"]])
    if len(own) < _FEWEST_ARMS or np.linalg.matrix_rank(columns) < columns.shape[1]:
        return None
    return optimize.nnls(columns, own["gap"].to_numpy())[0]

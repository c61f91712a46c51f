"""Reads the tables of runs that others publish into the columns of `jaxquant.laws`.

A table is a file that the user gives; nothing of it is kept here.  What a run quantizes is found from its
quantizers and their settings, since the printed widths say otherwise in places; what contradicts itself or is
not known is a ValueError that names the run.
"""

import ast
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from jaxquant.checks import check_positive, check_whole

FULL = "full precision"
QUEST_COLUMNS = ["size", "N", "D", "P_w", "P_a", "format", "scheme", "loss"]
QUARTET_COLUMNS = [
    *("size", "N", "D", "P_w", "P_a", "P_forward", "P_backward"),
    *("forward", "backward", "scheme", "loss"),
]

# Tokens of a step: sequences of 512, 512 of them (arXiv 2505.14669, notebooks/plots.ipynb).
TOKENS_PER_ITERATION = 512 * 512
_LOSSES, _SIZES = "size_fwd_bwd_iters_loss", "str_size_to_int"

_FULL_BITS, _FP4_BITS = 16, 4
_SPARSE = "integer, 2:4 sparse"
# QuEST's classes (its src/models/quantization/base_linear.py): (format, whether values are rotated first).
_QUEST_QUANTIZERS = {
    "NoQuantizer": ("none", False),
    "ClipQuantizer": ("integer", False),
    "TrustQuantizer": ("integer", False),
    "HadamardClipQuantizer": ("integer", True),
    "HadamardTrustQuantizer": ("integer", True),
    "HalfHadamardClipQuantizer": ("integer", True),
    "HalfHadamardTrustQuantizer": ("integer", True),
    "HadamardFP4TrustQuantizer": ("FP4", True),
    "HalfHadamardFP4TrustQuantizer": ("FP4", True),
    "HadamardFourEightTrustQuantizer": (_SPARSE, True),
    "HalfHadamardFourEightTrustQuantizer": (_SPARSE, True),
}
_QUEST_PAIRS = (  # formats of weights and activations whose runs have a name
    *(("integer", "integer"), ("integer", "none"), ("FP4", "FP4"), ("FP4", "none")),
    *((_SPARSE, "integer"), (_SPARSE, "none")),
)
# Quartet's names of what a product's operands are quantized by; all but the first have 4 bits.
QUARTET_QUANTIZERS = {
    "BF16": FULL,
    "QuEST": "MXFP4 by QuEST",
    "QuESTNoQuantScale": "MXFP4 by QuEST, scale not quantized",
    "AlbertTsengQuantizer": "MXFP4, stochastic rounding",
    "AlbertTsengDeterministic": "MXFP4, rounded to nearest",
    "EdenOld": "MXFP4 by EDEN, an earlier one",
    "Eden32": "MXFP4 by EDEN, 32",
    "Eden128": "MXFP4 by EDEN, 128",
}


def read_quest(path: str | Path) -> pd.DataFrame:
    """Returns QuEST's runs, one a row, with `QUEST_COLUMNS`.

    FP4 runs are written with 16 bits there, as their quantizer takes no setting; here they have 4.

    Args:
        path: of ``for_plots/runs_for_scaling.json`` of IST-DASLab/QuEST.

    Raises:
        ValueError: a file that cannot be read or is no such table; a run that lacks a key, names a quantizer
            that is not known, or whose quantizer contradicts its bits.

    Source: Panferov et al. 2025, arXiv 2502.05003.
    """
    runs = _json(path, "QuEST's runs")
    if not isinstance(runs, list) or not runs:
        raise ValueError(f"'{path}' must hold a list of runs; got {type(runs).__name__}")
    rows = [_quest_row(f"run {i} of '{path}'", run) for i, run in enumerate(runs)]
    return pd.DataFrame(rows, columns=QUEST_COLUMNS)


def _quest_row(name: str, run: Any) -> dict:
    if not isinstance(run, Mapping):
        raise ValueError(f"{name} must be an object with keys; got {run!r}")
    needed = ("model_size", "non_embedding_parameters", "tokens", "loss", "args")
    needed += ("w_quant", "a_quant", "w_bits", "a_bits")
    missing = [key for key in needed if key not in run]
    if missing or not isinstance(run["args"], Mapping):
        raise ValueError(f"{name} has no {', '.join(missing) or 'settings in args'}")
    for key in ("non_embedding_parameters", "tokens", "loss"):
        check_positive(f"{key} of {name}", run[key])
    weights, activations = (_quest_tensor(name, run, side) for side in "wa")
    row = {
        "size": f"{run['model_size']}M",
        "N": float(run["non_embedding_parameters"]),
        "D": float(run["tokens"]),
        "P_w": weights["bits"],
        "P_a": activations["bits"],
        "format": weights["format"],
        "loss": float(run["loss"]),
    }
    return row | {"scheme": _quest_scheme(name, weights, activations)}


def _quest_tensor(name: str, run: Mapping, side: str) -> dict:
    """Returns the bits, format and rotation of weights ("w") or activations ("a")."""
    quantizer, said = run[f"{side}_quant"], run[f"{side}_bits"]
    if quantizer not in _QUEST_QUANTIZERS:
        raise ValueError(
            f"{name}: {side}_quant is one of {', '.join(_QUEST_QUANTIZERS)}; got {quantizer!r}"
        )
    own = run["args"].get(f"{side}_quant", quantizer)
    if own != quantizer:
        raise ValueError(f"{name}: {side}_quant is {quantizer!r}, but its args say {own!r}")
    settings = run["args"].get(f"{side}_quant_kwargs") or {}
    format, is_rotated = _QUEST_QUANTIZERS[quantizer]
    fixed = {"none": _FULL_BITS, "FP4": _FP4_BITS}.get(format)
    bits = settings.get("bits", fixed)
    # A quantizer without settings is written as 16 bits, whatever it is.
    expected = bits if "bits" in settings else _FULL_BITS
    if bits is None or said != expected or fixed not in (None, bits):
        raise ValueError(
            f"{name}: {quantizer} with the settings {dict(settings)} contradicts {side}_bits = {said!r}; "
            f"it has {'the bits of its settings' if fixed is None else f'{fixed} bits'}"
        )
    check_whole(f"{side}_bits of {name}", bits, 1)
    return {"bits": int(bits), "format": format, "is_rotated": is_rotated}


def _quest_scheme(name: str, weights: dict, activations: dict) -> str:
    formats = weights["format"], activations["format"]
    if formats == ("none", "none"):
        return FULL
    if activations["format"] == "none":
        said = f"W{weights['bits']} alone"
    else:
        said = f"W{weights['bits']}A{activations['bits']}"
    if formats not in _QUEST_PAIRS or (
        activations["format"] != "none" and weights["is_rotated"] != activations["is_rotated"]
    ):
        raise ValueError(f"{name} quantizes weights and activations differently: {formats}")
    kind = weights["format"].removeprefix("integer").removeprefix(", ")
    return ", ".join([said, *([kind] if kind else []), *_unrotated(weights)])


def _unrotated(tensor: dict) -> list[str]:
    return [] if tensor["is_rotated"] else ["not rotated"]


def read_quartet(path: str | Path) -> pd.DataFrame:
    """Returns Quartet's runs, one a row, with `QUARTET_COLUMNS`; the notebook's code is parsed, never run.

    Args:
        path: of ``notebooks/plots.ipynb`` of IST-DASLab/Quartet, or of its cells with the tables.

    Raises:
        ValueError: a file that cannot be read or is no notebook; no cell with the tables, or one that is no
            literal; a quantizer or a size that is not known; what is no number.

    Source: Castro et al. 2025, arXiv 2505.14669.
    """
    notebook = _json(path, "Quartet's notebook")
    if not isinstance(notebook, Mapping) or not isinstance(notebook.get("cells"), list):
        raise ValueError(f"'{path}' must be a notebook with cells")
    losses, sizes = (_literal(path, notebook["cells"], name) for name in (_LOSSES, _SIZES))
    rows = []
    for size, forward, backward, iterations, loss in _leaves(path, losses):
        for quantizer in (forward, backward):
            if quantizer not in QUARTET_QUANTIZERS:
                known = ", ".join(QUARTET_QUANTIZERS)
                raise ValueError(f"'{path}': quantizers are of {known}; got {quantizer!r}")
        if size not in sizes:
            raise ValueError(f"'{path}': {_SIZES} has no {size!r}, only {', '.join(sizes)}")
        name = f"{size}, {forward}, {backward}, {iterations} iterations, in '{path}'"
        check_positive(f"N of {name}", sizes[size])
        check_whole(f"the iterations of {name}", iterations, 1)
        check_positive(f"the loss of {name}", loss)
        rows.append(_quartet_row(size, sizes[size], forward, backward, iterations, loss))
    return pd.DataFrame(rows, columns=QUARTET_COLUMNS)


def _quartet_row(
    size: str, n: float, forward: str, backward: str, iterations: int, loss: float
) -> dict:
    of_forward, of_backward = (16 if x == "BF16" else 4 for x in (forward, backward))
    is_full = of_forward == of_backward == 16
    return {
        "size": size,
        "N": float(n),
        "D": float(iterations * TOKENS_PER_ITERATION),
        "P_w": of_forward,
        "P_a": of_forward,
        "P_forward": of_forward,
        "P_backward": of_backward,
        "forward": QUARTET_QUANTIZERS[forward],
        "backward": QUARTET_QUANTIZERS[backward],
        "scheme": FULL if is_full else f"{forward}/{backward}",
        "loss": float(loss),
    }


def _leaves(path: str | Path, tree: Any, above: tuple = ()) -> list[tuple]:
    """Returns (size, forward, backward, iterations, loss) of each run."""
    levels = ("sizes", "forward quantizers", "backward quantizers", "iterations")
    if not isinstance(tree, dict):
        where = "/".join(map(str, above)) or _LOSSES
        raise ValueError(f"'{path}': {where} must map {levels[len(above)]}; got {tree!r}")
    if len(above) == len(levels) - 1:
        return [(*above, iterations, loss) for iterations, loss in tree.items()]
    return [leaf for key, below in tree.items() for leaf in _leaves(path, below, (*above, key))]


def _literal(path: str | Path, cells: list, name: str) -> dict:
    """Returns the dictionary that a cell assigns to a name."""
    for cell in cells:
        source = cell.get("source", "") if isinstance(cell, Mapping) else ""
        text = source if isinstance(source, str) else "".join(map(str, source))
        if not isinstance(cell, Mapping) or cell.get("cell_type") != "code" or name not in text:
            continue
        try:
            body = ast.parse(text).body
        except SyntaxError as error:
            raise ValueError(
                f"'{path}': the cell with {name} is no Python: {error.msg}, line {error.lineno}"
            ) from None
        for node in body:
            if isinstance(node, ast.Assign) and name in (
                getattr(x, "id", "") for x in node.targets
            ):
                return _evaluated(path, name, node.value)
    raise ValueError(f"'{path}' has no cell that assigns {name}")


def _evaluated(path: str | Path, name: str, node: ast.expr) -> dict:
    try:
        found = ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError):
        found = None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"'{path}': {name} must be a dictionary written out, with numbers alone")
    return found


def _json(path: str | Path, what: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{what}, '{path}', cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{what}, '{path}', must be text; it is none") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{what}, '{path}', must be JSON: {error.msg}, line {error.lineno}"
        ) from None


def rising(runs: pd.DataFrame) -> pd.Series:
    """Returns which runs have a loss above that of a shorter one with the same size and scheme.

    No length raises the loss of a sound run by itself: these diverged, or were written down wrongly.

    >>> rising(pd.DataFrame({"N": 1, "scheme": "a", "D": [1, 2, 3], "loss": [3.0, 2.0, 2.5]})).tolist()
    [False, False, True]
    """
    ordered = runs.sort_values("D", kind="stable")
    least = ordered.groupby(["N", "scheme"])["loss"].transform(
        lambda losses: losses.cummin().shift(fill_value=math.inf)
    )
    above: Any = ordered["loss"] > least
    return above.reindex(runs.index)

"""The findings of a summary: what was asked and answered."""

import dataclasses

from experiments.gradient_precision import law_answers
from experiments.gradient_precision.law_answers import longest, signed
from experiments.harness.reporting.findings import Finding

_RECIPES = "Does a recipe of few bits lose nothing that the seeds can tell?"
_ORDER = "In which order do the recipes stand?"
_CLAIMED = "Do the recipes stand in the order that their papers give?"
_PARTS = "What does each part of NVIDIA's recipe earn?"
_ROUNDING = "Does another rounding of the gradients lower the loss?"
_ADD = "Do the costs of few forward and of few backward bits add up?"
_NOISE = "Does the gap go with the gradient's bias, with its variance, or with the forward pass?"
_ONCE = "Does one compilation serve all pairs of forward and backward bits?"

# (the better one, the other one, who says so)
_CLAIMS = (
    ("nvfp4_eden_train", "nvfp4_train", "Panferov et al. 2026"),
    ("nvfp4_train", "mxfp4_train", "NVIDIA 2025, of another MXFP4 recipe than Quartet's"),
    ("mxfp8_train", "mxfp8_ocp_train", "Mishra et al. 2025"),
)


def findings(summary: dict) -> list[Finding]:
    """All of them, the recipes first."""
    own = longest(summary["gaps"])
    found = [_recipe(row) for row in own if _is_recipe(row)]
    found += _order(summary["order"]) + _claimed(summary["order"])
    found += [
        signed(_PARTS, row, f"{row['part']}, {_place(row)}", "earns", "costs")
        for row in longest(summary["parts"])
    ]
    found += [
        signed(
            _ROUNDING,
            row,
            f"{row['second']} less {row['first']}, {row['size']}, {row['method']} {row['pair']}",
            "no, it raises it",
            "yes",
        )
        for row in summary["roundings"]
    ]
    found += [
        signed(
            _ADD,
            row,
            f"{row['name']} {row['P_forward']}/{row['P_backward']}",
            "more together",
            "less together",
        )
        for row in summary["additivity"]
    ]
    found += law_answers.findings(summary["laws"])
    found += [_noise(row) for row in longest(summary["noise"])]
    return [*found, *_once(summary["programs"])]


def _place(row: dict) -> str:
    return f"{row['size']} at D/N {row['d_over_n']}"


def _is_recipe(row: dict) -> bool:
    return not row["block"] and not row["part"]


def _recipe(row: dict) -> Finding:
    quantity = f"gap of {row['name']}, {_place(row)}"
    return signed(_RECIPES, row, quantity, "no, it loses", "it gains")


def _order(rows: list[dict]) -> list[Finding]:
    """Neighbours in the order, with the difference between them."""
    found = []
    for place in dict.fromkeys((r["size"], r["d_over_n"]) for r in longest(rows)):
        own = [r for r in rows if (r["size"], r["d_over_n"]) == place]
        # Pairs come ranked: a recipe's first pair as the better one is with its neighbour.
        first = {}
        for row in own:
            first.setdefault(row["first"], row)
        found += [
            signed(
                _ORDER,
                row,
                f"{row['second']} less {row['first']}, {_place(row)}",
                f"{row['first']} is better",
                f"{row['second']} is better",
            )
            for row in first.values()
        ]
    return found


def _claimed(rows: list[dict]) -> list[Finding]:
    """The pairs of recipes of which papers say that one is better: the other's loss less its."""
    found = []
    for better, worse, source in _CLAIMS:
        for row in longest(rows):
            # EDEN's recipe is named by its rotation too.
            pair = [row[k].partition("-h")[0] for k in ("first", "second")]
            if sorted(pair) != sorted((better, worse)):
                continue
            mean, low, high = (row[k] for k in ("mean", "low", "high"))
            if pair[0] == worse:
                mean, low, high = -mean, *(None if x is None else -x for x in (high, low))
            quantity = f"{worse} less {better}, {_place(row)}, as {source}"
            own = row | {"mean": mean, "low": low, "high": high}
            found.append(signed(_CLAIMED, own, quantity, "yes", "no, the reverse"))
    return found


def _noise(row: dict) -> Finding:
    quantity = f"rank correlation with {row['measure']}, {row['of']}, {_place(row)}"
    made = signed(_NOISE, row, quantity, "yes", "the other way", unit="", form="+.2f")
    note = f"{row['arms']} arms; {made.note}".rstrip("; ")
    return dataclasses.replace(made, note=note)


def _once(rows: list[dict]) -> list[Finding]:
    own = [row for row in rows if row["pairs"] > 1]
    return [
        Finding(
            _ONCE,
            f"compilations of each program of {row['arm']}, {row['size']}, for {row['pairs']} pairs",
            "yes" if row["compilations"] == 1 else "no",
            row["compilations"],
            form=".0f",
            null=None,
        )
        for row in own
    ]

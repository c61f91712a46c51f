"""The findings of a summary: what was asked and answered."""

from experiments.gradient_precision import law_answers
from experiments.gradient_precision.law_answers import longest
from experiments.harness.reporting import findings as said
from experiments.harness.reporting.findings import UNRESOLVED, Finding
from experiments.harness.reporting.statistics import is_discovery

_RECIPES = "Does a recipe of few bits lose nothing that the seeds can tell?"
_ORDER = "In which order do the recipes stand?"
_PARTS = "What does each part of NVIDIA's recipe earn?"
_ROUNDING = "Does another rounding of the gradients lower the loss?"
_ADD = "Do the costs of few forward and of few backward bits add up?"
_NOISE = "Does the gap go with the gradient's bias, with its variance, or with the forward pass?"
_ONCE = "Does one compilation serve all pairs of forward and backward bits?"


def findings(summary: dict) -> list[Finding]:
    """All of them, the recipes first."""
    own = longest(summary["gaps"])
    found = [_recipe(row) for row in own if _is_recipe(row)]
    found += _order(summary["order"])
    found += [
        _signed(_PARTS, row, f"{row['part']}, {_place(row)}", "earns", "costs")
        for row in longest(summary["parts"])
    ]
    found += [
        _signed(
            _ROUNDING,
            row,
            f"{row['second']} less {row['first']}, {row['size']}, {row['method']} {row['pair']}",
            "no, it raises it",
            "yes",
        )
        for row in summary["roundings"]
    ]
    found += [
        _signed(
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


def _signed(question: str, row: dict, quantity: str, above: str, below: str, **options) -> Finding:
    """An answer that stands only where it survives the correction for all rows of its table."""
    options = {"unit": "nats", "form": "+.4f"} | options
    note = "" if row["q_value"] is None else f"q = {row['q_value']:.2g}"
    made = said.from_mean(question, quantity, row, above, below, note=note, **options)
    if made.answer != UNRESOLVED and not is_discovery(row["q_value"]):
        note = f"{note}, which does not survive the correction for all of these"
        return Finding(**{**made.__dict__, "answer": UNRESOLVED, "note": note.lstrip(", ")})
    return made


def _recipe(row: dict) -> Finding:
    quantity = f"gap of {row['name']}, {_place(row)}"
    return _signed(_RECIPES, row, quantity, "no, it loses", "it gains")


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
            _signed(
                _ORDER,
                row,
                f"{row['second']} less {row['first']}, {_place(row)}",
                f"{row['first']} is better",
                f"{row['second']} is better",
            )
            for row in first.values()
        ]
    return found


def _noise(row: dict) -> Finding:
    quantity = f"rank correlation with {row['measure']}, {row['of']}, {_place(row)}"
    made = _signed(_NOISE, row, quantity, "yes", "the other way", unit="", form="+.2f")
    note = f"{row['arms']} arms; {made.note}".rstrip("; ")
    return Finding(**{**made.__dict__, "note": note})


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

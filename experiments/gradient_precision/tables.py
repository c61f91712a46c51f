"""The table of this study in the pages, and what they say of it in sentences."""

from experiments.gradient_precision.arms import FULL_BITS
from experiments.harness.reporting.markdown import Phrases, Table, to_markdown
from experiments.harness.reporting.values import bounds

_LAPTOP = "gradient_precision/laptop/summary.json"
_PAGES = ("experiments/README.md", "docs/studies/gradient_precision.md")


def grid(summary: dict) -> str:
    """The gap of each pair of bits by rounding of the gradients, at the longest training."""
    rows = _longest(summary)
    ways = list(dict.fromkeys(row["rounding"] for row in rows))
    found = {(row["pair"], row["rounding"]): row for row in rows}
    pairs = dict.fromkeys(row["pair"] for row in rows)
    head = ["bits forward / backward"]
    for way in ways:
        head += [f"gap, {way}", "bias", "variance"]
    cells = [[pair, *(c for way in ways for c in _cells(found[pair, way]))] for pair in pairs]
    return to_markdown(head, cells)


def _longest(summary: dict) -> list[dict]:
    most = max(row["d_over_n"] for row in summary["gaps"])
    return [row for row in summary["gaps"] if row["d_over_n"] == most]


def _cells(row: dict) -> list[str]:
    """A gap with its interval, and the gradient's relative bias and variance."""
    return [_gap(row), f"{row['bias']:.3f}", f"{row['variance']:.3f}"]


def _gap(row: dict) -> str:
    return bounds(row["mean"], row["low"], row["high"], "+.3f")


def phrases(summary: dict) -> dict[str, list[str]]:
    """Four bits forward beside four bits backward, and what the rounding changes."""
    rows = {(row["pair"], row["rounding"]): row for row in _longest(summary)}
    forward, backward = (rows[p, "nearest"] for p in (f"4/{FULL_BITS}", f"{FULL_BITS}/4"))
    change = next(row for row in summary["roundings"] if row["pair"] == "4/4")
    said = [
        f"Four bits forward cost {_gap(forward)} nats",
        f"four bits backward {_gap(backward)}",
        f"by {bounds(change['mean'], change['low'], change['high'], '+.4f')} at 4/4",
    ]
    return dict.fromkeys(_PAGES, said)


TABLES = {"gradient_precision/grid": Table(_LAPTOP, grid)}
PHRASES = (Phrases(_LAPTOP, phrases),)

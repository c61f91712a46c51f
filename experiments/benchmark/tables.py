"""The tables of this benchmark in the pages: ratios of one run, both sides measured in turn."""

from experiments.benchmark.optimizers import COMPARISONS, MATRIX, STEP, TREE
from experiments.benchmark.report import API_NAMES
from experiments.benchmark.serving import DECODE, FORWARD
from experiments.benchmark.variants import BASELINE
from experiments.harness.reporting.markdown import Phrases, Table, to_markdown
from experiments.harness.reporting.values import bounds

_RECORDS = "benchmark/laptop/summary.json"
_PAGES = ("experiments/README.md", "docs/studies/benchmark.md")
_PARTS = {FORWARD: "forward pass", DECODE: "one token"}
_CONTESTS = {MATRIX: "a matrix", TREE: "the model's parameters", STEP: "a whole train step"}


def steps(result: dict) -> str:
    """Train steps, as ratios to the baseline's in each API."""
    found = {(row["variant"], row["api"]): _ratio(row) for row in result["steps"]}
    variants = dict.fromkeys(row["variant"] for row in result["steps"])
    rows = [
        [variant, *(found.get((variant, api), "") for api in API_NAMES)]
        for variant in variants
        if variant != BASELINE
    ]
    return to_markdown(["step, to float32's", *API_NAMES.values()], rows)


def serving(result: dict) -> str:
    """What is served, as ratios of pairs."""
    rows = [
        [_PARTS[row["part"]], f"{row['ours']} / {row['other']}", _ratio(row)]
        for row in result["serving_pairs"]
    ]
    return to_markdown(["what", "pair", "ratio"], rows)


def optimizers(result: dict) -> str:
    """5 + 4 bits beside every other state: on a matrix, on a tree, and in a whole train step."""
    found = {(row["other"], row["contest"]): _ratio(row) for row in result["optimizer_pairs"]}
    others = dict.fromkeys(row["other"] for row in result["optimizer_pairs"])
    head = ["5 + 4 bits, to the time of", *(_CONTESTS[c] for c in COMPARISONS)]
    rows = [[other, *(found.get((other, c), "") for c in COMPARISONS)] for other in others]
    return to_markdown(head, rows)


def _ratio(row: dict) -> str:
    return bounds(row["median"], row["low"], row["high"], ".2f")


def phrases(result: dict) -> dict[str, list[str]]:
    """Where it was measured, and how often."""
    machine, config = result["machine"], result["config"]
    said = [
        f"{machine['cores']} cores of an {machine['cpu']}",
        f"jax {result['versions']['jax']}",
        f"medians of {config['rounds']} rounds",
    ]
    return dict.fromkeys(_PAGES, said)


TABLES = {
    "benchmark/steps": Table(_RECORDS, steps),
    "benchmark/serving": Table(_RECORDS, serving),
    "benchmark/optimizers": Table(_RECORDS, optimizers),
}
PHRASES = (Phrases(_RECORDS, phrases),)

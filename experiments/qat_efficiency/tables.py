"""The tables of this study in the pages, and what they say of it in sentences."""

from experiments.harness.reporting.markdown import Phrases, Table, to_markdown
from experiments.harness.reporting.values import bounds

_RECORDS = "qat_efficiency/laptop/summary.json"
_PAGES = ("experiments/README.md", "docs/studies/qat_efficiency.md")
_MODELS = {"vision": "ViT, accuracy", "language": "language model, nats a byte"}
_WIDTHS = {"w8a8": "W8A8", "w4a4": "W4A4", "w2a16": "W2A16"}
_METHODS = {"rtn": "rounding to nearest", "gptq": "GPTQ", "hadamard+gptq": "rotated GPTQ"}
_WORDS = {
    "searched": "searched ranges",
    "token": "a scale for each row of activations",
    "lsq": "LSQ",
    "quest": "QuEST",
}


def _best(summary: dict) -> dict[tuple[str, str], dict]:
    """The comparison of the best settings, by model and width."""
    rows = (row for row in summary["comparisons"] if row["scope"] == "best")
    return {(row["model"], row["width"]): row for row in rows}


def gains(summary: dict) -> str:
    """What training gains at each width, with the q-value over all comparisons."""
    best = _best(summary)
    head = ["gain of training over quantizing after training", *_WIDTHS.values()]
    rows = [[said, *(_gain(best[model, w]) for w in _WIDTHS)] for model, said in _MODELS.items()]
    return to_markdown(head, rows)


def _gain(row: dict) -> str:
    return f"{_interval(row)}, q = {row['q']:.2g}"


def _interval(row: dict) -> str:
    return bounds(row["mean"], row["low"], row["high"], "+.4f")


def settings(summary: dict) -> str:
    """The best setting of either side, chosen on other examples than those it is compared on."""
    best = _best(summary)
    rows = [
        [model.partition(",")[0], said, _setting(row["qat"]), _setting(row["ptq"])]
        for key, model in _MODELS.items()
        for width, said in _WIDTHS.items()
        for row in [best[key, width]]
    ]
    return to_markdown(["model", "width", "training", "after training"], rows)


def _setting(name: str) -> str:
    """A setting in words.

    >>> _setting("hadamard+gptq g32 searched token")
    'rotated GPTQ, groups of 32, searched ranges, a scale for each row of activations'
    """
    first, *rest = name.split()
    words = [_METHODS.get(first) or _WORDS[first]]
    words += [f"groups of {w[1:]}" if w not in _WORDS else _WORDS[w] for w in rest]
    return ", ".join(words)


def phrases(summary: dict) -> dict[str, list[str]]:
    """LSQ beside QuEST at W4A4, how many arms hide a lost group, and the line of the README."""
    best = _best(summary)
    lsq = {
        row["model"]: row
        for row in summary["comparisons"]
        if row["scope"] == "lsq" and row["width"] == "w4a4"
    }
    two, four = (best["language", width] for width in ("w2a16", "w4a4"))
    said = [
        f"LSQ is behind at W4A4: {_interval(lsq['language'])} nats a byte",
        f"in {_hidden(summary)} of {_quantized(summary)} quantized arms",
    ]
    gate = f"at W4A4 the language model's gain is {_interval(four)}"
    main = f"at W2A16 {_interval(two)} nats a byte"
    own = {page: [*said, gate] for page in _PAGES}
    return own | {"README.md": [main, gate, f"{four['seeds']} seeds"]}


def _quantized(summary: dict) -> int:
    return sum(row["family"] != "float" for row in summary["arms"])


def _hidden(summary: dict) -> int:
    """Arms with a class that lost where the mean did not."""
    return sum(bool(row["silent"]) for row in summary["arms"] if row["family"] != "float")


TABLES = {
    "qat_efficiency/gains": Table(_RECORDS, gains),
    "qat_efficiency/settings": Table(_RECORDS, settings),
}
PHRASES = (Phrases(_RECORDS, phrases),)

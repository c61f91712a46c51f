"""The table of this study in the pages."""

from experiments.harness.reporting.markdown import Phrases, Table, to_markdown
from experiments.pretrained_quantization.report import change_text

_RECORDS = "pretrained_quantization/laptop/summary.json"
_MODELS = {
    "smollm2": "SmolLM2-135M, bits per byte",
    "minilm": "MiniLM-L6, Spearman on WordSim-353",
    "vit": "ViT on Fashion-MNIST, points",
}
_SHOWN = (
    ("smollm2", "w3 rtn", "W3, round to nearest"),
    ("smollm2", "searched, the bytes of w3", "searched, the same"),
    ("minilm", "w8a8 per token", "W8A8, a scale for each token"),
    ("minilm", "w8a8 per token, broken", "the same, one layer × 1.1"),
    ("vit", "w3 rtn", "W3, round to nearest"),
    ("vit", "searched, the bytes of w3", "searched, the same"),
)


def changes(summary: dict) -> str:
    """What two arms of each model change, and the gate's verdict."""
    by = {(row["model"], row["arm"]): row for row in summary["rows"]}
    rows, seen = [], set()
    for model, arm, said in _SHOWN:
        row = by[model, arm]
        if arm.startswith("searched"):
            said = f"{said} {_size(row['bytes_after'])}"
        name = _MODELS[model]
        if model == "vit":
            name = f"{name}, {len(row['units'])} seeds"
        rows.append(["" if model in seen else name, said, _change(row), row["verdict"]])
        seen.add(model)
    return to_markdown(["model", "arm", "change", "verdict"], rows)


def _change(row: dict) -> str:
    """Percent to a tenth; points without their unit, which stands beside the model."""
    form = ".1f" if row["model"] == "smollm2" else None
    return change_text(row, form).replace(" points", "")


def _size(nbytes: int) -> str:
    """Bytes in words.

    >>> _size(40_400_000), _size(48_123)
    ('40.4 MB', '48 kB')
    """
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.0f} kB"


TABLES = {"pretrained_quantization/laptop": Table(_RECORDS, changes)}
PHRASES: tuple[Phrases, ...] = ()

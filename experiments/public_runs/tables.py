"""The tables of the published runs in the pages, from what was fitted to them.

The runs themselves are others' and are not committed: `report.write` puts the fits apart, in ``fits.json``.
"""

from experiments.harness.reporting.markdown import Phrases, Table, to_markdown
from experiments.harness.reporting.values import bounds
from experiments.public_runs import efficiencies
from experiments.public_runs.analysis import NEAREST, SHARED, TRANSFERRED
from experiments.public_runs.joint import PASSES

_RECORDS = "public_runs/fits.json"
_PAGE = "docs/studies/public_runs.md"
_QUARTET, _BESIDE = "Quartet, ", "QuEST beside Quartet's full precision, "
_HOW = {efficiencies.HELD: "base law held as there", efficiencies.FREE: "all parameters at once"}
_GROWTHS = {
    f"{_QUARTET}{efficiencies.FORWARD}": "Quartet, FP4 forward",
    f"{_QUARTET}{efficiencies.FORWARD}{SHARED}": "the same, 20 to 160 tokens per parameter",
    f"{_QUARTET}{efficiencies.BACKWARD}": "Quartet, FP4 backward, stochastic rounding",
    f"{_QUARTET}BF16/AlbertTsengDeterministic": "Quartet, FP4 backward, to nearest",
    f"{_QUARTET}QuEST/AlbertTsengQuantizer": "Quartet, both",
    f"{_BESIDE}W2A2": "QuEST, 2 bits",
    f"{_BESIDE}W3A3": "QuEST, 3 bits",
    f"{_BESIDE}W4A4": "QuEST, 4 bits",
}
_OURS = {
    NEAREST: "ours, 4 bits",
    f"{NEAREST}{SHARED}": "ours, 4 bits, 20 to 160 tokens per parameter",
    "ours, QuEST, all widths": "ours, all widths, `jq.laws.GAP_ERROR`",
    TRANSFERRED: "our efficiency of 4 bits in Quartet's law of full precision",
}


def efficiency_table(fits: dict) -> str:
    """Published efficiencies beside ours of the same runs."""
    rows = [
        [_efficiency(row), _small(row["published"]), _small(row["value"]), _ends(row, ".3f")]
        for row in fits["efficiencies"]
        if row["published"] is not None
    ]
    return to_markdown(["efficiency", "published", "here", "90 % interval"], rows)


def _small(value: float) -> str:
    return f"{value:{'.4f' if value < 0.1 else '.3f'}}"


def _efficiency(row: dict) -> str:
    name = row["of"].replace(efficiencies.FORWARD, "FP4 forward").replace("1 bits", "1 bit")
    name = name.replace(efficiencies.BACKWARD, "FP4 backward")
    return f"{name}, {_HOW[row['how']]}" if name.startswith(_QUARTET) else name


def growth_table(fits: dict) -> str:
    """How the gap grows in the published runs."""
    found = {row["runs"]: row for row in fits["growths"]}
    rows = [
        [said, str(row["pairs"]), *_exponent(row, "gamma_D"), *_exponent(row, "gamma_N")]
        for said, row in ((said, found[runs]) for runs, said in _GROWTHS.items())
    ]
    head = ["runs", "pairs", "γ_D", "90 % interval", "γ_N", "90 % interval"]
    return to_markdown(head, rows)


def _exponent(row: dict, name: str) -> list[str]:
    return [f"{row[name]:.3f}", _ends({k: row[f"{name} {k}"] for k in ("low", "high")}, ".3f")]


def _ends(row: dict, form: str) -> str:
    return f"{row['low']:{form}} to {row['high']:{form}}"


def law_table(fits: dict) -> str:
    """Laws of forward and backward bits beside each other on Quartet's runs."""
    rows = [
        [
            row["law"],
            str(row["parameters"]),
            f"{row['delta_aicc']:.1f}",
            *(f"{row[name]:.5f}" for name in ("r2", "r2_by_N", "r2_by_D")),
        ]
        for row in fits["laws"]
    ]
    return to_markdown(["law", "parameters", "ΔAICc", "R²", "held out by N", "by D"], rows)


def prediction_table(fits: dict) -> str:
    """What our exponents say of the growth from the least to the largest D of each published size."""
    ratios = fits["ratios"]
    theirs = next(r for r in fits["growths"] if r["runs"] == f"{_QUARTET}{efficiencies.FORWARD}")
    measured = [_ratio((r["measured"], r["low"], r["high"])) for r in ratios]
    exponents = [f"{theirs[name]:.3f}" for name in ("gamma_D", "gamma_N")]
    rows = [["*measured there, FP4 forward*", *exponents, *measured]]
    for row in fits["ours"]:
        if said := _OURS.get(row["runs"]):
            own = [_with_ends(row, name) for name in ("gamma_D", "gamma_N")]
            rows.append([said, *own, *(_ratio(r[row["runs"]]) for r in ratios)])
    return to_markdown(["fitted to", "γ_D", "γ_N", *(r["size"] for r in ratios)], rows)


def _with_ends(row: dict, name: str) -> str:
    value, ends = _exponent(row, name)
    return value if row[f"{name} low"] == row[f"{name} high"] else f"{value} ({ends})"


def _ratio(values: tuple[float, float, float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*values)


def phrases(fits: dict) -> dict[str, list[str]]:
    """The growth that the runs have, and the one that ours would give."""
    theirs = next(r for r in fits["growths"] if r["runs"] == f"{_QUARTET}{efficiencies.FORWARD}")
    ours = next(r for r in fits["ours"] if r["runs"] == f"{NEAREST}{SHARED}")
    d, n = (_bounds(theirs, name) for name in ("gamma_D", "gamma_N"))
    said = [f"γ_D = {d}", f"γ_N = {n}", f"γ_D is {_bounds(ours, 'gamma_D')}"]
    return {_PAGE: [*said, *_law_phrases(fits)]}


def _law_phrases(fits: dict) -> list[str]:
    rows = {p["name"]: p for p in fits["growing"]["parameters"]}
    forward, backward = (rows[f"gamma_D_{x}"] for x in PASSES)
    grown = [bounds(r["value"], r["low"], r["high"], ".3f") for r in (forward, backward)]
    return [
        f"worth {fits['independent']:.1f} independent",
        f"{grown[0]} forward, and {grown[1]} backward",
    ]


def _bounds(row: dict, name: str) -> str:
    return bounds(row[name], row[f"{name} low"], row[f"{name} high"], ".3f")


TABLES = {
    "public_runs/efficiencies": Table(_RECORDS, efficiency_table),
    "public_runs/growth": Table(_RECORDS, growth_table),
    "public_runs/laws": Table(_RECORDS, law_table),
    "public_runs/prediction": Table(_RECORDS, prediction_table),
}
PHRASES = (Phrases(_RECORDS, phrases),)

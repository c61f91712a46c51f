"""The report's sections on the law and on the best split."""

# pandas' selections are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false

import pandas as pd

from experiments.harness.reporting.law_tables import (
    control_text,
    fit_table,
    interval,
    laws_table,
    other_warnings,
)
from experiments.harness.reporting.layout import Section
from experiments.harness.reporting.statistics import CONFIDENCE
from experiments.harness.reporting.values import bounds, number

_PAIRED = (
    "Laws of paired gaps, ranked by AICc of as many pairs as are independent; R² of log(L / L_full)"
)
_RANKED = "Laws of the whole loss, ranked by AICc of as many runs as are independent; R² of log L"


def made(rows: list[dict], text: dict[str, list[str]]) -> list[Section]:
    """Those for which there are grids with several widths in both passes."""
    return [_law(rows, text["Law"]), _split(rows, text["Split"])] if rows else []


def _law(rows: list[dict], text: list[str]) -> Section:
    paragraphs = list(text)
    for row in rows:
        for kind in ("reason", "reason_of_laws"):
            if kind in row:
                paragraphs.append(f"{row['name']}: not fitted: {row[kind]}.")
        if "control" in row:
            paragraphs.append(
                f"**{row['name']}**, {row['runs']} runs, worth {row['independent']:.0f} independent ones. "
                f"{control_text(row['control'])}"
            )
        fits = [row[k] for k in ("gap", "tokens", "quartet") if k in row]
        paragraphs += [
            f"Warning ({f['law']}, {row['name']}): {w}." for f in fits for w in other_warnings(f)
        ]
    tables, folded = [], []
    gaps = {row["name"]: row["gap"] for row in rows if "gap" in row}
    if gaps:
        tables.append((next(iter(gaps.values()))["equation"], fit_table(gaps)))
    for kind, caption in (("paired", _PAIRED), ("laws", _RANKED)):
        ranked = {row["name"]: row[kind] for row in rows if kind in row}
        if ranked:
            tables.append((caption, laws_table(ranked)))
    for kind in ("quartet", "tokens"):
        fits = {row["name"]: row[kind] for row in rows if kind in row}
        if fits:
            folded.append((next(iter(fits.values()))["equation"], fit_table(fits)))
    grown = [_pair(row["name"], pair) for row in rows for pair in row["pairs"]]
    if grown:
        caption = "Each pair of bits alone, least squares on the logarithm of the gap [90 %], p and q of all"
        folded.append((caption, pd.DataFrame(grown)))
    return Section("The law of forward and backward bits", paragraphs, tables, folded=folded)


def _pair(name: str, pair: dict) -> dict:
    shown = {"arm": name, "forward": pair["P_forward"], "backward": pair["P_backward"]}
    shown["runs"] = pair["points"]
    for column in ("D", "N"):
        if column in pair:
            own = pair[column]
            q = f", p {number(own['p_value'], '.2g')}, q {number(own['q_value'], '.2g')}"
            shown[f"γ_{column}"] = interval(own, "+.2f") + q
        else:
            shown[f"γ_{column}"] = f"— ({pair['reason']})" if pair["reason"] else "—"
    return shown


def _split(rows: list[dict], text: list[str]) -> Section:
    fitted = [
        {"arm": row["name"], "N": one["size"], "D/N": one["d_over_n"], "mean bits": one["budget"]}
        | {"P_forward": f"{one['forward']:.2f}"}
        | {"P_backward": bounds(one["backward"], one["low"], one["high"], ".2f")}
        | {"": "" if one["is_inside"] else "beyond the measured widths: not determined"}
        for row in rows
        for one in row.get("split", ())
    ]
    measured = [
        {"arm": row["name"], "N": one["size"], "D/N": one["d_over_n"], "mean bits": one["budget"]}
        | {"best": one["best"], "even": one["even"]}
        | {"gain": bounds(one["mean"], one["low"], one["high"], "+.4f")}
        | {"p": number(one["p_value"], ".2g"), "q": number(one["q_value"], ".2g")}
        for row in rows
        for one in row["measured_split"]
    ]
    tables = []
    if fitted:
        tables.append((f"Where the gap's law is least [{CONFIDENCE:.0%}]", pd.DataFrame(fitted)))
    if measured:
        caption = (
            "The best measured pair, forward/backward, beside the widest even one, gain in nats"
        )
        tables.append((caption, pd.DataFrame(measured)))
    return Section("The best split of bits", text, tables)

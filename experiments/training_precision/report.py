"""The report: findings, tables, and the page that holds them."""

# pandas' selections are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false

import dataclasses
from pathlib import Path

import pandas as pd

from experiments.harness.reporting import findings as said
from experiments.harness.reporting import prose, report
from experiments.harness.reporting.findings import UNRESOLVED, Finding, Published
from experiments.harness.reporting.law_tables import (
    control_text,
    fit_table,
    interval,
    laws_table,
    number,
    other_warnings,
)
from experiments.harness.reporting.layout import Report, Section, method_section
from experiments.harness.reporting.provenance import Source
from experiments.training_precision import figures
from experiments.training_precision.analysis import METHOD_NAMES, runs, summarize, tied
from jaxquant import laws

_BEST = "Are 7 to 8 bits compute-optimal, with all tensors alike?"
_APART = "And with weights, activations and cache apart, by Kumar's own law?"
_ROBUST = "Does training in few bits lower what serving in fewer bits adds?"
_ENTROPY = "Do the fits find the entropy of the source, which is known?"
_KUMAR = Published(7, 8, "Kumar et al. 2024", "more than", "fewer than", tolerance=0.5)
_ANSWERS = {"agrees": "yes", "above": "no", "below": "no"}


def findings(summary: dict) -> list[Finding]:
    """What was asked and answered."""
    fitted = [m for m in summary["methods"] if "optimum" in m]
    apart = {name: s for name, s in summary["separate"].items() if "optimum" in s}
    found = list(map(_best, fitted))
    if not fitted:
        reasons = sorted({m["reason"] for m in summary["methods"]})
        why = f"no law could be fitted: {'; '.join(reasons) or 'no runs'}"
        found.append(Finding(_BEST, "P*", UNRESOLVED, note=why))
    found += [_apart(name, one["optimum"]) for name, one in apart.items()]
    if summary["robustness"]:
        found.append(_robust(summary["robustness"]))
    return found + list(map(_entropy, summary["entropy"]))


def _best(method: dict) -> Finding:
    optimum, free = likeliest(method), method["optimum_free"]
    notes = [f"efficiencies free at each width trained give {free['text']}"]
    if not optimum["is_determined"]:
        notes.insert(0, "not determined by the likelier law")
    if method["control"]["is_rejected"]:
        notes.append("bits shuffled among runs explain as much")
    quantity = f"P*, {METHOD_NAMES[method['method']]}"
    return _optimum(_BEST, quantity, optimum, answer(optimum, free), "; ".join(notes))


def _apart(method: str, optimum: dict) -> Finding:
    note = "" if optimum["is_determined"] else "not determined"
    made = _optimum(_APART, f"P*, {METHOD_NAMES[method]}", optimum, UNRESOLVED, note)
    return dataclasses.replace(made, answer=_ANSWERS.get(made.against, UNRESOLVED))


def _optimum(question: str, quantity: str, optimum: dict, answer: str, note: str) -> Finding:
    ends = ("bits", "low", "high") if optimum["is_determined"] else ()
    values = [optimum[k] for k in ends]
    return Finding(
        question, quantity, answer, *values, unit="bits", null=None, published=_KUMAR, note=note
    )


def likeliest(method: dict) -> dict:
    """The optimum of the likelier law among those that have one at any width."""
    found = {laws.KUMAR_ONE.name: "optimum", laws.PANFEROV.name: "optimum_error"}
    return method[next(found[row["law"]] for row in method["laws"] if row["law"] in found)]


def answer(optimum: dict, free: dict) -> str:
    """Whether 7 to 8 bits are best: where the likelier law says so, and free efficiencies allow it."""
    low, high = optimum["low"], optimum["high"]
    if not optimum["is_determined"] or low is None or free["low"] is None:
        return UNRESOLVED
    if low >= 6.5 and high <= 8.5 and free["low"] <= 8 and free["high"] >= 7:
        return "yes"
    is_elsewhere = (high < 6.5 and free["high"] < 7) or (low > 8.5 and free["low"] > 8)
    return "no" if is_elsewhere else UNRESOLVED


def _robust(rows: list[dict]) -> Finding:
    lower = sum(r["high"] is not None and r["high"] < 0 for r in rows)
    higher = sum(r["low"] is not None and r["low"] > 0 for r in rows)
    counts = {"lower": lower, "higher": higher, UNRESOLVED: len(rows) - lower - higher}
    chance = f"about {len(rows) / 10:.0f} of their 90 % intervals would leave out zero by chance"
    answer = ", ".join(f"{k} in {n}" for k, n in counts.items() if n)
    return Finding(_ROBUST, f"{len(rows)} pairs of widths", answer, note=chance)


def _entropy(row: dict) -> Finding:
    known = Published(row["entropy"], row["entropy"], "of the source", kind="known")
    ends = (None, None) if row["is_held"] else (row["low"], row["high"])
    note = "E sits at its bound: the runs do not tell it" if row["is_held"] else ""
    quantity = f"E, {METHOD_NAMES[row['method']]}"
    made = Finding(
        _ENTROPY, quantity, UNRESOLVED, row["value"], *ends, "nats", ".3g", None, known, note=note
    )
    return dataclasses.replace(made, answer=_ANSWERS.get(made.against, UNRESOLVED))


def to_text(summary: dict) -> str:
    """The findings for a terminal, and how the laws rank."""
    lines = [said.to_text(findings(summary), said.trial_status(summary["trials"]))]
    for method in summary["methods"]:
        for row in method.get("laws", ()):
            lines.append(
                f"  {METHOD_NAMES[method['method']]:17} {row['law']:26} R² {number(row['r2'])}  "
                f"held out by N {number(row['r2_by_N'])}, D {number(row['r2_by_D'])}, "
                f"P {number(row['r2_by_P_w'])}"
            )
    return "\n".join(lines)


_RANKED = "Laws ranked by AICc; R² of the logarithm of the loss"


def _alike_section(methods: list[dict], text: list[str]) -> Section:
    """Laws of runs whose tensors have one width, for all methods together."""
    fitted = {METHOD_NAMES[m["method"]]: m for m in methods if "laws" in m}
    paragraphs = [*text, *_reasons({METHOD_NAMES[m["method"]]: m for m in methods})]
    paragraphs += [
        f"**{k}**, {m['runs']} runs. {control_text(m['control'])}" for k, m in fitted.items()
    ]
    folded = []
    for key, kind in (("fit_error", "Squared errors"), ("fit", "N_eff")):
        fits = {name: m[key] for name, m in fitted.items()}
        paragraphs += _warnings(fits, kind)
        if fits:
            folded.append((f"{kind}: {_equation(fits)}", fit_table(fits)))
    if fitted:
        folded.append((_RANKED, laws_table({k: m["laws"] for k, m in fitted.items()})))
    drawn = [figures.optima(methods)] if fitted else []
    return Section("The best precision, all tensors in one width", paragraphs, (), drawn, folded)


def _laws_section(
    title: str, paragraphs: list[str], found: dict[str, dict], folded: bool = False
) -> Section:
    """Laws of several sets of runs: their fits side by side where they have one form, and their ranks."""
    fits = {name: one["fit"] for name, one in found.items() if "fit" in one}
    said = [*paragraphs, *_reasons(found), *_warnings(fits)]
    ranks = [
        (f"{name}: {_RANKED}", laws_table(one["laws"]))
        for name, one in found.items()
        if "laws" in one
    ]
    same = len({fit["equation"] for fit in fits.values()}) == 1
    tables = [(_equation(fits), fit_table(fits))] if same else []
    if not same:
        tables = [(f"{name}: {fit['equation']}", fit_table(fit)) for name, fit in fits.items()]
    if same:
        ranks = [
            (_RANKED, laws_table({k: one["laws"] for k, one in found.items() if "laws" in one}))
        ]
    return Section(
        title, said, () if folded else tables, folded=[*(tables if folded else ()), *ranks]
    )


def _equation(fits: dict[str, dict]) -> str:
    return next(iter(fits.values()))["equation"]


def _reasons(found: dict[str, dict]) -> list[str]:
    return [f"{k}: not fitted: {one['reason']}." for k, one in found.items() if "reason" in one]


def _warnings(fits: dict[str, dict], kind: str = "") -> list[str]:
    """What concerns no single parameter; the rest stands in the tables, beside the numbers."""
    head = f"{kind}, " if kind else ""
    return [f"Warning ({head}{k}): {w}." for k, fit in fits.items() for w in other_warnings(fit)]


def _serving_section(summary: dict, text: list[str]) -> Section:
    added, unified = summary["post_training"], summary["unified"]
    left = added.get("left_out", 0)
    counts = f" {left} of {left + added['runs']} add nothing and are left out." if left else ""
    found = {"What serving adds": added, "Training and serving in one law": unified}
    return _laws_section("Serving in fewer bits", [f"{' '.join(text)}{counts}"], found, folded=True)


def _losses(table: pd.DataFrame) -> pd.DataFrame:
    parts = pd.concat([tied(table, method) for method in METHOD_NAMES])
    keys = ["size", "method", "d_over_n"]
    shown = parts.pivot_table(index=keys, columns="P_w", values="loss", sort=False)
    shown = shown[sorted(shown.columns)].rename(columns=lambda b: f"{b} bits")
    shown = shown.map(number).reset_index()
    shown["method"] = shown["method"].map(METHOD_NAMES)
    return shown.rename(columns={"size": "N", "d_over_n": "D/N"})


def _robustness_section(rows: list[dict], text: list[str]) -> Section:
    shown = [
        {
            "method": METHOD_NAMES[r["method"]],
            "trained at": r["P"],
            "served at": r["P_post"],
            "δ less δ of 16 bits [90 %]": interval({"value": r["mean"], **r}, "+.4f"),
            "seeds": r["seeds"],
        }
        for r in rows
    ]
    caption = "Loss added by serving, in nats per token"
    title = "Does training in few bits help serving in fewer?"
    return Section(
        title, text, figures=[figures.robustness(rows)], folded=[(caption, pd.DataFrame(shown))]
    )


# What these runs do not vary, so that no fit could tell what it does.
_NOT_FITTED = (
    (
        "Sun et al. 2025, floats",
        "the block that shares a scale: here a channel, of each linear's own length",
    ),
    ("Chen et al. 2025, QAT", "the block that shares a scale"),
    (
        "Quartet",
        "the precision of the gradients' products: here the forward pass alone is quantized",
    ),
    ("precision of the optimizer's state", "bits of the state: the study optimizer_states does"),
)


def _notes() -> Section:
    """Laws that were not fitted, and what of Kumar et al.'s paper is printed otherwise than derived."""
    kumar, without = laws.optimal_precision(laws.KUMAR_2024), _without_biases()
    text = (
        f"Computed from Kumar et al.'s Table 2: P* = {kumar.bits:.2f} with the biases and "
        f"{without:.2f} without."
    )
    unfitted = pd.DataFrame(_NOT_FITTED, columns=["law", "what these runs hold fixed"])
    errata = pd.DataFrame(laws.ERRATA, columns=["of", "printed", "derived"])
    tables = [
        ("Laws that these runs say nothing of", unfitted),
        ("Kumar et al. 2024: printed and derived", errata),
    ]
    return Section("Other laws, and published constants", [text], folded=tables)


def _without_biases() -> float:
    names = laws.KUMAR_UNBIASED.names
    params = {k: v for k, v in laws.KUMAR_2024.params.items() if k in names}
    return laws.optimal_precision(laws.KUMAR_UNBIASED, params).bits


def write(workdir: Path, records: list[dict], expected: int, source: Source | None = None) -> dict:
    """Writes summary, report and figures of the records, and returns the summary.

    Args:
        workdir: where.
        records: of finished trials.
        expected: how many trials the grid has.
        source: of the records.
    """
    summary, table, text = summarize(records, expected), runs(records), prose.read(__file__)
    sections = []
    if not table.empty:
        worth = figures.efficiencies(summary["methods"])
        drawn = [figures.loss_by_bits(table), *([worth] if worth else [])]
        folded = [("Loss in nats per token, means over seeds", _losses(table))]
        sections.append(Section("What bits cost", figures=drawn, folded=folded))
        sections.append(_alike_section(summary["methods"], text["Best precision"]))
    if summary["separate"]:
        apart = {METHOD_NAMES[name]: one for name, one in summary["separate"].items()}
        sections.append(_laws_section("Weights, activations and cache apart", [], apart))
    if summary["post_training"]:
        sections.append(_serving_section(summary, text["Serving"]))
    if summary["robustness"]:
        sections.append(_robustness_section(summary["robustness"], text["Robustness"]))
    measured = method_section(text["Measured"], summary, _settings(summary, records))
    status = said.trial_status(summary["trials"])
    made = Report(
        "Training in few bits",
        findings(summary),
        [*sections, _notes(), measured],
        summary,
        status,
        source,
    )
    return report.write(workdir, made)


def _settings(summary: dict, records: list[dict]) -> list[str]:
    counts = [f"{summary['runs']} runs (trials × lengths)."]
    if not records:
        return counts
    t = records[0]["trial"]
    return [
        *counts,
        f"Data: {t['data']} {t['data_path']} (fingerprint {t['data_fingerprint']}); sequences of "
        f"{t['sequence']} tokens, batches of {t['batch']}; AdamW (0.9, 0.95), weight decay 0.1, clipping "
        f"at 1, peak learning rate {t['peak_lr']}, warm-up, constant, linear cooldown over the last tenth "
        f"of each length; {t['dtype']}.",
    ]

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
from experiments.harness.reporting.statistics import corrected
from experiments.harness.reporting.values import bounds
from experiments.training_precision import figures, robustness
from experiments.training_precision.analysis import summarize
from experiments.training_precision.runs import METHOD_NAMES, runs, tied
from jaxquant import laws

_GROWS = "Does the gap to full precision grow with training?"
_LIKE_N = "Do few bits act like fewer parameters, in the loss that they cost?"
_BEST = "Are 7 to 8 bits compute-optimal, with all tensors alike?"
_COMPUTE = "Does the best precision grow with compute?"
_ROBUST = "Does training weights alone in few bits lower what serving them in fewer costs?"
_ENTROPY = "Do the fits find the entropy of the source, which is known?"
_KUMAR = Published(7, 8, "Kumar et al. 2024", "more than", "fewer than", tolerance=0.5)
_ANSWERS = {"agrees": "yes", "above": "no", "below": "no"}
_CLEAR = 10.0  # of the criterion, for one form to be called likelier than another


def findings(summary: dict) -> list[Finding]:
    """What was asked and answered, in the order of its strength."""
    fitted = [m for m in summary["methods"] if "optima" in m]
    found = [_grows(m, summary) for m in summary["methods"] if _growth(m["gaps"])]
    found += list(map(_like_n, fitted))
    found += [_best(m) for m in fitted if m["optima"]]
    found += [_compute(m) for m in fitted if len(m["optima"]) > 1]
    if not fitted:
        reasons = sorted({m["reason"] for m in summary["methods"]})
        why = f"no law could be fitted: {'; '.join(reasons) or 'no runs'}"
        found.append(Finding(_BEST, "P*", UNRESOLVED, note=why))
    for kind, words in robustness.KINDS.items():
        rows = robustness.selected(summary["robustness"], "weights", kind)
        if rows:
            found.append(_robust(rows, words))
    return found + list(map(_entropy, summary["entropy"]))


def _grows(method: dict, summary: dict) -> Finding:
    found = _growth(method["gaps"])
    row, of_n = found["D"], found["N"]
    answer = UNRESOLVED
    if row["low"] is not None:
        answer = "yes" if row["low"] > 0 else "no" if row["high"] < 0 else UNRESOLVED
    notes = [f"γ_N {bounds(of_n['value'], of_n['low'], of_n['high'], '.2f')}", found["of"]]
    if summary["rates"]:
        notes.append("each at its best learning rate of those tried")
    else:
        notes.append("one learning rate for all widths and lengths of a size")
    if (epochs := summary["most_epochs"]) is not None:
        passes = f"at most {epochs:.2g} passes over the text" if epochs else "every token is fresh"
        notes.append(passes)
    if (late := found.get("late", {})).get("D"):
        own = bounds(*(late["D"][k] for k in ("value", "low", "high")), ".2f")
        notes.append(f"between each size's two longest runs {own}")
    quantity = f"γ_D, {METHOD_NAMES[method['method']]}"
    ends = (row["value"], row["low"], row["high"])
    return Finding(_GROWS, quantity, answer, *ends, note="; ".join(notes))


def _growth(gaps: dict) -> dict:
    """The exponents of all widths together; where no law could be fitted, those of 4 bits."""
    if "fit" in gaps:
        own = {p["name"]: p for p in gaps["fit"]["parameters"]}
        return {"D": own["gamma_D"], "N": own["gamma_N"], "of": "all widths"}
    alone = [w for w in gaps["widths"] if w["P"] == 4 and "D" in w and "N" in w]
    return alone[0] | {"of": "4 bits alone"} if alone else {}


def _like_n(method: dict) -> Finding:
    """Which form the runs obey: a part of N that counts, or a term that is added and grows."""
    lead = method["over_n"]
    quantity = f"AICc of N_eff's laws less that of growing terms, {METHOD_NAMES[method['method']]}"
    note = f"{method['runs']} runs, worth {method['independent']:.0f} independent ones"
    if not method["kept"]:
        return Finding(
            _LIKE_N, quantity, UNRESOLVED, note=f"{note}: too few to tell such laws apart"
        )
    answer = "no" if lead > _CLEAR else "yes" if lead < -_CLEAR else UNRESOLVED
    return Finding(_LIKE_N, quantity, answer, lead, form=".0f", null=None, note=note)


def _best(method: dict) -> Finding:
    """P* at the largest budget that the runs surround."""
    last = method["optima"][-1]
    notes = ["interval: the union over laws that the runs do not tell apart"]
    if not last["is_determined"]:
        notes.insert(0, "not determined")
    if method["control"]["is_rejected"]:
        notes.append("bits shuffled among runs explain as much")
    ends = [last[k] for k in ("bits", "low", "high")] if last["is_determined"] else []
    quantity = f"P* at {last['flops']:.0e} operations, {METHOD_NAMES[method['method']]}"
    note = "; ".join(notes)
    made = Finding(
        _BEST, quantity, UNRESOLVED, *ends, unit="bits", null=None, published=_KUMAR, note=note
    )
    return dataclasses.replace(made, answer=_ANSWERS.get(made.against, UNRESOLVED))


def _compute(method: dict) -> Finding:
    first, last = method["optima"][0], method["optima"][-1]
    is_known = first["is_determined"] and last["is_determined"]
    answer = UNRESOLVED
    if is_known and (first["high"] < last["low"] or last["high"] < first["low"]):
        answer = "yes" if first["high"] < last["low"] else "no"
    note = f"from {first['text']} at {first['flops']:.0e} to {last['text']} at {last['flops']:.0e}"
    change = last["bits"] - first["bits"] if is_known else None
    quantity = f"change of P*, {METHOD_NAMES[method['method']]}"
    return Finding(_COMPUTE, quantity, answer, change, unit="bits", form="+.2f", note=note)


def _robust(rows: list[dict], words: str) -> Finding:
    found = robustness.counts(rows)
    counts = {"lower": found["lower"], "higher": found["higher"], UNRESOLVED: found["not"]}
    answer = ", ".join(f"{k} in {n}" for k, n in counts.items() if n)
    note = "Benjamini and Hochberg's q-values at 0.1"
    return Finding(_ROBUST, f"{words}, {len(rows)} pairs of widths", answer, note=note)


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


_RANKED = "Laws ranked by AICc of as many runs as are independent; R² of the logarithm of the loss"


def _gaps_section(summary: dict, text: list[str]) -> Section:
    """How gaps grow: of each method by one law, and at each width alone."""
    fitted = {
        METHOD_NAMES[m["method"]]: m["gaps"]["fit"]
        for m in summary["methods"]
        if "fit" in m["gaps"]
    }
    tables = [(_equation(fitted), fit_table(fitted))] if fitted else []
    rows = [
        {"method": METHOD_NAMES[m["method"]], "P": w["P"], "runs": w["points"]}
        | {f"γ_{x}": _exponent(w, x) for x in ("D", "N")}
        for m in summary["methods"]
        for w in m["gaps"]["widths"]
    ]
    caption = "At each width alone, least squares on the logarithm of the gap [90 %], p and q"
    q_values = iter(
        corrected([w[x]["p_value"] for w in _widths(summary) for x in ("D", "N") if x in w])
    )
    for row, w in zip(rows, _widths(summary), strict=True):
        for x in ("D", "N"):
            if x in w:
                p, q = number(w[x]["p_value"], ".2g"), number(next(q_values), ".2g")
                row[f"γ_{x}"] += f", p {p}, q {q}"
    folded = [(caption, pd.DataFrame(rows))] if rows else []
    return Section("How the gap to full precision grows", text, tables, folded=folded)


def _widths(summary: dict) -> list[dict]:
    return [w for m in summary["methods"] for w in m["gaps"]["widths"]]


def _exponent(width: dict, column: str) -> str:
    if column not in width:
        return f"— ({width['reason']})" if width["reason"] else "—"
    return interval(width[column], ".2f")


def _rates_section(rows: list[dict]) -> Section:
    table = pd.DataFrame(rows).assign(method=lambda t: t["method"].map(METHOD_NAMES))
    keys = ["size", "method", "P", "d_over_n"]
    shown = table.pivot_table(index=keys, columns="peak_lr", values="loss", sort=False)
    shown = shown[sorted(shown.columns)].rename(columns=lambda r: f"{r:g}")
    shown = shown.map(number).reset_index().rename(columns={"size": "N", "d_over_n": "D/N"})
    return Section("Learning rates", [], [("Loss by peak learning rate, means over seeds", shown)])


def _alike_section(methods: list[dict], text: list[str]) -> Section:
    """Laws of runs whose tensors have one width, for all methods together."""
    fitted = {METHOD_NAMES[m["method"]]: m for m in methods if "laws" in m}
    paragraphs = [*text, *_reasons({METHOD_NAMES[m["method"]]: m for m in methods})]
    paragraphs += [
        f"**{k}**, {m['runs']} runs, worth {m['independent']:.0f} independent ones. "
        f"{control_text(m['control'])}"
        for k, m in fitted.items()
    ]
    paragraphs += [f"Warning ({k}): {w}." for k, m in fitted.items() for w in m["warnings"]]
    folded = []
    for law in (laws.GROWING_ERROR, laws.GROWING_ONE, laws.KUMAR_ONE):
        fits = {name: m["fits"][law.name] for name, m in fitted.items()}
        paragraphs += _warnings(fits, law.name)
        if fits:
            folded.append((f"{law.name}: {_equation(fits)}", fit_table(fits)))
    tables = []
    if any(m["optima"] for m in fitted.values()):
        tables = [("P* in bits by compute [90 %]", _optima_table(fitted))]
    if fitted:
        folded.append((_RANKED, laws_table({k: m["laws"] for k, m in fitted.items()})))
    drawn = [figures.optima(methods)] if tables else []
    return Section(
        "The best precision, all tensors in one width", paragraphs, tables, drawn, folded
    )


def _optima_table(fitted: dict[str, dict]) -> pd.DataFrame:
    rows: dict[float, dict] = {}
    for name, method in fitted.items():
        for one in method["optima"]:
            rows.setdefault(one["flops"], {})[name] = one["text"]
    names = [name for name, m in fitted.items() if m["optima"]]
    return pd.DataFrame(
        [
            {"operations": f"{c:.0e}"} | {n: row.get(n, "—") for n in names}
            for c, row in sorted(rows.items())
        ]
    )


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
            "few bits in": robustness.TENSORS[r["tensors"]],
            "method": METHOD_NAMES[r["method"]],
            "trained at": r["P"],
            "served at": r["P_post"],
            "change of": robustness.KINDS[r["kind"]],
            "less that of 16 bits [90 %]": interval({"value": r["mean"], **r}, "+.4f"),
            "p": number(r["p_value"], ".2g"),
            "q": number(r["q_value"], ".2g"),
            "seeds": r["seeds"],
        }
        for r in rows
    ]
    caption = "Differences in nats per token; q of all pairs with the same tensors and loss"
    title = "Does training in few bits help serving in fewer?"
    drawn = [
        figures.robustness(own, words)
        for kind, words in robustness.KINDS.items()
        if (own := robustness.selected(rows, "weights", kind))
    ]
    return Section(title, text, figures=drawn, folded=[(caption, pd.DataFrame(shown))])


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
        sections.append(_gaps_section(summary, text["Gaps"]))
        sections.append(_alike_section(summary["methods"], text["Best precision"]))
    if summary["separate"]:
        apart = {METHOD_NAMES[name]: one for name, one in summary["separate"].items()}
        sections.append(_laws_section("Weights, activations and cache apart", [], apart))
    if summary["post_training"]:
        sections.append(_serving_section(summary, text["Serving"]))
    if summary["robustness"]:
        sections.append(_robustness_section(summary["robustness"], text["Robustness"]))
    if summary["rates"]:
        sections.append(_rates_section(summary["rates"]))
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
    rates = ", ".join(f"{r:g}" for r in sorted({r["trial"]["peak_lr"] for r in records}))
    return [
        *counts,
        f"Data: {t['data']} {t['data_path']} (fingerprint {t['data_fingerprint']}); sequences of "
        f"{t['sequence']} tokens, batches of {t['batch']}; AdamW (0.9, 0.95), weight decay 0.1, clipping "
        f"at 1, peak learning rate {rates}, warm-up, constant, linear cooldown over the last tenth "
        f"of each length; {t['dtype']}.",
    ]

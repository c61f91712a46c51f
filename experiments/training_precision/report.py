"""The report: the finding in words, tables, and the page that holds it all."""

# pandas' selections are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false

from pathlib import Path

import pandas as pd

from experiments.harness.reporting import report
from experiments.harness.reporting.law_tables import (
    control_text,
    fit_table,
    interval,
    laws_table,
    number,
)
from experiments.training_precision import figures
from experiments.training_precision.analysis import METHOD_NAMES, runs, summarize, tied
from jaxquant import laws


def verdict(summary: dict) -> str:
    """The finding in a few sentences."""
    trials, said = summary["trials"], []
    if trials["finished"] < trials["expected"]:
        said.append(f"{trials['finished']} of {trials['expected']} trials are finished.")
    if trials["diverged"]:
        said.append(f"{len(trials['diverged'])} runs diverged and are left out.")
    fitted = [m for m in summary["methods"] if "optimum" in m]
    if not fitted:
        reasons = sorted({m["reason"] for m in summary["methods"]})
        return " ".join([*said, f"No law could be fitted: {'; '.join(reasons) or 'no runs'}."])
    parts = [
        f"{METHOD_NAMES[m['method']]} {_likeliest(m)['text']} ({m['optimum_free']['text']})"
        for m in fitted
    ]
    said.append(
        "Compute-optimal bits with 90 % intervals, all tensors alike, by the likelier of N_eff's law and "
        f"that of squared errors (and by efficiencies free at each width trained): {'; '.join(parts)}."
    )
    said.append(f"Kumar et al. report 7 to 8; here {_holds(fitted)}.")
    apart = {
        METHOD_NAMES[name]: found["optimum"]["text"]
        for name, found in summary["separate"].items()
        if "optimum" in found
    }
    if apart:
        each = "; ".join(f"{name} {text}" for name, text in apart.items())
        said.append(f"By Kumar's own law, over tensors apart as well: {each}.")
    return " ".join(said)


def _likeliest(method: dict) -> dict:
    """The optimum of the likelier law among those that have one at any width."""
    found = {laws.KUMAR_ONE.name: "optimum", laws.PANFEROV.name: "optimum_error"}
    return method[next(found[row["law"]] for row in method["laws"] if row["law"] in found)]


def _holds(fitted: list[dict]) -> str:
    """Whether 7 to 8 bits are best here: where the likelier law says so, and free efficiencies allow it."""
    names: dict[str, list[str]] = {"hold": [], "do not": [], "are not settled": []}
    for m in fitted:
        names[_answer(_likeliest(m), m["optimum_free"])].append(METHOD_NAMES[m["method"]])
    words = {
        "hold": "they hold for",
        "do not": "they do not for",
        "are not settled": "these runs do not settle it for",
    }
    return "; ".join(f"{words[k]} {', '.join(v)}" for k, v in names.items() if v)


def _answer(optimum: dict, free: dict) -> str:
    low, high = optimum["low"], optimum["high"]
    if not optimum["is_determined"] or low is None or free["low"] is None:
        return "are not settled"
    if low >= 6.5 and high <= 8.5 and free["low"] <= 8 and free["high"] >= 7:
        return "hold"
    is_elsewhere = (high < 6.5 and free["high"] < 7) or (low > 8.5 and free["low"] > 8)
    return "do not" if is_elsewhere else "are not settled"


def to_text(summary: dict) -> str:
    """The finding for a terminal."""
    lines = [verdict(summary)]
    for method in summary["methods"]:
        for row in method.get("laws", ()):
            lines.append(
                f"  {METHOD_NAMES[method['method']]:17} {row['law']:26} R² {number(row['r2'])}  "
                f"held out by N {number(row['r2_by_N'])}, D {number(row['r2_by_D'])}, "
                f"P {number(row['r2_by_P_w'])}"
            )
    return "\n".join(lines)


def _method_section(method: dict) -> report.Section:
    name = METHOD_NAMES[method["method"]]
    title = f"Laws: {name}, all tensors in one width"
    if "reason" in method:
        return report.Section(title, [f"Not fitted: {method['reason']}."])
    paragraphs = [
        f"{method['runs']} runs. P* = {method['optimum']['text']} by N_eff, "
        f"{method['optimum_error']['text']} by squared errors, and {method['optimum_free']['text']} by free "
        "efficiencies, among the widths trained.",
        control_text(method["control"]),
        *(f"Warning, N_eff: {text}." for text in method["fit"]["warnings"]),
        *(f"Warning, squared errors: {text}." for text in method["fit_error"]["warnings"]),
    ]
    tables = [
        ("Ranked by AICc; R² of the logarithm of the loss", laws_table(method["laws"])),
        (method["fit"]["equation"], fit_table(method["fit"])),
        (method["fit_error"]["equation"], fit_table(method["fit_error"])),
    ]
    return report.Section(title, paragraphs, tables)


def _separate_section(method: str, separate: dict) -> report.Section:
    title = f"Weights, activations and cache apart: {METHOD_NAMES[method]}"
    if "reason" in separate:
        return report.Section(title, [f"Not fitted: {separate['reason']}."])
    paragraphs = [
        f"{separate['fit']['runs']} runs. P* = {separate['optimum']['text']}.",
        *(f"Warning: {text}." for text in separate["fit"]["warnings"]),
    ]
    tables = [
        ("Ranked by AICc; R² of the logarithm of the loss", laws_table(separate["laws"])),
        (separate["fit"]["equation"], fit_table(separate["fit"])),
    ]
    return report.Section(title, paragraphs, tables)


def _served_section(title: str, text: str, found: dict) -> report.Section:
    """A law of what serving adds, or of loss as served."""
    if "reason" in found:
        return report.Section(title, [text, f"Not fitted: {found['reason']}."])
    if found.get("left_out"):
        text += f" {found['left_out']} of {found['left_out'] + found['runs']} add nothing and are left out."
    warnings = [f"Warning: {w}." for w in found["fit"]["warnings"]]
    tables = [
        ("Ranked by AICc; R² of the logarithm", laws_table(found["laws"])),
        (found["fit"]["equation"], fit_table(found["fit"])),
    ]
    return report.Section(title, [text, *warnings], tables)


def _losses(table: pd.DataFrame) -> pd.DataFrame:
    parts = pd.concat([tied(table, method) for method in METHOD_NAMES])
    keys = ["size", "method", "d_over_n"]
    shown = parts.pivot_table(index=keys, columns="P_w", values="loss", sort=False)
    shown = shown[sorted(shown.columns)].rename(columns=lambda b: f"{b} bits")
    shown = shown.map(number).reset_index()
    shown["method"] = shown["method"].map(METHOD_NAMES)
    return shown.rename(columns={"size": "N", "d_over_n": "D/N"})


def _robustness_section(rows: list[dict]) -> report.Section:
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
    lower = [r for r in rows if r["high"] is not None and r["high"] < 0]
    higher = [r for r in rows if r["low"] is not None and r["low"] > 0]
    text = (
        "Kumar et al. claim that training in few bits makes a model more robust to quantization afterwards. "
        f"Of {len(rows)} pairs of widths, what serving adds is lower in {len(lower)}, higher in "
        f"{len(higher)}, and "
        f"unresolved in {len(rows) - len(lower) - len(higher)}. Of so many intervals at 90 % about "
        f"{len(rows) / 10:.0f} would leave out zero by chance. What is more robust is worse to begin with: "
        "the first table has the losses before."
    )
    tables = [("Loss added by serving, in nats per token", pd.DataFrame(shown))] if shown else []
    return report.Section("Does training in few bits help serving in fewer?", [text], tables)


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


def _not_fitted() -> report.Section:
    table = pd.DataFrame(_NOT_FITTED, columns=["law", "what these runs hold fixed"])
    return report.Section("Laws that these runs say nothing of", tables=[("not fitted", table)])


def _errata() -> report.Section:
    table = pd.DataFrame(laws.ERRATA, columns=["of", "printed", "derived"])
    kumar, without = laws.optimal_precision(laws.KUMAR_2024), _without_biases()
    text = (
        f"Computed from Table 2: P* = {kumar.bits:.2f} with the biases and {without:.2f} without."
    )
    return report.Section("Printed and derived", [text], [("Kumar et al. 2024", table)])


def _without_biases() -> float:
    names = laws.KUMAR_UNBIASED.names
    params = {k: v for k, v in laws.KUMAR_2024.params.items() if k in names}
    return laws.optimal_precision(laws.KUMAR_UNBIASED, params).bits


def write(workdir: Path, records: list[dict], expected: int) -> dict:
    """Writes summary, report and figures of the records, and returns the summary.

    Args:
        workdir: where.
        records: of finished trials.
        expected: how many trials the grid has.
    """
    summary, table = summarize(records, expected), runs(records)
    sections = []
    if not table.empty:
        worth = figures.efficiencies(summary["methods"])
        sections.append(
            report.Section(
                "What bits cost",
                tables=[("Loss in nats per token, means over seeds", _losses(table))],
                figures=[figures.loss_by_bits(table), *([worth] if worth else [])],
            )
        )
    sections += map(_method_section, summary["methods"])
    sections += [_separate_section(*item) for item in summary["separate"].items()]
    if summary["post_training"]:
        text = "Weights of models trained in 16 bits, straight-through, served in fewer (rounded to nearest)."
        sections.append(
            _served_section("What serving in fewer bits adds", text, summary["post_training"])
        )
        text = (
            "Models of one width, straight-through, served at that width or below: loss as served."
        )
        sections.append(
            _served_section("Training and serving in one law", text, summary["unified"])
        )
    if summary["robustness"]:
        sections.append(_robustness_section(summary["robustness"]))
    if summary["entropy"]:
        sections.append(_entropy_section(summary["entropy"]))
    sections += [_not_fitted(), _errata(), _method(summary, records)]
    report.write(workdir, "Training in few bits", verdict(summary), sections, summary)
    return summary


def _entropy_section(rows: list[dict]) -> report.Section:
    shown = [
        {
            "method": METHOD_NAMES[r["method"]],
            "entropy": f"{r['entropy']:.4f}",
            "E [90 %]": interval(r),
        }
        for r in rows
    ]
    text = (
        "The source's entropy is known exactly: a law that is right, and runs that tell, would find it. "
        "Where E sits at its bound, they do not tell it."
    )
    return report.Section(
        "Is E found where it is known?", [text], [("nats per token", pd.DataFrame(shown))]
    )


_METHOD = (
    "Measured: the loss is the mean cross-entropy per token over the same held-out windows, with the "
    "forward pass "
    "as it was trained. Simulated: operands of the blocks' linears, and keys and values, are rounded to "
    "their grids "
    "and multiplied in floating point, forward alone; weights share a scale for each output channel, "
    "activations for "
    "each tensor (for each window in evaluation), keys and values for each token and head. LSQ learns both "
    "scales, "
    "started from the first batch. QuEST rotates blocks by Hadamard's matrix. Floats of 4, 6, 8 and 16 "
    "bits are E2M1, "
    "E3M2, E4M3 and E5M10. Fitted: Huber's loss on log L (δ = 1e-3) from many starts, while R² and AICc are "
    "of squared "
    "residuals, so that a law with more parameters can have a smaller R²; intervals are of 200 bootstraps "
    "over trunks, since lengths of one run share a trunk. Bits at 16 stand for full precision. One peak rate "
    "serves all widths."
)


def _method(summary: dict, records: list[dict]) -> report.Section:
    trials = summary["trials"]
    paragraphs = [
        _METHOD,
        f"{trials['finished']} of {trials['expected']} trials finished, {len(trials['diverged'])} diverged; "
        f"{summary['runs']} runs (trials × lengths).",
        "Versions: "
        + "; ".join(", ".join(f"{k} {v}" for k, v in one.items()) for one in summary["versions"])
        + ".",
    ]
    if records:
        t = records[0]["trial"]
        paragraphs.insert(
            2,
            f"Data: {t['data']} {t['data_path']} (fingerprint {t['data_fingerprint']}); sequences of "
            f"{t['sequence']} "
            f"tokens, batches of {t['batch']}; AdamW (0.9, 0.95), weight decay 0.1, clipping at 1, peak "
            "learning rate "
            f"{t['peak_lr']}, warm-up, constant, linear cooldown over the last tenth of each length; "
            f"{t['dtype']}.",
        )
    return report.Section("How this was measured", paragraphs)

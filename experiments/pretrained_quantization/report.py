"""The report: what each arm costs, in tables, one figure, and words."""

# pandas' selections and groups, and Altair's layers, are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import scipy.stats

from experiments.harness.reporting import report

_LEVEL = 0.9
_NAMES = {"smollm2": "SmolLM2-135M", "minilm": "MiniLM-L6", "vit": "vision transformer"}


def rows_of(records: list[dict]) -> list[dict]:
    """One row for each model and arm: the change that quantization makes, with its interval.

    The language model's is of bits per byte in percent, paired over windows; the encoder's of its correlation
    with people's judgements, by bootstrap over pairs; the vision transformer's of accuracy in points, paired
    over seeds, or over images where there is one seed.
    """
    rows = []
    for key in dict.fromkeys((r["trial"]["model"], r["trial"]["arm"]) for r in records):
        group = [r for r in records if (r["trial"]["model"], r["trial"]["arm"]) == key]
        change, low, high = {"smollm2": _bits, "minilm": _agreement, "vit": _accuracy}[key[0]](
            group
        )
        verdicts = sorted({r["verdict"] for r in group})
        rows.append(
            {
                "model": key[0],
                "arm": key[1],
                "change": change,
                "low": low,
                "high": high,
                "units": _units(key[0], group),
                "divergence": _divergence(key[0], group),
                "values": _values(key[0], group),
                "bytes_before": group[0]["bytes"]["before"],
                "bytes_after": group[0]["bytes"]["after"],
                "verdict": " / ".join(verdicts),
                "few": " / ".join(sorted({r["few"]["verdict"] for r in group})),
                "reason": group[0]["reasons"][0] if group[0]["reasons"] else "",
            }
        )
    return rows


def _units(model: str, group: list[dict]) -> list[float]:
    """The quantized model's figure for each window or seed, so that arms can be paired."""
    if model == "smollm2":
        return list(group[0]["bits_per_byte"]["quantized"])
    if model == "vit":
        ordered = sorted(group, key=lambda r: r["trial"]["seed"])
        return [100 * r["accuracy"]["quantized"] for r in ordered]
    return []


def _divergence(model: str, group: list[dict]) -> list[float]:
    """Mean KL divergence from the model, nats, for each seed."""
    if model != "vit":
        return []
    ordered = sorted(group, key=lambda r: r["trial"]["seed"])
    return [r["report"]["kl"]["mean"]["estimate"] for r in ordered]


def _values(model: str, group: list[dict]) -> dict[str, float]:
    if model == "smollm2":
        bits = group[0]["bits_per_byte"]
        return {k: float(np.mean(v)) for k, v in bits.items()}
    if model == "vit":
        return {k: float(np.mean([r["accuracy"][k] for r in group])) for k in group[0]["accuracy"]}
    found = group[0]["agreement"]
    return {f"{name} {k}": v for name, pair in found.items() for k, v in pair.items()}


def _bits(group: list[dict]) -> tuple[float, float, float]:
    reference, found = (np.array(group[0]["bits_per_byte"][k]) for k in ("reference", "quantized"))
    return _interval(100 * (found - reference) / reference.mean())


def _agreement(group: list[dict]) -> tuple[float, float, float]:
    judged = group[0]["report"]["judgments"]["spearman_difference"]
    return judged["estimate"], judged["low"], judged["high"]


def _accuracy(group: list[dict]) -> tuple[float, float, float]:
    changes = [100 * (r["accuracy"]["quantized"] - r["accuracy"]["reference"]) for r in group]
    if len(changes) > 1:
        return _interval(np.array(changes))
    found = group[0]["report"]["accuracy_difference"]
    return tuple(100 * found[k] for k in ("estimate", "low", "high"))


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    """A mean with its t-interval."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = (
        scipy.stats.t.ppf(0.5 + _LEVEL / 2, len(values) - 1)
        * values.std(ddof=1)
        / len(values) ** 0.5
    )
    return mean, float(mean - half), float(mean + half)


def findings(rows: list[dict]) -> list[str]:
    """What was found, whichever way it went."""
    found = []
    by = {(row["model"], row["arm"]): row for row in rows}
    rtn, gptq = by.get(("smollm2", "w3 rtn")), by.get(("smollm2", "w3 gptq"))
    if rtn and gptq:
        share = 1 - gptq["change"] / rtn["change"]
        found.append(
            f"At 3 bits per channel GPTQ closes {100 * share:.0f} % of the gap that rounding to nearest "
            "leaves in SmolLM2's bits per byte."
        )
    best = [by[k] for k in by if k[0] == "smollm2" and k[1].startswith("w8a8")]
    if len(best) > 1:
        least = min(best, key=lambda row: row["change"])
        worst = max(best, key=lambda row: row["change"])
        found.append(
            f"Of the ways to W8A8 in SmolLM2, “{least['arm']}” costs {least['change']:+.2f} %, "
            f"“{worst['arm']}” {worst['change']:+.2f} %."
        )
    for model in ("smollm2", "vit"):
        uniform = by.get((model, "w3 rtn"))
        searched = by.get((model, "searched, the bytes of w3"))
        if uniform and searched:
            found.append(_beats(model, searched, uniform))
    for row in rows:
        if "broken" in row["arm"]:
            found.append(
                f"The gate says “{row['verdict']}” of {_NAMES[row['model']]} with one layer × 1.1."
            )
    few = {row["few"] for row in rows}
    if few:
        found.append(f"On 50 examples alone it says: {', '.join(sorted(few))}.")
    return found


def _beats(model: str, searched: dict, uniform: dict) -> str:
    """Whether the search is better than one width for all, paired over windows or seeds."""
    gain = np.array(searched["units"]) - np.array(uniform["units"])
    gain = -gain if model == "smollm2" else gain  # fewer bits per byte are better
    mean, low, high = _interval(gain)
    unit = "bits per byte fewer" if model == "smollm2" else "points more"
    if not math.isfinite(low):
        said = "does better than" if mean > 0 else "does worse than"
        said = said if mean else "is not told from"
    else:
        said = "beats" if low > 0 else "loses to" if high < 0 else "is not told from"
    text = (
        f"For {_NAMES[model]} the search {said} 3 bits everywhere, at {searched['bytes_after']:,} against "
        f"{uniform['bytes_after']:,} bytes: {mean:+.3f} {unit} ({_limits(low, high)})."
    )
    if searched["divergence"]:
        gain = np.array(uniform["divergence"]) - np.array(searched["divergence"])
        mean, low, high = _interval(gain)
        text += (
            f" What it minimises, the mean KL divergence from the model, is {mean:+.4f} nats less"
            f" ({_limits(low, high)})."
        )
    return text


def _limits(low: float, high: float) -> str:
    if not math.isfinite(low):
        return "one seed, no interval"
    return f"90 % interval {low:+.4f} to {high:+.4f}"


def _shown(row: dict) -> str:
    unit = {"smollm2": " %", "minilm": "", "vit": " points"}[row["model"]]
    digits = 4 if row["model"] == "minilm" else 2
    text = f"{row['change']:+.{digits}f}{unit}"
    if math.isfinite(row["low"]):
        text += f" [{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]"
    return text


def to_text(summary: dict) -> str:
    """The findings for a terminal."""
    lines = [
        f"{summary['trials']['finished']} of {summary['trials']['expected']} trials are finished."
    ]
    lines += summary["findings"] + [""]
    for row in summary["rows"]:
        row = row | {k: math.nan if row[k] is None else row[k] for k in ("low", "high")}
        lines.append(f"  {row['model']:>8}  {row['arm']:<30} {_shown(row):<34} {row['verdict']}")
    return "\n".join(lines)


def _table(rows: list[dict], model: str) -> pd.DataFrame:
    chosen = [row for row in rows if row["model"] == model]
    return pd.DataFrame(
        [
            {
                "arm": row["arm"],
                **{k: f"{v:.4f}" for k, v in row["values"].items()},
                "change, 90 % interval": _shown(row),
                "bytes, before": row["bytes_before"],
                "after": row["bytes_after"],
                "verdict (99 %)": row["verdict"],
                "on 50 examples": row["few"],
            }
            for row in chosen
        ]
    )


def _figure(rows: list[dict], model: str) -> report.Figure:
    chosen = pd.DataFrame([row for row in rows if row["model"] == model and row["bytes_after"]])
    title = {"smollm2": "bits per byte, %", "minilm": "Spearman's ρ", "vit": "accuracy, points"}[
        model
    ]
    base = alt.Chart(chosen).encode(
        x=alt.X("bytes_after:Q", title="bytes of quantized weights, scales included"),
        color=alt.Color("arm:N", title=None),
    )
    points = base.mark_point(filled=True, size=70).encode(
        y=alt.Y("change:Q", title=f"change of {title}"), tooltip=["arm", "change", "verdict"]
    )
    bars = base.mark_rule().encode(y="low:Q", y2="high:Q")
    return report.Figure(
        f"{model}_change",
        f"{_NAMES[model]}: what bytes cost",
        "Each point is a way to quantize; lines are 90 % intervals of the paired change.",
        [(bars + points).properties(title=_NAMES[model])],
    )


def write(workdir: Path, records: list[dict], expected: int) -> dict:
    """Writes the report of these records, and returns the summary."""
    rows = rows_of(records)
    clean: list[dict[str, Any]] = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in rows
    ]
    summary = {
        "study": "pretrained_quantization",
        "trials": {"finished": len(records), "expected": expected},
        "findings": findings(rows),
        "rows": clean,
    }
    sections = [
        report.Section(
            _NAMES[model],
            _notes(model),
            [("Each row is paired with the model in floating point.", _table(rows, model))],
            [_figure(rows, model)]
            if any(r["bytes_after"] for r in rows if r["model"] == model)
            else [],
        )
        for model in dict.fromkeys(row["model"] for row in rows)
    ]
    lead = " ".join(summary["findings"]) or "No trial is finished yet."
    report.write(Path(workdir), "What quantizing real models costs", lead, sections, summary)
    return summary


def _notes(model: str) -> list[str]:
    if model == "smollm2":
        return [
            "The shipped Q4_1 reference: its linear layers already lie on a 4-bit grid in groups of 32, "
            "so rows on weights are about fewer bits or coarser groups than those. Windows are of text from "
            "2000 on; methods are calibrated on earlier ones. The embedding, tied to the head, is float."
        ]
    if model == "minilm":
        return [
            "Changes are of Spearman's ρ on WordSim-353, with a bootstrap over pairs. Embedding tables stay "
            "in floating point. The broken arm is an honest W8A8 with one layer's scales multiplied by 1.1, "
            "judged against the honest one."
        ]
    return ["Patches and head stay in floating point."]

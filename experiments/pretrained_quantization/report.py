"""The report: what each arm costs, as findings, tables and figures."""

# pandas' selections and groups, and Altair's layers, are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd

from experiments.harness.reporting import findings as said
from experiments.harness.reporting import prose, report
from experiments.harness.reporting.charts import Scale, reference, with_intervals
from experiments.harness.reporting.findings import Finding
from experiments.harness.reporting.layout import Figure, Report, Section, method_section
from experiments.harness.reporting.provenance import Source
from experiments.harness.reporting.statistics import Bounds, t_interval
from experiments.harness.reporting.values import is_missing, versions_of
from jaxquant.artifacts.plain import plain

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


def _bits(group: list[dict]) -> Bounds:
    reference, found = (np.array(group[0]["bits_per_byte"][k]) for k in ("reference", "quantized"))
    return t_interval(100 * (found - reference) / reference.mean())


def _agreement(group: list[dict]) -> Bounds:
    judged = group[0]["report"]["judgments"]["spearman_difference"]
    return judged["estimate"], judged["low"], judged["high"]


def _accuracy(group: list[dict]) -> Bounds:
    changes = [100 * (r["accuracy"]["quantized"] - r["accuracy"]["reference"]) for r in group]
    if len(changes) > 1:
        return t_interval(np.array(changes))
    found = group[0]["report"]["accuracy_difference"]
    return tuple(100 * found[k] for k in ("estimate", "low", "high"))


_GPTQ = "How much of the gap that rounding to nearest leaves does GPTQ close at 3 bits per channel?"
_WAYS = "What do the ways to W8A8 cost in SmolLM2?"
_SEARCH = "Does a search beat 3 bits everywhere, at the same bytes?"
_GATE = "What does the gate say of a model with one layer × 1.1?"
_FEW = "What does the gate say on 50 examples alone?"


def findings(rows: list[dict]) -> list[Finding]:
    """What was asked and answered, whichever way it went."""
    by = {(row["model"], row["arm"]): row for row in rows}
    found = []
    rtn, gptq = by.get(("smollm2", "w3 rtn")), by.get(("smollm2", "w3 gptq"))
    if rtn and gptq:
        share = 100 * (1 - gptq["change"] / rtn["change"])
        part = "half or more" if share >= 50 else "less than half" if share > 0 else "none"
        quantity = "SmolLM2-135M, bits per byte"
        found.append(Finding(_GPTQ, quantity, part, share, unit="%", form=".0f"))
    ways = [by[k] for k in by if k[0] == "smollm2" and k[1].startswith("w8a8")]
    for row in sorted(ways, key=lambda row: row["change"]) if len(ways) > 1 else ():
        options = {"unit": "%", "form": "+.2f"}
        found.append(said.from_mean(_WAYS, row["arm"], row, "more bits", "fewer bits", **options))
    for model in ("smollm2", "vit"):
        uniform, searched = by.get((model, "w3 rtn")), by.get((model, "searched, the bytes of w3"))
        if uniform and searched:
            found += _beats(model, searched, uniform)
    for row in rows:
        if "broken" in row["arm"]:
            found.append(Finding(_GATE, _NAMES[row["model"]], row["verdict"]))
    few = sorted({row["few"] for row in rows})
    return [*found, Finding(_FEW, "all arms", ", ".join(few))] if few else found


def _beats(model: str, searched: dict, uniform: dict) -> list[Finding]:
    """Whether the search is better than one width for all, paired over windows or seeds."""
    sign = -1 if model == "smollm2" else 1  # fewer bits per byte are better
    gain = sign * (np.array(searched["units"]) - np.array(uniform["units"]))
    unit, gained = (
        ("bits per byte", "saved") if model == "smollm2" else ("points", "of accuracy gained")
    )
    sizes = f"{searched['bytes_after']:,} against {uniform['bytes_after']:,} bytes"
    name = _NAMES[model]
    found = [_gain(f"{name}, {unit} {gained}", gain, unit, "+.3f", sizes)]
    if searched["divergence"]:
        gain = np.array(uniform["divergence"]) - np.array(searched["divergence"])
        what = "which the search minimises"
        found.append(_gain(f"{name}, mean KL divergence saved", gain, "nats", "+.4f", what))
    return found


def _gain(quantity: str, values: np.ndarray, unit: str, form: str, note: str) -> Finding:
    mean, low, high = t_interval(values)
    note = f"{note}; one seed, no interval" if low is None else note
    row = {"mean": mean, "low": low, "high": high}
    return said.from_mean(
        _SEARCH, quantity, row, "better", "worse", unit=unit, form=form, note=note
    )


def change_text(row: dict, form: str | None = None) -> str:
    """A row's change with its unit and interval."""
    unit = {"smollm2": " %", "minilm": "", "vit": " points"}[row["model"]]
    form = f"+{form or ('.4f' if row['model'] == 'minilm' else '.2f')}"
    if is_missing(row["low"]):
        return f"{row['change']:{form}}{unit}"
    return f"{row['change']:{form}}{unit} [{row['low']:{form}}, {row['high']:{form}}]"


def to_text(summary: dict) -> str:
    """The findings for a terminal, and every arm."""
    status = said.trial_status(summary["trials"])
    lines = [said.to_text(findings(summary["rows"]), status), ""]
    for row in summary["rows"]:
        lines.append(
            f"  {row['model']:>8}  {row['arm']:<30} {change_text(row):<34} {row['verdict']}"
        )
    return "\n".join(lines)


def _table(rows: list[dict], model: str) -> pd.DataFrame:
    chosen = [row for row in rows if row["model"] == model]
    return pd.DataFrame(
        [
            {
                "arm": row["arm"],
                "verdict (99 %)": row["verdict"],
                "change, 90 % interval": change_text(row),
                "on 50 examples": row["few"],
                **{k: f"{v:.4f}" for k, v in row["values"].items()},
                "MB, of the float model's": " of ".join(
                    f"{row[f'bytes_{k}'] / 1e6:.2f}" for k in ("after", "before")
                ),
            }
            for row in chosen
        ]
    )


_COLORS = {"pass": "#23845a", "fail": "#c2481c"}
_AXES = {"smollm2": "bits per byte, %", "minilm": "Spearman's ρ", "vit": "accuracy, points"}


def _figure(rows: list[dict], model: str) -> Figure:
    """The change of each arm, named beside it, the largest first."""
    chosen = pd.DataFrame([row for row in rows if row["model"] == model])
    chosen = chosen.assign(kB=chosen["bytes_after"] / 1000).sort_values("change", ascending=False)
    order, verdicts = list(chosen["arm"]), tuple(dict.fromkeys(chosen["verdict"]))
    colors = tuple(_COLORS.get(verdict, "#777777") for verdict in verdicts)
    scale = Scale("verdict of the gate", verdicts, own=colors)
    drawn = with_intervals(
        chosen[["arm", "change", "low", "high", "verdict", "kB"]],
        "change",
        f"change of {_AXES[model]}",
        is_across=True,
        tooltip=["arm", "change", "verdict", "kB"],
        y=alt.Y("arm:N", title=None, sort=order, axis=alt.Axis(labelLimit=180)),
        color=scale.of_field("verdict"),
    )
    return Figure(
        f"{model}_change",
        f"{_NAMES[model]}: what each way costs",
        "Points are the paired change; bars are 90 % intervals; the line is no change.",
        [alt.layer(reference(0.0, "", "x"), drawn).properties(title=_NAMES[model])],
        [scale],
    )


def write(workdir: Path, records: list[dict], expected: int, source: Source | None = None) -> dict:
    """Writes the report of these records, and returns the summary."""
    rows, text = rows_of(records), prose.read(__file__)
    found, trials = findings(rows), {"finished": len(records), "expected": expected}
    summary = {
        "study": "pretrained_quantization",
        "trials": trials,
        "findings": list(map(said.sentence, found)),
        "rows": plain(rows),
        "versions": versions_of(r for r in records if "versions" in r),
    }
    sections = [
        Section(
            _NAMES[model],
            text[model],
            [("Each row is paired with the model in floating point.", _table(rows, model))],
            [_figure(rows, model)],
        )
        for model in dict.fromkeys(row["model"] for row in rows)
    ]
    sections.append(method_section(text["Measured"], summary))
    made = Report(
        "What quantizing real models costs",
        found,
        sections,
        summary,
        said.trial_status(trials),
        source,
        findings_key="findings_data",  # "findings" has been their sentences from the start
    )
    return report.write(Path(workdir), made)

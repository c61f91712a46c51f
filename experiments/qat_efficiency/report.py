"""The report: findings, tables, and the page that holds them."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.harness.reporting import findings as said
from experiments.harness.reporting import prose, report
from experiments.harness.reporting.findings import UNRESOLVED, Finding
from experiments.harness.reporting.layout import Figure, Report, Section, method_section
from experiments.harness.reporting.provenance import Source
from experiments.harness.reporting.statistics import is_discovery
from experiments.harness.reporting.values import bounds, is_missing
from experiments.qat_efficiency import figures
from experiments.qat_efficiency.analysis import (
    FEWEST_SEEDS,
    GATE,
    LOW_BITS,
    PRIMARY,
    arms,
    elsewhere,
    gains,
    over_seeds,
    select,
    summarize,
)
from experiments.qat_efficiency.measuring import TIER
from experiments.qat_efficiency.tasks import SUFFIXES


def findings(summary: dict) -> list[Finding]:
    """What was asked and answered, whichever way it went."""
    rows = summary["comparisons"]
    if not rows:
        return [Finding(_LOW, "gain", UNRESOLVED, note="there is nothing to compare")]
    best = [row for row in rows if row["scope"] == "best"]
    found = [_gain(_LOW, row) for row in best if row["bits"] <= LOW_BITS]
    found += [_gain(_AT_EIGHT, row) for row in best if row["width"] == _EIGHT]
    found += [_gain(_ALIKE, row) for row in rows if row["scope"] not in ("best", *SUFFIXES)]
    return [*found, _silence(summary["arms"]), _hidden(summary["hidden"])]


_EIGHT = "w8a8"
_LOW = f"Does training beat quantizing after training at {LOW_BITS} bits and fewer?"
_AT_EIGHT = "And at W8A8?"
_ALIKE = "And where weights of both have the same groups?"
_SILENT = "Does the mean hide groups that lost?"
_ELSEWHERE = "Does quality stay on data like the training data and get lost elsewhere?"
_ANSWERS = {"qat": "training is better", "ptq": "quantizing after training is better"}


def _gain(question: str, row: dict) -> Finding:
    place = f"{row['model']} {row['width'].upper()}"
    if row["mean"] is None:
        none = "no method came to an end in every seed"
        return Finding(question, place, UNRESOLVED, note=none)
    made = said.from_mean(
        question,
        f"{place}, training by {row['qat']} over {row['ptq']}",
        row,
        _ANSWERS["qat"],
        _ANSWERS["ptq"],
        unit={"accuracy": "accuracy", "nll": "nats"}[PRIMARY[row["model"]][0]],
        form="+.4f",
    )
    few = f"the interval is over examples: fewer than {FEWEST_SEEDS} seeds ran"
    note = few if row["how"] == "examples" else _chance(row)
    return dataclasses.replace(made, note=note)


def _chance(row: dict) -> str:
    """The p-value, and the q-value over all comparisons."""
    return "" if row["p"] is None else f"p {row['p']:.2g}, q {row['q']:.2g}"


def _silence(rows: list[dict]) -> Finding:
    quantized = [row for row in rows if row["family"] != "float"]
    silent = [row for row in quantized if row["silent"]]
    names = [f"{row['model']} {row['arm']} ({', '.join(row['silent'])})" for row in silent]
    count = f"{len(quantized)} quantized arms"
    if not silent:
        return Finding(_SILENT, count, "no", note="no group lost where the mean did not")
    return Finding(_SILENT, count, f"yes in {len(silent)}", note=_few(names))


def _hidden(rows: list[dict]) -> Finding:
    quantized = [row for row in rows if row["family"] != "float"]
    kept = [row for row in quantized if is_discovery(row["q"])]
    names = [f"{row['model']} {row['arm']} under {row['where']}" for row in kept]
    answer = f"yes in {len(kept)} of {len(quantized)} places" if kept else "no"
    if quantized:
        names += [f"before the correction for all arms and places {len(quantized)}"]
    return Finding(_ELSEWHERE, "arms and places", answer, note=_few(names))


def _few(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{'; '.join(names[:most])}{more}"


def _interval(row: Any, prefix: str, digits: int = 4) -> str:
    mean, low, high = (row[f"{prefix}{name}"] for name in _BOUNDS[bool(prefix)])
    return "—" if is_missing(mean) else bounds(mean, low, high, f"+.{digits}f")


_BOUNDS = {False: ("mean", "low", "high"), True: ("", "_low", "_high")}


def to_text(summary: dict) -> str:
    """The findings for a terminal, and every arm."""
    lines = [said.to_text(findings(summary), said.trial_status(summary["trials"])), ""]
    for row in summary["arms"]:
        metric = PRIMARY[row["model"]][0]
        change = _interval(row, f"d_{metric}")
        size = "—" if row["bytes"] is None else f"{row['bytes'] / 1000:,.1f} kB"
        lines.append(
            f"  {row['model']:9} {row['arm']:42} {size:>12}  {metric} {change}  {_gate(row)}"
        )
    return "\n".join(lines)


def _gate(row: dict) -> str:
    counts = [(status, row[f"gate_{status}"]) for status in GATE]
    broken = row["runs"] - row["seeds"]
    shown = [f"{n} {status}" for status, n in counts if n]
    return ", ".join([*shown, *([f"{broken} broken"] if broken else [])])


# ---------------------------------------------------------------------------------------------------
# Tables


def arm_table(means: pd.DataFrame, model: str, latencies: list[dict]) -> pd.DataFrame:
    """One model's arms as a table for readers."""
    rows = select(means, model=model)
    reference = rows[rows["arm"] == "float"].iloc[0]
    ratios = dict(zip(*_ratios(rows, latencies), strict=True)) if latencies else {}
    shown = [
        {
            "arm": row["arm"],
            "kB": _number(row["bytes"], 1 / 1000, ",.1f"),
            "of float": _number(row["bytes"], 1 / reference["bytes"], ".2f"),
            "bit operations": _number(
                row["bit_operations"], 1 / reference["bit_operations"], ".3f"
            ),
            "time": _number(ratios.get(row["arm"]), 1, ".2f") if ratios else "—",
            "accuracy": _number(row["accuracy"], 1, ".4f"),
            "accuracy − float's": _interval(row, "d_accuracy"),
            "NLL − float's": _interval(row, "d_nll"),
            "ECE": _number(row["ece"], 1, ".4f"),
            "Brier": _number(row["brier"], 1, ".4f"),
            "flips": _number(row["flip_rate"], 100, ".2f", " %"),
            "McNemar": f"{row['mcnemar']} of {row['seeds']}",
            "KL": _number(row["kl"], 1, ".2e"),
            "worst group": _number(row["worst_change"], 1, "+.3f"),
            **({"mCE": _number(row["mce"], 1, ".3f")} if model == "vision" else {}),
            f"gate {TIER}": _gate(row),
        }
        for row in rows.to_dict("records")
    ]
    return pd.DataFrame(shown)


def _ratios(rows: pd.DataFrame, latencies: list[dict]) -> tuple[list[str], list[float]]:
    timed = figures.with_ratios(rows, latencies)
    return list(timed["arm"]), list(timed["ratio"])


def _number(value: float | None, factor: float, spec: str, unit: str = "") -> str:
    return "—" if value is None or is_missing(value) else f"{value * factor:{spec}}{unit}"


def comparison_table(rows: list[dict]) -> pd.DataFrame:
    """Every comparison as a table for readers."""
    return pd.DataFrame(
        [
            {
                "model": row["model"],
                "width": row["width"].upper(),
                "among": _among(row["scope"]),
                "with training": row["qat"] or "—",
                "rate: seeds": ", ".join(f"{r}: {n}" for r, n in row["rates"].items()) or "—",
                "after training": row["ptq"] or "—",
                "gain of training": _interval(row, ""),
                "p": _number(row["p"], 1, ".2g"),
                "q": _number(row["q"], 1, ".2g"),
                "better": {"qat": "training", "ptq": "after training"}.get(
                    row["answer"], UNRESOLVED
                ),
            }
            for row in rows
        ]
    )


def _among(scope: str) -> str:
    if scope == "best":
        return "all settings"
    if scope in SUFFIXES:
        return f"{scope}, best after training"
    return "weights per channel" if scope == "channel" else f"weights in groups of {scope[1:]}"


def _silent_table(means: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {
            "model": row["model"],
            "arm": row["arm"],
            "group": name,
            "seeds": f"{count} of {row['seeds']}",
            "accuracy − float's, all": _interval(row, "d_accuracy"),
        }
        for row in means.to_dict("records")
        for name, count in row["silent"].items()
    ]
    return pd.DataFrame(rows)


def _hidden_table(rows: list[dict]) -> pd.DataFrame:
    what = {"corruption": "errors over the reference's", "text": "NLL added (nats)"}
    return pd.DataFrame(
        [
            {
                "model": row["model"],
                "arm": row["arm"],
                "where": row["where"],
                "what": what[row["kind"]],
                "value": f"{row['mean']:.4f} [{row['low']:.4f}, {row['high']:.4f}]",
                "interval over": row["how"],
                "p": _number(row["p"], 1, ".2g"),
                "q": _number(row["q"], 1, ".2g"),
            }
            for row in rows
        ]
    )


# ---------------------------------------------------------------------------------------------------
# The page


def write(
    workdir: Path,
    records: list[dict],
    latencies: list[dict],
    expected: int,
    source: Source | None = None,
) -> dict:
    """Writes summary, report and figures, and returns the summary.

    Args:
        workdir: where.
        records: of finished trials.
        latencies: rows of ``latency.json``; none where nothing was timed.
        expected: how many trials the grid has.
        source: of the records.
    """
    summary, table, text = summarize(records, expected), arms(records), prose.read(__file__)
    sections = []
    if len(table):
        means = over_seeds(table)
        sections = [
            Section(
                "What does training with quantization buy?",
                text["Gain"],
                figures=_drawn(figures.gains_by_width(gains(summary["comparisons"]))),
                tables=[(_COMPARED, comparison_table(summary["comparisons"]))],
            ),
            _arm_section(means, latencies, text["Costs"]),
            Section(
                "Away from the training data",
                figures=_drawn(figures.away(elsewhere(records), summary["comparisons"])),
            ),
            _silent_section(means, summary["hidden"], text["Silent regressions"]),
        ]
    settings = _settings(summary, records, bool(latencies))
    sections.append(method_section(text["Measured"], summary, settings))
    title = "Training with quantization against quantizing after training"
    status = said.trial_status(summary["trials"])
    return report.write(
        workdir, Report(title, findings(summary), sections, summary, status, source)
    )


def _drawn(*found: Figure | None) -> list[Figure]:
    return [figure for figure in found if figure]


def _arm_section(means: pd.DataFrame, latencies: list[dict], text: list[str]) -> Section:
    tables = [
        (_TABLE.format(model), arm_table(means, model, latencies))
        for model in dict.fromkeys(means["model"])
    ]
    drawn = _drawn(figures.against_bytes(means), figures.against_latency(means, latencies))
    title = "Every arm: quality, bytes, operations, time"
    return Section(title, text, figures=drawn, folded=tables)


_COMPARED = (
    "Training against quantizing after training: settings chosen on the selection examples; rate: seeds, "
    "which rates those seeds chose, as shares of the training's; the gain with its 90 % interval; p: of no "
    "gain, Student's over seeds; q: Benjamini and Hochberg's, over all pairs here"
)
_TABLE = (
    "Every arm of {}: means over seeds; differences to the reference with 90 % intervals; McNemar: in how "
    "many seeds both directions of flips are told apart (p < 0.1); worst group: its change of accuracy"
)


def _silent_section(means: pd.DataFrame, hidden: list[dict], text: list[str]) -> Section:
    tables = [
        ("Groups that lost unseen", _silent_table(means)),
        ("Kept on the main split, lost elsewhere", _hidden_table(hidden)),
    ]
    folded = [(caption, table) for caption, table in tables if len(table)]
    return Section("Silent regressions", text, folded=folded)


def _settings(summary: dict, records: list[dict], timed: bool) -> list[str]:
    settings = []
    if summary["broken"]:
        named = ", ".join(
            f"{b['model']} {b['arm']} seed {b['seed']} ({b['status']})" for b in summary["broken"]
        )
        settings.append(f"Arms that came to no end: {named}.")
    if not timed:
        settings.append("Nothing was timed in this run.")
    rates = summary["reference_rates"]
    if rates:
        named = "; ".join(f"{name} {rate:g}" for name, rate in rates.items())
        settings.append(f"Rates of the references, as shares of the training's: {named}.")
    return settings + [_setting(r["trial"]) for r in records if r["trial"]["seed"] == 0]


def _setting(trial: dict) -> str:
    task = trial["task"]
    examples = "images" if task["model"] == "vision" else "windows of each text"
    text = (
        f"{task['model'].capitalize()}: size {task['size']}, data {task['data']} (fingerprint "
        f"{task['fingerprint']}), {trial['steps']} steps at a peak rate of {trial['peak_lr']:g} and "
        f"{trial['finetune_steps']} further steps at {', '.join(f'{r:g}' for r in trial['rates'])} of it, "
        f"batches of {task['batch']}, AdamW; statistics from {trial['calibration_batches']} training "
        f"batches; evaluated on up to {task['evaluation']} {examples}, {task['evaluation_batch']} together"
    )
    if task["corruptions"]:
        severities = ", ".join(map(str, task["severities"]))
        text += f"; corruptions at severities {severities}, {task['corrupted']} images each"
    return text + "."

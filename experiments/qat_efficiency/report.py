"""The report: what was found in words, tables, and the page that holds it all."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from pathlib import Path
from typing import Any

import pandas as pd

from experiments.harness.reporting import report
from experiments.qat_efficiency import figures
from experiments.qat_efficiency.analysis import (
    CONFIDENCE,
    FEWEST_SEEDS,
    GATE,
    LOW_BITS,
    METRIC_NAMES,
    PRIMARY,
    arms,
    elsewhere,
    gains,
    over_seeds,
    select,
    summarize,
)
from experiments.qat_efficiency.measuring import TIER

_EIGHT = "w8a8"


def verdict(summary: dict) -> str:
    """The finding in a few sentences, whichever way it went."""
    trials, rows = summary["trials"], summary["comparisons"]
    said = []
    if trials["finished"] < trials["expected"]:
        said.append(f"{trials['finished']} of {trials['expected']} trials are finished.")
    if trials["diverged"]:
        said.append(
            f"{len(trials['diverged'])} of them diverged in full precision and are left out."
        )
    if not rows:
        return " ".join([*said, "There is nothing to compare, so every question stays open."])
    low = [row for row in rows if row["bits"] <= LOW_BITS]
    if low:
        said.append(f"Does training beat quantizing after training at {LOW_BITS} bits and fewer?")
        said.append(_answered(low))
    eight = [row for row in rows if row["width"] == _EIGHT]
    if eight:
        said.append(f"And at W8A8? {_answered(eight)}")
    if any(row["how"] == "examples" for row in rows):
        said.append(f"These intervals are over examples: fewer than {FEWEST_SEEDS} seeds ran.")
    said += [_silence(summary["arms"]), _hidden(summary["hidden"])]
    return " ".join(said)


_ANSWERS = {
    "qat": "training is better",
    "ptq": "quantizing after training is better",
    "unresolved": "nothing separates the two in these runs",
}


def _answered(rows: list[dict]) -> str:
    by_answer: dict[str, list[str]] = {}
    for row in rows:
        by_answer.setdefault(row["answer"], []).append(
            f"{row['model']} {row['width'].upper()} ({_gain(row)})"
        )
    parts = [
        f"{words}: {', '.join(by_answer[k])}" for k, words in _ANSWERS.items() if k in by_answer
    ]
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def _gain(row: dict) -> str:
    if row["mean"] is None:
        return "no method came to an end in every seed"
    unit = {"accuracy": "accuracy", "nll": "nats"}[PRIMARY[row["model"]][0]]
    return f"{row['qat']} over {row['ptq']}: {_interval(row, '')} {unit}"


def _interval(row: Any, prefix: str, digits: int = 4) -> str:
    mean, low, high = (row[f"{prefix}{name}"] for name in _BOUNDS[bool(prefix)])
    if mean is None or pd.isna(mean):
        return "—"
    if low is None or pd.isna(low):
        return f"{mean:+.{digits}f}"
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


_BOUNDS = {False: ("mean", "low", "high"), True: ("", "_low", "_high")}


def _silence(rows: list[dict]) -> str:
    quantized = [row for row in rows if row["family"] != "float"]
    silent = [row for row in quantized if row["silent"]]
    if not silent:
        return (
            f"No silent regression was found among {len(quantized)} quantized arms: no group lost "
            "significantly where the mean did not."
        )
    named = "; ".join(
        f"{row['model']} {row['arm']} ({', '.join(row['silent'])})" for row in silent[:6]
    )
    more = f" and {len(silent) - 6} more" if len(silent) > 6 else ""
    return (
        f"Silent regressions, where the mean shows no loss and a group has lost: {len(silent)} of "
        f"{len(quantized)} quantized arms: {named}{more}."
    )


def _hidden(rows: list[dict]) -> str:
    quantized = [row for row in rows if row["family"] != "float"]
    if not quantized:
        return "No arm kept the main split's mean and lost elsewhere."
    named = "; ".join(f"{r['model']} {r['arm']} under {r['where']}" for r in quantized[:6])
    more = f" and {len(quantized) - 6} more" if len(quantized) > 6 else ""
    return f"Kept where it was like the training data, lost elsewhere: {named}{more}."


def to_text(summary: dict) -> str:
    """The finding for a terminal."""
    lines = [verdict(summary), ""]
    for row in summary["arms"]:
        metric = PRIMARY[row["model"]][0]
        change = _interval(row, f"d_{metric}")
        size = "—" if row["bytes"] is None else f"{row['bytes'] / 1000:,.1f} kB"
        lines.append(
            f"  {row['model']:9} {row['arm']:26} {size:>12}  {metric} {change}  {_gate(row)}"
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
    return "—" if value is None or pd.isna(value) else f"{value * factor:{spec}}{unit}"


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
            }
            for row in rows
        ]
    )


def _gain_table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "model": row["model"],
                "width": row["width"].upper(),
                "metric": METRIC_NAMES[PRIMARY[row["model"]][0]],
                "after training": row["ptq"] or "—",
                "with training": row["qat"] or "—",
                "gain": _interval(row, ""),
                "seeds": row["seeds"],
                "interval over": row["how"],
                "better": {"qat": "training", "ptq": "after training"}.get(
                    row["answer"], "unresolved"
                ),
            }
            for row in rows
        ]
    )


# ---------------------------------------------------------------------------------------------------
# The page


def write(workdir: Path, records: list[dict], latencies: list[dict], expected: int) -> dict:
    """Writes summary, report and figures, and returns the summary.

    Args:
        workdir: where.
        records: of finished trials.
        latencies: rows of ``latency.json``; none where nothing was timed.
        expected: how many trials the grid has.
    """
    summary = summarize(records, expected)
    table = arms(records)
    sections = []
    if len(table):
        means = over_seeds(table)
        sections = [_gain_section(summary, table), *_arm_sections(means, latencies)]
        sections += [_robustness(summary, records), _silent_section(means, summary["hidden"])]
    sections.append(_method(summary, records, bool(latencies)))
    title = "Training with quantization against quantizing after training"
    report.write(workdir, title, verdict(summary), sections, summary)
    return summary


def _gain_section(summary: dict, table: pd.DataFrame) -> report.Section:
    figure = figures.gains_by_width(gains(table))
    return report.Section(
        "What does training with quantization buy?",
        [
            "At each width, one method of either family is chosen on examples that are not "
            "evaluated, and the two are compared on the others, paired by seed. Accuracy decides"
            " for vision, NLL for language; a gain is positive where training is better."
        ],
        [("The chosen methods and what training gains", _gain_table(summary["comparisons"]))],
        [figure] if figure else [],
    )


def _arm_sections(means: pd.DataFrame, latencies: list[dict]) -> list[report.Section]:
    tables = [
        (_TABLE.format(model), arm_table(means, model, latencies))
        for model in dict.fromkeys(means["model"])
    ]
    drawn = [figures.against_bytes(means), figures.against_latency(means, latencies)]
    return [
        report.Section(
            "Every arm: quality, bytes, operations, time",
            [_COSTS],
            tables,
            [figure for figure in drawn if figure],
        )
    ]


_TABLE = (
    "{}: means over seeds; differences to the reference with 90 % intervals; McNemar: in how "
    "many seeds both directions of flips are told apart (p < 0.1); worst group: its change of "
    "accuracy"
)
_COSTS = (
    "Three costs are kept apart. Bytes are counted on the frozen model. Bit operations are "
    "derived: multiplications times the bits of both operands, as a share of the float model's, "
    "with 16 bits for what stays in floating point; rotations and scales count nothing. Time is "
    "measured, and only for arms whose products run on the stored integers; LSQ's and QuEST's "
    "products are simulated and have none. “float again” is the float model trained on in "
    "another order of the data: what differs there is training, not precision, so that flips, KL"
    " and the gate of trained arms are read beside it."
)


def _robustness(summary: dict, records: list[dict]) -> report.Section:
    figure = figures.away(elsewhere(records), summary["comparisons"])
    return report.Section("Away from the training data", figures=[figure] if figure else [])


def _silent_section(means: pd.DataFrame, hidden: list[dict]) -> report.Section:
    tables = [("Groups that lost unseen", _silent_table(means))]
    tables.append(("Kept on the main split, lost elsewhere", _hidden_table(hidden)))
    return report.Section(
        "Silent regressions",
        [
            "A group (a class of images, a document) regressed silently where it lost accuracy "
            "significantly, adjusted for looking at all groups, while the interval of the overall change "
            "reaches zero or more. " + _silence(means.to_dict("records")),
            "An arm may also keep the mean on data like the training data and lose under corruption or on "
            "other text. Many places are looked at here and none is adjusted for the others; the float "
            "model trained on in another order is listed where it does so too. " + _hidden(hidden),
        ],
        [(caption, table) for caption, table in tables if len(table)],
    )


def _method(summary: dict, records: list[dict], timed: bool) -> report.Section:
    trials = summary["trials"]
    paragraphs = [
        _ARMS,
        _SCALES,
        f"Intervals are at {100 * CONFIDENCE:g} %: Student's t over seeds with {FEWEST_SEEDS} seeds or "
        "more, else normal over examples, which says nothing of other seeds. Many are shown, none is "
        "adjusted for the others.",
        f"{trials['finished']} of {trials['expected']} trials finished, "
        f"{len(trials['diverged'])} of them diverged.",
    ]
    if summary["broken"]:
        named = ", ".join(
            f"{b['model']} {b['arm']} seed {b['seed']} ({b['status']})" for b in summary["broken"]
        )
        paragraphs.append(f"Arms that came to no end: {named}.")
    if not timed:
        paragraphs.append("Nothing was timed in this run.")
    paragraphs += [_setting(r["trial"]) for r in records if r["trial"]["seed"] == 0]
    versions = "; ".join(
        ", ".join(f"{k} {v}" for k, v in one.items()) for one in summary["versions"]
    )
    return report.Section("How this was measured", [*paragraphs, f"Versions: {versions}."])


_ARMS = (
    "Each seed trains one model in full precision. The reference is that model after further "
    "steps in full precision. Methods after training quantize the reference; arms with training "
    "take the same further steps, on the same batches and with the same schedule, with quantized"
    " products from the start. All evaluated models are frozen: their weights are stored "
    "integers. The blocks' linears have the width of the arm; the first layer (patches, or the "
    "embedding) and the head have 8 bits at every width, their activations too where the arm "
    "quantizes any (an embedding has none). Attention's two products, norms, biases and "
    "positions stay in floating point."
)
_SCALES = (
    "The arms differ in more than the estimator. Methods after training and STE: weights per "
    "output channel, activations per tensor, ranges by the largest magnitude, found anew in each"
    " batch. LSQ: the same groups with learned steps. QuEST: rotated blocks of 32, a scale for "
    "each row of activations, ranges fitted to normals. So a gain of QuEST is one of its whole "
    "recipe."
)


def _setting(trial: dict) -> str:
    task = trial["task"]
    examples = "images" if task["model"] == "vision" else "windows of each text"
    text = (
        f"{task['model'].capitalize()}: size {task['size']}, data {task['data']} (fingerprint "
        f"{task['fingerprint']}), {trial['steps']} steps at a peak rate of {trial['peak_lr']:g} and "
        f"{trial['finetune_steps']} further steps from {trial['finetune_lr']:g}, batches of "
        f"{task['batch']}, AdamW; statistics from {trial['calibration_batches']} training batches; "
        f"evaluated on up to {task['evaluation']} {examples}, {task['evaluation_batch']} together"
    )
    if task["corruptions"]:
        severities = ", ".join(map(str, task["severities"]))
        text += f"; corruptions at severities {severities}, {task['corrupted']} images each"
    return text + "."

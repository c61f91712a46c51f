"""The report: the finding in words, tables, and the page that holds it all."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from pathlib import Path

import pandas as pd

from experiments.harness.reporting import report
from experiments.harness.reporting.law_tables import control_text, fit_table, laws_table
from experiments.harness.training.arms import EXACT
from experiments.optimizer_states import figures, law
from experiments.optimizer_states.analysis import (
    CONFIDENCE,
    GROUP,
    PRIMARY,
    answer,
    gaps,
    runs,
    summarize,
    tuning,
    widths,
)


def verdict(summary: dict) -> str:
    """The finding in a few sentences; first whether adaptive widths beat even ones."""
    said = [_contest(summary["contests"])]
    trials = summary["trials"]
    seeds = min((row["seeds"] for row in summary["gaps"]), default=0)
    if seeds < _FEWEST_SEEDS:
        said.append(f"Of {seeds} seeds nothing can be concluded; {_FEWEST_SEEDS} are the fewest.")
    if trials["finished"] < trials["expected"]:
        said.append(f"{trials['finished']} of {trials['expected']} trials are finished.")
    if trials["diverged"]:
        names = ", ".join(sorted({d["arm"] for d in trials["diverged"]}))
        said.append(f"{len(trials['diverged'])} runs diverged ({names}) and are left out.")
    within = [row for row in summary["gaps"] if row["arm"] != EXACT and _is_within(row)]
    if within:
        least = min(within, key=lambda row: row["bits"])
        said.append(
            f"The fewest bits whose mean gap is at most full precision's spread over seeds: "
            f"{least['arm']} on {_place(least)}, {least['bits']:.2f} bits, "
            f"{least['share']:.1%} of full precision's bytes, gap {_interval(least)} nats."
        )
    return " ".join(said)


_FEWEST_SEEDS = 3


def _is_within(row: dict) -> bool:
    return row["exact_sd"] is not None and row["gap"] <= row["exact_sd"]


def _contest(rows: list[dict]) -> str:
    if not rows:
        return "No adaptive arm stands beside an even one of the same budget."
    counts = {kind: [r for r in rows if answer(r) == kind] for kind in _ANSWERS}
    head = "Adaptive widths do not beat an even allocation of the same budget"
    if len(counts["better"]) == len(rows):
        head = "Adaptive widths beat an even allocation of the same budget"
    elif counts["better"]:
        head = "Adaptive widths beat an even allocation of the same budget in some comparisons"
    parts = [
        f"{kind} in {len(found)} ({', '.join(map(_named, found))})"
        for kind, found in counts.items()
        if found
    ]
    return f"{head}: {'; '.join(parts)}."


_ANSWERS = ("better", "worse", "unresolved")


def _named(row: dict) -> str:
    return f"{row['arm']} on {_place(row)} {_interval(row)}"


def _place(row: dict) -> str:
    """What a comparison is of."""
    return f"{row['task']} {row['size']} under {row['schedule']} for {row['steps']} steps"


def _interval(row: dict) -> str:
    if row["low"] is None:
        return f"{row['gap']:+.4f}"
    return f"{row['gap']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"


def to_text(summary: dict) -> str:
    """The finding for a terminal."""
    lines = [verdict(summary), ""]
    for row in summary["gaps"]:
        spread = "—" if row["exact_sd"] is None else f"{row['exact_sd']:.4f}"
        lines.append(
            f"  {row['task']:9} {row['size']:5} {row['steps']:6} {row['schedule']:7} {row['arm']:18} "
            f"{row['bits']:6.2f} bits  {_interval(row)}  (spread {spread})"
        )
    return "\n".join(lines)


def _gap_table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                **{k: row[k] for k in GROUP},
                "state": row["arm"],
                "bits": f"{row['bits']:.2f}",
                "bytes": f"{row['bytes']:,.0f}",
                "of fp32's": f"{row['share']:.1%}",
                "loss": f"{row['loss']:.4f}",
                "gap": _interval(row),
                "SD of gap": "—" if row["sd"] is None else f"{row['sd']:.4f}",
                "fp32's SD": "—" if row["exact_sd"] is None else f"{row['exact_sd']:.4f}",
                "seeds": row["seeds"],
            }
            for row in rows
        ]
    )


def _contest_table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                **{k: row[k] for k in GROUP},
                "adaptive": row["arm"],
                "against": row["even"],
                "gain": _interval(row),
                "seeds": row["seeds"],
                "adaptive is": answer(row),
            }
            for row in rows
        ]
    )


def write(workdir: Path, records: list[dict], expected: int) -> dict:
    """Writes summary, report and figures of the records, and returns the summary.

    Args:
        workdir: where.
        records: of finished trials.
        expected: how many trials the grid has.
    """
    summary, sections = summarize(records, expected), []
    table = runs(records)
    if summary["gaps"]:
        caption = f"Paired gaps in loss (nats), {CONFIDENCE:.0%} intervals over seeds"
        drawn = [figures.against_bits(gaps(table))] if len(set(table["arm"])) > 1 else []
        tables = [(caption, _gap_table(summary["gaps"]))]
        sections.append(report.Section("What few bits cost", [_BYTES], tables, drawn))
    if summary["contests"]:
        contest = (
            "Gain in loss (nats) over the even allocation",
            _contest_table(summary["contests"]),
        )
        heat = figures.widths_over_time(widths(records))
        title = "Do moving widths pay?"
        sections.append(report.Section(title, [], [contest], [heat] if heat else []))
    if summary["law"]:
        sections.append(_law(summary["law"]))
    sections.append(_method(summary, records))
    report.write(workdir, "Optimizer state in few bits", verdict(summary), sections, summary)
    return summary


def _law(found: dict) -> report.Section:
    title = "Do bits of the state cost parameters, tokens, or neither?"
    if "reason" in found:
        return report.Section(title, [f"Not fitted: {found['reason']}."])
    paragraphs = [
        law.text(found),
        f"{found['runs']} runs under {found['schedule']}, both moments at {found['widths']} bits, 32 being "
        "full precision.",
        control_text(found["control"]),
        *(f"Warning ({f['law']}): {w}." for f in found["fits"] for w in f["warnings"]),
    ]
    tables = [
        ("Ranked by AICc; R² of the logarithm of the loss", laws_table(found["laws"])),
        *((f["equation"], fit_table(f)) for f in found["fits"]),
    ]
    if found["without_narrowest"]:
        title_of_rest = f"The same without {found['widths'][0]} bits"
        tables.insert(1, (title_of_rest, laws_table(found["without_narrowest"])))
    return report.Section(title, paragraphs, tables)


_BYTES = (
    "Measured: bytes of all arrays of the two moments' state, with scales, tables, empty rows, counters, and "
    "leaves that stay exact; bits are those bytes over two numbers a parameter. The codecs of torchao and "
    "bitsandbytes are ours, written after theirs, with their own rules for which leaves stay exact."
)
_METHOD = (
    "All arms share initial weights, data order, schedule and learning rate, which was tuned for full "
    "precision. A gap is an arm's loss less full precision's of the same seed; a gain is the even arm's less "
    "the adaptive one's. State is coded again at every step. Nothing here is a time: see the benchmark."
)


def _method(summary: dict, records: list[dict]) -> report.Section:
    paragraphs = [_METHOD]
    for key in dict.fromkeys(tuple(r["trial"][k] for k in GROUP[:3]) for r in records):
        t = next(r["trial"] for r in records if tuple(r["trial"][k] for k in GROUP[:3]) == key)
        paragraphs.append(
            f"{t['task'].capitalize()}: size {t['size']}, data {t['data']} (fingerprint "
            f"{t['data_fingerprint']}), {t['steps']} steps in batches of {t['batch']}, peak rate "
            f"{t['peak_lr']:g}, decisions every {t['interval']} steps, metric {PRIMARY[t['task']]}."
        )
    versions = "; ".join(
        ", ".join(f"{k} {v}" for k, v in one.items()) for one in summary["versions"]
    )
    tables = [("Full precision around the learning rate in use, seed 0", tuning(records))]
    return report.Section(
        "How this was measured",
        [*paragraphs, f"Versions: {versions}."],
        [(caption, table) for caption, table in tables if len(table)],
    )

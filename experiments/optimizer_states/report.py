"""The report: findings, tables, and the page that holds them."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from pathlib import Path

import pandas as pd

from experiments.harness.reporting import findings as said
from experiments.harness.reporting import prose, report
from experiments.harness.reporting.findings import UNRESOLVED, Finding
from experiments.harness.reporting.law_tables import (
    control_text,
    fit_table,
    laws_table,
    other_warnings,
)
from experiments.harness.reporting.layout import Report, Section, method_section
from experiments.harness.reporting.provenance import Source
from experiments.harness.reporting.statistics import CONFIDENCE
from experiments.harness.reporting.values import bounds, number
from experiments.harness.training.arms import EXACT, weights_of
from experiments.optimizer_states import contest, figures, law, weights
from experiments.optimizer_states.analysis import (
    GROUP,
    PRIMARY,
    gaps,
    runs,
    summarize,
    tuning,
    widths,
)

_FEWEST_SEEDS = 3
_FEWEST_BITS = "How few bits stay within full precision's spread over seeds?"


def findings(summary: dict) -> list[Finding]:
    """What was asked and answered: first whether adaptive widths beat even ones."""
    of_weights = weights.findings(summary.get("weights", []))
    found = [*of_weights, *contest.findings(summary["contests"]), *_fewest(summary["gaps"])]
    if not found:
        none = "no adaptive arm stands beside an even one of the same budget"
        found.append(
            Finding(contest.QUESTIONS[contest.EVEN], "gain in loss", UNRESOLVED, note=none)
        )
    return [*found, law.finding(summary["law"])] if summary["law"] else found


def _fewest(rows: list[dict]) -> list[Finding]:
    """Of runs that differ in the state alone: the smallest state whose mean gap the spread hides."""
    found = []
    rows = sorted(rows, key=lambda row: (row["task"], row["size"], row["schedule"], row["steps"]))
    for place in dict.fromkeys(map(_place, rows)):
        own = [row for row in rows if _place(row) == place and row["arm"] != EXACT]
        own = [row for row in own if not weights_of(row["arm"])[0]]
        within = [
            row for row in own if row["exact_sd"] is not None and row["gap"] <= row["exact_sd"]
        ]
        if within:
            least = min(within, key=lambda row: row["bits"])
            note = (
                f"{least['bits']:.2f} bits, {least['share']:.1%} of full precision's bytes; the spread is "
                f"{least['exact_sd']:.4f}"
            )
            ends = least["gap"], least["low"], least["high"]
            arm = least["arm"]
            found.append(
                Finding(_FEWEST_BITS, place, arm, *ends, note=note, unit="nats", form="+.4f")
            )
        elif own:
            none = "no state of few bits is within it"
            found.append(Finding(_FEWEST_BITS, place, UNRESOLVED, note=none))
    return found


def _place(row: dict) -> str:
    """What a comparison is of."""
    return f"{row['task']} {row['size']}, {row['schedule']}, {row['steps']} steps"


def _interval(row: dict) -> str:
    return bounds(row["gap"], row["low"], row["high"], "+.4f")


def _status(summary: dict) -> list[str]:
    status = said.trial_status(summary["trials"])
    seeds = min((row["seeds"] for row in summary["gaps"]), default=0)
    if seeds < _FEWEST_SEEDS:
        status.append(f"Of {seeds} seeds nothing can be concluded; {_FEWEST_SEEDS} are the fewest.")
    return status


def to_text(summary: dict) -> str:
    """The findings for a terminal, and every gap."""
    lines = [said.to_text(findings(summary), _status(summary)), ""]
    for row in summary["gaps"]:
        lines.append(
            f"  {row['task']:9} {row['size']:5} {row['steps']:6} {row['schedule']:7} {row['arm']:18} "
            f"{row['bits']:6.2f} bits  {_interval(row)}  (spread {number(row['exact_sd'], '.4f')})"
        )
    return "\n".join(lines)


def _gap_table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "state": row["arm"],
                "gap": _interval(row),
                "bits": f"{row['bits']:.2f}",
                "of fp32's bytes": f"{row['share']:.1%}",
                "bytes": f"{row['bytes']:,.0f}",
                "loss": f"{row['loss']:.4f}",
                "SD of gap": number(row["sd"], ".4f"),
                "fp32's SD": number(row["exact_sd"], ".4f"),
                "seeds": row["seeds"],
                **{k: row[k] for k in GROUP},
            }
            for row in rows
        ]
    )


def _contest_table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "budget": row["budget"],
                "scale": row["scale"] or "block of 128, stored",
                "allocation": row["kind"],
                "against": row["against"],
                "gain": _interval(row),
                "p": number(row["p_value"], ".3f"),
                "q": number(row["q_value"], ".3f"),
                "seeds": row["seeds"],
                **{k: row[k] for k in GROUP},
            }
            for row in rows
        ]
    )


def _weights_table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "weights": row["weights"],
                "state": row["state"],
                "gap": _interval(row),
                "fp32's SD": number(row["exact_sd"], ".4f"),
                "q": number(row["q_value"], ".3f"),
                "bytes": f"{row['bytes']:.2f}",
                "bytes, float32 weights": f"{row['bytes_float32']:.2f}",
                "seeds": row["seeds"],
                **{k: row[k] for k in GROUP},
            }
            for row in rows
        ]
    )


def write(workdir: Path, records: list[dict], expected: int, source: Source | None = None) -> dict:
    """Writes summary, report and figures of the records, and returns the summary.

    Args:
        workdir: where.
        records: of finished trials.
        expected: how many trials the grid has.
        source: of the records.
    """
    summary, text, sections = summarize(records, expected), prose.read(__file__), []
    table = runs(records)
    if summary["gaps"]:
        caption = f"Paired gaps in loss (nats), {CONFIDENCE:.0%} intervals over seeds"
        drawn = [figures.against_bits(gaps(table))] if len(set(table["arm"])) > 1 else []
        folded = [(caption, _gap_table(summary["gaps"]))]
        sections.append(Section("What few bits cost", text["Bytes"], (), drawn, folded))
    if summary["contests"]:
        caption = "Gains in loss (nats), paired by seed; q corrects for all contests"
        sections.append(
            Section("Contests", text["Contests"], [(caption, _contest_table(summary["contests"]))])
        )
    if summary["weights"]:
        caption = "Gaps in loss (nats) to float32 weights with the same state, paired by seed"
        folded = [(caption, _weights_table(summary["weights"]))]
        sections.append(Section("Weights in bfloat16", text["Weights"], folded))
    if summary["contests"] and (heat := figures.widths_over_time(widths(records))):
        sections.append(Section("Where moving widths go", figures=[heat]))
    if summary["law"]:
        sections.append(_law(summary["law"], text["Law"]))
    tuned = tuning(records)
    folded = (
        [("Full precision around the learning rate in use, seed 0", tuned)] if len(tuned) else []
    )
    sections.append(method_section(text["Measured"], summary, _settings(records), folded))
    title, status = "Optimizer state in few bits", _status(summary)
    return report.write(
        workdir, Report(title, findings(summary), sections, summary, status, source)
    )


def _law(found: dict, text: list[str]) -> Section:
    title = "Do bits of the state cost parameters, tokens, or neither?"
    if "reason" in found:
        return Section(title, [f"Not fitted: {found['reason']}."])
    paragraphs = [
        *text,
        f"{found['runs']} runs under {found['schedule']}, both moments at {found['widths']} bits, 32 being "
        "full precision.",
        control_text(found["control"]),
        *(f"Warning ({f['law']}): {w}." for f in found["fits"] for w in other_warnings(f)),
    ]
    ranks = {"all widths": found["laws"]}
    if found["without_narrowest"]:
        ranks[f"without {found['widths'][0]} bits"] = found["without_narrowest"]
    tables = [("Ranked by AICc; R² of the logarithm of the loss", laws_table(ranks))]
    fits = {f"{fit['law']} [90 %]": fit for fit in found["fits"]}
    equations = "; ".join(f["equation"] for f in found["fits"])
    return Section(
        title, paragraphs, tables, folded=[(f"Parameters: {equations}", fit_table(fits))]
    )


def _settings(records: list[dict]) -> list[str]:
    said = []
    for key in dict.fromkeys(tuple(r["trial"][k] for k in GROUP[:3]) for r in records):
        t = next(r["trial"] for r in records if tuple(r["trial"][k] for k in GROUP[:3]) == key)
        said.append(
            f"{t['task'].capitalize()}: size {t['size']}, data {t['data']} (fingerprint "
            f"{t['data_fingerprint']}), {t['steps']} steps in batches of {t['batch']}, peak rate "
            f"{t['peak_lr']:g}, decisions every {t['interval']} steps, metric {PRIMARY[t['task']]}."
        )
    return said

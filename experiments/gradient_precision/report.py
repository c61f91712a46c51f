"""The report: findings, tables, and the page that holds them."""

# pandas' selections are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from pathlib import Path

import pandas as pd

from experiments.gradient_precision import sections
from experiments.gradient_precision.analysis import summarize
from experiments.gradient_precision.answers import findings
from experiments.harness.reporting import findings as said
from experiments.harness.reporting import prose, report
from experiments.harness.reporting.layout import Report, method_section
from experiments.harness.reporting.provenance import Source
from experiments.harness.reporting.values import bounds, number

_FEWEST_SEEDS = 3


def _status(summary: dict) -> list[str]:
    """What is unfinished, and each run that diverged by name."""
    status = said.trial_status({k: v for k, v in summary["trials"].items() if k != "diverged"})
    rows = summary["trials"]["diverged"]
    if rows:
        names = "; ".join(
            f"{r['size']} {r['arm']} {r['bits']} at rate {r['rate']:g}, seed {r['seed']}, step {r['step']} "
            f"({r['why']})"
            for r in rows
        )
        status.append(f"{len(rows)} runs diverged and are in no mean: {names}.")
    seeds = min((row["seeds"] for row in summary["gaps"]), default=0)
    if seeds < _FEWEST_SEEDS:
        status.append(f"Of {seeds} seeds nothing can be concluded; {_FEWEST_SEEDS} are the fewest.")
    return status


def to_text(summary: dict) -> str:
    """The findings for a terminal, and every gap."""
    lines = [said.to_text(findings(summary), _status(summary)), ""]
    for row in summary["gaps"]:
        gap = bounds(row["mean"], row["low"], row["high"], "+.4f")
        lines.append(
            f"  {row['size']:5} {row['d_over_n']:4} {row['name']:28} {row['pair']:6} {gap}  bias "
            f"{number(row['bias'], '.3f')} variance {number(row['variance'], '.3f')}"
        )
    return "\n".join(lines)


def write(workdir: Path, records: list[dict], expected: int, source: Source | None = None) -> dict:
    """Writes summary, report and figures of the records, and returns the summary.

    Args:
        workdir: where.
        records: of finished trials.
        expected: how many trials the grid has.
        source: of the records.
    """
    summary, text = summarize(records, expected), prose.read(__file__)
    made = [*sections.made(summary, text), _method(summary, records, text["Measured"])]
    title, status = "Few bits forward and backward", _status(summary)
    return report.write(workdir, Report(title, findings(summary), made, summary, status, source))


def _method(summary: dict, records: list[dict], text: list[str]):
    settings = []
    for size in dict.fromkeys(r["trial"]["size"] for r in records):
        t = next(r["trial"] for r in records if r["trial"]["size"] == size)
        settings.append(
            f"Size {size}: {t['data']} (fingerprint {t['data_fingerprint']}), batches of {t['batch']} × "
            f"{t['sequence']} tokens, computed in {t['dtype']}, K = {t['draws']} draws of a gradient."
        )
    programs = pd.DataFrame(summary["programs"])
    caption = (
        "How often each program was compiled, at most, and for how many pairs of bits it serves"
    )
    folded = [(caption, programs)] if len(programs) else []
    return method_section(text, summary, settings, folded)

"""The report: the finding in words, tables, and the page that holds it all."""

# pandas' selections and groups, and Altair's layers, are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from pathlib import Path

import pandas as pd

from experiments.harness.reporting import report
from experiments.ptq_overtraining import added_laws, figures
from experiments.ptq_overtraining.analysis import (
    KUMAR_EXPONENT,
    SCHEDULE_NAMES,
    SPLIT_NAMES,
    added_loss,
    base_loss,
    exponents,
    over_seeds,
    select,
    summarize,
)
from jaxquant.artifacts.plain import plain


def verdict(summary: dict) -> str:
    """The finding in a few sentences."""
    rows, trials = summary["headline"]["rows"], summary["trials"]
    prefix = ""
    if trials["finished"] < trials["expected"]:
        prefix += f"{trials['finished']} of {trials['expected']} trials are finished. "
    if trials["diverged"]:
        prefix += f"{len(trials['diverged'])} of them diverged and are left out. "
    if not rows:
        return prefix + "No 4-bit per-tensor measurement is there, so the main question stays open."
    by_answer: dict[str, list[str]] = {}
    for row in rows:
        by_answer.setdefault(row["grows"], []).append(_run_name(row))
    said = {
        "yes": "it does",
        "no": "it does not",
        "unresolved": "these runs do not settle it",
    }
    parts = [f"{said[k]} at {', '.join(v)}" for k, v in sorted(by_answer.items(), reverse=True)]
    if list(by_answer) == ["yes"]:
        parts = ["it does, for every size and schedule measured"]
    gammas = ", ".join(f"{_run_name(row)} {_interval(row)}" for row in rows)
    return (
        f"{prefix}Does the loss that 4-bit per-tensor quantization adds grow with training length? Here "
        f"{'; '.join(parts)}. Exponents γ_D with 90 % intervals: {gammas}; "
        f"Kumar et al. report {KUMAR_EXPONENT:.3f}."
    )


def _run_name(row: dict) -> str:
    return f"{row['size']} {SCHEDULE_NAMES[row['schedule']]}"


def _signed(value: float | None) -> str:
    return "—" if value is None else f"{value:+.4f}"


def _interval(fit: dict) -> str:
    if pd.isna(fit["gamma"]):
        return f"not determined ({fit['reason']})"
    return f"{fit['gamma']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]"


def to_text(summary: dict) -> str:
    """The finding for a terminal."""
    lines = [verdict(summary), ""]
    for row in summary["headline"]["rows"]:
        values = "  ".join(f"D/N {d}: {_signed(v)}" for d, v in row["added"].items())
        lines.append(f"  N {row['size']:>5} {SCHEDULE_NAMES[row['schedule']]:>6}   {values}")
    return "\n".join(lines)


def _headline_table(rows: list[dict]) -> pd.DataFrame:
    shown = [
        {"N": r["size"], "schedule": SCHEDULE_NAMES[r["schedule"]], "seeds": r["seeds"]}
        | {f"D/N = {d}": _signed(v) for d, v in r["added"].items()}
        | {"grows": r["grows"], "γ_D [90 %]": _interval(r)}
        for r in rows
    ]
    return pd.DataFrame(shown)


def _schedule_table(rows: list[dict]) -> pd.DataFrame:
    shown = [
        {"N": r["size"]}
        | {f"ratio at D/N = {d}": f"{v:.2f}" for d, v in r["ratio"].items()}
        | {"γ_D of cosine − of WSD [90 %]": _interval(r)}
        for r in rows
    ]
    return pd.DataFrame(shown)


def _attribution(rows: list[dict]) -> str:
    """What part the schedule has, as far as these runs tell."""
    apart = [r["size"] for r in rows if r["gamma"] is not None and r["low"] * r["high"] > 0]
    known = [r["size"] for r in rows if r["gamma"] is not None]
    told = (
        f"The growth differs between the schedules at {', '.join(apart)} (the interval excludes zero)."
        if apart
        else "At no size do these runs tell the schedules' growth apart: each interval holds zero."
    )
    return (
        "Does the schedule drive it? WSD holds the rate until the last tenth, so that if the growth were "
        "the decay's alone, WSD would show less of it. "
        + (told if known else "These runs do not determine both exponents at any size.")
    )


def _exponent_table(table: pd.DataFrame) -> pd.DataFrame:
    table = select(table, scope="linears", split="valid")
    if table.empty:
        return table
    cells = ["—" if pd.isna(row["gamma"]) else _interval(row) for row in table.to_dict("records")]
    shown = table.assign(cell=cells, schedule=table["schedule"].map(SCHEDULE_NAMES))
    pivot = shown.pivot_table(
        index=["size", "schedule", "granularity"],
        columns="bits",
        values="cell",
        aggfunc="first",
        sort=False,
    )
    pivot.columns = [f"{bits} bits" for bits in pivot.columns]
    return pivot.reset_index()


def _base_table(base: pd.DataFrame) -> pd.DataFrame:
    keys = ["size", "schedule", "split", "d_over_n", "epochs"]
    table = over_seeds(base, keys)
    return pd.DataFrame(
        {
            "N": table["size"],
            "schedule": table["schedule"].map(SCHEDULE_NAMES),
            "text": table["split"].map(SPLIT_NAMES),
            "D/N": table["d_over_n"],
            "passes over the text": table["epochs"].map("{:.2f}".format),
            "loss (nats per token)": table["mean"].map("{:.4f}".format),
            "SD over seeds": table["sd"].map(lambda x: "—" if pd.isna(x) else f"{x:.4f}"),
            "seeds": table["seeds"],
        }
    )


_EXPONENT_CAPTION = (
    "γ_D [90 % interval], blocks' linears, held-out text; a dash where it cannot be had: some run adds no "
    "loss or breaks, or there are too few lengths or seeds"
)


def write(workdir: Path, records: list[dict], expected: int) -> dict:
    """Writes summary, report and figures of the records, and returns the summary.

    Args:
        workdir: where.
        records: of finished trials.
        expected: how many trials the grid has.
    """
    added, base = added_loss(records), base_loss(records)
    summary = summarize(records, expected) | {"laws": plain(added_laws.summaries(added))}
    sections = [_question(summary, added)]
    effect = summary["headline"]["cosine_minus_wsd"]
    if effect:
        table = ("4 bits per tensor: loss added by cosine over WSD's", _schedule_table(effect))
        sections.append(
            report.Section("What the schedule has to do with it", [_attribution(effect)], [table])
        )
    if not added.empty:
        sections += [
            report.Section(
                "By granularity, text and layers",
                figures=[figures.by_granularity(added), figures.shift_and_scope(added)],
            ),
            report.Section(
                "The exponent",
                figures=[figures.exponent(exponents(added))],
                tables=[(_EXPONENT_CAPTION, _exponent_table(exponents(added)))],
            ),
            *([added_laws.section(summary["laws"])] if summary["laws"] else []),
            report.Section(
                "The models themselves",
                tables=[
                    (
                        "Unquantized loss; above one pass over the text, tokens were repeated",
                        _base_table(base),
                    )
                ],
                figures=[figures.models_themselves(base, records)],
            ),
        ]
    sections.append(_method(summary, records))
    title = "Overtraining against quantization"
    report.write(workdir, title, verdict(summary), sections, summary)
    return summary


def _question(summary: dict, added: pd.DataFrame) -> report.Section:
    tables = [
        (
            "Loss added by 4-bit per-tensor weights, in nats per token, mean over seeds",
            _headline_table(summary["headline"]["rows"]),
        )
    ]
    return report.Section(
        "Does overtraining make quantization cost more?",
        [
            "Kumar et al. (2024) found that the loss which post-training quantization adds grows as a power "
            "of the training length D. Catalan-Tatjer et al. (2025) answer that the learning-rate decay has "
            "a part in it. So each size is trained to each length under both schedules: cosine, and "
            "warm-up-stable-decay (WSD), whose lengths branch from one stable run."
        ],
        tables if summary["headline"]["rows"] else [],
        [figures.by_bits(added)] if not added.empty else [],
    )


_METHOD = (
    "Measured: each loss is the mean cross-entropy per token over the same held-out windows before and "
    "after quantization, so that added losses are paired. Simulated: weights are rounded to symmetric "
    "integer grids with absmax ranges and multiplied in floating point; nothing here is a latency or a "
    "size. Fitted: γ_D by least squares on log δ against log D with a level per seed; its interval is "
    "Student's t on the residuals, so it is as wide as few seeds and lengths make it, and the lengths of "
    "one WSD run share a trunk."
)


def _method(summary: dict, records: list[dict]) -> report.Section:
    trials, parameters, versions = (summary[k] for k in ("trials", "parameters", "versions"))
    counts = f"{trials['finished']} of {trials['expected']} trials finished, "
    counts += f"{len(trials['diverged'])} of them diverged."
    for d in trials["diverged"]:
        counts += f" Diverged: {d['size']} {d['schedule']} seed {d['seed']} at step {d['step']}."
    paragraphs = [
        _METHOD,
        counts,
        "Non-embedding parameters N: "
        + ", ".join(f"{k} = {v:,}" for k, v in parameters.items())
        + ".",
        "Versions: "
        + "; ".join(", ".join(f"{k} {v}" for k, v in one.items()) for one in versions)
        + ".",
    ]
    if records:
        t = records[0]["trial"]
        counts_by_text = {
            k: v for r in records for p in r["points"] for k, v in p["windows"].items()
        }
        windows = ", ".join(f"{n} of text {SPLIT_NAMES[k]}" for k, n in counts_by_text.items())
        setting = (
            f"Data: {t['data']} {t['data_path']} (fingerprint {t['data_fingerprint']}); sequences of "
            f"{t['sequence']} tokens, batches of {t['batch']}; AdamW (0.9, 0.95), weight decay 0.1, clipping "
            f"at 1, peak learning rate {t['peak_lr']}, {t['dtype']}; evaluation windows: {windows}."
        )
        paragraphs.insert(2, setting)
    return report.Section("How this was measured", paragraphs)

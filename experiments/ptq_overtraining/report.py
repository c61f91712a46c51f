"""The report: findings, tables, and the page that holds them."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false

import dataclasses
from pathlib import Path

import pandas as pd

from experiments.harness.reporting import findings as found
from experiments.harness.reporting import prose, report
from experiments.harness.reporting.findings import UNRESOLVED, Finding
from experiments.harness.reporting.layout import Report, Section, method_section
from experiments.harness.reporting.provenance import Source
from experiments.harness.reporting.statistics import corrected, is_discovery
from experiments.harness.reporting.values import bounds, number
from experiments.ptq_overtraining import (
    added_laws,
    corrections,
    figures,
    one_exponent,
    passes,
    rates,
    solvers,
)
from experiments.ptq_overtraining.analysis import (
    SCHEDULE_NAMES,
    SPLIT_NAMES,
    added_loss,
    at_best,
    base_loss,
    best_rates,
    exponents,
    main_rows,
    over_seeds,
    select,
    summarize,
    varied,
)
from jaxquant.artifacts.plain import plain

_GROWTH = "Does the loss that 4-bit per-tensor quantization adds grow with training length?"
_SCHEDULE = "Does it grow differently under cosine and under WSD?"


def findings(summary: dict) -> list[Finding]:
    """What was asked and answered."""
    headline = summary["headline"]
    if not headline["rows"]:
        none = "no 4-bit per-tensor measurement is there"
        return [Finding(_GROWTH, "exponent γ_D", UNRESOLVED, note=none)]
    tuned = rates.findings(summary.get("rates", []))
    effects = headline["cosine_minus_wsd"]
    q_values = corrected([row["p_value"] for row in effects])
    return [
        *(tuned or map(_growth, corrections.tested(headline["rows"]))),
        *map(_schedule, effects, q_values),
        *passes.findings(summary.get("passes", {})),
        *solvers.findings(summary.get("solvers", [])),
        *one_exponent.findings(summary.get("one_exponent", [])),
        *added_laws.findings(summary.get("laws", [])),
    ]


def _growth(row: dict) -> Finding:
    quantity = f"γ_D, N = {row['size']}, {SCHEDULE_NAMES[row['schedule']]}"
    note = f"not determined: {row['reason']}" if row["reason"] else corrections.note(row)
    is_sure = row["grows"] != "yes" or is_discovery(row["q_zero"])
    return Finding(
        _GROWTH,
        quantity,
        row["grows"] if is_sure else UNRESOLVED,
        *(row[k] for k in ("gamma", "low", "high")),
        published=corrections.KUMAR,
        q_published=row["q_published"],
        note=note,
        least_effect=_half(row),
    )


def _schedule(row: dict, q: float | None) -> Finding:
    quantity = f"γ_D of cosine − of WSD, N = {row['size']}"
    if row["gamma"] is None:
        return Finding(_SCHEDULE, quantity, UNRESOLVED, note=row["reason"])
    found_row = {"mean": row["gamma"], "low": row["low"], "high": row["high"]}
    answers = "faster under cosine", "faster under WSD"
    note = f"q {corrections.q_text(q)}"
    made = found.from_mean(_SCHEDULE, quantity, found_row, *answers, form="+.2f", note=note)
    return made if is_discovery(q) else dataclasses.replace(made, answer=UNRESOLVED)


def _half(row: dict) -> float | None:
    return None if row["gamma"] is None else (row["high"] - row["low"]) / 2


def to_text(summary: dict) -> str:
    """The findings for a terminal, and the loss added at each length."""
    lines = [found.to_text(findings(summary), found.trial_status(summary["trials"])), ""]
    for row in summary["headline"]["rows"]:
        values = "  ".join(f"D/N {d}: {number(v, '+.4f')}" for d, v in row["added"].items())
        lines.append(f"  N {row['size']:>5} {SCHEDULE_NAMES[row['schedule']]:>6}   {values}")
    return "\n".join(lines)


def _headline_table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"N": r["size"], "schedule": SCHEDULE_NAMES[r["schedule"]], "seeds": r["seeds"]}
            | {f"D/N = {d}": number(v, "+.4f") for d, v in r["added"].items()}
            for r in rows
        ]
    )


_HEADLINE_TESTS = "γ_D of 4 bits per tensor against zero and the published one; q over these rows"


def _headline_tests(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"N": r["size"], "schedule": SCHEDULE_NAMES[r["schedule"]]}
            | {"γ_D [90 %]": bounds(r["gamma"], r["low"], r["high"], ".2f")}
            | corrections.columns(r)
            for r in corrections.tested(rows)
        ]
    )


def _effect_tests(rows: list[dict]) -> pd.DataFrame:
    q_values = corrected([row["p_value"] for row in rows])
    return pd.DataFrame(
        [
            {"N": r["size"], "difference [90 %]": bounds(r["gamma"], r["low"], r["high"], "+.2f")}
            | {"p": corrections.q_text(r["p_value"]), "q": corrections.q_text(q)}
            for r, q in zip(rows, q_values, strict=True)
        ]
    )


def _ratio_table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        [{"N": r["size"]} | {f"D/N = {d}": f"{v:.2f}" for d, v in r["ratio"].items()} for r in rows]
    )


def _exponent_table(table: pd.DataFrame) -> pd.DataFrame:
    table = select(table, scope="linears", split="valid")
    if table.empty:
        return table
    rows = table.to_dict("records")
    cells = [bounds(row["gamma"], row["low"], row["high"], ".2f") for row in rows]
    shown = table.assign(cell=cells, schedule=table["schedule"].map(SCHEDULE_NAMES))
    pivot = shown.pivot_table(
        index=["size", "schedule", *varied(table), "granularity"],
        columns="bits",
        values="cell",
        aggfunc="first",
        sort=False,
    )
    pivot.columns = [f"{bits} bits" for bits in pivot.columns]
    return pivot.reset_index()


def _base_table(base: pd.DataFrame) -> pd.DataFrame:
    by = varied(base)
    table = over_seeds(base, ["size", "schedule", "split", "d_over_n", "epochs", *by])
    return pd.DataFrame(
        {
            "N": table["size"],
            "schedule": table["schedule"].map(SCHEDULE_NAMES),
            **({"peak rate": table["peak_lr"]} if by else {}),
            "text": table["split"].map(SPLIT_NAMES),
            "D/N": table["d_over_n"],
            "loss (nats per token)": table["mean"].map("{:.4f}".format),
            "SD over seeds": table["sd"].map(lambda x: number(x, ".4f")),
            "passes over the text": table["epochs"].map("{:.2f}".format),
            "seeds": table["seeds"],
        }
    )


_EXPONENTS = (
    "γ_D [90 % interval], blocks' linears, held-out text; a dash where some run adds no loss or breaks, "
    "or where there are too few lengths or seeds"
)
_TESTS = (
    "Exponents against zero and against the published one: p of each by itself, and q by Benjamini and "
    "Hochberg over all exponents of this study, those of other layers and texts included"
)
_SETTINGS = {"peak_lr": "peak rate", "solver": "solver"}
_TEXTS = {"rates": "Rates", "passes": "Passes", "solvers": "Solvers"}
_BASE = "Unquantized loss; above one pass over the text, tokens were repeated"


def write(workdir: Path, records: list[dict], expected: int, source: Source | None = None) -> dict:
    """Writes summary, report and figures of the records, and returns the summary.

    Args:
        workdir: where.
        records: of finished trials.
        expected: how many trials the grid has.
        source: of the records.
    """
    everything, base = added_loss(records), base_loss(records)
    added, best = main_rows(everything, base), best_rates(base)
    summary = summarize(records, expected)
    summary["exponents"] = corrections.tested(summary["exponents"])
    summary |= {"laws": plain(added_laws.summaries(added))}
    summary |= {"one_exponent": plain(one_exponent.summaries(added))}
    further = {
        "rates": rates.summaries(everything, base),
        "passes": passes.summaries(added),
        "solvers": solvers.summaries(at_best(everything, best)),
    }
    summary |= {name: plain(one) for name, one in further.items() if one}
    text = prose.read(__file__)
    sections = [_question(summary, added, text)]
    made = {"rates": rates.section, "passes": passes.section, "solvers": solvers.section}
    sections += [make(summary[k], text[_TEXTS[k]]) for k, make in made.items() if k in summary]
    if not added.empty:
        sections += [
            Section(
                "By granularity, text and layers",
                figures=[figures.by_granularity(added), figures.shift_and_scope(added)],
            ),
            Section(
                "The exponent by bits",
                figures=[figures.exponent(exponents(added))],
                folded=[
                    (_EXPONENTS, _exponent_table(exponents(everything))),
                    (_TESTS, _tests_table(summary["exponents"])),
                ],
            ),
            *_one_exponent(summary["one_exponent"], text["One exponent"]),
            *([added_laws.section(summary["laws"], text["One law"])] if summary["laws"] else []),
            Section(
                "The models themselves",
                figures=[figures.models_themselves(at_best(base, best), _chosen(records, best))],
                folded=[(_BASE, _base_table(base))],
            ),
        ]
    sections.append(method_section(text["Measured"], summary, _settings(summary, records)))
    title, status = "Overtraining against quantization", found.trial_status(summary["trials"])
    made = Report(title, findings(summary), sections, summary, status, source)
    return report.write(workdir, made)


def _one_exponent(rows: list[dict], paragraphs: list[str]) -> list[Section]:
    return [one_exponent.section(rows, paragraphs)] if rows else []


def _tests_table(rows: list[dict]) -> pd.DataFrame:
    shown = [r for r in rows if r["scope"] == "linears" and r["split"] == "valid"]
    return pd.DataFrame(
        [
            {"N": r["size"], "schedule": SCHEDULE_NAMES[r["schedule"]]}
            | {name: r[k] for k, name in _SETTINGS.items() if k in r}
            | {"one scale per": r["granularity"], "bits": r["bits"]}
            | {"γ_D": number(r["gamma"], ".2f")}
            | corrections.columns(r)
            for r in shown
        ]
    )


def _chosen(records: list[dict], best: dict[tuple[str, str], float]) -> list[dict]:
    """The records at the best rate of their size and schedule."""
    trials = [r["trial"] for r in records]
    kept = [best.get((t["size"], t["schedule"])) == t["peak_lr"] for t in trials]
    return [r for r, is_kept in zip(records, kept, strict=True) if is_kept]


def _question(summary: dict, added: pd.DataFrame, text: dict[str, list[str]]) -> Section:
    rows, effect = (summary["headline"][k] for k in ("rows", "cosine_minus_wsd"))
    caption = "Loss added by 4-bit per-tensor weights, in nats per token, mean over seeds"
    tables = [(caption, _headline_table(rows))] if rows else []
    folded = []
    if rows:
        folded.append((_HEADLINE_TESTS, _headline_tests(rows)))
    if effect:
        folded.append(("Loss added under cosine over that under WSD, 4 bits", _ratio_table(effect)))
        folded.append(("γ_D of cosine − of WSD against zero", _effect_tests(effect)))
    paragraphs = [*text["Question"], *(text["Schedules"] if effect else [])]
    paragraphs += text["At the best rate"] if "rates" in summary else []
    drawn = [] if added.empty else [figures.by_bits(added)]
    return Section("Loss added against training length", paragraphs, tables, drawn, folded)


def _settings(summary: dict, records: list[dict]) -> list[str]:
    sizes = ", ".join(f"{k} = {v:,}" for k, v in summary["parameters"].items())
    said = [f"Non-embedding parameters N: {sizes}."]
    if records:
        t = records[0]["trial"]
        peaks = ", ".join(f"{x:g}" for x in sorted({r["trial"]["peak_lr"] for r in records}))
        counts = {k: v for r in records for p in r["points"] for k, v in p["windows"].items()}
        windows = ", ".join(f"{n} of text {SPLIT_NAMES[k]}" for k, n in counts.items())
        said.append(
            f"Data: {t['data']} {t['data_path']} (fingerprint {t['data_fingerprint']}); sequences of "
            f"{t['sequence']} tokens, batches of {t['batch']}; AdamW (0.9, 0.95), weight decay 0.1, clipping "
            f"at 1, peak learning rate {peaks}, {t['dtype']}; evaluation windows: {windows}."
        )
    return said

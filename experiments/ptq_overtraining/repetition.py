"""Sets runs on less and more text side by side: does the growth slow down where text is repeated?

    python -m experiments.ptq_overtraining.repetition --workdirs=WHOLE,HALF,EIGHTH --workdir=DIR

Each of the workdirs is of the study ptq_overtraining, with another --config.data_path: 1/2, 1/8 or none.
Writes DIR/summary.json and DIR/report.html.
"""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from absl import flags

from experiments.harness.reporting import findings as found
from experiments.harness.reporting import prose, report
from experiments.harness.reporting.charts import Axis, Scale, facets, labelled_lines
from experiments.harness.reporting.findings import Finding
from experiments.harness.reporting.layout import Figure, Report, Section
from experiments.harness.reporting.statistics import corrected, t_interval, t_p_value
from experiments.harness.reporting.values import bounds, number, rows_of, versions_of
from experiments.harness.running import cli, record_store
from experiments.ptq_overtraining import corrections
from experiments.ptq_overtraining.analysis import (
    HEADLINE,
    SCHEDULE_NAMES,
    added_loss,
    base_loss,
    fit_exponent,
    main_rows,
    select,
)
from jaxquant.artifacts.plain import plain

FLAGS = flags.FLAGS
_QUESTION = "Does the growth slow down where text is repeated?"
_KEYS = ["size", "schedule", "granularity", "bits"]


def load(workdirs: Sequence[str]) -> tuple[pd.DataFrame, list[dict]]:
    """What the runs of several workdirs add, on held-out text, with a column "text"; and all records.

    Texts come in the order of their passes: the one that is repeated least is first.

    Raises:
        ValueError: fewer than two workdirs; one that is no workdir of this study, that holds several texts,
            or the text of another one.
    """
    if len(workdirs) < 2:
        raise ValueError(f"--workdirs names two workdirs or more, as in a,b; got {workdirs}")
    tables, records = {}, []
    for workdir in workdirs:
        own = record_store.read_records(workdir, "ptq_overtraining")
        texts = sorted({_text(record["trial"]) for record in own})
        if len(texts) > 1 or texts[0] in tables:
            raise ValueError(
                f"--workdirs hold one text each, no two of them the same; '{workdir}' holds "
                f"{' and '.join(texts)}"
            )
        added = main_rows(added_loss(own), base_loss(own))
        kept = select(added, scope=HEADLINE["scope"], split=HEADLINE["split"])
        tables[texts[0]] = kept.assign(text=texts[0])
        records += own
    ordered = sorted(tables.values(), key=lambda table: _passes_per_token(table))
    return pd.concat(ordered, ignore_index=True), records


def _text(trial: dict) -> str:
    """The name of a trial's training text."""
    return f"{trial['data']} {trial['data_path']}".strip()


def _passes_per_token(table: pd.DataFrame) -> float:
    return float((table["epochs"] / table["tokens"]).max())


def exponents(table: pd.DataFrame) -> list[dict]:
    """γ_D of each text, size, schedule, granularity and width, with what is added at each length."""
    rows = []
    for key, runs in table.groupby(["text", *_KEYS], sort=False):
        means = runs.groupby("d_over_n")["mean"].mean()
        row = dict(zip(["text", *_KEYS], key, strict=True)) | fit_exponent(runs)
        row["passes"] = [float(runs["epochs"].min()), float(runs["epochs"].max())]
        rows.append(row | {"added": {str(d): float(v) for d, v in means.items()}})
    return corrections.tested(rows)


def differences(table: pd.DataFrame) -> list[dict]:
    """γ_D of each text less that of the first, in pairs of one seed, over the lengths that both have."""
    rows = []
    for key, runs in table.groupby(_KEYS, sort=False):
        own = {text: _slopes(group) for text, group in runs.groupby("text", sort=False)}
        rows += _against_first(own, dict(zip(_KEYS, key, strict=True)))
    return _with_q(rows)


def steps(table: pd.DataFrame) -> list[dict]:
    """The slope of log δ by log D from each length to the next, of the headline's width, by text.

    With it goes the difference from the same step of the first text, in pairs of one seed.
    """
    rows = []
    for key, runs in select(table, bits=HEADLINE["bits"]).groupby(_KEYS, sort=False):
        for start, end in itertools.pairwise(sorted(set(runs["d_over_n"]))):
            step = runs[runs["d_over_n"].isin((start, end))]
            slopes = {text: _slopes(group) for text, group in step.groupby("text", sort=False)}
            of = dict(zip(_KEYS, key, strict=True)) | {"from": int(start), "to": int(end)}
            change = {row["text"]: row for row in _against_first(slopes, of)}
            for text, values in slopes.items():
                passes = select(step, text=text)["epochs"]
                row = of | {"text": text, "passes": [float(passes.min()), float(passes.max())]}
                rows.append(row | _mean(values) | {"difference": change.get(text)})
    changed = [row["difference"] for row in rows if row["difference"]]
    for row, q in zip(changed, corrected([c["p_value"] for c in changed]), strict=True):
        row["q_value"] = q
    return rows


def _slopes(runs: pd.DataFrame) -> pd.Series:
    """The slope of each seed whose lengths all add loss."""
    own = {}
    for seed, run in runs.groupby("seed"):
        if len(run) > 1 and (run["mean"].to_numpy() > 0).all():
            own[seed] = float(np.polyfit(np.log(run["tokens"]), np.log(run["mean"]), 1)[0])
    return pd.Series(own, dtype=float)


def _against_first(slopes: dict[str, pd.Series], of: dict) -> list[dict]:
    (first, base), *others = slopes.items()
    pairs = [(text, (own - base).dropna()) for text, own in others]
    return [of | {"text": text, "first": first} | _mean(d) for text, d in pairs if len(d)]


def _mean(values: pd.Series) -> dict:
    row: dict = dict.fromkeys(("mean", "low", "high", "p_value")) | {"seeds": len(values)}
    if len(values):
        row["mean"], row["low"], row["high"] = t_interval(values)
        row["p_value"] = t_p_value(values)
    return row


def _with_q(rows: list[dict]) -> list[dict]:
    q_values = corrected([row["p_value"] for row in rows])
    return [row | {"q_value": q} for row, q in zip(rows, q_values, strict=True)]


def findings(rows: list[dict]) -> list[Finding]:
    """Whether γ_D of 4 bits is smaller on text that is repeated more; q-values are over all of `rows`."""
    return [
        Finding(
            _QUESTION,
            f"γ_D on {row['text']} − on {row['first']}, {_where(row)}",
            corrections.sign(row["mean"], row["q_value"], "no, faster", "yes"),
            *(row[k] for k in ("mean", "low", "high")),
            form="+.2f",
            least_effect=None if row["low"] is None else (row["high"] - row["low"]) / 2,
            note=f"{row['seeds']} pairs of a seed; q {corrections.q_text(row['q_value'])}",
        )
        for row in rows
        if row["bits"] == HEADLINE["bits"]
    ]


def _where(row: dict) -> str:
    schedule = SCHEDULE_NAMES[row["schedule"]]
    return f"{row['bits']} bits per {row['granularity']}, N = {row['size']}, {schedule}"


def write(workdir: str | Path, table: pd.DataFrame, records: list[dict]) -> dict:
    """Writes summary and report of `load`'s table, and returns the summary."""
    own, changes, local = exponents(table), differences(table), steps(table)
    summary = {
        "study": "ptq_overtraining.repetition",
        "texts": list(dict.fromkeys(table["text"])),
        "exponents": plain(own),
        "differences": plain(changes),
        "steps": plain(local),
        "added_loss": rows_of(table[["text", *_KEYS, "seed", "d_over_n", "epochs", "mean", "se"]]),
        "versions": versions_of(records),
    }
    section = Section(
        "Growth by text and passes over it",
        prose.read(__file__)["Repetition"],
        [
            ("γ_D [90 %] by text", _exponent_table(own)),
            ("The same, from length to length", _step_table(local)),
        ],
        [_figure(table)],
        [("γ_D less that of the first text, in pairs of one seed", _difference_table(changes))],
    )
    return report.write(
        Path(workdir), Report("Growth on repeated text", findings(changes), [section], summary)
    )


def _named(row: dict) -> dict:
    named = {"text": row["text"], "N": row["size"], "schedule": SCHEDULE_NAMES[row["schedule"]]}
    return named | {"one scale per": row["granularity"], "bits": row["bits"]}


def _passes(row: dict) -> str:
    return "{:.2f} to {:.2f}".format(*row["passes"])


def _exponent_table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            _named(r)
            | {"passes over the text": _passes(r)}
            | {f"D/N = {d}": number(v, "+.4f") for d, v in r["added"].items()}
            | {"γ_D": bounds(r["gamma"], r["low"], r["high"], ".2f")}
            | corrections.columns(r)
            for r in rows
        ]
    )


def _difference_table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame([_named(r) | _difference(r) for r in rows])


def _difference(row: dict | None) -> dict:
    if row is None:
        return dict.fromkeys(("less the first text's", "p", "q"), "—")
    return {
        "less the first text's": bounds(row["mean"], row["low"], row["high"], "+.2f"),
        "p": corrections.q_text(row["p_value"]),
        "q": corrections.q_text(row["q_value"]),
    }


def _step_table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            _named(r)
            | {"D/N": f"{r['from']} to {r['to']}", "passes over the text": _passes(r)}
            | {"slope": bounds(r["mean"], r["low"], r["high"], ".2f"), "seeds": r["seeds"]}
            | _difference(r["difference"])
            for r in rows
        ]
    )


def _figure(table: pd.DataFrame) -> Figure:
    own = select(table, bits=HEADLINE["bits"])
    own = own[own["mean"] > 0]
    scale = Scale.of("training text", own["text"])
    x = Axis(
        "d_over_n", "D/N, training tokens per parameter", True, ticks=sorted(set(own["d_over_n"]))
    )
    y = Axis("mean", "loss added (nats per token)", is_log=True)

    def draw(rows: pd.DataFrame):
        shown = rows[["text", "d_over_n", "mean"]]
        means = shown.groupby(["text", "d_over_n"], sort=False)["mean"].mean().reset_index()
        return labelled_lines(means, shown, x, y, "text", scale)

    return Figure(
        "repetition",
        "Loss added by 4 bits, by training text",
        "A line is the mean over seeds, a point one seed; both axes are logarithmic.",
        facets(own, ["size", "schedule", "granularity"], draw, _panel),
        [scale],
    )


def _panel(size: str, schedule: str, granularity: str) -> str:
    return f"N = {size}, {SCHEDULE_NAMES[schedule]}, per {granularity}"


@dataclasses.dataclass(frozen=True)
class Config:
    """Nothing is to be set."""


def run(_: Config) -> None:
    """Reads --workdirs, writes --workdir, and prints the findings."""
    if not FLAGS.workdir:
        raise ValueError("--workdir names the folder of the report; got none")
    if Path(FLAGS.workdir).resolve() in {Path(w).resolve() for w in FLAGS.workdirs}:
        raise ValueError(
            f"--workdir is a folder of its own, whose report is written; got one of --workdirs, "
            f"'{FLAGS.workdir}'"
        )
    table, records = load(FLAGS.workdirs)
    summary = write(FLAGS.workdir, table, records)
    print(found.to_text(findings(summary["differences"])))
    print(f"report: {str(FLAGS.workdir).rstrip('/')}/report.html")


if __name__ == "__main__":
    flags.DEFINE_list(
        "workdirs", [], "Workdirs of ptq_overtraining, each of another training text."
    )
    flags.DEFINE_string("workdir", None, "Folder of the report.")
    cli.main(run, {"default": Config()}, default="default")

"""The report: efficiencies and the gap's growth in published runs, and whether ours predict it."""

# Altair's layers are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import dataclasses
from collections.abc import Callable
from pathlib import Path

import altair as alt
import pandas as pd

from experiments.harness.reporting import findings, report
from experiments.harness.reporting.findings import UNRESOLVED, Finding, Published
from experiments.harness.reporting.law_tables import fit_summary, fit_table, laws_table
from experiments.harness.reporting.layout import Figure, Report, Section
from experiments.harness.reporting.values import bounds, number, rows_of
from experiments.harness.running import files
from experiments.public_runs import efficiencies, gaps
from experiments.public_runs.analysis import NEAREST, SHARED, TRANSFERRED, Found, Tables
from experiments.public_runs.gaps import SUM, Growth
from experiments.public_runs.joint import Joint
from jaxquant.artifacts.plain import plain

_JOINT_CAPTION = "Laws ranked by AICc of the independent runs; R² of log L, held out by N and by D"
_AGAIN = "Are the published efficiencies found again?"
_GROWS = "Does the gap to full precision grow with D in the published runs?"
_SHRINKS = "Does it shrink with N in the published runs?"
_PREDICTS = "Do exponents of our runs predict those of the published gap?"
_SYMBOLS = {"gamma_D": "γ_D", "gamma_N": "γ_N", SUM: "γ_D + γ_N"}


def findings_of(found: Found) -> list[Finding]:
    """What was asked and answered."""
    said = [_again(e) for e in found.efficiencies if e.published is not None]
    shown = [g for g in found.growths if len(g.params) > 1 and "law" not in g.of]
    said += [_signed(_GROWS, g, "gamma_D", "yes", "no, it shrinks") for g in shown]
    said += [_signed(_SHRINKS, g, "gamma_N", "no, it grows", "yes") for g in shown]
    said += [_predicts(g, found.theirs, name) for g in found.ours for name in found.theirs.params]
    short = next((g for g in found.ours if g.of.endswith(SHARED)), None)
    if found.theirs_short is not None and short is not None:
        both = set(short.params) & set(found.theirs_short.params)
        said += [_predicts(short, found.theirs_short, name) for name in sorted(both)]
    return said


def _again(one: efficiencies.Efficiency) -> Finding:
    published = Published(one.published or 0.0, one.published or 0.0, one.source)
    said = Finding(
        _AGAIN,
        f"{one.of}, {one.how}",
        UNRESOLVED,
        one.value,
        one.low,
        one.high,
        form=".3f",
        null=None,
        published=published,
    )
    return dataclasses.replace(said, answer="yes" if said.against == "agrees" else "no")


def _signed(question: str, growth: Growth, name: str, above: str, below: str) -> Finding:
    low, high = growth.interval(name)
    answer = above if low > 0 else below if high < 0 else UNRESOLVED
    quantity = f"{growth.of}: {_SYMBOLS[name]}"
    return Finding(question, quantity, answer, growth.params[name], low, high, form=".3f")


def _predicts(ours: Growth, theirs: Growth, name: str) -> Finding:
    value, low, high = gaps.difference(ours, theirs, name)
    answer = "no, above" if low > 0 else "no, below" if high < 0 else "not told apart"
    quantity = f"{ours.of}, less {theirs.of}: {_SYMBOLS[name]}"
    both = f"{ours.params[name]:.3f} beside {theirs.params[name]:.3f}"
    return Finding(_PREDICTS, quantity, answer, value, low, high, form="+.3f", note=both)


def _growth_table(growths: list[Growth]) -> pd.DataFrame:
    rows = []
    for growth in growths:
        row = {"runs": growth.of, "pairs": growth.pairs, "units": growth.units}
        for name, symbol in _SYMBOLS.items():
            ends = growth.interval(name) if name in growth.params else (None, None)
            row[symbol] = bounds(growth.params.get(name), *ends, ".3f")
        rows.append(row | {"scatter of log gap": number(growth.spread), "form": growth.form})
    return pd.DataFrame(rows)


def _ratio_table(ratios: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for row in ratios.to_dict("records"):
        shown = {"size": row["size"], "D": f"{row['D from']:.2g} to {row['D to']:.2g}"}
        shown["measured"] = bounds(row["measured"], row["low"], row["high"], ".2f")
        predicted = {str(k): v for k, v in row.items() if isinstance(v, tuple)}
        rows.append(shown | {k: bounds(*v, ".2f") for k, v in predicted.items()})
    return pd.DataFrame(rows)


def _efficiency_table(found: list[efficiencies.Efficiency]) -> pd.DataFrame:
    rows = [
        {
            "efficiency": e.of,
            "fit": e.how,
            "here [90 %]": bounds(e.value, e.low, e.high, ".3f"),
            "published": number(e.published, ".3f"),
        }
        for e in found
    ]
    return pd.DataFrame(rows)


def figure(found: Found) -> Figure:
    """The published gap by length, and what ours predicts from its first point on."""
    chosen = [g for g in found.ours if g.of.startswith(NEAREST) or g.of == TRANSFERRED]
    lines = []
    for size, own in found.forward.groupby("size", sort=False):
        first = own.loc[own["D"].idxmin()]
        rows = own[["D", "added"]].assign(size=size, of="measured")
        lines.append(rows)
        for growth in chosen:
            power = (own["D"] / first["D"]) ** growth.params["gamma_D"]
            lines.append(rows.assign(added=first["added"] * power, of=growth.of))
    table = pd.concat(lines)
    logarithmic = alt.Scale(type="log", nice=False)
    chart = alt.Chart(table).encode(
        x=alt.X("D:Q", title="tokens D", scale=logarithmic, axis=alt.Axis(format=".0e")),
        y=alt.Y("added:Q", title="gap (nats per token)", scale=logarithmic),
        color=alt.Color("size:N", title="size", sort=list(found.forward["size"].unique())),
        strokeDash=alt.StrokeDash(
            "of:N",
            title="gap",
            sort=["measured", *(g.of for g in chosen)],
            legend=alt.Legend(symbolType="stroke", labelLimit=400, columns=1),
        ),
    )
    panel = chart.mark_line().properties(title="Quartet's gap, FP4 forward")
    return Figure(
        "gap",
        "How the gap grows with training",
        "Lines of our exponents begin at the first measured gap of each size.",
        [panel],
    )


def _sections(tables: Tables, found: Found) -> list[Section]:
    counts = (
        f"QuEST: {len(tables.quest)} runs. Quartet: {len(tables.quartet)} runs. Ours: "
        + ", ".join(f"{len(own)} with {name}" for name, own in tables.ours.items())
        + "."
    )
    rising = "Left out, as their loss lies above that of a shorter run of the same kind"
    read = [counts, f"{rising}: {len(tables.left_out)}."]
    units = (
        "Units of the bootstrap are (size, length) in the published tables, whose runs have one seed, and "
        "(size, seed) in ours. So the intervals of published exponents hold the scatter of runs and what the "
        "form does not catch, and no seed's; those of QuEST's own pairs have four to six units."
    )
    growth = (
        "Pairs have one N and D, and D/N of about 100 alone in QuEST's own: there the runs tell γ_D + γ_N "
        "alone. Its shorter runs are paired with Quartet's full precision of the same N and D. One width: "
        "least squares on log gap. Several widths: `laws.GAP_ERROR`, Huber's loss."
    )
    measured = (
        "Measured ratios are of two single runs. Their intervals are Student's, of the scatter about the "
        "fit."
    )
    return [
        Section("What was read", read, [(rising, tables.left_out)] if len(tables.left_out) else []),
        Section(
            "Efficiencies",
            [units],
            [("Efficiencies by the published forms", _efficiency_table(found.efficiencies))],
            folded=[
                (f"{name}: {fit.law.equation}", fit_table(plain(fit_summary(fit))))
                for name, fit in found.fits.items()
            ],
        ),
        Section(
            "How the gap grows in the published runs",
            [growth],
            [("gap = C D^γ_D N^γ_N", _growth_table(found.growths))],
            folded=[("Full precision in both tables", _full_table(found.full))],
        ),
        _joint(found.joint),
        Section(
            "What our runs predict",
            [measured],
            [
                ("Our exponents", _growth_table(found.ours)),
                ("gap(largest D) / gap(smallest D)", _ratio_table(found.ratios)),
            ],
            [figure(found)],
        ),
    ]


def _joint(joint: Joint) -> Section:
    growing = plain(fit_summary(joint.growing))
    said = (
        f"{joint.runs} runs of Quartet's: full precision, FP4 forward, FP4 backward with stochastic "
        f"rounding, and both; worth {joint.independent:.0f} independent ones, since runs of one size and "
        "length share what the law of full precision is off by. All laws have that one's form. The runs have "
        "four bits alone, so nothing here says how the loss varies with bits. AICc asks whether parameters "
        "pay for themselves on so few runs; R² held out asks which law predicts."
    )
    return Section(
        "Which law of forward and backward bits they obey",
        [said, *(f"Warning: {text}." for text in joint.warnings)],
        [
            (_JOINT_CAPTION, laws_table(plain(joint.rows))),
            (growing["equation"], fit_table(growing)),
        ],
    )


def _full_table(full: pd.DataFrame) -> pd.DataFrame:
    columns = {"size": "size", "loss": "QuEST", "loss of Quartet": "Quartet"}
    ordered = full.sort_values("N")
    shown = ordered[[*columns, "difference"]].rename(columns=columns)
    form: Callable = "{:.5f}".format
    return shown.assign(**{c: shown[c].map(form) for c in ("QuEST", "Quartet", "difference")})


def write(workdir: str | Path, tables: Tables, found: Found) -> str:
    """Writes ``summary.json``, ``fits.json``, ``report.html`` and the figure; returns the findings in words.

    The fits are the summary without rows of the published tables, so that they may be kept by others.

    Args:
        workdir: a folder.
        tables: that were read.
        found: of `analysis.analyse`.
    """
    summary = {
        "runs": {"quest": len(tables.quest), "quartet": len(tables.quartet)}
        | {f"ours, {name}": len(own) for name, own in tables.ours.items()},
        "left_out": rows_of(tables.left_out),
        "efficiencies": [dataclasses.asdict(e) for e in found.efficiencies],
        "fits": {name: fit_summary(fit) for name, fit in found.fits.items()},
        "growths": [g.row() for g in found.growths],
        "ours": [g.row() for g in found.ours],
        "ratios": found.ratios.to_dict("records"),
        "full_precision": rows_of(found.full),
        "laws": found.joint.rows,
        "independent": found.joint.independent,
        "growing": fit_summary(found.joint.growing),
    }
    theirs = ("left_out", "full_precision")  # rows of the published tables themselves
    fits = {name: value for name, value in plain(summary).items() if name not in theirs}
    said = findings_of(found)
    files.write_json(Path(workdir) / "fits.json", fits)
    title = "Published runs beside ours"
    report.write(Path(workdir), Report(title, said, _sections(tables, found), plain(summary)))
    return findings.to_text(said)

"""What to train for a budget: python -m experiments.plan --flops=1e21 --serve_bits=4 --fit=kumar2024.

Prints runs by precision, the best of them, and what is not known; --workdir keeps that, with a figure.
`--fit` is published constants or the records of a study of our own (its workdir).  By a study's records, the
law is the one that they do not reject, and Kumar et al.'s stands beside it.  Where they have backward widths,
as gradient_precision's have, bits of both passes are planned.  `--chip` counts bits by a chip's
published peak rates, as --chip=h100.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
from absl import flags

from experiments import costs
from experiments.gradient_precision import planning as passes
from experiments.gradient_precision.study import STUDY as GRADIENT
from experiments.harness.reporting import report
from experiments.harness.reporting.layout import Figure, Report, Section
from experiments.harness.running import cli
from experiments.training_precision import analysis, planning
from experiments.training_precision.study import STUDY
from jaxquant import laws

FLAGS = flags.FLAGS
_ASKED = ("flops", "params", "tokens", "serve_bits", "memory")
_HARDWARE = ("chip", "operands")
PUBLISHED = ("kumar2024", "quest2025")
REJECTED = (
    "runs of this project, of small models, reject this form for the bits of training: what these cost grows "
    "with the tokens; --fit=experiments/results/training_precision/full plans by one that they do not reject"
)


def define_flags() -> None:
    number = flags.DEFINE_float
    number("flops", None, "C, operations of training that cost as 16-bit ones.")
    number("params", None, "N, parameters without embeddings; where not given, the best.")
    number("tokens", None, "D, training tokens; where not given, the best.")
    number("serve_bits", None, "Bits of the weights in serving; as trained where not given.")
    number("memory", None, "Bytes that the weights may take in serving.")
    flags.DEFINE_string(
        "fit",
        "kumar2024",
        f"One of {', '.join(PUBLISHED)}, or the workdir of a {STUDY.name} or {GRADIENT.name} study.",
    )
    methods = ", ".join(analysis.METHOD_NAMES)
    flags.DEFINE_string(
        "method",
        None,
        f"Of a study's fit, whose law: {methods}, ste if not given; or a grid of {GRADIENT.name}, its first.",
    )
    flags.DEFINE_list(
        "precisions",
        None,
        f"Bits to look at; {','.join(map(str, laws.PRECISIONS))} if not given, or those of {GRADIENT.name}'s "
        "forward products.",
    )
    flags.DEFINE_list(
        "backward_precisions",
        None,
        f"Bits of the gradients' products to look at, by a {GRADIENT.name} study; its own if not given.",
    )
    flags.DEFINE_string(
        "chip",
        None,
        f"Whose published peak rates say what bits cost: {', '.join(laws.PEAKS)}; P/16 if not given.",
    )
    flags.DEFINE_string(
        "operands",
        None,
        f"What --chip multiplies: {costs.KINDS}; what the fit's runs had if not given.",
    )
    flags.DEFINE_string(
        "workdir", None, "Where summary.json and report.html go; nowhere if not given."
    )


def published(name: str) -> tuple[laws.Published, laws.Published]:
    """(law of the loss, law of what serving adds)."""
    return {"kumar2024": laws.KUMAR_2024, "quest2025": laws.QUEST_2025}[name], laws.KUMAR_2024_PTQ


@dataclasses.dataclass(frozen=True)
class Answer:
    """A plan, and what it is by.

    Attributes:
        plan: of the least loss.
        law: its equation.
        of: what the law is of.
        tables: (caption, rows) of what else there is to say.
        notes: likewise, a sentence each.
    """

    plan: laws.Plan | laws.PassPlan
    law: str
    of: str
    tables: tuple[tuple[str, pd.DataFrame], ...] = ()
    notes: tuple[str, ...] = ()


def answer(
    name: str, method: str | None, asked: dict[str, Any], hardware: costs.Hardware | None = None
) -> Answer:
    """The plan by published constants, or by the law that a study's runs do not reject.

    Args:
        name: of published constants, or a study's folder.
        method: of a study.
        asked: what flags give; "precisions" and "backward" may be missing or None.
        hardware: what bits cost.

    Raises:
        ValueError: neither published constants nor a study's folder; records that no law fits.
    """
    hardware = hardware or costs.Hardware()
    asked = {"precisions": None, "backward": None} | asked
    if hardware.chip is not None and None not in (asked["N"], asked["D"]):
        raise ValueError(
            "--chip says what a budget buys, and --params and --tokens leave nothing to buy; give --flops "
            f"and one of them, or no --chip; got {hardware.chip!r}"
        )
    if name in PUBLISHED:
        if method is not None:
            raise ValueError(f"--method is of a study's fit; {name} has none, got {method!r}")
        return _by_constants(name, _of_one_width(name, asked), hardware)
    study, records = _records(name)
    if study is GRADIENT:
        return _by_passes(name, records, method, asked, hardware)
    return _by_runs(name, records, method, _of_one_width(name, asked), hardware)


def _of_one_width(name: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What is asked, of a fit without backward widths."""
    asked = dict(asked)
    if (backward := asked.pop("backward")) is not None:
        raise ValueError(
            f"--backward_precisions is of a {GRADIENT.name} study; the runs of {name} have no backward "
            f"widths, got {backward}"
        )
    default = laws.PRECISIONS if asked["precisions"] is None else asked["precisions"]
    return asked | {"precisions": default}


def _records(name: str) -> tuple[Any, list[dict]]:
    """A study and its records in a folder."""
    try:
        return GRADIENT, GRADIENT.load(name)
    except ValueError:
        pass
    try:
        return STUDY, STUDY.load(name)
    except ValueError as error:
        raise ValueError(
            f"--fit is one of {', '.join(PUBLISHED)}, the workdir of a {GRADIENT.name} study, or: {error}"
        ) from None


def _by_constants(name: str, asked: dict[str, Any], hardware: costs.Hardware) -> Answer:
    law, ptq = published(name)
    cost, notes = hardware.forward_only("int")
    found = laws.plan(law, ptq=ptq, cost=cost, **asked)
    if name == "kumar2024":
        found = dataclasses.replace(found, warnings=(REJECTED, *found.warnings))
    return Answer(found, law.law.equation, law.source, notes=notes)


@contextlib.contextmanager
def _naming(name: str, method: str | None) -> Iterator[None]:
    """Says whose runs allow no fit."""
    try:
        yield
    except ValueError as error:
        grid = "" if method is None else f" ({method})"
        raise ValueError(f"the runs of {name}{grid} tell no plan: {error}") from None


def _by_runs(
    name: str, own: list[dict], method: str | None, asked: dict[str, Any], hardware: costs.Hardware
) -> Answer:
    method = method or "ste"
    if method not in analysis.METHOD_NAMES:
        raise ValueError(f"--method is one of {', '.join(analysis.METHOD_NAMES)}; got {method!r}")
    cost, notes = hardware.forward_only("float" if method == "float" else "int")
    with _naming(name, method):
        chosen = planning.choose(planning.of_study(own, method))
    ptq = planning.added(own, method) if asked["serve_bits"] is not None else None
    found, others = planning.plan(chosen, ptq, asked | {"cost": cost})
    tables = (planning.RANKED, planning.ranks(chosen)), (planning.BESIDE, others)
    of = f"{chosen.fits[0].runs} runs of {name} ({method}), {chosen.resampled}"
    notes = *planning.notes(chosen), *notes
    return Answer(found, chosen.fits[0].law.equation, of, tables, notes)


def _by_passes(
    name: str, own: list[dict], method: str | None, asked: dict[str, Any], hardware: costs.Hardware
) -> Answer:
    for flag in ("serve_bits", "memory"):
        if asked[flag] is not None:
            raise ValueError(
                f"--{flag} is not of a plan of both passes, as {name} gives; got {asked[flag]:g}"
            )
    if asked["flops"] is None:
        raise ValueError(f"a plan of both passes, as {name} gives, needs --flops; got none")
    table, names = passes.of_study(own, method)
    cost, notes = hardware.of_passes(passes.family(table))
    with _naming(name, method):
        chosen = passes.choose(table, names)
    bits = {"forward": asked["precisions"], "backward": asked["backward"]}
    found = passes.plan(chosen, {k: asked[k] for k in ("flops", "N", "D")} | bits | {"cost": cost})
    tables = (passes.RANKED, passes.ranks(chosen)), (passes.BESIDE, passes.beside(found))
    of = f"{chosen.fits[0].runs} runs of {name} ({chosen.grid})"
    notes = *passes.notes(chosen), *notes
    return Answer(found, chosen.fits[0].law.equation, of, tables, notes)


def _point(row: laws.Row | laws.PassRow) -> dict[str, Any]:
    """A row of the figure's table."""
    ends = {k: None if math.isnan(v) else v for k, v in (("low", row.low), ("high", row.high))}
    if isinstance(row, laws.PassRow):
        return {"bits": row.backward, "forward": f"{row.forward:g}", "loss": row.loss} | ends
    return {"bits": row.bits, "loss": row.loss} | ends


def figure(found: laws.Plan | laws.PassPlan) -> Figure:
    """Loss against bits, with intervals."""
    is_of_passes = isinstance(found, laws.PassPlan)
    rows = [_point(row) for row in found.rows]
    served = "loss" if is_of_passes else "loss as served"
    y = alt.Y("loss:Q", title=f"{served} (nats per token)", scale=alt.Scale(zero=False))
    x = alt.X("bits:Q", title=f"bits of {'the backward pass' if is_of_passes else 'training'}")
    color: dict[str, Any] = (
        {"color": alt.Color("forward:N", title="forward")} if is_of_passes else {}
    )
    base = alt.Chart(pd.DataFrame(rows)).encode(x=x, **color)
    layers = [base.mark_line(point=True).encode(y=y)]
    if any(row["low"] is not None for row in rows):
        layers.append(base.mark_rule().encode(y=alt.Y("low:Q"), y2="high:Q"))
    chart: Any = alt.layer(*layers).properties(title="Loss of the best run at each precision")
    return Figure("plan", "What the budget buys", "Each point has its own N and D.", [chart])


def run(
    precisions: Sequence[float] | None, backward: Sequence[float] | None = None
) -> laws.Plan | laws.PassPlan:
    """The plan that the flags ask for."""
    asked = {
        "flops": FLAGS.flops,
        "N": FLAGS.params,
        "D": FLAGS.tokens,
        "serve_bits": FLAGS.serve_bits,
        "memory": FLAGS.memory,
        "precisions": precisions,
        "backward": backward,
    }
    found = answer(FLAGS.fit, FLAGS.method, asked, costs.Hardware(FLAGS.chip, FLAGS.operands))
    print(f"law: {found.law}\nfrom: {found.of}")
    for note in found.notes:
        print(f"note: {note}")
    print(found.plan)
    for caption, table in found.tables:
        print(f"\n{caption}:\n{table.to_string(index=False)}")
    print(headline(found.plan))
    if FLAGS.workdir:
        _write(Path(FLAGS.workdir), found)
    return found.plan


def headline(found: laws.Plan | laws.PassPlan) -> str:
    """What to train, or that the law does not tell."""
    best = found.best
    is_of_passes = isinstance(best, laws.PassRow)
    bits = f"{best.pair} bits forward/backward" if is_of_passes else f"{best.bits:g} bits"
    said = f"{bits}, N = {best.N:.3g}, D = {best.D:.3g}"
    if not (is_of_passes or best.fits):
        return f"Nothing that was looked at fits; closest comes {said}."
    if best.outside:
        names = ", ".join(best.outside)
        return f"An extrapolation: {said}; {names} lie outside what the law was fitted over."
    if found.warnings:
        return f"Train at {said}; see the warnings."
    return f"Train at {said}."


def _optimum(found: laws.Plan | laws.PassPlan) -> str | None:
    """P*, and what it is not told apart from, in words."""
    if not isinstance(found, laws.PassPlan):
        return None if found.optimum is None else str(found.optimum)
    alike = ", ".join(row.pair for row in found.alike) or "none"
    both = f"P_forward* = {found.forward}, P_backward* = {found.backward}"
    return f"{both}; not told apart from {found.best.pair}: {alike}"


def _write(workdir: Path, answered: Answer) -> None:
    found, of, equation = answered.plan, answered.of, answered.law
    rows = pd.DataFrame([vars(row) for row in found.rows])
    rows = rows.drop(columns="notes", errors="ignore")
    rows["outside"] = rows["outside"].map(" ".join)
    best, asked = headline(found), {name: FLAGS[name].value for name in (*_ASKED, *_HARDWARE)}
    given = ", ".join(
        f"{name} {value if name in _HARDWARE else format(value, 'g')}"
        for name, value in asked.items()
        if value is not None
    )
    optimum = _optimum(found)
    paragraphs = [
        f"Given: {given}. Law: {equation}, from {of}.",
        *(f"Note: {text}." for text in answered.notes),
        *([f"P*: {optimum}."] if optimum else []),
        *(f"Warning: {text}." for text in found.warnings),
    ]
    section = Section(
        "The runs", paragraphs, [("by precision", rows), *answered.tables], [figure(found)]
    )
    summary = {
        "best": best,
        "rows": rows.astype(object).where(rows.notna(), None).to_dict("records"),
    }
    summary |= {"given": asked, "law": equation, "from": of, "optimum": optimum}
    summary |= {"notes": list(answered.notes)}
    summary |= {caption: table.to_dict("records") for caption, table in answered.tables}
    try:
        report.write(
            workdir,
            Report(
                "A plan", [], [section], summary | {"warnings": list(found.warnings)}, lead=best
            ),
        )
    except OSError as error:
        raise ValueError(f"workdir '{workdir}' cannot be written: {error.strerror}") from None
    print(f"report: {workdir / 'report.html'}")


def _bits(name: str) -> list[float] | None:
    """The numbers of a flag; None where it is not given."""
    given = FLAGS[name].value
    if given is None:
        return None
    most = laws.PRECISIONS[-1] if FLAGS.chip is not None else math.inf
    try:
        found = [float(bits) for bits in given]
    except ValueError:
        found = []
    if not found or not all(0 < bits < math.inf for bits in found):
        raise ValueError(f"--{name} are numbers above 0, such as 4,8,16; got {','.join(given)!r}")
    if max(found) > most:
        raise ValueError(
            f"--{name} are up to {most} bits where --chip is given, whose rates of wider ones are not known; "
            f"got {','.join(given)!r}"
        )
    return found


def main() -> None:
    define_flags()

    def planned(_: Any) -> None:
        run(_bits("precisions"), _bits("backward_precisions"))

    cli.main(planned, {"plan": _Config()}, default="plan")


@dataclasses.dataclass
class _Config:
    """A plan has flags of its own alone."""


if __name__ == "__main__":
    main()

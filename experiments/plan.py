"""What to train for a budget: python -m experiments.plan --flops=1e21 --serve_bits=4 --fit=kumar2024.

Prints runs by precision, the best of them, and what is not known; --workdir keeps that, with a figure.
`--fit` is published constants or the records of a study of our own (its workdir).  By a study's records, the
law is the one that they do not reject, and Kumar et al.'s stands beside it.  `--chip` counts bits by a chip's
published peak rates, as --chip=h100.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
from absl import flags

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
_KINDS = " or ".join(laws.OPERANDS)
_FORWARD_ONLY = "the runs have no backward widths: their gradient products are in 16 bits"
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
        f"One of {', '.join(PUBLISHED)}, or the workdir of a {STUDY.name} study.",
    )
    methods = ", ".join(analysis.METHOD_NAMES)
    flags.DEFINE_string(
        "method", None, f"Of a study's fit, whose law: {methods}; ste if not given."
    )
    flags.DEFINE_list("precisions", list(map(str, laws.PRECISIONS)), "Bits to look at.")
    flags.DEFINE_string(
        "chip",
        None,
        f"Whose published peak rates say what bits cost: {', '.join(laws.PEAKS)}; P/16 if not given.",
    )
    flags.DEFINE_string(
        "operands", None, f"What --chip multiplies: {_KINDS}; what the fit's runs had if not given."
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

    plan: laws.Plan
    law: str
    of: str
    tables: tuple[tuple[str, pd.DataFrame], ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What bits cost.

    Attributes:
        chip: of `laws.PEAKS`; None where a product of P bits costs P/16.
        operands: of `laws.OPERANDS`, or None for those that the fit's runs had.
    """

    chip: str | None = None
    operands: str | None = None

    def product(self, own: str) -> tuple[Callable[[Any], Any], tuple[str, ...]]:
        """Returns (c(P) of a product, that in words).

        Args:
            own: operands that the fit's runs had.

        Raises:
            ValueError: operands without a chip; others than are known of either.
        """
        if self.chip is None:
            if self.operands is not None:
                raise ValueError(
                    f"--operands is of --chip, which is not given; got {self.operands!r}"
                )
            return laws.bits_linear, ()
        if self.operands not in (None, *laws.OPERANDS):
            raise ValueError(f"--operands is {_KINDS}; got {self.operands!r}")
        try:
            cost = laws.chip_cost(self.chip, self.operands or own)
        except ValueError as error:
            raise ValueError(f"--{error}") from None
        other = f"the runs had {own} operands, and what is counted are {cost.operands} ones"
        return cost, (f"cost: {cost}", *([other] if cost.operands != own else []))

    def forward_only(self, own: str) -> tuple[Callable[[Any], Any], tuple[str, ...]]:
        """Returns (c(P) of a step whose gradient products are in 16 bits, that in words)."""
        cost, said = self.product(own)
        if self.chip is None:
            kumar = "C = 6 N D P/16 counts all three products of a step in P bits, as Kumar et al. 2024 do"
            return cost, (f"{_FORWARD_ONLY}; {kumar}",)
        step = f"{_FORWARD_ONLY}, so that a step costs (c(P) + 2 c(16)) / 3"
        return functools.partial(laws.step_cost, cost=cost), (*said, step)


def answer(
    name: str, method: str | None, asked: dict[str, Any], hardware: Hardware = Hardware()
) -> Answer:
    """The plan by published constants, or by the law that a study's runs do not reject.

    Raises:
        ValueError: neither published constants nor a study's folder; records that no law fits.
    """
    if name in PUBLISHED:
        if method is not None:
            raise ValueError(f"--method is of a study's fit; {name} has none, got {method!r}")
        law, ptq = published(name)
        cost, notes = hardware.forward_only("int")
        found = laws.plan(law, ptq=ptq, cost=cost, **asked)
        if name == "kumar2024":
            found = dataclasses.replace(found, warnings=(REJECTED, *found.warnings))
        return Answer(found, law.law.equation, law.source, notes=notes)
    try:
        own = STUDY.load(name)
    except ValueError as error:
        raise ValueError(f"--fit is one of {', '.join(PUBLISHED)}, or: {error}") from None
    method = method or "ste"
    if method not in analysis.METHOD_NAMES:
        raise ValueError(f"--method is one of {', '.join(analysis.METHOD_NAMES)}; got {method!r}")
    chosen = planning.choose(planning.of_study(own, method))
    ptq = planning.added(own, method) if asked["serve_bits"] is not None else None
    cost, notes = hardware.forward_only("float" if method == "float" else "int")
    found, others = planning.plan(chosen, ptq, asked | {"cost": cost})
    tables = (planning.RANKED, planning.ranks(chosen)), (planning.BESIDE, others)
    of = f"{chosen.fits[0].runs} runs of {name} ({method}), {chosen.resampled}"
    notes = *planning.notes(chosen), *notes
    return Answer(found, chosen.fits[0].law.equation, of, tables, notes)


def figure(found: laws.Plan) -> Figure:
    """Loss against bits, with intervals."""
    rows = [
        {"bits": r.bits, "loss": r.loss}
        | {k: None if math.isnan(v) else v for k, v in (("low", r.low), ("high", r.high))}
        for r in found.rows
    ]
    table = pd.DataFrame(rows)
    y = alt.Y("loss:Q", title="loss as served (nats per token)", scale=alt.Scale(zero=False))
    base = alt.Chart(table).encode(x=alt.X("bits:Q", title="bits of training"))
    layers = [base.mark_line(point=True).encode(y=y)]
    if any(row["low"] is not None for row in rows):
        layers.append(base.mark_rule().encode(y=alt.Y("low:Q"), y2="high:Q"))
    chart: Any = alt.layer(*layers).properties(title="Loss of the best run at each precision")
    return Figure("plan", "What the budget buys", "Each point has its own N and D.", [chart])


def run(precisions: Sequence[float]) -> laws.Plan:
    """The plan that the flags ask for."""
    asked = {
        "flops": FLAGS.flops,
        "N": FLAGS.params,
        "D": FLAGS.tokens,
        "serve_bits": FLAGS.serve_bits,
        "memory": FLAGS.memory,
        "precisions": precisions,
    }
    hardware = Hardware(FLAGS.chip, FLAGS.operands)
    found = answer(FLAGS.fit, FLAGS.method, asked, hardware)
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


def headline(found: laws.Plan) -> str:
    """What to train, or that the law does not tell."""
    best = found.best
    said = f"{best.bits:g} bits, N = {best.N:.3g}, D = {best.D:.3g}"
    if not best.fits:
        return f"Nothing that was looked at fits; closest comes {said}."
    if best.outside:
        names = ", ".join(best.outside)
        return f"An extrapolation: {said}; {names} lie outside what the law was fitted over."
    if found.warnings:
        return f"Train at {said}; see the warnings."
    return f"Train at {said}."


def _write(workdir: Path, answered: Answer) -> None:
    found, of, equation = answered.plan, answered.of, answered.law
    rows = pd.DataFrame([vars(row) for row in found.rows]).drop(columns="notes")
    rows["outside"] = rows["outside"].map(" ".join)
    best, asked = headline(found), {name: FLAGS[name].value for name in (*_ASKED, *_HARDWARE)}
    given = ", ".join(
        f"{name} {value if name in _HARDWARE else format(value, 'g')}"
        for name, value in asked.items()
        if value is not None
    )
    optimum = None if found.optimum is None else str(found.optimum)
    paragraphs = [
        f"Given: {given}. Law: {equation}, from {of}.",
        *(f"Note: {text}." for text in answered.notes),
        *([f"P* = {optimum}."] if optimum else []),
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


def main() -> None:
    define_flags()

    def planned(_: Any) -> None:
        try:
            precisions = [float(bits) for bits in FLAGS.precisions]
        except ValueError:
            raise ValueError(f"--precisions are numbers; got {FLAGS.precisions}") from None
        run(precisions)

    cli.main(planned, {"plan": _Config()}, default="plan")


@dataclasses.dataclass
class _Config:
    """A plan has flags of its own alone."""


if __name__ == "__main__":
    main()

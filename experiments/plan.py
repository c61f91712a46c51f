"""What to train for a budget: python -m experiments.plan --flops=1e21 --serve_bits=4 --fit=kumar2024.

Prints runs by precision, the best of them, and what is not known; --workdir keeps that, with a figure.
`--fit` is published constants or the records of a study of our own (its workdir).
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
from absl import flags

from experiments.harness import cli, ledgers, report
from experiments.training_precision import analysis
from experiments.training_precision.study import STUDY
from jaxquant import laws

FLAGS = flags.FLAGS
PUBLISHED = ("kumar2024", "quest2025")


def define_flags() -> None:
    number = flags.DEFINE_float
    number("flops", None, "C, operations of training that cost as 16-bit ones.")
    number("params", None, "N, parameters without embeddings; where not given, the best.")
    number("tokens", None, "D, training tokens; where not given, the best.")
    number("serve_bits", None, "Bits of the weights in serving; as trained where not given.")
    number("memory", None, "Bytes that the weights may take in serving.")
    flags.DEFINE_string(
        "fit", "kumar2024", f"One of {', '.join(PUBLISHED)}, or the workdir of a {STUDY} study."
    )
    flags.DEFINE_string("method", "ste", "Of the study's fit: whose law.")
    flags.DEFINE_list("precisions", list(map(str, laws.PRECISIONS)), "Bits to look at.")
    flags.DEFINE_string(
        "workdir", None, "Where summary.json and report.html go; nowhere if not given."
    )


def source(name: str, method: str) -> tuple[Any, Any, str]:
    """(law of the loss, law of what serving adds or None, what it is of).

    Raises:
        ValueError: neither published constants nor a study's folder; records that no law fits.
    """
    if name == "kumar2024":
        return laws.KUMAR_2024, laws.KUMAR_2024_PTQ, laws.KUMAR_2024.source
    if name == "quest2025":
        return _quest(), laws.KUMAR_2024_PTQ, _quest().source
    try:
        own = ledgers.read_records(name, STUDY)
    except ValueError as error:
        raise ValueError(f"--fit is one of {', '.join(PUBLISHED)}, or: {error}") from None
    table = analysis.tied(analysis.runs(own), method)
    fitted = laws.fit(laws.KUMAR_ONE, table, bootstraps=analysis.BOOTSTRAPS, groups="trunk")
    return fitted, _added(own, method), f"{len(table)} runs of {name} ({method})"


def _added(records: list[dict], method: str) -> Any:
    """What serving adds to models trained at 16 bits; None where no law fits."""
    table = analysis.served(records)
    own = table[(table["method"] == method) & (table["P_w"] == 16) & (table["added"] > 0)]
    try:
        return laws.fit(laws.KUMAR_PTQ, own, bootstraps=analysis.BOOTSTRAPS, groups="trunk")
    except ValueError:
        return None


def _quest() -> laws.Published:
    """QuEST's efficiencies in Kumar's law of N and D, which QuEST's own paper does not identify."""
    law = laws.free_efficiency(*laws.QUEST_2025_EFFICIENCY)
    kumar = {name: laws.KUMAR_2024.params[name] for name in ("A", "alpha", "B", "beta", "E")}
    levels = {f"eff_{bits}": value for bits, value in laws.QUEST_2025_EFFICIENCY.items()}
    return laws.Published(
        law,
        kumar | levels,
        "efficiencies of arXiv 2502.05003; A, B, α, β, E and the range of arXiv 2411.04330, Table 2",
        {name: laws.KUMAR_2024.within[name] for name in ("N", "D")},
    )


def figure(found: laws.Plan) -> report.Figure:
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
    return report.Figure("plan", "What the budget buys", "Each point has its own N and D.", [chart])


def run(precisions: Sequence[float]) -> laws.Plan:
    """The plan that the flags ask for."""
    law, ptq, of = source(FLAGS.fit, FLAGS.method)
    found = laws.plan(
        law,
        flops=FLAGS.flops,
        N=FLAGS.params,
        D=FLAGS.tokens,
        serve_bits=FLAGS.serve_bits,
        memory=FLAGS.memory,
        ptq=ptq,
        precisions=precisions,
    )
    print(f"law: {law.law.equation}\nfrom: {of}\n{found}")
    if FLAGS.workdir:
        _write(Path(FLAGS.workdir), found, of)
    return found


def _write(workdir: Path, found: laws.Plan, of: str) -> None:
    rows = pd.DataFrame([vars(row) for row in found.rows]).drop(columns="notes")
    best = f"Train at {found.best.bits:g} bits: N = {found.best.N:.3g}, D = {found.best.D:.3g}."
    paragraphs = [f"From {of}.", *(f"Warning: {text}." for text in found.warnings)]
    section = report.Section("The runs", paragraphs, [("by precision", rows)], [figure(found)])
    summary = {
        "best": best,
        "rows": rows.astype(object).where(rows.notna(), None).to_dict("records"),
    }
    report.write(workdir, "A plan", best, [section], summary | {"warnings": list(found.warnings)})
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

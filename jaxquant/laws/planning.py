"""What to train for a budget: size, tokens, precision; what serving in few bits does; how sure it is."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.laws.constants import Published
from jaxquant.laws.fitting import Fit
from jaxquant.laws.intervals import central
from jaxquant.laws.law import Law, x64
from jaxquant.laws.optimum import (
    FULL_BITS,
    MAC_FLOPS,
    Optimum,
    _asked,
    _parts,
    _sizes,
    bits_linear,
    critical_tokens,
    optimal_precision,
    qat_share,
)

_LEAST = 0.01  # efficiency below which a law says nothing of a precision
PRECISIONS = (3, 4, 5, 6, 7, 8, 12, 16)


@dataclasses.dataclass(frozen=True)
class Row:
    """A run that could be trained.

    Attributes:
        bits: P of training.
        N, D: parameters without embeddings; tokens.
        loss: nats per token, as it is served.
        low, high: the loss's interval over bootstraps; NaN without.
        added: the part of the loss that serving in fewer bits adds; 0 where it is served as trained.
        critical: D_crit; NaN where nothing is quantized after training.
        qat: the share of training for quantization-aware training at serving bits; NaN likewise.
        nbytes: of the weights as served.
        notes: what else there is to say.
    """

    bits: float
    N: float
    D: float
    loss: float
    low: float
    high: float
    added: float
    critical: float
    qat: float
    nbytes: float
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """Runs by precision, the best of them, and what is not known.

    Attributes:
        rows: in the order of bits.
        best: of the least loss.
        optimum: P*, where the budget alone decides; else None.
        warnings: where the plan leaves what the law was fitted over, and what the fit does not identify.
    """

    rows: tuple[Row, ...]
    best: Row
    optimum: Optimum | None
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        head = ("", "P", "N", "D", "D/N", "loss", "interval", "added", "D_crit", "QAT", "GB served")
        cells = [head, *(_cells(row, row is self.best) for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        lines = ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in cells]
        if self.optimum is not None:
            lines.append(f"P* = {self.optimum}")
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def _cells(row: Row, is_best: bool) -> tuple[str, ...]:
    text = lambda x, form: "—" if math.isnan(x) else format(x, form)  # noqa: E731
    interval = "—" if math.isnan(row.low) else f"[{row.low:.4f}, {row.high:.4f}]"
    return (
        "→" if is_best else "",
        f"{row.bits:g}",
        f"{row.N:.3g}",
        f"{row.D:.3g}",
        f"{row.D / row.N:.3g}",
        f"{row.loss:.4f}",
        interval,
        f"{row.added:.4f}",
        text(row.critical, ".2g"),
        text(row.qat, ".0%"),
        f"{row.nbytes / 1e9:.3g}",
    )


def plan(
    law: Fit | Published,
    *,
    flops: float | None = None,
    N: float | None = None,
    D: float | None = None,
    serve_bits: float | None = None,
    memory: float | None = None,
    ptq: Fit | Published | None = None,
    precisions: Sequence[float] = PRECISIONS,
    cost: Callable[[Any], Any] = bits_linear,
) -> Plan:
    """The run of the least loss at each precision, under C = 6 N D c(P).

    Args:
        law: a fit or published constants with A, α, B, β, E and an efficiency.
        flops: C, in operations that cost as 16-bit ones.
        N: parameters without embeddings, where they are given.
        D: tokens, where they are given.
        serve_bits: of the weights in serving; as trained where not given, or not fewer.
        memory: bytes that the weights may take in serving.
        ptq: what quantizing after training adds, in `KUMAR_PTQ`'s form; needed where it is served in fewer
            bits.
        precisions: P to look at.
        cost: c(P).

    Raises:
        ValueError: not two of flops, N and D, nor flops alone; all three; numbers that are not positive;
            serve_bits without `ptq`; a law of another form.

    >>> from jaxquant.laws.constants import KUMAR_2024
    >>> found = plan(KUMAR_2024, flops=1e20)
    >>> found.best.bits, str(found.optimum)
    (7, '7.00')
    """
    _check(flops, N, D, serve_bits, memory, precisions)
    form, numbers, samples = _parts(law, None)
    asked = _asked(law, None)
    if form.efficiency is None or not {"A", "alpha", "B", "beta", "E"} <= set(form.names):
        raise ValueError(
            f"a plan needs a law with A, α, B, β, E and an efficiency; {form.name} is none"
        )
    known = precisions
    if form.widths is not None:
        known = [b for b in precisions if b in form.widths or b == FULL_BITS]
    assert form.efficiency is not None
    with x64():
        alive = [b for b in known if float(form.efficiency(numbers, float(b))) > _LEAST]
    dead = sorted(set(known) - set(alive))
    known = alive
    if not known:
        raise ValueError(
            f"{form.name} knows {form.widths} bits; got precisions {tuple(precisions)}"
        )
    if any(serve_bits is not None and serve_bits < bits for bits in known) and ptq is None:
        raise ValueError(
            f"serve_bits {serve_bits:g} is fewer than some precision of training: give ptq, what that adds"
        )
    rows = []
    for bits in known:
        n, d, notes = _run(form, numbers, flops, N, D, bits, serve_bits, memory, cost)
        rows.append(_row(form, numbers, samples, asked, ptq, bits, n, d, serve_bits, notes))
    best = min(rows, key=lambda row: row.loss)
    is_free = N is None and D is None and memory is None and serve_bits is None
    optimum = optimal_precision(law, cost=cost) if is_free else None
    said = _warnings(law, ptq, rows, best, serve_bits)
    if dead:
        gone = ", ".join(f"{b:g}" for b in dead)
        said = (*said, f"at {gone} bits the law's efficiency is next to nothing: left out")
    return Plan(tuple(rows), best, optimum, said)


def _check(flops, N, D, serve_bits, memory, precisions) -> None:
    numbers = {"flops": flops, "N": N, "D": D, "serve_bits": serve_bits, "memory": memory}
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is a number above 0; got {value!r}")
    if flops is None and (N is None or D is None):
        raise ValueError("a plan needs flops, or N and D; got neither")
    if flops is not None and N is not None and D is not None:
        raise ValueError("flops, N and D over-determine a run; give two of them")
    if not precisions or any(not 0 < bits <= 32 for bits in precisions):
        raise ValueError(f"precisions are bits, above 0 and up to 32; got {tuple(precisions)}")


def _run(form, numbers, flops, N, D, bits, serve_bits, memory, cost) -> tuple[float, float, tuple]:
    """(N, D, notes) of the least loss."""
    served = bits if serve_bits is None else min(bits, serve_bits)
    most = math.inf if memory is None else 8 * memory / served
    notes = []
    if flops is None:
        n, d = N, D
    else:
        both = flops / (MAC_FLOPS * float(cost(bits)))
        n, d = _sizes(form, numbers, flops, bits, cost)
        if N is not None:
            n, d = N, both / N
        elif D is not None:
            n, d = both / D, D
        if n > most and N is None and D is None:
            n, d = most, both / most
            notes.append("N is what memory holds")
    if n > most * (1 + 1e-9):
        notes.append(
            f"the weights take {n * served / 8:.3g} bytes, more than memory's {memory:.3g}"
        )
    return float(n), float(d), tuple(notes)


def _row(form, numbers, samples, asked, ptq, bits, n, d, serve_bits, notes) -> Row:
    is_quantized = serve_bits is not None and serve_bits < bits
    served = min(bits, serve_bits) if serve_bits is not None else bits
    added, drawn, post_numbers = 0.0, np.empty(0), {}
    if is_quantized:
        post, post_numbers, post_samples = _parts(ptq, None)
        run = {"N": [n], "D": [d], "P_post": [serve_bits]}
        added = float(post.predict(post_numbers, run)[0])
        drawn = _drawn(post, post_samples, run)
    run = {"N": [n], "D": [d], **{c: [bits] for c in form.columns if c.startswith("P_")}}
    loss = float(form.predict(numbers, run)[0])
    losses = _drawn(form, samples, run)
    if len(losses) and len(drawn):
        count = min(len(losses), len(drawn))
        losses = losses[:count] + drawn[:count]
    elif len(losses):
        losses = losses + added
    low, high = central(losses, asked)
    critical = qat = math.nan
    if is_quantized:
        critical = float(critical_tokens(numbers, post_numbers, N=n, P_post=serve_bits))
        qat = float(qat_share(N=n, D=d, bits=serve_bits))
        if d > critical:
            notes = (*notes, "more tokens than D_crit: training on makes what is served worse")
    return Row(bits, n, d, loss + added, low, high, added, critical, qat, n * served / 8, notes)


def _drawn(law: Law, samples: Mapping[str, np.ndarray], run: Mapping[str, list]) -> np.ndarray:
    """The law's prediction for a run over bootstraps; empty without."""
    if not samples:
        return np.empty(0)
    with x64():
        columns = {name: np.asarray(run[name], float) for name in law.columns}
        return np.exp(np.asarray(law.log_prediction(dict(samples), columns)))


def _warnings(law, ptq, rows, best: Row, serve_bits) -> tuple[str, ...]:
    said = list(best.notes)
    for source in (law, *([ptq] if ptq is not None and serve_bits is not None else [])):
        values = {"N": best.N, "D": best.D, "P_post": serve_bits}
        values |= {name: best.bits for name in source.within if name in ("P_w", "P_a", "P_kv")}
        for name, (low, high) in source.within.items():
            value = values.get(name)
            if value is not None and not low <= value <= high:
                said.append(
                    f"{name} = {value:.3g} lies outside {low:.3g} to {high:.3g}, over which "
                    f"{source.law.name} was fitted"
                )
        said += getattr(source, "warnings", ())
    if best.bits in (rows[0].bits, rows[-1].bits) and len(rows) > 1:
        said.append(f"the best precision, {best.bits:g} bits, is the last that was looked at")
    return tuple(dict.fromkeys(said))

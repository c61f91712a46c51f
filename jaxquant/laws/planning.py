"""Plan a run for a budget: size, tokens and precision, the cost of serving in few bits, and intervals."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.checks import check_positive
from jaxquant.laws.budgets import precision_at_budget
from jaxquant.laws.constants import Published
from jaxquant.laws.fitting import Fit
from jaxquant.laws.forms import KUMAR_PTQ
from jaxquant.laws.law import Law, Values, x64
from jaxquant.laws.optimum import (
    FULL_BITS,
    LEAST_EFFICIENCY,
    MAC_FLOPS,
    Optimum,
    bits_linear,
    check_cost,
    optimal_precision,
    parts,
    resolve_confidence,
)
from jaxquant.laws.sizes import (
    best_sizes,
    least_size,
    qat_share,
    run_columns,
    training_bits,
    turning_tokens,
)
from jaxquant.stats import percentile_interval

_MOST_BITS = 32
_WIDER = 1e3  # than the sizes of a plan, those among which bootstraps seek their own
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
        critical: D_crit, the tokens beyond which more training raises that loss; NaN where it never does.
        qat: the share of training for quantization-aware training at serving bits; NaN where it is served as
            trained.
        nbytes: of the weights as served.
        fits: whether memory holds them.
        outside: columns in which it leaves what the law was fitted over.
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
    fits: bool = True
    outside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """Runs by precision, the best of them, and what is not known.

    Attributes:
        rows: in the order of bits.
        best: of the least loss, among those that memory holds where any is.
        optimum: P*, where flops are given and neither tokens nor serving narrow the choice; else None.  It is
            of every budget where bits take away parameters and N is free, and of this budget otherwise.
        warnings: where the plan leaves what the law was fitted over, and what the fit does not identify.
    """

    rows: tuple[Row, ...]
    best: Row
    optimum: Optimum | None
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        head = (
            "",
            "P",
            "N",
            "D",
            "D/N",
            "loss",
            "interval",
            "added",
            "D_crit",
            "QAT",
            "GB",
            "not seen",
        )
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
        f"{row.nbytes / 1e9:.3g}" + ("" if row.fits else " > memory"),
        " ".join(row.outside) or "—",
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
    """Returns the run of the least loss as it is served, at each precision, under C = 6 N D c(P).

    Where serving in fewer bits adds to the loss, N and D are those of the least sum: larger models bear it
    better, and longer training worse.

    Where bits take away parameters, N and D of a precision have a closed form; of other laws, such as those
    whose penalty grows with training, they are searched for.

    Args:
        law: a fit or published constants, of a law of N, D and bits of training with A, α, B, β and E.
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
    precisions = _check(flops, N, D, serve_bits, memory, precisions)
    form, numbers, _ = parts(law, None)
    is_of_bits = form.efficiency is not None or training_bits(form)
    if not is_of_bits or not {"A", "alpha", "B", "beta", "E"} <= set(form.names):
        raise ValueError(
            "a plan needs a law of N, D and bits of training, with A, α, B, β and E; "
            f"{form.name} is none: it reads {', '.join(form.columns)}"
        )
    check_cost(cost, precisions)
    known, dead = _known_points(form, numbers, precisions)
    if any(serve_bits is not None and serve_bits < bits for bits in known):
        _check_ptq(ptq, serve_bits)
    budget = _Budget(flops, N, D, serve_bits, memory, cost)
    rows = tuple(_row(law, ptq, budget, bits) for bits in known)
    best = min([row for row in rows if row.fits] or rows, key=lambda row: row.loss)
    optimum = _optimum(law, form, budget, rows)
    said = (*_warnings(law, ptq, rows, best, serve_bits), *_beside_optimum(best, optimum, rows))
    if dead:
        gone = ", ".join(f"{b:g}" for b in dead)
        said = (*said, f"at {gone} bits the law's efficiency is next to nothing: left out")
    unknown = [b for b in precisions if b not in (*known, *dead)]
    if unknown:
        said = (
            *said,
            f"of {', '.join(f'{b:g}' for b in unknown)} bits the law says nothing: left out",
        )
    return Plan(rows, best, optimum, said)


def _beside_optimum(best: Row, optimum: Optimum | None, rows: Sequence[Row]) -> tuple[str, ...]:
    """Returns a warning where the best of the rows is no precision that P* may have."""
    if optimum is None or not optimum.is_determined or math.isnan(optimum.low):
        return ()
    if optimum.low <= best.bits <= optimum.high:
        return ()
    inside = [row.bits for row in rows if optimum.low <= row.bits <= optimum.high]
    looked = "none of those looked at lies in it" if not inside else "others lie in it"
    return (
        f"the best precision looked at, {best.bits:g} bits, is outside the interval of P*, "
        f"{optimum.low:.2f} to {optimum.high:.2f} bits: {looked}",
    )


@dataclasses.dataclass(frozen=True)
class _Budget:
    """The given quantities of a run."""

    flops: float | None
    N: float | None
    D: float | None
    serve_bits: float | None
    memory: float | None
    cost: Callable[[Any], Any]

    def served(self, bits: float) -> float:
        return bits if self.serve_bits is None else min(bits, self.serve_bits)

    def most(self, bits: float) -> float:
        """Returns N that memory holds."""
        return math.inf if self.memory is None else 8 * self.memory / self.served(bits)


def _optimum(law: Any, form: Law, budget: _Budget, rows: Sequence[Row]) -> Optimum | None:
    """Returns P*, where the budget leaves the precision free, and nothing else narrows the choice."""
    narrowed = (budget.D, budget.memory, budget.serve_bits)
    if budget.flops is None or any(given is not None for given in narrowed):
        return None
    if form.efficiency is not None and budget.N is None:
        return optimal_precision(law, cost=budget.cost)
    if not training_bits(form):
        return None
    near = [row.N for row in rows]
    sizes = min(near) / _WIDER, max(near) * _WIDER
    return precision_at_budget(law, flops=budget.flops, N=budget.N, sizes=sizes, cost=budget.cost)


def _known_points(form: Law, numbers: Values, precisions: Sequence[float]) -> tuple[list, list]:
    """Returns (precisions that the law covers, precisions at which its efficiency is nearly zero)."""
    own = [b for b in precisions if form.widths is None or b in form.widths or b == FULL_BITS]
    if not own:
        raise ValueError(
            f"{form.name} knows {form.widths} bits and {FULL_BITS}; got precisions {tuple(precisions)}"
        )
    if form.efficiency is None:
        return own, []
    with x64():
        alive = [b for b in own if float(form.efficiency(numbers, float(b))) > LEAST_EFFICIENCY]
    if not alive:
        raise ValueError(
            f"at precisions {tuple(precisions)} the efficiency of {form.name} is next to nothing"
        )
    return alive, sorted(set(own) - set(alive))


def _check_ptq(ptq: Any, serve_bits: Any) -> None:
    if ptq is None:
        raise ValueError(
            f"serve_bits {serve_bits:g} is fewer than some precision of training: give ptq, what that adds"
        )
    form = parts(ptq, None)[0]
    if form.names != KUMAR_PTQ.names:
        raise ValueError(f"ptq has the form of {KUMAR_PTQ.name}; got {form.name}")


def _check(flops, N, D, serve_bits, memory, precisions) -> list:
    numbers = {"flops": flops, "N": N, "D": D, "serve_bits": serve_bits, "memory": memory}
    for name, value in numbers.items():
        if value is not None:
            check_positive(name, value)
    if serve_bits is not None and serve_bits > _MOST_BITS:
        raise ValueError(f"serve_bits is up to {_MOST_BITS}; got {serve_bits!r}")
    if flops is None and (N is None or D is None):
        raise ValueError("a plan needs flops, or N and D; got neither")
    if flops is not None and N is not None and D is not None:
        raise ValueError("flops, N and D over-determine a run; give two of them")
    return check_precisions(precisions)


def check_precisions(precisions: Any, name: str = "precisions") -> list:
    """Returns bits to look at, each once.

    Args:
        precisions: bits.
        name: of the argument, for errors.

    Raises:
        ValueError: no bits, or what is none.
    """
    is_many = isinstance(precisions, Sequence | np.ndarray) and not isinstance(precisions, str)
    found: list[Any] = [*precisions] if is_many else []
    if not found:
        raise ValueError(f"{name} is a list of bits, such as (4, 8, 16); got {precisions!r}")
    for bits in found:
        check_positive(f"each of {name}", bits)
        if bits > _MOST_BITS:
            raise ValueError(f"{name} has up to {_MOST_BITS} bits; got {bits!r}")
    return list(dict.fromkeys(found))


def _sized(
    law: Any, ptq: Any, budget: _Budget, bits: float
) -> tuple[float, float, tuple[str, ...]]:
    """Returns (N, D, notes) of the least loss as served."""
    form, numbers, _ = parts(law, None)
    if budget.flops is None:
        assert budget.N is not None
        assert budget.D is not None
        return float(budget.N), float(budget.D), ()
    both = budget.flops / (MAC_FLOPS * float(budget.cost(bits)))
    if budget.N is not None:
        return float(budget.N), both / budget.N, ()
    if budget.D is not None:
        return both / budget.D, float(budget.D), ()
    n = float(best_sizes(form, numbers, budget.flops, bits, budget.cost)[0])
    if budget.served(bits) < bits:
        n = least_size(lambda x: _losses(law, ptq, bits, budget.serve_bits, x, both / x), n)
    if n > budget.most(bits):
        n = budget.most(bits)
        return n, both / n, ("N is what memory holds",)
    return n, both / n, ()


def _losses(law: Any, ptq: Any, bits: float, serve_bits: Any, n: Any, d: Any) -> np.ndarray:
    """Returns the loss as served of some sizes."""
    form, numbers, _ = parts(law, None)
    post, added, _ = parts(ptq, None)
    run = run_columns(form, bits, n, d)
    served = {"N": n, "D": d, "P_post": np.full_like(n, serve_bits)}
    return form.evaluate(numbers, run) + post.evaluate(added, served)


def _row(law: Any, ptq: Any, budget: _Budget, bits: float) -> Row:
    n, d, notes = _sized(law, ptq, budget, bits)
    (form, numbers, samples), served = parts(law, None), budget.served(bits)
    added, drawn, post_numbers = 0.0, np.empty(0), {}
    if served < bits:
        post, post_numbers, post_samples = parts(ptq, None)
        run = {"N": [n], "D": [d], "P_post": [served]}
        added = float(post.predict(post_numbers, run)[0])
        drawn = _predict_samples(post, post_samples, run)
    run = run_columns(form, bits, n, d)
    loss, losses = float(form.predict(numbers, run)[0]), _predict_samples(form, samples, run)
    if len(losses) and len(drawn):
        count = min(len(losses), len(drawn))
        losses = losses[:count] + drawn[:count]
    elif len(losses):
        losses = losses + added
    low, high = percentile_interval(losses, resolve_confidence(law, None))
    added_by = post_numbers if served < bits else None
    critical = turning_tokens(form, numbers, added_by, N=n, bits=bits, P_post=served)
    qat = math.nan
    if served < bits:
        qat = float(qat_share(N=n, D=d, bits=served))
    if d > critical:
        notes = (*notes, "more tokens than D_crit: training on makes what is served worse")
    fits = n <= budget.most(bits) * (1 + 1e-9)
    nbytes = n * served / 8
    if not fits:
        notes = (
            *notes,
            f"the weights take {nbytes:.3g} bytes, more than memory's {budget.memory:.3g}",
        )
    outside = tuple(name for name, *_ in _outside(law, ptq, bits, n, d, served))
    return Row(
        bits, n, d, loss + added, low, high, added, critical, qat, nbytes, fits, outside, notes
    )


def _outside(law: Any, ptq: Any, bits: float, n: float, d: float, served: float) -> list[tuple]:
    """Returns (column, value, low, high, law) wherever a run leaves what a law was fitted over."""
    found = {}
    for source in (law, *([ptq] if served < bits else [])):
        values = {"N": n, "D": d, "P_post": served, "P_w": bits, "P_a": bits, "P_kv": bits}
        for name, (low, high) in source.within.items():
            if name in values and not low <= values[name] <= high:
                found.setdefault(name, (name, values[name], low, high, source.law.name))
    return list(found.values())


def _predict_samples(
    law: Law, samples: Mapping[str, np.ndarray], run: Mapping[str, Any]
) -> np.ndarray:
    """Returns the law's prediction for a run over bootstraps; empty without."""
    if not samples:
        return np.empty(0)
    with x64():
        columns = {name: np.asarray(run[name], float) for name in law.columns}
        return np.exp(np.asarray(law.log_prediction(dict(samples), columns)))


def _warnings(law, ptq, rows, best: Row, serve_bits) -> tuple[str, ...]:
    said, served = list(best.notes), best.bits if serve_bits is None else min(best.bits, serve_bits)
    said += [
        f"{name} = {value:.3g} lies outside {low:.3g} to {high:.3g}, over which {of} was fitted"
        for name, value, low, high, of in _outside(law, ptq, best.bits, best.N, best.D, served)
    ]
    if served < best.bits < FULL_BITS:
        said.append(
            f"what serving in {served:g} bits adds is that of models trained in {FULL_BITS} bits; training "
            f"in {best.bits:g} may lower it"
        )
    for source in (law, *([ptq] if served < best.bits else [])):
        said += getattr(source, "warnings", ())
    looked = [row.bits for row in rows]
    for which, end in (("fewest", min(looked)), ("most", max(looked))):
        if best.bits == end and len(rows) > 1:
            said.append(f"the best precision, {end:g} bits, is the {which} that the plan looked at")
    return tuple(dict.fromkeys(said))

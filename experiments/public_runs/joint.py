"""Which law of forward and backward bits Quartet's runs obey: efficiencies, or terms that grow."""

# pandas' selections are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportCallIssue=false

import dataclasses
from typing import Any

import jax.numpy as jnp
import pandas as pd

from experiments.public_runs import efficiencies
from experiments.public_runs.readers import FULL
from jaxquant import laws
from jaxquant.laws.law import Law, Parameter, Values, log_sum
from jaxquant.laws.terms import power

PASSES = ("forward", "backward")
BOTH = "QuEST/AlbertTsengQuantizer"  # its forward quantizer with stochastic rounding of gradients
_FULL_BITS = 16.0
_NOTHING = -60.0  # the logarithm of a term that a run in full precision lacks
_QUARTET = laws.quartet((4,), (4,))
_BASE = _QUARTET.parameters[:6]  # of (A N^−α + B D^−β)^γ + E


@dataclasses.dataclass(frozen=True)
class Joint:
    """Laws of the same runs.

    Attributes:
        runs: how many.
        rows: of `laws.Comparison`.
        independent: runs that the criterion counts.
        warnings: of the ranking.
        growing: the law with a term for each pass, with intervals.
    """

    runs: int
    rows: list[dict]
    independent: float
    warnings: tuple[str, ...]
    growing: laws.Fit


def _base(p: Values, r: Values, of_n: Any = 1.0, of_d: Any = 1.0) -> Any:
    """log of (A (N of_n)^−α + B (D of_d)^−β)^γ."""
    sizes = power(p, r, "A", "alpha", "N", of_n), power(p, r, "B", "beta", "D", of_d)
    return p["gamma"] * log_sum(*sizes)


def _costs(forward: str, backward: str) -> Law:
    """Four bits of each pass as fewer parameters ("N") or fewer tokens ("D")."""
    places = {"forward": forward, "backward": backward}

    def factor(p: Values, r: Values, place: str) -> Any:
        found = 1.0
        for x in (x for x, own in places.items() if own == place):
            found = found * jnp.where(r[f"P_{x}"] < _FULL_BITS, p[f"eff_{x}"], 1.0)
        return found

    def text(place: str) -> str:
        return "".join(f" eff_{x}" for x, own in places.items() if own == place)

    words = {"N": "parameters", "D": "tokens"}
    return dataclasses.replace(
        _QUARTET,
        name=f"forward bits cost {words[forward]}, backward bits {words[backward]}",
        equation=f"L = (A (N{text('N')})^−α + B (D{text('D')})^−β)^γ + E",
        parameters=(*_BASE, *(Parameter(f"eff_{x}", 1e-3, 1.5, (0.3, 1.0)) for x in PASSES)),
        log_prediction=lambda p, r: log_sum(
            _base(p, r, factor(p, r, "N"), factor(p, r, "D")), jnp.log(p["E"])
        ),
        source="after Castro et al. 2025 (Quartet), arXiv 2505.14669",
        check_bits=None,
        check_fit=None,
    )


def _of_pass(x: str, grows: str) -> tuple[Parameter, ...]:
    grown = tuple((f"gamma_{c}_{x}", c, 1) for c in grows)
    unit = " · ".join(["nats", *(f"{c}^−γ_{c}_{x}" for c in grows)])
    exponents = (Parameter(n, -2.0, 2.0, (-0.3, 0.3), is_signed=True) for n, _, _ in grown)
    return (Parameter(f"C_{x}", 1e-6, 1e4, (0.01, 1.0), unit, grown), *exponents)


def _terms(name: str, grows: str) -> Law:
    """A term for four bits of each pass, beside the law of full precision."""

    def term(p: Values, r: Values, x: str) -> Any:
        height = jnp.log(p[f"C_{x}"]) + sum(p[f"gamma_{c}_{x}"] * jnp.log(r[c]) for c in grows)
        return jnp.where(r[f"P_{x}"] < _FULL_BITS, height, _NOTHING)

    heights = (" ".join([f"C_{x}", *(f"{c}^γ_{c}_{x}" for c in grows)]) for x in PASSES)
    return dataclasses.replace(
        _QUARTET,
        name=name,
        equation=f"L = (A N^−α + B D^−β)^γ + E + {' + '.join(heights)}",
        parameters=(*_BASE, *(q for x in PASSES for q in _of_pass(x, grows))),
        log_prediction=lambda p, r: log_sum(
            _base(p, r), jnp.log(p["E"]), *(term(p, r, x) for x in PASSES)
        ),
        source="ours: a term for each pass in the form of `laws.GROWING`, on Quartet's law of full precision",
        check_bits=None,
        check_fit=None,
    )


GROWING = _terms("terms that grow with D and N", "DN")
CANDIDATES = (
    GROWING,
    _costs("N", "D"),  # Quartet's own
    _costs("N", "N"),
    _costs("D", "D"),
    _costs("D", "N"),
    _terms("terms that stay", ""),
)


def compare(
    table: pd.DataFrame,
    bootstraps: int = efficiencies.BOOTSTRAPS,
    starts: int = 2 * efficiencies.STARTS,
) -> Joint:
    """Ranks the laws on Quartet's runs: full precision, FP4 forward, FP4 backward, and both.

    Units are (size, length).  All have one base, that of Quartet, and one width: nothing here says how the
    loss varies with bits.

    Args:
        table: of `readers.read_quartet`, with ``unit``.
        bootstraps: refits of the growing law.
        starts: of each fit.
    """
    schemes = [FULL, efficiencies.FORWARD, efficiencies.BACKWARD, BOTH]
    own = table[table["scheme"].isin(schemes)]
    options = {"starts": starts, "delta": efficiencies.QUARTET_DELTA}
    ranked = laws.compare(CANDIDATES, own, held_out=("N", "D"), groups="unit", **options)
    growing = laws.fit(GROWING, own, groups="unit", bootstraps=bootstraps, **options)
    return Joint(len(own), ranked.rows, ranked.independent, ranked.warnings, growing)

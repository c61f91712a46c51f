"""Laws of forward and backward bits: terms that grow, or bits that cost parameters or tokens."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxquant import laws
from jaxquant.laws.law import Law, Parameter, Values, log_sum
from jaxquant.laws.terms import ALPHA, BETA, A, B, E, bias, gamma, log_loss, saturating

PASSES = ("forward", "backward")
COLUMNS = tuple(f"P_{x}" for x in PASSES)
_OURS = "ours: a term for each pass in the form of `laws.GROWING`"
_QUARTET = "after Castro et al. 2025 (Quartet), arXiv 2505.14669, with efficiencies as in Kumar et al. 2024"


Places = dict[str, str]  # from a pass to what its term's height varies with: "DN", "D", "N" or ""


def _of_pass(x: str, grows: str = "DN") -> tuple[Parameter, ...]:
    """Height, growth and scale of a pass's term.

    Args:
        x: the pass.
        grows: "DN" for exponents of either sign, "N" or "D" for a term that falls as one of them grows, as it
            does where bits take away parameters or tokens; "" for a term that stays.
    """
    grown = tuple((f"gamma_{c}_{x}", c, 1) for c in grows)
    unit = " · ".join(["nats", *(f"{c}^−γ_{c}_{x}" for c in grows)])
    ends = (2.0, (-0.3, 0.8)) if len(grows) == 2 else (-1e-3, (-0.8, -0.1))
    exponents = (Parameter(name, -2.0, *ends, is_signed=True) for name, _, _ in grown)
    return (Parameter(f"C_{x}", 1e-6, 1e4, (0.01, 10.0), unit, grown), *exponents, gamma(x))


def _terms(p: Values, r: Values, places: Places) -> list[Any]:
    """The logarithm of each pass's term."""
    return [
        jnp.log(p[f"C_{x}"])
        + sum(p[f"gamma_{c}_{x}"] * jnp.log(r[c]) for c in places[x])
        - r[f"P_{x}"] / p[f"gamma_{x}"]
        for x in PASSES
    ]


def _parameters(places: Places) -> tuple[Parameter, ...]:
    return tuple(p for x in PASSES for p in _of_pass(x, places[x]))


def _text(places: Places) -> str:
    heights = (" ".join([f"C_{x}", *(f"{c}^γ_{c}_{x}" for c in places[x])]) for x in PASSES)
    pairs = zip(heights, PASSES, strict=True)
    return " + ".join(f"{height} exp(−P_{x}/γ_{x})" for height, x in pairs)


def _gap(name: str, forward: str, backward: str) -> Law:
    """The law of pairs of runs that differ in their bits alone."""
    places = {"forward": forward, "backward": backward}
    return Law(
        name=name,
        equation=f"L = L_full + {_text(places)}",
        parameters=_parameters(places),
        log_prediction=lambda p, r: log_sum(jnp.log(r["loss_full"]), *_terms(p, r, places)),
        columns=("N", "D", *COLUMNS, "loss_full"),
        source=f"{_OURS}; L_full is that of the run in full precision with the same seed, size and data",
    )


_BOTH: Places = {"forward": "DN", "backward": "DN"}
GAP = _gap("gaps that grow with D and N", "DN", "DN")
# Where bits take away parameters, the gap falls with N and not with D; where tokens, the reverse.
PAIRED = (
    GAP,
    _gap("forward bits like fewer parameters, backward bits like fewer tokens", "N", "D"),
    _gap("both like fewer parameters", "N", "N"),
    _gap("both like fewer tokens", "D", "D"),
    _gap("forward bits like fewer tokens, backward bits like fewer parameters", "D", "N"),
    _gap("gaps that stay", "", ""),
)

GROWING = Law(
    name="terms that grow",
    equation=f"L = A N^−α + B D^−β + E + {_text(_BOTH)}",
    parameters=(A, ALPHA, B, BETA, E, *_parameters(_BOTH)),
    log_prediction=lambda p, r: log_sum(log_loss(p, r), *_terms(p, r, _BOTH)),
    columns=("N", "D", *COLUMNS),
    source=_OURS,
)


def _costs(forward: str, backward: str) -> Law:
    """The law in which bits of each pass cost parameters ("N") or tokens ("D")."""
    places = {"forward": forward, "backward": backward}

    def factors(p: Values, r: Values, place: str) -> Any:
        found = jnp.ones_like(jnp.asarray(r["N"], float))
        for x, own in places.items():
            if own == place:
                found = found * saturating(p, x, r[f"P_{x}"], True)
        return found

    def text(place: str) -> str:
        return "".join(f" f_{x}" for x, own in places.items() if own == place)

    words = {"N": "parameters", "D": "tokens"}
    return Law(
        name=f"forward bits cost {words[forward]}, backward bits {words[backward]}",
        equation=f"L = A (N{text('N')})^−α + B (D{text('D')})^−β + E, f_x = 1 − exp(−P_x/γ_x + n_x)",
        parameters=(A, ALPHA, B, BETA, E, *(q for x in PASSES for q in (gamma(x), bias(x)))),
        log_prediction=lambda p, r: log_loss(p, r, factors(p, r, "N"), factors(p, r, "D")),
        columns=("N", "D", *COLUMNS),
        source=_QUARTET,
    )


TOKENS = _costs("N", "D")  # Quartet's, smooth in the bits
COSTS = (TOKENS, _costs("N", "N"), _costs("D", "D"), _costs("D", "N"))


def quartet(forward: list[int], backward: list[int], full: int) -> Law:
    """Quartet's form, with an efficiency for each width below full precision, and none for others."""
    widths = [tuple(b for b in bits if b < full) for bits in (forward, backward)]
    return dataclasses.replace(
        laws.quartet(*widths), widths=tuple(sorted({*widths[0], *widths[1]}))
    )

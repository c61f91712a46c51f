"""Laws whose penalty of few bits is added to the loss, and grows or shrinks with size and training.

In Kumar et al. 2024 few bits take away parameters: N f(P).  Then what they cost shrinks as N grows, and
does not depend on D.  Here the cost is a term of its own, C D^γ_D N^γ_N times a function of the bits, with
exponents of either sign, so that runs decide.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxquant.laws.law import Law, Parameter, Values, log_sum
from jaxquant.laws.terms import (
    ALPHA,
    BETA,
    TENSORS,
    A,
    B,
    E,
    check_one_bit,
    gamma,
    gaussian_mse,
    log_loss,
)

_SOURCE = "ours; that the gap grows with D is in Chen et al. 2025, arXiv 2505.14302"
_ADDED = "the additive alternative to N_eff, as weighed in Kumar et al. 2024, arXiv 2411.04330, section 4"
_HEIGHT = (
    1e-6,
    1e4,
    (0.01, 10.0),
)  # in units of the loss, of the penalty at the runs' middle without its bits
_EXPONENTS = (
    Parameter("gamma_D", -2.0, 2.0, (-0.3, 0.8), is_signed=True),
    Parameter("gamma_N", -2.0, 2.0, (-0.8, 0.3), is_signed=True),
)
_SCALE = Parameter("gamma", 0.05, 30.0, (0.5, 4.0), "bits")
_POWER = Parameter("kappa", 0.05, 5.0, (0.3, 1.5))

OfBits = Callable[[Values, Any], Any]  # (parameters, bits) -> the logarithm of a penalty's factor


def _exponential(p: Values, bits: Any) -> Any:
    return -bits / p["gamma"]


def _squared_error(p: Values, bits: Any) -> Any:
    return p["kappa"] * jnp.log(gaussian_mse(bits))


def _height(name: str, grows: bool) -> Parameter:
    if not grows:
        return Parameter(name, *_HEIGHT, "nats")
    term = (("gamma_D", "D", 1), ("gamma_N", "N", 1))
    return Parameter(name, *_HEIGHT, "nats · tokens^−γ_D · parameters^−γ_N", term)


def _growth(p: Values, r: Values) -> Any:
    return p["gamma_D"] * jnp.log(r["D"]) + p["gamma_N"] * jnp.log(r["N"])


def _penalty(grows: bool, of_bits: OfBits) -> Callable[[Values, Values], Any]:
    """Returns (parameters, columns) -> log of C · D^γ_D · N^γ_N · g(P)."""

    def penalty(p: Values, r: Values) -> Any:
        growth = _growth(p, r) if grows else 0.0
        return jnp.log(p["C"]) + growth + of_bits(p, r["P_w"])

    return penalty


def _one_width(name: str, text: str, grows: bool, of_bits: OfBits, shape: Parameter) -> Law:
    penalty = _penalty(grows, of_bits)
    return Law(
        name=name,
        equation=f"L = A N^−α + B D^−β + E + {text}",
        parameters=(
            A,
            ALPHA,
            B,
            BETA,
            E,
            _height("C", grows),
            *(_EXPONENTS if grows else ()),
            shape,
        ),
        log_prediction=lambda p, r: log_sum(log_loss(p, r), penalty(p, r)),
        columns=("N", "D", "P_w"),
        source=_SOURCE if grows else _ADDED,
        check_bits=check_one_bit if of_bits is _squared_error else None,
    )


ADDITIVE_ONE = _one_width("additive penalty, one width", "C exp(−P/γ)", False, _exponential, _SCALE)
ADDITIVE_ERROR = _one_width(
    "additive penalty, by squared error", "C MSE(P)^κ", False, _squared_error, _POWER
)
GROWING_ONE = _one_width(
    "growing penalty, one width", "C D^γ_D N^γ_N exp(−P/γ)", True, _exponential, _SCALE
)
GROWING_ERROR = _one_width(
    "growing penalty, by squared error", "C D^γ_D N^γ_N MSE(P)^κ", True, _squared_error, _POWER
)


def _growing(tensors: tuple[str, ...], name: str) -> Law:
    """Returns the law with a height and a scale for each tensor's bits, and exponents that they share."""

    def log_prediction(p: Values, r: Values) -> Any:
        parts = (
            jnp.log(p[f"C_{x}"]) + _growth(p, r) - r[f"P_{x}"] / p[f"gamma_{x}"] for x in tensors
        )
        return log_sum(log_loss(p, r), *parts)

    heights = (_height(f"C_{x}", True) for x in tensors)
    return Law(
        name=name,
        equation="L = A N^−α + B D^−β + E + D^γ_D N^γ_N Σ_x C_x exp(−P_x/γ_x), x of "
        + ", ".join(tensors),
        parameters=(*(A, ALPHA, B, BETA, E), *heights, *_EXPONENTS, *map(gamma, tensors)),
        log_prediction=log_prediction,
        columns=("N", "D", *(f"P_{x}" for x in tensors)),
        source=_SOURCE,
    )


GROWING = _growing(TENSORS, "growing penalties")
GROWING_WA = _growing(("w", "a"), "growing penalties, weights and activations")


def _gap(name: str, text: str, of_bits: OfBits, shape: Parameter) -> Law:
    penalty = _penalty(True, of_bits)
    return Law(
        name=name,
        equation=f"L = L_full + {text}",
        parameters=(_height("C", True), *_EXPONENTS, shape),
        log_prediction=lambda p, r: log_sum(jnp.log(r["loss_full"]), penalty(p, r)),
        columns=("N", "D", "P_w", "loss_full"),
        source=f"{_SOURCE}; L_full is that of the run in full precision with the same seed, size and data",
        check_bits=check_one_bit if of_bits is _squared_error else None,
    )


GAP = _gap("growing gap", "C D^γ_D N^γ_N exp(−P/γ)", _exponential, _SCALE)
GAP_ERROR = _gap("growing gap, by squared error", "C D^γ_D N^γ_N MSE(P)^κ", _squared_error, _POWER)

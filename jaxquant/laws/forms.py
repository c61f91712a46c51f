"""The laws, as values.  N parameters without embeddings, D tokens, P bits; all logarithms are natural."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.laws.law import Columns, Law, Parameter, Values, log_sum
from jaxquant.laws.terms import (
    ALPHA,
    BETA,
    TENSORS,
    A,
    B,
    E,
    bias,
    check_one_bit,
    coefficient,
    efficiency_at,
    gamma,
    gaussian_mse,
    kumar_efficiency,
    log_loss,
    positive,
    power,
    same_bits,
    saturating,
)

_KUMAR = "Kumar et al. 2024, arXiv 2411.04330"

CHINCHILLA = Law(
    name="Chinchilla",
    equation="L = A N^−α + B D^−β + E",
    parameters=(A, ALPHA, B, BETA, E),
    log_prediction=lambda p, r: log_loss(p, r),
    columns=("N", "D"),
    source="Hoffmann et al. 2022, arXiv 2203.15556, section 3.3",
)


def _kumar(name: str, equation: str, biased: bool, place: str, note: str = "") -> Law:
    """A law of Kumar et al., whose efficiency multiplies N, D, or both."""
    shapes = [(gamma(x), *([bias(x)] if biased else [])) for x in TENSORS]
    own = [p for shape in shapes for p in shape]
    if place == "N and D, untied":
        own += [Parameter(f"{p.name}_D", p.low, p.high, p.start, p.unit) for p in own]

    def log_prediction(p: Values, r: Values) -> Any:
        f = kumar_efficiency(p, r, biased)
        of_n = f if place != "D" else 1.0
        of_d = {"N": 1.0, "D": f, "N and D": f}.get(place)
        if of_d is None:
            of_d = kumar_efficiency(p, r, biased, "_D")
        return log_loss(p, r, of_n, of_d)

    return Law(
        name=name,
        equation=equation,
        parameters=(A, ALPHA, B, BETA, E, *own),
        log_prediction=log_prediction,
        columns=("N", "D", "P_w", "P_a", "P_kv"),
        source=f"{_KUMAR}, section 4{note}",
        efficiency=(lambda p, bits: kumar_efficiency(p, same_bits(bits), biased))
        if place == "N"
        else None,
    )


KUMAR = _kumar("Kumar, N_eff", "L = A (N Π_x (1 − exp(−P_x/γ_x + n_x)))^−α + B D^−β + E", True, "N")
KUMAR_UNBIASED = _kumar(
    "Kumar, N_eff without biases", "L = A (N Π_x (1 − exp(−P_x/γ_x)))^−α + B D^−β + E", False, "N"
)
KUMAR_D = _kumar(
    "Kumar, D_eff", "L = A N^−α + B (D Π_x (1 − exp(−P_x/γ_x)))^−β + E", False, "D", ""
)
KUMAR_BOTH = _kumar(
    "Kumar, N_eff and D_eff tied",
    "L = A (N f)^−α + B (D f)^−β + E, f = Π_x (1 − exp(−P_x/γ_x))",
    False,
    "N and D",
    "",
)
KUMAR_UNTIED = _kumar(
    "Kumar, N_eff and D_eff untied",
    "L = A (N f_N)^−α + B (D f_D)^−β + E, each f = Π_x (1 − exp(−P_x/γ_x)) with γ of its own",
    False,
    "N and D, untied",
    "",
)


def _one(p: Values, bits: Any) -> Any:
    return positive(1 - jnp.exp(-bits / p["gamma"] + p["n"]))


KUMAR_ONE = Law(
    name="N_eff, one width",
    equation="L = A (N (1 − exp(−P/γ + n)))^−α + B D^−β + E",
    parameters=(
        *(A, ALPHA, B, BETA, E),
        Parameter("gamma", 0.05, 30.0, (0.5, 4.0), "bits"),
        Parameter("n", 1e-3, 10.0, (0.05, 2.0)),
    ),
    log_prediction=lambda p, r: log_loss(p, r, _one(p, r["P_w"])),
    columns=("N", "D", "P_w"),
    source=f"{_KUMAR}, section 4, for runs whose tensors have one width: no run tells three γ apart",
    efficiency=_one,
)


def _additive(p: Values, r: Values) -> Any:
    penalties = (jnp.log(p[f"c_{x}"]) - r[f"P_{x}"] / p[f"gamma_{x}"] for x in TENSORS)
    return log_sum(log_loss(p, r), *penalties)


ADDITIVE = Law(
    name="additive penalties",
    equation="L = A N^−α + B D^−β + E + Σ_x c_x exp(−P_x/γ_x)",
    parameters=(
        *(A, ALPHA, B, BETA, E),
        *(Parameter(f"c_{x}", 1e-6, 1e4, (0.01, 10.0), "nats") for x in TENSORS),
        *map(gamma, TENSORS),
    ),
    log_prediction=_additive,
    columns=("N", "D", "P_w", "P_a", "P_kv"),
    source=f"the additive alternative to N_eff, as weighed in {_KUMAR}, section 4",
)


# ---------------------------------------------------------------------------------------------------
# Loss added by quantizing after training

_C_T = Parameter(
    "C_T",
    *(1e-6, 1e8, (0.1, 1e3)),
    "nats · parameters^γ_N · tokens^−γ_D",
    (("gamma_D", "D", 1), ("gamma_N", "N", -1)),
)
_GAMMA_D = Parameter("gamma_D", 0.01, 2.0, (0.2, 1.0))
_GAMMA_N = Parameter("gamma_N", 0.01, 2.0, (0.2, 1.0))
_GAMMA_POST = Parameter("gamma_post", 0.05, 10.0, (0.3, 2.0), "bits")


def _add(p: Values, r: Values, of_n: Any = 1.0) -> Any:
    """Returns log of C_T D^γ_D (N of_n)^−γ_N exp(−P_post/γ_post)."""
    size = p["gamma_N"] * (jnp.log(r["N"]) + jnp.log(of_n))
    grown = p["gamma_D"] * jnp.log(r["D"]) - size
    return jnp.log(p["C_T"]) + grown - r["P_post"] / p["gamma_post"]


KUMAR_PTQ = Law(
    name="Kumar, post-training",
    equation="δ = C_T D^γ_D N^−γ_N exp(−P_post/γ_post)",
    parameters=(_C_T, _GAMMA_D, _GAMMA_N, _GAMMA_POST),
    log_prediction=_add,
    columns=("N", "D", "P_post"),
    source=f"{_KUMAR}, section 3",
    target="added",
)


def _unified(p: Values, r: Values) -> Any:
    f = kumar_efficiency(p, r, False)
    # Zero where the weights are served as they were trained; a floor keeps the logarithm.
    apart = [1 - jnp.exp(-p[f"C_{x}"] * jnp.maximum(r[f"P_{x}"] - r["P_post"], 0)) for x in TENSORS]
    kept = functools.reduce(lambda a, b: a * b, apart)
    return log_sum(log_loss(p, r, f), _add(p, r, f) + jnp.log(jnp.maximum(kept, 1e-12)))


UNIFIED = Law(
    name="Kumar, unified",
    equation="L = A (N f)^−α + B D^−β + E + C_T D^γ_D (N f)^−γ_N exp(−P_post/γ_post) "
    "Π_x (1 − exp(−C_x (P_x − P_post)))",
    parameters=(
        *KUMAR_UNBIASED.parameters,
        *(_C_T, _GAMMA_D, _GAMMA_N, _GAMMA_POST),
        *(Parameter(f"C_{x}", 1e-3, 100.0, (0.1, 2.0), "1/bits") for x in TENSORS),
    ),
    log_prediction=_unified,
    columns=("N", "D", "P_w", "P_a", "P_kv", "P_post"),
    source=f"{_KUMAR}, section 5, with P_train > P_post",
    efficiency=KUMAR_UNBIASED.efficiency,
)

QID = Law(
    name="QiD",
    equation="δ = k D^β N^−α P^−γ",
    parameters=(
        Parameter(
            "k",
            *(1e-4, 1e4, (0.1, 10.0)),
            "nats",
            (("beta", "D", 1), ("alpha", "N", -1), ("gamma", "P_post", -1)),
        ),
        Parameter("beta", 0.01, 2.0, (0.2, 1.0)),
        Parameter("alpha", 0.01, 2.0, (0.2, 1.0)),
        Parameter("gamma", 0.05, 20.0, (1.0, 6.0)),
    ),
    log_prediction=lambda p, r: (
        jnp.log(p["k"])
        + p["beta"] * jnp.log(r["D"])
        - p["alpha"] * jnp.log(r["N"])
        - p["gamma"] * jnp.log(r["P_post"])
    ),
    columns=("N", "D", "P_post"),
    source="Ouyang et al. 2024, arXiv 2411.17691",
    target="added",
)


def _chen(p: Values, r: Values) -> Any:
    grown = p["gamma_D"] * jnp.log(r["D"]) - p["gamma_N"] * jnp.log(r["N"])
    return jnp.log(p["k"]) + grown + p["gamma_G"] * jnp.log(jnp.log2(r["block"]))


CHEN_QAT = Law(
    name="Chen, QAT",
    equation="δ = k D^γ_D (log₂ G)^γ_G N^−γ_N",
    parameters=(
        Parameter(
            "k", *(1e-4, 1e4, (0.1, 10.0)), "nats", (("gamma_D", "D", 1), ("gamma_N", "N", -1))
        ),
        *(_GAMMA_D, _GAMMA_N),
        Parameter("gamma_G", 0.01, 5.0, (0.2, 2.0)),
    ),
    log_prediction=_chen,
    columns=("N", "D", "block"),
    source="Chen et al. 2025, arXiv 2505.14302; blocks of G = 2 and more",
    target="added",
)


# ---------------------------------------------------------------------------------------------------
# Other forms of the loss


def _sun(p: Values, r: Values) -> Any:
    """Computes the law in logarithms: the last term's D^β / N^α is large."""
    of_n = jnp.log(p["n"]) - p["alpha"] * jnp.log(r["N"])
    of_d = jnp.log(p["d"]) - p["beta"] * jnp.log(r["D"])
    grown = p["beta"] * jnp.log(r["D"]) - p["alpha"] * jnp.log(r["N"])
    format = p["delta"] * jnp.log(r["exponent_bits"] + 0.5)
    format = format + p["nu"] * jnp.log(r["mantissa_bits"] + 0.5)
    coarse = grown + jnp.log(jnp.log2(r["block"])) - jnp.log(p["gamma"]) - format
    return log_sum(of_n, of_d, jnp.log(p["epsilon"]), coarse)


SUN_FLOAT = Law(
    name="Sun, floating point",
    equation="L = n N^−α + d D^−β + ε + (D^β / N^α) log₂B / (γ (E + ½)^δ (M + ½)^ν)",
    parameters=(
        coefficient("n", "alpha", "N", "nats · parameters^α"),
        ALPHA,
        coefficient("d", "beta", "D", "nats · tokens^β"),
        BETA,
        Parameter("epsilon", 1e-4, 20.0, (0.3, 3.0), "nats"),
        Parameter("gamma", *(1e-8, 1e8, (1e-3, 10.0)), "1", (("beta", "D", -1), ("alpha", "N", 1))),
        Parameter("delta", 0.05, 20.0, (1.0, 5.0)),
        Parameter("nu", 0.05, 20.0, (1.0, 5.0)),
    ),
    log_prediction=_sun,
    columns=("N", "D", "exponent_bits", "mantissa_bits", "block"),
    source="Sun et al. 2025, arXiv 2501.02423",
)


def _check_widths(widths: tuple[int, ...]) -> tuple[int, ...]:
    whole = [isinstance(b, int | np.integer) and not isinstance(b, bool) and b > 0 for b in widths]
    if not widths or not all(whole) or len(set(widths)) != len(widths):
        raise ValueError(f"widths are whole numbers of bits, each once; got {widths!r}")
    return tuple(sorted(int(b) for b in widths))


def _check_bits(column: str, widths: tuple[int, ...]) -> Callable[[Columns], None]:
    def check(columns: Columns) -> None:
        bits = columns[column]
        other = np.unique(bits[~(np.isin(bits, widths) | (bits > widths[-1]))])
        if other.size:
            raise ValueError(
                f"free efficiencies are of {', '.join(map(str, widths))} bits and more than {widths[-1]}; "
                f"{column} has {', '.join(f'{b:g}' for b in other)}"
            )

    return check


def _check_fit(column: str, widths: tuple[int, ...]) -> Callable[[Columns], None]:
    check_bits = _check_bits(column, widths)

    def check(columns: Columns) -> None:
        check_bits(columns)
        missing = sorted({*widths} - {*columns[column].tolist()})
        if missing:
            raise ValueError(
                f"no run has {column} = {', '.join(map(str, missing))}, whose efficiency is to be fitted"
            )

    return check


def _each(*checks: Callable[[Columns], None]) -> Callable[[Columns], None]:
    def check(columns: Columns) -> None:
        for one in checks:
            one(columns)

    return check


def _efficiency(name: str) -> Parameter:
    return Parameter(name, 1e-4, 1.2, (0.1, 1.0))


def free_efficiency(*widths: int) -> Law:
    """Returns a law with an efficiency of its own for each width; what is wider counts as full precision.

    Args:
        widths: the bits that are free, each once.

    Raises:
        ValueError: anything but whole numbers above 0, each once.

    >>> free_efficiency(4, 2).names[-2:]
    ('eff_2', 'eff_4')
    """
    return _free_efficiency(_check_widths(widths))


# One law for the same widths: programs are compiled for each law.
@functools.lru_cache
def _free_efficiency(chosen: tuple[int, ...]) -> Law:
    return Law(
        name="free efficiencies",
        equation="L = A (N eff(P))^−α + B D^−β + E",
        parameters=(A, ALPHA, B, BETA, E, *(_efficiency(f"eff_{b}") for b in chosen)),
        log_prediction=lambda p, r: log_loss(p, r, efficiency_at(p, "eff", chosen, r["P_w"])),
        columns=("N", "D", "P_w"),
        source="Frantar et al. 2025, arXiv 2502.16440; Panferov et al. 2025 (QuEST), arXiv 2502.05003",
        efficiency=lambda p, bits: efficiency_at(p, "eff", chosen, bits),
        widths=chosen,
        check_bits=_check_bits("P_w", chosen),
        check_fit=_check_fit("P_w", chosen),
    )


def quartet(forward: tuple[int, ...], backward: tuple[int, ...]) -> Law:
    """Forward error costs parameters, backward error costs tokens: an efficiency for each width of each.

    Args:
        forward: bits of forward products that are free; what is wider counts as full precision.
        backward: of the gradients' products, likewise.

    Raises:
        ValueError: as `free_efficiency`.
    """
    return _quartet(_check_widths(forward), _check_widths(backward))


@functools.lru_cache
def _quartet(of_n: tuple[int, ...], of_d: tuple[int, ...]) -> Law:
    def log_prediction(p: Values, r: Values) -> Any:
        n = power(p, r, "A", "alpha", "N", efficiency_at(p, "eff_N", of_n, r["P_forward"]))
        d = power(p, r, "B", "beta", "D", efficiency_at(p, "eff_D", of_d, r["P_backward"]))
        return log_sum(p["gamma"] * log_sum(n, d), jnp.log(p["E"]))

    return Law(
        name="Quartet",
        equation="L = (A (N eff_N(P_f))^−α + B (D eff_D(P_b))^−β)^γ + E",
        parameters=(
            *(A, ALPHA, B, BETA, E),
            Parameter("gamma", 0.05, 5.0, (0.5, 1.5)),
            *(_efficiency(f"eff_N_{b}") for b in of_n),
            *(_efficiency(f"eff_D_{b}") for b in of_d),
        ),
        log_prediction=log_prediction,
        columns=("N", "D", "P_forward", "P_backward"),
        source="Castro et al. 2025 (Quartet), arXiv 2505.14669",
        pass_widths=(of_n, of_d),
        check_bits=_each(_check_bits("P_forward", of_n), _check_bits("P_backward", of_d)),
        check_fit=_each(_check_fit("P_forward", of_n), _check_fit("P_backward", of_d)),
    )


def _of_error(p: Values, bits: Any) -> Any:
    return jnp.exp(-p["k"] * gaussian_mse(bits) ** p["d"])


PANFEROV = Law(
    name="Panferov, by squared error",
    equation="L = A (N exp(−k MSE(P)^d))^−α + B D^−β + E",
    parameters=(
        *(A, ALPHA, B, BETA, E),
        Parameter("k", 1e-3, 1e3, (0.3, 10.0)),
        Parameter("d", 0.05, 5.0, (0.3, 1.5)),
    ),
    log_prediction=lambda p, r: log_loss(p, r, _of_error(p, r["P_w"])),
    columns=("N", "D", "P_w"),
    source="after Panferov et al. 2025, arXiv 2506.01863: efficiency as a function of a normal's squared "
    "error; this function of it is ours",
    efficiency=_of_error,
    check_bits=check_one_bit,
)


def state_law(place: str) -> Law:
    """Returns bits of the optimizer's state as a cost in N, in D, or in what no size takes away.

    With f = 1 − exp(−P_state/γ_state + n_state): A (N f)^−α + B D^−β + E, or A N^−α + B (D f)^−β + E, or
    A N^−α + B D^−β + E + C_state exp(−P_state/γ_state): two parameters of the bits each, a rate and a height.

    Args:
        place: ``"N"``, ``"D"`` or ``"E"``.

    Raises:
        ValueError: another place.
    """
    if place not in ("N", "D", "E"):
        raise ValueError(f"place is 'N', 'D' or 'E'; got {place!r}")
    factor = "(1 − exp(−P_state/γ_state + n_state))"
    n, d = (f"{x} {factor}" if place == x else x for x in "ND")
    floor = " + C_state exp(−P_state/γ_state)" if place == "E" else ""

    def log_prediction(p: Values, r: Values) -> Any:
        if floor:
            return log_sum(log_loss(p, r), jnp.log(p["C_state"]) - r["P_state"] / p["gamma_state"])
        f = saturating(p, "state", r["P_state"], True)
        return log_loss(p, r, **{f"of_{place.lower()}": f})

    return Law(
        name="state bits raise E" if floor else f"state bits cost {place}",
        equation=f"L = A ({n})^−α + B ({d})^−β + E{floor}",
        parameters=(
            *(A, ALPHA, B, BETA, E, gamma("state")),
            Parameter("C_state", 1e-4, 1e4, (0.1, 10.0), "nats") if floor else bias("state"),
        ),
        log_prediction=log_prediction,
        columns=("N", "D", "P_state"),
        source="ours, in the form of Kumar et al. 2024",
    )

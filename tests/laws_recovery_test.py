"""Coverage and speed of fits: long.

Three laws, a few repetitions each; all of them, a hundred times, as the bar of 85 % is meant for, take an
hour or so:

    JAXQUANT_REPETITIONS=100 python -m pytest -m long tests/laws_recovery_test.py
"""

import os
import time

import numpy as np
import pytest
from scipy import optimize

from jaxquant import laws
from jaxquant.laws.fitting import Space
from jaxquant.laws.law import x64
from jaxquant.laws.solving import huber

pytestmark = [pytest.mark.long, pytest.mark.exhaustive]

ASKED = os.environ.get("JAXQUANT_REPETITIONS")
REPETITIONS = int(ASKED or "8")
# Of eight repetitions at 90 %, fewer than five hits come by chance once in 200; of a hundred, 85 are wanted.
WANTED = 0.85 if REPETITIONS >= 100 else 5 / 8
RUNS, NOISE = 150, 0.01
BASE = {"A": 400.0, "alpha": 0.35, "B": 1000.0, "beta": 0.35, "E": 1.7}
GAMMAS = {"gamma_w": 2.5, "gamma_a": 2.0, "gamma_kv": 1.2}
GROWTH = {"gamma_D": 0.25, "gamma_N": -0.1}
TRUE = {
    laws.CHINCHILLA: BASE,
    laws.KUMAR: BASE | GAMMAS | {"n_w": 0.3, "n_a": 0.5, "n_kv": 0.4},
    laws.KUMAR_UNBIASED: BASE | GAMMAS,
    laws.KUMAR_D: BASE | GAMMAS,
    laws.KUMAR_BOTH: BASE | GAMMAS,
    laws.KUMAR_UNTIED: BASE | GAMMAS | {f"{k}_D": 0.8 * v for k, v in GAMMAS.items()},
    laws.KUMAR_ONE: BASE | {"gamma": 2.5, "n": 0.3},
    laws.ADDITIVE: BASE | GAMMAS | {"c_w": 1.0, "c_a": 0.6, "c_kv": 0.4},
    laws.KUMAR_PTQ: dict(laws.KUMAR_2024_PTQ.params),
    laws.UNIFIED: BASE
    | GAMMAS
    | {"C_T": 0.5, "gamma_D": 0.4, "gamma_N": 0.4, "gamma_post": 1.0}
    | {"C_w": 0.5, "C_a": 0.5, "C_kv": 0.5},
    laws.QID: {"k": 0.02, "beta": 0.5, "alpha": 0.4, "gamma": 3.0},
    laws.CHEN_QAT: dict(laws.CHEN_2025_W4A4.params),
    laws.SUN_FLOAT: dict(laws.SUN_2025.params),
    laws.free_efficiency(2, 3, 4, 6): BASE
    | {"eff_2": 0.2, "eff_3": 0.5, "eff_4": 0.7, "eff_6": 0.9},
    laws.quartet((4, 8), (4, 8)): BASE
    | {"gamma": 0.8, "eff_N_4": 0.6, "eff_N_8": 0.95, "eff_D_4": 0.4, "eff_D_8": 0.9},
    laws.PANFEROV: BASE | {"k": 3.0, "d": 0.7},
    laws.state_law("N"): BASE | {"gamma_state": 1.5, "n_state": 0.4},
    laws.state_law("D"): BASE | {"gamma_state": 1.5, "n_state": 0.4},
    laws.state_law("E"): BASE | {"gamma_state": 1.5, "C_state": 5.0},
    laws.ADDITIVE_ONE: BASE | {"C": 3.0, "gamma": 1.2},
    laws.ADDITIVE_ERROR: BASE | {"C": 2.0, "kappa": 0.8},
    laws.GROWING_ONE: BASE | GROWTH | {"C": 0.1, "gamma": 1.2},
    laws.GROWING_ERROR: BASE | GROWTH | {"C": 0.08, "kappa": 0.8},
    laws.GROWING: BASE | GROWTH | GAMMAS | {"C_w": 0.05, "C_a": 0.04, "C_kv": 0.02},
    laws.GROWING_WA: BASE | GROWTH | {"gamma_w": 1.4, "gamma_a": 1.1, "C_w": 0.05, "C_a": 0.06},
    laws.GAP: GROWTH | {"C": 0.1, "gamma": 1.2},
    laws.GAP_ERROR: GROWTH | {"C": 0.08, "kappa": 0.8},
}
BUDGET = 1e19  # whose best precision is asked for where it depends on the budget


def runs_of(law, params, rng):
    runs = {"N": 10 ** rng.uniform(6, 8.5, RUNS), "D": 10 ** rng.uniform(8, 10.5, RUNS)}
    for name in ("P_w", "P_a", "P_kv"):
        # Weights are served below their training's bits in the unified law.
        runs[name] = rng.choice(
            [6.0, 8, 16] if law is laws.UNIFIED else [2.0, 3, 4, 6, 8, 16], RUNS
        )
    runs["P_post"] = rng.choice([2.0, 3.0, 4.0, 5.0], RUNS)
    runs["P_state"] = rng.choice([3.0, 4.0, 6.0, 8.0, 32.0], RUNS)
    runs["P_forward"], runs["P_backward"] = (rng.choice([4.0, 8.0, 16.0], RUNS) for _ in range(2))
    runs["exponent_bits"] = rng.choice([2.0, 3.0, 4.0, 5.0], RUNS)
    runs["mantissa_bits"] = rng.choice([1.0, 2.0, 3.0, 5.0], RUNS)
    runs["block"] = rng.choice([32.0, 128.0, 512.0], RUNS)
    runs["loss_full"] = laws.CHINCHILLA.predict(BASE, runs)
    return runs | {law.target: law.predict(params, runs) * np.exp(NOISE * rng.normal(size=RUNS))}


def best_precision(law, params=None):
    """For every budget where the law has one answer, else for one budget; None where it reads more."""
    form = law if params is not None else law.law
    if form.efficiency is not None:
        return laws.optimal_precision(law, params)
    if not {"N", "D"} < set(form.columns) <= {"N", "D", "P_w", "P_a", "P_kv"}:
        return None
    return laws.precision_at_budget(law, params, flops=BUDGET, sizes=(1e5, 1e10))


def coverage(law, repetitions, bootstraps=100, starts=16):
    """The share of repetitions whose 90 % intervals hold what made the runs: by parameter, and of P*."""
    true = TRUE[law]
    best, hits = best_precision(law, true), dict.fromkeys(true, 0)
    for i in range(repetitions):
        runs = runs_of(law, true, np.random.default_rng(i))
        found = laws.fit(law, runs, bootstraps=bootstraps, starts=starts, seed=i)
        for name, value in true.items():
            low, high = found.interval(name)
            hits[name] += low <= value <= high
        if best is not None:
            optimum = best_precision(found)
            assert optimum is not None
            hits["P*"] = hits.get("P*", 0) + (optimum.low <= best.bits <= optimum.high)
    return {name: count / repetitions for name, count in hits.items()}


CHOSEN = TRUE if ASKED else (laws.KUMAR_ONE, laws.GROWING_ERROR, laws.KUMAR_PTQ)


@pytest.mark.parametrize("law", CHOSEN, ids=lambda law: law.name)
def test_intervals_cover_what_made_the_runs(law):
    shares = coverage(law, REPETITIONS)
    print(law.name, shares)
    assert min(shares.values()) >= WANTED, shares


def test_every_law_of_size_tokens_and_bits_has_its_best_precision_recovered():
    asked = {law for law in TRUE if best_precision(law, TRUE[law]) is not None}
    growing = {laws.GROWING_ONE, laws.GROWING_ERROR, laws.GROWING, laws.GROWING_WA}
    assert {laws.ADDITIVE_ONE, laws.ADDITIVE_ERROR, laws.KUMAR_D} | growing <= asked
    assert not {laws.CHINCHILLA, laws.KUMAR_PTQ, laws.GAP, laws.GAP_ERROR} & asked
    for law in growing:
        best = best_precision(law, TRUE[law])
        assert best is not None
        assert best.is_determined, law.name


def test_a_thousand_bootstraps_are_thirty_times_faster_than_scipys():
    law = laws.KUMAR
    runs = runs_of(law, TRUE[law], np.random.default_rng(0))
    start = time.monotonic()
    found = laws.fit(law, runs, bootstraps=1000, starts=64)
    ours = time.monotonic() - start
    columns = {name: runs[name] for name in law.columns}
    space = Space(law, columns, runs[law.target])
    theirs = scipy_seconds(law, space, found) * 1001 * 64 / 10
    print(f"ours {ours:.1f} s, SciPy's L-BFGS {theirs:.0f} s (extrapolated from 10 fits)")
    assert theirs > 30 * ours


def scipy_seconds(law, space, found, count=10):
    """Seconds of `count` fits by L-BFGS, each from one start, with exact gradients, compiled before."""
    import jax

    from jaxquant.laws.fitting import _predictor

    rng = np.random.default_rng(1)
    with x64():
        data = space.columns, np.asarray(space._middle), np.asarray(space._unit)
        target = np.log(space.target)

        @jax.jit
        @jax.value_and_grad
        def objective(x):
            return huber(_predictor(law)(x, data) - target, found.delta).sum()

        objective(space.starts(rng, 1, 1)[0, 0])
        start = time.monotonic()
        for x in space.starts(rng, 1, count)[0]:
            optimize.minimize(
                lambda x: tuple(map(np.asarray, objective(x))),
                x,
                jac=True,
                method="L-BFGS-B",
                bounds=list(zip(space.low, space.high, strict=True)),
                options={"maxiter": 2000, "maxfun": 5000},
            )
        return time.monotonic() - start

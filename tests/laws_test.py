"""Laws of precision: published numbers come out, fits find what made the runs, and bad runs are refused."""

import dataclasses
import math
from typing import Any, cast

import numpy as np
import pytest

from jaxquant import laws
from jaxquant.laws.comparison import folds

RNG = np.random.default_rng(0)


def grid(count=120, seed=0, **columns):
    rng = np.random.default_rng(seed)
    runs = {"N": 10 ** rng.uniform(6, 8, count), "D": 10 ** rng.uniform(8, 10, count)}
    for name in ("P_w", "P_a", "P_kv", "P_post"):
        runs[name] = rng.choice([2.0, 3.0, 4.0, 6.0, 8.0, 16.0], count)
    return runs | columns


ONE = {
    "A": 400.0,
    "alpha": 0.35,
    "B": 1000.0,
    "beta": 0.35,
    "E": 1.7,
    "gamma": 2.5,
    "n": 0.3,
}


def made(law, params, runs, noise=0.01, seed=1):
    """The runs with a target that the law made, and noise on its logarithm."""
    rng = np.random.default_rng(seed)
    exact = law.predict(params, runs)
    return runs | {law.target: exact * np.exp(noise * rng.normal(size=len(exact)))}


def test_kumars_constants_give_7_with_the_biases_and_3_47_without():
    assert laws.optimal_precision(laws.KUMAR_2024).bits == pytest.approx(7.00, abs=0.01)
    params = {k: v for k, v in laws.KUMAR_2024.params.items() if not k.startswith("n_")}
    assert laws.optimal_precision(laws.KUMAR_UNBIASED, params).bits == pytest.approx(3.47, abs=0.01)


def test_kumars_efficiencies_at_4_and_8_bits():
    efficiency = laws.KUMAR.efficiency
    assert efficiency is not None
    values = [float(efficiency(laws.KUMAR_2024.params, bits)) for bits in (4.0, 8.0)]
    assert values == pytest.approx([0.191, 0.828], abs=1e-3)


@pytest.mark.parametrize(("method", "bits"), [("ste", 7), ("lsq", 5), ("quest", 5)])
def test_quests_losses_give_the_best_bits_of_each_estimator(method, bits):
    law = {"A": laws.QUEST_2025_A, "alpha": laws.QUEST_2025_ALPHA, "N": laws.QUEST_2025_N}
    losses = laws.QUEST_2025_LOSSES[method]
    found = laws.efficiency_from_losses(losses, laws.QUEST_2025_BF16, **law)
    worth = {b: value / b for b, value in found.items()}
    assert max(worth, key=worth.__getitem__) == bits
    if method == "quest":
        assert worth[4] > 0.98 * worth[5]


def test_quests_efficiencies_buy_most_at_4_bits():
    """Of the widths that its table has: 0.433/3, 0.692/4 and 1.016/8 of a parameter per bit."""
    assert laws.optimal_precision(laws.QUEST_2025).bits == 4


def test_the_best_sizes_are_where_the_loss_is_least():
    n, d = laws.optimal_sizes(laws.KUMAR_2024, flops=1e20, bits=7.0)
    assert 6 * n * d * 7 / 16 == pytest.approx(1e20)
    near = np.array([0.9, 1.0, 1.1]) * n
    bits = {name: np.full(3, 7.0) for name in ("P_w", "P_a", "P_kv")}
    runs = {"N": near, "D": n * d / near, **bits}
    losses = laws.KUMAR.predict(laws.KUMAR_2024.params, runs)
    assert losses[1] == losses.min()


def test_beyond_the_critical_tokens_the_quantized_model_gets_worse():
    loss, added = laws.KUMAR_2024, laws.KUMAR_2024_PTQ
    d = laws.critical_tokens(loss.params, added.params, N=1e9, P_post=4)
    near = np.array([0.8, 1.0, 1.25]) * d
    bits = {name: np.full(3, 16.0) for name in ("P_w", "P_a", "P_kv")}
    runs = {"N": np.full(3, 1e9), "D": near, "P_post": np.full(3, 4.0), **bits}
    total = loss.law.predict(loss.params, runs) + added.law.predict(added.params, runs)
    assert total[1] == total.min()


@pytest.mark.first(1)
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("law", "params"),
    [
        (laws.CHINCHILLA, {k: ONE[k] for k in laws.CHINCHILLA.names}),
        (laws.KUMAR_ONE, ONE),
        (laws.PANFEROV, {k: ONE[k] for k in laws.CHINCHILLA.names} | {"k": 3.0, "d": 0.7}),
        (laws.QID, {"k": 0.02, "beta": 0.5, "alpha": 0.4, "gamma": 3.0}),
        (laws.KUMAR_PTQ, dict(laws.KUMAR_2024_PTQ.params)),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_a_law_without_noise_is_found_again(law, params):
    runs = made(law, params, grid(), noise=0.0)
    found = laws.fit(law, runs, bootstraps=0)
    assert found.objective < 1e-8
    for name, value in params.items():
        assert found.params[name] == pytest.approx(value, rel=0.02), name


@pytest.mark.long
@pytest.mark.exhaustive
def test_intervals_hold_what_made_the_runs_and_reach_the_optimum():
    runs = made(laws.KUMAR_ONE, ONE, grid(200))
    found = laws.fit(laws.KUMAR_ONE, runs, bootstraps=100, starts=8)
    for name in ("alpha", "beta", "E", "gamma"):
        low, high = found.interval(name, 0.99)
        assert low < ONE[name] < high, name
    true = laws.optimal_precision(laws.KUMAR_ONE, ONE).bits
    optimum = laws.optimal_precision(found, confidence_level=0.99)
    assert optimum.is_determined
    assert optimum.low <= true <= optimum.high
    low, high = laws.profile(found, runs, "gamma")
    assert low < found.params["gamma"] < high
    assert high / low < 2
    assert "gamma" in str(found)


def test_an_interval_holds_its_estimate():
    params = {k: ONE[k] for k in laws.CHINCHILLA.names}
    found = laws.fit(laws.CHINCHILLA, made(laws.CHINCHILLA, params, grid(30)), bootstraps=0)
    low, high = found.params["E"] / 2, found.params["E"] / 3
    found = dataclasses.replace(found, samples={"E": np.array([low, high])})
    assert found.interval("E")[1] == found.params["E"]
    assert all(map(np.isnan, found.interval("A")))


@pytest.mark.exhaustive
def test_what_runs_together_is_resampled_together():
    runs = made(laws.CHINCHILLA, {k: ONE[k] for k in laws.CHINCHILLA.names}, grid(60))
    runs["trunk"] = np.repeat(np.arange(12), 5)
    one, other = (
        laws.fit(laws.CHINCHILLA, runs, bootstraps=20, starts=4, groups=g) for g in ("trunk", None)
    )
    assert one.objective == pytest.approx(other.objective, rel=1e-6)
    assert one.interval("E") != other.interval("E")
    with pytest.raises(ValueError, match="they have no 'family'"):
        laws.fit(laws.CHINCHILLA, runs, bootstraps=5, groups="family")


@pytest.mark.long
@pytest.mark.exhaustive
def test_laws_are_ranked_and_the_true_one_is_first():
    runs = made(laws.KUMAR_ONE, ONE, grid(150))
    found = laws.compare(
        [laws.CHINCHILLA, laws.KUMAR_ONE, laws.free_efficiency(2, 3, 4, 6, 8)], runs, starts=6
    )
    rows = {row["law"]: row for row in found.rows}
    assert found.rows[0]["law"] == laws.KUMAR_ONE.name
    assert rows["Chinchilla"]["delta_aicc"] > 100
    assert rows[laws.KUMAR_ONE.name]["r2_by_P_w"] > 0.98
    assert math.isnan(rows["free efficiencies"]["r2_by_P_w"])
    assert "delta_aicc" in str(found)


@pytest.mark.long
@pytest.mark.exhaustive
def test_on_shuffled_bits_the_term_of_precision_is_rejected():
    runs = made(laws.KUMAR_ONE, ONE, grid(100))
    kept = laws.shuffled_bits(laws.KUMAR_ONE, laws.CHINCHILLA, runs, starts=4)
    assert not kept.is_rejected
    assert kept.gain > kept.shuffled.max() + 50
    shuffled = runs | {"P_w": np.random.default_rng(5).permutation(runs["P_w"])}
    assert laws.shuffled_bits(laws.KUMAR_ONE, laws.CHINCHILLA, shuffled, starts=4).is_rejected


def test_held_out_are_values_or_ranges():
    assert [int(f.sum()) for f in folds(np.array([1.0, 1, 2, 3]))] == [2, 1, 1]
    parts = folds(np.arange(60.0))
    assert len(parts) == 6
    assert sum(part.sum() for part in parts) == 60


def test_an_optimum_at_a_boundary_is_not_determined():
    steep = {k: ONE[k] for k in laws.CHINCHILLA.names} | {"eff_2": 1.0, "eff_4": 1.0}
    found = laws.optimal_precision(laws.free_efficiency(2, 4), steep)
    assert not found.is_determined
    assert "low end of the range, 2 bits" in str(found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"D": None}, "no column 'D'"),
        (
            {"loss": math.nan},
            "column 'loss' holds positive finite numbers, one a run; run 0 has nan",
        ),
        ({"P_w": 4.0}, "all runs have P_w = 4"),
        ({"entropy_rate": 1e3}, "below the source's entropy of 1000"),
        ({"tokenizer": ["a", "b"]}, "several tokenizers cannot be compared; got tokenizer a, b"),
        ({"vocab_size": [256, 50_000]}, "cannot be compared; got vocab_size 256, 50000"),
        ({"loss": 2.0}, "all runs have loss = 2: there is nothing to fit"),
        ({"P_w": 100.0}, "all runs have P_w"),
        ({"N": "big"}, "column 'N' holds numbers"),
        ({"N": -1.0}, "run 0 has -1"),
    ],
)
def test_bad_runs_are_refused(change, words):
    runs: dict[str, Any] = made(laws.KUMAR_ONE, ONE, grid(40))
    ((name, value),) = change.items()
    if value is None:
        del runs[name]
    elif isinstance(value, list):
        runs[name] = value * 20
    elif (math.isnan(value) if isinstance(value, float) else False) or value == -1.0:
        runs[name][0] = value
    else:
        runs[name] = [value] * 40
    with pytest.raises(ValueError, match=words):
        laws.fit(laws.KUMAR_ONE, runs, bootstraps=0)


def test_too_few_runs_are_refused():
    runs = {k: v[:8] for k, v in made(laws.KUMAR_ONE, ONE, grid(40)).items()}
    with pytest.raises(ValueError, match="has 7 parameters and needs 10 runs or more; got 8"):
        laws.fit(laws.KUMAR_ONE, runs)


@pytest.mark.exhaustive
def test_what_runs_do_not_tell_is_a_warning():
    law = laws.CHINCHILLA
    runs = grid(60)
    # A power of D alone: no E, and hardly any N.
    runs["loss"] = 20 * runs["D"] ** -0.2 * np.exp(0.01 * RNG.normal(size=60))
    found = laws.fit(law, runs, bootstraps=30, starts=8)
    text = " ".join(found.warnings)
    assert "E = " in text or "bound" in text
    assert found.warnings


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: laws.plan(laws.KUMAR_2024), "needs flops, or N and D"),
        (lambda: laws.plan(laws.KUMAR_2024, flops=1e20, N=1e8, D=1e9), "over-determine"),
        (lambda: laws.plan(laws.KUMAR_2024, flops=-1.0), "flops must be a number above 0"),
        (lambda: laws.plan(laws.KUMAR_2024, flops=1e20, serve_bits=4), "give ptq"),
        (lambda: laws.plan(laws.KUMAR_2024_PTQ, flops=1e20), "is none"),
        (lambda: laws.optimal_precision(laws.CHINCHILLA, {}), "missing"),
        (lambda: laws.optimal_precision(laws.KUMAR_D, dict(laws.KUMAR_2024.params)), "unknown"),
        (lambda: laws.optimal_precision(cast(Any, "kumar")), "law is one of"),
        (lambda: laws.free_efficiency(4, 4), "each once"),
        (lambda: laws.throughput({8: 2.0}), "a speed for each of some bits, 16 among them"),
        (lambda: laws.state_law("F"), "place is 'N', 'D' or 'E'"),
    ],
)
def test_bad_questions_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.long
def test_a_plan_holds_its_budget_and_says_where_it_leaves_what_was_fitted():
    found = laws.plan(laws.KUMAR_2024, flops=1e20, serve_bits=4, ptq=laws.KUMAR_2024_PTQ)
    for row in found.rows:
        assert 6 * row.N * row.D * row.bits / 16 == pytest.approx(1e20)
        assert (row.added > 0) == (row.bits > 4)
    assert any("outside 3e+07 to 2.2e+08" in text for text in found.warnings)
    assert found.best.loss == min(row.loss for row in found.rows)
    small = laws.plan(laws.KUMAR_2024, flops=1e20, memory=1e8)
    assert all(row.nbytes <= 1e8 * (1 + 1e-9) for row in small.rows)
    assert "memory" in " ".join(small.best.notes)


def test_measured_speeds_move_the_optimum_to_what_hardware_has():
    cost = laws.throughput({16: 1.0, 8: 1.8, 4: 2.5})
    assert laws.optimal_precision(laws.KUMAR_2024, cost=cost).bits == pytest.approx(8.0)

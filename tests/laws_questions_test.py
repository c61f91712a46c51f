"""What laws cannot answer is refused in words; what they answer holds where they are asked."""

from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from laws_test import ONE, grid, made

from jaxquant import laws

pytestmark = pytest.mark.exhaustive  # our arithmetic alone

KUMAR, ADDED = laws.KUMAR_2024, laws.KUMAR_2024_PTQ


@pytest.fixture(scope="module")
def runs():
    return made(laws.KUMAR_ONE, ONE, grid(40))


def refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- plans


@pytest.mark.first(1)
@pytest.mark.parametrize(("flops", "serve_bits"), [(1e20, 3), (1e20, 2), (1e22, 3), (1e21, 4)])
def test_a_plan_that_is_served_in_fewer_bits_has_the_least_loss_as_it_is_served(flops, serve_bits):
    found = laws.plan(KUMAR, flops=flops, serve_bits=serve_bits, ptq=ADDED)
    for row in found.rows:
        n = np.geomspace(row.N / 300, row.N * 300, 20_001)
        d = flops / (6 * n * row.bits / 16)
        bits = {f"P_{x}": np.full_like(n, row.bits) for x in ("w", "a", "kv")}
        total = KUMAR.law.predict(KUMAR.params, {"N": n, "D": d} | bits)
        if serve_bits < row.bits:
            served = {"N": n, "D": d, "P_post": np.full_like(n, serve_bits)}
            total = total + ADDED.law.predict(ADDED.params, served)
        assert row.loss == pytest.approx(total.min(), rel=1e-7)
    assert found.best.loss == min(row.loss for row in found.rows)


def test_what_memory_does_not_hold_is_not_the_best():
    found = laws.plan(KUMAR, N=1e9, D=1e10, memory=6e8)
    assert [row.bits for row in found.rows if row.fits] == [4]
    assert found.best.bits == 4
    assert "> memory" in str(found)
    nothing = laws.plan(KUMAR, N=1e9, D=1e10, memory=1e8)
    assert "more than memory's 1e+08" in " ".join(nothing.warnings)


def test_each_row_says_where_it_leaves_what_was_fitted():
    found = laws.plan(KUMAR, flops=1e20, precisions=np.array([4, 8, 20]))
    rows = {row.bits: row for row in found.rows}
    assert rows[8].outside == ("N",)
    assert set(rows[20].outside) == {"N", "P_w", "P_a", "P_kv"}
    served = laws.plan(KUMAR, flops=1e20, serve_bits=3, ptq=ADDED)
    assert "models trained in 16 bits" in " ".join(served.warnings)


def test_a_best_row_beside_the_interval_of_the_optimum_is_said(runs):
    fitted = laws.fit(laws.KUMAR_ONE, runs, bootstraps=60, starts=2)
    free = laws.plan(fitted, flops=1e20).optimum
    assert free is not None
    assert free.is_determined
    wide = laws.plan(fitted, flops=1e20, precisions=(int(free.high) + 3, int(free.high) + 6))
    assert "is outside the interval of P*" in " ".join(wide.warnings)
    assert "none of those looked at lies in it" in " ".join(wide.warnings)
    inside = laws.plan(fitted, flops=1e20, precisions=(free.bits, 16))
    assert "outside the interval of P*" not in " ".join(inside.warnings)


def test_precisions_of_which_a_law_says_nothing_are_named():
    found = laws.plan(laws.QUEST_2025, flops=1e20, precisions=[4, 5, 8, 4])
    assert [row.bits for row in found.rows] == [4, 8]
    assert "of 5 bits the law says nothing: left out" in found.warnings
    assert "4 bits, is the fewest that the plan looked at" in " ".join(found.warnings)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: laws.compare(cast(Any, None), {}), "laws are several laws of jaxquant.laws; got None"),
        (lambda: laws.compare([KUMAR.law], {}, held_out="N"), "held_out names columns"),
        (lambda: laws.plan(KUMAR, flops=cast(Any, "1e20")), "flops must be a number above 0; got '1e20'"),
        (lambda: laws.plan(KUMAR, flops=1e20, precisions=cast(Any, "48")), "bits, such as .*; got '48'"),
        (lambda: laws.plan(KUMAR, flops=1e20, precisions=cast(Any, ["a"])), "of precisions must be"),
        (lambda: laws.plan(KUMAR, flops=1e20, precisions=cast(Any, 4)), "a list of bits, such as .*; got 4"),
        (lambda: laws.plan(KUMAR, flops=1e20, precisions=[3]), "efficiency of Kumar, N_eff is next to"),
        (lambda: laws.plan(KUMAR, flops=1e20, serve_bits=4, ptq=KUMAR), "ptq has the form of Kumar, post"),
        (lambda: laws.plan(KUMAR, flops=1e20, cost=lambda b: -b), "cost is positive and finite"),
    ],
)  # fmt: skip
def test_plans_that_there_are_not_are_refused(call, words):
    refused(call, words)


# ---- where laws hold


def test_a_law_has_no_value_where_its_efficiency_is_gone():
    run = {"N": [1e8], "D": [2e9], "P_w": [3.0], "P_a": [3.0], "P_kv": [3.0]}
    refused(lambda: KUMAR.law.predict(KUMAR.params, run), "efficiency is next to nothing")
    refused(lambda: laws.optimal_sizes(KUMAR, flops=1e20, bits=3), "next to nothing")
    bits = {name: np.linspace(*ends, 50) for name, ends in KUMAR.within.items() if name[0] == "P"}
    inside = KUMAR.law.predict(KUMAR.params, {"N": np.full(50, 1e8), "D": np.full(50, 2e9)} | bits)
    assert ((inside > 2) & (inside < 8)).all()


def test_free_efficiencies_are_of_widths_that_runs_have(runs):
    own = runs | {"P_w": np.where(runs["P_w"] < 4, 4.0, runs["P_w"])}
    law = laws.free_efficiency(4, 5, 8)
    refused(lambda: laws.fit(law, own, bootstraps=0), r"P_w has 6")
    own["P_w"] = np.where(own["P_w"] == 6, 8.0, own["P_w"])
    refused(lambda: laws.fit(law, own, bootstraps=0), "no run has P_w = 5")
    params = {k: ONE[k] for k in laws.CHINCHILLA.names} | {"eff_4": 0.5, "eff_8": 0.9}
    law = laws.free_efficiency(4, 8)
    run = {"N": [1e8], "D": [1e9], "P_w": [2.0]}
    refused(lambda: law.predict(params, run), "4, 8 bits and more than 8; P_w has 2")
    refused(lambda: laws.optimal_sizes(law, params, flops=1e20, bits=2), "P_w has 2")
    assert law.predict(params, run | {"P_w": [16.0]}) < law.predict(params, run | {"P_w": [8.0]})


@pytest.mark.long
def test_an_optimums_interval_holds_it_and_keeps_from_the_ends(runs):
    found = laws.fit(laws.KUMAR_ONE, runs, bootstraps=40, starts=8)
    for level in (0.05, 0.5, 0.9):
        optimum = laws.optimal_precision(found, confidence_level=level)
        assert optimum.low <= optimum.bits <= optimum.high
    inside = laws.optimal_precision(found)
    edge = laws.optimal_precision(found, high=inside.high - 0.3)
    assert inside.is_determined
    assert not edge.is_determined


# ---- questions


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: laws.fit(cast(Any, "kumar"), r), "one of jaxquant.laws, as laws.KUMAR; got 'kumar'"),
        (lambda r: laws.fit(cast(Any, KUMAR), r), "of type Published"),
        (lambda r: laws.fit(laws.KUMAR_ONE, [{"N": 1}]), "a data frame or a dict of arrays; got a list"),
        (lambda r: laws.fit(laws.KUMAR_ONE, r | {"N": [10**400] * 40}), "column 'N' holds numbers"),
        (lambda r: laws.fit(laws.KUMAR_ONE, r | {"loss": r["loss"] + 1j}), "column 'loss' holds numbers"),
        (lambda r: laws.fit(laws.KUMAR_ONE, r | {"P_w": r["P_w"] * 50}), "P_w holds bits, up to 64; got 800"),
        (lambda r: laws.fit(laws.KUMAR_ONE, r | {"entropy_rate": "x"}), "'entropy_rate' holds a number"),
        (lambda r: laws.fit(laws.KUMAR_ONE, r | {"trunk": [1]}, groups="trunk"), "has 1 groups for 40 runs"),
        (lambda r: laws.fit(laws.KUMAR_ONE, r, groups=cast(Any, ["N"])), "groups names a column"),
        (lambda r: laws.fit(laws.KUMAR_ONE, r, confidence_level=cast(Any, "a")), "level is between"),
        (lambda r: laws.fit(laws.KUMAR_ONE, r, seed=-1), "seed must be an integer of at least 0; got -1"),
        (lambda r: laws.compare(cast(Any, laws.KUMAR), r), "laws are several"),
        (lambda r: laws.compare([laws.CHINCHILLA], r, held_out=("seed",)), "no column 'seed'"),
        (lambda r: laws.compare([laws.CHINCHILLA], r | {"x": ["a"] * 40}, held_out=("x",)), "'x' holds"),
        (lambda r: laws.shuffled_bits(laws.KUMAR_ONE, laws.CHINCHILLA, r, shuffles=5), "of at least 19"),
        (lambda r: laws.optimal_precision(KUMAR, high=1e9), "low < high ≤ 64"),
        (lambda r: laws.optimal_precision(KUMAR, low=cast(Any, "a")), "low and high must be a number"),
        (lambda r: laws.optimal_precision(KUMAR, cost=cast(Any, 3)), "cost is a function"),
        (lambda r: laws.throughput(cast(Any, 3)), "a speed for each of some bits"),
        (lambda r: laws.throughput(cast(Any, {16: 1, "8": 2})), "a format's bits must be a number"),
        (lambda r: laws.optimal_sizes(KUMAR, flops=1e20, bits=0), "bits must be a number above 0; got 0"),
        (lambda r: laws.critical_tokens(KUMAR.params, ADDED.params, N=-1, P_post=4), "N must be a number"),
        (lambda r: laws.critical_tokens({}, ADDED.params, N=1e9, P_post=4), r"missing: \['B', 'beta'\]"),
        (lambda r: laws.qat_share(N=1e9, D=1e10, bits=0), "bits must be a number above 0"),
        (lambda r: laws.efficiency_from_losses({4: 3.0}, 3.0, A=1.0, alpha=0, N=1e6), "alpha must be"),
        (lambda r: laws.gaussian_mse(0), "one bit or more; got 0"),
    ],
)  # fmt: skip
def test_raw_errors_are_words(runs, call, words):
    refused(lambda: call(dict(runs)), words)


def test_records_and_single_values_are_taken(runs):
    fit = {"bootstraps": 0, "starts": np.int64(8), "delta": 1}
    one = laws.fit(laws.KUMAR_ONE, runs | {"entropy_rate": 0.5, "tokenizer": "bytes"}, **fit)
    table = pd.DataFrame(runs).to_records()
    assert laws.fit(laws.KUMAR_ONE, table, **fit).params == one.params


QUICK: dict[str, Any] = {"starts": 4, "bootstraps": 0}


def test_what_misleads_a_fit_is_a_warning(runs):
    runs = {name: runs[name] for name in ("N", "D", "P_w", "loss")}
    one = laws.fit(laws.KUMAR_ONE, runs, **QUICK)
    assert not any("is a factor of" in text or "does not read" in text for text in one.warnings)
    tokens = np.array(runs["D"], float)
    tokens[3] = 1e300
    far = laws.fit(laws.KUMAR_ONE, runs | {"D": tokens}, **QUICK)
    assert "D = 1e+300 is a factor of" in " ".join(far.warnings)
    bits = np.arange(len(tokens)) % 3 + 2.0
    ignored = laws.fit(laws.KUMAR_ONE, runs | {"P_kv": bits, "P_a": runs["P_w"]}, **QUICK)
    unread = [text for text in ignored.warnings if "does not read" in text]
    assert unread == [f"P_kv differs between the runs, and {laws.KUMAR_ONE.name} does not read it"]


def test_gaps_below_zero_are_no_gap_to_fit(runs):
    above = runs | {"loss_full": np.array(runs["loss"]) - 0.1}
    assert not any("no gap" in text for text in laws.fit(laws.GAP, above, **QUICK).warnings)
    below = runs | {"loss_full": np.array(runs["loss"]) + 0.1}
    count = len(below["loss_full"])
    assert (
        f"{count} of {count} runs are no worse than full precision: there is no gap to fit"
        in laws.fit(laws.GAP, below, **QUICK).warnings
    )


@pytest.mark.long
def test_few_bootstraps_are_a_warning(runs):
    few = laws.fit(laws.KUMAR_ONE, runs, starts=4, bootstraps=9)
    assert "9 bootstraps leave" in " ".join(few.warnings)
    assert "take 1000" in " ".join(few.warnings)


@pytest.mark.long
def test_runs_that_repeat_others_are_counted(runs):
    twice = {name: np.concatenate([column, column]) for name, column in runs.items()}
    found = laws.fit(laws.KUMAR_ONE, twice, bootstraps=0, starts=8)
    assert "40 of 80 runs repeat another, number for number" in found.warnings


@pytest.mark.long
def test_profiles_are_of_fits(runs):
    refused(
        lambda: laws.profile(cast(Any, laws.KUMAR_ONE), runs, "gamma"), "what laws.fit returned"
    )


def test_profiles_are_of_the_runs_that_were_fitted(runs):
    found = laws.fit(laws.CHINCHILLA, runs, bootstraps=0, starts=8)
    fewer = {name: column[:30] for name, column in runs.items()}
    refused(lambda: laws.profile(found, fewer, "E"), "runs are those that were fitted")


def test_a_fit_goes_where_its_bootstraps_found_a_better_valley(runs):
    alone = laws.fit(laws.KUMAR_ONE, runs, bootstraps=0, starts=1, seed=3)
    with_bootstraps = laws.fit(laws.KUMAR_ONE, runs, bootstraps=30, starts=1, seed=3)
    assert with_bootstraps.objective <= alone.objective

"""Plans by any law of N, D and bits: beside grids of NumPy's, and beside closed forms where there are any."""

import dataclasses
import math
from typing import Any, cast

import numpy as np
import pytest
from laws_growing_test import BASE, TRUE, grid

from jaxquant import laws
from jaxquant.laws.sizes import turning_tokens

pytestmark = pytest.mark.exhaustive  # our arithmetic alone

BY_ERROR = BASE | {"C": 0.1, "gamma_D": 0.3, "gamma_N": -0.1, "kappa": 0.8}
APART = {"gamma_w": 1.2, "gamma_a": 1.0, "C_w": 0.05, "C_a": 0.04}
GROWTH = {"gamma_D": 0.3, "gamma_N": -0.1}
ADDED = laws.KUMAR_2024_PTQ
PUBLISHED = {
    law.name: laws.Published(law, params, "made up")
    for law, params in (
        (laws.GROWING_ONE, TRUE),
        (laws.GROWING_ERROR, BY_ERROR),
        (laws.GROWING_WA, BASE | APART | GROWTH),
        (laws.GROWING, BASE | APART | GROWTH | {"gamma_kv": 0.8, "C_kv": 0.1}),
        (laws.ADDITIVE_ONE, BASE | {"C": 3.0, "gamma": 1.2}),
        (laws.KUMAR_BOTH, BASE | {"gamma_w": 2.5, "gamma_a": 2.0, "gamma_kv": 1.2}),
    )
}
BY_NAME = pytest.mark.parametrize("law", PUBLISHED.values(), ids=PUBLISHED)
GROWING = PUBLISHED[laws.GROWING_ONE.name]


def losses(law, bits, n, d, serve_bits=None):
    """The loss as served, by the laws' own predictions."""
    n, d = np.broadcast_arrays(np.asarray(n, float), np.asarray(d, float))
    columns = {f"P_{x}": np.full(n.size, float(bits)) for x in ("w", "a", "kv")}
    runs = {"N": n.ravel(), "D": d.ravel()} | columns
    total = law.law.predict(law.params, {c: runs[c] for c in law.law.columns})
    if serve_bits is not None and serve_bits < bits:
        served = {"N": runs["N"], "D": runs["D"], "P_post": np.full(n.size, float(serve_bits))}
        total = total + ADDED.law.predict(ADDED.params, served)
    return total


# ---- beside closed forms


@dataclasses.dataclass(frozen=True)
class _Both:
    """A law with a closed form, and the same law for which there is none."""

    closed: Any
    searched: Any


def without_closed_form(law: laws.Published) -> _Both:
    form = dataclasses.replace(law.law, efficiency=None)
    return _Both(law, laws.Published(form, law.params, law.source, law.within))


@pytest.mark.parametrize("flops", [1e15, 1e20, 1e24])
@pytest.mark.parametrize("bits", [5.0, 7.0, 16.0])
def test_the_search_finds_the_sizes_of_the_closed_form(flops, bits):
    both = without_closed_form(laws.KUMAR_2024)
    found = laws.optimal_sizes(both.searched, flops=flops, bits=bits)
    closed = laws.optimal_sizes(both.closed, flops=flops, bits=bits)
    np.testing.assert_allclose(found, closed, rtol=1e-3)


def test_a_plan_by_search_is_the_plan_by_closed_forms():
    both = without_closed_form(laws.KUMAR_2024)
    options = {"flops": 1e20, "serve_bits": 4, "ptq": ADDED, "precisions": (5, 6, 7, 8, 16)}
    closed, found = (laws.plan(law, **options) for law in (both.closed, both.searched))
    for one, other in zip(closed.rows, found.rows, strict=True):
        for name in ("N", "D", "loss", "critical"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-3), name
    assert found.best.bits == closed.best.bits
    free = laws.plan(both.searched, flops=1e20).optimum
    assert free is not None
    assert free.bits == pytest.approx(laws.optimal_precision(both.closed).bits, abs=0.06)


def test_sizes_are_searched_for_each_of_several_budgets_and_widths():
    flops, bits = np.array([1e13, 1e16]), np.array([4.0, 8.0])
    n, d = laws.optimal_sizes(GROWING, flops=flops, bits=bits)
    np.testing.assert_allclose(6 * n * d * bits / 16, flops)
    each = [
        laws.optimal_sizes(GROWING, flops=c, bits=b)[0] for c, b in zip(flops, bits, strict=True)
    ]
    np.testing.assert_allclose(n, each)


@pytest.mark.parametrize(("n", "post"), [(1e8, 3), (1e9, 4), (1e10, 6)])
def test_the_turning_point_is_kumars_critical_data_size(n, post):
    loss = laws.KUMAR_2024
    closed = laws.critical_tokens(loss.params, ADDED.params, N=n, P_post=post)
    found = turning_tokens(loss.law, loss.params, ADDED.params, N=n, bits=8.0, P_post=post)
    assert found == pytest.approx(closed, rel=1e-6)
    assert math.isnan(turning_tokens(loss.law, loss.params, N=n, bits=8.0))


# ---- beside a grid of NumPy's


@BY_NAME
@pytest.mark.parametrize(("flops", "serve_bits"), [(1e13, None), (1e17, None), (1e17, 3)])
def test_each_precision_has_the_least_loss_of_a_grid(law, flops, serve_bits):
    found = laws.plan(law, flops=flops, serve_bits=serve_bits, ptq=ADDED)
    n = np.geomspace(1e1, 1e14, 130_001)
    least = {}
    for bits in laws.PRECISIONS:
        total = losses(law, bits, n, flops / (6 * n * bits / 16), serve_bits)
        least[bits] = total.min(), n[total.argmin()]
    assert {row.bits for row in found.rows} == set(least)
    for row in found.rows:
        assert row.loss == pytest.approx(least[row.bits][0], rel=1e-8)
        assert pytest.approx(least[row.bits][1], rel=2e-3) == row.N
        assert pytest.approx(flops) == 6 * row.N * row.D * row.bits / 16
    assert found.best.bits == min(least, key=lambda bits: least[bits][0])


@BY_NAME
@pytest.mark.parametrize("given", [{"N": 1e6}, {"D": 1e9}, {"memory": 1e4}])
def test_what_is_given_is_kept(law, given):
    found = laws.plan(law, flops=1e16, **given)
    for row in found.rows:
        assert given.get("N", row.N) == row.N
        assert given.get("D", row.D) == row.D
        assert row.nbytes <= given.get("memory", math.inf) * (1 + 1e-9)
        assert row.loss == pytest.approx(float(losses(law, row.bits, row.N, row.D)[0]))
    only = laws.plan(law, N=1e6, D=1e8, precisions=(4, 8))
    assert [row.loss for row in only.rows] == pytest.approx(
        [float(losses(law, b, 1e6, 1e8)[0]) for b in (4, 8)]
    )


@BY_NAME
@pytest.mark.parametrize("serve_bits", [None, 3])
def test_the_loss_turns_at_the_critical_tokens(law, serve_bits):
    for row in laws.plan(law, N=1e6, D=1e8, serve_bits=serve_bits, ptq=ADDED).rows:
        if math.isnan(row.critical):
            ever = losses(law, row.bits, 1e6, np.geomspace(1e3, 1e40, 300), serve_bits)
            assert (np.diff(ever) <= 1e-12).all()
            continue
        near = np.geomspace(0.9, 1.1, 201) * row.critical
        assert abs(int(losses(law, row.bits, 1e6, near, serve_bits).argmin()) - 100) <= 5
        assert ("more tokens than D_crit" in " ".join(row.notes)) == (row.critical < 1e8)


def test_a_growing_penalty_has_critical_tokens_by_itself():
    row = laws.plan(GROWING, N=1e6, D=1e12, precisions=[3, 16]).rows[0]
    grows = TRUE["C"] * 1e6 ** TRUE["gamma_N"] * math.exp(-3 / TRUE["gamma"])
    above = TRUE["beta"] * TRUE["B"] / (TRUE["gamma_D"] * grows)
    assert row.critical == pytest.approx(above ** (1 / (TRUE["beta"] + TRUE["gamma_D"])), rel=1e-6)
    assert "more tokens than D_crit" in row.notes[0]


# ---- the best precision


def test_the_best_precision_is_of_the_budget_and_grows_with_it():
    of = [laws.plan(GROWING, flops=c) for c in (1e12, 1e15, 1e18)]
    bits = [cast(Any, found.optimum).bits for found in of]
    assert bits == sorted(set(bits))
    assert [found.best.bits for found in of] == sorted(found.best.bits for found in of)
    fine = np.arange(2.0, 16.01, 0.05)
    for flops, found in zip((1e12, 1e15, 1e18), bits, strict=True):
        rows = laws.plan(GROWING, flops=flops, precisions=list(fine)).rows
        best = min(rows, key=lambda row: row.loss).bits
        assert found == pytest.approx(best, abs=0.051)


@pytest.mark.parametrize("law", [GROWING, laws.KUMAR_2024], ids=["growing", "Kumar"])
def test_at_a_given_size_the_best_precision_is_of_that_size(law):
    found = laws.plan(law, flops=1e16, N=1e6, precisions=list(np.arange(5.0, 16.01, 0.05)))
    assert cast(Any, found.optimum).bits == pytest.approx(found.best.bits, abs=0.051)
    for other in ({"memory": 1e5}, {"serve_bits": 8, "ptq": ADDED}, {"D": 1e9}):
        assert laws.plan(law, flops=1e16, **cast(Any, other)).optimum is None


# ---- fits


def test_a_fit_of_a_growing_law_has_intervals_and_warnings():
    runs = grid()
    fit = laws.fit(
        laws.GROWING_ONE, runs, bootstraps=30, starts=8, groups="unit", strata="N", seed=1
    )
    found = laws.plan(fit, flops=1e18, precisions=(4, 8, 12))
    assert found.optimum is not None
    assert found.optimum.low <= found.optimum.bits <= found.optimum.high
    row = found.rows[1]
    assert row.low < row.loss < row.high
    drawn = [
        float(losses(laws.Published(fit.law, p, ""), 8, row.N, row.D)[0])
        for p in ({k: v[i] for k, v in fit.samples.items()} for i in range(30))
    ]
    tail = (1 - fit.expanded()) / 2
    assert (row.low, row.high) == pytest.approx(tuple(np.quantile(drawn, [tail, 1 - tail])))
    assert set(row.outside) == {"N", "D"}
    assert (
        "lies outside 1e+04 to 3e+05, over which growing penalty, one width was fitted"
        in " ".join(found.warnings)
    )


@pytest.mark.parametrize(
    ("law", "words"),
    [
        (laws.Published(laws.GAP, {k: TRUE[k] for k in laws.GAP.names}, ""), "it reads N, D, P_w, loss_full"),
        (laws.Published(laws.CHINCHILLA, BASE, ""), "Chinchilla is none: it reads N, D"),
        (ADDED, "a plan needs a law of N, D and bits of training"),
        (laws.SUN_2025, "it reads N, D, exponent_bits"),
    ],
)  # fmt: skip
def test_laws_that_no_plan_can_be_made_by_are_refused(law, words):
    with pytest.raises(ValueError, match=words):
        laws.plan(law, flops=1e20)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flops": 1e20, "N": 1e6, "D": 1e9}, "over-determine"),
        ({"flops": 1e20, "serve_bits": 4}, "give ptq"),
        ({"flops": 1e20, "serve_bits": 4, "ptq": GROWING}, "ptq has the form of Kumar, post"),
        ({"flops": 0}, "flops must be a number above 0; got 0"),
        ({"N": 1e6}, "needs flops, or N and D"),
    ],
)
def test_bad_input_to_a_growing_law_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        laws.plan(GROWING, **options)
    with pytest.raises(ValueError, match=r"one bit or more; P_w has 0\.5"):
        laws.plan(PUBLISHED[laws.GROWING_ERROR.name], flops=1e16, precisions=[0.5])

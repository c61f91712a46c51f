"""Plans of forward and backward bits: beside NumPy's grids, and from runs that a known law made."""

import dataclasses
import itertools
import math
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import laws

pytestmark = pytest.mark.exhaustive  # our arithmetic alone

WIDTHS = (4, 6, 8)
BITS = (*WIDTHS, 16)
PAIRS = list(itertools.product(BITS, BITS))
LAW = laws.quartet(WIDTHS, WIDTHS)
TRUE = {"A": 60.0, "alpha": 0.35, "B": 120.0, "beta": 0.35, "E": 0.9, "gamma": 1.0}
TRUE |= {"eff_N_4": 0.85, "eff_N_6": 0.93, "eff_N_8": 0.97}
TRUE |= {"eff_D_4": 0.25, "eff_D_6": 0.6, "eff_D_8": 0.96}
MADE_UP = laws.Published(LAW, TRUE | {"gamma": 1.3}, "made up")
FLOPS = 1e14
B200 = laws.chip_cost("B200", "float")
SIZES = np.geomspace(1e3, 1e11, 40_001)


def loss(p, n, d, forward, backward):
    """Quartet's law, written out."""
    eff_n, eff_d = p.get(f"eff_N_{forward}", 1.0), p.get(f"eff_D_{backward}", 1.0)
    both = p["A"] * (n * eff_n) ** -p["alpha"] + p["B"] * (d * eff_d) ** -p["beta"]
    return both ** p["gamma"] + p["E"]


def cost_of(bits, by_chip):
    """Written out: P/16, or four and two times bf16's rate."""
    return {4: 0.25, 6: 0.5, 8: 0.5, 16: 1.0}[bits] if by_chip else bits / 16


def least(p, forward, backward, by_chip, sizes=SIZES):
    """(loss, N, D) of the best of a grid of sizes."""
    c = (cost_of(forward, by_chip) + 2 * cost_of(backward, by_chip)) / 3
    d = FLOPS / (6 * sizes * c)
    found = loss(p, sizes, d, forward, backward)
    i = int(np.argmin(found))
    return float(found[i]), float(sizes[i]), float(d[i])


def plan(law: Any, **changed: Any) -> laws.PassPlan:
    return laws.plan_passes(law, **{"flops": FLOPS, "forward": BITS, "backward": BITS} | changed)


@pytest.mark.parametrize("by_chip", [False, True])
def test_a_plan_is_the_best_of_numpys_grid(by_chip):
    found = plan(MADE_UP, cost=B200 if by_chip else laws.bits_linear)
    expected: dict[Any, Any] = {pair: least(MADE_UP.params, *pair, by_chip) for pair in PAIRS}
    assert len(found.rows) == len(PAIRS)
    for row in found.rows:
        value, n, d = expected[row.forward, row.backward]
        assert row.loss == pytest.approx(value, rel=1e-8)
        assert row.N == pytest.approx(n, rel=1e-2)  # noqa: SIM300
        assert row.D == pytest.approx(d, rel=1e-2)  # noqa: SIM300
        assert 6 * row.N * row.D * row.cost == pytest.approx(FLOPS)
        assert row.excess == pytest.approx(value - min(expected.values())[0], abs=1e-7)
    assert [row.loss for row in found.rows] == sorted(row.loss for row in found.rows)
    best = min(expected, key=lambda pair: expected[pair])
    assert found.best is found.rows[0]
    assert (found.best.forward, found.best.backward) == best
    assert (found.forward.bits, found.backward.bits) == best
    assert best[0] != best[1] or by_chip


def test_with_size_or_tokens_given_the_rest_follows():
    for given_one in ({"N": 1e5}, {"D": 1e8}):
        found = plan(MADE_UP, **given_one)
        for row in found.rows:
            c = (row.forward + 2 * row.backward) / 48
            n = given_one.get("N") or FLOPS / (6 * c * 1e8)
            d = given_one.get("D") or FLOPS / (6 * c * 1e5)
            assert (row.N, row.D) == pytest.approx((n, d))  # noqa: SIM300
            expected = loss(MADE_UP.params, n, d, int(row.forward), int(row.backward))
            assert row.loss == pytest.approx(expected, rel=1e-9)
        assert (found.forward.bits, found.backward.bits) == (
            found.best.forward,
            found.best.backward,
        )


@given(
    st.lists(st.floats(0.05, 1.0), min_size=6, max_size=6),
    st.floats(0.2, 0.6),
    st.floats(0.2, 0.6),
    st.floats(0.5, 1.5),
)
@settings(max_examples=25, deadline=None)
def test_the_best_pair_of_any_such_law_is_numpys(efficiencies, alpha, beta, gamma):
    names = [f"eff_{x}_{b}" for x in "ND" for b in WIDTHS]
    p = TRUE | dict(zip(names, efficiencies, strict=True))
    p |= {"alpha": alpha, "beta": beta, "gamma": gamma}
    found = plan(laws.Published(LAW, p, "made up"), cost=B200)
    best = min(least(p, *pair, True)[0] for pair in PAIRS)
    assert found.best.loss == pytest.approx(best, rel=1e-7)


# ---- what runs do not tell


def drawn(count=40, noise=0.08):
    """A fit whose bootstraps are made up: its intervals follow by NumPy's percentiles."""
    rng = np.random.default_rng(1)
    samples = {k: v * np.exp(noise * rng.normal(size=count)) for k, v in TRUE.items()}
    within = {"N": (1e4, 1e6), "D": (1e5, 1e8), "P_forward": (4, 16), "P_backward": (4, 16)}
    return laws.Fit(LAW, TRUE, samples, 0.9, 90, 30, 0.0, 1e-3, 1.0, 0.0, ("made up",), within)


def each(fitted):
    return [
        dict(zip(fitted.samples, row, strict=True))
        for row in zip(*fitted.samples.values(), strict=True)
    ]


def ends(values, of, level):
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return pytest.approx((min(low, of), max(high, of)), rel=1e-6, abs=1e-9)


def test_intervals_are_numpys_over_the_same_bootstraps():
    fitted = drawn()
    level = fitted.expanded()
    found = plan(fitted, cost=B200)
    best = found.best
    bits = int(best.forward), int(best.backward)
    at_best = [loss(p, best.N, best.D, *bits) for p in each(fitted)]
    for row in found.rows:
        own = [loss(p, row.N, row.D, int(row.forward), int(row.backward)) for p in each(fitted)]
        assert (row.low, row.high) == ends(own, row.loss, level)
        excess = np.subtract(own, at_best)
        assert (row.excess_low, row.excess_high) == ends(excess, row.excess, level)
    apart = {row.pair for row in found.rows if row.excess_low > 0}
    assert {row.pair for row in found.alike} == {r.pair for r in found.rows[1:]} - apart
    assert 0 < len(apart) < len(found.rows) - 1  # of both kinds
    coarse = np.geomspace(1e3, 1e11, 4001)
    tops = [
        min(PAIRS, key=lambda pair, p=p: least(p, *pair, True, coarse)[0]) for p in each(fitted)
    ]
    assert len(set(tops)) > 1
    for i, optimum in enumerate((found.forward, found.backward)):
        assert (optimum.low, optimum.high) == ends([pair[i] for pair in tops], bits[i], level)
    sizes = [least(p, *bits, True)[1:] for p in each(fitted)]
    for i, (name, interval) in enumerate((("N", found.N), ("D", found.D))):
        low, high = np.quantile([s[i] for s in sizes], [(1 - level) / 2, (1 + level) / 2])
        assert interval == pytest.approx((low, high), rel=1e-2)
        assert interval[0] < getattr(best, name) < interval[1]
    text = str(found)
    assert "and 6 more, of a larger loss" in text
    assert "more, of a larger" not in str(plan(fitted, forward=(4, 8), backward=(4, 8)))
    assert f"not told apart from {best.pair}: {found.alike[0].pair}" in text
    assert "warning: made up" in text


def test_several_fits_are_united_and_the_first_plans():
    first = drawn()
    params = TRUE | {"eff_D_4": 0.5}
    other = dataclasses.replace(drawn(), params=params)
    alone, both = plan(first), plan([first, other])
    assert [row.loss for row in both.rows] == [row.loss for row in alone.rows]
    of_other = {}
    for row in both.rows:
        again = plan(other, N=row.N, forward=(row.forward,), backward=(row.backward,)).best
        of_other[row.pair] = again.low, again.high
    for row, own in zip(both.rows, alone.rows, strict=True):
        low, high = of_other[row.pair]
        assert (row.low, row.high) == pytest.approx((min(low, own.low), max(high, own.high)))
        assert row.excess_low <= own.excess_low
    assert {row.pair for row in alone.alike} <= {row.pair for row in both.alike}
    assert both.forward.low <= alone.forward.low
    # A law that does not know a width says nothing of it, so that the runs do not tell it apart.
    few = laws.quartet((4, 8), (4, 6, 8))
    blind = laws.Fit(
        few,
        {k: v for k, v in TRUE.items() if k in few.names},
        {k: v for k, v in first.samples.items() if k in few.names},
        *(getattr(first, f.name) for f in dataclasses.fields(first)[3:]),
    )
    united = {row.pair: row for row in plan([first, blind]).rows}
    assert math.isnan(united["6/16"].low)
    assert not united["6/16"].is_apart
    assert united["8/16"].low <= {r.pair: r for r in alone.rows}["8/16"].low


def runs(noise, seeds=2):
    """Runs that the law made, with noise that is each run's own."""
    rng = np.random.default_rng(0)
    shape = itertools.product([1e4, 3e4, 1e5], [10, 30, 100], PAIRS, range(seeds))
    table = [(n, n * ratio, *pair) for n, ratio, pair, _ in shape]
    columns = dict(zip(("N", "D", "P_forward", "P_backward"), np.array(table).T, strict=True))
    exact = [loss(TRUE, *row) for row in table]
    return columns | {"loss": exact * np.exp(noise * rng.normal(size=len(exact)))}


@pytest.mark.parametrize("by_chip", [False, True])
def test_runs_of_a_law_give_back_its_split(by_chip):
    fitted = laws.fit(LAW, runs(1e-3), starts=8, bootstraps=20)
    found = plan(fitted, cost=B200 if by_chip else laws.bits_linear)
    expected = {pair: least(TRUE, *pair, by_chip) for pair in PAIRS}
    best = min(expected, key=lambda pair: expected[pair])
    assert (found.best.forward, found.best.backward) == best
    assert found.best.N == pytest.approx(expected[best][1], rel=0.05)  # noqa: SIM300
    assert found.N[0] < found.best.N < found.N[1]
    rows = {(row.forward, row.backward): row for row in found.rows}
    clear = [pair for pair in PAIRS if expected[pair][0] - expected[best][0] > 0.02]
    assert clear
    assert all(rows[pair].is_apart for pair in clear)
    for pair in PAIRS:
        true = expected[pair][0] - expected[best][0]
        assert rows[pair].excess == pytest.approx(true, abs=0.02)


# ---- errors, and what a law does not know


def test_widths_that_a_law_does_not_know_are_left_out_in_words():
    found = plan(MADE_UP, forward=(4, 5, 16), backward=(4, 6, 12))
    assert {row.pair for row in found.rows} == {"4/4", "4/6", "16/4", "16/6"}
    said = " ".join(found.warnings)
    assert "of P_forward = 5 the law says nothing: left out" in said
    assert "of P_backward = 12 the law says nothing: left out" in said
    assert "there are no bootstraps" in said
    assert found.alike == ()
    assert "not told apart" not in str(found)


def test_a_plan_outside_the_fitted_range_says_so():
    found = plan(drawn(), flops=1e24)
    assert {"N", "D"} <= set(found.best.outside)
    assert any(w.startswith("N = ") and "lies outside 1e+04 to 1e+06" in w for w in found.warnings)


@pytest.mark.parametrize(
    ("law", "changed", "words"),
    [
        (MADE_UP, {"flops": -1.0}, "flops must be a number above 0; got -1"),
        (MADE_UP, {"flops": None}, "flops must be a number above 0; got None"),
        (MADE_UP, {"N": 1e5, "D": 1e6}, "over-determine"),
        (MADE_UP, {"N": 0}, "N must be a number above 0; got 0"),
        (MADE_UP, {"forward": ()}, "forward is a list of bits, such as"),
        (MADE_UP, {"backward": (4, -8)}, "each of backward must be a number above 0; got -8"),
        (MADE_UP, {"cost": "h100"}, "what chip_cost gives; got 'h100'"),
        (MADE_UP, {"backward": (4, 64)}, "up to 32 bits; got 64"),
        (MADE_UP, {"forward": (5,)}, r"knows P_forward of \(4, 6, 8\) bits and 16; got \[5\]"),
        (MADE_UP, {"cost": lambda bits: bits - 4}, "cost is positive and finite"),
        (laws.KUMAR_2024, {}, "it reads N, D, P_w, P_a, P_kv"),
        ([], {}, "several fits, the likeliest first"),
        ([MADE_UP], {}, "several fits, the likeliest first"),
        (cast(Any, "kumar"), {}, "law is a fit, published constants"),
    ],
)
def test_bad_questions_are_refused(law, changed, words):
    with pytest.raises(ValueError, match=words):
        plan(law, **changed)

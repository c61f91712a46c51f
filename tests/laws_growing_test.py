"""Laws whose penalty grows, their criterion, units in strata, and the best precision of a budget."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import integrate, optimize

from jaxquant import laws
from jaxquant.laws import criteria
from jaxquant.laws.runs import strata_of_units

BASE = {"A": 40.0, "alpha": 0.35, "B": 230.0, "beta": 0.46, "E": 0.84}
TRUE = BASE | {"C": 0.1, "gamma_D": 0.3, "gamma_N": -0.1, "gamma": 1.2}
WIDTHS = np.array([2.0, 3.0, 4.0, 6.0, 8.0, 16.0])


def grid(seeds=3, noise=0.005, seed=0):
    """Runs of sizes, lengths and widths; those of one size and seed share part of their noise."""
    rng = np.random.default_rng(seed)
    n, d, p, s = (
        x.ravel()
        for x in np.meshgrid([1e4, 4e4, 1e5, 3e5], [10, 25, 60, 150], WIDTHS, range(seeds))
    )
    runs = {
        "N": n,
        "D": n * d,
        "P_w": p,
        "seed": s,
        "unit": [f"{a:g}/{b:g}" for a, b in zip(n, s, strict=True)],
    }
    units = {unit: rng.normal() for unit in dict.fromkeys(runs["unit"])}
    shared = np.array([units[unit] for unit in runs["unit"]])
    errors = noise * (shared + rng.normal(size=len(n)))
    return runs | {"loss": laws.GROWING_ONE.predict(TRUE, runs) * np.exp(errors)}


def test_a_prediction_by_hand():
    runs = {"N": [1e5], "D": [2e6], "P_w": [4.0]}
    plain = 40 * 1e5**-0.35 + 230 * 2e6**-0.46 + 0.84
    np.testing.assert_allclose(
        laws.GROWING_ONE.predict(TRUE, runs),
        [plain + 0.1 * 2e6**0.3 * 1e5**-0.1 * np.exp(-4 / 1.2)],
        rtol=1e-12,
    )
    by_error = BASE | {"C": 0.1, "gamma_D": 0.3, "gamma_N": -0.1, "kappa": 0.8}
    np.testing.assert_allclose(
        laws.GROWING_ERROR.predict(by_error, runs),
        [plain + 0.1 * 2e6**0.3 * 1e5**-0.1 * 0.011543**0.8],
        rtol=1e-6,
    )
    gap = {name: TRUE[name] for name in laws.GAP.names}
    found = laws.GAP.predict(gap, runs | {"loss_full": [plain]})
    np.testing.assert_allclose(found, laws.GROWING_ONE.predict(TRUE, runs), rtol=1e-12)


def test_exponents_of_either_sign_are_found_again():
    runs = grid(noise=0.0)
    found = laws.fit(laws.GROWING_ONE, runs, bootstraps=0)
    for name, value in TRUE.items():
        assert found.params[name] == pytest.approx(value, rel=1e-3), name
    low, high = laws.profile(found, runs, "gamma_N", points=6, starts=4)
    assert low <= -0.1 + 1e-9
    assert high >= -0.1 - 1e-9


@pytest.mark.long
def test_the_law_that_made_the_runs_leads_and_neff_does_not():
    chosen = [laws.KUMAR_ONE, laws.PANFEROV, laws.ADDITIVE_ONE, laws.GROWING_ONE]
    ranked = laws.compare(chosen, grid(), held_out=("D",), groups="unit", starts=16)
    assert ranked.fits[0].law is laws.GROWING_ONE
    assert ranked.rows[1]["delta_aicc"] > 10
    assert 12 < ranked.independent < len(grid()["N"])


def test_laws_that_are_not_rejected_lie_within_a_margin_of_the_least():
    pair, few = [laws.GROWING_ERROR, laws.CHINCHILLA], {"starts": 4, "held_out": ()}
    ranked = laws.compare(pair, grid(seeds=2), groups="unit", strata="N", bootstraps=5, **few)
    assert ranked.not_rejected() == ranked.fits[:1]
    assert ranked.not_rejected(1e9) == ranked.fits
    assert len(ranked.fits[0].samples["kappa"]) == 5
    with pytest.raises(ValueError, match="margin must be a number"):
        ranked.not_rejected(-1)
    unknown = dataclasses.replace(ranked, criteria=(np.inf, np.inf), independent=4.0)
    with pytest.raises(ValueError, match=r"4\.0 independent runs are too few"):
        unknown.not_rejected()


def test_held_out_runs_worse_than_their_mean_are_a_warning():
    ranked = laws.compare([laws.GROWING_ONE], grid(seeds=1), held_out=("D",), starts=4)
    assert not ranked.warnings
    worse = dataclasses.replace(ranked, held_out=({"D": 0.9, "P_w": -7065.0},))
    assert "growing penalty, one width held out by P_w: R² = -7065.00" in worse.warnings[0]
    assert "warning: growing penalty, one width held out by P_w" in str(worse)


def test_what_has_bits_of_two_tensors_needs_no_cache():
    assert laws.GROWING_WA.columns == ("N", "D", "P_w", "P_a")
    assert laws.GROWING.columns[-1] == "P_kv"


def test_a_signed_parameter_may_be_below_zero_and_no_other():
    assert TRUE["gamma_N"] < 0
    with pytest.raises(ValueError, match="gamma of growing penalty, one width must be"):
        laws.GROWING_ONE.predict(TRUE | {"gamma": -1.0}, grid())
    with pytest.raises(ValueError, match=r"needs 0 < low"):
        laws.Parameter("x", -1.0, 1.0, (0.0, 0.5))
    assert laws.Parameter("x", -1.0, 1.0, (0.0, 0.5), is_signed=True).is_signed


# ---- the criterion


@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1e-1])
def test_the_likelihood_is_the_density_that_a_huber_fit_maximises(scale):
    """Beside an integral and a maximum of SciPy's; δ² / s from far below to far above one."""
    delta, rng = 1e-3, np.random.default_rng(0)
    residual = rng.laplace(size=50) * np.sqrt(scale)
    values = criteria.huber_values(residual, delta)

    def negative(log_s):
        s = np.exp(log_s)
        density = lambda r: np.exp(-criteria.huber_values(np.array(r), delta) / s)  # noqa: E731
        ends = [0, delta, 40 * max(np.sqrt(s), s / delta) + delta]
        whole = 2 * sum(integrate.quad(density, a, b)[0] for a, b in itertools.pairwise(ends))
        return len(residual) * np.log(whole) + values.sum() / s

    centre = np.log(values.mean())
    best = optimize.minimize_scalar(negative, bounds=(centre - 3, centre + 4), method="bounded")
    assert criteria.log_likelihood(residual, delta) == pytest.approx(-best.fun, rel=1e-4)


def test_normal_residuals_have_the_usual_criterion():
    residual = np.random.default_rng(0).normal(size=200) * 1e-6
    usual = 200 * np.log(2 * np.pi * np.mean(residual**2)) + 200 + 2 * 4 * 200 / 195
    assert criteria.aicc(residual, 3, 1e-3, 200) == pytest.approx(usual, rel=1e-4)


def test_runs_that_share_what_they_are_off_by_count_once():
    rng, place = np.random.default_rng(0), np.repeat(np.arange(40), 5)
    assert criteria.independent_runs(rng.normal(size=200), place) > 120
    half = rng.normal(size=40)[place] + rng.normal(size=200)
    assert criteria.independent_runs(half, place) == pytest.approx(200 / 3, rel=0.25)
    assert criteria.independent_runs(half, np.arange(200)) == 200


# ---- units in strata


def test_units_are_resampled_within_their_strata():
    runs = grid()
    _, place = np.unique(runs["unit"], return_inverse=True)
    layer = strata_of_units(runs, "N", place)
    assert np.bincount(layer).tolist() == [3, 3, 3, 3]
    found = laws.fit(laws.GROWING_ONE, runs, bootstraps=20, starts=8, groups="unit", strata="N")
    low, high = found.interval("gamma_D")
    assert 0.2 < low < high < 0.4


@pytest.mark.parametrize(
    ("runs", "strata", "words"),
    [
        ({"a": [1, 1, 2, 2]}, "b", "they have no 'b'"),
        ({"a": [1, 1, 1, 2]}, "a", "some lie in several"),
        ({"a": [1, 1, 2, 2]}, "a", "1 has one"),
        ({"a": [1, 1, 2]}, "a", "3 values for 4 runs"),
    ],
)
def test_bad_strata_are_named(runs, strata, words):
    with pytest.raises(ValueError, match=words):
        strata_of_units(runs, strata, np.array([0, 0, 1, 1]))


# ---- the best precision of a budget


def brute(params, flops, n=None):
    """The best bits by SciPy's minimum over N at each width."""

    def least(bits):
        def loss(log_n):
            size = np.exp(log_n)
            run = {"N": [size], "D": [flops / (6 * size * bits / 16)], "P_w": [bits]}
            return laws.GROWING_ONE.predict(params, run)[0]

        if n is not None:
            return loss(np.log(n))
        return optimize.minimize_scalar(loss, bounds=np.log([1e3, 1e13]), method="bounded").fun

    bits = np.arange(2, 16.01, 0.25)
    return bits[np.argmin([least(b) for b in bits])]


@pytest.mark.parametrize(("flops", "n"), [(1e14, None), (1e18, None), (1e14, 1e6)])
def test_it_is_the_minimum_of_the_law(flops, n):
    found = laws.precision_at_budget(laws.GROWING_ONE, TRUE, flops=flops, N=n)
    assert found.bits == pytest.approx(brute(TRUE, flops, n), abs=0.3)


def test_it_grows_with_compute_where_the_penalty_does_and_not_where_bits_cost_parameters():
    of = lambda c: laws.precision_at_budget(laws.GROWING_ONE, TRUE, flops=c).bits  # noqa: E731
    assert of(1e12) < of(1e15) < of(1e18)
    kumar = [laws.precision_at_budget(laws.KUMAR_2024, flops=c).bits for c in (1e18, 1e22)]
    always = laws.optimal_precision(laws.KUMAR_2024).bits
    np.testing.assert_allclose(kumar, always, atol=0.06)


def test_intervals_are_over_bootstraps_and_over_laws():
    fits = [
        laws.fit(law, grid(), bootstraps=20, starts=8, groups="unit")
        for law in (laws.GROWING_ONE, laws.GROWING_ERROR)
    ]
    optima = [laws.precision_at_budget(f, flops=1e14) for f in fits]
    assert optima[0].low <= optima[0].bits <= optima[0].high
    both = laws.union(optima)
    assert both.low == min(o.low for o in optima)
    assert both.high == max(o.high for o in optima)
    unknown = dataclasses.replace(optima[1], is_determined=False, note="why")
    assert str(laws.union([optima[0], unknown])) == "not determined (why)"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flops": 0}, "flops must be a number above 0"),
        ({"flops": 1e20, "N": -1}, "N must be a number above 0"),
        ({"flops": 1e20, "sizes": (10, 1)}, "sizes must be"),
        ({"flops": 1e20, "low": 9, "high": 3}, "0 < low < high"),
    ],
)
def test_bad_budgets_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        laws.precision_at_budget(laws.GROWING_ONE, TRUE, **options)
    with pytest.raises(ValueError, match="reads N, D, P_post"):
        laws.precision_at_budget(laws.KUMAR_2024_PTQ, flops=1e20)
    with pytest.raises(ValueError, match="one or more"):
        laws.union([])

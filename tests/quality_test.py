"""Paired comparison: figures per example, intervals that cover, groups, and what was asked wrongly."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from quality_twins import LABELS, QUANTIZED, REFERENCE, made, twins

from jaxquant import quality
from jaxquant.quality import comparison, intervals
from jaxquant.quality import examples as examples_module

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others


RUNS = 400


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_per_example_figures(scale):
    reference, quantized, labels = twins()
    reference, quantized = reference * scale, quantized * scale
    found = quality.per_example(reference, quantized, labels)
    log_p, log_q = (scipy.special.log_softmax(x.astype(float), -1) for x in (reference, quantized))
    p, q, rows = np.exp(log_p), np.exp(log_q), np.arange(len(labels))
    one_hot = np.eye(7)[labels]
    expected = {
        "nll": -log_q[rows, labels],
        "reference_nll": -log_p[rows, labels],
        "kl": np.sum(np.where(p > 0, p * (log_p - log_q), 0), -1),
        "brier": np.sum((q - one_hot) ** 2, -1),
        "reference_brier": np.sum((p - one_hot) ** 2, -1),
        "confidence": q.max(-1),
        "reference_confidence": p.max(-1),
        "margin": np.sort(reference, -1)[:, -1] - np.sort(reference, -1)[:, -2],
        "variance": [np.cov(a, aweights=w, ddof=0) for a, w in zip(log_p, p, strict=True)],
        "covariance": [
            np.cov(a, b, aweights=w, ddof=0)[0, 1] for a, b, w in zip(log_p, log_q, p, strict=True)
        ],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(
            getattr(found, name), values, rtol=2e-4, atol=2e-6 * scale, err_msg=name
        )
    np.testing.assert_array_equal(found.prediction, quantized.argmax(-1))
    np.testing.assert_array_equal(found.reference_prediction, reference.argmax(-1))


def test_divergences_below_the_rounding_of_a_logit_are_right():
    reference, quantized, labels = twins(classes=2000, noise=1e-3)
    found = quality.per_example(reference, quantized, labels).kl
    p, q = (scipy.special.softmax(x.astype(float), -1) for x in (reference, quantized))
    np.testing.assert_allclose(found, scipy.special.rel_entr(p, q).sum(-1), rtol=0.01)
    assert quality.per_example(reference, reference, labels).kl.max() == 0


def test_chunks_batches_and_dtypes_give_the_same(monkeypatch):
    reference, quantized, labels = twins()
    whole = quality.per_example(reference, quantized, labels)
    monkeypatch.setattr(examples_module, "_CHUNK", 7 * 64)  # 300 = 4·64 + 44
    chunked = quality.per_example(jnp.asarray(reference), quantized, labels)
    parts = [slice(0, 100), slice(100, 101), slice(101, 300)]
    joined = quality.Examples.concatenate(
        [quality.per_example(reference[s], quantized[s], labels[s]) for s in parts]
    )
    for other in (chunked, joined):
        for field in dataclasses.fields(whole):
            a, b = getattr(whole, field.name), getattr(other, field.name)
            if isinstance(a, np.ndarray):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=field.name)
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (reference, quantized)]
    wide = [np.asarray(x, np.float32) for x in halves]
    np.testing.assert_allclose(
        quality.per_example(*halves, labels).kl, quality.per_example(*wide, labels).kl
    )


def test_what_is_masked_does_not_count():
    reference, quantized, labels = (x.reshape(30, 10, *x.shape[1:]) for x in twins())
    mask = np.random.default_rng(0).random(labels.shape) < 0.7
    dirty, padded = reference.copy(), np.where(mask, labels, -100)
    dirty[~mask] = np.nan
    clusters = np.repeat(np.arange(30)[:, None], 10, 1)
    found = quality.compare(dirty, quantized, padded, clusters % 3, mask=mask)
    kept = quality.compare(
        reference[mask], quantized[mask], labels[mask], clusters[mask] % 3, clusters=clusters[mask]
    )
    jax.tree.map(  # sums over other shapes may round otherwise
        lambda a, b: a == b if isinstance(a, str) else np.testing.assert_allclose(a, b, 1e-4, 1e-6),
        found.to_dict(),
        kept.to_dict(),
    )
    assert found.n == mask.sum()
    assert found.n_clusters == 30


def test_windows_of_different_batches_stay_apart_and_documents_do_not():
    reference, quantized, labels = (x.reshape(30, 10, *x.shape[1:]) for x in twins())
    part = quality.per_example(reference, quantized, labels)
    assert quality.summarize(quality.Examples.concatenate([part, part])).n_clusters == 60
    document = np.full(labels.shape, 10**15)  # any integers do
    named = quality.per_example(reference, quantized, labels, clusters=document)
    assert quality.summarize(quality.Examples.concatenate([named, named])).n_clusters == 1
    with pytest.raises(ValueError, match="parts differ"):
        quality.Examples.concatenate([part, named])


def test_binomial_and_mcnemar_against_scipy():
    for k, n in ((0, 0), (0, 5), (5, 5), (30, 40), (1020, 2000)):
        assert intervals.sign_tail(k, n) == pytest.approx(scipy.stats.binom.sf(k - 1, n, 0.5))
    for b, c in ((3, 1), (0, 24), (12, 12), (7, 7), (0, 0)):
        expected = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0
        assert intervals.mcnemar(b, c)[1:] == (pytest.approx(expected), b + c < 25)
    for b, c in ((13, 12), (40, 10), (100, 180)):
        chi2 = (abs(b - c) - 1) ** 2 / (b + c)
        expected = (pytest.approx(chi2), pytest.approx(scipy.stats.chi2.sf(chi2, 1)), False)
        assert intervals.mcnemar(b, c) == expected


def test_a_loss_over_clusters_is_tested_with_students_t():
    for degrees in (2, 3, 10, 57, 200, 201, 5000):
        clusters = np.arange(degrees - 1)
        some = np.zeros(len(clusters))
        for t in (-1.0, 0.0, 0.3, 1.7, 4.0, 9.0):
            change = intervals.Interval(-2 * t, 2.0, -2 * t - 3, -2 * t + 3)
            found = comparison._loss_p_value(some, some, clusters, change)
            assert found == pytest.approx(scipy.stats.t.sf(t, degrees), rel=1e-9)


def test_intervals_of_independent_examples_against_scipy():
    values = np.random.default_rng(0).normal(size=25)
    found = intervals.mean_interval(values, None, 0.9)
    expected = scipy.stats.t.interval(0.9, 24, values.mean(), scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    for k, n in ((0, 50), (7, 50), (50, 50)):
        found = intervals.proportion(np.repeat([1.0, 0.0], [k, n - k]), None, 0.9)
        wilson = scipy.stats.binomtest(k, n).proportion_ci(0.9, "wilson")
        assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=1e-12)
    after, before = np.repeat([[1, 1], [0, 1], [1, 0], [0, 0]], [40, 9, 4, 7], axis=0).T
    found = intervals.paired_difference(after, before, None, 0.9)
    lost, gained = 10 / 62, 5 / 62  # Bonett & Price: one of each added, of n + 2
    variance = (lost + gained - (gained - lost) ** 2) / 61
    middle, half = gained - lost, scipy.stats.t.ppf(0.95, 61) * np.sqrt(variance)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half))
    assert found.estimate == pytest.approx(-5 / 60)


def test_a_clustered_error_is_that_of_cluster_means_and_of_copies():
    rng = np.random.default_rng(0)
    values, ids = rng.normal(size=(20, 30)), np.repeat(np.arange(20), 30)
    found = intervals.mean_interval(values.ravel(), ids, 0.9)
    assert found.se == pytest.approx(scipy.stats.sem(values.mean(1)))
    single = rng.normal(size=40) + 3
    copied, ids = np.repeat(single, 8), np.repeat(np.arange(40), 8)
    once = intervals.mean_interval(single, None, 0.9)
    assert dataclasses.astuple(intervals.mean_interval(copied, ids, 0.9)) == pytest.approx(
        dataclasses.astuple(once)
    )
    ratio = intervals.ratio_interval(copied, copied**2, ids, 0.9)
    once = intervals.ratio_interval(single, single**2, None, 0.9)
    assert dataclasses.astuple(ratio) == pytest.approx(dataclasses.astuple(once))


def test_holm_rejects_as_its_definition_says():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = list(rng.random(6) ** 3)
        for alpha in (0.01, 0.05, 0.3):
            rejected, rest = set(), sorted(range(6), key=p.__getitem__)
            while rest and p[rest[0]] * len(rest) <= alpha:
                rejected.add(rest.pop(0))
            adjusted = intervals.holm(p)
            assert {i for i in range(6) if adjusted[i] <= alpha} == rejected


TRUTH = {
    "accuracy_difference": -0.02,
    "retained_accuracy": 0.84 / 0.86,
    "agreement": 0.87,
    "log_perplexity_ratio": 0.05,
    "kl.mean": 0.25,
    "kl.p99": scipy.stats.gamma(0.5, scale=0.5).ppf(0.99),
    "logit_gain": 1.02,
}


def sampled_report(rng, windows, tokens, correlation, clustered):
    """One data set drawn from the law that has the figures of TRUTH, windows by a Gaussian copula."""

    def uniform():
        shared, own = rng.normal(size=(windows, 1)), rng.normal(size=(windows, tokens))
        mixed = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
        return scipy.special.ndtr(mixed).ravel()

    # Lost 0.06, both wrong otherwise 0.03, both wrong alike 0.07, both right 0.80, gained 0.04.
    cell = np.searchsorted(np.cumsum([0.06, 0.03, 0.07, 0.80]), uniform())
    kl = scipy.special.gammaincinv(0.5, uniform()) * 0.5
    nll = 0.05 + 0.3 * (np.exp(0.5 * scipy.special.ndtri(uniform())) - np.exp(0.125))
    variance = -np.log(uniform())
    ids = np.repeat(np.arange(windows), tokens) if clustered else None
    drawn = made(
        cell > 2, np.isin(cell, (0, 3)), same=np.isin(cell, (2, 3)), nll=nll, kl=kl, clusters=ids
    )
    gain = 1.02 + 0.4 * scipy.special.ndtri(uniform())
    drawn = dataclasses.replace(drawn, variance=variance, covariance=gain * variance)
    return quality.summarize(drawn)


def coverage(windows, tokens, correlation, clustered, runs):
    rng = np.random.default_rng(1)
    covered = dict.fromkeys(TRUTH, 0)
    for _ in range(runs):
        report = sampled_report(rng, windows, tokens, correlation, clustered)
        for name, truth in TRUTH.items():
            interval = report
            for part in name.split("."):
                interval = getattr(interval, part)
            covered[name] += interval.low <= truth <= interval.high
    return {name: count / runs for name, count in covered.items()}


def test_intervals_cover_as_often_as_they_say():
    covered = coverage(1000, 1, 0.0, clustered=False, runs=1000)
    assert all(0.86 < share < 0.94 for share in covered.values()), covered


def test_clustered_intervals_cover_correlated_tokens_and_others_do_not():
    covered = coverage(60, 30, 0.3, clustered=True, runs=800)
    assert all(0.85 < share < 0.95 for share in covered.values()), covered
    naive = coverage(60, 30, 0.3, clustered=False, runs=200)
    assert all(share < 0.75 for name, share in naive.items() if name != "kl.p99"), naive


@pytest.mark.parametrize("clustered", [False, True])
def test_looking_at_many_groups_raises_no_more_false_alarms_than_at_one(clustered):
    rng, alarms, missed = np.random.default_rng(2), 0, 0
    groups, windows = np.tile(np.repeat(np.arange(12), 10), 20), np.repeat(np.arange(20), 120)
    for _ in range(RUNS):
        shift = rng.normal(size=(20, 1)) * 0.15 if clustered else 0.0
        lost, gained = (rng.random((20, 120)) < 0.1 + sign * shift for sign in (1, -1))
        before = rng.random(2400) < 0.5
        flip = np.where(before, lost.ravel(), gained.ravel())
        ids = windows if clustered else None
        report = quality.summarize(made(before ^ flip, before, groups=groups, clusters=ids))
        alarms += bool(report.regressions)
        missed += any(not g.change.low <= 0 <= g.change.high for g in report.groups)
    assert alarms / RUNS <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / RUNS)
    assert missed / RUNS <= 0.1 + 2.5 * np.sqrt(0.1 * 0.9 / RUNS)


def test_a_silent_regression_is_found_and_named():
    rng = np.random.default_rng(3)
    groups = np.repeat(["a", "b", "c", "d"], [200, 1000, 1000, 1000])
    before = rng.random(3200) < 0.8
    correct = before.copy()
    correct[np.flatnonzero(before & (groups == "a"))[:50]] = False
    correct[np.flatnonzero(~before & (groups != "a"))[:60]] = True
    report = quality.summarize(made(correct, before), groups)
    assert [group.name for group in report.silent_regressions] == ["a"]
    assert report.worst_group is report.groups[0]
    assert report.worst_group.change.high < -0.1
    verdict = quality.gate(report, "99")
    assert verdict.status == "fail"
    reason = next(c.reason for c in verdict.checks if c.name == "worst group")
    assert "group a changed by -0.25" in reason
    assert "overall accuracy does not show it" in reason
    assert "silent regressions, not seen overall: a" in str(report)


def test_report_against_counts():
    reference, quantized, labels = twins(2000, noise=0.8)
    report = quality.compare(reference, quantized, labels)
    a, b = quantized.argmax(-1) == labels, reference.argmax(-1) == labels
    lost, gained = np.sum(b & ~a), np.sum(a & ~b)
    assert (report.flips.lost, report.flips.gained) == (lost, gained)
    assert report.flips.rate == (lost + gained) / 2000
    assert report.accuracy_difference.estimate == pytest.approx(a.mean() - b.mean())
    assert report.retained_accuracy is not None
    assert report.retained_accuracy.estimate == pytest.approx(a.mean() / b.mean())
    nll = [-scipy.special.log_softmax(x, -1)[np.arange(2000), labels].mean() for x in
           (quantized, reference)]  # fmt: skip
    assert report.relative_perplexity == pytest.approx(np.exp(nll[0] - nll[1]), rel=1e-5)
    for group in report.groups:
        rows = labels == int(group.name)
        assert (group.n, group.accuracy) == (rows.sum(), pytest.approx(a[rows].mean()))
    changes = [group.change.estimate for group in report.groups]
    assert changes == sorted(changes)
    margins = report.margins
    assert (sum(m.n for m in margins), sum(m.lost for m in margins)) == (2000, lost)
    assert sum(m.changed for m in margins) == 2000 - round(2000 * report.agreement.estimate)
    assert margins[0].changed / margins[0].n > 3 * margins[-1].changed / margins[-1].n


def test_calibration_error_against_a_loop():
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.random(500), [0.0, 1 / 15, 0.2, 1.0]])
    correct = (rng.random(504) < confidence**2).astype(float)
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        inside |= (low == 0) & (confidence == 0)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert comparison.calibration_error(confidence, correct) == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 2, 400])
def test_reports_are_json_and_text_at_any_size(n):
    reference, quantized, labels = twins(n)
    baseline = quality.compare(reference, quantized, labels)
    for report in (baseline, quality.compare(reference, reference, labels)):
        verdict = quality.gate(report, "99", baseline=baseline)
        for thing in (report, verdict):
            assert json.loads(json.dumps(thing.to_dict(), allow_nan=False))
            assert "nan" not in str(thing)
        if n < 3:
            assert verdict.status == "inconclusive"


def test_tokens_are_no_groups_unless_asked_for():
    reference, quantized, labels = twins(50, classes=1200)
    assert quality.compare(reference, quantized, labels).groups == ()
    assert len(quality.compare(reference, quantized, labels, labels % 2).groups) == 2


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((REFERENCE, QUANTIZED[:4], LABELS), {}, r"one shape; got \(8, 7\) .* \(4, 7\)"),
        ((REFERENCE, QUANTIZED, LABELS[:4]), {}, r"labels are integers of shape \(8,\)"),
        ((REFERENCE, QUANTIZED, LABELS * 1.0), {}, "labels are integers .* float64"),
        ((REFERENCE, QUANTIZED, LABELS + 7), {}, "labels are from 0 to 6; got 7"),
        ((REFERENCE, QUANTIZED, LABELS - 9), {}, "labels are from 0 to 6; got -9"),
        ((REFERENCE, QUANTIZED * np.nan, LABELS), {}, r"logits are finite; .* 8 of 8 .* \(0,\)"),
        ((REFERENCE * np.inf, QUANTIZED, LABELS), {}, "reference_logits are finite"),
        ((REFERENCE.astype(int), QUANTIZED, LABELS), {}, "reference_logits are a floating array"),
        ((REFERENCE[:, :1], QUANTIZED[:, :1], LABELS * 0), {}, "two classes or more"),
        ((REFERENCE[:0], QUANTIZED[:0], LABELS[:0]), {}, "no examples"),
        ((REFERENCE, QUANTIZED, LABELS), {"mask": np.zeros(8, bool)}, "no examples"),
        ((REFERENCE, QUANTIZED, LABELS), {"mask": np.ones(8)}, "mask is boolean; got float64"),
        ((REFERENCE, QUANTIZED, LABELS), {"groups": ["a"]}, r"groups have .* \(8,\).* got \(1,\)"),
        ((REFERENCE, QUANTIZED, LABELS), {"clusters": LABELS / 2}, "clusters are integers"),
        (
            (REFERENCE, QUANTIZED, LABELS),
            {"confidence_level": 90},
            "confidence_level is between 0 and 1",
        ),
        (
            (REFERENCE, QUANTIZED, LABELS),
            {"confidence_level": "a"},
            "confidence_level is between 0 and 1, .*got 'a'",
        ),
        (
            (REFERENCE, QUANTIZED, LABELS),
            {"confidence_level": None},
            "confidence_level is between 0 and 1, .*got None",
        ),
        ((REFERENCE, QUANTIZED, LABELS), {"groups": ["a", None] * 4}, "one kind .*NoneType, str"),
        (
            (REFERENCE, QUANTIZED, [[0], [0, 1]]),
            {},
            r"labels are an array; got \[\[0\], \[0, 1\]\]",
        ),
    ],
)
def test_misuse_of_compare(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        quality.compare(*arguments, **options)

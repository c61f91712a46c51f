"""Embeddings beside their twins', and beside people's judgements."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.special
import scipy.stats
from quality_twins import QUANTIZED, REFERENCE, encoded

from jaxquant import quality
from jaxquant.quality import embeddings, intervals

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others


def test_embeddings_against_scipy():
    reference, quantized, rows, scores = encoded()
    found = quality.compare_embeddings(reference, quantized, rows, scores)

    def similarity(e):
        return np.array([1 - scipy.spatial.distance.cosine(e[i], e[j]) for i, j in rows])

    twin = [scipy.spatial.distance.cosine(a, b) for a, b in zip(reference, quantized, strict=True)]
    assert found.distance.estimate == pytest.approx(np.mean(twin))
    assert found.distance_max == pytest.approx(np.max(twin))
    before, after = similarity(reference), similarity(quantized)
    assert found.pairs.absolute_max == pytest.approx(np.abs(after - before).max())
    judged = found.judgments
    assert judged.reference_spearman == pytest.approx(scipy.stats.spearmanr(before, scores)[0])
    assert judged.spearman == pytest.approx(scipy.stats.spearmanr(after, scores)[0])
    assert judged.pearson == pytest.approx(scipy.stats.pearsonr(after, scores)[0])
    assert judged.spearman_difference.estimate == pytest.approx(
        judged.spearman - judged.reference_spearman
    )
    assert found == quality.compare_embeddings(reference, quantized, rows, scores)
    assert json.dumps(found.to_dict(), allow_nan=False)
    assert "Spearman" in str(found)


@pytest.mark.long
def test_the_bootstrap_covers():
    def spearman_difference(n, seed):
        rng = np.random.default_rng(seed)
        truth = rng.normal(size=n)
        a = truth + 0.7 * rng.normal(size=n)
        return np.stack([truth, a, a + 0.5 * rng.normal(size=n)])

    truth = np.diff(embeddings._correlations(spearman_difference(300_000, 0))[:, 1])[0]
    covered, apart = 0, np.arange(300).reshape(150, 2)
    for seed in range(1, 101):
        columns = spearman_difference(150, seed)
        found = embeddings._judgments(columns[1], columns[2], columns[0], apart, 0.9, 150, seed)
        covered += found.spearman_difference.low <= truth <= found.spearman_difference.high
    assert 0.83 < covered / 100 < 0.96


MATCHING = np.arange(120).reshape(60, 2)
COMPLETE = np.array([(i, j) for i in range(30) for j in range(i)])
GRID = np.array([(i, 6 + j) for i in range(6) for j in range(30)])  # queries and documents
CHAIN = np.array([(i, i + 1) for i in range(80)])
TWICE = np.concatenate([MATCHING, MATCHING[:, ::-1]])


@pytest.mark.parametrize("pairs", [MATCHING, COMPLETE, GRID, CHAIN, TWICE])
def test_the_interval_over_pairs_covers(pairs):
    """Each pair's value is what its items bring, and a little of its own; the mean is 0."""
    rng, covered, repeats = np.random.default_rng(0), 0, 400
    for _ in range(repeats):
        brought = rng.normal(size=pairs.max() + 1)
        own = rng.normal(size=pairs.max() ** 2 + 2 * pairs.max() + 2)
        values = brought[pairs].sum(axis=1) + 0.3 * own[pairs.min(axis=1) + pairs.max(axis=1) ** 2]
        found = intervals.pairs_interval(values, pairs, 0.9)
        covered += found.low <= 0 <= found.high
    assert 0.85 < covered / repeats < 0.95, covered / repeats


def test_pairs_that_share_nothing_are_independent_and_one_item_in_all_bounds_nothing():
    values = np.random.default_rng(0).normal(size=60)
    found = intervals.pairs_interval(values, MATCHING, 0.9)
    expected = intervals.mean_interval(values, None, 0.9)
    np.testing.assert_allclose(dataclasses.astuple(found), dataclasses.astuple(expected))
    for items in (np.stack([np.zeros(60, int), np.arange(1, 61)], 1), np.zeros((60, 2), int)):
        found = intervals.pairs_interval(values, items, 0.9)
        assert (found.low, found.high) == (-np.inf, np.inf)


def test_texts_that_come_again_are_one():
    """In rows of their own, as in a file of pairs of sentences: what is said twice is not known better."""
    reference, quantized, rows, scores = encoded(n=60, pairs=150)
    apart = rows.ravel()
    by_row = quality.compare_embeddings(reference, quantized, rows, scores)
    again = quality.compare_embeddings(
        reference[apart], quantized[apart], np.arange(300).reshape(150, 2), scores
    )
    assert again.pairs == by_row.pairs
    assert again.judgments == by_row.judgments
    twice = quality.compare_embeddings(np.tile(reference, (9, 1)), np.tile(quantized, (9, 1)))
    once = quality.compare_embeddings(reference, quantized)
    assert twice.distance.se == pytest.approx(once.distance.se)
    assert twice.norm_ratio.se == pytest.approx(once.norm_ratio.se)


@pytest.mark.parametrize("ranked", [False, True])
def test_influences_are_what_leaving_a_pair_out_changes(ranked):
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(3, 3000))
    columns[1:] += columns[0]
    columns[0] = np.round(2 * columns[0])  # ties
    added = embeddings._influences(columns, ranked)
    whole = embeddings._correlations(columns)[:, int(ranked)]
    for i in range(0, 3000, 100):
        without = embeddings._correlations(np.delete(columns, i, axis=1))[:, int(ranked)]
        np.testing.assert_allclose(2999 * (whole - without), added[:, i], atol=0.02)


@pytest.mark.long
@pytest.mark.parametrize("which", ["pearson_difference", "spearman_difference"])
def test_the_interval_of_a_correlation_covers_where_pairs_share_texts(which):
    """Every text among 40 with every other; the truth is that of as many texts as can be had."""

    def judged(n, seed):
        rng = np.random.default_rng(seed)
        a = rng.normal(size=(n, 3)) + rng.normal(size=(n, 1))
        b = a + 0.6 * rng.normal(size=a.shape)
        rows = np.array([(i, j) for i in range(n) for j in range(i)])
        before, after = (np.sum(e[rows[:, 0]] * e[rows[:, 1]], axis=1) for e in (a, b))
        scores = before + 0.5 * rng.normal(size=len(rows))
        return embeddings._judgments(before, after, scores, rows, 0.9, 100, 0)

    truth = np.mean([getattr(judged(400, 1000 + i), which).estimate for i in range(10)])
    found = [getattr(judged(40, i), which) for i in range(300)]
    covered = np.mean([x.low <= truth <= x.high for x in found])
    assert 0.82 < covered < 0.97, covered


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((REFERENCE, QUANTIZED[:4]), {}, "one shape"),
        ((REFERENCE * 0, QUANTIZED), {}, "not zero; 8 rows are not, the first row 0"),
        ((REFERENCE, QUANTIZED * np.nan), {}, "embeddings are finite"),
        ((REFERENCE, QUANTIZED, [[0, 9]]), {}, "from 0 to 7"),
        ((REFERENCE, QUANTIZED, [0, 1]), {}, r"shape \[pairs, 2\]"),
        ((REFERENCE, QUANTIZED, None, [1.0]), {}, "give pairs too"),
        ((REFERENCE, QUANTIZED, [[0, 1]], [1.0, 2.0]), {}, "one for each of 1 pairs"),
        ((REFERENCE, QUANTIZED, [[0, 1]] * 4, [1.0] * 4), {}, "not all alike"),
        ((REFERENCE, QUANTIZED, [["a", "b"]]), {}, "pairs are integer rows from 0 to 7; got <U1"),
        ((REFERENCE, QUANTIZED, [[0, 1]], ["good"]), {}, "scores are an array of float; got"),
        (
            (REFERENCE, QUANTIZED),
            {"confidence_level": "a"},
            "confidence_level is between 0 and 1, .*got 'a'",
        ),
        ((REFERENCE, QUANTIZED), {"resamples": 0}, "resamples .* at least 100; got 0"),
        ((REFERENCE, QUANTIZED), {"resamples": 200.5}, "resamples .* at least 100; got 200.5"),
        ((REFERENCE, QUANTIZED), {"seed": "a"}, "seed of the bootstrap .* at least 0; got 'a'"),
    ],
)
def test_misuse_of_embeddings(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        quality.compare_embeddings(*arguments, **options)

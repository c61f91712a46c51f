"""Embeddings beside their twins', and beside people's judgements."""

import json

import numpy as np
import pytest
import scipy.special
import scipy.stats
from quality_twins import QUANTIZED, REFERENCE, encoded

from jaxquant import quality
from jaxquant.quality import embeddings

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


def test_the_bootstrap_covers():
    def spearman_difference(n, seed):
        rng = np.random.default_rng(seed)
        truth = rng.normal(size=n)
        a = truth + 0.7 * rng.normal(size=n)
        return np.stack([truth, a, a + 0.5 * rng.normal(size=n)])

    truth = np.diff(embeddings._correlations(spearman_difference(300_000, 0))[:, 1])[0]
    covered = 0
    for seed in range(1, 101):
        columns = spearman_difference(150, seed)
        found = embeddings._judgments(columns[1], columns[2], columns[0], 0.9, 150, seed)
        covered += found.spearman_difference.low <= truth <= found.spearman_difference.high
    assert 0.83 < covered / 100 < 0.96


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((REFERENCE, QUANTIZED[:4]), {}, "one shape"),
        ((REFERENCE * 0, QUANTIZED), {}, "not zero; 8 are"),
        ((REFERENCE, QUANTIZED * np.nan), {}, "embeddings are finite"),
        ((REFERENCE, QUANTIZED, [[0, 9]]), {}, "from 0 to 7"),
        ((REFERENCE, QUANTIZED, [0, 1]), {}, r"shape \[pairs, 2\]"),
        ((REFERENCE, QUANTIZED, None, [1.0]), {}, "give pairs too"),
        ((REFERENCE, QUANTIZED, [[0, 1]], [1.0, 2.0]), {}, "one for each of 1 pairs"),
        ((REFERENCE, QUANTIZED, [[0, 1]] * 4, [1.0] * 4), {}, "not all alike"),
        ((REFERENCE, QUANTIZED, [["a", "b"]]), {}, "pairs are integer rows from 0 to 7; got <U1"),
        ((REFERENCE, QUANTIZED, [[0, 1]], ["good"]), {}, "scores are an array of float; got"),
        ((REFERENCE, QUANTIZED), {"level": "a"}, "level is between 0 and 1, .*got 'a'"),
        ((REFERENCE, QUANTIZED), {"resamples": 0}, "resamples .* from 100; got 0"),
        ((REFERENCE, QUANTIZED), {"resamples": 200.5}, "resamples .* from 100; got 200.5"),
        ((REFERENCE, QUANTIZED), {"seed": "a"}, "seed of the bootstrap .* from 0; got 'a'"),
    ],
)
def test_misuse_of_embeddings(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        quality.compare_embeddings(*arguments, **options)

"""Confidence levels against scipy's distributions, and old names of keywords and fields."""

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.stats

from jaxquant import laws, quality
from jaxquant.laws.intervals import expanded
from jaxquant.stats import critical, percentile_interval, renamed


@pytest.mark.parametrize("level", [1e-3, 0.5, 0.9, 0.9999, 1 - 1e-9])
def test_critical_values_are_students_and_the_normals(level):
    for degrees in (1, 2, 3, 10, 57, 200, 201, 5000):
        expected = scipy.stats.t.isf((1 - level) / 2, degrees)
        assert critical(level, degrees) == pytest.approx(expected, rel=1e-9)
    assert critical(level) == pytest.approx(scipy.stats.norm.isf((1 - level) / 2), rel=1e-9)
    assert critical(level, 0) == math.inf
    assert critical(level, 3.7) == critical(level, 3)


def test_a_percentile_interval_is_central_and_nan_without_samples():
    samples = np.random.default_rng(0).permutation(np.arange(1001.0))
    assert percentile_interval(samples, 0.9) == pytest.approx((50, 950))
    assert np.isnan(percentile_interval(np.empty(0), 0.9)).all()


@pytest.mark.parametrize("level", [0, 1, 90, -0.1, math.nan, "a", None, True])
def test_a_level_outside_is_named(level: Any):
    for take in (
        lambda: percentile_interval(np.arange(3.0), level),
        lambda: expanded(level, 10, 10, 3),
    ):
        with pytest.raises(ValueError, match=f"confidence_level is between .*; got {level!r}"):
            take()


def test_an_expanded_level_makes_a_normal_interval_students():
    for level in (0.5, 0.9, 0.99):
        wide = scipy.stats.t.ppf((1 + level) / 2, 19) * math.sqrt(20 / 19 * 39 / 35)
        expected = 2 * scipy.stats.norm.cdf(wide) - 1
        assert expanded(level, 20, 40, 5) == pytest.approx(expected, rel=1e-12)
    assert expanded(1 - 1e-12, 20, 40, 5) == 1 - 1e-9


LOGITS = np.eye(4, dtype=np.float32)
EXAMPLES = quality.per_example(LOGITS, LOGITS, np.arange(4))


def fitted(**options: Any) -> laws.Fit:
    rng = np.random.default_rng(0)
    runs = {"N": 10 ** rng.uniform(7, 9, 30), "D": 10 ** rng.uniform(9, 11, 30)}
    params = {"A": 400.0, "alpha": 0.35, "B": 900.0, "beta": 0.3, "E": 1.7}
    runs["loss"] = laws.CHINCHILLA.predict(params, runs)
    return laws.fit(laws.CHINCHILLA, runs, bootstraps=0, starts=4, **options)


@pytest.mark.parametrize(
    ("call", "old"),
    [
        (lambda **o: quality.compare(LOGITS, LOGITS, np.arange(4), **o), "level"),
        (lambda **o: quality.summarize(EXAMPLES, **o), "level"),
        (lambda **o: quality.compare_embeddings(LOGITS, LOGITS, **o), "level"),
        (fitted, "confidence"),
    ],
    ids=["compare", "summarize", "compare_embeddings", "fit"],
)
def test_an_old_name_stays_for_one_release_with_a_warning(call, old):
    said = rf"^{old} is now confidence_level; the old name goes with the next release"
    with pytest.warns(DeprecationWarning, match=said) as seen:
        found = call(**{old: 0.8})
    assert seen[0].filename == __file__
    assert found.confidence_level == call(confidence_level=0.8).confidence_level == 0.8
    with pytest.warns(DeprecationWarning, match=said) as seen:
        assert getattr(found, old) == 0.8
    assert seen[0].filename == __file__
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    fields[old] = fields.pop("confidence_level")
    with pytest.warns(DeprecationWarning, match=said):
        assert type(found)(**fields).confidence_level == 0.8
    with pytest.raises(ValueError, match=f"{old} is confidence_level now; give one of them"):
        call(**{old: 0.8, "confidence_level": 0.8})


def test_methods_of_a_fit_and_questions_to_it_know_the_old_name():
    found: Any = fitted()
    for call in (
        lambda **o: found.expanded(**o),
        lambda **o: found.interval("alpha", **o),
        lambda **o: laws.optimal_precision(laws.KUMAR_2024, **o).bits,
    ):
        with pytest.warns(DeprecationWarning, match="confidence is now confidence_level"):
            old = call(confidence=0.8)
        np.testing.assert_equal(old, call(confidence_level=0.8))
    assert found.expanded(0.8) == found.expanded(confidence_level=0.8)


def test_what_is_renamed_keeps_its_name_and_warns_of_nothing_else():
    @renamed("old", "new")
    def take(x: int, *, new: int = 1) -> int:
        """What it takes."""
        return x + new

    assert take.__name__ == "take"
    assert take.__doc__ == "What it takes."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (take(1), take(1, new=2)) == (2, 3)
    wrong: Any = {"odd": 2}
    with pytest.raises(TypeError, match="odd"):
        take(1, **wrong)

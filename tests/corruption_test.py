"""Corruption errors against a reference's."""

import pytest

from jaxquant import quality

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others


def test_corruption_error():
    errors = {"fog": [0.2, 0.3, 0.7], "snow": [0.1, 0.1, 0.1]}
    reference = {"fog": [0.1, 0.2, 0.3], "snow": [0.2, 0.2, 0.2]}
    found = quality.corruption_error(errors, reference, clean=0.05, reference_clean=0.1)
    assert found.by_corruption == pytest.approx({"fog": 2.0, "snow": 0.5})
    assert found.mean == pytest.approx(1.25)
    assert found.relative == pytest.approx((1.05 / 0.3 + 0.15 / 0.3) / 2)
    assert "fog" in str(found).splitlines()[1]
    assert quality.corruption_error(reference, reference).mean == pytest.approx(1)


@pytest.mark.parametrize(
    ("errors", "reference", "clean", "message"),
    [
        ({}, {}, {}, "at least one"),
        ({"fog": [0.1]}, {"snow": [0.1]}, {}, r"\['fog'\] and \['snow'\]"),
        ({"fog": [0.1]}, {"fog": [0.1, 0.2]}, {}, "one error per severity"),
        ({"fog": [float("nan")]}, {"fog": [0.1]}, {}, "finite and not negative"),
        ({"fog": [0.1]}, {"fog": [0.0]}, {}, "more than zero"),
        ([0.1], {"fog": [0.1]}, {}, r"errors are a dictionary by corruption; got \[0.1\]"),
        ({"fog": [0.1], 1: [0.1]}, {"fog": [0.1]}, {}, r"\[1, 'fog'\] and \['fog'\]"),
        ({"fog": "much"}, {"fog": [0.1]}, {}, "errors of 'fog' are an array of float; got 'much'"),
        ({"fog": [0.1]}, {"fog": [0.1]}, {"clean": 0.1}, "both models or of neither"),
        ({"fog": [0.1]}, {"fog": [0.1]}, {"clean": 0.1, "reference_clean": 0.1}, "'fog' sum to 0"),
    ],
)
def test_misuse_of_corruption_error(errors, reference, clean, message):
    with pytest.raises(ValueError, match=message):
        quality.corruption_error(errors, reference, **clean)

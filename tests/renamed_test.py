"""Old public names outside of `jaxquant.optim`, which work for one release with a warning."""

import warnings

import pytest

import jaxquant as jq

RENAMED = [
    (jq.calibration, "sees_all", "propagates_nonfinite"),
    (jq.estimators, "Laid", "GridTensor"),
    (jq.rounding, "mixed", "mix_bits"),
    (jq.specification, "describe_operation", "to_config"),
    (jq.specification, "operation_from", "from_config"),
]


@pytest.mark.parametrize(("module", "old", "new"), RENAMED, ids=[old for _, old, _ in RENAMED])
def test_an_old_name_is_the_new_object_with_a_warning(module, old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}") as found:
        assert getattr(module, old) is getattr(module, new)
    assert found[0].filename == __file__
    assert old not in vars(module)


def test_new_names_do_not_warn_and_unknown_names_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(hasattr(module, new) for module, _, new in RENAMED)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jq.calibration.nothing

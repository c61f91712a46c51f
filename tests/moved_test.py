"""Old names of modules, which stay for one release with a warning."""

import importlib
import sys

import pytest

import jaxquant
from jaxquant import moved


@pytest.mark.parametrize("name", moved.PLACES)
def test_a_module_is_found_by_its_old_name_with_a_warning(name):
    new = importlib.import_module(moved.PLACES[name])
    sys.modules.pop(f"jaxquant.{name}", None)
    with pytest.warns(DeprecationWarning, match=f"jaxquant.{name} is now {moved.PLACES[name]}"):
        old = importlib.import_module(f"jaxquant.{name}")
    public = [x for x in vars(new) if not x.startswith("_")]
    assert all(getattr(old, x) is getattr(new, x) for x in public)
    del sys.modules[f"jaxquant.{name}"]


def test_an_attribute_is_found_by_its_old_name_and_others_are_not():
    vars(jaxquant).pop("recipes", None)
    with pytest.warns(DeprecationWarning, match="recipes is now"):
        assert jaxquant.recipes.recipe is jaxquant.recipe
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jaxquant.nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("jaxquant.nothing")

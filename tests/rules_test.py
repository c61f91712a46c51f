import pytest

import jaxquant as jq
from jaxquant.rules import assign

PATHS = ["embed", "blocks/0/up", "blocks/0/down", "head"]


def test_the_first_match_counts_and_the_rest_stay():
    found = assign(PATHS, [("blocks/.*/down", "w8a8"), ("blocks/.*", "w4a16")])
    assert found == {"blocks/0/up": jq.recipe("w4a16"), "blocks/0/down": jq.recipe("w8a8")}


def test_rules_match_whole_paths_and_none_leaves_in_float():
    with pytest.raises(ValueError, match=r"'blocks' is unused.*the paths are embed"):
        assign(PATHS, {"blocks": "w8a8"})
    assert assign(PATHS, {"head": None, ".*": "w8a8"})["head"] is None


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "empty"),
        (None, "mapping or pairs"),
        ("w8a8", "mapping or pairs"),
        ({b".*": "w8a8"}, "regular expression"),
        ({"(": "w8a8"}, "regular expression"),
        ({".*": "int9000"}, "recipe"),
        ({".*": 8}, "recipe, a DotGeneral or None"),
        ({".*": "w8a8", "head": None}, "'head' is unused: earlier rules took head"),
    ],
)
def test_misuse_is_named(rules, message):
    with pytest.raises(ValueError, match=message):
        assign(PATHS, rules)

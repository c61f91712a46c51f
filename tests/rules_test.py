import pytest

import jaxquant as jq
from jaxquant.engine.rules import assign

PATHS = dict.fromkeys(("embed", "blocks/0/up", "blocks/0/down", "head"), "linear")


def test_the_first_match_counts_and_the_rest_stay():
    found = assign(PATHS, [("blocks/.*/down", "w8a8"), ("blocks/.*", "w4a16")])
    assert {path: rule.value for path, rule in found.items()} == {
        "blocks/0/up": jq.recipe("w4a16"),
        "blocks/0/down": jq.recipe("w8a8"),
    }


def test_rules_match_whole_paths_and_none_leaves_in_float():
    with pytest.raises(ValueError, match=r"'blocks' is unused.*the paths are embed"):
        assign(PATHS, {"blocks": "w8a8"})
    assert assign(PATHS, {"head": None, ".*": "w8a8"})["head"].value is None


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "empty"),
        (None, "mapping or pairs"),
        ("w8a8", "mapping or pairs"),
        ({b".*": "w8a8"}, "regular expression"),
        ({"(": "w8a8"}, "regular expression"),
        ({".*": "int9000"}, "recipe"),
        ({".*": 8}, "recipe, a DotGeneral, an Attention or None"),
        ({".*": "w8a8", "head": None}, "'head' is unused: earlier rules took head"),
    ],
)
def test_misuse_is_named(rules, message):
    with pytest.raises(ValueError, match=message):
        assign(PATHS, rules)


def test_a_rule_takes_modules_of_its_own_kind_alone():
    kinds = {"attention": "attention", "attention/query": "linear"}
    found = assign(kinds, [(".*", "kv8"), ("attention.*", "w8a8")])
    assert {path: rule.label for path, rule in found.items()} == {
        "attention": "kv8",
        "attention/query": "w8a8",
    }
    assert "attention" not in assign(kinds, {".*": "w8a8"})
    with pytest.raises(ValueError, match=r"holds no weight itself.*'a8' and 'kv8'"):
        assign(kinds, {"attention": "w8a8"})
    with pytest.raises(ValueError, match=r"attention/query, which has weights.*'w8a8'"):
        assign(kinds, {"attention/query": "a8"})


def test_an_unused_rule_names_the_nearest_of_many_paths():
    kinds = {f"blocks/{i}/mlp/{name}": "linear" for i in range(12) for name in ("up", "down")}
    with pytest.raises(ValueError, match=r"nearest of 24 paths are blocks/\d+/mlp/up"):
        assign(kinds, {r"blocks/\d+/mpl/up": "w8a8"})


def test_last_layers_stay_in_float():
    paths = [f"blocks/{i}/mlp/up" for i in range(12)] + [f"blocks/{i}" for i in range(12)]
    rules = [(jq.last_layers(12, 2), None), ("blocks/.*", "nvfp4_train")]
    found = assign(dict.fromkeys(paths, "linear"), rules)
    assert {p for p in paths if found[p].value is None} == {
        "blocks/10",
        "blocks/11",
        "blocks/10/mlp/up",
        "blocks/11/mlp/up",
    }
    for count in (0, 13):
        with pytest.raises(ValueError, match="1 to 12"):
            jq.last_layers(12, count)

"""Expressions of files match what `re` matches, in bounded time."""

import random
import re
import time

import pytest

from jaxquant.engine.expressions import Expression
from jaxquant.engine.rules import assign

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others

ATOMS = [
    "a",
    "b",
    "/",
    "0",
    ".",
    r"\d",
    r"\w",
    "[ab]",
    "[^a/]",
    r"\.",
    "^",
    "$",
    r"\b",
    "(?!a)",
    "(?=b)",
]
COUNTS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,2}", "{2,}", "{0}", "{1}?"]


def drawn(rng: random.Random, depth: int) -> str:
    kind = rng.random()
    if depth == 0 or kind < 0.35:
        return rng.choice(ATOMS)
    if kind < 0.6:
        return drawn(rng, depth - 1) + drawn(rng, depth - 1)
    if kind < 0.75:
        return f"({drawn(rng, depth - 1)}|{drawn(rng, depth - 1)})"
    inner = rng.choice(
        [f"({drawn(rng, depth - 1)})", f"(?:{drawn(rng, depth - 1)}|)", ".", "[ab/]"]
    )
    return inner + rng.choice(COUNTS)


def test_the_same_texts_match_as_in_python():
    rng, matched = random.Random(0), 0
    for _ in range(3000):
        pattern = rng.choice(["", "", "(?i)"]) + drawn(rng, 4)
        try:
            own = re.compile(pattern)
        except re.error:
            with pytest.raises(ValueError, match="rule"):
                Expression(pattern)
            continue
        for _ in range(8):
            text = "".join(rng.choice("abA/0\n") for _ in range(rng.randrange(7)))
            expected = own.fullmatch(text) is not None
            assert (Expression(pattern).fullmatch(text) is not None) == expected, (pattern, text)
            matched += expected
    assert matched > 2000


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        (r"(?!head).*", ["head", "heads", "a/head", "body", ""]),
        (r"blocks/\d+/(attention|mlp)/.*", ["blocks/10/mlp/up", "blocks//mlp/up", "blocks/1/mlp"]),
        (r"(?P<layer>up|down)(?:_proj)?", ["up", "down_proj", "up_", "updown"]),
        (r"(?i)HEAD\.[\]\-x]{2,3}", ["head.]-", "Head.x", "hEAD.xx]"]),
        (r"\x61\u0062[^]]\t", ["abc\t", "ab]\t"]),
        (r"a{1000000}|b{,1}|c{x}", ["", "b", "c{x}", "a"]),
        (r"größe/.*", ["größe/1", "grosse/1"]),
    ],
)
def test_rules_as_people_write_them(pattern, texts):
    for text in texts:
        expected = re.fullmatch(pattern, text) is not None
        assert (Expression(pattern).fullmatch(text) is not None) == expected, text


@pytest.mark.first(4)
@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("(a+)+b", "a" * 40),
        ("(a|a)*b", "a" * 40),
        ("(a|aa)+$b", "a" * 60),
        ("(.*)*" * 20 + "x", "a" * 60),
        ("a?" * 60 + "a" * 60 + "b", "a" * 60),
        (".*" * 300 + "x", "a" * 100),
        ("(?=(a+)+b)a*", "a" * 60),
        ("(" * 20 + "a*" + ")*" * 20 + "b", "a" * 100),
        ("((a{0,500}){0,500}){0,500}b", "a" * 100),
    ],
)
def test_none_takes_long(pattern, text):
    start = time.monotonic()
    assert Expression(pattern).fullmatch(text) is None
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", r"has '\\\\1' at letter 3, which is not matched in a rule of a file"),
        ("(?<=a)b", "at letter 0, which is not matched"),
        ("(?>a)b", "at letter 0, which is not matched"),
        ("(?(1)a|b)", "rule"),
        ("a++", "at letter 2, which is not matched"),
        ("(?m)^a", "at letter 0, which is not matched"),
        ("a" * 1001, "has 1001 letters; at most 1000"),
        ("(" * 21 + ")" * 21, "up to 20 deep"),
        ("(a", "is not a regular expression: missing"),
        ("[a", "is not a regular expression: unterminated"),
        ("*a", "is not a regular expression: nothing to repeat"),
        ("a{3,2}", "is not a regular expression"),
        ("[z-a]", "is not a regular expression: bad character range"),
    ],
)
def test_others_are_refused_by_name(pattern, message):
    with pytest.raises(ValueError, match=message):
        Expression(pattern)


def test_rules_take_them_as_they_take_text():
    kinds = {"up": "linear", "head": "linear", "a/head": "linear"}
    rules = {"head": None, "(?i)A/.*": "w8a8", ".*": "w4a16"}
    own = assign(kinds, rules)
    loaded = assign(kinds, [(Expression(pattern), value) for pattern, value in rules.items()])
    assert {path: rule.label for path, rule in loaded.items()} == {
        path: rule.label for path, rule in own.items()
    }
    assert Expression("head") == "head"
    with pytest.raises(ValueError, match="rule 'none' is unused"):
        assign(kinds, [(Expression("none"), None)])

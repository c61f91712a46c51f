"""Rules: which module gets which recipe.

Rules are ordered pairs of a regular expression and a recipe.  A module takes the first rule whose
expression matches its whole path, written with slashes (``blocks/0/attention/query``), and whose recipe is
for modules of its kind: a product's recipe for layers with weights, an `Attention` for attention, None for
any.  Expressions of one's own are Python's; those of a file are matched by `jaxquant.engine.expressions`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxquant.engine.expressions import Expression
from jaxquant.operations.attention import Attention
from jaxquant.operations.dot import DotGeneral
from jaxquant.operations.recipes import describe, recipe

Rules = Mapping[str, Any] | Sequence[tuple[str, Any]]

ATTENTION = "attention"  # the kind of module that takes an Attention; all others take a DotGeneral


class Rule(NamedTuple):
    """A rule as it was read: the compiled expression, what it gives, and that in words.

    One that was given for a part of a model, or for what is a part now, knows paths there by other names:
    without `strip` at their beginning, and behind `add`.  One that was given `is_earlier` than others may be
    left with nothing to take.
    """

    pattern: re.Pattern[str] | Expression
    value: DotGeneral | Attention | None
    label: str
    strip: str = ""
    add: str = ""
    is_earlier: bool = False

    def takes(self, subject: "Subject") -> bool:
        return self.matches(subject) and self.suits(subject.kind)

    def matches(self, subject: "Subject") -> bool:
        known = (n for n in subject.names if n.startswith(self.strip))
        names = (self.add + name.removeprefix(self.strip) for name in known)
        return any(self.pattern.fullmatch(name) is not None for name in names)

    def suits(self, kind: str) -> bool:
        return self.value is None or isinstance(self.value, Attention) == (kind == ATTENTION)


class Subject(NamedTuple):
    """A module or a product that rules may match, with all of its names, its path first."""

    names: tuple[str, ...]
    kind: str

    @property
    def path(self) -> str:
        return self.names[0]


def parse_rules(rules: Rules) -> list[Rule]:
    """Returns rules with names looked up and expressions compiled.

    Args:
        rules: a mapping or pairs from a regular expression to a recipe's name, a `DotGeneral`, an
            `Attention`, or None, which leaves the module as it is.

    Raises:
        ValueError: no rules, an expression that does not compile, or a value that is no recipe.

    >>> [rule.label for rule in parse_rules({"head": None, ".*": "w8a8"})]
    ['float', 'w8a8']
    """
    try:
        items = rules.items() if isinstance(rules, Mapping) else rules
        pairs = [(pattern, value) for pattern, value in items]
    except (TypeError, ValueError):
        raise ValueError(
            f"rules are a mapping or pairs from regular expressions to recipes; got {rules!r}"
        ) from None
    if not pairs:
        raise ValueError("rules are empty; give at least one, such as {'.*': 'w8a8'}")
    return [_parse(pattern, value) for pattern, value in pairs]


def ensure_parsed(rules: Rules | Sequence[Rule], may_be_empty: bool = False) -> list[Rule]:
    """Returns rules as `parse_rules` gives them, which may be parsed already."""
    given: Any = rules
    is_parsed = isinstance(given, list) and all(isinstance(rule, Rule) for rule in given)
    return given if is_parsed and (given or may_be_empty) else parse_rules(given)


def _parse(pattern: Any, value: Any) -> Rule:
    try:
        compiled = pattern if isinstance(pattern, Expression) else re.compile(pattern)
        compiled.fullmatch("")  # a bytes pattern compiles and matches no path
    except (re.error, TypeError) as error:
        raise ValueError(f"rule {pattern!r} is not a regular expression: {error}") from None
    if isinstance(value, str):
        return Rule(compiled, recipe(value), value)
    if value is not None and not isinstance(value, DotGeneral | Attention):
        raise ValueError(
            f"rule {pattern!r} maps to a recipe, a DotGeneral, an Attention or None; got {value!r}"
        )
    return Rule(compiled, value, describe(value))


def assign(kinds: Mapping[str, str], rules: Rules) -> dict[str, Rule]:
    """Returns the first matching rule of each path; paths without one are absent.

    Args:
        kinds: each path's kind of module, such as ``"linear"`` or ``"attention"``.
        rules: as of `parse_rules`.

    Raises:
        ValueError: a rule that no path took, with the reason and the nearest paths.

    >>> assign({"up": "linear", "head": "linear"}, {"head": None, ".*": "w4a16"})["up"].label
    'w4a16'
    """
    subjects = [Subject((path,), kind) for path, kind in kinds.items()]
    chosen = choose(subjects, rules)
    return {s.path: rule for s, rule in zip(subjects, chosen, strict=True) if rule is not None}


def choose(
    subjects: Sequence[Subject], rules: Rules | Sequence[Rule], is_part: bool = False
) -> list[Rule | None]:
    """Returns the first rule that takes each subject; None where none does.

    Args:
        subjects: modules or products.
        rules: as of `parse_rules`, or what it gave.
        is_part: whether there are more subjects, so that a rule may take none of these.

    Raises:
        ValueError: a rule that took none, with the reason and the nearest paths.
    """
    parsed = ensure_parsed(rules, may_be_empty=is_part)
    chosen = [next((r for r in parsed if r.takes(subject)), None) for subject in subjects]
    for rule in () if is_part else parsed:
        if not rule.is_earlier and not any(rule is other for other in chosen):
            raise ValueError(f"rule {rule.pattern.pattern!r} is unused: {_reason(rule, subjects)}")
    return chosen


def _reason(rule: Rule, subjects: Sequence[Subject]) -> str:
    matched = [subject for subject in subjects if rule.matches(subject)]
    if not matched:
        paths = dict.fromkeys(subject.path for subject in subjects)
        return f"nothing has such a path; {_nearest(rule.pattern.pattern, paths)}"
    suited = [subject.path for subject in matched if rule.suits(subject.kind)]
    if suited:
        return f"earlier rules took {_listed(suited)}"
    paths = [subject.path for subject in matched]
    above = [p for p in paths if any(s.path.startswith(f"{p}/") for s in subjects)]
    if above and not isinstance(rule.value, Attention):
        return (
            f"it matches {_listed(above)}, which holds no weight itself; a rule such as "
            f"{above[0] + '/.*'!r} takes the weights within it, and recipes such as 'a8' and 'kv8' are for "
            "products of two activations"
        )
    if isinstance(rule.value, Attention):
        return (
            f"it matches {_listed(paths)}, which has weights, and {rule.label} is for attention; a recipe "
            "such as 'w8a8' is for weights"
        )
    return (
        f"it matches {_listed(paths)}, whose products are of two activations, and {rule.label} is for "
        "weights; recipes such as 'a8' and 'kv8' are for attention"
    )


def last_layers(layers: int, count: int, prefix: str = "blocks") -> str:
    """Returns the expression of a rule for the last layers of a model, and all within them.

    Args:
        layers: how many the model has.
        count: of how many, at least 1 and at most all.
        prefix: the path of the list that holds them.

    Raises:
        ValueError: a count that is not from 1 to `layers`.

    >>> print(last_layers(12, 2))
    blocks/(10|11)(/.*)?
    """
    if not 1 <= count <= layers:
        raise ValueError(f"the last layers are 1 to {layers} of {layers}; got {count}")
    numbers = "|".join(map(str, range(layers - count, layers)))
    return f"{re.escape(prefix)}/({numbers})(/.*)?"


_NUMBER = re.compile(r"(?:(?<=[/_])|^)\d+(?=/|$)")


def starred(path: str) -> str:
    """Returns a path with ``*`` in the place of its layers' numbers.

    >>> starred("layers/12/up/kernel"), starred("blocks_3/Dense_0"), starred("conv2d/w1")
    ('layers/*/up/kernel', 'blocks_*/Dense_*', 'conv2d/w1')
    """
    return _NUMBER.sub("*", path)


def expression_for(paths: Iterable[str]) -> str:
    """Returns a regular expression for paths that differ in nothing but their layers' numbers.

    >>> print(expression_for(["layers/0/up", "layers/1/up"]), expression_for(["layers/0/up"]))
    layers/[0-9]+/up layers/0/up
    """
    first, *others = dict.fromkeys(paths)
    return _NUMBER.sub("[0-9]+", first) if others else first


def _nearest(pattern: str, paths: Iterable[str]) -> str:
    """Returns the paths that look most like an expression, or all where they are few."""
    paths = list(paths)
    if len(paths) <= 8:
        return f"the paths are {_listed(paths)}"
    plain = re.sub(r"\\d\+?|\[0-9\]\+?|\.\*", "0", pattern)
    near = difflib.get_close_matches(plain, paths, n=5, cutoff=0.0)
    return f"the nearest of {len(paths)} paths are {_listed(near)}"


def _listed(paths: Sequence[str], most: int = 8) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return (", ".join(paths[:most]) or "none") + more

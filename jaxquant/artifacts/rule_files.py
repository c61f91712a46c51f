"""Rules as a folder holds them: their expressions as text, their recipes as specifications."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.artifacts.settings import text_of
from jaxquant.engine.expressions import Expression
from jaxquant.engine.rules import Rule, parse_rules

_NAMES = ("strip", "add")


def rule_tree(rule: Rule) -> dict[str, Any]:
    """Returns a rule as a tree of arrays and operations: its texts in UTF-8.

    Raises:
        ValueError: an expression compiled with flags, or one that files' expressions do not have.
    """
    pattern, expression = rule.pattern, rule.pattern.pattern
    if isinstance(pattern, re.Pattern) and pattern.flags != re.compile(expression).flags:
        raise ValueError(
            f"rule {expression!r} is compiled with flags, which a file does not hold; write them into the "
            "expression, as in '(?i)head'"
        )
    Expression(expression)  # what could not be loaded is not written
    texts = {"pattern": expression, "label": rule.label, "strip": rule.strip, "add": rule.add}
    tree: dict[str, Any] = {k: _array(text) for k, text in texts.items() if text}
    return tree if rule.value is None else {**tree, "value": rule.value}


def _array(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def rules_from(folder: str, trees: Any) -> list[Rule]:
    """Returns the rules of a folder; their expressions are matched within a bound.

    Raises:
        ValueError: a tree that holds none.
    """
    try:
        found = [_rule(trees[i] if i in trees else trees[str(i)]) for i in range(len(trees))]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder} holds no rules, each with an expression") from None
    return found


def _rule(tree: Mapping[str, Any]) -> Rule:
    texts = {name: text_of(tree[name]) for name in ("label", *_NAMES) if name in tree}
    (rule,) = parse_rules([(Expression(text_of(tree["pattern"])), tree.get("value"))])
    return rule._replace(**texts)

"""Rules: which module gets which recipe.

Rules are ordered pairs of a regular expression and a recipe.  A module takes the first rule whose
expression matches its whole path, written with slashes (``blocks/0/attention/query``).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxquant.dot import DotGeneral
from jaxquant.recipes import recipe

Rules = Mapping[str, Any] | Sequence[tuple[str, Any]]


def parse_rules(rules: Rules) -> list[tuple[re.Pattern[str], DotGeneral | None]]:
    """Compiled rules: names looked up, expressions compiled.

    Args:
        rules: a mapping or pairs from a regular expression to a recipe's name, a `DotGeneral`, or
            None, which leaves the module as it is.

    Raises:
        ValueError: no rules, an expression that does not compile, or a value that is no recipe.

    >>> parse_rules({"head": None, ".*": "w8a8"})[0]
    (re.compile('head'), None)
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
    parsed = []
    for pattern, value in pairs:
        try:
            compiled = re.compile(pattern)
            compiled.fullmatch("")  # a bytes pattern compiles and matches no path
        except (re.error, TypeError) as error:
            raise ValueError(f"rule {pattern!r} is not a regular expression: {error}") from None
        if isinstance(value, str):
            value = recipe(value)
        elif value is not None and not isinstance(value, DotGeneral):
            raise ValueError(
                f"rule {pattern!r} maps to a recipe, a DotGeneral or None; got {value!r}"
            )
        parsed.append((compiled, value))
    return parsed


def assign(paths: Iterable[str], rules: Rules) -> dict[str, DotGeneral | None]:
    """What each path gets: the value of the first rule that matches it in full; absent where none does.

    Raises:
        ValueError: a rule that no path took, with the paths that there are.

    >>> assign(["up", "head"], {"head": None, ".*": "w4a16"})["head"] is None
    True
    """
    paths, parsed = list(paths), parse_rules(rules)
    assigned, used = {}, set()
    for path in paths:
        for index, (pattern, value) in enumerate(parsed):
            if pattern.fullmatch(path):
                assigned[path] = value
                used.add(index)
                break
    for index, (pattern, _) in enumerate(parsed):
        if index not in used:
            earlier = [p for p in paths if pattern.fullmatch(p)]
            reason = (
                f"earlier rules took {', '.join(earlier)}" if earlier else "nothing has such a path"
            )
            raise ValueError(
                f"rule {pattern.pattern!r} is unused: {reason}; the paths are {', '.join(paths) or 'none'}"
            )
    return assigned

"""The card of a frozen model: how it was made, from what, and how it was judged."""

import dataclasses
import importlib.metadata
import math
import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.operations.recipes import describe

_NOT_STATED = "not stated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """A frozen model's card: how it was made, from what, and how it was evaluated.

    Every field is given; None says that it is not stated, and is shown so.

    Attributes:
        coverage: what each module got; a `jaxquant.functions.Coverage`, or its dictionary.
        rules: what it was quantized by, as in `jaxquant.engine.rules`; kept as pairs of texts.
        data: name of the data that it was calibrated and judged on.
        licence: of the weights.
        seeds: of whatever was random: a number, or several by name.
        quality: the report of `jaxquant.quality.compare`, or its dictionary.
        verdict: of `jaxquant.quality.gate`, or its dictionary.
        calibration: ranges by module.
        notes: anything else, in words.
        versions: of jaxquant, jax, flax and python; filled in when it is saved.

    Raises:
        ValueError: a field that JSON does not hold.

    >>> card = dataclasses.replace(Card.empty(), data="CIFAR-10", seeds=0)
    >>> Card.from_dict(card.to_dict()) == card
    True
    """

    coverage: Any
    rules: Any
    data: str | None
    licence: str | None
    seeds: Any
    quality: Any
    verdict: Any
    calibration: Any
    notes: str | None
    versions: dict[str, str] | None = None

    def __post_init__(self):
        for name in ("data", "licence", "notes"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"a card's {name} is a text or None; got {value!r}")
        object.__setattr__(self, "rules", _rule_texts(self.rules))
        for field in dataclasses.fields(self):
            value = _plain(getattr(self, field.name), field.name)
            object.__setattr__(self, field.name, value)
        for name in ("coverage", "quality", "verdict", "calibration", "versions"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"a card's {name} is a dictionary or None; got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as JSON has them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def empty(cls) -> "Card":
        """Returns a card that states nothing."""
        return cls(**dict.fromkeys(field.name for field in dataclasses.fields(cls)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Card":
        """Returns the card of `to_dict`.

        Raises:
            ValueError: fields that are missing, or that a card does not have.
        """
        wanted = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, Mapping) or set(fields) != wanted:
            found = sorted(map(str, fields)) if isinstance(fields, Mapping) else fields
            raise ValueError(f"a card has the fields {sorted(wanted)}; got {found!r}")
        return cls(**fields)

    def to_markdown(self) -> str:
        """Returns the card for people."""
        rows = [
            ("data", self.data),
            ("licence", self.licence),
            ("seeds", self.seeds),
            ("rules", self.rules and ", ".join(f"{p} → {label}" for p, label in self.rules)),
            ("versions", self.versions and ", ".join(f"{k} {v}" for k, v in self.versions.items())),
            ("notes", self.notes),
        ]
        parts = [
            "# Model card",
            _table(("", ""), rows),
            "## Verdict",
            _verdict_text(self.verdict),
            "## Quality",
            _NOT_STATED
            if self.quality is None
            else _table(("figure", "value"), _flat(self.quality)),
            "## Coverage",
            _coverage_text(self.coverage),
            "## Calibrated ranges",
            _NOT_STATED
            if self.calibration is None
            else _table(("module", "range"), list(self.calibration.items())),
        ]
        return "\n\n".join(parts) + "\n"


def versions_now() -> dict[str, str]:
    """Returns versions of what runs."""
    packages = {name: importlib.metadata.version(name) for name in ("jaxquant", "jax", "flax")}
    return packages | {"python": platform.python_version()}


def _rule_texts(rules: Any) -> Any:
    """Returns rules as pairs of texts."""
    if rules is None:
        return None
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    try:
        return [[str(p), v if isinstance(v, str) else describe(v)] for p, v in pairs]
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f"a card's rules are as in jaxquant.engine.rules; got {rules!r}") from None


def _plain(value: Any, where: str) -> Any:
    """Returns a value as JSON has it."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        value = np.asarray(value).tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(f"a card's {where} is {value!r}, which JSON does not hold")


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    text = _NOT_STATED if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _verdict_text(verdict: dict[str, Any] | None) -> str:
    if verdict is None:
        return _NOT_STATED
    head = f"{verdict.get('status', _NOT_STATED)} at tier {verdict.get('tier', _NOT_STATED)}"
    reasons = [f"- {reason}" for reason in verdict.get("reasons", ())]
    return "\n".join([head, "", *reasons]).rstrip()


def _coverage_text(coverage: dict[str, Any] | None) -> str:
    if coverage is None:
        return _NOT_STATED
    names = ("path", "kind", "shape", "recipe", "bytes_before", "bytes_after")
    # A product has the shapes of both operands; a layer that of its weight.
    found = [{"shape": row.get("shapes"), **row} for row in coverage.get("rows", ())]
    rows = [tuple(row.get(name) for name in names) for row in found]
    return _table(tuple(name.replace("_", " ") for name in names), rows)


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Returns figures by path; intervals in one line."""
    if isinstance(value, dict) and {"estimate", "low", "high"} <= set(value):
        return [(path, f"{value['estimate']} ({value['low']} to {value['high']})")]
    if isinstance(value, dict):
        items = value.items()
        return [row for key, item in items for row in _flat(item, f"{path}.{key}".lstrip("."))]
    return [(path, value)]

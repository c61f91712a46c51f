"""Describe a saved state: shapes, codecs and widths, in the vocabulary of the file format.

The format has its own words, so classes and fields of this package can be renamed and files stay readable.
A codec or a score from outside this package is described by its repr.
"""

import ast
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.optim.codecs import Companded, Logarithmic
from jaxquant.optim.plans import Plan
from jaxquant.optim.scoring import LayerStatistics, UpdateSensitivity

# For each class: its word in files, and the field for each word in files.  A field that came later is
# written only where it is not its default, so that files from before it stay equal.
_WORDS: dict[type, tuple[str, dict[str, str]]] = {
    Companded: ("companded", {"linear": "linear", "stochastic": "stochastic"}),
    Logarithmic: ("logarithmic", {"range": "range", "stochastic": "stochastic"}),
    UpdateSensitivity: (
        "felt",
        {
            "weight": "weight",
            "memory": "ema_decay",
            "reach": "max_bit_change",
            "persistence": "persistence",
        },
    ),
    LayerStatistics: (
        "statistics",
        {
            "memory": "ema_decay",
            "reach": "max_bit_change",
            "factors": "factors",
            "within_slots": "within_slots",
        },
    ),
}
_LATER = frozenset(("persistence", "factors", "within_slots"))


def identity(plan: Plan) -> dict[str, Any]:
    """Returns what two plans must share for their states to be interchangeable, as JSON."""
    adaptation = plan.adaptation
    return {
        "runs": [
            {
                "shards": group.shards,
                "starts": list(group.starts),
                "cuts": [[list(part) for part in axes] for axes in group.shard_axes],
                "slots": [
                    {
                        "codec": _described(codec),
                        "bits": list(bits),
                        "leaves": [_leaf(leaf.path, leaf.slot, leaf) for leaf in leaves],
                    }
                    for codec, bits, leaves in zip(codecs, widths, group.leaves, strict=True)
                ],
            }
            for group, codecs, widths in zip(plan.groups, plan.codecs, plan.bits, strict=True)
        ],
        "exact": [_leaf(leaf.path, leaf.slot, leaf) for leaf in plan.exact],
        "rows": plan.rows,
        "fills": plan.fills,
        "adaptation": None
        if adaptation is None
        else {
            "interval": adaptation.interval,
            "stay": adaptation.hysteresis,
            "score": _described(adaptation.score),
            **({} if adaptation.until is None else {"until": adaptation.until}),
        },
    }


def _leaf(path: str, slot: str, leaf: Any) -> dict[str, Any]:
    return {
        "index": leaf.index,
        "parameter": leaf.parameter,
        "path": path,
        "slot": slot,
        "shape": list(leaf.shape),
        "dtype": leaf.dtype.name,
    }


def _described(value: Any) -> dict[str, Any]:
    """Describes a codec or a score."""
    if type(value) not in _WORDS:
        return {"kind": "other", "repr": repr(value)}
    kind, fields = _WORDS[type(value)]
    defaults = {field.name: field.default for field in dataclasses.fields(value)}
    said = {
        word: _plain(getattr(value, f))
        for word, f in fields.items()
        if f not in _LATER or getattr(value, f) != defaults[f]
    }
    return {"kind": kind, **said}


def _plain(value: Any) -> Any:
    """Converts a NumPy number to the Python number that JSON can store, and a tuple to a list."""
    if isinstance(value, tuple):
        return list(value)
    return value.item() if isinstance(value, np.generic) else value


def difference(found: Any, wanted: Any, where: str = "") -> str:
    """Returns the first difference of two identities, with both values; empty if they are equal."""
    if isinstance(found, dict) and isinstance(wanted, dict) and set(found) == set(wanted):
        pairs = [(key, found[key], wanted[key]) for key in wanted]
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = [(i, *pair) for i, pair in enumerate(zip(found, wanted, strict=True))]
    else:
        same = found == wanted and isinstance(found, bool) == isinstance(wanted, bool)
        return "" if same else f"{where} is {_short(found)} in it and {_short(wanted)} here"
    said = (difference(one, other, f"{where}/{key}".lstrip("/")) for key, one, other in pairs)
    return next(filter(None, said), "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


# ---------------------------------------------------------------------------------------------------
# Version 3, whose files hold the repr of a plan


def from_version_3(text: Any) -> dict[str, Any]:
    """Returns the identity of the plan whose repr a file of version 3 holds.

    Names and fields are those of version 3, whatever they are called now.  The policy's name, roles, signs
    and reasons are ignored.

    Raises:
        ValueError: if the text is not the repr of such a plan.
    """
    try:
        plan = _Text(text).plan()
        return {
            "runs": [
                _group_3(group, codecs, bits)
                for group, codecs, bits in zip(
                    plan["runs"], plan["codecs"], plan["bits"], strict=True
                )
            ],
            "exact": [_leaf_3(leaf) for leaf in plan["exact"]],
            "rows": plan["rows"],
            "fills": plan["fills"],
            "adaptation": plan["adaptation"]
            and {
                "interval": plan["adaptation"]["interval"],
                "stay": plan["adaptation"]["stay"],
                "score": plan["adaptation"]["score"],
            },
        }
    except (ValueError, LookupError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"its plan is none that version 3 wrote: {error}") from None


def _group_3(
    group: Mapping[str, Any], codecs: Sequence[Any], bits: Sequence[Any]
) -> dict[str, Any]:
    return {
        "shards": group["shards"],
        "starts": group["starts"],
        "cuts": group["cuts"],
        "slots": [
            {"codec": codec, "bits": widths, "leaves": [_leaf_3(leaf) for leaf in leaves]}
            for codec, widths, leaves in zip(codecs, bits, group["leaves"], strict=True)
        ],
    }


def _leaf_3(leaf: Mapping[str, Any]) -> dict[str, Any]:
    return {key: leaf[key] for key in ("index", "parameter", "path", "slot", "shape", "dtype")}


_PARTS_3 = frozenset(("Plan", "Run", "Leaf", "Exact", "Adaptation"))
_KINDS_3 = frozenset(("Companded", "Logarithmic", "Felt", "Statistics"))


class _Text:
    """Parses a repr of version 3 into dictionaries and lists.  Unknown classes become their own text."""

    def __init__(self, text: Any):
        if not isinstance(text, str):
            raise ValueError(f"it is {_short(text)}")
        # Classes among a codec's fields are not expressions.  Quoted text may contain such brackets too.
        self._hidden: list[str] = []
        self._text = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|<[^<>]*>", self._hide, text)

    def _hide(self, found: re.Match) -> str:
        if not found[0].startswith("<"):
            return found[0]
        self._hidden.append(found[0])
        return f"_hidden_{len(self._hidden) - 1}_"

    def plan(self) -> dict[str, Any]:
        found = ast.parse(self._text, mode="eval").body
        if not isinstance(found, ast.Call) or self._name(found) != "Plan":
            raise ValueError(f"it begins {self._text[:20]!r}")
        return self._value(found)

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Tuple):
            return [self._value(part) for part in node.elts]
        if isinstance(node, ast.Name):
            return {"kind": "other", "repr": self._shown(node.id)}
        if not isinstance(node, ast.Call):
            return ast.literal_eval(node)
        name = self._name(node)
        if name.startswith("np."):  # np.float64(0.5)
            return ast.literal_eval(node.args[0])
        fields = {word.arg or "": word.value for word in node.keywords}
        if name in _PARTS_3 | _KINDS_3:
            kind = {"kind": name.lower()} if name in _KINDS_3 else {}
            return kind | {field: self._value(value) for field, value in fields.items()}
        if name == "dtype" and len(node.args) == 1:  # dtype('float32'), dtype(bfloat16)
            return ast.unparse(node.args[0]).strip("'")
        return {"kind": "other", "repr": self._shown(ast.get_source_segment(self._text, node))}

    def _name(self, node: ast.Call) -> str:
        return ast.unparse(node.func)

    def _shown(self, text: str | None) -> str:
        return re.sub(r"_hidden_(\d+)_", lambda found: self._hidden[int(found[1])], text or "")

"""Origins of the values of a trace, found by following them through its equations."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jax.core import Tracer

from jaxquant.engine import derivations
from jaxquant.engine.derivations import Derivation
from jaxquant.engine.scores import Scores

# What only moves numbers about or casts them: what is behind is still the parameter.
# fmt: off
_MOVES = frozenset((
    "reshape", "transpose", "broadcast_in_dim", "convert_element_type", "squeeze", "slice",
    "dynamic_slice", "copy", "copy_p", "rev", "expand_dims", "sharding_constraint",
    "reduce_precision", "split", "mesh_cast",
    "reshard", "pvary", "pcast",
))
# fmt: on
# Whose results are never negative, and those of which that is so where it is so of their operands.
_NONNEGATIVE = frozenset({"exp", "exp2", "abs", "logistic", "square", "erfc"})
_KEEP_SIGN = frozenset(
    {
        "mul",
        "div",
        "add",
        "reduce_sum",
        "reduce_max",
        "cumsum",
        "concatenate",
        "sqrt",
        "pad",
        "optimization_barrier",
    }
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The origin of a value.

    Attributes:
        nearest: paths of the parameters that it was computed from since the last product.
        is_weight: whether parameters alone determine it, and no input of the function.
        is_input: whether an input of the function has a part in it.
        is_nonnegative: whether it is certain to have no negative number, as probabilities have not.
        derivation: how parameters and constants alone make it; None where inputs have a part in it, or where
            it cannot be computed again by itself.
        scores: of attention, that it is computed from.
    """

    nearest: frozenset[str] = frozenset()
    is_weight: bool = False
    is_input: bool = False
    is_nonnegative: bool = False
    derivation: Derivation | None = None
    scores: Scores | None = None

    @classmethod
    def parameter(cls, path: str) -> "Origin":
        """Returns the origin of a parameter."""
        return cls(frozenset({path}), is_weight=True, derivation=derivations.parameter(path))

    @classmethod
    def buffer(cls, path: str) -> "Origin":
        """Returns the origin of a model's array that is not a parameter, such as a mask."""
        return cls(derivation=derivations.parameter(path))

    @classmethod
    def constant(cls, value: Any) -> "Origin":
        """Returns the origin of a literal number or array."""
        is_nonnegative = not isinstance(value, Tracer) and bool(np.all(np.asarray(value) >= 0))
        return cls(is_nonnegative=is_nonnegative, derivation=derivations.constant(value))

    def without(self) -> "Origin":
        """Returns the same without its derivation."""
        return dataclasses.replace(self, derivation=None)


CONSTANT = Origin()
INPUT = Origin(is_input=True)


def join(origins: Iterable[Origin], is_nonnegative: bool = False) -> Origin:
    """Returns the origin of a value that is computed from others."""
    origins = list(origins)
    is_input = any(o.is_input for o in origins)
    return Origin(
        frozenset().union(*(o.nearest for o in origins)),
        not is_input and any(o.is_weight for o in origins),
        is_input,
        is_nonnegative,
    )


def through(
    primitive: str, origins: Sequence[Origin], settings: Mapping[str, Any] = MappingProxyType({})
) -> Origin:
    """Returns the origin of the output of an equation without products, from its operands' origins.

    >>> a, b = Origin.parameter("a"), Origin.parameter("b")
    >>> sorted(through("add", [a, b]).nearest), through("exp", [INPUT]).is_nonnegative
    (['a', 'b'], True)
    """
    signs = [o.is_nonnegative for o in origins]
    if primitive == "gather":  # what fills places out of bounds is no operand
        return join(origins, signs[0] and settings.get("fill_value") is None)
    if primitive == "select_n":
        if len({o.without() for o in origins[1:]}) == 1 and origins[1].is_weight:
            return (
                origins[1] if len(set(origins[1:])) == 1 else origins[1].without()
            )  # as in a cond under vmap
        return join(origins, all(signs[1:]))  # what selects has no sign of its own
    if primitive == "max":
        return join(origins, any(signs))
    if primitive in _MOVES:
        return join(origins, signs[:1] == [True])
    return join(origins, primitive in _NONNEGATIVE or (primitive in _KEEP_SIGN and all(signs)))


def common(paths: Iterable[str]) -> str:
    """Returns the longest path that all have in common, by whole names.

    >>> common(["layers/0/attn/q", "layers/0/attn/k"]), common(["a/b"]), common([])
    ('layers/0/attn', 'a/b', '')
    """
    parts = [path.split("/") for path in paths]
    found: list[str] = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        found.append(names[0])
    return "/".join(found)

"""Scores of attention, followed from the product of queries and keys to the one that sums over keys.

The axis that the second product sums over tells which operand of the first one has the keys.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Scores:
    """A value that is computed from a product of two activations.

    Attributes:
        product: a number of the product's own.
        sides: for each of the value's axes the operand of the product that it is a free axis of; None where
            it is of neither, or not known.
    """

    product: int
    sides: tuple[int | None, ...]


def of_product(equation: core.JaxprEqn) -> Scores | None:
    """Returns the scores of a product's result."""
    if equation.primitive.name != "dot_general":
        return None
    (left, right), (batch, _) = equation.params["dimension_numbers"]
    free = [
        v.aval.ndim - len(summed) - len(batch)  # pyright: ignore
        for v, summed in zip(equation.invars, (left, right), strict=True)
    ]
    return Scores(id(equation), (None,) * len(batch) + (0,) * free[0] + (1,) * free[1])


def summed_side(equation: core.JaxprEqn, operand: int, scores: Scores | None) -> int | None:
    """Returns the side of the scores' own axes that a product sums over in one of its operands."""
    if scores is None or equation.primitive.name != "dot_general":
        return None
    summed = equation.params["dimension_numbers"][0][operand]
    found = {scores.sides[a] for a in summed}
    return found.pop() if len(found) == 1 else None


def through(equation: core.JaxprEqn, scores: Sequence[Scores | None]) -> Scores | None:
    """Returns the scores of the first result of an equation without products."""
    operand = next((i for i, s in enumerate(scores) if s is not None), None)
    if operand is None:
        return None
    found: Any = scores[operand]
    before: Any = equation.invars[operand].aval
    after: Any = equation.outvars[0].aval
    name, settings = equation.primitive.name, equation.params
    sides: Any = None
    if name == "transpose":
        sides = [found.sides[a] for a in settings["permutation"]]
    elif name == "broadcast_in_dim":
        sides = [None] * after.ndim
        for a, place in enumerate(settings["broadcast_dimensions"]):
            sides[place] = found.sides[a]
    elif name in ("reshape", "squeeze", "expand_dims"):
        sides = _reshaped(before.shape, after.shape, found.sides)
    elif "axes" in settings and after.ndim < before.ndim:
        sides = [s for a, s in enumerate(found.sides) if a not in settings["axes"]]
    elif after.ndim == before.ndim:
        sides = found.sides
    return None if sides is None else Scores(found.product, tuple(sides))


def _reshaped(
    before: Sequence[int], after: Sequence[int], sides: Sequence[int | None]
) -> list[int | None]:
    """Returns the sides of axes that were split or joined: of those joined, the one that all have."""
    found: list[int | None] = []
    i = j = 0
    while j < len(after):
        start, first = i, j
        i, j = min(i + 1, len(before)), j + 1
        while math.prod(before[start:i]) != math.prod(after[first:j]):
            if math.prod(before[start:i]) < math.prod(after[first:j]) and i < len(before):
                i += 1
            elif j < len(after):
                j += 1
            else:
                return [None] * len(after)
        own = {sides[a] for a in range(start, i) if before[a] != 1}
        found += [own.pop() if len(own) == 1 else None] * (j - first)
    return found

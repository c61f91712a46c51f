"""Find the role of each leaf of an optimizer's state from the traced update, not from the name of a field.

The update and the initialization are traced from shapes.  `jaxquant.optim.bounds` bounds their values by
induction over steps: what holds initially, and holds after a step if it held before, always holds.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.optim.bounds import ANYTHING, NON_NEGATIVE, ZERO, Bound, Interval, bounds_of, names_of
from jaxquant.optim.tracing import Operation, Program

# A rounding error with a smaller factor fades within a few thousand steps.
_FADES = 0.999
# With a larger factor, a step is less than half the distance of levels of few bits.
_SLOW = 0.97
_COPIES = names_of("convert_element_type copy copy_p reduce_precision reshape stop_gradient")
# The results of these are near zero if the operands are.
_SCALES = _COPIES | names_of(
    "abs broadcast_in_dim div integer_pow mul pow select_n squeeze expand_dims transpose sqrt"
)
_MOST_ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class Trait:
    """The traits of a state leaf.

    Attributes:
        is_signed: whether it may be negative; true unless this can be excluded.
        fades: whether a rounding error fades soon: the new value contains the old one times less than 0.999,
            or not at all, or is the old one unchanged.
        held: that factor, as far as it is known.
        slow: whether that factor may be 0.97 or more.
        grows: whether that factor is known to exceed 1.
        divides: whether something is divided by it, or by its root, element by element.
        cancels: whether a root or a logarithm is taken of a difference that is non-negative only if the
            leaves are exact, such as a variance E[g²] − E[g]².
        of_parameters: how it depends on the parameters themselves, in words; empty if it does not.
    """

    is_signed: bool = True
    fades: bool = True
    held: float = 0.0
    slow: bool = False
    grows: bool = False
    divides: bool = False
    cancels: bool = False
    of_parameters: str = ""


def traits_of(tx: Any, params: Any, state: Any, extra: Mapping[str, Any]) -> list[Trait]:
    """Returns the traits of every leaf of a state.

    Args:
        tx: the transformation, which takes extra arguments.
        params: shapes of the parameters; updates are assumed to have the same.
        state: shapes of its state.
        extra: further arguments of the update by name, or their shapes.

    Raises:
        Exception: whatever the update raises when it is traced.
    """
    arrays = {k: x for k, x in extra.items() if not callable(x)}
    others = {k: x for k, x in extra.items() if callable(x)}

    def update(updates: Any, params: Any, state: Any, extra: Any) -> Any:
        return tx.update(updates, state, params, **extra, **others)

    # Traits do not depend on the user's settings for promotion of types and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        init = Program(tx.init, params)
        program = Program(update, params, params, state, arrays)
    count, total = len(jax.tree.leaves(params)), len(jax.tree.leaves(state))
    own = program.inputs[2 * count : 2 * count + total]
    after = program.outputs[len(program.outputs) - total :]
    first = bounds_of(init, {})
    begin = [first[n].whole for n in init.outputs]
    bounds = _inductive(program, own, after, begin, program.inputs[count : 2 * count])
    taints = _taints(program, own, after, count)
    makers = _made_of(init, first)
    users = _users(program)
    cancelling = _cancelling(program, bounds, frozenset((*own, *after)))
    given = frozenset(program.inputs[count : 2 * count])

    def trait(old: int, new: int, start: Interval, made: str, taint: set[str]) -> Trait:
        held = _held(program, bounds, old, new)
        follows = taint == {"params"} and _is_linear(bounds[new], given)
        return Trait(
            is_signed=min(bounds[new].whole[0], start[0]) < 0,
            fades=held < _FADES,
            held=held,
            slow=held >= _SLOW,
            grows=1 < held < math.inf,
            divides=_divides(program, users, bounds, (old, new)),
            cancels=not cancelling.isdisjoint((old, new)),
            of_parameters=made or ("it follows the parameters" if follows else ""),
        )

    return [trait(*row) for row in zip(own, after, begin, makers, taints, strict=True)]


def _inductive(
    program: Program,
    own: Sequence[int],
    after: Sequence[int],
    begin: Sequence[Interval],
    params: Sequence[int],
) -> list[Bound]:
    """Returns the bounds of an update's values at any step from the second on; the first step often differs.

    The hypothesis is what the first step gives, and is weakened if an update violates it: leaves are
    constant, as hyperparameters are; they do not decrease, as counts do not; they are non-negative.
    """
    arrays = frozenset(
        n
        for n in (*own, *params)
        if program.size(n) > 1 and jnp.issubdtype(program.specs[n].dtype, np.floating)
    )
    first = bounds_of(program, dict(zip(own, begin, strict=True)))
    suppose = [first[n].whole for n in after]
    for _ in range(_MOST_ROUNDS):
        found = bounds_of(program, dict(zip(own, suppose, strict=True)), arrays)
        kept = [
            had if _within(found[new].whole, had) else _weaker(had, found[new].whole)
            for had, new in zip(suppose, after, strict=True)
        ]
        if kept == suppose:
            return found
        suppose = kept
    return bounds_of(program, {}, arrays)


def _weaker(had: Interval, found: Interval) -> Interval:
    """Returns the next hypothesis after an interval was left."""
    if had[0] <= found[0]:
        return had[0], math.inf
    return NON_NEGATIVE if min(had[0], found[0]) >= 0 else ANYTHING


def _within(found: Interval, had: Interval) -> bool:
    return had[0] <= found[0] and found[1] <= had[1]


# ---------------------------------------------------------------------------------------------------
# Parameters in the state


def _made_of(init: Program, bounds: Sequence[Bound]) -> list[str]:
    """Returns how each leaf of the first state depends on the parameters' values; empty if it does not."""
    touched = set(init.inputs)
    for operation in init.operations:
        if touched & set(operation.inputs):
            touched |= set(operation.outputs)

    def said(output: int) -> str:
        if _origin(init, output) in init.inputs:
            return "it starts as the parameter"
        depends = output in touched and bounds[output].whole != ZERO
        return "it starts from the parameters" if depends else ""

    return [said(output) for output in init.outputs]


def _origin(program: Program, value: int) -> int:
    """Returns the value of which a value is a copy."""
    maker = program.makers.get(value)
    while maker is not None and maker.name in _COPIES:
        value = maker.inputs[0]
        maker = program.makers.get(value)
    return value


def _taints(
    program: Program, own: Sequence[int], after: Sequence[int], count: int
) -> list[set[str]]:
    """Returns what each leaf of the state is computed from over the steps: "updates", "params", or both.

    Values that only select, such as whether all are finite, do not count.
    """
    before = [frozenset[str]()] * len(own)
    given = dict.fromkeys(program.inputs[:count], frozenset(["updates"]))
    given |= dict.fromkeys(program.inputs[count : 2 * count], frozenset(["params"]))
    for _ in range(_MOST_ROUNDS):
        taints = given | dict(zip(own, before, strict=True))
        for operation in program.operations:
            inputs = operation.inputs[operation.name == "select_n" :]
            found = frozenset().union(*(taints.get(n, frozenset()) for n in inputs))
            taints |= dict.fromkeys(operation.outputs, found)
        new = [taints.get(n, frozenset()) for n in after]
        if new == before:
            break
        before = new
    return [set(x) for x in before]


def _is_linear(bound: Bound, values: frozenset[int]) -> bool:
    """Returns whether a bound contains some of the values with known finite coefficients."""
    own = [c for n, c in bound.linear.items() if n in values]
    return bool(own) and all(map(math.isfinite, sum(own, ())))


# ---------------------------------------------------------------------------------------------------
# Effect of rounding


def _held(program: Program, bounds: Sequence[Bound], old: int, new: int) -> float:
    """Returns the largest coefficient with which a leaf enters its new value, if it changes."""
    found = 0.0
    for case in _cases(program, bounds, new):
        low, high = bounds[case].linear.get(old, ZERO)
        if not _is_untouched(program, bounds[case], case, old):
            found = max(found, -low, high)
    return found


def _is_untouched(program: Program, bound: Bound, new: int, old: int) -> bool:
    return _origin(program, new) == old or (
        dict(bound.linear) == {old: (1.0, 1.0)} and bound.rest == ZERO
    )


def _cases(program: Program, bounds: Sequence[Bound], value: int) -> Iterable[int]:
    """Yields the values that a selection may give."""
    value = _origin(program, value)
    maker = program.makers.get(value)
    if maker is None or maker.name != "select_n":
        yield value
        return
    first, last = bounds[maker.inputs[0]].whole
    for place, case in enumerate(maker.inputs[1:]):
        if first <= place <= last:
            yield from _cases(program, bounds, case)


_ROOTS = names_of("sqrt rsqrt log pow")


def _cancelling(program: Program, bounds: Sequence[Bound], leaves: frozenset[int]) -> set[int]:
    """Returns the leaves, old and new, from which the operand of a root is computed element by element.

    Operands that are non-negative for all values of the leaves do not count.
    """
    pending = [
        operation.inputs[0]
        for operation in program.operations
        if operation.name in _ROOTS and bounds[operation.inputs[0]].whole[0] < 0
    ]
    found, seen = set(), set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        maker = program.makers.get(value)
        if value in leaves:
            found.add(value)
        elif maker is not None:
            pending += [n for n in maker.inputs if program.size(n) == program.size(value)]
    return found


def _users(program: Program) -> dict[int, list[Operation]]:
    found = collections.defaultdict(list)
    for operation in program.operations:
        for number in operation.inputs:
            found[number].append(operation)
    return found


def _divides(
    program: Program,
    users: Mapping[int, Sequence[Operation]],
    bounds: Sequence[Bound],
    values: Iterable[int],
) -> bool:
    """Returns whether something is divided by some values or their roots, or their logarithm is taken."""
    pending, seen = list(values), set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        for operation in users.get(value, ()):
            if _is_division(operation, value, bounds):
                return True
            if operation.name in _SCALES or _shifts(program, operation, value):
                pending += operation.outputs
    return False


def _is_division(operation: Operation, value: int, bounds: Sequence[Bound]) -> bool:
    """Returns whether the results are large if the value is near zero."""
    name, inputs = operation.name, operation.inputs
    if name == "pow":
        return value == inputs[0] and bounds[inputs[1]].whole[0] < 0
    if name == "integer_pow":
        return operation.params["y"] < 0
    return name in ("rsqrt", "log") or (name == "div" and value == inputs[1])


def _shifts(program: Program, operation: Operation, value: int) -> bool:
    """Returns whether the same number is added to all elements of a value, or bounds them."""
    others = [n for n in operation.inputs if n != value]
    is_known = operation.name in ("add", "max")
    return is_known and all(program.size(_spread(program, n)) == 1 for n in others)


def _spread(program: Program, value: int) -> int:
    maker = program.makers.get(value)
    while maker is not None and maker.name in _SCALES and len(maker.inputs) == 1:
        value = maker.inputs[0]
        maker = program.makers.get(value)
    return value

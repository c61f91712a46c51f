"""Trace the update of the wrapped transformation, and find which of its results need coded state."""

import copy
import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.optim.plans import Plan
from jaxquant.optim.tracing import Operation, Program

# An element of the result depends only on the same element of each operand.
_NAMES = (
    "abs add add_any and atan2 bitcast_convert_type cbrt ceil clamp convert_element_type copy copy_p "
    "cos cosh div eq erf erf_inv exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p "
    "logistic lt max min mul ne neg nextafter not or pow real reduce_precision rem round rsqrt "
    "select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square "
    "stop_gradient sub tan tanh xor "
)
_ELEMENTWISE = frozenset(_NAMES.split())
# These keep the order of elements if they keep their number.
_RESHAPES = frozenset(("broadcast_in_dim", "reshape", "squeeze", "expand_dims"))


@dataclasses.dataclass(frozen=True)
class ElementwiseUpdate:
    """The update of one parameter, which treats each element separately.

    Attributes:
        operations: the operations, in order.
        states: the values of the parameter's coded leaves.
        wide: other operands of the parameter's shape, by kind.
        scalars: operands of one element.
        after: the new values of the coded leaves.
        results: the other results, by kind.
        produced: the numbers of those results in the program.
        signature: equal for parameters whose elements are updated in the same way.
    """

    operations: tuple[Operation, ...]
    states: tuple[int, ...]
    wide: dict[Hashable, int]
    scalars: tuple[int, ...]
    after: tuple[int, ...]
    results: dict[Hashable, int]
    produced: dict[Hashable, int]
    signature: Hashable = None

    def __call__(
        self,
        states: Sequence[jax.Array],
        wide: Mapping[Hashable, jax.Array],
        known: Mapping[int, Any],
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Returns (new states, results) of some elements, given flat.  Scalars are taken from `known`."""
        shape = states[0].shape
        env = {
            n: known[n] if np.ndim(known[n]) == 0 else jnp.reshape(known[n], ())
            for n in self.scalars
        }
        env |= dict(zip(self.states, states, strict=True))
        env |= {n: wide[kind] for kind, n in self.wide.items()}

        def spread(value: int) -> jax.Array:
            return jnp.broadcast_to(env[value], shape)

        for operation in self.operations:
            if operation.name in _RESHAPES:
                env[operation.outputs[0]] = env[operation.inputs[0]]
                continue
            results = operation.bind(*map(spread, operation.inputs))
            env.update(zip(operation.outputs, results, strict=True))
        return [spread(n) for n in self.after], [spread(n) for n in self.results.values()]


@dataclasses.dataclass(frozen=True)
class Component:
    """Parameters whose coded state must be decoded together, and the other results that need it."""

    parameters: tuple[int, ...]
    results: tuple[int, ...]


class TracedUpdate:
    """The update of a transformation as a program, with the values that are known so far.

    Attributes:
        program: the program, from (updates, params, state) to (updates, state).
        updates: the numbers of the new updates, by parameter.
        leaves: the numbers of the new leaves of the state, in its order.
        known: the arrays of values that were given or evaluated.
        structure: the structure of the updates.
        onto: the kind of operand that the new updates may overwrite.
    """

    def __init__(
        self,
        tx: Any,
        plan: Plan,
        updates: Any,
        params: Any,
        exact: Sequence[Any],
        extra: dict[str, Any],
        onto: str = "update",
    ):
        self.onto = onto
        given, self.structure = jax.tree.flatten(updates)
        count = len(given)
        like = jax.eval_shape(lambda x: x, updates if params is None else params)
        specs = (updates, params, jax.eval_shape(tx.init, like))
        specs = jax.eval_shape(lambda x: x, specs)
        self.program = Program(lambda u, p, s: tx.update(u, s, p, **extra), *specs)
        self.updates = self.program.outputs[:count]
        self.leaves = self.program.outputs[count:]
        given += jax.tree.leaves(params)
        self._plan, self._states = plan, self.program.inputs[len(given) :]
        self.known = dict(zip(self.program.inputs, given, strict=False))
        self.known |= {self._states[x.index]: v for x, v in zip(plan.exact, exact, strict=True)}
        self._kinds: dict[int, Hashable] = dict.fromkeys(self.program.inputs[:count], "update")
        self._kinds |= dict.fromkeys(self.program.inputs[count : len(given)], "param")
        self._kinds |= {self._states[x.index]: x.slot for x in plan.exact}
        self._owners = self._touched()
        self._results = [*self.updates, *(self.leaves[x.index] for x in plan.exact)]

    def state(self, leaf: int) -> int:
        """Returns the number of the value of a state leaf before the update."""
        return self._states[leaf]

    def gradient(self, parameter: int) -> Any:
        """Returns the given update of a parameter."""
        return self.known[self.program.inputs[parameter]]

    def fork(self) -> "TracedUpdate":
        """Returns a copy with separate known values, for evaluation within a branch."""
        other = copy.copy(self)
        other.known = dict(self.known)
        return other

    def evaluate(self, values: Iterable[int]) -> None:
        """Evaluates values from those that are known, and adds them."""
        self.known = self.program.evaluate(values, self.known)

    def untouched(self) -> list[int]:
        """Returns the updates and unquantized leaves that do not depend on coded state."""
        return [n for n in self._results if not self._owners.get(n)]

    def components(self) -> list[Component]:
        """Groups the coded parameters so that each result needs the state of one group only."""
        after = {self.leaves[x.index]: frozenset([x.parameter]) for x in self._plan.leaves}
        needs = [self._owners.get(n, frozenset()) | after.get(n, set()) for n in self.leaves]
        needs += [self._owners.get(n, frozenset()) for n in self.updates]
        groups = [{p} for p in sorted(self._plan.coded)]
        for owners in needs:
            found = [g for g in groups if g & owners]
            groups = [g for g in groups if not g & owners]
            groups += [set().union(*found)] if found else []
        results = [(n, self._owners.get(n, frozenset())) for n in dict.fromkeys(self._results)]
        return [
            Component(tuple(sorted(group)), tuple(n for n, owners in results if owners & group))
            for group in groups
        ]

    def elementwise(self, component: Component) -> ElementwiseUpdate | str:
        """Returns the element-wise update of a component, or the reason why there is none."""
        if len(component.parameters) != 1:
            return f"a result needs the state of {len(component.parameters)} parameters at once"
        leaves = [x for x in self._plan.leaves if x.parameter == component.parameters[0]]
        size, states = leaves[0].size, tuple(self._states[x.index] for x in leaves)
        after = tuple(self._scalar(self.leaves[x.index]) for x in leaves)
        results = tuple(self._scalar(n) for n in component.results)
        operations, wide, scalars = [], {}, []
        pending, seen = [*results, *after], set(states)
        while pending:
            value = pending.pop()
            if value in seen:
                continue
            seen.add(value)
            operation, is_touched = self.program.makers.get(value), bool(self._owners.get(value))
            if self.program.size(value) == 1 and not is_touched:
                scalars.append(value)
            elif operation is not None and self._is_elementwise(operation, size):
                inputs = tuple(map(self._scalar, operation.inputs))
                operations.append(dataclasses.replace(operation, inputs=inputs))
                pending += inputs
            elif is_touched:
                name = "the state" if operation is None else f"'{operation.name}'"
                return f"{name} is looked at in more than one element"
            else:
                # A string like the other kinds, because JAX sorts the keys of dictionaries.
                kind = self._kinds.get(value, f"evaluated {len(wide)}")
                wide[kind] = value
        if any(self.program.size(n) != size for n in (*component.results, *wide.values())):
            return "a result has another shape than its parameter"
        operations.sort(key=lambda operation: operation.outputs)
        kinds = [self._kind(n) for n in component.results]
        named = dict(zip(kinds, results, strict=True))
        produced = dict(zip(kinds, component.results, strict=True))
        found = ElementwiseUpdate(
            tuple(operations), states, wide, tuple(scalars), after, named, produced
        )
        return dataclasses.replace(found, signature=self._signature(found))

    def _touched(self) -> dict[int, frozenset[int]]:
        """Returns, for each value, the coded parameters whose state it depends on."""
        owners = {self._states[x.index]: frozenset([x.parameter]) for x in self._plan.leaves}
        for operation in self.program.operations:
            found = frozenset().union(*(owners.get(n, frozenset()) for n in operation.inputs))
            if found:
                owners |= dict.fromkeys(operation.outputs, found)
        return owners

    def _kind(self, result: int) -> Hashable:
        """Returns the kind of a result: an update, or the slot of an unquantized leaf."""
        if result in self.updates:
            return "update"
        return next(x.slot for x in self._plan.exact if self.leaves[x.index] == result)

    def _is_elementwise(self, operation: Operation, size: int) -> bool:
        sizes = {self.program.size(n) for n in operation.inputs} - {1}
        is_known = operation.name in _ELEMENTWISE | _RESHAPES
        return is_known and sizes <= {size} and self.program.size(operation.outputs[0]) == size

    def _scalar(self, value: int) -> int:
        """Returns the scalar of which a value is a broadcast; the value itself if it is none."""
        operation = self.program.makers.get(value)
        while operation is not None and operation.name in _RESHAPES:
            if self.program.size(operation.inputs[0]) != 1:
                break
            value = operation.inputs[0]
            operation = self.program.makers.get(value)
        return value

    def _signature(self, update_fn: ElementwiseUpdate) -> Hashable:
        names: dict[int, Hashable] = {n: ("scalar", n) for n in update_fn.scalars}
        names |= {n: ("wide", kind) for kind, n in update_fn.wide.items()}
        names |= {n: ("state", i) for i, n in enumerate(update_fn.states)}

        def name(value: int) -> Hashable:
            dtype = str(self.program.specs[value].dtype)
            return names.setdefault(value, (len(names), dtype))

        steps = []
        for operation in update_fn.operations:
            inputs = tuple(map(name, operation.inputs))
            # A shape does not affect the result of an element.
            params = () if operation.name in _RESHAPES else sorted(operation.params.items())
            params = tuple((k, str(v)) for k, v in params)
            steps.append((operation.name, params, inputs, tuple(map(name, operation.outputs))))
        results = tuple((kind, name(n)) for kind, n in update_fn.results.items())
        return tuple(steps), tuple(map(name, update_fn.after)), results


def elementwise_by_group(
    traced: TracedUpdate, plan: Plan
) -> tuple[dict[int, list[ElementwiseUpdate]], dict[str, str]]:
    """Finds the groups in which the update of every parameter is element-wise.

    Returns:
        The updates by the number of the group, in the order of its parameters; and, by the path of each
        other parameter, the reason why its state is decoded at once.
    """
    found = {c.parameters: traced.elementwise(c) for c in traced.components()}
    update_fns = {p: update_fn for own, update_fn in found.items() for p in own}
    elementwise, reasons = {}, {}
    for number, group in enumerate(plan.groups):
        own = [update_fns[p] for p in group.parameters]
        why = [update_fn for update_fn in own if isinstance(update_fn, str)]
        if not why and not _are_alike(traced, own):
            why = ["its results or operands have other types than its neighbours'"]
        if not why:
            elementwise[number] = own
            continue
        for leaf, update_fn in zip(group.leaves[0], own, strict=True):
            reasons[leaf.path] = (
                update_fn if isinstance(update_fn, str) else f"as its neighbours: {why[0]}"
            )
    return elementwise, reasons


def _are_alike(traced: TracedUpdate, update_fns: Sequence[Any]) -> bool:
    """Returns whether operands and results have the same types in all updates and can be concatenated."""
    dtypes: dict[Hashable, set[Any]] = {}
    for update_fn in update_fns:
        for kind, value in update_fn.wide.items():
            dtypes.setdefault(kind, set()).add(traced.program.specs[value].dtype)
    results = {
        tuple((k, traced.program.specs[n].dtype) for k, n in update_fn.results.items())
        for update_fn in update_fns
    }
    return len(results) == 1 and all(len(found) == 1 for found in dtypes.values())

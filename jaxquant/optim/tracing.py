"""Trace a function into a flat list of operations on numbered values, with equal operations merged.

Calls are inlined and branches become selections, so dependencies can be read off and parts can be evaluated
separately.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np
from jax.extend import core

_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat")
_CALLS += ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """A primitive with its parameters, and the numbers of its operands and results."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.primitive.name

    def bind(self, *operands: Any) -> Sequence[Any]:
        """Evaluates the operation; returns the results as a list."""
        found = self.primitive.bind(*operands, **self.params)
        return found if self.primitive.multiple_results else [found]


class Program:
    """A traced function.

    Attributes:
        operations: the operations, in an order of evaluation.
        inputs: the numbers of the arguments' leaves.
        outputs: the numbers of the results' leaves.
        constants: the known values, by number.
        specs: shape and type of every value.
        makers: the operation that gives a value, by number.

    >>> program = Program(lambda x: (x * 2.0, x * 2.0 + 1.0), np.ones(3))
    >>> [o.name for o in program.operations], len(program.outputs)
    (['mul', 'add'], 2)
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.operations: list[Operation] = []
        self.constants: dict[int, Any] = {}
        self.specs: list[jax.ShapeDtypeStruct] = []
        self.makers: dict[int, Operation] = {}
        self._known: dict[Any, tuple[int, ...]] = {}
        closed = jax.make_jaxpr(function)(*arguments)
        self.inputs = [self._new(v.aval) for v in closed.jaxpr.invars]
        self.outputs = self._inline(closed.jaxpr, closed.consts, self.inputs)

    def size(self, value: int) -> int:
        """Returns the number of elements of a value."""
        return int(np.prod(self.specs[value].shape, dtype=np.int64))

    def is_zero(self, value: int) -> bool:
        """Returns whether a value is zero for all arguments: a constant, or its broadcast."""
        maker = self.makers.get(value)
        while maker is not None and maker.name in ("broadcast_in_dim", "convert_element_type"):
            value = maker.inputs[0]
            maker = self.makers.get(value)
        return value in self.constants and not np.any(self.constants[value])

    def needed(self, values: Iterable[int], given: Set[int]) -> list[Operation]:
        """Returns the operations, in order, that compute some values from those that are given."""
        wanted, kept = set(values) - given, []
        for operation in reversed(self.operations):
            if wanted & set(operation.outputs):
                kept.append(operation)
                wanted |= set(operation.inputs) - given
        return kept[::-1]

    def evaluate(self, values: Iterable[int], known: Mapping[int, Any]) -> dict[int, Any]:
        """Returns the known values together with the requested ones and all intermediate ones."""
        env = {**self.constants, **known}
        for operation in self.needed(values, env.keys()):
            results = operation.bind(*(env[i] for i in operation.inputs))
            env.update(zip(operation.outputs, results, strict=True))
        return env

    def _new(self, aval: Any) -> int:
        self.specs.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return len(self.specs) - 1

    def _constant(self, value: Any, aval: Any, key: Any) -> int:
        if key not in self._known:
            self._known[key] = (self._new(aval),)
            self.constants[self._known[key][0]] = value
        return self._known[key][0]

    def _add(self, primitive: Any, params: dict, inputs: Sequence[int], avals: Any) -> Any:
        chosen = tuple((k, type(v), _hashable(v)) for k, v in sorted(params.items()))
        key = (primitive, chosen, tuple(inputs))
        if key not in self._known:
            outputs = tuple(self._new(aval) for aval in avals)
            operation = Operation(primitive, params, tuple(inputs), outputs)
            self.operations.append(operation)
            self.makers |= dict.fromkeys(outputs, operation)
            self._known[key] = outputs
        return self._known[key]

    def _inline(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[int]) -> list[int]:
        numbers = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, value in zip(jaxpr.constvars, consts, strict=True):
            numbers[variable] = self._constant(value, variable.aval, ("const", id(value)))

        def read(variable: Any) -> int:
            if not isinstance(variable, core.Literal):
                return numbers[variable]
            key = (str(variable.aval), np.asarray(variable.val).tobytes())
            return self._constant(variable.val, variable.aval, key)

        for equation in jaxpr.eqns:
            found = self._equation(equation, [read(v) for v in equation.invars])
            numbers |= dict(zip(equation.outvars, found, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[int]) -> Sequence[int]:
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            return self._inline(*_body(params), inputs)
        if name != "cond":
            avals = [v.aval for v in equation.outvars]
            return self._add(equation.primitive, params, inputs, avals)
        # Both branches are pure, so each is evaluated and the index selects among the results.
        index, *rest = inputs
        branches = [self._inline(b.jaxpr, b.consts, rest) for b in params["branches"]]
        outputs = []
        for variable, *choices in zip(equation.outvars, *branches, strict=True):
            alike = len(set(choices)) == 1
            select = (jax.lax.select_n_p, {}, [index, *choices], [variable.aval])
            outputs.append(choices[0] if alike else self._add(*select)[0])
        return outputs


def _body(params: dict[str, Any]) -> tuple[Any, Sequence[Any]]:
    inner = next(params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params)
    return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())


def _hashable(value: Any) -> Any:
    """Returns the value if it is hashable; else its identity."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value

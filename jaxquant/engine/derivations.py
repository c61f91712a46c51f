"""Derivations: how a product's weight is computed from parameters alone, so that it can be recomputed.

A model multiplies by its parameters as they are, or transposed, cast, masked, or by one layer's part of
them in each turn of a scan.  A derivation says which, so that the weight can be found without a run.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

# What an equation is told that says where arrays lie, and nothing of their numbers.
_PLACES = frozenset({"sharding", "out_sharding", "weak_type", "name", "dst_sharding"})


@dataclasses.dataclass
class At:
    """Where a derivation is evaluated: the parameters by path, and the turn of each scan."""

    parameters: Mapping[str, Any]
    turns: dict[int, Any] = dataclasses.field(default_factory=dict)
    known: dict[int, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Derivation:
    """A value that parameters alone determine.

    Attributes:
        key: what is done to which parameters, in words: equal for equal derivations, also of another trace.
        paths: of the parameters.
        turns: of the scans around it in which it differs from turn to turn: pairs (scan, length), where
            scans are counted from the outermost.
        compute: the value, without those that are known already.
        moved: where it is another one with its axes in another order: that, and the order.
    """

    key: str
    paths: frozenset[str]
    turns: tuple[tuple[int, int], ...]
    compute: Callable[[At], Any]
    moved: tuple["Derivation", tuple[int, ...]] | None = None

    @property
    def stored(self) -> "Derivation":
        """The value with its axes as the parameter has them."""
        return self if self.moved is None else self.moved[0]

    @property
    def order(self) -> tuple[int, ...] | None:
        """The order of these axes in the value; None where it is the same."""
        return None if self.moved is None else self.moved[1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Derivation) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def at(self, where: At) -> Any:
        """Returns the value in one turn of each scan."""
        if id(self) not in where.known:
            where.known[id(self)] = self.compute(where)
        return where.known[id(self)]

    def of(
        self,
        parameters: Mapping[str, Any],
        then: Callable[[jax.Array, Any], Any] = lambda x, _: x,
        data: Any = None,
    ) -> Any:
        """Returns `then` of the value; if the value differs from turn to turn, all turns stacked in front.

        Args:
            parameters: arrays by path.
            then: a function of one turn's value and data.
            data: more arrays, stacked likewise.
        """
        run = lambda turns, own: then(self.at(At(parameters, turns)), own)  # noqa: E731
        for scan, length in reversed(self.turns):
            run = _each(run, scan, length)
        return run({}, data)


def _each(run: Callable[[dict, Any], Any], scan: int, length: int) -> Callable[[dict, Any], Any]:
    each = lambda turns, i, own: run({**turns, scan: i}, own)  # noqa: E731
    return lambda turns, data: jax.vmap(lambda i, own: each(turns, i, own))(
        jnp.arange(length), data
    )


def parameter(path: str) -> Derivation:
    """Returns a parameter itself."""
    return Derivation(path, frozenset({path}), (), lambda where: where.parameters[path])


def constant(value: Any) -> Derivation | None:
    """Returns a number or an array of the function's own; None of one that is being traced."""
    if isinstance(value, Tracer):
        return None
    return Derivation(_literal_key(value), frozenset(), (), lambda _: value)


def turn_of(stacked: Derivation, scan: int, length: int) -> Derivation:
    """Returns the derivation of one turn's slice of a scan's input."""
    turns = tuple(sorted({*stacked.turns, (scan, length)}))

    def compute(where: At) -> Any:
        return jax.lax.dynamic_index_in_dim(stacked.at(where), where.turns[scan], keepdims=False)

    return Derivation(f"turn({stacked.key})", stacked.paths, turns, compute)


def derive(
    equation: core.JaxprEqn, operands: Sequence[Derivation], run: Callable[..., Sequence[Any]]
) -> list[Derivation]:
    """Returns the results of an equation.

    Args:
        equation: of a trace.
        operands: where each of its operands comes from.
        run: the equation, of operands.
    """
    name = equation.primitive.name
    params = {k: v for k, v in equation.params.items() if k not in _PLACES and v is not None}
    said = ",".join(f"{k}={_literal_key(v)}" for k, v in params.items())
    key = f"{name}[{said}]({','.join(d.key for d in operands)})"
    if len(key) > 400:  # what is long is known by its digest
        key = f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"
    paths = frozenset().union(*(d.paths for d in operands))
    turns = tuple(sorted({turn for d in operands for turn in d.turns}))
    whole = Derivation(key, paths, turns, lambda where: run(*(d.at(where) for d in operands)))

    def part(index: int) -> Derivation:
        of = f"{key}#{index}" if len(equation.outvars) > 1 else key
        return Derivation(of, paths, turns, lambda where: whole.at(where)[index], moved)

    moved = _transposition(equation, operands[0], run) if operands else None
    if moved is not None and list(moved[1]) == sorted(moved[1]):
        return [moved[0]]  # moved there and back

    return [part(index) for index in range(len(equation.outvars))]


def _transposition(
    equation: core.JaxprEqn, operand: Derivation, run: Callable[..., Sequence[Any]]
) -> tuple[Derivation, tuple[int, ...]] | None:
    """Returns (operand, permutation) if an equation transposes an operand, or casts a transposed one."""
    name = equation.primitive.name
    if name == "transpose":
        order = tuple(equation.params["permutation"])
        if operand.moved is not None:
            order = tuple(operand.moved[1][a] for a in order)
        return operand.stored, order
    if name == "convert_element_type" and operand.moved is not None:
        return derive(equation, [operand.moved[0]], run)[0], operand.moved[1]
    return None


def _literal_key(value: Any) -> str:
    """Returns a text that identifies a literal: equal for equal values; arrays by their digests."""
    if isinstance(value, tuple | list):
        return f"({','.join(map(_literal_key, value))})"
    if isinstance(value, core.ClosedJaxpr):
        # Newer JAX has one class for both, whose `jaxpr` is itself.
        return f"{_without_addresses(value.jaxpr)} with {_literal_key(value.consts)}"
    if isinstance(value, jax.Array | np.ndarray | np.generic) and not isinstance(value, Tracer):
        array = np.asarray(value)
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        content = repr(array.item()) if array.ndim == 0 else digest
        return f"{array.dtype}{list(array.shape)}:{content}"
    if isinstance(value, Tracer):  # of which nothing is known, so that it is like no other
        return f"{value} {id(value)}"
    return _without_addresses(value)


def _without_addresses(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))

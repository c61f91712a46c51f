"""Every product of a trace, with the parameter that feeds it: the trace is read, and nothing is computed."""

import dataclasses
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxquant.engine.origins import CONSTANT, Origin, common, joined, through
from jaxquant.engine.products import KINDS, Product

# What is found of each equation: a product, what is found within its own functions, or nothing.
Found = Product | list["Found"] | None
# Calls that are entered in place, by the name of the primitive.
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
# Calls whose function is rebuilt as it was.
REBUILT = frozenset({"remat2", "checkpoint", "remat", "scan", "while", "cond", "shard_map"})
_PYTHON = sysconfig.get_path("stdlib")
_OURS = str(Path(__file__).parent.parent)


@dataclasses.dataclass(frozen=True)
class Where:
    """Where an equation stands: how often it runs, in which scopes, and why nothing there can be replaced."""

    times: int = 1
    scope: str = ""
    unreached: str = ""


def opened(function: core.ClosedJaxpr | core.Jaxpr) -> tuple[core.Jaxpr, Sequence[Any]]:
    """A function that an equation holds, and its constants; which ones are closed differs by version."""
    if isinstance(function, core.ClosedJaxpr):
        return function.jaxpr, function.consts
    return function, ()


def scan_places(settings: dict[str, Any]) -> tuple[int, int]:
    """Where among a scan's operands what is carried begins and ends."""
    if "ft_in" in settings:  # since jax 0.12
        constants, carried, _ = map(len, settings["ft_in"].unpack())
        return constants, constants + carried
    return settings["num_consts"], settings["num_consts"] + settings["num_carry"]


def inner(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """The functions that an equation holds, in order."""
    found = []
    for value in equation.params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, core.ClosedJaxpr | core.Jaxpr):
                found.append(opened(x)[0])
    return found


def holds_products(equation: core.JaxprEqn) -> bool:
    """Whether an equation is a product, or holds one however deep."""
    if equation.primitive.name in KINDS:
        return True
    return any(holds_products(e) for jaxpr in inner(equation) for e in jaxpr.eqns)


def found_in(
    jaxpr: core.Jaxpr, origins: Sequence[Origin], where: Where = Where()
) -> tuple[list[Found], list[Origin]]:
    """What is found of each equation of a trace, and where its results come from.

    Args:
        jaxpr: a trace.
        origins: of its inputs.
        where: it stands within another.

    Raises:
        ValueError: gradients within the function, whose products are none of the model's own.
    """
    known: dict[core.Var, Origin] = dict(zip(jaxpr.invars, origins, strict=True))

    def origin(v: Any) -> Origin:
        if isinstance(v, core.Literal):
            return Origin(is_nonnegative=bool(np.all(np.asarray(v.val) >= 0)))
        return known.get(v, CONSTANT)

    found: list[Found] = []
    for equation in jaxpr.eqns:
        operands = [origin(v) for v in equation.invars]
        what, results = _of_equation(equation, operands, where)
        found.append(what)
        known.update(zip(equation.outvars, results, strict=True))
    return found, [origin(v) for v in jaxpr.outvars]


def _of_equation(
    equation: core.JaxprEqn, operands: list[Origin], where: Where
) -> tuple[Found, list[Origin]]:
    name = equation.primitive.name
    where = dataclasses.replace(where, scope=_scope(where.scope, equation))
    if name in KINDS:
        product = _product(equation, operands, where)
        # What a weight fed is of that weight; what none did is still of those above.
        nearest = joined(operands[:2]).nearest
        if product.weight is not None:
            nearest = operands[product.weight].nearest
        result = dataclasses.replace(joined(operands[:2]), nearest=nearest)
        return product, [result]
    if not holds_products(equation):
        return None, [through(name, operands, equation.params)] * len(equation.outvars)
    if name in CALLS:
        return found_in(inner(equation)[0], operands, where)
    if name not in REBUILT and not where.unreached:
        where = dataclasses.replace(where, unreached=f"it is within {name}")
    return _FUNCTIONS.get(name, _of_other)(equation, operands, where)


def _product(equation: core.JaxprEqn, operands: list[Origin], where: Where) -> Product:
    weights = [i for i in (1, 0) if operands[i].is_weight]
    weight = weights[0] if weights else None
    pair = operands[:2] if weight is None else [operands[weight]]
    positive = [i for i in (0, 1) if operands[i].is_nonnegative and operands[i].is_input]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in _types(equation)]
    return Product(
        common(sorted(joined(pair).nearest)),
        KINDS[equation.primitive.name],
        weight,
        positive[0] if len(positive) == 1 else None,
        tuple(shapes[:-1]),
        dict(equation.params) | {"result": shapes[-1]},
        where.times,
        _source(equation),
        where.scope,
        where.unreached,
        not all(o.is_input or o.is_weight for o in operands[:2]),
        () if weight is None else tuple(sorted(operands[weight].nearest)),
    )


def _types(equation: core.JaxprEqn) -> list[Any]:
    """Of a product's operands, and of its result."""
    return [v.aval for v in (*equation.invars, *equation.outvars)]


def _scope(outer: str, equation: core.JaxprEqn) -> str:
    own = str(equation.source_info.name_stack)
    if "transpose(" in own and holds_products(equation):
        raise ValueError(
            "the function takes gradients, whose products are not the model's: give the function that is "
            "differentiated, and take the gradient of what comes back"
        )
    return "/".join(part for part in (outer, own) if part)


def _source(equation: core.JaxprEqn) -> str:
    """The innermost line that is none of a library's."""
    traceback = equation.source_info.traceback
    for frame in () if traceback is None else traceback.frames:
        name = frame.file_name
        if "site-packages" not in name and not name.startswith((_PYTHON, _OURS, "<")):
            return f"{Path(name).name}:{frame.line_num}"
    return ""


# ---------------------------------------------------------------------------------------------------
# Equations that hold functions


def _of_remat(equation: core.JaxprEqn, operands: list[Origin], where: Where) -> Any:
    found, results = found_in(inner(equation)[0], operands, where)
    return [found], results


def _of_scan(equation: core.JaxprEqn, operands: list[Origin], where: Where) -> Any:
    settings = equation.params
    where = dataclasses.replace(where, times=where.times * settings["length"])
    first, last = scan_places(settings)
    carry = operands[first:last]
    while True:
        given = [*operands[:first], *carry, *operands[last:]]
        found, results = found_in(opened(settings["jaxpr"])[0], given, where)
        grown = _grown(carry, results[: last - first])
        if grown == carry:
            return [found], [*carry, *results[last - first :]]
        carry = grown


def _of_while(equation: core.JaxprEqn, operands: list[Origin], where: Where) -> Any:
    settings = equation.params
    first = settings["cond_nconsts"]
    last = first + settings["body_nconsts"]
    carry = operands[last:]
    while True:
        body, results = found_in(
            opened(settings["body_jaxpr"])[0], [*operands[first:last], *carry], where
        )
        grown = _grown(carry, results)
        if grown == carry:
            break
        carry = grown
    test, _ = found_in(opened(settings["cond_jaxpr"])[0], [*operands[:first], *carry], where)
    return [test, body], carry


def _of_cond(equation: core.JaxprEqn, operands: list[Origin], where: Where) -> Any:
    branches = [found_in(opened(b)[0], operands[1:], where) for b in equation.params["branches"]]
    results = branches[0][1]
    for _, others in branches[1:]:
        results = _grown(results, others)
    return [found for found, _ in branches], results


def _of_other(equation: core.JaxprEqn, operands: list[Origin], where: Where) -> Any:
    """A call that is not entered: its products are listed, with the reason."""
    whole = joined(operands)
    found = []
    for jaxpr in inner(equation):
        is_alike = len(jaxpr.invars) == len(operands)
        given = operands if is_alike else [whole] * len(jaxpr.invars)
        found.append(found_in(jaxpr, given, where)[0])
    return found, [whole] * len(equation.outvars)


def _grown(some: Sequence[Origin], others: Sequence[Origin]) -> list[Origin]:
    """Origins of values that are one or the other."""
    return [
        dataclasses.replace(
            joined([a, b]),
            is_weight=a.is_weight and b.is_weight,
            is_nonnegative=a.is_nonnegative and b.is_nonnegative,
        )
        for a, b in zip(some, others, strict=True)
    ]


_FUNCTIONS = {
    **dict.fromkeys(("remat2", "checkpoint", "remat", "shard_map"), _of_remat),
    "scan": _of_scan,
    "while": _of_while,
    "cond": _of_cond,
}


def flat(found: Sequence[Found]) -> Iterator[Product]:
    """The products in what was found, in the order of the trace."""
    for x in found:
        if isinstance(x, Product):
            yield x
        elif x is not None:
            yield from flat(x)

"""A trace computed again, with others in the place of some products, which may take and give more."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import PartitionSpec

from jaxquant.engine.analysis import CALLS, evaluate_equation, scan_places, split_closed_jaxpr

# For each equation: what takes a product's place, such a list for each function that it holds, or None.
Given = Any
Data = dict[int, Any]


@dataclasses.dataclass(frozen=True)
class Use:
    """A replacement of a product.

    Attributes:
        index: which product's.
        apply: (the result, what is recorded or None), from what it is given or None, its tap or None, and
            the operands.  A result of None leaves the product as it is; a tuple is other operands of the
            same product.
        scans: those in each turn of which it is given another part, counted from the outermost.
    """

    index: int
    apply: Callable[..., tuple[jax.Array | tuple[jax.Array, ...] | None, Any]]
    scans: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Within:
    """The inputs of the replacements, and the number of scans around them.

    Attributes:
        data: by their indices.
        scans: around them.
        taps: by their indices, with an axis in front for each scan.
    """

    data: Mapping[int, Any]
    scans: int = 0
    taps: Mapping[int, Any] = dataclasses.field(default_factory=dict)


def evaluate(
    function: core.ClosedJaxpr | core.Jaxpr,
    arguments: Sequence[Any],
    given: Sequence[Given],
    within: Within = Within({}),
) -> tuple[list[Any], Data]:
    """Returns the results of a trace, and what its products recorded, by their numbers.

    What is recorded within a scan is stacked along a first axis; in a cond, what the branches that are not
    taken would have recorded is zeros.

    Args:
        function: a trace.
        arguments: what it takes.
        given: for each equation.
        within: what the products are given by their numbers, stacked likewise where they say so.

    Raises:
        ValueError: records of a while loop or a shard_map.
    """
    jaxpr, consts = split_closed_jaxpr(function)
    values: dict[core.Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    records: Data = {}

    def read(v: Any) -> Any:
        return v.val if isinstance(v, core.Literal) else values[v]

    for equation, own in zip(jaxpr.eqns, given, strict=True):
        operands = [read(v) for v in equation.invars]
        if any(True for _ in uses(own)):
            with jax.named_scope(str(equation.source_info.name_stack) or equation.primitive.name):
                results, found = _replace(equation, operands, own, within)
            records.update(found)
        else:
            results = evaluate_equation(equation, operands, jaxpr.debug_info)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars], records


def uses(given: Given) -> Iterator[Use]:
    """Yields all replacements."""
    if isinstance(given, list):
        for each in given:
            yield from uses(each)
    elif given is not None:
        yield given


def _replace(
    equation: core.JaxprEqn, operands: list[Any], given: Given, within: Within
) -> tuple[Sequence[Any], Data]:
    if isinstance(given, Use):
        own = within.data.get(given.index), within.taps.get(given.index)
        result, record = given.apply(*own, *operands)
        records = {} if record is None else {given.index: record}
        if result is None or isinstance(result, tuple):
            taken = operands if result is None else result
            return [equation.primitive.bind(*taken, **equation.params)], records
        return [_fitting(equation, result)], records
    if equation.primitive.name in CALLS:
        return _inline(equation, operands, given, within)
    return _FUNCTIONS[equation.primitive.name](equation, operands, given, within)


def _fitting(equation: core.JaxprEqn, result: Any) -> jax.Array:
    wanted: Any = equation.outvars[0].aval
    if result.shape != wanted.shape:
        raise ValueError(
            f"what takes the place of {equation.primitive.name} gives {result.shape}, not {wanted.shape}"
        )
    return result.astype(wanted.dtype)


def _inline(equation: core.JaxprEqn, operands: list[Any], given: Given, within: Within) -> Any:
    """Returns a jitted function within, as a part of the whole; where its arrays are to lie is kept."""
    settings = equation.params
    function = settings["jaxpr"] if "jaxpr" in settings else settings["call_jaxpr"]
    places = settings.get("in_shardings", ()), settings.get("out_shardings", ())
    results, records = evaluate(function, _constrain(operands, places[0]), given, within)
    return _constrain(results, places[1]), records


def _constrain(arrays: Sequence[Any], places: Sequence[Any]) -> list[Any]:
    if not places:
        return list(arrays)
    return [
        jax.lax.with_sharding_constraint(x, place)
        if isinstance(place, jax.sharding.Sharding)
        else x
        for x, place in zip(arrays, places, strict=True)
    ]


def _remat(equation: core.JaxprEqn, operands: list[Any], given: Given, within: Within) -> Any:
    settings = equation.params
    body = lambda *xs: evaluate(settings["jaxpr"], xs, given[0], within)  # noqa: E731
    options = {"policy": settings["policy"], "prevent_cse": settings["prevent_cse"]}
    return jax.checkpoint(body, **options)(*operands)


def _scan(equation: core.JaxprEqn, operands: list[Any], given: Given, within: Within) -> Any:
    settings = equation.params
    first, last = scan_places(settings)
    stacked = {use.index for use in uses(given) if within.scans in use.scans}
    sliced = {index: x for index, x in within.data.items() if index in stacked}
    inner = {use.index for use in uses(given)}
    taps = {index: x for index, x in within.taps.items() if index in inner}

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        own, parts, taps = x
        inside = Within({**within.data, **parts}, within.scans + 1, taps)
        arguments = [*operands[:first], *carry, *own]
        results, records = evaluate(settings["jaxpr"], arguments, given[0], inside)
        return results[: last - first], (results[last - first :], records)

    options = {k: settings[k] for k in ("length", "reverse", "unroll")}
    turns = (operands[last:], sliced, taps)
    carry, (results, records) = jax.lax.scan(body, operands[first:last], turns, **options)
    return [*carry, *results], records


def _while(equation: core.JaxprEqn, operands: list[Any], given: Given, within: Within) -> Any:
    settings = equation.params
    first = settings["cond_nconsts"]
    last = first + settings["body_nconsts"]

    def run(name: str, consts: list[Any], own: Given, carry: Sequence[Any]) -> list[Any]:
        results, records = evaluate(settings[name], [*consts, *carry], own, within)
        _no_records(records, "a while loop")
        return results

    test = functools.partial(run, "cond_jaxpr", operands[:first], given[0])
    body = functools.partial(run, "body_jaxpr", operands[first:last], given[1])
    return jax.lax.while_loop(lambda carry: test(carry)[0], body, operands[last:]), {}


def _cond(equation: core.JaxprEqn, operands: list[Any], given: Given, within: Within) -> Any:
    branches = [
        functools.partial(lambda b, own, *xs: evaluate(b, xs, own, within), branch, own)
        for branch, own in zip(equation.params["branches"], given, strict=True)
    ]
    if len(branches) == 1:
        return branches[0](*operands[1:])
    blank = {}
    for branch in branches:
        blank |= jax.eval_shape(branch, *operands[1:])[1]

    def whole(branch: Any, *xs: Any) -> Any:
        results, records = branch(*xs)
        others = {k: v for k, v in blank.items() if k not in records}
        return results, records | jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), others)

    wholes = [functools.partial(whole, branch) for branch in branches]
    return jax.lax.switch(operands[0], wholes if blank else branches, *operands[1:])


def _shard_map(equation: core.JaxprEqn, operands: list[Any], given: Given, within: Within) -> Any:
    settings = equation.params
    inside = {use.index for use in uses(given)}
    data = {index: x for index, x in within.data.items() if index in inside}

    def body(data: Data, *xs: Any) -> tuple[Any, ...]:
        within_ = dataclasses.replace(within, data=data)
        results, records = evaluate(settings["jaxpr"], xs, given[0], within_)
        _no_records(records, "a shard_map")
        return tuple(results)

    manual = "newly_manual_axes" if "newly_manual_axes" in settings else "manual_axes"
    mapped = jax.shard_map(
        body,
        mesh=settings["mesh"],
        in_specs=(PartitionSpec(), *settings["in_specs"]),
        out_specs=tuple(settings["out_specs"]),
        check_vma=settings["check_vma"],
        axis_names=settings[manual],
    )
    return mapped(data, *operands), {}


def _no_records(records: Data, where: str) -> None:
    if records:
        raise ValueError(f"a product within {where} records nothing, since its turns are not known")


_FUNCTIONS = {
    **dict.fromkeys(("remat2", "checkpoint", "remat"), _remat),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}

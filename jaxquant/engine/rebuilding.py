"""A trace computed again, with other products in the place of some."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxquant.engine.analysis import CALLS, opened, scan_places
from jaxquant.engine.products import KINDS

# For each equation: what takes a product's place, such a list for each function that it holds, or None.
Given = Any


def computed(
    function: core.ClosedJaxpr | core.Jaxpr, arguments: Sequence[Any], given: Sequence[Given]
) -> list[Any]:
    """The results of a trace.

    Args:
        function: a trace.
        arguments: what it takes.
        given: for each equation.
    """
    jaxpr, consts = opened(function)
    values: dict[core.Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, core.Literal) else values[v]

    for equation, own in zip(jaxpr.eqns, given, strict=True):
        operands = [read(v) for v in equation.invars]
        results = _results(equation, operands, own, jaxpr.debug_info)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _results(
    equation: core.JaxprEqn, operands: list[Any], given: Given, names: Any
) -> Sequence[Any]:
    if not _is_given(given):
        return _alone(equation, operands, names)
    name = equation.primitive.name
    with jax.named_scope(str(equation.source_info.name_stack) or name):
        if name in KINDS:
            return [_product(equation, operands, given)]
        if name in CALLS:
            return _entered(equation, operands, given)
        return _FUNCTIONS[name](equation, operands, given)


def _is_given(given: Given) -> bool:
    return any(map(_is_given, given)) if isinstance(given, list) else given is not None


def _alone(equation: core.JaxprEqn, operands: list[Any], names: Any) -> list[Any]:
    """An equation as it was, with its own derivatives."""
    variables = [v for v in equation.invars if not isinstance(v, core.Literal)]
    once = list(dict.fromkeys(variables))
    results = ("",) * len(equation.outvars)
    names = names._replace(arg_names=("",) * len(once), result_paths=results)
    one = core.Jaxpr((), once, equation.outvars, [equation], equation.effects, names)
    pairs = zip(equation.invars, operands, strict=True)
    values = {v: x for v, x in pairs if not isinstance(v, core.Literal)}
    return core.jaxpr_as_fun(core.ClosedJaxpr(one, ()))(*(values[v] for v in once))


def _product(equation: core.JaxprEqn, operands: list[Any], replacement: Callable[..., Any]) -> Any:
    wanted: Any = equation.outvars[0].aval
    result = replacement(*operands)
    if result.shape != wanted.shape:
        raise ValueError(
            f"what takes the place of {equation.primitive.name} gives {result.shape}, not {wanted.shape}"
        )
    return result.astype(wanted.dtype)


def _entered(equation: core.JaxprEqn, operands: list[Any], given: Given) -> list[Any]:
    """A jitted function within, as a part of the whole; where its arrays are to lie is kept."""
    settings = equation.params
    function = settings["jaxpr"] if "jaxpr" in settings else settings["call_jaxpr"]
    places = settings.get("in_shardings", ()), settings.get("out_shardings", ())
    results = computed(function, _put(operands, places[0]), given)
    return _put(results, places[1])


def _put(arrays: Sequence[Any], places: Sequence[Any]) -> list[Any]:
    if not places:
        return list(arrays)
    return [
        jax.lax.with_sharding_constraint(x, place)
        if isinstance(place, jax.sharding.Sharding)
        else x
        for x, place in zip(arrays, places, strict=True)
    ]


def _remat(equation: core.JaxprEqn, operands: list[Any], given: Given) -> Any:
    settings = equation.params
    body = lambda *xs: computed(settings["jaxpr"], xs, given[0])  # noqa: E731
    options = {"policy": settings["policy"], "prevent_cse": settings["prevent_cse"]}
    return jax.checkpoint(body, **options)(*operands)


def _scan(equation: core.JaxprEqn, operands: list[Any], given: Given) -> Any:
    settings = equation.params
    first, last = scan_places(settings)

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        results = computed(settings["jaxpr"], [*operands[:first], *carry, *x], given[0])
        return results[: last - first], results[last - first :]

    options = {k: settings[k] for k in ("length", "reverse", "unroll")}
    carry, results = jax.lax.scan(body, operands[first:last], operands[last:], **options)
    return [*carry, *results]


def _while(equation: core.JaxprEqn, operands: list[Any], given: Given) -> Any:
    settings = equation.params
    first = settings["cond_nconsts"]
    last = first + settings["body_nconsts"]

    def run(name: str, consts: list[Any], own: Given, carry: Sequence[Any]) -> list[Any]:
        return computed(settings[name], [*consts, *carry], own)

    test = functools.partial(run, "cond_jaxpr", operands[:first], given[0])
    body = functools.partial(run, "body_jaxpr", operands[first:last], given[1])
    return jax.lax.while_loop(lambda carry: test(carry)[0], body, operands[last:])


def _cond(equation: core.JaxprEqn, operands: list[Any], given: Given) -> Any:
    branches = [
        functools.partial(lambda b, own, *xs: computed(b, xs, own), branch, own)
        for branch, own in zip(equation.params["branches"], given, strict=True)
    ]
    return jax.lax.switch(operands[0], branches, *operands[1:])


def _shard_map(equation: core.JaxprEqn, operands: list[Any], given: Given) -> Any:
    settings = equation.params
    body = lambda *xs: tuple(computed(settings["jaxpr"], xs, given[0]))  # noqa: E731
    manual = "newly_manual_axes" if "newly_manual_axes" in settings else "manual_axes"
    return jax.shard_map(
        body,
        mesh=settings["mesh"],
        in_specs=tuple(settings["in_specs"]),
        out_specs=tuple(settings["out_specs"]),
        check_vma=settings["check_vma"],
        axis_names=settings[manual],
    )(*operands)


_FUNCTIONS = {
    **dict.fromkeys(("remat2", "checkpoint", "remat"), _remat),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}

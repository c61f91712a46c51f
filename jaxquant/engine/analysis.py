"""Find every product of a trace and the parameter that feeds it.  The trace is read; nothing is computed."""

import dataclasses
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.extend import core

from jaxquant.engine import derivations, scores
from jaxquant.engine.origins import CONSTANT, Origin, common, join, through
from jaxquant.engine.products import KINDS, Product


class TakesGradients(ValueError):
    """A function takes gradients itself."""


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
    """The context of an equation.

    Attributes:
        reads: collects the paths of parameters that something else than a product reads, and on which line.
        keys: collects which operand of a product of queries and keys has the keys, by its own number.
        times: how often it runs.
        turns: lengths of the scans around it, the outermost first.
        scope: the named scopes around it.
        unreached: why nothing there can be replaced.
        enclosed: what it is within, whose turns or parts are not known.
        names: the debugging information of the trace that it is of.
    """

    reads: dict[str, str] = dataclasses.field(compare=False)
    keys: dict[int, int] = dataclasses.field(compare=False, default_factory=dict)
    times: int = 1
    turns: tuple[int, ...] = ()
    scope: str = ""
    unreached: str = ""
    enclosed: str = ""
    names: Any = None

    def tried(self) -> "Where":
        """Returns a copy with separate notes, for a trial pass over a carry of unknown origins."""
        return dataclasses.replace(self, reads={})

    def notes(self, read: Sequence[Origin], line: str) -> None:
        """Records parameters that an equation other than a product reads."""
        for path in (path for o in read if o.is_weight for path in o.nearest):
            self.reads.setdefault(path, line)


def split_closed_jaxpr(function: core.ClosedJaxpr | core.Jaxpr) -> tuple[core.Jaxpr, Sequence[Any]]:
    """Returns an equation's function and its constants; JAX versions differ in which functions are closed."""
    if isinstance(function, core.ClosedJaxpr):
        return function.jaxpr, function.consts
    return function, ()


def scan_places(settings: dict[str, Any]) -> tuple[int, int]:
    """Returns where a scan's carry begins and ends among its operands."""
    if "ft_in" in settings:  # since jax 0.12
        constants, carried, _ = map(len, settings["ft_in"].unpack())
        return constants, constants + carried
    return settings["num_consts"], settings["num_consts"] + settings["num_carry"]


def inner(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """Returns the functions that an equation holds, in order."""
    found = []
    for value in equation.params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, core.ClosedJaxpr | core.Jaxpr):
                found.append(split_closed_jaxpr(x)[0])
    return found


def holds_products(equation: core.JaxprEqn) -> bool:
    """Returns whether an equation is a product, or holds one however deep."""
    if equation.primitive.name in KINDS:
        return True
    return any(holds_products(e) for jaxpr in inner(equation) for e in jaxpr.eqns)


def _holds_lookups(equation: core.JaxprEqn) -> bool:
    """Returns whether functions within it, which can be entered, may take rows of a table."""
    if equation.primitive.name == "gather":
        return True
    if equation.primitive.name not in CALLS | REBUILT:
        return False
    return any(_holds_lookups(e) for jaxpr in inner(equation) for e in jaxpr.eqns)


def is_lookup(equation: core.JaxprEqn, operands: Sequence[Origin]) -> bool:
    """Returns whether an equation takes whole rows of a parameter by integers that an input gives."""
    if equation.primitive.name != "gather" or not operands[0].is_weight:
        return False
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    table: Any = equation.invars[0].aval
    return (
        table.ndim > 1
        and operands[1].is_input
        and tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(sizes) == (1, *table.shape[1:])
    )


def analyze(
    function: core.ClosedJaxpr | core.Jaxpr, origins: Sequence[Origin], where: Where
) -> tuple[list[Found], list[Origin]]:
    """Finds the products of each equation of a trace, and the origins of the trace's results.

    Args:
        function: a trace.
        origins: of its inputs.
        where: it stands within another, and what gathers what is read.

    Raises:
        ValueError: gradients within the function, whose products are none of the model's own.
    """
    jaxpr, consts = split_closed_jaxpr(function)
    where = dataclasses.replace(where, names=jaxpr.debug_info)
    known: dict[core.Var, Origin] = dict(zip(jaxpr.invars, origins, strict=True))
    for v, value in zip(jaxpr.constvars, consts, strict=False):
        known[v] = Origin.constant(value)

    def origin(v: Any) -> Origin:
        return Origin.constant(v.val) if isinstance(v, core.Literal) else known.get(v, CONSTANT)

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
    where = dataclasses.replace(where, scope=_scope(where, equation))
    if name in KINDS:
        return _of_product(equation, operands, where)
    if is_lookup(equation, operands):
        result = join(operands)
        return _product(equation, operands, 0, where), [result]
    if (not holds_products(equation) and not _holds_lookups(equation)) or name == "gather":
        return None, _of_plain(equation, operands, where)
    if name in CALLS:
        return analyze(_function(equation), operands, where)
    if name not in REBUILT and not where.unreached:
        where = dataclasses.replace(where, unreached=f"it is within {name}")
    return _FUNCTIONS.get(name, _of_other)(equation, operands, where)


def _function(equation: core.JaxprEqn) -> Any:
    """Returns the function that a call holds, with its constants where it has some."""
    settings = equation.params
    return settings["jaxpr"] if "jaxpr" in settings else settings["call_jaxpr"]


def _of_plain(equation: core.JaxprEqn, operands: list[Origin], where: Where) -> list[Origin]:
    """Returns the origins of the results of an equation without products."""
    result = through(equation.primitive.name, operands, equation.params)
    if found := scores.through(equation, [o.scores for o in operands]):
        result = dataclasses.replace(result, scores=found)
    if result.is_input:
        where.notes(operands, _source(equation))
    elif result.derivation is None:
        parts = [o.derivation for o in operands]
        if not equation.effects and all(parts):
            run = lambda *xs: evaluate_equation(equation, xs, where.names)  # noqa: E731
            found = derivations.derive(equation, parts, run)  # pyright: ignore
            return [dataclasses.replace(result, derivation=d) for d in found]
        where.notes(operands, _source(equation))
    return [result] * len(equation.outvars)


def evaluate_equation(equation: core.JaxprEqn, operands: Sequence[Any], names: Any) -> list[Any]:
    """Returns an equation by itself, with its own derivatives.

    Args:
        equation: of a trace.
        operands: all of its, literals among them.
        names: the debugging information of the trace that it is of.
    """
    variables = [v for v in equation.invars if not isinstance(v, core.Literal)]
    once = list(dict.fromkeys(variables))
    results = ("",) * len(equation.outvars)
    names = names._replace(arg_names=("",) * len(once), result_paths=results)
    one = core.Jaxpr((), once, equation.outvars, [equation], equation.effects, names)
    pairs = zip(equation.invars, operands, strict=True)
    values = {v: x for v, x in pairs if not isinstance(v, core.Literal)}
    return core.jaxpr_as_fun(core.ClosedJaxpr(one, ()))(*(values[v] for v in once))


def _of_product(
    equation: core.JaxprEqn, operands: list[Origin], where: Where
) -> tuple[Found, list[Origin]]:
    weights = [i for i in (1, 0) if operands[i].is_weight]
    weight = weights[0] if weights else None
    where.notes([o for i, o in enumerate(operands) if i != weight], _source(equation))
    if weight is not None and operands[weight].derivation is None:
        where.notes([operands[weight]], _source(equation))
    product = _product(equation, operands, weight, where)
    # What a weight fed is of that weight; what none did is still of those above.
    if weight is not None:
        return product, [dataclasses.replace(join(operands[:2]), nearest=operands[weight].nearest)]
    probabilities = product.probabilities
    if probabilities is not None and (found := operands[probabilities].scores):
        side = scores.summed_side(equation, probabilities, found)
        where.keys.update({} if side is None else {found.product: side})
    return product, [dataclasses.replace(join(operands[:2]), scores=scores.of_product(equation))]


def _product(
    equation: core.JaxprEqn, operands: list[Origin], weight: int | None, where: Where
) -> Product:
    pair = operands[:2] if weight is None else [operands[weight]]
    positive = [i for i in (0, 1) if operands[i].is_nonnegative and operands[i].is_input]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in _types(equation)]
    return Product(
        _path(join(pair).nearest, weight),
        KINDS.get(equation.primitive.name, "lookup"),
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
        None if weight is None else operands[weight].derivation,
        number=id(equation),
        turns=where.turns,
        enclosed=where.enclosed,
    )


def _path(nearest: frozenset[str], weight: int | None) -> str:
    """Returns what the nearest parameters' paths share, or the module's where activations are of one."""
    path = common(sorted(nearest))
    is_alone = weight is None and len(nearest) == 1 and "/" in path
    return path.rpartition("/")[0] if is_alone else path


def _types(equation: core.JaxprEqn) -> list[Any]:
    """Returns the types of a product's operands and of its result."""
    return [v.aval for v in (*equation.invars, *equation.outvars)]


def _scope(where: Where, equation: core.JaxprEqn) -> str:
    own = str(equation.source_info.name_stack)
    # What is not entered may hold its own derivatives, as a solution of linear equations does.
    if "transpose(" in own and holds_products(equation) and not where.unreached:
        raise TakesGradients(
            "the function takes gradients, whose products are not the model's: give the function that is "
            "differentiated, and take the gradient of what comes back"
        )
    return "/".join(part for part in (where.scope, own) if part)


def _source(equation: core.JaxprEqn) -> str:
    """Returns the innermost line that is none of a library's."""
    traceback = equation.source_info.traceback
    for frame in () if traceback is None else traceback.frames:
        name = frame.file_name
        if "site-packages" not in name and not name.startswith((_PYTHON, _OURS, "<")):
            return f"{Path(name).name}:{frame.line_num}"
    return ""


# ---------------------------------------------------------------------------------------------------
# Equations that hold functions


def _of_remat(equation: core.JaxprEqn, operands: list[Origin], where: Where) -> Any:
    found, results = analyze(_function(equation), operands, where)
    return [found], results


def _of_shard_map(equation: core.JaxprEqn, operands: list[Origin], where: Where) -> Any:
    # Each device has its own part there.
    where.notes(operands, _source(equation))
    where = dataclasses.replace(where, enclosed="a shard_map")
    found, results = analyze(_function(equation), [o.without() for o in operands], where)
    return [found], [o.without() for o in results]


def _of_scan(equation: core.JaxprEqn, operands: list[Origin], where: Where) -> Any:
    settings = equation.params
    length, scan = settings["length"], len(where.turns)
    turns = (*where.turns, length)
    where = dataclasses.replace(where, times=where.times * length, turns=turns)
    first, last = scan_places(settings)
    carry = [o if o.is_weight else o.without() for o in operands[first:last]]
    handed = [_turn_of(o, scan, length) for o in operands[last:]]
    while True:
        given, trial = [*operands[:first], *carry, *handed], where.tried()
        found, results = analyze(settings["jaxpr"], given, trial)
        grown = _merge(carry, results[: last - first])
        if grown == carry:
            where.reads.update(trial.reads)
            stacked = [_all_turns(o, handed, operands[last:]) for o in results[last - first :]]
            return [found], [*carry, *stacked]
        carry = grown


def _turn_of(origin: Origin, scan: int, length: int) -> Origin:
    """Returns the origin of one turn's slice of a scan's input."""
    if origin.derivation is None:
        return origin
    turn = derivations.turn_of(origin.derivation, scan, length)
    return dataclasses.replace(origin, derivation=turn)


def _all_turns(result: Origin, turns: Sequence[Origin], stacked: Sequence[Origin]) -> Origin:
    """Returns a stacked output's origin: the input's, if each turn returns its slice unchanged."""
    if result.derivation is None:
        return result
    alike = [o for t, o in zip(turns, stacked, strict=True) if t.derivation == result.derivation]
    return alike[0] if alike else result.without()


def _of_while(equation: core.JaxprEqn, operands: list[Origin], where: Where) -> Any:
    settings = equation.params
    where = dataclasses.replace(where, enclosed="a while loop")
    first = settings["cond_nconsts"]
    last = first + settings["body_nconsts"]
    carry = [o if o.is_weight else o.without() for o in operands[last:]]
    while True:
        trial = where.tried()
        body, results = analyze(settings["body_jaxpr"], [*operands[first:last], *carry], trial)
        grown = _merge(carry, results)
        if grown == carry:
            where.reads.update(trial.reads)
            break
        carry = grown
    test, _ = analyze(settings["cond_jaxpr"], [*operands[:first], *carry], where)
    return [test, body], carry


def _of_cond(equation: core.JaxprEqn, operands: list[Origin], where: Where) -> Any:
    branches = [analyze(b, operands[1:], where) for b in equation.params["branches"]]
    results = branches[0][1]
    for _, others in branches[1:]:
        results = _merge(results, others)
    return [found for found, _ in branches], results


def _of_other(equation: core.JaxprEqn, operands: list[Origin], where: Where) -> Any:
    """A call that is not entered: its products are listed, with the reason."""
    where.notes(operands, _source(equation))
    operands = [o.without() for o in operands]
    whole = join(operands)
    found = []
    for jaxpr in inner(equation):
        is_alike = len(jaxpr.invars) == len(operands)
        given = operands if is_alike else [whole] * len(jaxpr.invars)
        found.append(analyze(jaxpr, given, where)[0])
    return found, [whole] * len(equation.outvars)


def _merge(some: Sequence[Origin], others: Sequence[Origin]) -> list[Origin]:
    """Returns origins of values that are one or the other."""
    return [
        dataclasses.replace(
            join([a, b]),
            is_weight=a.is_weight and b.is_weight,
            is_nonnegative=a.is_nonnegative and b.is_nonnegative,
            derivation=a.derivation if a.derivation == b.derivation else None,
        )
        for a, b in zip(some, others, strict=True)
    ]


_FUNCTIONS = {
    **dict.fromkeys(("remat2", "checkpoint", "remat"), _of_remat),
    "shard_map": _of_shard_map,
    "scan": _of_scan,
    "while": _of_while,
    "cond": _of_cond,
}


def flat(found: Sequence[Found]) -> Iterator[Product]:
    """Returns the products in what was found, in the order of the trace."""
    for x in found:
        if isinstance(x, Product):
            yield x
        elif x is not None:
            yield from flat(x)

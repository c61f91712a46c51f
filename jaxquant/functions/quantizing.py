"""Rules on the products of any function: what becomes of each, and the function with them in place."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, ParamSpec, TypeVar

import jax

from jaxquant.engine.origins import Origin
from jaxquant.engine.products import Product
from jaxquant.engine.rebuilding import Use
from jaxquant.engine.rules import (
    ATTENTION,
    Rule,
    Rules,
    Subject,
    choose,
    ensure_parsed,
    expression_for,
    parse_rules,
    starred,
)
from jaxquant.engine.walking import Call, Trace, as_returned, called
from jaxquant.functions.operations import Operation, as_floats, operation
from jaxquant.functions.states import State, is_learned
from jaxquant.numerics.calibration import absmax
from jaxquant.numerics.qarray import QArray
from jaxquant.numerics.stored import Stored
from jaxquant.operations.delaying import first_scales, is_delayed, with_ranges
from jaxquant.operations.dot import DotGeneral

__all__ = ["Decision", "decide", "quantize"]

P = ParamSpec("P")
T = TypeVar("T")


def quantize(
    function: Callable[P, T], rules: Rules, *, on_unsupported: Literal["error", "float"] = "error"
) -> Callable[P, T]:
    """Returns the same function with quantized products.

    A product of a parameter goes by the parameter's path, as ``layers/0/attn/q/kernel``, and by the path of
    what holds it, ``layers/0/attn/q``; it takes a recipe such as ``"w8a8"``.  A product of two activations
    goes by what the parameters nearest above it have in common, as ``layers/0/attn``, and takes one such as
    ``"a8"``.  The first rule that matches either name counts.  What no rule takes stays in float; products
    of integers, and those that sum nothing, always do.

    The function is traced once for each combination of shapes, and of arguments that are no arrays.  What
    comes back is differentiated in reverse mode, jitted, vmapped and scanned as the function is; forward mode
    (`jax.jvp`, `jax.hessian`) has no rule for quantized products, and JAX says so.

    Args:
        function: of a pytree of parameters, its first positional argument, and of anything else: plain JAX,
            Haiku's ``apply``, or
            ``lambda model, x: model(x)`` for an Equinox model.
        rules: from regular expressions on paths to recipes, as in `jaxquant.engine.rules`.
        on_unsupported: what becomes of a product that cannot take its recipe: ``"error"`` names all of them,
            ``"float"`` leaves them.

    Raises:
        ValueError: rules that cannot be read; at the call, a rule that takes nothing, products that cannot
            take their recipes, a function without products, or one that takes gradients.

    >>> import jax
    >>> model = lambda w, x: jax.nn.relu(x @ w["up"]) @ w["down"]
    >>> w = {"up": jax.numpy.ones((4, 8)), "down": jax.numpy.ones((8, 2))}
    >>> quantize(model, {"up": "w8a8", "down": "w4a16"})(w, jax.numpy.ones((1, 4)))
    Array([[32., 32.]], dtype=float32)
    """
    parse_rules(rules)
    if on_unsupported not in ("error", "float"):
        raise ValueError(f"on_unsupported is 'error' or 'float'; got {on_unsupported!r}")
    if not callable(function):
        raise ValueError(f"a function of parameters is wanted; got {type(function).__name__}")

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def run(call: Call, arrays: list[Any]) -> Any:
        trace = call.trace(function, arrays)
        stored = stored_among(call.origins, arrays)
        decisions = decide(trace.products, rules, stored=stored, is_tried=False)
        return evaluate(trace, decisions, arrays, call.origins, on_unsupported)

    @functools.wraps(function)
    def quantized(*args: P.args, **kwargs: P.kwargs) -> T:
        return as_returned(run(*called(args, kwargs)))

    return quantized


@dataclasses.dataclass(frozen=True)
class Decision:
    """How a product is computed under the rules.

    Attributes:
        product: of the function.
        rule: that takes it, or None.
        operation: what takes its place; None where it stays in float.
        reason: why it cannot take its recipe; "" where it can.
        state: of its weight, which takes part in the operation.
    """

    product: Product
    rule: Rule | None
    operation: Operation | None = None
    reason: str = ""
    state: State | None = None


def decide(
    found: Sequence[Product],
    rules: Rules | Sequence[Rule],
    is_part: bool = False,
    states: Mapping[str, State] = MappingProxyType({}),
    stored: Collection[str] = (),
    is_start: bool = False,
    aliases: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    is_tried: bool = True,
) -> list[Decision]:
    """Decides how each product is computed.

    Args:
        found: the products.
        rules: as of `quantize`.
        is_part: whether these may be some of a model's products alone, so that rules may take none of them.
        states: of parameters, by path.
        stored: paths of parameters that are stored in few bits.
        is_start: whether activations stay in float where their learned steps have no start yet.
        aliases: other names of parameters, by path.
        is_tried: whether each operation is tried, in shapes alone; `evaluate` finds what it refuses too.

    Raises:
        ValueError: a rule that takes nothing, or no product to quantize.
    """
    decisions = []
    parsed = ensure_parsed(rules, may_be_empty=is_part)
    assigned = _assigned(found, parsed, is_part, aliases)
    for product, (rule, reason) in zip(found, assigned, strict=True):
        given, state = None, _state(product, states)
        if not reason and rule is not None and rule.value is not None:
            try:
                recipe = rule.value
                if isinstance(recipe, DotGeneral):
                    recipe = _ready(product, recipe, state, stored, is_start)
                given = operation(product, recipe, state, is_tried)
            except ValueError as error:
                reason = str(error)
        decisions.append(Decision(product, rule, given, reason, state))
    return decisions


def _ready(
    product: Product,
    recipe: DotGeneral,
    state: State | None,
    stored: Collection[str],
    is_start: bool,
) -> DotGeneral:
    """Removes learned steps of stored weights, of lookups, and those that are not initialized yet.

    Raises:
        ValueError: a product that takes no delayed ranges, where the recipe has these.
    """
    if is_delayed(recipe):
        _check_delayed(product)
        if is_start and (state is None or state.delayed is None):
            recipe = with_ranges(recipe, first_scales(recipe))
    lhs, rhs = recipe.forward.lhs, recipe.forward.rhs
    is_stored = any(path in stored for path in product.parameters)
    if is_stored and rhs is not None and is_learned(rhs):
        rhs = dataclasses.replace(rhs, calibration=absmax)
    has_start = state is not None and state.input_step is not None
    if is_learned(lhs) and (product.kind == "lookup" or (is_start and not has_start)):
        lhs = None
    forward = dataclasses.replace(recipe.forward, lhs=lhs, rhs=rhs)
    return dataclasses.replace(recipe, forward=forward)


def _check_delayed(product: Product) -> None:
    """Raises a ValueError for a product whose ranges cannot go from step to step."""
    if product.kind != "dot":
        raise ValueError(f"delayed scaling is of matrix products, and this is a {product.kind}")
    made = product.derivation
    if made is None or len(product.parameters) != 1:
        raise ValueError(
            "delayed scaling is of products with a weight that is made of one parameter"
        )
    if product.enclosed or len(product.turns) > len(made.stored.turns):
        around = product.enclosed or "a scan that has the same weight in each turn"
        raise ValueError(
            f"it is within {around}, and delayed scaling takes a product that is computed once in a step"
        )


def stored_among(origins: Sequence[Origin], arrays: Sequence[Any]) -> dict[str, Stored]:
    """Returns the parameters among a function's arrays that are stored in few bits, by path."""
    pairs = zip(origins, arrays, strict=True)
    return {_path(origin): x for origin, x in pairs if isinstance(x, Stored)}


def _state(product: Product, states: Mapping[str, State]) -> State | None:
    """Returns the state of a product's weight, if the weight is one parameter."""
    return states.get(product.parameters[0]) if len(product.parameters) == 1 else None


def check(decisions: Sequence[Decision]) -> None:
    """Raises a ValueError that names all products that cannot take their recipes, alike layers together."""
    groups: dict[Any, list[Decision]] = {}
    for d in (d for d in decisions if d.reason):
        key = starred(d.product.path), d.product.source, id(d.rule), starred(d.reason)
        groups.setdefault(key, []).append(d)
    if groups:
        raise ValueError("\n".join(map(_refusal, groups.values())))


def together(lines: Iterable[str]) -> list[str]:
    """Returns an error's lines, merging those that differ in the number of the layer alone."""
    groups: dict[str, list[str]] = {}
    for line in dict.fromkeys(lines):
        groups.setdefault(starred(line), []).append(line)
    return [
        alike[0]
        if len(alike) == 1
        else f"{alike[0]} ({len(alike) - 1} more such lines are left out)"
        for alike in groups.values()
    ]


def _refusal(alike: Sequence[Decision]) -> str:
    """Returns why products of one line cannot take their recipe, and a rule that leaves them in float."""
    first, paths = alike[0], list(dict.fromkeys(d.product.path for d in alike))
    name = paths[0] if len(paths) == 1 else f"{starred(paths[0])} ×{len(paths)}"
    where = f" ({first.product.source})" if first.product.source else ""
    label = "" if first.rule is None else first.rule.label
    return (
        f"{name or 'a product of no name'}{where} cannot take {label}: {first.reason}; a rule "
        f"({expression_for(paths)!r}, None) before the others leaves {'it' if len(paths) == 1 else 'them'} "
        "in float"
    )


def evaluate(
    trace: Trace,
    decisions: Sequence[Decision],
    arrays: Sequence[Any],
    origins: Sequence[Origin],
    on_unsupported: str = "error",
) -> Any:
    """Returns a function's result with its products as decided.

    Args:
        trace: of the function.
        decisions: for each product.
        arrays: what it takes; some may be `Stored`.
        origins: of the arrays.
        on_unsupported: as of `quantize`.

    Raises:
        ValueError: products that cannot take their recipes, all at once; a stored parameter that is read, or
            multiplied, in another way than it was stored for.
    """
    return evaluate_recording(trace, decisions, arrays, origins, on_unsupported, lambda *_: None)[0]


# From a decision, its operation with its state, and a product's operands to what is recorded, or None.
Record = Callable[..., Any]


def evaluate_recording(
    trace: Trace,
    decisions: Sequence[Decision],
    arrays: Sequence[Any],
    origins: Sequence[Origin],
    on_unsupported: str,
    record: Record,
    watched: Collection[int] = (),
    taps: Mapping[int, Any] = MappingProxyType({}),
) -> tuple[Any, dict[int, Any]]:
    """Evaluates as `evaluate`, and returns what each product with an operation recorded, by its number.

    What is recorded within a scan is stacked along a first axis.

    Args:
        trace, decisions, arrays, origins, on_unsupported: as of `evaluate`.
        record: from (decision, operation, *operands) to what is recorded of the product, or None.
        watched: the numbers of products that stay as they are of which is recorded too; their operation is
            None.
        taps: of products, by their numbers, with an axis in front for each scan around them.
    """
    stored = stored_among(origins, arrays)
    for path in stored:
        if path in trace.reads:
            raise ValueError(is_read(path, trace.reads[path]))
    uses: list[Use | None] = []
    refused: list[Decision] = []
    data = {}
    for index, decision in enumerate(decisions):
        weight = _stored_weight(decision, stored)
        use = None if decision.operation is None else _use(index, decision, record, refused)
        if use is None and index in watched:
            use = _noted(index, decision, record)
        if decision.operation is not None and not (weight is None and decision.state is None):
            data[index] = weight, decision.state
        uses.append(use)
    if on_unsupported == "error" and any(decision.reason for decision in decisions):
        check([d if d.operation is None else _tried(d) for d in decisions])
    found = trace.evaluate(arrays, uses, data, taps)
    if on_unsupported == "error":
        check(refused)
    return found


def _noted(index: int, decision: Decision, record: Record) -> Use:
    """A product as it is, of which is recorded."""
    return Use(index, lambda _, __, *operands: (None, record(decision, None, *operands)))


def _tried(decision: Decision) -> Decision:
    """A decision whose operation is tried, so that all that is refused is named with what is known to be."""
    operation = decision.operation
    assert operation is not None
    try:
        one = lambda s, *xs: operation.check(s)(*as_floats(decision.product, xs))  # noqa: E731
        jax.eval_shape(one, decision.state, *decision.product.operands)
    except ValueError as error:
        return dataclasses.replace(decision, reason=str(error))
    return decision


def _use(index: int, decision: Decision, record: Record, refused: list[Decision]) -> Use:
    assert decision.operation is not None
    plain = decision.operation
    turns = () if plain.stored is None else plain.stored.turns

    def apply(given: Any, tap: Any, *operands: Any) -> tuple[jax.Array | None, Any]:
        weight, state = (None, None) if given is None else given
        if tap is not None:
            state = dataclasses.replace(State() if state is None else state, tap=tap)
        operation, operands = plain.by(state), as_floats(decision.product, operands)
        try:
            noted = record(decision, operation, *operands)
            if weight is None:
                return operation(*operands), noted
            return operation.with_weight(weight, *operands), noted
        except ValueError as error:  # the others are still to be tried
            refused.append(dataclasses.replace(decision, reason=str(error)))
            return None, None

    return Use(index, apply, frozenset(scan for scan, _ in turns))


def _path(origin: Origin) -> str:
    (path,) = origin.nearest
    return path


def is_read(path: str, line: str) -> str:
    where = f" ({line})" if line else ""
    return (
        f"{path} is stored in few bits, and the function reads it by something else than a product{where}; "
        f"a rule ({path!r}, None) before the others leaves it in float"
    )


def _stored_weight(decision: Decision, stored: Mapping[str, Stored]) -> QArray | None:
    """Returns the stored numbers that a product multiplies; None where its weight is not stored."""
    product, operation = decision.product, decision.operation
    held = [stored[path] for path in product.parameters if path in stored]
    if not held:
        return None
    key = "" if operation is None or operation.stored is None else operation.stored.key
    found = [x.operands[key] for x in held if key in x.operands]
    if not found:
        where = f" ({product.source})" if product.source else ""
        raise ValueError(
            f"{product.path}{where} is stored as {', '.join(held[0].operands)}, and this product multiplies "
            f"{key or 'it in float'}; freeze with this call, or with the rules of this function"
        )
    return found[0]


def _assigned(
    found: Sequence[Product],
    rules: list[Rule],
    is_part: bool,
    aliases: Mapping[str, tuple[str, ...]],
) -> list[tuple[Rule | None, str]]:
    """Returns the rule that each product takes, None where none does, and why the product cannot take it."""
    floats = [p for p in found if p.is_quantizable]
    if not floats:
        raise ValueError("the function has no product of floating-point numbers to quantize")
    subjects = [
        Subject(p.names, ATTENTION)
        if p.weight is None
        else Subject((*p.names, *aliases.get(p.path, ())), p.kind)
        for p in floats
    ]
    parts = {
        (part, p.kind): Subject((part, part.rpartition("/")[0], *aliases.get(part, ())), p.kind)
        for p in floats
        if p.weight is not None and len(p.parameters) > 1
        for part in p.parameters
    }
    try:
        chosen = choose([*subjects, *parts.values()], rules, is_part=is_part)
    except ValueError as error:
        own = next((p for p in floats if p.has_constant), None)
        if own is None:
            raise
        raise ValueError(
            f"{error}; at {own.source or 'a product'} the function multiplies by an array of its own: "
            "weights that rules are to reach come with the first argument"
        ) from None
    of_parts = dict(zip(parts, chosen[len(subjects) :], strict=True))
    taken = iter(chosen)
    return [
        _with_parts(p, next(taken), of_parts, rules) if p.is_quantizable else (None, "")
        for p in found
    ]


def warn_of_untaken(decisions: Sequence[Decision], rules: Sequence[Rule]) -> None:
    """Warns of rules that match products of a model's own call by name, and take none of them."""
    taken = {id(d.rule) for d in decisions}
    for rule in rules:
        if rule.value is None or rule.is_earlier or id(rule) in taken:
            continue
        named = [
            d
            for d in decisions
            if d.rule is None and rule.matches(Subject(d.product.names, d.product.kind))
        ]
        if named:
            found = named[0].product
            if not found.is_quantizable:
                why = f"multiplies {' and '.join(str(x.dtype) for x in found.operands[:2])}"
            elif found.weight is None:
                why = "is of two activations, which take recipes such as 'a8'"
            else:
                why = "has a weight, which takes recipes such as 'w8a8'"
            warnings.warn(
                f"rule {rule.pattern.pattern!r} ({rule.label}) takes no product of this call: "
                f"{found.path or 'the product'}{f' ({found.source})' if found.source else ''} {why}",
                stacklevel=2,
            )


def _with_parts(
    product: Product,
    rule: Rule | None,
    of_parts: Mapping[tuple[str, str], Rule | None],
    rules: list[Rule],
) -> tuple[Rule | None, str]:
    """Returns a product's rule, and an earlier rule for only a part of its weight, which it cannot use."""
    before = next((i for i, other in enumerate(rules) if other is rule), len(rules))
    for part in product.parameters:
        other = of_parts.get((part, product.kind))
        if other is None or other.value is None or not any(other is r for r in rules[:before]):
            continue
        return other, (
            f"its weight is made of {' and '.join(product.parameters)}, and rule "
            f"{other.pattern.pattern!r} names {part} alone; a rule ({product.path!r}, {other.label!r}) "
            "quantizes it"
        )
    return rule, ""

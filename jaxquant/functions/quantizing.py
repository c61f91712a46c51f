"""Rules on the products of any function: what becomes of each, and the function with them in place."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, ParamSpec, TypeVar

from jaxquant.engine.products import Product
from jaxquant.engine.walking import Replacement, walk
from jaxquant.functions.operations import Operation, operation
from jaxquant.rules import ATTENTION, Rule, Rules, Subject, choose, parse_rules

__all__ = ["Decision", "decided", "quantize"]

P = ParamSpec("P")
T = TypeVar("T")


def quantize(
    function: Callable[P, T], rules: Rules, *, on_unsupported: Literal["error", "float"] = "error"
) -> Callable[P, T]:
    """The same function with quantized products.

    A product of a parameter goes by the parameter's path, as ``layers/0/attn/q/kernel``, and by the path of
    what holds it, ``layers/0/attn/q``; it takes a recipe such as ``"w8a8"``.  A product of two activations
    goes by what the parameters nearest above it have in common, as ``layers/0/attn``, and takes one such as
    ``"a8"``.  The first rule that matches either name counts.  What no rule takes stays in float; products
    of integers, and those that sum nothing, always do.

    The function is traced once for each combination of shapes, and of arguments that are no arrays.  What
    comes back is differentiated, jitted, vmapped and scanned as the function is.

    Args:
        function: of a pytree of parameters, its first positional argument, and of anything else: plain JAX,
            Haiku's ``apply``, or
            ``lambda model, x: model(x)`` for an Equinox model.
        rules: from regular expressions on paths to recipes, as in `jaxquant.rules`.
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

    def visit(found: tuple[Product, ...]) -> list[Replacement | None]:
        decisions = decided(found, rules)
        refused = [d.refusal for d in decisions if d.refusal]
        if refused and on_unsupported == "error":
            raise ValueError("\n".join(dict.fromkeys(refused)))
        return [d.operation for d in decisions]

    return walk(function, visit)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of a product.

    Attributes:
        product: of the function.
        rule: that takes it, or None.
        operation: what takes its place; None where it stays in float.
        reason: why it cannot take its recipe; "" where it can.
    """

    product: Product
    rule: Rule | None
    operation: Operation | None = None
    reason: str = ""

    @property
    def refusal(self) -> str:
        """The reason in a sentence, with the rule that leaves the product in float."""
        product = self.product
        if not self.reason:
            return ""
        where = f" ({product.source})" if product.source else ""
        label = "" if self.rule is None else self.rule.label
        return (
            f"{product.path or 'a product of no name'}{where} cannot take {label}: {self.reason}; a rule "
            f"({product.path!r}, None) before the others leaves it in float"
        )


def decided(found: Sequence[Product], rules: Rules) -> list[Decision]:
    """What becomes of each product.

    Raises:
        ValueError: a rule that takes nothing, or no product to quantize.
    """
    decisions = []
    for product, rule in zip(found, _assigned(found, rules), strict=True):
        given, reason = None, ""
        if rule is not None and rule.value is not None:
            try:
                given = operation(product, rule.value)
            except ValueError as error:
                reason = str(error)
        decisions.append(Decision(product, rule, given, reason))
    return decisions


def _assigned(found: Sequence[Product], rules: Rules) -> list[Rule | None]:
    """The rule that each product takes; None where none does."""
    floats = [p for p in found if p.is_quantizable]
    if not floats:
        raise ValueError("the function has no product of floating-point numbers to quantize")
    subjects = [Subject(p.names, ATTENTION if p.weight is None else p.kind) for p in floats]
    try:
        chosen = iter(choose(subjects, rules))
    except ValueError as error:
        own = next((p for p in floats if p.has_constant), None)
        if own is None:
            raise
        raise ValueError(
            f"{error}; at {own.source or 'a product'} the function multiplies by an array of its own: "
            "weights that rules are to reach come with the first argument"
        ) from None
    return [next(chosen) if p.is_quantizable else None for p in found]

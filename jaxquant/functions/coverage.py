"""What becomes of each product of a function under rules, as a table."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxquant.coverage import aligned
from jaxquant.engine.products import Product
from jaxquant.engine.walking import called, products
from jaxquant.functions.quantizing import Decision, decided
from jaxquant.rules import Rules

__all__ = ["Coverage", "Row", "coverage"]


@dataclasses.dataclass(frozen=True)
class Row:
    """Products that differ in nothing but the numbers in their paths.

    Attributes:
        path: with ``*`` where numbers differ.
        count: of the products.
        kind: ``"dot"``, ``"conv"`` or ``"ragged"``.
        shapes: of each one's operands.
        recipe: its name; ``"float"`` for nothing.
        macs: multiplications of all of them in one call.
        reason: why they stay in float; "" where they don't.
        source: the line of each, as ``"model.py:17"``.
    """

    path: str
    count: int
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    recipe: str
    macs: int
    reason: str
    source: str

    @property
    def is_quantized(self) -> bool:
        return not self.reason


@dataclasses.dataclass(frozen=True)
class Coverage:
    """A row for each group of products, printed as a table.

    A product within a while loop counts once, and all branches of a cond count.

    Attributes:
        rows: in the order of the trace.
        unread: paths of the parameters that no product multiplies by, such as biases and lookup tables.
    """

    rows: tuple[Row, ...]
    unread: tuple[str, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def macs(self) -> int:
        """Multiplications of all products."""
        return sum(row.macs for row in self.rows)

    @property
    def quantized(self) -> float:
        """The share of the multiplications that are in few bits, from 0 to 1."""
        return sum(row.macs for row in self.rows if row.is_quantized) / max(1, self.macs)

    @property
    def shares(self) -> dict[str, float]:
        """Of the multiplications in float, by reason."""
        found: dict[str, float] = {}
        for row in self.rows:
            if row.reason:
                found[row.reason] = found.get(row.reason, 0.0) + row.macs / max(1, self.macs)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON can hold it."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        said = [f"{_percent(self.quantized)} of {self.macs:,} MACs are quantized"]
        said += [f"{_percent(share)} stay in float: {why}" for why, share in self.shares.items()]
        head = ("path", "", "kind", "operands", "recipe", "MACs", "line")
        lines = aligned([head, *map(_cells, self.rows)], right=(5,))
        unread = [f"multiplied with nothing: {', '.join(self.unread)}"] if self.unread else []
        return "\n".join(["; ".join(said), *lines, *unread])


def _percent(share: float) -> str:
    """Rounded so that 100 % is all, and 0 % nothing."""
    if 0 < share < 1:
        share = min(max(share, 0.001), 0.999)
    return f"{100 * share:.3g} %"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.path or "(no parameter in common)",
        f"×{row.count}" if row.count > 1 else "",
        row.kind,
        " · ".join("×".join(map(str, shape)) or "scalar" for shape in row.shapes),
        row.recipe,
        f"{row.macs:,}",
        row.source,
    )


def coverage(function: Callable[..., Any], rules: Rules, *args: Any, **kwargs: Any) -> Coverage:
    """What `jaxquant.functions.quantize` makes of each product; the function is traced, not run.

    A product that cannot take its recipe is a row with the reason, not an error.

    Args:
        function: of a pytree of parameters, its first positional argument, and of anything else.
        rules: from regular expressions on paths to recipes, as in `jaxquant.rules`.
        args, kwargs: what the function is called with; arrays may be `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: rules that cannot be read, a rule that takes nothing, a function without products, or one
            that takes gradients.

    >>> import jax
    >>> array = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
    >>> model = lambda w, x: jax.nn.relu(x @ w["up"] + w["bias"]) @ w["down"]
    >>> w = {"up": array(4, 8), "down": array(8, 2), "bias": array(8)}
    >>> found = coverage(model, {"up": "w8a8"}, w, array(1, 4))
    >>> print(str(found).splitlines()[0])
    66.7 % of 48 MACs are quantized; 33.3 % stay in float: no rule takes them
    >>> found.unread
    ('bias',)
    """
    decisions = decided(products(function, *args, **kwargs), rules)
    call, _ = called(args, kwargs)
    parameters = [path for origin in call.origins if origin.is_weight for path in origin.nearest]
    return table(decisions, parameters)


def table(decisions: Sequence[Decision], parameters: Sequence[str]) -> Coverage:
    """The table of what was decided, with the parameters that are among no product's."""
    read = {path for d in decisions for path in d.product.parameters}
    return Coverage(_grouped(decisions), tuple(p for p in parameters if p not in read))


def _grouped(decisions: Sequence[Decision]) -> tuple[Row, ...]:
    groups: dict[Any, list[Decision]] = {}
    for decision in decisions:
        groups.setdefault(_alike(decision), []).append(decision)
    return tuple(_row(key, group) for key, group in groups.items())


def _alike(decision: Decision) -> tuple[Any, ...]:
    """What products of one row have in common."""
    product = decision.product
    parts = product.path.split("/")
    path = "/".join("*" if part.isdecimal() else part for part in parts)
    recipe = "float" if decision.operation is None or decision.rule is None else decision.rule.label
    shapes = tuple(tuple(x.shape) for x in product.operands[:2])
    return path, product.kind, shapes, recipe, _reason(decision), product.source


def _row(alike: tuple[Any, ...], group: Sequence[Decision]) -> Row:
    path, kind, shapes, recipe, reason, source = alike
    paths = {d.product.path for d in group}
    name = paths.pop() if len(paths) == 1 else path
    macs = sum(d.product.macs for d in group)
    return Row(name, len(group), kind, shapes, recipe, macs, reason, source)


def _reason(decision: Decision) -> str:
    """Why a product stays in float."""
    if decision.operation is not None:
        return ""
    if decision.reason:
        return decision.reason
    if decision.rule is not None:
        return "by rule"
    return "no rule takes them" if decision.product.is_quantizable else _no_sum(decision.product)


def _no_sum(product: Product) -> str:
    """Why rules pass a product by."""
    kinds = {str(x.dtype) for x in product.operands[:2]}
    return f"products of {' and '.join(sorted(kinds))}, or that sum nothing"

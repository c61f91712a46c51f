"""The coverage table: each product of a function under rules."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxquant.engine.products import Product
from jaxquant.engine.rules import Rules, starred
from jaxquant.engine.walking import called
from jaxquant.functions.freezing import stored_operand
from jaxquant.functions.quantizing import Decision, decide
from jaxquant.numerics.stored import Stored

__all__ = ["Coverage", "Row", "coverage"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A product, or several that differ in nothing but the numbers in their paths.

    Attributes:
        path: of its weight, or of what activations have in common; with ``*`` where numbers differ.
        kind: ``"dot"``, ``"conv"``, ``"ragged"`` or ``"lookup"``.
        shapes: of each one's operands.
        rule: the expression that took it, or None.
        recipe: its name; ``"float"`` for nothing.
        bytes_before, bytes_after: of its weight as it is, and as `freeze` stores it, scales included; 0 of
            activations, and of a weight that a product before it has too.
        macs: multiplications of all of them in one call; None where no inputs say how many.
        reason: why they stay in float; "" where they don't.
        source: the line of each, as ``"model.py:17"``.
        count: of the products.
    """

    path: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    rule: str | None
    recipe: str
    bytes_before: int
    bytes_after: int
    macs: int | None
    reason: str
    source: str
    count: int = 1

    @property
    def is_quantized(self) -> bool:
        return not self.reason


@dataclasses.dataclass(frozen=True)
class Coverage:
    """A row for each product; printed, a row for each group that differ in nothing but numbers in paths.

    A product within a while loop counts once, and all branches of a cond count.

    Attributes:
        rows: in the order of the trace.
        unread: paths of the parameters that no product multiplies by, such as biases and lookup tables.
    """

    rows: tuple[Row, ...]
    unread: tuple[str, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> Row:
        """Returns the first row of a weight, or of what holds it."""
        names = {row.path: row for row in reversed(self.rows)}
        holders = {row.path.rpartition("/")[0]: row for row in reversed(self.rows)}
        if path not in names and path not in holders:
            raise KeyError(f"no product at {path!r}; there are {', '.join(names)}")
        return names[path] if path in names else holders[path]

    @property
    def groups(self) -> tuple[Row, ...]:
        """The rows with those together that differ in nothing but the numbers in their paths."""
        groups: dict[Any, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(_alike(row), []).append(row)
        return tuple(map(_together, groups.values()))

    @property
    def macs(self) -> int:
        """Multiplications of all products."""
        return sum(row.macs or 0 for row in self.rows)

    @property
    def bytes_before(self) -> int:
        """Bytes of all weights that products multiply."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all weights that products multiply, as `freeze` stores them."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def quantized(self) -> float:
        """The share of the multiplications that are in few bits, from 0 to 1."""
        return sum(row.macs or 0 for row in self.rows if row.is_quantized) / max(1, self.macs)

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the multiplications in float, by reason."""
        found: dict[str, float] = {}
        for row in self.rows:
            if row.reason and row.macs:
                found[row.reason] = found.get(row.reason, 0.0) + row.macs / self.macs
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns the table as JSON can hold it."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        said = [f"{_percent(self.quantized)} of {self.macs:,} MACs are quantized"]
        said += [f"{_percent(share)} stay in float: {why}" for why, share in self.shares.items()]
        first = ["; ".join(said)] if any(row.macs is not None for row in self.rows) else []
        head = ("path", "", "kind", "operands", "rule", "recipe", "bytes before", "after", "MACs")
        total = ("total", "", "", "", "", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}", "")
        rows = [(*head, "line"), *map(_cells, self.groups), (*total, "")]
        lines = _aligned(rows, right=(6, 7, 8))
        unread = [f"multiplied with nothing: {', '.join(_starred(self.unread))}"]
        return "\n".join([*first, *lines, *(unread if self.unread else [])])


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Returns the lines of a table without empty columns; columns in `right` are right-aligned."""
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    return [
        "  ".join(
            row[i].rjust(widths[i]) if i in right else row[i].ljust(widths[i]) for i in used
        ).rstrip()
        for row in rows
    ]


def _percent(share: float) -> str:
    """Returns rounded so that 100 % is all, and 0 % nothing."""
    if 0 < share < 1:
        share = min(max(share, 0.001), 0.999)
    return f"{100 * share:.3g} %"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.path or "(no parameter in common)",
        f"×{row.count}" if row.count > 1 else "",
        row.kind,
        " · ".join("×".join(map(str, shape)) or "scalar" for shape in row.shapes),
        "–" if row.rule is None else row.rule,
        row.recipe,
        f"{row.bytes_before:,}" if row.bytes_before else "",
        f"{row.bytes_after:,}" if row.bytes_after else "",
        "" if row.macs is None else f"{row.macs:,}",
        row.source,
    )


def _starred(paths: Sequence[str]) -> list[str]:
    """Returns paths with ``*`` in the place of numbers, each with how many there are."""
    counts: dict[str, list[str]] = {}
    for path in paths:
        counts.setdefault(starred(path), []).append(path)
    return [p[0] if len(p) == 1 else f"{name} ×{len(p)}" for name, p in counts.items()]


def _alike(row: Row) -> tuple[Any, ...]:
    """Returns the fields that the products of a group share."""
    own = row.bytes_before, row.bytes_after, row.macs
    return (
        starred(row.path),
        row.kind,
        row.shapes,
        row.rule,
        row.recipe,
        row.reason,
        row.source,
        own,
    )


def _together(rows: Sequence[Row]) -> Row:
    first, count = rows[0], len(rows)
    paths = {row.path for row in rows}
    return dataclasses.replace(
        first,
        path=first.path if len(paths) == 1 else starred(first.path),
        bytes_before=count * first.bytes_before,
        bytes_after=count * first.bytes_after,
        macs=None if first.macs is None else count * first.macs,
        count=count,
    )


def coverage(function: Callable[..., Any], rules: Rules, *args: Any, **kwargs: Any) -> Coverage:
    """Returns what `jaxquant.functions.quantize` does to each product; the function is traced, not run.

    A product that cannot take its recipe is a row with the reason, not an error.

    Args:
        function: of a pytree of parameters, its first positional argument, and of anything else.
        rules: from regular expressions on paths to recipes, as in `jaxquant.engine.rules`.
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
    call, arrays = called(args, kwargs)
    decisions = decide(call.trace(function, arrays).products, rules)
    pairs = zip(call.origins, arrays, strict=True)
    values = {p: x for o, x in pairs if o.is_weight for p in o.nearest}
    return table(decisions, tuple(values), values)


def table(
    decisions: Sequence[Decision],
    parameters: Sequence[str],
    values: Mapping[str, Any],
    has_inputs: bool = True,
) -> Coverage:
    """Returns the table of what was decided.

    Args:
        decisions: one for each product.
        parameters: paths of all, also of those that are among no product's.
        values: arrays that weights are made of, by path.
        has_inputs: whether the products are those of a call with inputs, whose multiplications count.
    """
    rows, counted = [], set[str]()
    for decision in decisions:
        rows.append(_row(decision, values, counted, has_inputs))
        counted.update(decision.product.parameters)
    return Coverage(tuple(rows), tuple(p for p in parameters if p not in counted))


def _row(decision: Decision, values: Mapping[str, Any], counted: set[str], has_inputs: bool) -> Row:
    product, rule = decision.product, decision.rule
    own = [values[p] for p in product.parameters if p not in counted]
    before = sum(_nbytes(x) for x in own)
    return Row(
        product.path,
        product.kind,
        tuple(tuple(x.shape) for x in product.operands[:2]),
        None if rule is None else rule.pattern.pattern,
        "float" if decision.operation is None or rule is None else rule.label,
        before,
        _bytes_after(decision, own, before, values),
        product.macs if has_inputs else None,
        _reason(decision),
        product.source,
    )


def _nbytes(x: Any) -> int:
    return x.nbytes if isinstance(x, Stored) else x.size * jax.numpy.dtype(x.dtype).itemsize


def _bytes_after(
    decision: Decision, own: Sequence[Any], before: int, values: Mapping[str, Any]
) -> int:
    operation = decision.operation
    if operation is None or operation.quantizer is None or operation.stored is None or not own:
        return before
    is_traced = bool(jax.tree.leaves(operation.quantizer.format))
    if is_traced or any(isinstance(x, Stored) for x in own):
        return before
    needed = {path: values[path] for path in operation.stored.paths}
    return jax.eval_shape(lambda x: stored_operand(decision, x), needed).nbytes


def _reason(decision: Decision) -> str:
    """Returns why a product stays in float."""
    if decision.operation is not None:
        return ""
    if decision.reason:
        return decision.reason
    if decision.rule is not None:
        return "by rule"
    if not decision.product.is_quantizable:
        return _no_sum(decision.product)
    if decision.product.weight is None:
        return "products of two activations, which no rule takes"
    return "no rule takes them"


def _no_sum(product: Product) -> str:
    """Returns why no rule applies to a product."""
    kinds = {str(x.dtype) for x in product.operands[:2]}
    return f"products of {' and '.join(sorted(kinds))}, or that sum nothing"

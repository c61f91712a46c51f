"""The coverage table: what each module of a model got, and which products no rule can reach."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from jaxquant.hadamard import ROTATION

_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")
_OPEN, _CLOSE = "jaxquant<", ">"


@dataclasses.dataclass(frozen=True)
class Row:
    """One module.

    Attributes:
        path: with slashes.
        kind: ``"linear"``, ``"einsum"``, ``"conv"``, ``"conv_transpose"``, ``"embed"`` or ``"attention"``.
        shape: of its weight; None where it has none.
        rule: the expression that took it, or None.
        recipe: what it got, in words; ``"float"`` for nothing.
        bytes_before, bytes_after: of its weight as it is, and as `freeze` stores it, scales included; 0 of
            one that a module before it has too.
        macs: multiplications in its products, for the example inputs; None without.
    """

    path: str
    kind: str
    shape: tuple[int, ...] | None
    rule: str | None
    recipe: str
    bytes_before: int
    bytes_after: int
    macs: int | None = None


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product that belongs to no module that rules know.

    Attributes:
        primitive: lax's name for it.
        shapes: of its operands.
        macs: multiplications in it.
    """

    primitive: str
    shapes: tuple[tuple[int, ...], ...]
    macs: int


@dataclasses.dataclass(frozen=True)
class Coverage:
    """A row for each module with matrix products, printed as a table.

    Attributes:
        rows: in the order of the model.
        others: products outside of these modules, which stay in floating point; None where no example
            inputs were given to find them.
    """

    rows: tuple[Row, ...]
    others: tuple[Product, ...] | None = None

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> Row:
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(f"no module at {path!r}; there are {', '.join(r.path for r in self.rows)}")

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON can hold it."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        head = ("path", "kind", "shape", "rule", "recipe", "bytes before", "after", "MACs")
        cells = [
            (
                row.path or "(the model)",
                row.kind,
                "–" if row.shape is None else "×".join(map(str, row.shape)),
                "–" if row.rule is None else row.rule,
                row.recipe,
                f"{row.bytes_before:,}",
                f"{row.bytes_after:,}",
                "" if row.macs is None else f"{row.macs:,}",
            )
            for row in self.rows
        ]
        total = ("total", "", "", "", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}", "")
        lines = aligned([head, *cells, total], right=(5, 6, 7))
        for other in self.others or ():
            shapes = " · ".join("×".join(map(str, s)) or "scalar" for s in other.shapes)
            lines.append(f"in no module: {other.primitive} {shapes}, {other.macs:,} MACs: float")
        return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Lines of a table; columns that are empty under their head are left out, and `right` ones end alike."""
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    return [
        "  ".join(
            row[i].rjust(widths[i]) if i in right else row[i].ljust(widths[i]) for i in used
        ).rstrip()
        for row in rows
    ]


# ---------------------------------------------------------------------------------------------------
# Finding products


def tag(path: str) -> contextlib.AbstractContextManager[Any]:
    """What is traced within belongs to the module at a path."""
    return jax.named_scope(f"{_OPEN}{path}{_CLOSE}")


@dataclasses.dataclass(frozen=True)
class Tagged:
    """An operation whose products are found again in the traced program, by their module's path."""

    path: str
    operation: Callable[..., jax.Array]

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        with tag(self.path):
            return self.operation(*args, **kwargs)


def find_products(
    function: Callable[..., Any], *inputs: Any
) -> tuple[dict[str, int], tuple[Product, ...]]:
    """The matrix products of a function: MACs of those that are tagged, by path, and the others.

    Those within Hadamard rotations are a part of quantizing, and are left out.

    Args:
        function: traced with the inputs, not run.
        inputs: arrays or `jax.ShapeDtypeStruct`s.

    >>> def f(x):
    ...     with tag("up"):
    ...         x = x @ x
    ...     return x @ x
    >>> find_products(f, jax.ShapeDtypeStruct((4, 4), "float32"))
    ({'up': 64}, (Product(primitive='dot_general', shapes=((4, 4), (4, 4)), macs=64),))
    """
    macs: dict[str, int] = {}
    others = []
    for equation, stack, times in _equations(jax.make_jaxpr(function)(*inputs).jaxpr, "", 1):
        if ROTATION in stack:
            continue
        count = times * _macs(equation)
        if _OPEN in stack:
            path = stack.rsplit(_OPEN, 1)[1].split(_CLOSE, 1)[0]
            macs[path] = macs.get(path, 0) + count
        else:
            shapes = tuple(tuple(v.aval.shape) for v in equation.invars[:2])
            others.append(Product(equation.primitive.name, shapes, count))
    return macs, tuple(others)


def _equations(jaxpr: Any, stack: str, times: int) -> Iterator[tuple[Any, str, int]]:
    """All products within, how they are named, and how often they run."""
    for equation in jaxpr.eqns:
        name = f"{stack}/{equation.source_info.name_stack}"
        if equation.primitive.name in _PRODUCTS:
            yield equation, name, times
            continue
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = _jaxprs(equation.params.values())
        if equation.primitive.name == "cond":  # one of its branches runs
            inner = list(inner)[-1:]
        for part in inner:
            yield from _equations(part, name, times * repeats)


def _jaxprs(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr") and hasattr(value.jaxpr, "eqns"):
            yield value.jaxpr
        elif isinstance(value, tuple | list):
            yield from _jaxprs(value)


def _macs(equation: Any) -> int:
    out = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "conv_general_dilated":
        spec = equation.params["dimension_numbers"].rhs_spec
        kernel = equation.invars[1].aval.shape
        return out * math.prod(kernel) // max(1, kernel[spec[0]])
    shape = equation.invars[0].aval.shape
    numbers = equation.params.get("dimension_numbers")
    if numbers is None:  # a ragged product over the last axis
        return out * shape[-1]
    numbers = getattr(numbers, "dot_dimension_numbers", numbers)
    return out * math.prod(shape[a] for a in numbers[0][0])

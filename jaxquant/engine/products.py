"""`Product`: one matrix product of a traced function, as data."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax

from jaxquant.engine.derivations import Derivation

Kind = Literal["dot", "conv", "ragged", "lookup"]
KINDS: Mapping[str, Kind] = {
    "dot_general": "dot",
    "conv_general_dilated": "conv",
    "ragged_dot_general": "ragged",
    "ragged_dot": "ragged",  # its name in jax before 0.8
}


@dataclasses.dataclass(frozen=True)
class Product:
    """One matrix product of a traced function.

    Attributes:
        path: of the parameter that feeds it, with slashes.  Where several do, or where both operands are
            activations, the longest path that those nearest above it have in common; of activations that all
            come from one parameter, as from a fused projection, the path of the module that holds it.
        kind: ``"dot"``, ``"conv"``, ``"ragged"``, or ``"lookup"``: rows of a table, taken by integers.
        weight: the operand that depends on parameters alone: 0, 1, or None for a product of activations.
            Where both do, the right one.
        probabilities: the operand that is never negative, as a softmax's result; 0, 1 or None.
        operands: their shapes and types.
        settings: the primitive's own parameters.
        times: how often it runs in one call, by the lengths of the scans around it; a product within a
            while loop counts once.
        source: the line of the user's that it comes from, as ``"model.py:17"``.
        scope: the named scopes around it.
        unreached: why it cannot be replaced; "" where it can.
        parameters: paths of those that its weight is computed from; none for a product of activations.
        derivation: how parameters alone make its weight; None of a product of activations, and of a weight
            that cannot be computed by itself.
        number: its own; of products that run the same code, one number.
        keys: of a product of queries and keys, the operand that has the keys, 0 or 1; None of all others, and
            where no sum over its result, with another operand, tells.
        turns: lengths of the scans around it, the outermost first.
        enclosed: what else is around it, whose turns or parts are not known: "a while loop" or "a
            shard_map"; "" where nothing is.
        has_constant: whether an operand is one of the function's own arrays, which no argument determines.

    >>> from jaxquant.engine import products
    >>> x = jax.ShapeDtypeStruct((8, 64), "float32")
    >>> w = {"up": jax.ShapeDtypeStruct((64, 16), "float32")}
    >>> (product,) = products(lambda w, x: x @ w["up"], w, x)
    >>> product.path, product.kind, product.weight, product.macs
    ('up', 'dot', 1, 8192)
    """

    path: str
    kind: Kind
    weight: int | None
    probabilities: int | None
    operands: tuple[jax.ShapeDtypeStruct, ...]
    settings: Mapping[str, Any] = dataclasses.field(repr=False)
    times: int = 1
    source: str = ""
    scope: str = ""
    unreached: str = ""
    has_constant: bool = False
    parameters: tuple[str, ...] = ()
    derivation: Derivation | None = dataclasses.field(default=None, repr=False)
    number: int = dataclasses.field(default=0, repr=False)
    keys: int | None = None
    turns: tuple[int, ...] = ()
    enclosed: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a rule may match: the parameter's path, and the path of the module that holds it."""
        holder = self.path.rpartition("/")[0]
        return (self.path,) if self.weight is None or not holder else (self.path, holder)

    @property
    def is_quantizable(self) -> bool:
        """Whether it sums products of floating-point numbers; those with a weight may be integers.

        Positions and masks are integers; rotary angles, positions times frequencies, sum nothing.
        """
        if self.kind == "lookup":
            return bool(jax.numpy.issubdtype(self.operands[0].dtype, jax.numpy.floating))
        is_sum = self.kind != "dot" or len(self.settings["dimension_numbers"][0][0]) > 0
        floats = (jax.numpy.issubdtype(x.dtype, jax.numpy.floating) for x in self.operands[:2])
        return is_sum and (all(floats) if self.weight is None else list(floats)[self.weight])

    @property
    def macs(self) -> int:
        """Multiplications in one call."""
        if self.kind == "lookup":
            return 0
        left, right = (x.shape for x in self.operands[:2])
        numbers = self.settings.get("dimension_numbers")
        if self.kind == "conv":
            assert numbers is not None
            features = right[numbers.rhs_spec[0]]
            return self.times * math.prod(self.result.shape) * math.prod(right) // max(1, features)
        if self.kind == "ragged":
            ragged = self.settings.get("ragged_dot_dimension_numbers")
            numbers = ((((1,), (1,)), ((), ()))) if ragged is None else ragged.dot_dimension_numbers
        assert numbers is not None
        return self.times * math.prod(self.result.shape) * math.prod(left[a] for a in numbers[0][0])

    @property
    def result(self) -> jax.ShapeDtypeStruct:
        """The result's shape and type."""
        return self.settings["result"]

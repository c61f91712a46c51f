"""A recipe as what takes a product's place."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.engine.derivations import Derivation
from jaxquant.engine.products import Product
from jaxquant.functions.states import State
from jaxquant.numerics.measuring import Quantized
from jaxquant.numerics.qarray import QArray, dequantize, fake_quant
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.numerics.stacking import Stacking
from jaxquant.operations import tapped
from jaxquant.operations.attention import Attention
from jaxquant.operations.conv import ConvGeneralDilated
from jaxquant.operations.dot import DotGeneral
from jaxquant.operations.operands import Operands
from jaxquant.operations.product import is_float8, materialized
from jaxquant.operations.ragged import RaggedDot
from jaxquant.operations.tapped import Tapped

_CONV = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
    "precision",
    "preferred_element_type",
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """The operation that replaces a product.

    The weight, or the values that probabilities are multiplied with, is a recipe's right operand, on
    whichever side the product has it.

    Attributes:
        recipe: what it computes by.
        compute: of (what makes a product of a `State` or None, a state, activations, the weight as it is
            stored, an array or a `QArray`).
        right: which of the product's operands is the recipe's right one.
        order: how the product has the axes of what is stored; None where it has them as they are.
        summed: axes of the activations that are summed over; none of a lookup, which has no activations.
        axes: along which the weight is summed over, as it is stored.
        stored: how parameters alone make the weight as it is stored; None where they don't.
        each: axes of the activations along which lie those of each of these matrices.
        stacking: where in the weight as it is stored matrices lie that are each quantized by itself.
        state: what takes the place of parts of the recipe.
    """

    recipe: DotGeneral
    compute: Callable[..., jax.Array]
    right: int
    order: tuple[int, ...] | None
    summed: tuple[int, ...]
    axes: tuple[int, ...]
    stored: Derivation | None
    each: tuple[int, ...] = ()
    stacking: Stacking | None = None
    state: State | None = None

    @property
    def quantizer(self) -> Quantizer | None:
        """The weight's quantizer; None if the weight stays in float."""
        return self.recipe.forward.rhs

    @property
    def activations(self) -> Quantizer | None:
        """The activations' quantizer; None if there are none, or if they stay in float."""
        return self.recipe.forward.lhs if self.summed else None

    def by(self, state: State | None) -> "Operation":
        """Returns the same with a state in its recipe."""
        return dataclasses.replace(self, state=state)

    def bind(self, state: State | None) -> Any:
        """Returns the recipe's product with a state in it."""
        return self.recipe if state is None else state.bind(self.recipe)

    def check(self, state: State | None) -> "Operation":
        """Returns the same with a state of its first turns, for one turn's operands."""
        turns = 0 if self.stored is None else len(self.stored.turns)
        return self.by(None if state is None else state.first(turns))

    def __call__(self, *operands: jax.Array) -> jax.Array:
        return self.with_weight(self.weight(*operands), *operands)

    def weight(self, *operands: jax.Array) -> jax.Array:
        """Returns the weight among operands, with its axes as it is stored."""
        weight = operands[self.right]
        return (
            weight if self.order is None else jnp.transpose(weight, tuple(np.argsort(self.order)))
        )

    def flatten_left(self, *operands: jax.Array) -> jax.Array:
        """Returns the activations among operands."""
        return operands[1 - self.right]

    def with_weight(self, weight: jax.Array | QArray, *operands: jax.Array) -> jax.Array:
        """Returns the product of operands, with a weight as it is stored in the place of theirs."""
        others = [x for i, x in enumerate(operands) if i != self.right]
        return self.compute(self.bind, self.state, others[0], weight, *others[1:])


def operation(
    product: Product,
    recipe: DotGeneral | Attention,
    state: State | None = None,
    is_tried: bool = True,
) -> Operation | None:
    """Returns the operation that replaces a product; None if the recipe leaves it in float.

    Args:
        product: of a function.
        recipe: for it.
        state: what takes the place of parts of the recipe when it is computed.
        is_tried: whether it is computed in shapes alone, which refuses what the recipe cannot take.

    Raises:
        ValueError: a product that cannot be reached, or that cannot take the recipe.
    """
    if product.unreached:
        raise ValueError(f"it cannot be replaced: {product.unreached}")
    if isinstance(recipe, Attention):
        found = _of_activations(product, recipe)
    else:
        makers = {"dot": _dot, "conv": _conv, "ragged": _ragged, "lookup": _lookup}
        found = makers[product.kind](product, recipe, product.weight)  # pyright: ignore
    if found is not None and is_tried:
        one = lambda s, *xs: found.check(s)(*as_floats(product, xs))  # noqa: E731
        jax.eval_shape(one, state, *product.operands)
    return found


def as_floats(product: Product, operands: Sequence[Any]) -> tuple[Any, ...]:
    """Returns a product's operands, integers that are multiplied by floating-point numbers as such."""
    types = [x.dtype for x in operands[:2] if jnp.issubdtype(x.dtype, jnp.floating)]
    if product.kind == "lookup" or len(types) != 1:
        return tuple(operands)
    return (*(x.astype(types[0]) for x in operands[:2]), *operands[2:])


def _of_activations(product: Product, recipe: Attention) -> Operation | None:
    is_scores = product.probabilities is None
    dot = recipe.qk if is_scores else recipe.pv
    if dot is None and recipe.kv is None:
        return None
    if product.kind != "dot":
        raise ValueError(f"{product.kind} of two activations takes no recipe for attention")
    if recipe.kv is not None and is_scores and product.keys is None:
        raise ValueError(
            "which operand has the keys, that a cache would hold, is not known: no product sums over them "
            "after it; a{bits} quantizes both"
        )
    values = 0 if product.probabilities == 1 else 1
    right = values if not is_scores or product.keys is None else product.keys
    found = _dot(product, DotGeneral() if dot is None else dot, right)
    return found if recipe.kv is None else _with_cache(product, found, recipe.kv, is_scores)


def _with_cache(
    product: Product, plain: Operation, quantizer: Quantizer, is_scores: bool
) -> Operation:
    """Quantizes keys or values as a cache stores them: one scale for each token's and head's vector."""
    contracting, batch = product.settings["dimension_numbers"]
    taken = (*contracting[plain.right], *batch[plain.right])
    free = (a for a in range(product.operands[plain.right].ndim) if a not in taken)
    axes = tuple(contracting[plain.right] if is_scores else free)

    def compute(make: Any, state: Any, activations: jax.Array, cached: jax.Array) -> jax.Array:
        def bind(state: Any) -> Any:
            dot = make(state)
            is_tapped = isinstance(dot, Tapped)
            return dot.of_cached(Quantized(cached, quantizer, axes)) if is_tapped else dot

        return plain.compute(bind, state, activations, fake_quant(cached, quantizer, axis=axes))

    return dataclasses.replace(plain, compute=compute)


def _dot(product: Product, dot: DotGeneral, right: int) -> Operation:
    settings = product.settings
    names = ("precision", "preferred_element_type", "out_sharding")
    options = {name: settings[name] for name in names if settings.get(name) is not None}
    contracting, batch = settings["dimension_numbers"]
    sides = [(tuple(contracting[i]), tuple(batch[i])) for i in (0, 1)]
    order = None
    if product.derivation is not None and right == product.weight:
        order = product.derivation.order
    # The axes of the weight as it is stored, in the order in which the product has them.
    axes = order or tuple(range(product.operands[right].ndim))
    left, stored = sides[1 - right], tuple(tuple(axes[a] for a in part) for part in sides[right])
    left, stored = _sorted(left, stored)
    numbers = ((left[0], stored[0]), (left[1], stored[1]))
    free = [a for a in axes if a not in (*stored[0], *stored[1])]
    result = _result_order(product, right, len(stored[1]), free)
    if "out_sharding" in options and result != tuple(range(len(result))):
        raise ValueError(
            "its result's sharding is set and its axes are moved, which is not reached"
        )

    def whole(make: Any, state: Any, activations: jax.Array, weight: Any) -> jax.Array:
        return make(state)(activations, weight, numbers, **options)

    is_each = right == product.weight and bool(stored[1])
    multiply = _of_each(numbers, options) if is_each else whole
    shape = tuple(product.operands[right].shape[axes.index(a)] for a in range(len(axes)))
    stacking = Stacking.along(sorted(stored[1]), shape) if is_each else None

    def compute(*arguments: Any) -> jax.Array:
        return jnp.transpose(multiply(*arguments), result)

    derivation = None if product.derivation is None else product.derivation.stored
    each = left[1] if is_each else ()
    return Operation(dot, compute, right, order, left[0], stored[0], derivation, each, stacking)


def _of_each(numbers: Any, options: dict[str, Any]) -> Callable[..., jax.Array]:
    """Returns an operation that computes a product of several matrices, as vmap makes, one by one."""
    (summed, summed_right), (batch, batch_right) = numbers

    def inner(axes: Sequence[int], taken: Sequence[int]) -> tuple[int, ...]:
        return tuple(a - sum(b < a for b in taken) for a in axes)

    own = (inner(summed, batch), inner(summed_right, batch_right)), ((), ())

    def compute(make: Any, state: State | None, activations: jax.Array, weight: Any) -> jax.Array:
        one = lambda s, x, w: make(s)(x, w, own, **options)  # noqa: E731
        for k in reversed(range(len(batch))):
            (left,) = inner(batch[k : k + 1], batch[:k])
            (right,) = inner(batch_right[k : k + 1], batch_right[:k])
            one = jax.vmap(one, in_axes=(None if state is None else state.axes(right), left, right))
        return one(state, activations, weight)

    return compute


def _sorted(left: Any, stored: Any) -> tuple[Any, Any]:
    """Returns axes that are summed over in the order of the weight, along whose last one blocks lie."""
    pairs = sorted(zip(left[0], stored[0], strict=True), key=lambda pair: pair[1])
    summed = tuple(tuple(pair[i] for pair in pairs) for i in (0, 1))
    return (summed[0], left[1]), (summed[1], stored[1])


def _result_order(product: Product, right: int, batch: int, free: Sequence[int]) -> tuple[int, ...]:
    """Returns the order of the result's axes for a product whose stored weight is on the right."""
    count = len(product.result.shape) - batch - len(free)
    others = tuple(range(batch, batch + count))
    places = {a: batch + count + i for i, a in enumerate(sorted(free))}
    own = tuple(places[a] for a in free)
    return (*range(batch), *own, *others) if right == 0 else (*range(batch), *others, *own)


def _plain(dot: Any, what: str) -> DotGeneral:
    if not isinstance(dot, DotGeneral):
        raise ValueError(
            f"{what} takes no {type(dot).__name__} product; a product of matrices does"
        )
    return dot


def _conv(product: Product, dot: DotGeneral, right: int) -> Operation:
    if right == 0:
        raise ValueError(
            "its weight is the convolution's left operand, and a recipe's is the right one"
        )
    settings: Any = {name: product.settings[name] for name in _CONV}
    # Batch or output features, input features, space.  Blocks lie along the last axis summed over.
    specs = (settings["dimension_numbers"][i] for i in (0, 1))
    summed, axes = ((*space, features) for _, features, *space in specs)
    multiply = _in_blocks if _has_blocks(dot) else _convolved

    def compute(make: Any, state: Any, activations: jax.Array, weight: Any) -> jax.Array:
        made = _plain(make(state), "a convolution")
        return multiply(made, (activations, summed), (weight, axes), settings)

    return Operation(dot, compute, 1, None, summed, axes, product.derivation)


def _has_blocks(dot: DotGeneral) -> bool:
    """Returns whether a recipe quantizes a forward operand in blocks.

    Raises:
        ValueError: one that quantizes gradients too.
    """
    forward = [x for x in (dot.forward.lhs, dot.forward.rhs) if x is not None]
    has_blocks = any(not isinstance(x.granularity, str) for x in forward)
    if has_blocks and not (dot.dlhs is None and dot.drhs is None):
        raise ValueError(
            "a convolution's gradients are not quantized in blocks; a recipe of the forward product alone, "
            "such as mxfp8, takes it"
        )
    return has_blocks


def _convolved(dot: DotGeneral, left: Any, right: Any, settings: dict[str, Any]) -> jax.Array:
    """Returns a convolution; products of gradients that multiply two float8 types are simulated."""
    kept = (dot.forward.rhs, dot.forward.lhs)
    pairs = zip((dot.dlhs, dot.drhs), kept, strict=True)
    gradients = [_of_one_type(operands, own) for operands, own in pairs]
    result = ConvGeneralDilated(dot.forward, *gradients)(left[0], right[0], **settings)
    return tapped.convolution(dot, gradients, result, left, right, settings)


def _of_one_type(operands: Operands | None, kept: Quantizer | None) -> Operands | None:
    if operands is None or operands.arithmetic != "native":
        return operands
    pair = [x.element for x in (operands.lhs, operands.rhs or kept) if x is not None]
    is_mixed = len(pair) == 2 and all(map(is_float8, pair)) and pair[0].dtype != pair[1].dtype
    return dataclasses.replace(operands, arithmetic="simulated") if is_mixed else operands


def _in_blocks(dot: DotGeneral, left: Any, right: Any, settings: dict[str, Any]) -> jax.Array:
    """Returns a convolution of operands in blocks along input features, in their own type."""

    def simulated(x: Any, axes: tuple[int, ...], quantizer: Quantizer | None) -> jax.Array:
        if isinstance(x, QArray):
            return dequantize(x)
        return x if quantizer is None else fake_quant(x, quantizer, axis=axes)

    lhs = simulated(left[0], left[1], dot.forward.lhs)
    rhs = simulated(right[0], right[1], dot.forward.rhs)
    result = jax.lax.conv_general_dilated(lhs, rhs, **settings)
    return tapped.convolution(dot, (None, None), result, left, right, settings)


def _ragged(product: Product, dot: DotGeneral, right: int) -> Operation:
    settings = product.settings
    numbers = settings.get("ragged_dot_dimension_numbers")
    if right == 0 or settings.get("group_offset") is not None:
        raise ValueError("only rows by groups of a weight are reached, without a group_offset")
    if numbers is not None and not _is_plain(numbers):
        raise ValueError(f"a ragged product along {numbers} takes no recipe")
    names = ("precision", "preferred_element_type")
    options = {name: settings[name] for name in names if settings.get(name) is not None}

    def compute(make: Any, state: Any, activations: Any, weight: Any, groups: Any) -> jax.Array:
        dot = _plain(make(state), "a ragged product")
        product = RaggedDot(dot.forward, dot.dlhs, dot.drhs)
        result = product(activations, weight, groups, **options)
        return tapped.ragged(dot, result, activations, weight, groups)

    return Operation(dot, compute, 1, None, (1,), (1,), product.derivation)


def _is_plain(numbers: Any) -> bool:
    """Returns whether a ragged product is `jax.lax.ragged_dot`'s: rows [m, k] and matrices [g, k, n]."""
    (contracting, batch) = numbers.dot_dimension_numbers
    return (
        [tuple(x) for x in contracting] == [(1,), (1,)]
        and not any(map(len, batch))
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
    )


def _lookup(product: Product, dot: DotGeneral, right: int) -> Operation:
    """Returns rows of the table as it is stored: they are summed over their features, which share a scale."""
    if dot.forward.rhs is None:
        raise ValueError("it takes rows of a table, and the recipe leaves weights in float")
    names = ("dimension_numbers", "slice_sizes", "mode", "fill_value", "indices_are_sorted")
    settings = {name: product.settings[name] for name in names}

    def compute(make: Any, state: Any, places: jax.Array, table: Any) -> jax.Array:
        dot = _plain(make(state), "a lookup")
        if not isinstance(table, QArray):
            assert dot.forward.rhs is not None
            simulated = fake_quant(table, dot.forward.rhs, axis=-1)
            rows = materialized(jax.lax.gather(simulated, places, **settings))
            return tapped.lookup(dot, rows, table)
        rows = dequantize(table[places[..., 0]])
        mode = jax.lax.GatherScatterMode.from_any(settings["mode"])
        if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
            fill = jnp.nan if settings["fill_value"] is None else settings["fill_value"]
            is_there = (places >= 0) & (places < table.shape[0])
            rows = jnp.where(
                is_there.reshape(is_there.shape[:-1] + (1,) * (table.ndim - 1)), rows, fill
            )
        return tapped.lookup(dot, materialized(rows), table)

    axes = (product.operands[0].ndim - 1,)
    return Operation(dot, compute, right, None, (), axes, product.derivation)

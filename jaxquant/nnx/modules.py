"""What quantization puts into a model's modules: operations with state of their own, and hooks."""

import copyreg
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxquant import calibration as calibrations
from jaxquant.conv import ConvGeneralDilated
from jaxquant.dot import DotGeneral
from jaxquant.einsum import einsum
from jaxquant.groups import scale_shape
from jaxquant.product import materialized, rows_of
from jaxquant.qarray import QArray, dequantize, fake_quant
from jaxquant.quantizer import Quantizer
from jaxquant.stacking import Stacking


class Stored(nnx.Variable):
    """A weight that is stored as a `QArray`, which no optimizer touches."""

    def __jax_array__(self) -> Any:
        return read(self).__jax_array__()  # which says why it cannot be one


class StepSize(nnx.Param):
    """A step size that learns with the weights (LSQ)."""


class InputRange(nnx.Variable):
    """The range of the activations that a weight multiplies, which calibration found."""


class ChannelScale(nnx.Variable):
    """What the channels of a weight are multiplied with, and those of its activations divided by."""


class Adapter(nnx.LoRAParam):
    """A or B of a low-rank product beside a weight's."""


class AdapterGain(nnx.Variable):
    """What a low-rank product is multiplied with."""


class Observation(nnx.Variable):
    """What an `Observer` has seen."""


def read(variable: nnx.Variable) -> Any:
    """A variable's value, whatever tree it is."""
    # Flax before 0.12.1 has no get_value, and later versions have no value.
    return variable.get_value() if hasattr(type(variable), "get_value") else variable.value


def write(variable: nnx.Variable, value: Any) -> None:
    """Sets a variable's value."""
    if hasattr(type(variable), "set_value"):
        variable.set_value(value)
    else:
        variable.value = value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Einsum:
    """`jaxquant.einsum` in the form that `nnx.Einsum` calls its einsum_op."""

    dot_general: Any

    def __call__(
        self,
        subscripts: str,
        lhs: jax.Array,
        rhs: Any,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        options = (precision, preferred_element_type, out_sharding)
        return einsum(subscripts, lhs, rhs, self.dot_general, *options)


def check_part(what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises a ValueError where a layer is given another part of several layers' numbers than its own."""
    if tuple(found) != tuple(expected):
        raise ValueError(
            f"{what} have shape {tuple(found)}, not {tuple(expected)}: the layers are stacked along another "
            "axis than their sizes tell; stack them along axis 0, or a number of them that is none of their "
            "weights' sizes"
        )


@dataclasses.dataclass(frozen=True)
class KeepStored:
    """A layer's promote_dtype that passes stored weights on, in the type they would be promoted to.

    Attributes:
        promote_dtype: the layer's own.
        scale_shape: that of the scales of a layer that is stacked with others; None of one that is not.
    """

    promote_dtype: Callable[..., Any]
    scale_shape: tuple[int, ...] | None = None

    def __call__(self, operands: Sequence[Any], /, **options: Any) -> tuple[Any, ...]:
        for x in operands:
            if isinstance(x, QArray) and self.scale_shape is not None:
                check_part("the scales of a stored weight", x.scale.shape, self.scale_shape)
        # In the place of a stored weight its type alone takes part.
        arrays = [jnp.zeros((), x.dtype) if isinstance(x, QArray) else x for x in operands]
        promoted = self.promote_dtype(tuple(arrays), **options)
        return tuple(
            dataclasses.replace(x, dtype=p.dtype) if isinstance(x, QArray) else p
            for x, p in zip(operands, promoted, strict=True)
        )


class QuantizedEmbed(nnx.Embed):
    """`nnx.Embed` whose table is quantized, and whose `attend` is a quantized product.

    An Embed becomes one by its class alone (`quantized_embed`): its variables and settings stay.  Rows are
    summed over their features, so those share a scale.
    """

    dot_general: Any

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Rows of the table as it is stored, as `nnx.Embed`."""
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"an Embed takes integers; got {inputs.dtype}")
        if out_sharding is not None:
            rows = QuantizedEmbed.__call__(self, inputs)
            placed: Any = jax.sharding.auto_axes(lambda x: x, out_sharding=out_sharding)
            return placed(rows)
        (table,) = self.promote_dtype((self.embedding[...],), dtype=self.dtype, inexact=False)
        operation = operation_of(self.dot_general)
        if self.num_embeddings == 1:
            inputs = jnp.zeros_like(inputs)  # as there, one row is everyone's
        if isinstance(table, QArray):
            stored: Any = table[inputs]
            rows = dequantize(stored)
            # As jnp.take has it: what lies outside of the table is NaN.
            inside = (inputs >= -self.num_embeddings) & (inputs < self.num_embeddings)
            return materialized(jnp.where(inside[..., None], rows, jnp.nan))
        if operation is None or operation.forward.rhs is None:
            return rows_of(table, inputs)
        table = fake_quant(table, operation.forward.rhs, axis=-1)
        return materialized(rows_of(table, inputs))

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """query · tableᵀ, as `nnx.Embed`."""
        options = {} if out_sharding is None else {"out_sharding": out_sharding}
        query, table = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        return self.dot_general(query, table, (((query.ndim - 1,), (1,)), ((), ())), **options)


class _Made(type(nnx.Embed)):
    """The class of the classes that `quantized_embed` makes."""


@functools.cache
def quantized_embed(cls: type) -> type:
    """The class of an Embed that is quantized: the user's own, before `QuantizedEmbed`.

    What the user's class overrides stays, and its `super()` finds the quantized methods.

    >>> class Scaled(nnx.Embed):
    ...     def __call__(self, inputs):
    ...         return 8 * super().__call__(inputs)
    >>> [c.__name__ for c in quantized_embed(Scaled).__mro__[:4]]
    ['Scaled', 'Scaled', 'QuantizedEmbed', 'Embed']
    """
    if cls is nnx.Embed or issubclass(cls, QuantizedEmbed):
        return QuantizedEmbed if cls is nnx.Embed else cls
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    # A metaclass of the user's own is kept; such classes are not pickled.
    made: Any = _Made if type(cls) is type(nnx.Embed) else type(cls)
    return made(cls.__name__, (cls, QuantizedEmbed), names)


# By the class that it was made of: its name is that class's.
copyreg.pickle(_Made, lambda cls: (quantized_embed, cls.__bases__[:1]))


def as_attribute(operation: Any) -> Any:
    """An operation in the form that a module's attribute holds it: marked as data or not."""
    if isinstance(operation, nnx.Module):
        return nnx.data(operation)
    kinds = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    has_arrays = any(isinstance(leaf, kinds) for leaf in jax.tree.leaves(operation))
    return nnx.data(operation) if has_arrays else nnx.static(operation)


class Learned(nnx.Module):
    """An operation whose step sizes are parameters.

    The weights' step starts at 2 · mean|w| / √Q_P, as LSQ does; the activations' starts so at the first
    call of `jaxquant.nnx.calibrate`, and a call before that is an error.
    """

    def __init__(
        self, operation: Any, weight: jax.Array, axes: tuple[int, ...], stacking: Stacking
    ):
        self.operation = operation
        forward = operation_of(operation).forward
        self.rhs_step = self.lhs_step = nnx.data(None)
        if is_learned(forward.rhs):
            first = stacking.each(lambda w: _first_weight_step(w, forward.rhs, axes))
            self.rhs_step = StepSize(first(weight))
            self.rhs_shape = stacking.own(self.rhs_step.shape)  # of one layer's
        self.calibrated = not is_learned(forward.lhs)
        self.wanted: Quantizer | None = None  # whose start is being looked for
        if is_learned(forward.lhs):
            self.lhs_step = StepSize(stacking.placed(jnp.ones(stacking.sizes, jnp.float32)))

    def resolved(self) -> Any:
        """The operation with the steps as they are now."""
        if not self.calibrated:
            raise ValueError(
                "the activations' learned steps have no start yet; call "
                "jaxquant.nnx.calibrate(model, batches) once before training"
            )
        return self.with_steps(self.lhs_step, self.rhs_step)

    def with_steps(self, lhs: Any, rhs: Any) -> Any:
        """The operation with given steps, each a variable or None."""
        forward = operation_of(self.operation).forward
        changes = {}
        for name, step in (("lhs", lhs), ("rhs", rhs)):
            if step is not None:
                # A step that training carries below zero keeps its size.
                given = calibrations.Step(jnp.abs(read(step)))
                quantizer = getattr(forward, name)
                changes[name] = dataclasses.replace(quantizer, calibration=given)
        return with_forward(self.operation, dataclasses.replace(forward, **changes))

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        if self.rhs_step is not None:
            check_part("the learned steps of a weight", self.rhs_step.shape, self.rhs_shape)
        return self.resolved()(*args, **kwargs)


def is_learned(quantizer: Quantizer | None) -> bool:
    return quantizer is not None and quantizer.calibration is calibrations.learned


def first_step(x: jax.Array, quantizer: Quantizer) -> jax.Array:
    """Where LSQ starts a step for a whole tensor: 2 · mean|x| / √Q_P.

    Source: Esser et al. 2020, arXiv 1902.08153, section 2.1.
    """
    mean = jnp.mean(jnp.abs(x.astype(jnp.float32)))
    return 2 * jnp.maximum(mean, 1e-12) / jnp.sqrt(1.0 * quantizer.element.max_value)


def _first_weight_step(weight: jax.Array, quantizer: Quantizer, axes: tuple[int, ...]) -> jax.Array:
    groups = scale_shape(weight.shape, quantizer.granularity, axes)  # pyright: ignore
    summed = tuple(a for a in range(weight.ndim) if groups[a] == 1)
    mean = jnp.mean(jnp.abs(weight.astype(jnp.float32)), axis=summed, keepdims=True)
    return 2 * jnp.maximum(mean, 1e-12) / jnp.sqrt(1.0 * quantizer.element.max_value)


@dataclasses.dataclass(frozen=True)
class Activations:
    """The left operand of a product, as an `Observer` saw it.

    Attributes:
        lhs: the operand.
        axes: what the product sums over, in lhs.
        columns: gives it as rows [..., n] that are each multiplied by the weight as a matrix [n, m].
    """

    lhs: jax.Array
    axes: tuple[int, ...]
    columns: Callable[[], jax.Array]


class Observer(nnx.Module):
    """An operation that gathers statistics of its left operand, the activations.

    Args:
        kind: of the module.
        operation: what it does besides.
        state: where the statistics of one layer start.
        update: from (state, `Activations`) to the next state.
        stacking: where several layers are.
    """

    def __init__(
        self,
        kind: str,
        operation: Any,
        state: Any,
        update: Callable[..., Any],
        stacking: Stacking,
    ):
        self.kind = kind
        self.operation = as_attribute(operation)
        self.update = update
        self.stacking = nnx.static(stacking)
        self.shapes = nnx.static(tuple(leaf.shape for leaf in jax.tree.leaves(state)))
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (*stacking.sizes, *x.shape)), state)
        self.observed = Observation(jax.tree.map(stacking.placed, copies))

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        seen = _activations(self.kind, args, kwargs)
        held, tree = jax.tree.flatten(read(self.observed))
        state = [x.reshape(shape) for x, shape in zip(held, self.shapes, strict=True)]
        new = jax.tree.leaves(self.update(tree.unflatten(state), seen))
        kept = [x.reshape(before.shape) for x, before in zip(new, held, strict=True)]
        write(self.observed, tree.unflatten(kept))
        return self.operation(*args, **kwargs)

    def found(self) -> Any:
        """The state of one layer, or of all, stacked along leading axes."""
        held, tree = jax.tree.flatten(read(self.observed))
        pairs = zip(held, self.shapes, strict=True)
        return tree.unflatten([self.stacking.gathered(x, shape) for x, shape in pairs])


def _activations(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Activations:
    if kind == "conv":
        lhs, kernel, strides, padding = args[:4]
        columns = functools.partial(_patches, lhs, kernel.shape, strides, padding, kwargs)
        return Activations(lhs, tuple(range(1, lhs.ndim)), columns)
    if kind == "einsum":
        subscripts, lhs = args[:2]
        axes = einsum_axes(subscripts, lhs.ndim)[0]
    else:
        lhs, _, numbers = args[:3]
        axes = tuple(numbers[0][0])

    def columns() -> jax.Array:
        last = tuple(range(lhs.ndim - len(axes), lhs.ndim))
        moved = jnp.moveaxis(lhs, axes, last)
        return moved.reshape(*moved.shape[: last[0]], -1)

    return Activations(lhs, axes, columns)


def einsum_axes(subscripts: str, lhs_ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What an einsum sums over: axes of lhs and of rhs, in the order of rhs's.

    >>> einsum_axes("...tnh,nhd->...td", 4)
    ((2, 3), (0, 1))
    """
    operands, out = subscripts.replace(" ", "").split("->")
    left, right = operands.split(",")
    left = left.replace("...", "." * (lhs_ndim - len(left.replace("...", ""))))
    summed = [x for x in right if x in left and x not in out]
    return tuple(map(left.index, summed)), tuple(map(right.index, summed))


def _patches(lhs: jax.Array, shape: Any, strides: Any, padding: Any, options: dict) -> jax.Array:
    """What a convolution multiplies at each place, [..., n] in the order of its kernel [*window, c, m]."""
    if options.get("feature_group_count", 1) != 1:
        raise ValueError(
            "these statistics are of dense convolutions; this one has feature_group_count "
            f"{options['feature_group_count']}"
        )
    patches = jax.lax.conv_general_dilated_patches(
        lhs,
        shape[:-2],
        strides,
        padding,
        options.get("lhs_dilation"),
        options.get("rhs_dilation"),
        jax.lax.conv_dimension_numbers(lhs.shape, shape, options["dimension_numbers"]),
    )
    # The patches have features first, and kernels last.
    split = patches.reshape(*patches.shape[:-1], shape[-2], -1)
    return jnp.moveaxis(split, -2, -1).reshape(patches.shape)


# ---------------------------------------------------------------------------------------------------
# The DotGeneral within an operation


def operation_of(installed: Any) -> Any:
    """The `DotGeneral` or `ConvGeneralDilated` within what a module holds; None where there is none."""
    if isinstance(installed, DotGeneral | ConvGeneralDilated):
        return installed
    if isinstance(installed, Learned):
        unresolved = installed.operation
        steps = (installed.lhs_step, installed.rhs_step)
        return operation_of(
            installed.with_steps(*steps) if any(s is not None for s in steps) else unresolved
        )
    for name in ("dot_general", "operation"):
        if hasattr(installed, name):
            return operation_of(getattr(installed, name))
    return None


def with_forward(installed: Any, forward: Any) -> Any:
    """The same operation with other forward operands."""
    if isinstance(installed, Einsum):
        return Einsum(with_forward(installed.dot_general, forward))
    return dataclasses.replace(installed, forward=forward)

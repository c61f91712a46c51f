"""Statistics of a model's activations over batches, recorded where products are computed."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant.engine.batches import check_each, fitting
from jaxquant.engine.products import Product
from jaxquant.functions import quantizing
from jaxquant.functions.operations import Operation, operation
from jaxquant.nnx.calls import DOOR, Call, called
from jaxquant.nnx.doors import Door, copied, door_of, install
from jaxquant.operations.dot import DotGeneral


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A statistic of what one matrix is multiplied with.

    Attributes:
        start: its state before anything was seen, a pytree of arrays.
        measure: from rows [k, n], each multiplied by the matrix [n, m], and how many of them count, to
            arrays.  Rows that do not count are zeros; of what did not run, all that was measured is zeros.
        add: from a state and what was measured to the next state.
    """

    start: Any
    measure: Callable[[jax.Array, Any], Any]
    add: Callable[[Any, Any], Any]


def observe(
    model: nnx.Module,
    batches: Iterable[Any],
    statistics: Callable[[Product], Statistic | None],
    call: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Returns statistics of the activations that weights are multiplied with, gathered over batches.

    The model runs as it is, compiled once, and each batch's activations are gone with it.

    Args:
        model: an NNX model, float, quantized or frozen; not changed.
        batches: inputs, each an array or a tuple of arguments.
        statistics: from a product with a weight to its statistic; None for one that is not looked at.
        call: from (model, *batch); the model's own call where not given.

    Returns:
        The last state of each weight's statistic, by how the weight is made of parameters: by its path, or as
        in ``turn(layers/kernel)`` where a scan takes it apart.  States of the turns in which it differs, and
        of several matrices that are multiplied side by side, are stacked along leading axes.

    Raises:
        ValueError: no batches; a batch that holds a NaN or an Inf; no product to look at; a convolution in
            groups; a product within a while loop.

    >>> largest = Statistic(jnp.zeros(4), lambda rows, _: jnp.abs(rows).max(0), jnp.maximum)
    >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    >>> observe(model, [jnp.array([[1.0, -3.0, 0.0, 0.0]])], lambda product: largest)
    {'kernel': Array([1., 3., 0., 0.], dtype=float32)}
    """
    model = copied(model)
    if door_of(model) is None:
        install(model, [])
    door, states = door_of(model), dict[str, Any]()
    starts: dict[str, Statistic] = {}
    run = jax.jit(functools.partial(_seen, statistics, starts), static_argnums=(0, 1))
    for index, arguments in check_each(batches):
        if door is None:  # there is no weight
            break
        with fitting(index, arguments):
            how = call or "__call__"
            made, arrays, nodes = called(model, door.path, how, arguments, {}, door.first)
            given = door, made, getattr(model, DOOR[1], ()), arrays
            if not states:  # so that the first batch's program is the others' too
                states = _started(
                    starts,
                    jax.eval_shape(functools.partial(run, *given[:2]), *given[2:], states)[0],
                )
            states, changed = run(*given, states)
            changed.write(nodes)
    if not states:
        raise ValueError("no weight's activations are to be observed")
    return states


def _started(starts: Mapping[str, Statistic], shapes: Mapping[str, Any]) -> dict[str, Any]:
    def of(start: Any, shape: Any) -> Any:
        return jax.tree.map(lambda x, s: jnp.broadcast_to(x, s.shape), start, shape)

    return {name: of(starts[name].start, shape) for name, shape in shapes.items()}


def _seen(
    statistics: Callable[[Product], Statistic | None],
    starts: dict[str, Statistic],
    door: Door,
    call: Call,
    rule_arrays: Any,
    arrays: Any,
    states: dict[str, Any],
) -> tuple[dict[str, Any], Any]:
    """Returns the states after a call, and what it changed of the model; `starts` gets what is looked at."""
    trace = call.trace(arrays)
    stored = quantizing.stored_among(call.origins, arrays)
    rules = door.parsed(rule_arrays)
    decisions = quantizing.decide(
        trace.products, rules, True, call.states(arrays), stored, True, door.aliases, is_tried=False
    )
    watched: dict[int, _Watched] = {}
    for index, decision in enumerate(decisions):
        product = decision.product
        is_one = product.weight is not None and product.kind != "lookup"
        if is_one and (statistic := statistics(product)) is not None:
            own = decision.operation or operation(product, DotGeneral(), None, False)
            assert own is not None
            watched[index] = _Watched(product, own, statistic)
    places = {id(decisions[index]): index for index in watched}

    def record(decision: Any, _: Any, *operands: jax.Array) -> Any:
        index = places.get(id(decision))
        return None if index is None else watched[index].measure(*operands)

    how = call.origins, door.on_unsupported, record, watched
    (_, changed), records = quantizing.evaluate_recording(trace, decisions, arrays, *how)
    states = dict(states)
    for index in sorted(records):
        one = watched[index]
        starts[one.name] = one.statistic
        before = states.get(one.name)
        states[one.name] = one.accumulate(before, *records[index])
    return states, call.changed(trace, changed)


@dataclasses.dataclass(frozen=True)
class _Watched:
    """A product that is recorded of."""

    product: Product
    operation: Operation
    statistic: Statistic

    @property
    def name(self) -> str:
        made = self.product.derivation
        return self.product.path if made is None else made.stored.key

    def measure(self, *operands: jax.Array) -> tuple[Any, jax.Array]:
        """Returns statistics for each matrix of the product, and a count for each."""
        found = _each(self.product, self.operation, operands, self.statistic.measure)
        sizes = jax.tree.leaves(found)[0].shape[: self.matrices]
        return found, jnp.ones(sizes, jnp.int8)

    @property
    def matrices(self) -> int:
        """The number of axes of matrices."""
        return 1 if self.product.kind == "ragged" else len(self.operation.each)

    def accumulate(self, before: Any, found: Any, ones: jax.Array) -> Any:
        """Returns the state with what was measured in all turns: of each matrix, one after the other."""
        made = self.product.derivation
        turns = () if made is None else made.stored.turns
        scans = [scan for scan, _ in turns]
        others = [a for a in range(ones.ndim - self.matrices) if a not in scans]
        add, sizes = (
            self.statistic.add,
            tuple(n for a, n in enumerate(ones.shape) if a not in others),
        )
        if before is None:
            start = self.statistic.start
            before = jax.tree.map(lambda x: jnp.broadcast_to(x, (*sizes, *x.shape)), start)
        for _ in sizes:
            add = jax.vmap(add)
        if not others:
            return add(before, found)
        first = range(len(others))
        rows = jax.tree.map(lambda x: jnp.moveaxis(x, others, first), found)
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(others) :]), rows)
        return jax.lax.scan(lambda state, x: (add(state, x), None), before, rows)[0]


def _each(
    product: Product,
    operation: Operation,
    operands: Sequence[jax.Array],
    measure: Callable[[jax.Array, Any], Any],
) -> Any:
    """Returns statistics of the rows that multiply each matrix of a product."""
    left = operation.flatten_left(*operands)
    if product.kind == "conv":
        rows = _patches(product, left)
    elif product.kind == "ragged":
        return _each_group(left, operands[2], measure)
    else:
        batch, summed = operation.each, operation.summed
        ends = (*range(len(batch)), *range(left.ndim - len(summed), left.ndim))
        moved = jnp.moveaxis(left, (*batch, *summed), ends)
        sizes = moved.shape[: len(batch)]
        rows = moved.reshape(*sizes, -1, math.prod(moved.shape[left.ndim - len(summed) :]))
        for _ in batch:
            measure = jax.vmap(measure, in_axes=(0, None))
    return measure(rows, jnp.int32(rows.shape[-2]))


def _each_group(rows: jax.Array, sizes: jax.Array, measure: Callable[[jax.Array, Any], Any]) -> Any:
    """Returns statistics of rows by groups, which are contiguous."""
    places = jnp.arange(rows.shape[0])

    def one(bounds: tuple[jax.Array, jax.Array]) -> Any:
        start, size = bounds
        is_own = (places >= start) & (places < start + size)
        return measure(jnp.where(is_own[:, None], rows, 0), size)

    return jax.lax.map(one, (jnp.cumsum(sizes) - sizes, sizes))


def _patches(product: Product, left: jax.Array) -> jax.Array:
    """Returns the patches that a convolution multiplies, [k, n] in the order of its kernel [*window, c, m].

    Raises:
        ValueError: a convolution in groups.
    """
    settings = product.settings
    groups = settings["feature_group_count"] * settings["batch_group_count"]
    if groups != 1:
        raise ValueError(
            f"these statistics are of dense convolutions; this one has {groups} groups"
        )
    numbers = settings["dimension_numbers"]
    _, _, *space = numbers.rhs_spec
    patches = jax.lax.conv_general_dilated_patches(
        left,
        [product.operands[1].shape[a] for a in space],
        settings["window_strides"],
        settings["padding"],
        settings["lhs_dilation"],
        settings["rhs_dilation"],
        numbers,
    )
    patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)
    # The patches have features first, and kernels last.
    features = left.shape[numbers.lhs_spec[1]]
    split = jnp.moveaxis(patches.reshape(*patches.shape[:-1], features, -1), -2, -1)
    return split.reshape(-1, patches.shape[-1])

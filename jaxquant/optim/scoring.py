"""Score pages in bits: by the update's sensitivity to their rounding, or by statistics of their layer."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxquant.checks import check_whole
from jaxquant.numerics.reductions import largest
from jaxquant.optim import pages
from jaxquant.optim.blocks import (
    BlockStep,
    block_step,
    by_page_group,
    draw_words,
    programs_of,
    wide_leaves,
)
from jaxquant.optim.codecs import straight_log2
from jaxquant.optim.deprecated import accept_old_fields
from jaxquant.optim.leaves import Leaf
from jaxquant.optim.plans import Plan
from jaxquant.optim.state import (
    QuantizedState,
    bits_of,
    by_shards,
    decoded,
    encode_blocks,
    joined,
    merged,
    rooted,
    with_leaf,
)
from jaxquant.optim.traced_update import (
    Component,
    ElementwiseUpdate,
    TracedUpdate,
    elementwise_by_group,
)
from jaxquant.optim.updating import members

Scores = list[list[jax.Array]]  # for each group and slot, float32[shards, groups, pages]


def _per_page(plan: Plan, value: float) -> Scores:
    return [[jnp.full(group.grid, value) for _ in group.slots] for group in plan.groups]


def _check(ema_decay: Any, max_bit_change: Any) -> None:
    if not isinstance(ema_decay, int | float) or not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1); got {ema_decay!r}")
    check_whole("max_bit_change", max_bit_change, 1, pages.PLANES)


# ---------------------------------------------------------------------------------------------------
# Sensitivity of the update


@accept_old_fields(memory="ema_decay", reach="max_bit_change")
@dataclasses.dataclass(frozen=True)
class UpdateSensitivity:
    r"""Scores pages by the sensitivity of the update to their rounding.

    Let x be the state after this step, Q(x) its decoded codes, and u(x) the update that the same gradient
    gives from there.  A page of b bits in slot s has the error and the score

        d = Σ w (u(x with Q(x) in s) − u(x))²,   score = b + ½ ℓ(d),

    summed over the page's elements, with ℓ the logarithm of `Logarithmic`.  w is 1, or the squared gradient,
    which approximates the curvature of the loss.  Scores are exponentially averaged over decisions.  If the
    state of a parameter is decoded at once, its pages share its error equally.  A step without an update
    (`MultiSteps` between two updates, a rejected step) makes no decision; the next one does.

    d is the error of one step.  But an error in a state that carries its old value over times β lasts: over
    steps its square adds up to d / (1 − β²).  With `persistence` a slot's score is larger by
    ½ log₂(1 / (1 − β²)), which is 1.2 bits at β = 0.9 and 4.5 at 0.999.  β is found in the traced update.

    Args:
        weight: "update" for w = 1, "loss" for w = g².
        ema_decay: the weight of the previous average, in [0, 1).
        max_bit_change: the maximum change of a page's width in one decision.
        persistence: whether the score counts how long errors last.

    Raises:
        ValueError: if the weight is unknown, or ema_decay or max_bit_change is out of range.
    """

    weight: Literal["update", "loss"] = "update"
    ema_decay: float = 0.5
    max_bit_change: int = pages.PLANES
    persistence: bool = False

    def __post_init__(self):
        if self.weight not in ("update", "loss"):
            raise ValueError(f"weight must be 'update' or 'loss'; got {self.weight!r}")
        _check(self.ema_decay, self.max_bit_change)

    def init(self, plan: Plan) -> Any:
        """Returns the initial average, and the number of decisions in it."""
        return _per_page(plan, 0.0), jnp.int32(0)

    def __call__(
        self, traced: TracedUpdate, state: QuantizedState, memory: Any, seed: int
    ) -> tuple[Scores, Any, jax.Array]:
        errors = _page_errors(traced, state, seed, self.weight == "loss")
        most = largest(jnp.stack([largest(x).ravel() for slots in errors for x in slots])).reshape(
            ()
        )
        # Errors 2^-48 of the largest get the minimum width anyway; zero has no logarithm.
        floor = jnp.maximum(most * 2.0**-48, jnp.finfo(jnp.float32).tiny)
        before, count = memory
        keep = jnp.where(count == 0, 0.0, self.ema_decay)
        lasting = _lasting(state.plan) if self.persistence else _nothing(state.plan)
        scores = [
            [
                keep * old
                + (1 - keep) * (_bits(table) + 0.5 * straight_log2(jnp.maximum(d, floor)) + more)
                for d, table, old, more in zip(*rows, strict=True)
            ]
            for rows in zip(errors, state.tables, before, lasting, strict=True)
        ]
        return scores, (scores, count + 1), most > 0


_MOST_DECAY = 0.9999  # what never fades would get all bits


def _nothing(plan: Plan) -> list[list[float]]:
    return [[0.0] * len(group.leaves) for group in plan.groups]


def _lasting(plan: Plan) -> list[list[float]]:
    """Returns ½ log₂(1 / (1 − β²)) of each slot of each group."""

    def bits(slot: Sequence[Leaf]) -> float:
        decay = min(max(leaf.decay for leaf in slot), _MOST_DECAY)
        return -0.5 * math.log2(1 - decay**2)

    return [[bits(slot) for slot in group.leaves] for group in plan.groups]


def _bits(table: jax.Array) -> jax.Array:
    return jnp.sum(table != 0, axis=-1, dtype=jnp.int32).astype(jnp.float32)


def _page_errors(traced: TracedUpdate, state: QuantizedState, seed: int, by_loss: bool) -> Scores:
    """Returns d for each page."""
    traced.evaluate(traced.untouched())
    elementwise, _ = elementwise_by_group(traced, state.plan)
    errors = _per_page(state.plan, 0.0)
    for number, update_fns in elementwise.items():
        errors[number] = _errors_by_page_groups(traced, state, number, update_fns, seed, by_loss)
    rest = {
        p
        for n, group in enumerate(state.plan.groups)
        if n not in elementwise
        for p in group.parameters
    }
    for component in traced.components():
        if rest & set(component.parameters):
            _add_full_decode_errors(traced, state, component, seed, by_loss, errors)
    return errors


def _errors_by_page_groups(
    traced: TracedUpdate,
    state: QuantizedState,
    number: int,
    update_fns: Sequence[ElementwiseUpdate],
    seed: int,
    by_loss: bool,
) -> list[jax.Array]:
    group, own = state.plan.groups[number], block_step(state.plan, number, update_fns)
    kinds = list(update_fns[0].results)
    if "update" not in kinds:
        return [jnp.zeros(group.grid) for _ in own.codecs]
    traced.evaluate(
        n for update_fn in update_fns for n in (*update_fn.scalars, *update_fn.wide.values())
    )
    gradients = group.flatten([traced.gradient(p) for p in group.parameters])
    given = (
        *by_page_group(
            group, programs_of(group, update_fns), wide_leaves(traced, group, update_fns)
        ),
        gradients,
    )
    stored = state.pool, state.tables[number], state.scales[number]
    known = {n: traced.known[n] for update_fn in update_fns for n in update_fn.scalars}
    scored = functools.partial(_errors_in_shards, own, kinds.index("update"), by_loss)
    return by_shards(
        state.plan,
        scored,
        (*stored, given),
        (known, draw_words(state, number, seed)),
    )


def _errors_in_shards(
    blocks: BlockStep, update: int, by_loss: bool, own: Any, shared: Any
) -> list[jax.Array]:
    """Returns d for the pages of some shards, one group of pages after another."""
    pool, tables, scales, given = own
    known, words = shared
    firsts, programs, wide, gradients = jax.tree.map(merged, given)

    def next_update(group: jax.Array, states: list) -> tuple[list[jax.Array], jax.Array]:
        """(states after another step, its update)."""
        values = {kind: x[group] for kind, x in wide.items()}
        after, results = blocks.update(states, values, known, programs[group])
        return after, results[update].astype(jnp.float32)

    def stored(slot: int, group: jax.Array, states: list, bits: list) -> list[jax.Array]:
        """Returns the states, with one of them rounded."""
        codec, width = blocks.codecs[slot], bits[slot]
        x = states[slot].astype(jnp.float32)
        coded = encode_blocks(x, width, codec, words[slot], firsts[group])
        found = codec.decode(*coded, width).astype(blocks.dtypes[slot])
        return [*states[:slot], found, *states[slot + 1 :]]

    def square(group: jax.Array, one: jax.Array, other: jax.Array) -> jax.Array:
        weight = gradients[group].astype(jnp.float32) ** 2 if by_loss else 1.0
        return weight * (one - other) ** 2

    def step(_: Any, xs: Any) -> Any:
        group, tables, scales = xs
        # Separate computations, so that compilers round alike wherever they are used.
        separately = functools.partial(pages.separately, pages.is_real(tables[0]))
        codes, bits = pages.read_all(pool, tables), list(map(bits_of, tables))
        states, _ = separately(next_update, group, separately(blocks.decode, codes, bits, scales))
        _, exact = separately(next_update, group, states)
        found = []
        for i in range(len(blocks.codecs)):
            others = separately(functools.partial(stored, i), group, states, bits)
            _, perturbed = separately(next_update, group, others)
            found.append(_summed(separately(square, group, perturbed, exact)))
        return None, found

    shape, rows = tables[0].shape[:3], pool.shape[1]
    pool, tables = joined(pool), [merged(rooted(table, rows)) for table in tables]
    xs = jnp.arange(tables[0].shape[0]), tables, [merged(scale) for scale in scales]
    _, found = jax.lax.scan(step, None, xs)
    return [x.reshape(shape) for x in found]


def _summed(x: jax.Array) -> jax.Array:
    """Returns the sum of each page, in a fixed order: every layout gives the same bits."""
    x = x.reshape(x.shape[0], pages.PAGE)
    while x.shape[1] > 1:
        x = x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]
    return x[:, 0]


def _add_full_decode_errors(
    traced: TracedUpdate,
    state: QuantizedState,
    component: Component,
    seed: int,
    by_loss: bool,
    errors: Scores,
) -> None:
    """Adds to each page its share of the update error of its leaf."""
    own = members(state.plan, component)
    known = dict(traced.known)
    for number, slot, place, leaf in own:
        known[traced.state(leaf.index)] = decoded(state, number, slot, place)
    updates = [n for n in component.results if n in traced.updates]
    weights = {
        n: traced.gradient(traced.updates.index(n)) ** 2 if by_loss else 1.0 for n in updates
    }
    inputs = [traced.state(leaf.index) for *_, leaf in own]
    outputs = [traced.leaves[leaf.index] for *_, leaf in own]
    env = traced.program.evaluate(outputs, known)
    after = dict(zip(inputs, (env[n] for n in outputs), strict=True))
    exact = traced.program.evaluate(updates, {**known, **after})
    for (number, slot, place, _), value in zip(own, inputs, strict=True):
        stored = decoded(
            with_leaf(state, number, slot, place, after[value], seed), number, slot, place
        )
        env = traced.program.evaluate(updates, {**known, **after, value: stored})
        error = sum(jnp.sum(weights[n] * (env[n] - exact[n]) ** 2) for n in updates)
        layout, before = state.plan.groups[number], errors[number][slot]
        span = layout.pages_of(place)
        share = jnp.float32(error) / ((span.stop - span.start) * layout.lines)
        errors[number][slot] = layout.lined(before).at[:, span].add(share).reshape(before.shape)


# ---------------------------------------------------------------------------------------------------
# Statistics of layers


_FACTORS = ("rms", "dispersion", "kurtosis")


@accept_old_fields(memory="ema_decay", reach="max_bit_change")
@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    r"""Scores pages by statistics of each layer and slot, relative to running averages, as in STQuant.

    For the leaf x of a layer whose gradient is g, there are three factors,

        r = √mean(g²),   c = std(|x|) / mean(|x|),   k = mean(g⁴) / mean(g²)²,

    (gradient RMS, dispersion of the state, second-order statistic of the gradient).  Each is divided by its
    mean over all leaves, weighted by their elements and exponentially averaged over decisions:

        score = b₀ + (log₂ r/r̄ + log₂ c/c̄ + log₂ k/k̄) / 3,

    with b₀ the same for all.  Of `factors` some can be left out: r is much larger in some layers than in
    others, although Adam's update does not depend on the scale of gradients.  `within_slots` subtracts from
    each score the mean of its slot, so that bits move between layers and not between slots.

    The score of a page is the maximum over its leaves.  The cost is O(N) every `interval` steps, and the
    memory is three numbers.  Devices that share a leaf may round its sums differently.  This is a
    reconstruction: STQuant's own thresholds are not public.

    Args:
        ema_decay: the weight of the previous averages, in [0, 1).
        max_bit_change: the maximum change of a page's width in one decision.
        factors: which of "rms", "dispersion" and "kurtosis" count.
        within_slots: whether scores are relative to the mean of their slot.

    Raises:
        ValueError: if ema_decay or max_bit_change is out of range, or a factor is unknown.

    Source: STQuant, arXiv 2604.06836, as far as it is known.
    """

    ema_decay: float = 0.9
    max_bit_change: int = 1
    factors: tuple[str, ...] = _FACTORS
    within_slots: bool = False

    def __post_init__(self):
        _check(self.ema_decay, self.max_bit_change)
        if not self.factors or not set(self.factors) <= set(_FACTORS):
            raise ValueError(f"factors must be some of {', '.join(_FACTORS)}; got {self.factors!r}")

    def init(self, plan: Plan) -> Any:
        """Returns three averages, and the number of decisions in them."""
        return jnp.ones(3), jnp.int32(0)

    def __call__(
        self, traced: TracedUpdate, state: QuantizedState, memory: Any, seed: int
    ) -> tuple[Scores, Any, jax.Array]:
        average, count = memory
        leaves = [
            (number, slot, place, leaf)
            for number, layout in enumerate(state.plan.groups)
            for slot, own in enumerate(layout.leaves)
            for place, leaf in enumerate(own)
        ]
        factors = jnp.stack(
            [
                _factors(traced.gradient(leaf.parameter), decoded(state, number, slot, place))
                for number, slot, place, leaf in leaves
            ]
        )
        sizes = jnp.array([leaf.size for *_, leaf in leaves], jnp.float32)
        mean = jnp.sum(factors * sizes[:, None], axis=0) / jnp.sum(sizes)
        keep = jnp.where(count == 0, 0.0, self.ema_decay)
        average = keep * average + (1 - keep) * mean
        counted = jnp.array([_FACTORS.index(name) for name in self.factors])
        score = jnp.mean(jnp.log2(factors / average[None, :])[:, counted], axis=1)
        if self.within_slots:
            score = score - _slot_means([leaf.slot for *_, leaf in leaves], score, sizes)
        found = _per_page(state.plan, -jnp.inf)
        for (number, slot, place, _), own in zip(leaves, score, strict=True):
            layout, before = state.plan.groups[number], found[number][slot]
            span = layout.pages_of(place)
            found[number][slot] = layout.lined(before).at[:, span].max(own).reshape(before.shape)
        found = [[jnp.maximum(x, jnp.min(score)) for x in slots] for slots in found]
        usable = jnp.all(jnp.isfinite(score))
        return found, (average, count + 1), usable


def _slot_means(slots: Sequence[str], scores: jax.Array, sizes: jax.Array) -> jax.Array:
    """Returns, for each leaf, the mean score of its slot, weighted by elements."""
    same = jnp.array([[float(one == other) for other in slots] for one in slots]) * sizes[None, :]
    return jnp.sum(same * scores[None, :], axis=1) / jnp.sum(same, axis=1)


def _factors(gradient: jax.Array, state: jax.Array) -> jax.Array:
    """Returns (gradient RMS, dispersion of the state, kurtosis of the gradient), all positive."""
    g, x = gradient.astype(jnp.float32), jnp.abs(state.astype(jnp.float32))
    tiny = jnp.finfo(jnp.float32).tiny
    square = jnp.maximum(jnp.mean(g**2), tiny)
    # Divide by the RMS first: fourth powers of small gradients underflow in float32.
    kurtosis = jnp.maximum(jnp.mean((g / jnp.sqrt(square)) ** 4), 2.0**-20)
    dispersion = jnp.maximum(jnp.std(x) / jnp.maximum(jnp.mean(x), tiny), 2.0**-20)
    return jnp.stack([jnp.sqrt(square), dispersion, kurtosis])

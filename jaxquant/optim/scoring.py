"""What pages are worth in bits: how much of their rounding the update feels, or their layer's statistics."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxquant.numerics.reductions import largest
from jaxquant.optim import pages
from jaxquant.optim.blocks import BlockStep, block_step, by_group, draw_words
from jaxquant.optim.codecs import straight_log2
from jaxquant.optim.inner import Component, Inner, Piece, pieces_by_run
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
from jaxquant.optim.updating import members

Scores = list[list[jax.Array]]  # for each run and slot, float32[shards, groups, pages]


def _per_page(plan: Plan, value: float) -> Scores:
    return [[jnp.full(run.grid, value) for _ in run.slots] for run in plan.runs]


def _check(memory: Any, reach: Any) -> None:
    if not isinstance(memory, int | float) or not 0 <= memory < 1:
        raise ValueError(f"memory is in [0, 1); got {memory!r}")
    if isinstance(reach, bool) or not isinstance(reach, int) or not 1 <= reach <= pages.PLANES:
        raise ValueError(f"reach is a whole number of bits from 1 to {pages.PLANES}; got {reach!r}")


# ---------------------------------------------------------------------------------------------------
# What the update feels


@dataclasses.dataclass(frozen=True)
class Felt:
    r"""Scores by what the update feels of each page's rounding.

    With x the state after this step, Q(x) what its codes stand for, and u(x) the update that the same
    gradient gives from there, a page of b bits in slot s has the error and the score

        d = Σ w (u(x with Q(x) in s) − u(x))²,   score = b + ½ ℓ(d),

    summed over the page's elements, ℓ the logarithm of `Logarithmic`; w is 1, or the gradient's square, which
    stands for the loss's curvature.  Scores are averaged exponentially over decisions.  Where a parameter's
    state is decoded whole, its pages share the error of all.  A step that updates nothing (`MultiSteps`
    between two, a rejected one) decides nothing; the next one does.

    Args:
        weight: "update" for w = 1, "loss" for w = g².
        memory: what the average keeps of what it was, in [0, 1).
        reach: bits by which a page moves in a decision at most.

    Raises:
        ValueError: another weight, or a memory or reach out of range.
    """

    weight: Literal["update", "loss"] = "update"
    memory: float = 0.5
    reach: int = pages.PLANES

    def __post_init__(self):
        if self.weight not in ("update", "loss"):
            raise ValueError(f"weight is 'update' or 'loss'; got {self.weight!r}")
        _check(self.memory, self.reach)

    def init(self, plan: Plan) -> Any:
        """The average so far, and how many decisions are in it."""
        return _per_page(plan, 0.0), jnp.int32(0)

    def __call__(
        self, inner: Inner, state: QuantizedState, memory: Any, seed: int
    ) -> tuple[Scores, Any, jax.Array]:
        errors = _felt(inner, state, seed, self.weight == "loss")
        most = largest(jnp.stack([largest(x).ravel() for slots in errors for x in slots])).reshape(
            ()
        )
        # A page that is felt 2^-24 times the most has the least bits anyway; zero has no logarithm.
        floor = jnp.maximum(most * 2.0**-48, jnp.finfo(jnp.float32).tiny)
        before, count = memory
        keep = jnp.where(count == 0, 0.0, self.memory)
        scores = [
            [
                keep * old
                + (1 - keep) * (_bits(table) + 0.5 * straight_log2(jnp.maximum(d, floor)))
                for d, table, old in zip(*rows, strict=True)
            ]
            for rows in zip(errors, state.tables, before, strict=True)
        ]
        return scores, (scores, count + 1), most > 0


def _bits(table: jax.Array) -> jax.Array:
    return jnp.sum(table != 0, axis=-1, dtype=jnp.int32).astype(jnp.float32)


def _felt(inner: Inner, state: QuantizedState, seed: int, by_loss: bool) -> Scores:
    """d for each page."""
    inner.evaluate(inner.untouched())
    by_run, _ = pieces_by_run(inner, state.plan)
    errors = _per_page(state.plan, 0.0)
    for number, pieces in by_run.items():
        errors[number] = _felt_by_groups(inner, state, number, pieces, seed, by_loss)
    rest = {p for n, run in enumerate(state.plan.runs) if n not in by_run for p in run.parameters}
    for component in inner.components():
        if rest & set(component.parameters):
            _add_felt_whole(inner, state, component, seed, by_loss, errors)
    return errors


def _felt_by_groups(
    inner: Inner,
    state: QuantizedState,
    number: int,
    pieces: Sequence[Piece],
    seed: int,
    by_loss: bool,
) -> list[jax.Array]:
    run, own = state.plan.runs[number], block_step(state.plan, number, pieces)
    kinds = list(pieces[0].results)
    if "update" not in kinds:
        return [jnp.zeros(run.grid) for _ in own.codecs]
    inner.evaluate(n for piece in pieces for n in (*piece.scalars, *piece.wide.values()))
    gradients = run.flatten([inner.gradient(p) for p in run.parameters])
    given = *by_group(inner, run, pieces), gradients
    stored = state.pool, state.tables[number], state.scales[number]
    known = {n: inner.known[n] for piece in pieces for n in piece.scalars}
    scored = functools.partial(_felt_in_shards, own, kinds.index("update"), by_loss)
    return by_shards(
        state.plan,
        scored,
        (*stored, given),
        (known, draw_words(state, number, seed)),
    )


def _felt_in_shards(
    blocks: BlockStep, update: int, by_loss: bool, own: Any, shared: Any
) -> list[jax.Array]:
    """d for the pages of some shards, group after group."""
    pool, tables, scales, given = own
    known, words = shared
    firsts, programs, wide, gradients = jax.tree.map(merged, given)

    def updated(group: jax.Array, states: list) -> tuple[list[jax.Array], jax.Array]:
        """(states after another step, its update)."""
        values = {kind: x[group] for kind, x in wide.items()}
        after, results = blocks.update(states, values, known, programs[group])
        return after, results[update].astype(jnp.float32)

    def stored(slot: int, group: jax.Array, states: list, bits: list) -> list[jax.Array]:
        """The states, one of them after its rounding."""
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
        # Each part by itself, so that compilers round it alike wherever it is computed.
        apart = functools.partial(pages.apart, pages.is_real(tables[0]))
        codes, bits = pages.read_all(pool, tables), list(map(bits_of, tables))
        states, _ = apart(updated, group, apart(blocks.decode, codes, bits, scales))
        _, exact = apart(updated, group, states)
        found = []
        for i in range(len(blocks.codecs)):
            others = apart(functools.partial(stored, i), group, states, bits)
            _, felt = apart(updated, group, others)
            found.append(_summed(apart(square, group, felt, exact)))
        return None, found

    shape, rows = tables[0].shape[:3], pool.shape[1]
    pool, tables = joined(pool), [merged(rooted(table, rows)) for table in tables]
    xs = jnp.arange(tables[0].shape[0]), tables, [merged(scale) for scale in scales]
    _, found = jax.lax.scan(step, None, xs)
    return [x.reshape(shape) for x in found]


def _summed(x: jax.Array) -> jax.Array:
    """Each page's sum, in an order that no compiler changes: layouts give the same bits."""
    x = x.reshape(x.shape[0], pages.PAGE)
    while x.shape[1] > 1:
        x = x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]
    return x[:, 0]


def _add_felt_whole(
    inner: Inner,
    state: QuantizedState,
    component: Component,
    seed: int,
    by_loss: bool,
    errors: Scores,
) -> None:
    """Adds to each page its share of what the component's updates feel of its leaf's rounding."""
    own = members(state.plan, component)
    known = dict(inner.known)
    for run, slot, place, leaf in own:
        known[inner.state(leaf.index)] = decoded(state, run, slot, place)
    updates = [n for n in component.results if n in inner.updates]
    weights = {n: inner.gradient(inner.updates.index(n)) ** 2 if by_loss else 1.0 for n in updates}
    inputs = [inner.state(leaf.index) for *_, leaf in own]
    outputs = [inner.leaves[leaf.index] for *_, leaf in own]
    env = inner.program.evaluate(outputs, known)
    after = dict(zip(inputs, (env[n] for n in outputs), strict=True))
    exact = inner.program.evaluate(updates, {**known, **after})
    for (run, slot, place, _), number in zip(own, inputs, strict=True):
        stored = decoded(with_leaf(state, run, slot, place, after[number], seed), run, slot, place)
        env = inner.program.evaluate(updates, {**known, **after, number: stored})
        error = sum(jnp.sum(weights[n] * (env[n] - exact[n]) ** 2) for n in updates)
        layout, before = state.plan.runs[run], errors[run][slot]
        span = layout.pages_of(place)
        share = jnp.float32(error) / ((span.stop - span.start) * layout.lines)
        errors[run][slot] = layout.lined(before).at[:, span].add(share).reshape(before.shape)


# ---------------------------------------------------------------------------------------------------
# Statistics of layers


@dataclasses.dataclass(frozen=True)
class Statistics:
    r"""Scores by statistics of each layer and state, against running averages over all, as in STQuant.

    For the leaf x of a layer whose gradient is g, three factors,

        r = √mean(g²),   c = std(|x|) / mean(|x|),   k = mean(g⁴) / mean(g²)²,

    (gradient RMS, dispersion of the state, second-order statistic of the gradient), each against its
    exponential average over decisions of its mean over all leaves, weighted by their elements:

        score = b₀ + (log₂ r/r̄ + log₂ c/c̄ + log₂ k/k̄) / 3,

    b₀ the same for all.  A page takes the most of its leaves' scores.  Work is O(N) every `interval` steps,
    and what is kept three numbers.  Devices that share a leaf may round its sums otherwise.  STQuant's own
    thresholds are not public; this is our statement of its parts.

    Args:
        memory: what the averages keep of what they were, in [0, 1).
        reach: bits by which a page moves in a decision at most.

    Raises:
        ValueError: a memory or reach out of range.

    Source: STQuant, arXiv 2604.06836, as far as it is known.
    """

    memory: float = 0.9
    reach: int = 1

    def __post_init__(self):
        _check(self.memory, self.reach)

    def init(self, plan: Plan) -> Any:
        """Three averages, and how many decisions are in them."""
        return jnp.ones(3), jnp.int32(0)

    def __call__(
        self, inner: Inner, state: QuantizedState, memory: Any, seed: int
    ) -> tuple[Scores, Any, jax.Array]:
        average, count = memory
        leaves = [
            (run, slot, place, leaf)
            for run, layout in enumerate(state.plan.runs)
            for slot, own in enumerate(layout.leaves)
            for place, leaf in enumerate(own)
        ]
        factors = jnp.stack(
            [
                _factors(inner.gradient(leaf.parameter), decoded(state, run, slot, place))
                for run, slot, place, leaf in leaves
            ]
        )
        sizes = jnp.array([leaf.size for *_, leaf in leaves], jnp.float32)
        mean = jnp.sum(factors * sizes[:, None], axis=0) / jnp.sum(sizes)
        keep = jnp.where(count == 0, 0.0, self.memory)
        average = keep * average + (1 - keep) * mean
        score = jnp.mean(jnp.log2(factors / average[None, :]), axis=1)
        found = _per_page(state.plan, -jnp.inf)
        for (run, slot, place, _), own in zip(leaves, score, strict=True):
            layout, before = state.plan.runs[run], found[run][slot]
            span = layout.pages_of(place)
            found[run][slot] = layout.lined(before).at[:, span].max(own).reshape(before.shape)
        found = [[jnp.maximum(x, jnp.min(score)) for x in slots] for slots in found]
        usable = jnp.all(jnp.isfinite(score))
        return found, (average, count + 1), usable


def _factors(gradient: jax.Array, state: jax.Array) -> jax.Array:
    """(gradient's RMS, the state's dispersion, the gradient's kurtosis), none of them zero."""
    g, x = gradient.astype(jnp.float32), jnp.abs(state.astype(jnp.float32))
    tiny = jnp.finfo(jnp.float32).tiny
    square = jnp.maximum(jnp.mean(g**2), tiny)
    # Over the square's root first: fourth powers of small gradients are below what float32 holds.
    kurtosis = jnp.maximum(jnp.mean((g / jnp.sqrt(square)) ** 4), 2.0**-20)
    dispersion = jnp.maximum(jnp.std(x) / jnp.maximum(jnp.mean(x), tiny), 2.0**-20)
    return jnp.stack([jnp.sqrt(square), dispersion, kurtosis])

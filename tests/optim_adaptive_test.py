"""Adaptive widths: the budget holds at every step, nothing is compiled again, bits go where they are felt."""

import itertools
from typing import Any, cast

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxquant.optim import (
    LayerStatistics,
    UpdateSensitivity,
    adaptive,
    fixed,
    pages,
    quantize_state,
    report,
    state_bytes,
)
from jaxquant.optim.budget import allocate

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others

SCORES = st.lists(st.floats(-20, 20), min_size=3, max_size=3)
WIDTHS = st.lists(st.integers(2, 8), min_size=3, max_size=3)


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def allocated(scores, bits, rows, hysteresis=0.0):
    ends = jnp.full(len(scores), 2), jnp.full(len(scores), 8)
    return jax.jit(allocate)(jnp.array(scores), jnp.array(bits), *ends, rows, hysteresis)


@hypothesis.given(SCORES, st.integers(6, 24))
@hypothesis.settings(max_examples=40, deadline=None)
def test_no_other_widths_within_the_budget_have_half_the_error(scores, rows):
    found = np.asarray(allocated(scores, [4, 4, 4], rows))
    assert found.sum() <= rows

    def error(bits):
        return sum(4.0 ** (s - b) for s, b in zip(scores, bits, strict=True))

    every = itertools.product(range(2, 9), repeat=3)
    best = min(error(bits) for bits in every if sum(bits) <= rows)
    # Rounding water-filling's real widths to whole bits costs a factor at most.
    assert error(found) <= 2.0 * best


@hypothesis.given(SCORES, WIDTHS, st.floats(0, 2))
@hypothesis.settings(max_examples=40, deadline=None)
def test_the_budget_holds_and_is_used_whatever_pages_have(scores, bits, hysteresis):
    rows = sum(bits)
    found = np.asarray(allocated(scores, bits, rows, hysteresis))
    assert (found >= 2).all()
    assert (found <= 8).all()
    assert found.sum() == rows


def test_small_changes_of_score_move_nothing():
    bits = [3, 5, 7]
    assert allocated([3.4, 5.0, 6.6], bits, 15, 0.25).tolist() == bits
    assert allocated([3.9, 5.0, 6.1], bits, 15, 0.25).tolist() != bits


def task():
    """A sum over columns whose gradients change their scale halfway, so that what is felt moves."""
    params = {"a": jnp.ones((64, 1024)), "b": jnp.ones((64, 1024)), "bias": jnp.zeros(7)}

    def gradients(params, step):
        loud, quiet = (1.0, 1e-3)
        noise = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(i), step), (64, 1024))  # noqa: E731
        scale = jnp.where(step < 30, loud, quiet), jnp.where(step < 30, quiet, loud)
        return {
            "a": scale[0] * (params["a"] + noise(0)),
            "b": scale[1] * (params["b"] + noise(1)),
            "bias": params["bias"],
        }

    return params, gradients


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "score", [UpdateSensitivity(), UpdateSensitivity("loss"), LayerStatistics()]
)
def test_one_compilation_serves_all_tables_and_the_budget_holds_at_every_step(score):
    params, gradients = task()
    tx = quantize_state(optax.sgd(1e-2, momentum=0.9), adaptive(5.0, interval=3, score=score))
    traces = []

    @jax.jit
    def step(params, state, i):
        traces.append(1)
        updates, state = tx.update(gradients(params, i), state, params)
        return optax.apply_updates(params, updates), state

    state: Any = tx.init(params)
    elements = sum(x.size for x in jax.tree.leaves(optax.sgd(1e-2, momentum=0.9).init(params)))
    nbytes, rows, tables = state_bytes(state.pool), state.pool.shape[1] - 1, set()
    for i in range(60):
        params, state = step(params, state, jnp.int32(i))
        widths = [np.asarray(pages.widths(t)) for slots in state.tables for t in slots]
        tables.add(str(widths))
        assert sum(w.sum() for w in widths) <= rows
        assert state_bytes(state.pool) == nbytes
        assert state_bytes(state) <= 5.0 * elements / 8
        used = np.concatenate([np.asarray(t)[np.asarray(t) > 0] for s in state.tables for t in s])
        assert len(set(used)) == len(used)
    assert len(traces) == 1
    if score == UpdateSensitivity("loss"):
        assert len(tables) >= 3


def test_bits_go_to_the_leaf_whose_rounding_is_felt():
    params, gradients = task()
    tx = quantize_state(optax.sgd(1e-2, momentum=0.9), adaptive(5.0, interval=5))
    state: Any = tx.init(params)
    for i in range(20):
        updates, state = jax.jit(tx.update)(gradients(params, jnp.int32(i)), state, params)
        params = optax.apply_updates(params, updates)
    bits = {row.path: row.bits for row in report(state).rows if not row.reason}
    assert bits["a"] > bits["b"] + 1


def test_steps_that_update_nothing_put_a_decision_off():
    params, gradients = task()
    inner = optax.MultiSteps(optax.adam(1e-2), 4)
    # The sums of gradients stay unquantized, which takes a third of the state 32 bits a number.
    tx = quantize_state(inner, adaptive(14.0, interval=4))
    state: Any = tx.init(params)
    decided = []
    for i in range(9):
        _, state = jax.jit(tx.update)(gradients(params, jnp.int32(i)), state, params)
        decided.append(int(state.memory[0]))
    assert decided == [-4, -4, -4, 3, 3, 3, 3, 7, 7]


@pytest.mark.first(1)
@pytest.mark.parametrize("score", [UpdateSensitivity(), LayerStatistics()])
def test_muon_is_scored_whole(score):
    params, gradients = task()
    tx = quantize_state(optax.contrib.muon(1e-2), adaptive(5.0, interval=5, score=score))
    state: Any = tx.init(params)
    for i in range(10):
        updates, state = jax.jit(tx.update)(gradients(params, jnp.int32(i)), state, params)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(updates))
    assert int(state.memory[0]) == 5


def test_a_budget_that_cannot_be_met_is_refused_with_the_least_possible():
    params, _ = task()
    make = lambda bits: quantize_state(optax.adam(1e-3), adaptive(bits)).init(params)  # noqa: E731
    with pytest.raises(ValueError, match=r"budget_bits must be at least \d+\.\d\d") as error:
        make(0.5)
    least = float(str(error.value).split("at least ")[1].split(" ")[0])
    assert state_bytes(make(least)) > 0
    with pytest.raises(ValueError, match="at least"):
        make(least - 0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adaptive(0.0), "budget_bits must be a number above 0"),
        (lambda: adaptive(cast(Any, "5")), "budget_bits must be a number above 0; got '5'"),
        (lambda: adaptive(5.0, interval=0), "interval must be an integer of at least 1"),
        (lambda: adaptive(5.0, hysteresis=-1.0), "hysteresis must be a number of bits"),
        (lambda: adaptive(5.0, score="felt"), "score must be a score such as"),
        (lambda: UpdateSensitivity(cast(Any, "m")), "weight must be 'update' or 'loss'"),
        (lambda: UpdateSensitivity(ema_decay=1.0), "ema_decay must be in"),
        (lambda: LayerStatistics(max_bit_change=0), "max_bit_change must be an integer"),
        (
            lambda: report(optax.adam(1e-3).init(jnp.ones(3))),
            "must contain exactly one quantized state; got 0",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_reports_add_up_to_the_bytes_of_all_arrays():
    params, _ = task()
    state = quantize_state(optax.adam(1e-3), fixed(5, 4)).init(params)
    found = report(state)
    assert found.nbytes == state_bytes(state)
    assert found.shared_nbytes == 1024 + 4 + 32 * 2 * 16
    assert {row.bits for row in found.rows if not row.reason} == {4.0, 5.0}
    assert found.exact_nbytes == state_bytes(optax.adam(1e-3).init(params))

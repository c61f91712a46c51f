"""Coded state of parameters of any shape, and all that is done with a state: jit, scan, donation, files."""

import functools
import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P

from jaxquant.optim import fixed, from_optax, quantize_state, to_optax
from jaxquant.optim.codecs import BLOCK
from jaxquant.optim.pages import PAGE
from jaxquant.optim.state import unquantized

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.long,
]  # looks at our arithmetic, not at versions of others

ADAMW = optax.adamw(1e-2)
SHAPES = [
    (),
    (0,),
    (3, 0),
    (1,),
    (7,),
    (BLOCK - 1,),
    (BLOCK,),
    (BLOCK + 1,),
    (13, 17),
    (3, 5, 11),
    (2, 2 * BLOCK),
    (PAGE - 1,),
    (PAGE,),
    (PAGE + 1,),
    (129, 127),
]
SHAPE = st.sampled_from(SHAPES)
LEAF = st.builds(jax.ShapeDtypeStruct, SHAPE, st.sampled_from([jnp.float32, jnp.bfloat16]))
NAMES = st.sampled_from(["embed", "kernel", "bias", "0", "w"])
TREE = st.recursive(
    LEAF,
    lambda inner: (
        st.dictionaries(NAMES, inner, min_size=1, max_size=3)
        | st.tuples(inner, inner)
        | st.lists(inner, min_size=1, max_size=2)
    ),
    max_leaves=4,
)


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def of_type(shapes, dtype):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def filled(specs: Any, seed: int) -> Any:
    """Numbers of the trees' shapes, of magnitudes within a factor of four in each leaf."""
    rng = np.random.default_rng(seed)

    def fill(spec):
        x = rng.uniform(0.5, 2, spec.shape) * rng.choice([-1, 1], spec.shape)
        return jnp.asarray(x, spec.dtype)

    return jax.tree.map(fill, specs)


def stepped(tx: Any, params: Any, count: int, seed: int = 1) -> tuple[Any, Any, Any]:
    """(updates, params, state) after a number of steps."""
    update, state, updates = jax.jit(tx.update), tx.init(params), params
    for i in range(count):
        updates, state = update(filled(params, seed + i), state, params)
        params = optax.apply_updates(params, updates)
    return updates, params, state


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def coded_parts(state):
    """What holds codes: pools, tables and scales."""
    return state.pool, state.tables, state.scales


# ---------------------------------------------------------------------------------------------------
# Shapes


@hypothesis.given(TREE)
@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
@hypothesis.example(jax.ShapeDtypeStruct((PAGE + 1,), jnp.float32))
@hypothesis.example(
    {"a": of_type(SHAPES[::2], jnp.float32), "b": of_type(SHAPES[1::2], jnp.bfloat16)}
)
def test_updates_are_optax_own_in_shape_and_nearly_in_value(specs):
    hypothesis.assume(any(math.prod(x.shape) >= BLOCK for x in jax.tree.leaves(specs)))
    params = filled(specs, 0)
    expected, moved, _ = stepped(ADAMW, params, 2)
    found, params, state = stepped(quantize_state(ADAMW, fixed(8)), params, 2)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b, p, q in zip(*map(jax.tree.leaves, (found, expected, params, moved)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.size < BLOCK:
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(p, q)
        else:
            # A code's error is a hundredth of its block's largest, here a few times the value.
            np.testing.assert_allclose(
                np.float32(a), np.float32(b), atol=0.05 * np.abs(np.float32(b)).max()
            )
    every_leaf_is_accounted_for(ADAMW, state, specs)


def every_leaf_is_accounted_for(tx, state, specs):
    """Each leaf of the state is coded, or exact for a reason that is given."""
    plan, plain = state.plan, jax.tree.leaves(jax.eval_shape(tx.init, specs))
    indices = [leaf.index for leaf in plan.leaves] + [leaf.index for leaf in plan.exact]
    assert sorted(indices) == list(range(len(plain)))
    for leaf in (*plan.leaves, *plan.exact):
        assert (leaf.shape, leaf.dtype) == (plain[leaf.index].shape, plain[leaf.index].dtype)
    assert all(math.prod(leaf.shape) >= BLOCK for leaf in plan.leaves)
    assert all(leaf.reason for leaf in plan.exact)
    assert len(unquantized(state)) == len(plan.exact)


# ---------------------------------------------------------------------------------------------------
# What is done with a state

PARAMS = {"w": (48, 64), "b": (200,), "small": (5,)}


def parameters():
    specs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in PARAMS.items()}
    return filled(specs, 0)


HALVES = (slice(4), slice(4, None))
CODED: Any = quantize_state(ADAMW, fixed(5, 4))


@functools.cache
def after_three():
    return stepped(CODED, parameters(), 3)


def test_a_state_is_a_pytree_of_arrays():
    _, _, state = after_three()
    assert_same_bits(jax.tree.map(lambda x: x, state), state)
    assert_same_bits(jax.jit(lambda x: x)(state), state)
    assert hash(state.plan) == hash(CODED.init(parameters()).plan)
    leaves, structure = jax.tree.flatten(state)
    assert all(isinstance(x, jax.Array) for x in leaves)
    assert structure == jax.tree.structure(CODED.init(parameters()))


def test_a_scan_goes_on_where_another_stopped():
    params = parameters()
    gradients = [filled(params, i) for i in range(8)]
    gradients = jax.tree.map(lambda *x: jnp.stack(x), *gradients)

    @jax.jit
    def scanned(state, gradients):
        step = lambda state, gradient: CODED.update(gradient, state, params)[::-1]  # noqa: E731
        return jax.lax.scan(step, state, gradients)

    whole, updates = scanned(CODED.init(params), gradients)
    first, second = (jax.tree.map(lambda x, part=part: x[part], gradients) for part in HALVES)
    half, _ = scanned(CODED.init(params), first)
    rest, later = scanned(half, second)
    assert_same_bits(rest, whole)
    assert_same_bits(later, jax.tree.map(lambda x: x[4:], updates))
    once, _ = jax.jit(CODED.update)(
        jax.tree.map(lambda x: x[0], gradients), CODED.init(params), params
    )
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(a, b[0], rtol=1e-5)


def test_a_donated_state_is_updated_in_place():
    _, params, state = after_three()
    gradients = filled(params, 9)
    expected = jax.jit(CODED.update)(gradients, state, params)
    copy = jax.tree.map(jnp.copy, state)
    found = jax.jit(CODED.update, donate_argnums=1)(gradients, copy, params)
    assert_same_bits(found, expected)
    assert copy.pool.is_deleted()
    assert all(scale.is_deleted() for slots in copy.scales for scale in slots)


def test_a_checkpoint_holds_every_bit(tmp_path):
    _, params, state = after_three()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(CODED.init, params)
        found = checkpointer.restore(tmp_path / "state", target)
    assert_same_bits(found, state)
    gradients, update = filled(params, 9), jax.jit(CODED.update)
    assert_same_bits(update(gradients, found, params), update(gradients, state, params))


def test_rejected_steps_leave_codes_as_they_are():
    tx: Any = quantize_state(optax.apply_if_finite(optax.adam(1e-2), 5), fixed(5, 4))
    _, params, state = stepped(tx, parameters(), 2)
    broken = {**filled(params, 9), "small": jnp.full(5, jnp.nan)}
    update = jax.jit(tx.update)
    updates, after = update(broken, state, params)
    assert_same_bits(coded_parts(after), coded_parts(state))
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    _, moved = update(filled(params, 9), after, params)
    assert (moved.pool != state.pool).any()


def test_unfinished_steps_leave_codes_as_they_are():
    tx: Any = quantize_state(
        optax.MultiSteps(optax.adam(1e-2), 3).gradient_transformation(), fixed(8)
    )
    update, params = jax.jit(tx.update), parameters()
    states: list[Any] = [tx.init(params)]
    for i in range(6):
        states.append(update(filled(params, i), states[-1], params)[1])
    for slot in ("inner_opt_state/0/mu", "inner_opt_state/0/nu"):
        held = [codes_of(state, slot) for state in states]
        for before, after in ((0, 1), (1, 2), (3, 4), (4, 5)):
            assert_same_bits(held[before], held[after])
        assert (held[2][0] != held[3][0]).any()
        assert (held[5][0] != held[6][0]).any()


def codes_of(state, slot):
    """(rows of the pool, scales) of one slot, of every run that has it."""
    found = []
    for number, run in enumerate(state.plan.groups):
        for i, name in enumerate(run.slots):
            if name == slot:
                rows = np.asarray(state.tables[number][i]).reshape(state.pool.shape[0], -1)
                found += [np.asarray(pool)[r] for pool, r in zip(state.pool, rows, strict=True)]
                found.append(np.asarray(state.scales[number][i]))
    assert found
    return found


def test_a_changed_hyperparameter_has_its_effect():
    plain = optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)
    tx: Any = quantize_state(plain, fixed(8))
    params, update = parameters(), jax.jit(tx.update)
    state: Any = tx.init(params)
    _, state = update(filled(params, 1), state, params)
    double = optax.tree_utils.tree_set(
        state, learning_rate=2 * optax.tree_utils.tree_get(state, "learning_rate")
    )
    once, _ = update(filled(params, 2), state, params)
    twice, _ = update(filled(params, 2), double, params)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_allclose(2 * a, b, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------
# Seeds and shards


def test_a_seed_decides_every_bit():
    again = stepped(quantize_state(ADAMW, fixed(5, 4)), parameters(), 3)
    assert_same_bits(again, after_three())
    _, _, other = stepped(quantize_state(ADAMW, fixed(5, 4), seed=1), parameters(), 1)
    _, _, first = stepped(CODED, parameters(), 1)
    differ = {
        slot: any(
            (a != b).any()
            for a, b in zip(codes_of(first, slot), codes_of(other, slot), strict=True)
        )
        for slot in ("0/mu", "0/nu")
    }
    # Momentum is rounded to nearest: draws have no part in it.
    assert differ == {"0/mu": False, "0/nu": True}


def test_each_shard_holds_its_own_part_of_every_parameter():
    """Momentum, which is rounded to nearest, so that no draw depends on where an element lies."""
    shapes = {"w": (30, 1024), "u": (64, 48), "s": (9,), "odd": (7, 129)}
    specs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    params, spec = filled(specs, 0), {"w": P(None, "fsdp"), "u": P("tensor", "fsdp")}

    def run(params, gradients, **layout):
        tx: Any = quantize_state(optax.sgd(0.1, momentum=0.9), fixed(4), **layout)
        state, found = tx.init(params), []
        for gradient in gradients:
            updates, state = jax.jit(tx.update)(gradient, state, params)
            found.append(updates)
        return found, state

    gradients = [filled(specs, i) for i in range(5)]
    layout = {"axis": ("fsdp", "tensor"), "shards": (2, 4)}
    found, state = run(params, gradients, spec=lambda path, _: spec.get(path, P()), **layout)
    assert state.pool.shape[0] == 8
    cut = [leaf.path for run in state.plan.groups if run.lines == 8 for leaf in run.leaves[0]]
    assert cut == ["u", "w"]

    def parts(tree):
        """w along its last axis by fsdp, and along its longest, the same, by tensor; u along both."""
        w = jnp.split(tree["w"], 8, axis=1)
        u = [y for x in jnp.split(tree["u"], 2, axis=1) for y in jnp.split(x, 4)]
        return {"w": w, "u": u, "s": tree["s"], "odd": tree["odd"]}

    alone, _ = run(parts(params), map(parts, gradients))
    assert_same_bits([parts(x) for x in found], alone)
    plain = to_optax(optax.sgd(0.1, momentum=0.9), state, params)
    again = from_optax(state, plain)
    assert_same_bits(coded_parts(again), coded_parts(state))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (
            {"axis": ("a", "b"), "shards": 4},
            r"must have one number for each axis of \('a', 'b'\); got 4",
        ),
        ({"axis": ("a", "b"), "shards": (4, 0)}, "must be an integer of at least 1; got 0"),
        ({"axis": ("a", "a")}, "axis must be one name or several different ones"),
        ({"axis": ()}, "axis must be one name or several different ones"),
        ({"spec": P("a")}, "spec must be a function"),
        ({"kernel": "pallas", "shards": 2}, "shards must be 1 for kernel='pallas'; got 2"),
    ],
)
def test_layouts_that_there_are_not_are_refused(layout, words):
    with pytest.raises(ValueError, match=words):
        quantize_state(ADAMW, fixed(5), **layout)

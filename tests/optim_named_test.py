"""Named fields of the wrapped state are found, read and set through `quantize_state`, in either order."""

import copy
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from jaxquant.optim import fixed, load, quantize_state, report, save, to_optax

tree_get, tree_set = optax.tree_utils.tree_get, optax.tree_utils.tree_set
PARAMS = {"w": jnp.ones((64, 80)), "b": jnp.zeros(5)}
GRADIENTS = jax.tree.map(
    lambda p: 1 + 0.5 * jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), PARAMS
)


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def quantized(tx) -> Any:
    return quantize_state(tx, fixed(8))


def near(a, b, atol=1e-2):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol * float(jnp.max(jnp.abs(y))))


def sgd(of) -> Any:
    """Momentum with injected hyperparameters; `of` quantizes the inside."""
    make = lambda learning_rate, b: of(optax.sgd(learning_rate, momentum=b))  # noqa: E731
    return optax.inject_hyperparams(make)(learning_rate=0.1, b=0.5)


same = lambda tx: tx  # noqa: E731
SGD = sgd(same)
ORDERS = {"outside": quantized(SGD), "inside": sgd(quantized)}


# ---------------------------------------------------------------------------------------------------
# Hyperparameters


def by_dictionary(state, value):
    state.hyperparams["learning_rate"] = value
    return state


SETTERS = {
    "tree_set": lambda state, value: tree_set(state, learning_rate=value),
    "dictionary": by_dictionary,
    "_replace": lambda s, v: s._replace(hyperparams={**s.hyperparams, "learning_rate": v}),
}


@pytest.mark.first(1)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("setter", SETTERS)
def test_hyperparameters_are_set_as_in_plain_optax(setter, order):
    # Both are jitted: what is set must not compile again.
    traces = []

    def update(*arguments):
        traces.append(arguments)
        return ORDERS[order].update(*arguments)

    plain, tx = jax.jit(SGD.update), jax.jit(update)
    exact, state = SGD.init(PARAMS), ORDERS[order].init(PARAMS)
    for rate in (0.1, 0.3, 0.002):
        value = jnp.float32(rate)
        exact, state = SETTERS[setter](exact, value), SETTERS[setter](state, value)
        assert state.hyperparams["learning_rate"] == value
        updates, exact = plain(GRADIENTS, exact, PARAMS)
        found, state = tx(GRADIENTS, state, PARAMS)
        near(found, updates)
        assert tree_get(state, "learning_rate") == value
    assert len(traces) == 1


@pytest.mark.parametrize("value", [1, 0.25, jnp.bfloat16(0.25)])
def test_other_numbers_of_the_same_kind_become_the_leafs(value):
    tx, state = ORDERS["outside"], ORDERS["outside"].init(PARAMS)
    after = tx.update(GRADIENTS, tree_set(state, learning_rate=value), PARAMS)[1]
    assert after.hyperparams["learning_rate"].dtype == jnp.float32
    assert after.hyperparams["learning_rate"] == value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: tree_set(s, learning_rate=jnp.ones(3)),
            r"learning_rate .* float32\[\]; got float32\[3\]",
        ),
        (lambda s: tree_set(s, learning_rate="fast"), r"learning_rate .* float32\[\]; got str"),
        (lambda s: tree_set(s, count=jnp.float32(2)), r"count .* int32\[\]; got float32\[\]"),
        (
            lambda s: s._replace(hyperparams={}),
            "unquantized leaves must be .* hyperparams/b, .*; got count,",
        ),
        (lambda s: s._replace(hyperparams={"b": 0.5, "rate": 0.1}), "; got .*hyperparams/rate"),
    ],
)
def test_what_is_no_value_of_a_field_is_refused(change, words):
    tx, state = ORDERS["outside"], ORDERS["outside"].init(PARAMS)
    with pytest.raises(ValueError, match=words):
        tx.update(GRADIENTS, change(state), PARAMS)


# ---------------------------------------------------------------------------------------------------
# Fields of wrappers


def steps(tx, gradients) -> list[Any]:
    """The state after each gradient."""
    update, states = jax.jit(tx.update), [tx.init(PARAMS)]
    for scale in gradients:
        g = jax.tree.map(lambda x, s=scale: s * x, GRADIENTS)
        states.append(update(g, states[-1], PARAMS)[1])
    return states


MULTI = lambda of: optax.MultiSteps(of(optax.adam(0.1)), 2).gradient_transformation()  # noqa: E731
FINITE = lambda of: optax.apply_if_finite(of(optax.adam(0.1)), 2)  # noqa: E731
FREE = lambda of: optax.contrib.schedule_free(of(optax.rmsprop(0.1)), 0.1)  # noqa: E731
PLATEAU = lambda of: optax.chain(  # noqa: E731
    of(optax.scale_by_adam()), optax.contrib.reduce_on_plateau(patience=1)
)
IN_EITHER_ORDER = pytest.mark.parametrize(
    "order",
    [lambda make: quantized(make(same)), lambda make: make(quantized)],
    ids=["outside", "inside"],
)


@pytest.mark.first(1)
@IN_EITHER_ORDER
def test_multi_steps_says_when_it_has_updated(order):
    says = optax.MultiSteps(optax.adam(0.1), 2).has_updated
    for exact, state in zip(steps(MULTI(same), [1] * 5), steps(order(MULTI), [1] * 5), strict=True):
        assert says(state) == says(exact)
        assert (state.mini_step, state.gradient_step) == (exact.mini_step, exact.gradient_step)
        assert tree_get(state, "gradient_step") == exact.gradient_step


@pytest.mark.first(1)
@IN_EITHER_ORDER
def test_rejected_updates_are_counted(order):
    gradients = [1, np.nan, 1, np.inf, np.nan]
    for exact, state in zip(
        steps(FINITE(same), gradients), steps(order(FINITE), gradients), strict=True
    ):
        for name in ("notfinite_count", "total_notfinite", "last_finite"):
            assert getattr(state, name) == getattr(exact, name)
            assert tree_get(state, name) == getattr(exact, name)


@IN_EITHER_ORDER
def test_schedule_free_parameters_can_be_evaluated(order):
    exact, state = steps(FREE(same), [1] * 3)[-1], steps(order(FREE), [1] * 3)[-1]
    evaluated = jax.jit(optax.contrib.schedule_free_eval_params)
    near(evaluated(state, PARAMS), evaluated(exact, PARAMS))
    assert tree_get(state, "b1") == exact.b1


@IN_EITHER_ORDER
def test_counts_and_scales_are_found_and_set_in_a_chain(order):
    is_adams = lambda path, _: getattr(path[-1], "tuple_name", "") == "ScaleByAdamState"  # noqa: E731
    both = PLATEAU(same), order(PLATEAU)
    states, updates = [t.init(PARAMS) for t in both], [jax.jit(t.update) for t in both]
    for scale, count in ((0.25, 1), (0.5, 7), (1.0, 2)):
        states = [tree_set(x, is_adams, count=jnp.int32(count)) for x in states]
        states = [tree_set(x, scale=jnp.float32(scale)) for x in states]
        states = [
            update(GRADIENTS, x, PARAMS, value=1.0)[1]
            for update, x in zip(updates, states, strict=True)
        ]
        assert tree_get(states[1], "count", filtering=is_adams) == count + 1
        for name in ("scale", "best_value", "plateau_count", "cooldown_count"):
            assert tree_get(states[1], name) == tree_get(states[0], name)
    assert tree_get(states[1], "scale") < 1.0


# ---------------------------------------------------------------------------------------------------
# Coded parts


@pytest.fixture(scope="module")
def adam() -> Any:
    return steps(quantized(optax.inject_hyperparams(optax.adam)(0.1)), [1, 1])[-1]


@pytest.mark.parametrize("name", ["mu", "nu", "w", "b"])
def test_coded_parts_are_neither_found_nor_set_without_a_word(adam, name):
    for call in (lambda: tree_get(adam, name), lambda: tree_set(adam, **{name: 0.0})):
        with pytest.raises(ValueError, match=f"{name} is of a part .* held in codes: .*to_optax"):
            call()


@pytest.mark.parametrize("name", ["step", "pool", "exact", "nothing"])
def test_own_fields_are_no_names_of_the_wrapped_state(adam, name):
    assert tree_get(adam, name) is None
    with pytest.raises(KeyError):
        tree_set(adam, **{name: 0.0})


def test_attributes_are_decoded(adam):
    plain = to_optax(optax.inject_hyperparams(optax.adam)(0.1), adam, PARAMS)
    assert jax.tree.structure(adam.inner_state) == jax.tree.structure(plain.inner_state)
    near(adam.inner_state, plain.inner_state, atol=0)
    exact = steps(optax.inject_hyperparams(optax.adam)(0.1), [1, 1])[-1]
    near(adam.inner_state, exact.inner_state, atol=0.05)
    with pytest.raises(AttributeError, match="'momentum'"):
        _ = adam.momentum
    # A tuple has a `count` of its own.
    assert quantized(optax.scale_by_adam()).init(PARAMS).count == 0


PARTS = {
    "numpy": np.asarray,
    "jax": jnp.asarray,
    "from the left": lambda x: x * 2,
    "from the right": lambda x: jnp.ones(3) - x,
    "of numpy": lambda x: np.float32(3) / x,
    "a sum": jnp.sum,
    "an entry": operator.itemgetter("w"),
    "as a tree": lambda x: jax.tree.map(operator.add, PARAMS, x),
}


@pytest.mark.parametrize("use", PARTS.values(), ids=PARTS)
def test_nothing_is_computed_with_a_part_without_numbers(adam, use):
    with pytest.raises(ValueError, match=r"Coded|held in codes"):
        use(tree_get(adam, "ScaleByAdamState").mu)


# ---------------------------------------------------------------------------------------------------
# It is a state as before


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_states_are_copied_scanned_donated_and_saved(adam, tmp_path):
    state = tree_set(adam, learning_rate=jnp.float32(0.02))
    tx = quantized(optax.inject_hyperparams(optax.adam)(0.1))
    assert equal(copy.deepcopy(state), state)
    assert equal(jax.jit(same)(state), state)
    assert jax.eval_shape(same, state).hyperparams["learning_rate"].shape == ()
    save(tmp_path / "own", state)
    assert equal(load(tmp_path / "own", tx.init(PARAMS)), state)
    save(tmp_path / "number", tree_set(state, learning_rate=0.02))
    assert load(tmp_path / "number", tx.init(PARAMS)).hyperparams["learning_rate"] == jnp.float32(
        0.02
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", state)
        checkpointer.wait_until_finished()
        assert equal(checkpointer.restore(tmp_path / "orbax", jax.eval_shape(same, state)), state)
    update = lambda s, _: (tx.update(GRADIENTS, s, PARAMS)[1], s.hyperparams["learning_rate"])  # noqa: E731
    after, rates = jax.lax.scan(update, state, None, length=2)
    assert rates.tolist() == [state.hyperparams["learning_rate"]] * 2
    assert tree_get(after, "learning_rate") == jnp.float32(0.02)
    pool = state.pool
    jax.jit(lambda s: update(s, None)[0], donate_argnums=0)(state)
    assert pool.is_deleted()


@pytest.mark.first(1)
@IN_EITHER_ORDER
def test_optimizers_of_nnx_hold_such_states(order):
    make = lambda of: optax.inject_hyperparams(lambda rate: of(optax.adam(rate)))(0.1)  # noqa: E731
    kernels = []
    for tx in (make(same), order(make)):
        model = nnx.Linear(64, 80, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 64))) ** 2))(model))

        for rate in (0.1, 0.01):
            optimizer.opt_state.hyperparams["rate"][...] = jnp.float32(rate)
            step(model, optimizer)
        kernels.append(model.kernel[...])
    assert len(report(optimizer.opt_state).rows) >= 5
    near(kernels[1], kernels[0])

"""Update and apply in one: the bits of `tx.update` and `optax.apply_updates`, and no updates in memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant.optim import adaptive, apply, fixed, quantize_state, uniform

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others
SHAPES = {
    "a": (256, 96),
    "b": (70,),
    "c": (129, 127),
    "d": (3, 5, 11),
    "e": (9000,),
    "f": (512, 64),
}
OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "lion": optax.lion(1e-3),
    "momentum": optax.sgd(1e-2, 0.9, nesterov=True),
    "muon": optax.contrib.muon(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "every second": optax.MultiSteps(optax.adam(1e-2), 2),
}
# As programs are compiled outside of tests, where products and sums may be fused.
OPTIMIZED = {"xla_backend_optimization_level": 3}


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def numbers(seed: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in SHAPES.items()}


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile(compiler_options=OPTIMIZED)


def assert_same_steps(tx, steps, params=None):
    """Both ways from the same parameters: every array of parameters and state after every step."""
    params = numbers(0) if params is None else params
    state, dtype = tx.init(params), params["a"].dtype
    update = compiled(tx.update, params, state, params)
    add = compiled(optax.apply_updates, params, update(params, state, params)[0])
    both = compiled(lambda g, s, p: apply(tx, g, s, p), params, state, params)
    found, own = params, state
    for step in range(steps):
        gradients = numbers(step + 1, dtype)
        updates, state = update(gradients, state, params)
        params = add(params, updates)
        found, own = both(gradients, own, found)
        for x, y in zip(
            jax.tree.leaves((found, own)), jax.tree.leaves((params, state)), strict=True
        ):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_hundred_steps_have_the_bits_of_the_two_calls(name):
    assert_same_steps(quantize_state(OPTIMIZERS[name], fixed(6, 4)), 100)


@pytest.mark.parametrize("policy", [fixed(5, 4), uniform(7.0), adaptive(7.0, interval=5)])
def test_every_policy_has_the_bits_of_the_two_calls(policy):
    assert_same_steps(quantize_state(optax.adamw(1e-2), policy), 12)


def test_parameters_in_bfloat16_have_the_bits_of_the_two_calls():
    assert_same_steps(quantize_state(optax.adamw(1e-2), fixed(5, 4)), 5, numbers(0, jnp.bfloat16))


def test_other_transformations_are_updated_by_the_two_calls():
    tx = optax.chain(quantize_state(optax.scale_by_adam(), fixed(5, 4)), optax.scale(-1e-2))
    assert_same_steps(tx, 3)
    assert_same_steps(optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(), 3)


def test_updates_are_never_stored():
    params = {"w": jnp.ones((1024, 1024))}
    tx = quantize_state(optax.adamw(1e-2), fixed(5, 4))
    state = tx.init(params)

    def two(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    one = lambda gradients, state, params: apply(tx, gradients, state, params)  # noqa: E731
    temporary, shared = [], []
    for function in (one, two):
        step = jax.jit(function, donate_argnums=(1, 2)).lower(params, state, params).compile()
        temporary.append(step.memory_analysis().temp_size_in_bytes)
        shared.append(step.memory_analysis().alias_size_in_bytes)
    nbytes = params["w"].nbytes
    assert temporary[0] < temporary[1] - 0.99 * nbytes
    assert shared[0] >= nbytes + jq.optim.state_bytes(state)


def test_kernels_write_parameters_too():
    params = {"w": jnp.ones((64, 1024))}
    tx = quantize_state(optax.adamw(1e-2), fixed(5, 4), kernel="pallas")
    plain = quantize_state(optax.adamw(1e-2), fixed(5, 4))
    gradients = {"w": jnp.cos(jnp.arange(65536.0)).reshape(64, 1024)}
    wanted = apply(plain, gradients, plain.init(params), params)
    found = apply(tx, gradients, tx.init(params), params)
    np.testing.assert_array_equal(found[0]["w"], wanted[0]["w"])
    np.testing.assert_array_equal(found[1].pool, wanted[1].pool)


def test_what_is_refused_is_refused_as_by_update():
    params = {"w": jnp.ones((64, 64))}
    tx = quantize_state(optax.adamw(1e-2), fixed(5, 4))
    with pytest.raises(ValueError, match="the state must be that of a quantize_state"):
        apply(tx, params, optax.adamw(1e-2).init(params), params)
    with pytest.raises(ValueError, match=r"updates must be those of the state.*got \(2, 2\)"):
        apply(tx, {"w": jnp.ones((2, 2))}, tx.init(params), params)

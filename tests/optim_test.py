"""Optimizer state in few bits: every optimizer trains nearly as in full precision, and bytes are counted."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant.optim import (
    Companded,
    Logarithmic,
    by_role,
    explain_full_decode,
    fixed,
    quantize_state,
)
from jaxquant.optim.codecs import BLOCK

MASK = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, mask=MASK),
    "lion": optax.lion(1e-3),
    "momentum": optax.sgd(3e-2, momentum=0.9),
    "adagrad": optax.adagrad(3e-2),
    "rmsprop": optax.rmsprop(3e-3, momentum=0.9),
    "adafactor": optax.adafactor(3e-2, min_dim_size_to_factor=64, momentum=0.9),
    "muon": optax.contrib.muon(1e-2),
    "masked": optax.masked(optax.adam(1e-2), MASK),
    "multi_transform": optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(3e-2, momentum=0.9)},
        lambda params: jax.tree.map(lambda p: "a" if p.ndim > 1 else "b", params),
    ),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "multi_steps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "schedule": optax.adam(optax.cosine_decay_schedule(1e-2, 120)),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "hyperparameters": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
}
WHOLE = {"muon", "adafactor"}


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def problem(seed=0, hidden=96):
    """A regression that a two-layer network learns."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "up": {"kernel": jax.random.normal(keys[0], (32, hidden)) / 6, "bias": jnp.zeros(hidden)},
        "down": {"kernel": jax.random.normal(keys[1], (hidden, 16)) / 10},
    }
    x = jax.random.normal(keys[2], (256, 32))
    y = jnp.sin(x @ jax.random.normal(keys[3], (32, 16)) / 3)

    def loss(params):
        up = params["up"]
        hidden = jax.nn.gelu(x @ up["kernel"] + up["bias"][None, :])
        return jnp.mean((hidden @ params["down"]["kernel"] - y) ** 2)

    return params, loss


def trained(tx, steps=120, hidden=96):
    params, loss = problem(hidden=hidden)

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps))
    (params, state), values = run((params, tx.init(params)))
    return params, state, float(loss(params)), values


@pytest.mark.first(1)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_as_in_full_precision(name):
    *_, exact, values = trained(OPTIMIZERS[name])
    _, state, found, _ = trained(quantize_state(OPTIMIZERS[name], fixed(8)))
    assert exact < 0.7 * values[0]
    assert found < exact + 0.05 * float(values[0])
    assert bool(explain_full_decode(OPTIMIZERS[name], state, problem()[0])) == (name in WHOLE)


def test_pages_and_the_whole_give_the_same_bits(monkeypatch):
    tx = quantize_state(optax.adamw(1e-2, mask=MASK), fixed(5, 4))
    first = trained(tx, 20)
    monkeypatch.setattr(
        "jaxquant.optim.traced_update.TracedUpdate.elementwise", lambda *arguments: "a reason"
    )
    second = trained(tx, 20)
    for a, b in zip(jax.tree.leaves(first[:2]), jax.tree.leaves(second[:2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.exhaustive
def test_a_step_holds_no_full_precision_copy_of_the_state():
    spec = {"w": jax.ShapeDtypeStruct((4096, 2048), jnp.float32)}
    tx = quantize_state(optax.adamw(1e-3), fixed(5, 4))

    def step(state, params, gradients):
        updates, state = tx.update(gradients, state, params)
        return state, optax.apply_updates(params, updates)

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(jax.eval_shape(tx.init, spec), spec, spec)
    found = compiled.compile().memory_analysis()
    assert found is not None
    updates = 4 * 4096 * 2048
    # Beside the updates themselves, less than a fifth of what the two moments take in float32.
    assert found.temp_size_in_bytes < updates + 0.2 * 2 * updates


@pytest.mark.parametrize("name", ["adamw", "muon", "multi_steps", "hyperparameters"])
def test_a_traced_init_encodes_no_zeros(name):
    tx, (params, _) = quantize_state(OPTIMIZERS[name], fixed(5, 4)), problem()
    operations = str(jax.make_jaxpr(tx.init)(params))
    assert "reduce" not in operations  # none looks for a block's largest value
    traced = jax.tree.leaves(jax.jit(tx.init)(params))
    for one, other in zip(traced, jax.tree.leaves(tx.init(params)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bytes_are_those_of_the_bits():
    params = {"w": jnp.zeros((512, 256))}
    state = quantize_state(optax.scale_by_adam(), fixed(5, 3)).init(params)
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    elements = params["w"].size
    # 8 bits of codes, two bytes of scale for either block, tables, a row of zeros, and two counts.
    rest = 2 * 32 * elements // 8192 + 1024 + 8
    assert held == elements + 4 * elements // BLOCK + rest


def test_roles_keep_what_they_are_told_to():
    params = {"embed": jnp.zeros((64, 64)), "up": jnp.zeros((64, 64)), "bias": jnp.zeros(256)}
    widths = {"embedding": 8, "head": 8, "matrix": (5, 3), "vector": None}
    state: Any = quantize_state(optax.scale_by_adam(), by_role(widths)).init(params)
    reasons = {leaf.path: leaf.reason for leaf in state.plan.exact}
    assert reasons["mu/bias"] == "the policy keeps it (by role)"
    assert "count" in reasons


@pytest.mark.first(1)
@pytest.mark.exhaustive
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("linear", [1.0, 0.3])
def test_companded_codes_are_the_nearest_levels(bits, linear):
    codec, width = Companded(linear), jnp.int32(bits)
    x = jnp.array(np.random.default_rng(0).normal(size=(8, BLOCK)), jnp.float32)
    codes, scale = codec.encode(x, width, jnp.zeros_like(x))
    every = jnp.arange(2**bits - 1, dtype=jnp.uint8)
    padded = jnp.pad(every, (0, max(0, BLOCK - every.size)))[None, :].repeat(8, 0)
    levels = np.asarray(codec.decode(padded, scale, width))[:, : every.size]
    top = np.abs(levels).max(1, keepdims=True)
    gaps = np.abs(np.clip(x, -top, top)[:, :, None] - levels[:, None, :])
    found = np.abs(np.clip(x, -top, top) - codec.decode(codes, scale, width))
    np.testing.assert_allclose(found, gaps.min(-1), atol=2e-6)


@pytest.mark.first(1)
@pytest.mark.exhaustive
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_stochastic_logarithmic_codes_keep_the_mean(bits):
    span = min(2**bits - 2, 12)  # binades that the codes reach
    x = jnp.exp2(jax.random.uniform(jax.random.key(1), (1, BLOCK), maxval=span))
    draws = jax.random.uniform(jax.random.key(0), (20_000, 1, BLOCK))
    codec, width = Logarithmic(), jnp.int32(bits)
    seen = jax.vmap(lambda d: codec.decode(*codec.encode(x, width, d), width))(draws)
    error = np.abs(seen.mean(0) - x) / (seen.std(0) / 20_000**0.5 + 1e-5 * x)
    assert error.max() < 5


def test_a_second_moment_of_zero_never_makes_an_update_explode():
    x = jnp.zeros((1, BLOCK)).at[0, :4].set(jnp.array([1.0, 1e-3, 1e-6, 1e-9]))
    codec, width = Logarithmic(), jnp.int32(3)
    codes, scale = codec.encode(x, width, jnp.full_like(x, 0.99))
    assert float(codec.decode(codes, scale, width).min()) > 0
    codes, scale = codec.encode(0 * x, width, jnp.zeros_like(x))
    assert float(jnp.abs(codec.decode(codes, scale, width)).max()) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fixed(9), "bits must be an integer from 2 to 8; got 9"),
        (lambda: by_role({"matrix": 4}), "missing"),
        (
            lambda: quantize_state(optax.adam(1e-3), cast(Any, 4)),
            "policy must be a Policy, such as",
        ),
        (
            lambda: quantize_state(optax.adam(1e-3), fixed(4)).init({"w": jnp.zeros(3)}),
            "no leaf of the optimizer's state can be quantized: 3 elements are fewer",
        ),
        (
            lambda: quantize_state(
                optax.adam(1e-3), fixed(4), codec=lambda leaf: Logarithmic()
            ).init({"w": jnp.zeros((64, 64))}),
            "may be negative",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_it_is_public():
    assert jq.optim.quantize_state is quantize_state

"""AdamW with the peers' state: optax's beside it, the bytes it takes, and that it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.harness.peers import optimizers
from experiments.harness.peers.codes import Coded, bitsandbytes, decode, torchao

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others

PEERS = {"torchao 4": torchao(4), "torchao 8": torchao(8), "bitsandbytes": bitsandbytes()}
OPTIMIZERS = {
    "torchao 4": lambda rate, **rest: optimizers.torchao_adamw(rate, 4, **rest),
    "torchao 8": lambda rate, **rest: optimizers.torchao_adamw(rate, 8, **rest),
    "bitsandbytes": optimizers.bitsandbytes_adamw,
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def problem():
    """A regression with leaves that are coded by all peers, by one, and by none."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "up": jax.random.normal(keys[0], (32, 128)) / 6,
        "odd": jax.random.normal(keys[1], (128, 33)) / 10,
        "bias": jnp.zeros(33),
    }
    x = jax.random.normal(keys[2], (256, 32))
    y = jnp.sin(x @ jax.random.normal(keys[3], (32, 33)) / 3)

    def loss(params):
        hidden = jax.nn.gelu(x @ params["up"])
        return jnp.mean((hidden @ params["odd"] + params["bias"][None, :] - y) ** 2)

    return params, loss


def trained(tx, steps=150):
    params, loss = problem()

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps))
    return run((params, tx.init(params)))


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("name", "bits"), [("torchao 4", 4.25), ("torchao 8", 8.125), ("bitsandbytes", 8.125)]
)
def test_bytes_are_those_of_codes_and_scales_before_and_after_a_step(name, bits):
    tx, params = OPTIMIZERS[name](1e-3), {"kernel": jnp.ones((32, 256))}
    state = tx.init(params)
    for _ in range(2):
        for moment in (state[0].mu, state[0].nu):
            assert isinstance(moment["kernel"], Coded)
            stored = sum(leaf.nbytes for leaf in jax.tree.leaves(moment))
            assert stored * 8 == bits * params["kernel"].size
        _, state = tx.update(params, state, params)


@pytest.mark.first(1)
@every_optimizer
def test_leaves_that_are_not_coded_are_optax_bit_for_bit(name):
    params, _ = problem()
    small = {"bias": params["bias"], "corner": params["up"][:8]}
    ours, plain = OPTIMIZERS[name](1e-2, weight_decay=0.1), optax.adamw(1e-2, weight_decay=0.1)
    state, exact, found = ours.init(small), plain.init(small), small
    for i in range(4):
        gradients = jax.tree.map(lambda p: jnp.cos(p + i), found)  # noqa: B023
        updates, state = ours.update(gradients, state, found)
        expected, exact = plain.update(gradients, exact, found)
        jax.tree.map(np.testing.assert_array_equal, (updates, state), (expected, exact))
        found = optax.apply_updates(found, updates)


@pytest.mark.long
@every_optimizer
def test_the_first_step_is_taken_with_exact_moments(name):
    """The order of both peers: update first, then store."""
    params, loss = problem()
    gradients = jax.grad(loss)(params)
    ours, plain = OPTIMIZERS[name](1e-2), optax.adamw(1e-2, weight_decay=1e-2)
    found, _ = ours.update(gradients, ours.init(params), params)
    expected, _ = plain.update(gradients, plain.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.first(1)
@every_optimizer
def test_the_second_step_is_taken_with_decoded_moments(name):
    params, loss = problem()
    peer, tx = PEERS[name], OPTIMIZERS[name](1.0, b1=0.9, b2=0.99, weight_decay=0.0)
    gradients = jax.grad(loss)(params)
    _, state = tx.update(gradients, tx.init(params), params)
    found, _ = tx.update(gradients, state, params)
    g, mu, nu = gradients["up"], state[0].mu["up"], state[0].nu["up"]
    m = 0.9 * decode(mu, g.shape, peer, peer.mu) + 0.1 * g
    v = 0.99 * decode(nu, g.shape, peer, peer.nu) + 0.01 * g**2
    expected = -(m / (1 - 0.9**2)) / (jnp.sqrt(v) / jnp.sqrt(1 - 0.99**2) + 1e-8)
    np.testing.assert_allclose(found["up"], expected, rtol=1e-5)


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["torchao 8", "bitsandbytes"])
def test_8_bits_train_almost_as_float32(name):
    _, losses = trained(OPTIMIZERS[name](1e-2))
    _, exact = trained(optax.adamw(1e-2, weight_decay=1e-2))
    assert exact[-1] < 0.1 * exact[0]
    np.testing.assert_allclose(losses[50], exact[50], rtol=0.03)
    assert losses[-1] < 1.03 * exact[-1]


def test_4_bits_train():
    _, losses = trained(OPTIMIZERS["torchao 4"](1e-2))
    assert losses[-1] < 0.2 * losses[0]


@every_optimizer
def test_schedules_and_masks_are_those_of_optax(name):
    """Without a gradient, decay is all that moves parameters."""
    params, _ = problem()
    settings = {"weight_decay": 0.1, "mask": {"up": True, "odd": True, "bias": False}}
    rate = optax.linear_schedule(1e-2, 0.0, 10)
    ours, plain = OPTIMIZERS[name](rate, **settings), optax.adamw(rate, **settings)
    gradients = jax.tree.map(jnp.zeros_like, params)
    state, exact = ours.init(params), plain.init(params)
    for _ in range(3):
        updates, state = ours.update(gradients, state, params)
        expected, exact = plain.update(gradients, exact, params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_gradients_of_bfloat16_give_updates_of_bfloat16_and_moments_of_float32():
    params = {"up": jnp.ones((64, 64), jnp.bfloat16), "bias": jnp.ones(8, jnp.bfloat16)}
    tx = optimizers.torchao_adamw(1e-2)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert state[0].mu["bias"].dtype == jnp.float32


def test_steps_compile_once():
    traces = []
    tx, (params, _) = optimizers.torchao_adamw(1e-2), problem()

    @jax.jit
    def step(gradients, state):
        traces.append(1)
        return tx.update(gradients, state, gradients)[1]

    state = tx.init(params)
    for _ in range(3):
        state = step(params, state)
    assert len(traces) == 1


@pytest.mark.parametrize("bits", [2, 5, 16, 4.5, True, "4", None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"bits=4 or bits=8; got bits="):
        optimizers.torchao_adamw(1e-3, bits=bits)

"""Simulated moments with coarser scales: the codecs' own arithmetic, and widths within a budget."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.harness.training import arms
from experiments.harness.training.coarse import Coarse, derived_bytes, scale_by_coarse_adam
from jaxquant.optim import Companded

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others

PARAMS = {"embed": jnp.ones((256, 64)), "up": jnp.ones((64, 160)), "bias": jnp.ones(64)}
ELEMENTS = sum(x.size for x in PARAMS.values())


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def gradients(step):
    keys = jax.random.split(jax.random.key(step), len(PARAMS))
    pairs = zip(keys, PARAMS.items(), strict=True)
    return {
        name: 10.0**-i * jax.random.normal(key, x.shape) for i, (key, (name, x)) in enumerate(pairs)
    }


def after(held, steps):
    tx = scale_by_coarse_adam(held, 0.9, 0.95, 1e-8)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients(step), state)
    return updates, state


def test_the_first_update_is_adams_and_what_is_held_is_rounded_to_nearest():
    updates, state = after(Coarse("row", "even", 4.0, interval=10), 1)
    adam = optax.scale_by_adam(0.9, 0.95, 1e-8)
    wanted, exact = adam.update(gradients(0), adam.init(PARAMS))
    for name, x in updates.items():
        np.testing.assert_allclose(x, wanted[name], rtol=1e-5)
    # In NumPy: levels s k/7 (0.3 + 0.7 k/7), s the largest of a row, in bfloat16.
    m = np.asarray(exact.mu["up"], np.float64)
    c, k = 77 / 256, np.arange(8) / 7
    levels = np.concatenate([-(c * k + (1 - c) * k**2)[:0:-1], c * k + (1 - c) * k**2])
    scale = np.asarray(jnp.abs(exact.mu["up"]).max(1, keepdims=True).astype(jnp.bfloat16), float)
    nearest = np.abs(m[..., None] / scale[..., None] - levels).argmin(-1)
    np.testing.assert_allclose(state.mu["up"], levels[nearest] * scale, rtol=1e-5, atol=1e-9)


def test_a_block_is_what_the_codec_gives():
    _, state = after(Coarse("block", "even", 5.0, interval=10), 1)
    adam = optax.scale_by_adam(0.9, 0.95, 1e-8)
    _, exact = adam.update(gradients(0), adam.init(PARAMS))
    blocks = exact.mu["embed"].reshape(-1, 128)
    bits = jnp.full(len(blocks), 5)
    coded = Companded().encode(blocks, bits, jnp.zeros_like(blocks))
    wanted = Companded().decode(*coded, bits).reshape(256, 64)
    np.testing.assert_allclose(state.mu["embed"], wanted, rtol=1e-6)  # products may be fused


@pytest.mark.parametrize("allocation", ["even", "split1", "split2", "felt", "statistics"])
@pytest.mark.parametrize("scale", ["block", "row", "tensor"])
def test_widths_hold_the_budget(scale, allocation):
    held = Coarse(scale, allocation, 3.5, interval=2)
    _, state = after(held, 4)
    sizes = np.array([x.size for x in jax.tree.leaves(PARAMS)])
    # Leaves count in units of 1024 elements, and small ones as one unit.
    assert (np.asarray(state.bits) @ sizes).sum() <= 3.5 * 2 * ELEMENTS + 8 * 1024
    assert np.asarray(state.bits)[0].min() >= 2


def test_bytes_are_codes_and_scales():
    held = Coarse("tensor", "even", 4.0, interval=2)
    _, state = after(held, 1)
    scales = 3 * (2 + 2)  # bfloat16 of the first moment, two exponents of the second
    assert derived_bytes(held, PARAMS, state.bits) == ELEMENTS + scales
    opt_state = ((), state)
    assert arms.state_bytes("tensor:even-4.0", opt_state) == ELEMENTS + scales


def test_coarser_scales_round_more():
    def error(scale):
        _, state = after(Coarse(scale, "even", 4.0, interval=2), 1)
        adam = optax.scale_by_adam(0.9, 0.95, 1e-8)
        _, exact = adam.update(gradients(0), adam.init(PARAMS))
        return float(jnp.mean((state.mu["embed"] - exact.mu["embed"]) ** 2))

    assert error("block") < error("tensor")


@pytest.mark.parametrize("arm", ["row:best-3.0", "page:even-3.0", "row:even"])
def test_an_unknown_arm_is_named(arm):
    with pytest.raises(ValueError, match=arm):
        arms.moments(arm, 10)

"""The study of gradient precision: its arms, its grid, and what its report says of records."""

import jax
import pytest

from experiments.gradient_precision import measuring
from experiments.gradient_precision.arms import FULL, Arm, Precision
from experiments.harness.models import lm

TINY = lm.LMConfig(layers=1, width=32, heads=2, kv_heads=2, hidden=32, vocab_size=32)
TOKENS = jax.random.randint(jax.random.key(0), (4, 33), 0, 32)


def gradient_error(arm, precision, draws=8):
    model, plain = measuring.Model(TINY, arm), measuring.Model(TINY, Arm(FULL))
    params = model.init(jax.random.key(1))
    sums = jax.jit(measuring.gradient_sums, static_argnums=(0, 1, 5))(
        model, plain, params, TOKENS, precision, draws
    )
    return measuring.gradient_error(jax.device_get(sums), draws)


def grid(rounding, hadamard=8, family="int"):
    return Arm(family, rounding=rounding, block=8, hadamard=hadamard)


def test_nearest_has_bias_alone_and_stochastic_rounding_variance_alone():
    nearest = gradient_error(grid("nearest", 0), Precision.of(16, 4))
    stochastic = gradient_error(grid("stochastic", 0), Precision.of(16, 4), draws=32)
    # Scaled by powers of two all else is the same, so what is not drawn has no variance at all.
    assert nearest["variance"] < 1e-9
    assert nearest["bias"] > 0.05
    assert stochastic["variance"] > 1e-3
    assert stochastic["bias"] < stochastic["least_bias"] < nearest["bias"]
    assert nearest["forward"] == pytest.approx(stochastic["forward"])


@pytest.mark.long
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["nvfp4_train", "nvfp4_eden_train-h32", "mxfp4_train"])
def test_recipes_draw_anew_for_each_scale_of_the_loss(name):
    found = gradient_error(Arm(name), Precision.of(4, 4))
    assert found["variance"] > 1e-3
    assert found["forward"] > 0.05


@pytest.mark.long
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["int", "float"])
def test_16_bits_are_full_precision_and_fewer_cost_more(family):
    found = [
        gradient_error(grid("stochastic", 8, family), Precision.of(*b))
        for b in ((16, 16), (16, 8), (16, 4), (4, 16))
    ]
    assert found[0]["variance"] < 1e-4
    assert found[0]["forward"] < 1e-2
    assert found[0]["variance"] < found[1]["variance"] < found[2]["variance"]
    assert found[3]["variance"] < 1e-4
    assert found[3]["forward"] > 0.05

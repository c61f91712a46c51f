"""What programs for GPUs compute where theirs differ from a CPU's, computed here on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq

MATRIX = (((1,), (0,)), ((), ()))
RNG = np.random.default_rng(0)


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes programs take the branch for CUDA."""

    def choose(*operands, default, cuda=None, **_):
        return (cuda or default)(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)


def float8(x, w):
    return jq.recipe("fp8_train")(x, w, MATRIX)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_float8_products_scaled_once_are_those_scaled_twice(size):
    x, w = (jnp.array(size * RNG.normal(size=(64, 64)), jnp.float32) for _ in range(2))
    left, right = (jq.quantize(a, jq.Quantizer(jq.E4M3)) for a in (x, w))
    sums = np.asarray(left.qvalue, np.float64) @ np.asarray(right.qvalue, np.float64)
    wanted = sums * np.float64(left.scale) * np.float64(right.scale)
    np.testing.assert_allclose(float8(x, w), wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.usefixtures("on_gpu")
def test_float8_zeros_stay_zeros_whatever_their_scales():
    huge = jnp.zeros((2, 2)).at[0, 0].set(3e38)
    found = float8(huge, jnp.flip(huge))  # no two values but zeros meet
    np.testing.assert_array_equal(found, np.zeros((2, 2)))
    assert np.isnan(float8(huge.at[1, 1].set(jnp.inf), huge)).all()

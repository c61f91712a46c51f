"""What programs for GPUs compute where theirs differ from a CPU's, computed here on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.numerics.reductions import largest_magnitude
from jaxquant.numerics.rounding import key_of

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


NAN, INF = np.nan, np.inf
ROWS = [
    [1, -3, 2],
    [0, -0.0, 0],
    [1e-40, -2e-40, 0],
    [-INF, 1, 2],
    [INF, 0, 0],
    [-NAN, 9, 1],
    [3e38, 0, -1],
]


@pytest.mark.usefixtures("on_gpu")
def test_largest_magnitudes_by_bits_are_those_by_value():
    wanted = np.float32([3, 0, 2e-40, NAN, NAN, NAN, 3e38])
    found = largest_magnitude(jnp.array(ROWS, jnp.float32), (1,))
    np.testing.assert_array_equal(found[:, 0], wanted)
    x = RNG.normal(size=(5, 7, 3)).astype(np.float32)
    for axes in [(0,), (2,), (0, 1), (0, 1, 2), ()]:
        wanted = np.abs(x).max(axes, keepdims=True) if axes else np.abs(x)
        np.testing.assert_array_equal(largest_magnitude(jnp.array(x), axes), wanted)
    np.testing.assert_array_equal(largest_magnitude(jnp.zeros((2, 0)), (1,)), np.zeros((2, 1)))


@pytest.mark.usefixtures("on_gpu")
def test_the_largest_magnitude_by_bits_has_its_gradient():
    found = jax.grad(lambda x: largest_magnitude(x, (0,)).sum())(jnp.array([1.0, -3.0, 2.0]))
    np.testing.assert_array_equal(found, [0, -1, 0])


def mixed(word):
    """`mix_bits`, by whole numbers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word = (word ^ (word >> shift)) * factor % 2**32
    return word ^ (word >> 16)


SHAPES = [(), (0,), (3,), (257,), (4096,), (1, 1, 512), (6, 1000, 1), (16, 96), (2, 3, 512)]


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("shape", SHAPES)
def test_keys_summed_by_parts_are_those_summed_at_once(shape):
    x = RNG.normal(size=shape).astype(np.float32)
    words = (mixed(int(bits) ^ mixed(i)) for i, bits in enumerate(np.ravel(x).view(np.uint32)))
    assert np.asarray(key_of(jnp.array(x), 7)).tolist() == [7, sum(words) % 2**32]

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import rounding


def test_nearest_rounds_ties_to_even():
    x = jnp.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    np.testing.assert_array_equal(rounding.nearest(x), [-2, -2, 0, 0, 2, 2])


@pytest.mark.parametrize("value", [0.1, -0.3, 2.5, -7.9])
def test_stochastic_rounding_is_unbiased(value):
    n = 1_000_000
    draws = rounding.stochastic(jnp.full(n, value), jax.random.key(1))
    assert set(np.unique(draws)) == {np.floor(value), np.ceil(value)}
    share = value - np.floor(value)
    sigma = np.sqrt(share * (1 - share) / n)
    assert abs(float(np.mean(np.asarray(draws, np.float64))) - value) < 5 * sigma


def test_stochastic_rounding_fixes_integers_and_repeats_with_its_key():
    integers = jnp.array([-3.0, 0.0, 5.0, 2.0**23, -(2.0**23)])
    np.testing.assert_array_equal(rounding.stochastic(integers, jax.random.key(0)), integers)
    x = jnp.linspace(-3, 3, 1000)
    one, two = (rounding.stochastic(x, jax.random.key(s)) for s in (0, 1))
    np.testing.assert_array_equal(one, rounding.stochastic(x, jax.random.key(0)))
    assert (one != two).any()


def test_stochastic_rounding_through_a_quantizer_is_unbiased_on_a_float_grid():
    n = 200_000
    x = jnp.concatenate([jnp.full(n, 0.3), jnp.ones(1) * 6])
    quantizer = jq.Quantizer(jq.E2M1, rounding=rounding.stochastic)
    draws = np.asarray(jq.fake_quant(x, quantizer, key=jax.random.key(0)), np.float64)[:-1]
    np.testing.assert_array_equal(np.unique(draws), [0.0, 0.5])
    assert abs(draws.mean() - 0.3) < 5 * np.sqrt(0.6 * 0.4 / n) * 0.5


def test_stochastic_rounding_without_a_key_is_an_error():
    with pytest.raises(ValueError, match="key"):
        rounding.stochastic(jnp.ones(3))
    with pytest.raises(ValueError, match="key"):
        jq.quantize(jnp.ones(3), jq.Quantizer(jq.INT8, rounding=rounding.stochastic))


def test_straight_through_passes_the_gradient_whole():
    x = jnp.array([0.2, 1.7, -2.4])
    cotangent = jnp.array([1.0, -2.0, 3.0])
    value, pull = jax.vjp(lambda x: rounding.straight_through(x, jnp.round(x)), x)
    np.testing.assert_array_equal(value, jnp.round(x))
    np.testing.assert_array_equal(pull(cotangent)[0], cotangent)


def test_second_derivatives_are_straight_through_too():
    def energy(x):
        return jnp.sum(jq.fake_quant(x, jq.Quantizer(jq.INT4)) ** 2)

    np.testing.assert_array_equal(jax.jacrev(jax.grad(energy))(jnp.ones(3)), 2 * np.eye(3))

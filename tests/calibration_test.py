import jax.numpy as jnp
import numpy as np

from jaxquant import calibration


def test_absmax_covers_every_value_and_keeps_the_axes():
    x = jnp.array(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    for axes in ((0,), (1, 2), (0, 1, 2)):
        found = calibration.absmax(x, axes)
        np.testing.assert_array_equal(found, np.abs(x).max(axis=axes, keepdims=True))


def test_absmax_of_nothing_is_zero():
    assert calibration.absmax(jnp.zeros((2, 0)), (1,)).tolist() == [[0.0], [0.0]]

"""Convolutions of integers as sums of products: the integers of lax's own convolution, in every form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.operations import taps
from jaxquant.operations.windows import towards_lhs, towards_rhs, window_of

pytestmark = pytest.mark.exhaustive
CASES = {  # lhs, rhs, strides, padding, dilations of lhs and rhs, axes, groups of features and batch
    "plain": ((2, 7, 6, 4), (3, 2, 4, 5), (1, 1), "SAME", (1, 1), (1, 1), "NHWC", (1, 1)),
    "strided": ((2, 9, 7, 4), (3, 3, 4, 6), (2, 1), "SAME", (1, 1), (1, 2), "NHWC", (1, 1)),
    "grouped": ((2, 8, 8, 6), (3, 3, 2, 9), (1, 2), "VALID", (1, 1), (1, 1), "NHWC", (3, 1)),
    "depthwise": ((2, 6, 6, 5), (3, 3, 1, 10), (2, 2), "SAME", (1, 1), (1, 1), "NHWC", (5, 1)),
    "batch groups": ((4, 6, 6, 3), (3, 3, 3, 4), (1, 1), "SAME", (1, 1), (1, 1), "NHWC", (1, 2)),
    "dilated lhs": (
        (1, 5, 4, 2),
        (2, 3, 1, 4),
        (1, 1),
        ((1, 2), (-1, 0)),
        (2, 3),
        (1, 1),
        "NHWC",
        (2, 1),
    ),
    "one axis": ((2, 4, 20), (6, 2, 5), (3,), "SAME", (1,), (2,), "NCW", (2, 1)),
    "many taps": ((1, 12, 12, 2), (7, 7, 2, 3), (1, 1), "SAME", (1, 1), (1, 1), "NHWC", (1, 1)),
    "a wide window": ((2, 9, 9, 2), (8, 8, 2, 3), (1, 1), "VALID", (1, 1), (1, 1), "NHWC", (1, 1)),
}


def integers(*shape, seed):
    return jax.random.randint(jax.random.key(seed), shape, -127, 128).astype(jnp.int8)


def case(name):
    lhs, rhs, strides, padding, spread, dilation, axes, groups = CASES[name]
    space = axes.replace("N", "").replace("C", "")
    numbers = axes, f"{space}IO" if axes.endswith("C") else f"OI{space}", axes
    window = window_of(lhs, rhs, strides, padding, spread, dilation, numbers, groups)
    return window, integers(*lhs, seed=0), integers(*rhs, seed=1)


@pytest.mark.parametrize("name", CASES)
def test_sums_of_products_are_the_convolution(name):
    window, lhs, rhs = case(name)
    want = window.convolve(lhs, rhs, preferred_element_type=jnp.int32)
    found = jax.jit(lambda lhs, rhs: taps.by_products(window, lhs, rhs))(lhs, rhs)
    np.testing.assert_array_equal(found, want)
    assert found.dtype == jnp.int32


@pytest.mark.parametrize(
    "name", ["plain", "strided", "grouped", "depthwise", "one axis", "many taps"]
)
def test_both_gradients_convolutions_are_sums_of_products_too(name):
    window, lhs, rhs = case(name)
    gradient = integers(*window.convolve(lhs, rhs).shape, seed=2)
    by_window = towards_rhs(window, lhs.shape, rhs.shape, gradient.shape)
    want = by_window.convolve(lhs, gradient, preferred_element_type=jnp.int32)
    np.testing.assert_array_equal(taps.by_products(by_window, lhs, gradient), want)
    if max(window.feature_groups, window.batch_groups) == 1:
        by_image = towards_lhs(window, lhs.shape, rhs.shape, gradient.shape)
        want = by_image.convolve(gradient, rhs, preferred_element_type=jnp.int32)
        np.testing.assert_array_equal(taps.by_products(by_image, gradient, rhs), want)

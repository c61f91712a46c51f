import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import jaxquant as jq
from jaxquant.numerics.hadamard import hadamard


def normals(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096])
def test_it_is_sylvesters_matrix(n):
    x = normals(3, n)
    expected = x.astype(np.float64) @ scipy.linalg.hadamard(n) / np.sqrt(n)
    np.testing.assert_allclose(hadamard(jnp.array(x), n), expected, atol=3e-6)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("block", [1, 4, 32])
def test_blocks_along_any_axis(axis, block):
    x = normals(32, 32, 64)
    matrix = np.kron(np.eye(x.shape[axis] // block), scipy.linalg.hadamard(block)) / np.sqrt(block)
    expected = np.moveaxis(np.moveaxis(x, axis, -1) @ matrix, -1, axis)
    np.testing.assert_allclose(hadamard(jnp.array(x), block, axis), expected, atol=3e-6)


@pytest.mark.parametrize("n", [2, 16, 128, 2048])
def test_it_is_its_own_inverse_and_keeps_norms_and_inner_products(n):
    x, y = jnp.array(normals(4, n)), jnp.array(normals(8, n)[4:])
    np.testing.assert_allclose(hadamard(hadamard(x, n), n), x, atol=3e-6)
    for a, b in ((x, x), (x, y)):
        rotated = jnp.sum(hadamard(a, n) * hadamard(b, n), 1)
        np.testing.assert_allclose(rotated, jnp.sum(a * b, 1), rtol=1e-4, atol=1e-3)


def test_its_gradient_is_itself():
    g = jnp.array(normals(2, 64))
    _, pull = jax.vjp(lambda x: hadamard(x, 64), jnp.zeros((2, 64)))
    np.testing.assert_allclose(pull(g)[0], hadamard(g, 64), atol=2e-6)


def test_it_spreads_an_outlier_evenly():
    x = jnp.zeros((1, 64)).at[0, 5].set(8.0)
    np.testing.assert_allclose(jnp.abs(hadamard(x, 64)), 1.0, rtol=1e-6)


def test_it_keeps_the_type_and_takes_empty_arrays():
    assert hadamard(jnp.ones((2, 8), jnp.bfloat16), 8).dtype == jnp.bfloat16
    assert hadamard(jnp.ones((0, 8)), 8).shape == (0, 8)
    assert hadamard(jnp.ones((3, 0)), 8).shape == (3, 0)


@pytest.mark.first(1)
@pytest.mark.exhaustive
@pytest.mark.parametrize("fmt", [jq.INT8, jq.MXFP8], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_rotated_qarray_turns_back(fmt, axis):
    x = jnp.array(normals(64, 96 if axis == 0 else 64))
    quantizer = jq.Quantizer(fmt, hadamard=32)
    q = jq.quantize(x, quantizer, axis=axis)
    np.testing.assert_array_equal(jq.dequantize(q), jq.fake_quant(x, quantizer, axis=axis))
    assert float(jnp.mean((jq.dequantize(q) - x) ** 2)) < 2e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hadamard(jnp.ones((2, 12)), 12), "power of two"),
        (lambda: hadamard(jnp.ones((2, 12)), 0), "power of two"),
        (lambda: hadamard(jnp.ones((2, 12)), -4), "power of two"),
        (lambda: hadamard(jnp.ones((2, 12)), 4.0), "power of two"),
        (lambda: hadamard(jnp.ones((2, 12)), True), "power of two"),
        (lambda: hadamard(jnp.ones((2, 12)), 8), "does not divide"),
        (lambda: hadamard(jnp.ones((2, 12)), 4, 2), "axis 2"),
        (lambda: jq.Quantizer(jq.INT8, hadamard=12), "power of two"),
        (lambda: jq.quantize(jnp.ones((2, 12)), jq.Quantizer(jq.INT8, hadamard=8)), "divide"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

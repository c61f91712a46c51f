"""Zeros come back as zeros: on grids that have no zero too, and whatever else shares their array."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant import calibration, estimators
from jaxquant.nnx.modules import read
from jaxquant.operations.conv import ConvGeneralDilated
from jaxquant.operations.ragged import RaggedDot
from jaxquant.ptq.solvers import gptq

pytestmark = pytest.mark.exhaustive  # minutes, once in CI

LEAST = 1e-30
WITHOUT_ZERO = [
    "int1midrise",
    "int4midrise",
    "int16midrise",
    "codebook(-1.0,1.0)",
    "codebook(1.0,2.0)",
    "codebook(-1000000000.0,1000000000.0)",
    "e8m0fnu",
    "block(int4midrise,16,e8m0fnu,1)",
    "block(int4midrise,16,e8m0fnu,2)",
    "block(int4midrise,16,e4m3fn,1)",
    "block(int4midrise,16,e4m3fn,2)",
    "block(int1midrise,16,e5m2,2)",
    "block(int4midrise,16,fp16,1)",
    "block(int4midrise,16,bf16,2)",
    "block(codebook(-1000000000.0,1000000000.0),16,e8m0fnu,1)",
    "block(e8m0fnu,16,e8m0fnu,1)",
]
WITH_ZERO = ["int8", "uint4", "e4m3fn", "bf16", "nf4", "dynamic8", "mxfp4", "mxint8", "nvfp4"]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 64)).astype(np.float32)
X[0, 0] = 4  # the largest


def with_zeros(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x with blocks of 32 of zeros, of −0.0 and of subnormals, and which elements these are."""
    x, gone = x.copy(), np.zeros(x.shape, bool)
    parts = (
        (1, slice(64), 0.0),
        (2, slice(32), -0.0),
        (4, slice(32, 64), 0.0),
        (5, slice(64), 1e-41),
    )
    for row, part, value in parts:
        x[row, part], gone[row, part] = value, True
    return x, gone


def quantizer(name: str, **options) -> jq.Quantizer:
    fmt = jq.parse(name)
    return jq.Quantizer(fmt, None if isinstance(fmt, jq.Block) else 16, **options)


def seen(x, quantizer) -> np.ndarray:
    """What `fake_quant` gives, and `quantize`, packed, too."""
    found = jq.fake_quant(jnp.array(x), quantizer)
    stored = jq.quantize(jnp.array(x), quantizer)
    np.testing.assert_array_equal(found, jq.dequantize(stored))
    np.testing.assert_array_equal(found, jq.dequantize(stored.pack()))
    return np.asarray(found)


@pytest.mark.first(4)
@pytest.mark.parametrize("name", WITHOUT_ZERO + WITH_ZERO)
def test_groups_of_zeros_are_zeros_beside_others(name):
    x, gone = with_zeros(X)
    found = seen(x, quantizer(name))
    assert np.abs(found[gone]).max() <= LEAST
    assert np.abs(found[~gone]).max() > 0.5
    # What lies beside them is what it is without them.
    without = np.asarray(jq.fake_quant(jnp.array(X), quantizer(name)))
    np.testing.assert_array_equal(found[~gone], without[~gone])
    assert np.abs(seen(0 * X, quantizer(name))).max() <= LEAST


@pytest.mark.first(4)
@pytest.mark.parametrize("hadamard", [None, 16])
@pytest.mark.parametrize(
    "find",
    [
        calibration.gaussian,
        calibration.mse(4),
        calibration.percentile(90),
        calibration.Range(jnp.float32(0.7)),
        calibration.Range(jnp.float32(0)),
        calibration.Step(jnp.float32(0.1)),
    ],
    ids=["gaussian", "mse", "percentile", "range", "no range", "step"],
)
def test_zeros_are_zeros_however_the_range_is_found(find, hadamard):
    x, gone = with_zeros(X)
    for name in ("int4midrise", "block(int4midrise,16,e8m0fnu,1)", "block(int1midrise,16,fp16,1)"):
        found = seen(x, quantizer(name, calibration=find, hadamard=hadamard))
        assert np.abs(found[gone]).max() <= LEAST


def test_zeros_of_an_asymmetric_range_are_zeros():
    x, gone = with_zeros(X)
    found = seen(x, quantizer("uint4", calibration=calibration.minmax))
    assert np.abs(found[gone]).max() <= LEAST
    assert np.abs(found[~gone] - x[~gone]).max() < 0.3


def test_zeros_are_zeros_at_traced_bits():
    x, gone = with_zeros(X)
    at = jax.jit(
        lambda bits: jq.fake_quant(jnp.array(x), jq.Quantizer(jq.Int(bits, "midrise"), 16))
    )
    for bits in (1, 4, 16):
        found = np.asarray(at(jnp.int32(bits)))
        assert np.abs(found[gone]).max() <= LEAST
        assert np.abs(found[~gone]).max() > 0.5


@pytest.mark.parametrize("name", ["int4midrise", "block(int4midrise,16,e8m0fnu,1)", "nvfp4"])
def test_groups_that_hold_a_nan_stay_nan_beside_zeros(name):
    for bad in (np.nan, np.inf):
        x = with_zeros(X)[0]
        x[1, 3] = bad
        found = seen(x, quantizer(name))
        assert np.isnan(found[1, :16]).all()
        assert np.abs(found[1, 32:]).max() <= LEAST
        assert not np.isnan(np.delete(found, 1, 0)).any()


@pytest.mark.first(4)
@pytest.mark.parametrize("name", ["int4", "int4midrise", "block(int4midrise,16,fp16,1)", "mxint8"])
@pytest.mark.parametrize(
    "estimator", [estimators.clipped, estimators.pact, estimators.lsq, estimators.trust]
)
def test_a_group_of_zeros_learns(name, estimator):
    """The gradient goes through whole, as float's does."""
    x, gone = with_zeros(X)
    weights = jnp.array(RNG.normal(size=x.shape), jnp.float32)
    pulled = jax.grad(
        lambda x: jnp.sum(jq.fake_quant(x, quantizer(name, estimator=estimator)) * weights)
    )(jnp.array(x))
    np.testing.assert_allclose(np.asarray(pulled)[gone], np.asarray(weights)[gone], rtol=1e-6)


# ---- products and layers

DIMS = (((1,), (0,)), ((), ()))


def recipe(name: str) -> jq.DotGeneral:
    """A recipe, or a format that both operands of the product have."""
    if name.startswith(("block", "codebook", "int1", "int4m")):
        one = quantizer(name) if "(" in name else jq.Quantizer(jq.parse(name), "channel")
        return jq.DotGeneral(jq.Operands(one, one))
    return jq.recipe(name)


def products(dot, x, kernel, g):
    """y, ∂x and ∂kernel, ours beside float's."""

    def of(dot):
        y, pull = jax.vjp(lambda x, k: dot(x, k, DIMS), x, kernel)
        return y, *pull(g)

    return jax.jit(lambda: (of(dot), of(jax.lax.dot_general)))()


RECIPES = [
    *("quest4", "w4a16-quest", "int8_train", "int1midrise", "block(int4midrise,16,e8m0fnu,1)"),
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in (
            *("fp8_train", "mxfp8", "mxfp6", "mxfp4", "mxfp8_train", "nvfp4", "nf4", "w8a8"),
            *("w4a4", "w8a8-token", "w4a16", "w4a16g32", "w4a8g32", "w16a8", "w2a2-quest"),
            *("codebook(-1.0,1.0)", "block(int4midrise,16,e4m3fn,2)", "int4midrise"),
        )
    ),
]


@pytest.mark.first(4)
@pytest.mark.parametrize("name", RECIPES)
def test_a_products_zeros_are_floats(name):
    """Zero weights, a dead column, zero activations, a zero gradient; at a size where kernels start."""
    x, kernel, g = (jnp.array(RNG.normal(size=(64, 64)), jnp.float32) for _ in range(3))
    # Products of rotated zeros are zero to a rounding of the others; alone they are exact.
    dead = kernel.at[:, 3].set(0)
    for case in ((x, 0 * kernel, g), (x, dead, g), (0 * x, kernel, g), (x, kernel, 0 * g)):
        ours, theirs = products(recipe(name), *case)
        for found, expected in zip(ours, theirs, strict=True):
            zero = np.asarray(expected) == 0
            assert np.abs(np.asarray(found)[zero]).max(initial=0) <= LEAST
            assert np.isfinite(found).all()
    if name in ("quest4", "int8_train"):  # it learns
        zeros, floats = products(recipe(name), x, 0 * kernel, g)
        assert jnp.linalg.norm(zeros[2] - floats[2]) < 0.3 * jnp.linalg.norm(floats[2])


@pytest.mark.first(4)
@pytest.mark.parametrize("name", RECIPES[:5])
def test_a_layer_of_zeros_gives_zeros_and_so_does_it_frozen(name):
    rules = [(".*", recipe(name))]
    for shape in ((64, 4), (64, 64)):
        layer = nnx.Linear(*shape, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
        model = jq.nnx.quantize(layer, rules)
        frozen = jq.nnx.freeze(model)
        for x in (jnp.ones((2, 64)), jnp.array(X)):
            found = model(x)
            assert jnp.abs(found).max() <= LEAST
            np.testing.assert_array_equal(frozen(x), found)
        assert isinstance(read(frozen.kernel), jq.QArray)


@pytest.mark.parametrize("product", ["conv", "ragged"])
def test_other_products_of_zeros_are_zeros(product):
    one = jq.Quantizer(jq.Int(4, "midrise"), "channel")
    native = jq.Operands(one, one, "native")
    x = jnp.array(X)

    def apply(x, w):
        if product == "conv":
            conv = ConvGeneralDilated(native)
            return conv(x[:, None, :], w[:1].reshape(64, 1, 1), (1,), "VALID")
        return RaggedDot(native)(x, w[None], jnp.array([8]))

    dead = jnp.array(RNG.normal(size=(64, 64)), jnp.float32).at[:, 5].set(0)
    (y, pull) = jax.vjp(apply, x, dead)
    assert jnp.abs(y[:, 5]).max() <= LEAST
    assert jnp.abs(y).max() > 0.1
    (y, pull) = jax.vjp(apply, x, 0 * dead)
    assert jnp.abs(y).max() <= LEAST
    assert jnp.abs(pull(jnp.ones_like(y))[0]).max() <= LEAST


def test_what_is_dead_does_not_coarsen_the_others_gradient():
    """int8_train carries a kernel's scales over to the gradient: that of a dead column must not stand out."""
    x, kernel, g = (jnp.array(RNG.normal(size=(64, 64)), jnp.float32) for _ in range(3))
    kernel = 0.05 * kernel
    relative = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))  # noqa: E731
    for dead_x, dead_kernel in ((x, kernel.at[:, 3].set(0)), (x.at[5].set(0), kernel)):
        ours, theirs = products(jq.recipe("int8_train"), dead_x, dead_kernel, g)
        assert [relative(a, b) < 0.03 for a, b in zip(ours, theirs, strict=True)] == [True] * 3


def test_gptq_leaves_a_dead_column_dead():
    weight = jnp.array(RNG.normal(size=(64, 8)), jnp.float32).at[:, 3].set(0)
    inputs = RNG.normal(size=(256, 64)).astype(np.float32)
    hessian = jnp.array(inputs.T @ inputs / 256)
    for name in ("int4midrise", "block(int4midrise,16,e8m0fnu,1)"):
        found = jq.dequantize(gptq(weight, hessian, quantizer(name)))
        assert jnp.abs(found[:, 3]).max() <= LEAST
        assert jnp.abs(found - weight).max() < 0.6


def test_a_range_of_nothing_in_blocks_clips_to_nothing():
    given = calibration.Range(jnp.float32(0))
    for name in ("nvfp4", "mxfp4", "block(int4,16,fp16,1)"):
        found = seen(X, dataclasses.replace(quantizer(name), calibration=given))
        assert np.abs(found).max() <= LEAST

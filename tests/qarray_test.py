import itertools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp

import jaxquant as jq
from jaxquant import rounding
from jaxquant.numerics.groups import scale_shape

FORMATS = [jq.Int(2), jq.Int(3), jq.INT4, jq.INT8, jq.Int(12), jq.E4M3, jq.E5M2, jq.BF16, jq.FP16]
SIMULATED_ONLY = [jq.E2M1, jq.Float(3, 2, "finite")]
GRANULARITIES = ["tensor", "channel", 4]
X = jnp.array(np.random.default_rng(0).normal(size=(6, 16)), jnp.float32)

finite = st.floats(-(2.0**100), 2.0**100, width=32)
# A few shapes, so that what varies is the values and compiled operations are met again.
SHAPES = [(1,), (9,), (0, 4), (3, 1), (5, 8), (2, 3, 4)]
arrays = st.sampled_from(SHAPES).flatmap(lambda s: hnp.arrays(np.float32, s, elements=finite))


@pytest.mark.first(1)
@pytest.mark.exhaustive
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("round_", [rounding.nearest, rounding.stochastic])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fake_quant_equals_storage_exactly(fmt, granularity, round_, dtype):
    quantizer, key = jq.Quantizer(fmt, granularity, rounding=round_), jax.random.key(3)
    x = X.astype(dtype)

    def stored(x):
        return jq.dequantize(jq.quantize(x, quantizer, key=key))

    def simulated(x):
        return jq.fake_quant(x, quantizer, key=key)

    assert simulated(x).dtype == dtype
    chex.assert_trees_all_equal(simulated(x), stored(x))
    chex.assert_trees_all_equal(jax.jit(simulated)(x), jax.jit(stored)(x))
    chex.assert_trees_all_equal(jax.jit(simulated)(x), simulated(x))


@pytest.mark.exhaustive
@hypothesis.given(arrays, st.integers(2, 8), st.sampled_from(["tensor", "channel"]))
@hypothesis.settings(max_examples=100, deadline=None)
def test_error_is_at_most_half_a_step_and_never_nan(x, bits, granularity):
    x, quantizer = jnp.array(x), jq.Quantizer(jq.Int(bits), granularity)
    q = jq.quantize(x, quantizer)
    error = np.abs(np.asarray(jq.dequantize(q) - x, np.float64))
    step = np.broadcast_to(np.asarray(q.scale, np.float64), x.shape)
    # A group of subnormal numbers has no step and rounds to zero.
    assert (error <= 0.5 * step * (1 + 1e-5) + np.finfo(np.float32).tiny).all()


@hypothesis.given(arrays, st.integers(2, 8), st.sampled_from(["tensor", "channel"]))
@hypothesis.settings(max_examples=100, deadline=None)
def test_sign_symmetry_and_scale_equivariance(x, bits, granularity):
    x = jnp.where(jnp.abs(x) < 1e-25, 0, jnp.array(x))
    quantizer = jq.Quantizer(jq.Int(bits), granularity)
    q = jq.quantize(x, quantizer)
    np.testing.assert_array_equal(jq.quantize(-x, quantizer).qvalue, -q.qvalue)
    np.testing.assert_array_equal(jq.quantize(x * 4, quantizer).qvalue, q.qvalue)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("fmt", [f for f in FORMATS if isinstance(f, jq.Int)], ids=str)
def test_codes_are_idempotent(fmt, granularity):
    quantizer = jq.Quantizer(fmt, granularity)
    once = jq.quantize(X, quantizer)
    twice = jq.quantize(jq.dequantize(once), quantizer)
    np.testing.assert_array_equal(once.qvalue, twice.qvalue)
    np.testing.assert_allclose(once.scale, twice.scale, rtol=2e-7)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_more_bits_and_finer_scales_lose_less(granularity):
    def error(bits, granularity):
        return float(jnp.mean((jq.fake_quant(X, jq.Quantizer(jq.Int(bits), granularity)) - X) ** 2))

    by_bits = [error(b, granularity) for b in range(2, 13)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert error(4, "tensor") > error(4, "channel") > error(4, 4)


def test_granularity_shares_scales_as_said():
    x = jnp.arange(1.0, 25.0).reshape(2, 3, 4)
    assert jq.quantize(x, jq.Quantizer(jq.INT8)).scale.shape == (1, 1, 1)
    assert jq.quantize(x, jq.Quantizer(jq.INT8, "channel"), axis=1).scale.shape == (2, 1, 4)
    assert jq.quantize(x, jq.Quantizer(jq.INT8, "channel"), axis=(0, -1)).scale.shape == (1, 3, 1)
    q = jq.quantize(x, jq.Quantizer(jq.INT8, 2))
    assert q.scale.shape == (2, 3, 2)
    expected = np.asarray(x).reshape(2, 3, 2, 2).max(-1) / np.float32(127)
    np.testing.assert_array_equal(q.scale, expected)


def test_a_scalar_has_one_scale():
    assert float(jq.fake_quant(jnp.float32(0.3), jq.Quantizer(jq.INT8))) == pytest.approx(0.3)
    assert jq.Quantizer(jq.INT8, np.int64(4)).granularity == 4


def test_blocks_are_channels_of_a_reshaped_array():
    blocks = jq.fake_quant(X, jq.Quantizer(jq.INT4, 4))
    rows = jq.fake_quant(X.reshape(-1, 4), jq.Quantizer(jq.INT4, "channel"))
    np.testing.assert_array_equal(blocks, rows.reshape(X.shape))


@pytest.mark.parametrize("fmt", FORMATS + SIMULATED_ONLY, ids=str)
def test_gradient_is_straight_through(fmt):
    g = jax.grad(lambda x: jnp.sum(jnp.sin(1.0 * jq.fake_quant(x, jq.Quantizer(fmt, "channel")))))(
        X
    )
    np.testing.assert_allclose(
        g, jnp.cos(jq.fake_quant(X, jq.Quantizer(fmt, "channel"))), rtol=1e-6
    )


def test_bits_are_data():
    trace = chex.assert_max_traces(n=1)(lambda x, q: jq.fake_quant(x, q))
    jitted = jax.jit(trace)
    for bits in range(2, 10):
        found = jitted(X, jq.Quantizer(jq.Int(jnp.float32(bits)), "channel"))
        np.testing.assert_array_equal(
            found, jq.fake_quant(X, jq.Quantizer(jq.Int(bits), "channel"))
        )


def test_bytes_are_those_of_the_buffers():
    q = jq.quantize(jnp.ones((32, 64)), jq.Quantizer(jq.INT8, "channel"))
    assert q.nbytes == 32 * 64 + 32 * 4 == q.qvalue.nbytes + q.scale.nbytes
    assert q.bits_per_element == 8 + 32 / 64


def test_qarrays_pass_through_transformations():
    quantizer = jq.Quantizer(jq.INT8, "channel")
    q = jax.jit(lambda x: jq.quantize(x, quantizer))(X)
    assert (q.shape, q.dtype) == ((6, 16), np.float32)
    rows = jax.vmap(lambda x: jq.quantize(x, quantizer))(X)
    np.testing.assert_array_equal(rows.qvalue, q.qvalue)


def test_zeros_subnormals_and_empty_arrays():
    for x in (jnp.zeros((2, 4)), jnp.full((2, 4), 1e-42), jnp.zeros((0, 4)), jnp.zeros((3, 0))):
        for granularity in ("tensor", "channel"):
            found = jq.fake_quant(x, jq.Quantizer(jq.INT4, granularity))
            np.testing.assert_array_equal(found, jnp.zeros(x.shape))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("fmt", [jq.INT8, jq.E4M3, jq.BF16], ids=str)
def test_nan_and_inf_are_loud_within_their_group_and_silent_outside(fmt, bad):
    x = jnp.ones((2, 4)).at[0, 1].set(bad)
    quantizer = jq.Quantizer(fmt, "channel")
    for found in (jq.fake_quant(x, quantizer), jq.dequantize(jq.quantize(x, quantizer))):
        assert jnp.isnan(found[0]).all()
        np.testing.assert_allclose(found[1], 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jq.Quantizer(jq.INT8, "row"), "granularity"),
        (lambda: jq.Quantizer(jq.INT8, 0), "granularity"),
        (lambda: jq.Quantizer(jq.INT8, True), "granularity"),
        (lambda: jq.Quantizer("int8"), "format"),
        (lambda: jq.Quantizer(None), "format"),
        (lambda: jq.Quantizer(jq.Int), "format"),
        (lambda: jq.quantize([1.0], jq.Quantizer(jq.INT8)), "floating-point arrays"),
        (lambda: jq.quantize(X, jq.Quantizer(jq.INT8, "channel"), axis=1.0), "axis is an integer"),
        (lambda: jq.dequantize(X), "QArray"),
        (lambda: jq.Quantizer(jq.INT8, calibration="absmax"), "calibration"),
        (lambda: jq.Quantizer(jq.INT8, rounding="nearest"), "rounding"),
        (lambda: jq.quantize(X, jq.Quantizer(jq.INT8, 5)), "does not divide"),
        (
            lambda: jq.quantize(X, jq.Quantizer(jq.INT8, (2, 4)), axis=(0, 1)),
            "not summed over",
        ),
        (lambda: jq.quantize(X, jq.Quantizer(jq.INT8), axis=2), "axis 2"),
        (lambda: jq.quantize(X, jq.INT8), "Quantizer"),
        (lambda: jq.fake_quant(jnp.arange(4), jq.Quantizer(jq.INT8)), "floating"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_scale_dimensions_divide_the_arrays():
    for shape, granularity in itertools.product(
        [(4, 8), (8,), (2, 3, 8)], ["tensor", "channel", 4]
    ):
        found = scale_shape(shape, granularity, -1)
        assert len(found) == len(shape)
        assert all(n % g == 0 for n, g in zip(shape, found, strict=True))

"""The same codes and scales as Qwix, bit for bit, and where the two differ, by exactly which convention."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwix._src.core import qarray as qwix  # the public quantize takes no blocks

import jaxquant as jq
from jaxquant.numerics.calibration import Step

pytestmark = pytest.mark.exhaustive


SHAPES = [(4, 64), (2, 3, 32)]


def arrays(count: int = 50):
    """100 normal and heavy-tailed arrays, those of one shape stacked, with scales over forty binades."""
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        x = np.stack(
            [
                rng.normal(size=shape) if i % 3 else rng.standard_t(2, size=shape)
                for i in range(count)
            ]
        )
        spread = rng.uniform(-8, 8, (count, *shape[:-1], 1))
        spread += rng.uniform(-12, 12, (count, *[1] * len(shape)))
        yield jnp.array(x * np.exp2(spread), jnp.float32)


def theirs(x, qtype, size=None):
    last = x.ndim - 1
    tiles = {} if size is None else {last: size}
    with their_promotion():
        return qwix.quantize_api(x, qtype, channelwise_axes=range(last), tiled_axes=tiles)


@contextlib.contextmanager
def their_promotion():
    """Qwix relies on promotion, which our tests forbid."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def equal(found, expected) -> bool:
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    return found.shape == expected.shape and bool((found == expected).all())


@pytest.mark.long
@pytest.mark.parametrize(
    ("fmt", "qtype", "size"),
    [
        (jq.NF4, "nf4", None),
        (jq.NF4, "nf4", 32),
        (jq.E4M3, jnp.float8_e4m3fn, None),
        (jq.E5M2, jnp.float8_e5m2, 32),
        (jq.MXFP8, "mxfp8", 32),
        (jq.MXFP4, "mxfp4", 32),
    ],
    ids=str,
)
def test_codes_and_scales_are_qwixs(fmt, qtype, size):
    granularity = None if isinstance(fmt, jq.Block) else size or "channel"
    for x in arrays():
        ours, other = jq.quantize(x, jq.Quantizer(fmt, granularity)), theirs(x, qtype, size)
        if isinstance(fmt, jq.Float):
            # Our quotient is correctly rounded; XLA makes theirs a product with a reciprocal.
            np.testing.assert_array_max_ulp(ours.scale, np.asarray(other.scale), 1)
            step = jq.calibration.Step(other.scale)
            ours = jq.quantize(x, jq.Quantizer(fmt, granularity, calibration=step))
        assert equal(ours.float_scale(), other.scale)
        if fmt == jq.NF4:
            np.testing.assert_array_equal(ours.qvalue, np.asarray(other.qvalue, np.uint8))
        assert equal(
            ours.element.load(ours.qvalue), qwix.numerics.convert_from(other.qvalue, qtype)
        )
        with their_promotion():
            expected = qwix.dequantize(other)
        assert equal(jq.dequantize(ours), expected)


@pytest.mark.long
def test_qwixs_nvfp4_is_ours_with_one_level():
    """Qwix has no scale above the blocks', so that its E4M3 scales must hold the values' own range."""
    ours_format = jq.Block(jq.E2M1, 16, jq.E4M3, levels=1)
    for x in arrays():
        x = x / jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        ours, other = jq.quantize(x, jq.Quantizer(ours_format)), theirs(x, "nvfp4", 16)
        alive = np.asarray(other.scale) > 0  # where a block is too small Qwix divides by zero
        found, expected = np.asarray(ours.float_scale()), np.asarray(other.scale)
        np.testing.assert_array_equal(found[alive], expected[alive])
        codes = np.asarray(ours.element.load(ours.qvalue)).reshape(*found.shape, 16)
        other_codes = np.asarray(other.qvalue, np.float32).reshape(*found.shape, 16)
        np.testing.assert_array_equal(codes[alive], other_codes[alive])
        assert alive.mean() > 0.5


@pytest.mark.parametrize(("bits", "qtype"), [(8, jnp.int8), (4, jnp.int4)])
def test_integers_on_qwixs_scale_have_qwixs_codes(bits, qtype):
    """Qwix's symmetric integers reach the most negative code, so ours are the "full" ones."""
    fmt = jq.Int(bits, "full")
    for x in arrays():
        other = theirs(x, qtype)
        expected = np.asarray(other.qvalue, np.int8)
        # The grid alone, on the very ratios.
        with their_promotion():
            ratio = qwix.call_with_generic_broadcast(jnp.divide, x, other.scale)
        codes = fmt.store(fmt.round(ratio, jnp.round))
        np.testing.assert_array_equal(np.asarray(codes, np.int8), expected)
        # The whole of quantize.  The largest magnitude lies on a tie by Qwix's own making, so that it
        # hangs on the last bit of the scale, of which Step promises nothing.
        ours = jq.quantize(x, jq.Quantizer(fmt, "channel", calibration=Step(other.scale)))
        np.testing.assert_allclose(ours.scale, other.scale, rtol=3e-7)
        magnitude = np.abs(np.asarray(x))
        tied = magnitude == magnitude.max(-1, keepdims=True)
        found = np.asarray(ours.qvalue, np.int8)
        near = np.abs(np.asarray(ratio) % 1 - 0.5) < 2.0**-21 * np.abs(ratio)
        assert near[~tied].mean() < 1e-3
        np.testing.assert_array_equal(found[~near], expected[~near])
        np.testing.assert_array_less(np.abs(found.astype(int) - expected)[near], 2)


@pytest.mark.first(1)
@pytest.mark.parametrize(("bits", "qtype"), [(8, jnp.int8), (4, jnp.int4)])
def test_integers_on_a_scale_that_is_a_power_of_two_are_the_same_to_the_last_bit(bits, qtype):
    """With absmax = (2^(b−1) − 1/2) · 2^k nothing is rounded but the codes, and Qwix's whole is ours."""
    fmt, reach = jq.Int(bits, "full"), 2 ** (bits - 1) - 0.5
    rng = np.random.default_rng(1)
    for shape in SHAPES:
        x = rng.uniform(-reach, reach, (25, *shape))
        x[..., 0] = reach * rng.choice([-1, 1], x.shape[:-1])
        scale = np.exp2(rng.integers(-20, 20, (*x.shape[:-1], 1)))
        x = jnp.array(x * scale, jnp.float32)
        other = theirs(x, qtype)
        np.testing.assert_array_equal(other.scale, scale)
        ours = jq.quantize(x, jq.Quantizer(fmt, "channel", calibration=Step(other.scale)))
        np.testing.assert_array_equal(ours.scale, scale)
        np.testing.assert_array_equal(
            np.asarray(ours.qvalue, np.int8), np.asarray(other.qvalue, np.int8)
        )
        assert np.asarray(ours.qvalue, np.int8).min() == fmt.min_value
        with their_promotion():
            expected = qwix.dequantize(other)
        assert equal(jq.dequantize(ours), expected)


@pytest.mark.parametrize(("bits", "qtype"), [(8, jnp.int8), (4, jnp.int4)])
def test_integer_scales_differ_by_half_a_level(bits, qtype):
    """Qwix maps absmax onto 2^(b−1) − 1/2, where the largest code's cell ends; we onto the code itself."""
    top = 2 ** (bits - 1) - 1
    for x in arrays():
        largest = np.abs(np.asarray(x, np.float64)).max(-1, keepdims=True)
        ours, other = jq.quantize(x, jq.Quantizer(jq.Int(bits), "channel")), theirs(x, qtype)
        np.testing.assert_allclose(ours.scale, largest / top, rtol=2.0**-23)
        np.testing.assert_allclose(other.scale, largest / (top + 0.5), rtol=2.0**-22)
        # Which is why only theirs reaches the code −2^(b−1): −absmax lies on the tie to it.
        assert np.asarray(ours.qvalue, np.int8).min() == -top
        assert np.asarray(other.qvalue, np.int8).min() == -top - 1

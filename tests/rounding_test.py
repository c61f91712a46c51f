import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import formats, rounding
from jaxquant.numerics.calibration import Range

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others

RANDOM = [rounding.stochastic, rounding.dithered]
FORMATS = [
    *(jq.Int(bits) for bits in (2, 3, 4, 8, 16)),
    *(jq.Int(bits, "full") for bits in (2, 4, 8)),
    *(jq.Int(bits, "unsigned") for bits in (1, 4, 8)),
    *(jq.Int(bits, "midrise") for bits in (1, 2, 4, 8)),
    *(jq.E4M3, jq.Float(4, 3), formats.E4M3FNUZ, jq.E5M2, formats.E5M2FNUZ, jq.Float(3, 4)),
    *(jq.E2M1, jq.E2M3, jq.E3M2, jq.FP16, jq.BF16),
    *(jq.NF4, jq.DYNAMIC8, formats.UDYNAMIC8),
    *(jq.MXFP8, jq.MXFP6, jq.MXFP4, jq.MXINT8, jq.NVFP4),
]


def test_nearest_rounds_ties_to_even():
    x = jnp.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    np.testing.assert_array_equal(rounding.nearest(x), [-2, -2, 0, 0, 2, 2])


@pytest.mark.parametrize("round_", RANDOM)
@pytest.mark.parametrize("value", [0.1, -0.3, 2.5, -7.9])
def test_random_rounding_is_unbiased(value, round_):
    n = 1_000_000
    draws = round_(jnp.full(n, value), jax.random.key(1))
    assert set(np.unique(draws)) == {np.floor(value), np.ceil(value)}
    share = value - np.floor(value)
    sigma = np.sqrt(share * (1 - share) / n)
    assert abs(float(np.mean(np.asarray(draws, np.float64))) - value) < 5 * sigma


@pytest.mark.parametrize("round_", RANDOM)
def test_random_rounding_is_unbiased_over_keys_at_every_place(round_):
    n, x = 250_000, jnp.array([0.1, -0.3, 2.5, 7.9])
    keys = jax.random.split(jax.random.key(2), n)
    draws = np.asarray(jax.jit(jax.vmap(lambda k: round_(x, k)))(keys), np.float64)
    share = np.asarray(x - jnp.floor(x), np.float64)
    sigma = np.sqrt(share * (1 - share) / n)
    assert (np.abs(draws.mean(0) - x) < 5 * sigma).all()


def grid_of(fmt) -> np.ndarray:
    """The sorted values of a format, or of a Block's elements."""
    element = fmt.element if isinstance(fmt, jq.Block) else fmt
    codes = jnp.arange(2**16).astype(formats.code_dtype(element.bits))[: 2**element.bits]
    grid = np.unique(np.asarray(element.decode(codes), np.float64))
    low, high = float(element.min_value), float(element.max_value)
    return grid[np.isfinite(grid) & (grid >= low) & (grid <= high)]


@pytest.mark.first(22)
@pytest.mark.exhaustive
@pytest.mark.parametrize("round_", RANDOM)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_random_rounding_is_unbiased_between_any_two_neighbours(fmt, round_):
    """Through fake_quant on a scale of 1: 10^6 draws for eight cells anywhere on the grid."""
    cells, n = 8, 2**17
    rng, grid = np.random.default_rng(0), grid_of(fmt)
    below = rng.integers(0, len(grid) - 1, cells)
    below[:2] = 0, len(grid) - 2  # the outermost cells too
    a, b = grid[below], grid[below + 1]
    if fmt == jq.BF16:  # cells whose ends and steps this hardware holds
        keep = np.minimum(np.abs(a), np.abs(b)) > 2.0**-100
        a, b = np.where(keep, a, 1.0), np.where(keep, b, 1.0078125)
    values = (a + (b - a) * rng.uniform(0.05, 0.95, cells)).astype(np.float32)
    top = fmt.element.max_value if isinstance(fmt, jq.Block) else fmt.max_value
    quantizer = jq.Quantizer(fmt, calibration=Range(jnp.float32(top)), rounding=round_)
    x = jnp.array(np.repeat(values, n))
    draws = np.asarray(jq.fake_quant(x, quantizer, key=jax.random.key(3)), np.float64)
    draws = draws.reshape(cells, n)
    # A scale of two factors is 1 up to their rounding.
    slack = 2.0**-22 * np.maximum(np.abs(a), np.abs(b))
    np.testing.assert_array_less(np.abs(draws.min(1) - a), slack + 1e-45)
    np.testing.assert_array_less(np.abs(draws.max(1) - b), slack + 1e-45)
    share = (values.astype(np.float64) - a) / (b - a)
    sigma = np.sqrt(share * (1 - share) / n) * (b - a)
    assert (np.abs(draws.mean(1) - values) < 5 * sigma + slack).all()


@pytest.mark.parametrize("round_", RANDOM)
def test_random_rounding_fixes_integers_and_repeats_with_its_key(round_):
    integers = jnp.array([-3.0, 0.0, 5.0, 2.0**23, -(2.0**23)])
    np.testing.assert_array_equal(round_(integers, jax.random.key(0)), integers)
    x = jnp.linspace(-3, 3, 1000)
    one, two = (round_(x, jax.random.key(s)) for s in (0, 1))
    np.testing.assert_array_equal(one, round_(x, jax.random.key(0)))
    assert (one != two).any()


def test_dithered_sums_err_less_than_stochastic_ones():
    x = jnp.full((64, 1024), 0.37)

    def spread(round_):
        return float(jnp.std(jnp.sum(round_(x, jax.random.key(0)) - x, axis=1)))

    assert spread(rounding.dithered) < 0.2 * spread(rounding.stochastic)


def test_draws_at_different_places_are_uncorrelated():
    draws = rounding.stochastic(jnp.full((256, 4096), 0.5), jax.random.key(5)) - 0.5
    for shift in ((0, 1), (1, 0), (1, 1), (0, 16)):
        correlation = jnp.mean(draws * jnp.roll(draws, shift, (0, 1))) / 0.25
        assert abs(float(correlation)) < 5 / np.sqrt(draws.size)


_SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import jaxquant as jq
from jaxquant import rounding

assert jax.device_count() == 8
x = jnp.array(np.random.default_rng(0).normal(size=(64, 256)), jnp.float32)
key = jax.random.key(7)
quantizers = [
    jq.Quantizer(fmt, granularity, rounding=round_)
    for round_ in (rounding.stochastic, rounding.dithered)
    for fmt, granularity in (
        (jq.INT8, "channel"), (jq.E2M1, "tensor"), (jq.NF4, 32), (jq.MXFP4, None), (jq.NVFP4, None)
    )
]


@jax.jit
def call(x, key):
    by_content = [jq.fake_quant(x, quantizers[0], key=rounding.key_of(x))]
    return by_content + [jq.fake_quant(x, q, key=key) for q in quantizers]


expected, compared = call(x, key), 0
for devices in (1, 2, 8):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("d",))
    for spec in (P("d", None), P(None, "d")):
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        assert len(sharded.sharding.device_set) == devices
        for found, wanted in zip(call(sharded, key), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
            compared += 1
print("compared", compared)
"""


@pytest.mark.long
def test_random_rounding_is_the_same_on_one_two_and_eight_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _SHARDED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # A scale that XLA computes otherwise in a sharded program would show here too.
    assert done.stdout.split() == ["compared", str(3 * 2 * 11)]


@pytest.mark.parametrize("round_", RANDOM)
def test_random_rounding_without_a_key_is_an_error(round_):
    with pytest.raises(ValueError, match="key"):
        round_(jnp.ones(3))
    with pytest.raises(ValueError, match="key"):
        jq.quantize(jnp.ones(3), jq.Quantizer(jq.INT8, rounding=round_))


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


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("round_", RANDOM)
def test_random_rounding_of_short_floats_is_unbiased_too(round_, dtype):
    draws = round_(jnp.full(100_000, 0.25, dtype), jax.random.key(0))
    assert draws.dtype == dtype
    assert abs(np.asarray(draws, np.float32).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 100_000)


def test_keys_of_powers_of_two_are_as_many_as_the_arrays():
    """The scales of MX blocks have few bits each; their keys must not collide for that."""
    rng = np.random.default_rng(0)
    arrays = (2.0 ** rng.integers(-12, -6, (300, 64))).astype(np.float32)
    keys = {tuple(np.asarray(rounding.key_of(jnp.array(a)))) for a in arrays}
    assert len(keys) == 300
    one = jnp.array(arrays[0])
    assert (rounding.key_of(one) != rounding.key_of(one[::-1])).any()
    assert (rounding.key_of(one) != rounding.key_of(one, seed=1)).any()


@pytest.mark.parametrize("key", [0, np.arange(2.0), jnp.arange(2.0)])
def test_what_is_no_key_is_named(key):
    with pytest.raises(ValueError, match="one PRNG key"):
        rounding.stochastic(jnp.ones(3), key)


def test_several_keys_at_once_are_refused():
    with pytest.raises(ValueError, match="one PRNG key"):
        rounding.stochastic(jnp.ones(3), jax.random.split(jax.random.key(0), 3))

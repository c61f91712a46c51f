"""What goes wrong when optimizer state is coded: each pitfall beside a codec that falls into it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxquant.optim import Codec, Companded, Logarithmic, fixed, quantize_state
from jaxquant.optim.codecs import BLOCK
from jaxquant.optim.state import unquantized

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.long,
]  # looks at our arithmetic, not at versions of others

WIDTHS = range(2, 9)
LAST = 1 - 2.0**-24  # the largest draw
# Powers of two by which magnitudes may be multiplied, far from where float32 underflows.
POWERS = (-90, -60, -30, 30, 60)


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


# ---------------------------------------------------------------------------------------------------
# Codecs that fall


@dataclasses.dataclass(frozen=True)
class Linear(Codec):
    """Even steps below the block's largest value, with a level at zero or without, to nearest."""

    zero: bool = True
    scales: Any = jnp.float32
    truncates: bool = False
    signed: bool = False
    least_bits: int = 2

    @property
    def scale(self):
        return jax.ShapeDtypeStruct((1,), self.scales)

    def measures(self, x):
        return (jax.lax.bitcast_convert_type(x, jnp.int32),)

    def scaled(self, largest, bits):
        return jax.lax.bitcast_convert_type(largest[0], jnp.float32).astype(self.scales)

    def codes(self, x, scale, bits, draws):
        s = scale.astype(jnp.float32)
        top = jnp.exp2(bits.astype(jnp.float32))[..., None] - self.zero
        place = jnp.where(s > 0, x / jnp.where(s > 0, s, 1), 0) * top - (not self.zero)
        k = jnp.floor(place) if self.truncates else jnp.round(place)
        return jnp.clip(k, 0, top).astype(jnp.uint8)

    def decode(self, codes, scale, bits):
        top = jnp.exp2(bits.astype(jnp.float32))[..., None] - self.zero
        return scale.astype(jnp.float32) * (codes.astype(jnp.float32) + (not self.zero)) / top


@dataclasses.dataclass(frozen=True)
class TwosComplement:
    """Even steps of either sign with one level more below zero than above, or towards zero."""

    truncates: bool = False
    signed: bool = True

    def encode(self, x, bits, draws):
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        top = jnp.exp2(bits.astype(jnp.float32) - 1)
        k = x / scale * top
        k = jnp.trunc(k) if self.truncates else jnp.round(k)
        return jnp.clip(k, -top, top - 1), scale

    def decode(self, codes, scale, bits):
        return codes * scale / jnp.exp2(bits.astype(jnp.float32) - 1)


class BFloat16:
    """Sixteen bits, to nearest."""

    def encode(self, x, bits, draws):
        return x.astype(jnp.bfloat16), None

    def decode(self, codes, scale, bits):
        return codes.astype(jnp.float32)


class Outward(Linear):
    """Even steps below the bfloat16 above the block's largest value."""

    def encode(self, x, bits, draws):
        largest = jnp.max(x, axis=-1, keepdims=True)
        scale = (largest * (1 + 2**-7)).astype(jnp.bfloat16)
        return jnp.round(x / scale.astype(jnp.float32) * 15), scale


class Coarse:
    """Powers of four, unbiased."""

    def encode(self, x, bits, draws):
        k = jnp.floor(jnp.log2(jnp.maximum(x, 1e-30)) / 2)
        return k + (draws * 3 < x / 4**k - 1), None

    def decode(self, codes, scale, bits):
        return 4**codes


@dataclasses.dataclass(frozen=True)
class Exponents(Logarithmic):
    """Its first scale, zero, is an exponent like any other."""

    def decode(self, codes, scale, bits):
        return jnp.exp2(scale[..., :1].astype(jnp.float32)) * jnp.ones(codes.shape)


# ---------------------------------------------------------------------------------------------------
# What is asked of a codec


@functools.partial(jax.jit, static_argnums=0)
def passed(codec, x, bits, draws=0.5):
    """What is left of x."""
    codes, scale = codec.encode(x, bits, jnp.broadcast_to(jnp.float32(draws), x.shape))
    return codec.decode(codes, scale, bits)


def most_down(binades):
    """How far below a value the level below it lies at most, where levels are so many binades apart.

    ℓ(x) − ℓ(y) = s allows x / y up to 2^⌊s⌋ (1 + s − ⌊s⌋), from a power of two on.
    """
    return 2 ** np.floor(binades) * (1 + binades - np.floor(binades))


def decades(count, blocks=8, seed=0):
    """Blocks whose magnitudes are spread evenly over some decades, the largest 1."""
    exponents = np.linspace(-count, 0, BLOCK)
    rng = np.random.default_rng(seed)
    return jnp.array(10 ** np.stack([rng.permutation(exponents) for _ in range(blocks)]))


@functools.partial(jax.jit, static_argnums=(0, 3))
def averaged(codec, bits, squares, decay):
    """(coded, exact) averages after a number of steps of squares, coded after each step."""

    def step(carry, xs):
        coded, exact = carry
        square, key = xs
        coded, exact = (decay * v + (1 - decay) * square for v in (coded, exact))
        draws = jax.random.uniform(key, square.shape)
        return (passed(codec, coded, bits, draws), exact), None

    keys = jax.random.split(jax.random.key(1), squares.shape[0])
    start = jnp.zeros(squares.shape[1:])
    return jax.lax.scan(step, (start, start), (squares, keys))[0]


def squares_of(decay, factors, blocks=32):
    """Squared noise of variance one, then of other variances for twice as long as an average remembers."""
    steps = round(2 / (1 - decay))
    noise = jax.random.normal(jax.random.key(0), (2 * steps, blocks, BLOCK))
    is_late = (jnp.arange(2 * steps) >= steps)[:, None, None]
    return jnp.where(is_late, noise**2 * factors, noise**2)


def off(codec, bits, squares, decay, chosen=slice(None)):
    """(relative error of the mean of coded averages, its standard error)."""
    coded, exact = averaged(codec, jnp.int32(bits), squares, decay)
    error = np.asarray(coded - exact)[:, chosen].mean(1) / np.asarray(exact)[:, chosen].mean()
    return abs(error.mean()), error.std() / len(error) ** 0.5


# ---------------------------------------------------------------------------------------------------
# 1, 2: the ends of the range


def inflation(codec, bits, draws):
    """By how much updates grow at most, where second moments span six decades and gradients then cease."""
    v = decades(6)
    return float(jnp.max(jnp.sqrt(v / passed(codec, v, jnp.int32(bits), draws))))


@pytest.mark.parametrize("bits", WIDTHS)
def test_updates_do_not_explode_where_a_second_moment_is_tiny(bits):
    bound = most_down(21 / (2**bits - 1)) ** 0.5  # six decades lie within 21 whole binades
    for draws in (0.0, 0.5, LAST):
        assert inflation(Logarithmic(), bits, draws) <= bound * 1.0001
    assert inflation(Linear(), bits, 0.5) == np.inf


def second_update(codec):
    """The largest update after a step over three decades and one of nearly nothing, by the exact one."""
    gradients = {"w": decades(3, 64)}
    updates = []
    adam = optax.scale_by_adam(0.9, 0.999)
    choice = lambda leaf: Companded() if leaf.is_signed else codec  # noqa: E731
    for tx in (quantize_state(adam, fixed(5, 4), codec=choice), adam):
        update = jax.jit(tx.update)
        _, state = update(gradients, tx.init(gradients))
        updates.append(update({"w": gradients["w"] * 1e-6}, state)[0]["w"])
    return float(jnp.max(jnp.abs(updates[0]) / updates[1]))


def test_a_tiny_gradient_after_large_ones_makes_no_large_update():
    # To nearest, no momentum more than doubles; its scale is within 2^−8.
    bound = 2 * (1 + 2**-8) * most_down(21 / 15) ** 0.5
    assert second_update(Logarithmic()) <= bound
    assert second_update(Linear()) > 100 * bound


def least_step(codec, draws):
    """The smallest update by the right one, where second moments span three decades."""
    v = decades(3)
    return float(jnp.min(jnp.sqrt(v / passed(codec, v, jnp.int32(4), draws))))


def test_small_coordinates_are_not_frozen():
    bound = most_down(11 / 15) ** -0.5  # three decades lie within 11 whole binades
    for draws in (0.0, 0.5, LAST):
        assert least_step(Logarithmic(), draws) >= bound / 1.0001
    # The smallest is 10^−3 and becomes 1/16.
    assert least_step(Linear(zero=False), 0.5) == pytest.approx(16e-3**0.5, rel=1e-3)
    assert bound / 5 > 16e-3**0.5


# ---------------------------------------------------------------------------------------------------
# 3, 4: averages that do not move


@pytest.mark.parametrize("decay", [0.95, 0.999])
@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_averages_follow_a_step_of_the_variance(decay, factor):
    squares = squares_of(decay, factor)
    for bits in (4, 8):
        found, error = off(Logarithmic(), bits, squares, decay)
        assert error < 0.03
        assert found < min(5 * error, 0.1)
    nearest, _ = off(Logarithmic(stochastic=False), 4, squares, decay)
    assert nearest > 0.1
    if decay == 0.999:
        halved, _ = off(BFloat16(), 16, squares, decay)
        assert halved > 0.1


def typical(codec, bits, decay):
    """Of what an update is multiplied by, where averages of squared noise are coded: (median, 99 %)."""
    coded, exact = averaged(codec, jnp.int32(bits), squares_of(decay, 1.0), decay)
    return np.quantile(np.sqrt(exact / coded), [0.5, 0.99])


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_what_an_update_is_divided_by_is_right_most_of_the_time(bits):
    """Averages over levels that are far apart may be right while many of their elements are far too low."""
    median, high = typical(Logarithmic(), bits, 0.999)
    assert abs(median - 1) < 0.15
    assert high < 2.5
    assert typical(Coarse(), bits, 0.999)[1] > 3


def test_averages_follow_steps_that_differ_within_a_block():
    decay, linear = 0.95, Linear(zero=False)
    factors = jnp.where(jnp.arange(BLOCK) % 2 == 0, 0.1, 10.0)
    apart, together = squares_of(decay, factors), squares_of(decay, 0.1)
    for first in (0, 1):
        found, error = off(Logarithmic(), 4, apart, decay, slice(first, None, 2))
        assert error < 0.03
        assert found < min(5 * error, 0.1)
    # In a block that moves together, the scale moves for all.
    assert off(linear, 4, together, decay)[0] < 0.1
    assert off(linear, 4, apart, decay, slice(0, None, 2))[0] > 1


def largest_after_gradients_cease(binades, steps=250):
    """The largest late update where half of the gradients cease, or become a thousandth of what they were."""
    noise = jax.random.normal(jax.random.key(0), (steps, 64, BLOCK))
    factors = jnp.tile(jnp.array([0.0, 1.0, 1e-3, 1.0]), BLOCK // 4)
    is_late = (jnp.arange(steps) >= 50)[:, None, None]
    gradients = jnp.where(is_late, noise * factors, noise)
    choice = lambda leaf: Companded() if leaf.is_signed else Logarithmic(binades)  # noqa: E731
    tx: Any = quantize_state(optax.scale_by_adam(0.9, 0.95), fixed(5), codec=choice)

    def step(state, gradient):
        updates, state = tx.update({"w": gradient}, state)
        return state, jnp.max(jnp.abs(updates["w"][:, ::2]))

    run = jax.jit(lambda state: jax.lax.scan(step, state, gradients)[1])
    return float(run(tx.init({"w": noise[0]}))[-20:].max())


def test_updates_stay_small_where_gradients_cease_beside_others():
    """Momentum to nearest stops at its lowest levels; what it is divided by must not sink far below them.

    The lowest level of 5 bits is 0.023 of the largest momentum, which Adam keeps below the largest √v.  With
    14 binades √v stays above 2^−7 of its largest, so that 0.023 · 2^7 = 3 is what a stuck level can do.
    """
    assert largest_after_gradients_cease(14) < 3
    assert largest_after_gradients_cease(32) > 30


# ---------------------------------------------------------------------------------------------------
# 5: scales


def is_the_same_at_any_magnitude(codec, x):
    """Whether what is left of x is multiplied by exactly what x is multiplied by."""
    width = jnp.int32(4)
    plain, draws = passed(codec, x, width), 0.5
    return all(
        bool((passed(codec, x * 2.0**power, width, draws) == plain * 2.0**power).all())
        for power in POWERS
    )


def test_no_magnitude_is_lost_in_the_scale():
    signed = moments(8)
    positive = signed**2
    assert is_the_same_at_any_magnitude(Companded(), signed)
    assert is_the_same_at_any_magnitude(Logarithmic(), positive)
    assert is_the_same_at_any_magnitude(Linear(), positive)
    assert not is_the_same_at_any_magnitude(Linear(scales=jnp.float16), positive)


def recoded(codec, x, bits, times=20_000):
    """What is left of x once it has been coded again and again."""

    def step(x, key):
        return passed(codec, x, bits, jax.random.uniform(key, x.shape)), None

    keys = jax.random.split(jax.random.key(0), times)
    return jax.jit(lambda x, bits: jax.lax.scan(step, x, keys)[0])(x, jnp.int32(bits))


@pytest.mark.parametrize("bits", [4, 8])
def test_coding_again_and_again_widens_no_range(bits):
    x = decades(2, 2)
    for codec in (Companded(), Logarithmic(), Logarithmic(stochastic=False)):
        found = recoded(codec, x, bits)
        # The largest is a power of two, which either scale holds exactly; the smallest lies above 2^−7.
        assert float(found.max()) <= 1
        assert float(found.min()) >= (0 if codec.signed else 2.0**-7)


def test_a_scale_that_is_rounded_outward_grows_without_end():
    assert not jnp.isfinite(recoded(Outward(), decades(2, 2), 4)).any()


def test_no_level_lies_above_the_largest_power_of_two():
    """Not even where the compiler divides by multiplying with a reciprocal."""
    spans = jnp.arange(1, 33)[:, None]
    scale = jnp.concatenate([jnp.full_like(spans, 90), 90 + spans], 1).astype(jnp.uint8)
    for bits in WIDTHS:
        codes = jnp.full((32, BLOCK), 2**bits - 1, jnp.uint8)
        values = jax.jit(Logarithmic().decode)(codes, scale, jnp.int32(bits))
        tops = np.exp2(spans - 37.0)
        assert (values <= tops).all()
        np.testing.assert_allclose(values, np.broadcast_to(tops, values.shape), rtol=2e-6)


# ---------------------------------------------------------------------------------------------------
# 6: signs


def moments(blocks=512, seed=0):
    return jnp.array(np.random.default_rng(seed).normal(size=(blocks, BLOCK)), jnp.float32)


def is_odd(codec, bits):
    m = moments()
    return bool((passed(codec, -m, jnp.int32(bits)) == -passed(codec, m, jnp.int32(bits))).all())


def flips(codec, bits):
    """How many elements change sign."""
    m = moments()
    return int(jnp.sum(m * passed(codec, m, jnp.int32(bits)) < 0))


def shrink(codec, bits):
    """(⟨Q(m) − m, m⟩ / ‖m‖² on Gaussian blocks, its standard error, ‖Q(m) − m‖² / ‖m‖²)."""
    m = np.asarray(moments(), np.float64)
    draws = jax.random.uniform(jax.random.key(0), m.shape)
    error = np.asarray(passed(codec, jnp.float32(m), jnp.int32(bits), draws), np.float64) - m
    along = (error * m).sum(1) / (m**2).sum(1).mean()
    return along.mean(), along.std() / len(m) ** 0.5, (error**2).sum() / (m**2).sum()


@pytest.mark.parametrize("bits", WIDTHS)
def test_signs_are_treated_alike(bits):
    for codec in (Companded(), Companded(1.0), Companded(stochastic=True)):
        assert is_odd(codec, bits)
        assert flips(codec, bits) == 0
    assert not is_odd(TwosComplement(), bits)


@dataclasses.dataclass(frozen=True)
class WithoutZero(Companded):
    """Levels of either sign, and none at zero."""

    def encode(self, x, bits, draws):
        codes, scale = super().encode(x, bits, draws)
        levels = (jnp.exp2(bits.astype(jnp.float32) - 1) - 1).astype(jnp.uint8)
        return jnp.where(codes == levels, levels + jnp.uint8(1), codes), scale


def test_no_sign_is_flipped_by_a_missing_zero():
    assert flips(WithoutZero(), 4) > 0


@pytest.mark.parametrize("bits", range(3, 9))
def test_nearest_momentum_shrinks_by_less_than_its_squared_error(bits):
    """Of a codebook that is optimal for its input, the shrink is the squared error; here it is less."""
    found, error, square = shrink(Companded(), bits)
    assert -square - 5 * error < found < 5 * error
    found, error, square = shrink(TwosComplement(truncates=True), bits)
    assert found < -square


def test_momentum_of_five_bits_shrinks_by_a_thousandth():
    assert abs(shrink(Companded(), 5)[0]) < 1.5e-3
    assert abs(shrink(TwosComplement(truncates=True), 5)[0]) > 0.02


@pytest.mark.parametrize("bits", WIDTHS)
def test_stochastic_momentum_does_not_shrink(bits):
    found, error, _ = shrink(Companded(stochastic=True), bits)
    assert abs(found) < 5 * error
    found, error, _ = shrink(TwosComplement(truncates=True), bits)
    assert abs(found) > 5 * error


# ---------------------------------------------------------------------------------------------------
# 7: order, counters, beginnings


def gradients_of(count, seed=0):
    return [
        {"w": jax.random.normal(k, (64, 64))} for k in jax.random.split(jax.random.key(seed), count)
    ]


def stored_first(tx, bits=5):
    """`tx` whose moments are coded before the update is taken from them."""

    def update(updates, state, params=None):
        _, after = tx.update(updates, state, params)
        coded = lambda codec, x: passed(codec, x.reshape(-1, BLOCK), jnp.int32(bits))  # noqa: E731
        mu, nu = (
            coded(codec, moment["w"]).reshape(64, 64)
            for codec, moment in ((Companded(), after.mu), (Logarithmic(), after.nu))
        )
        count = after.count.astype(jnp.float32)
        mean, square = mu / (1 - 0.9**count), nu / (1 - 0.999**count)
        return {"w": mean / (jnp.sqrt(square) + 1e-8)}, after

    return optax.GradientTransformation(tx.init, update)


def test_updates_are_taken_from_the_working_moments():
    adam, (first, *_) = optax.scale_by_adam(0.9, 0.999), gradients_of(1)

    def update_of(tx):
        return jax.jit(tx.update)(first, tx.init(first))[0]["w"]

    expected = update_of(adam)
    np.testing.assert_array_equal(update_of(quantize_state(adam, fixed(5, 4))), expected)
    # Signs are the exact answer to a first step; coded moments differ from it by their error.
    assert float(jnp.max(jnp.abs(jnp.abs(expected) - 1))) < 1e-4
    assert float(jnp.max(jnp.abs(update_of(stored_first(adam)) - expected))) > 0.1


def short_counter():
    """A bias correction that counts in eight bits of mantissa."""
    init = lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.bfloat16))  # noqa: E731

    def update(updates, state, params=None):
        return updates, state._replace(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def count_after(tx, steps):
    params = {"w": jnp.ones((2, BLOCK))}
    step = lambda state, _: (tx.update(params, state)[1], None)  # noqa: E731
    return jax.jit(lambda state: jax.lax.scan(step, state, None, length=steps)[0])(tx.init(params))


def test_steps_are_counted_exactly():
    state: Any = count_after(quantize_state(optax.scale_by_adam(), fixed(5, 4)), 300)
    counts = dict(zip([leaf.path for leaf in state.plan.exact], unquantized(state), strict=True))
    assert {path: int(count) for path, count in counts.items()} == {"count": 300}
    assert int(state.step) == 300
    assert float(count_after(short_counter(), 300).count) == 256


def first_moments(codec):
    """The second moments that the first step starts from, as what a step without gradients leaves."""
    params = {"w": jnp.zeros((64, 64))}
    choice = lambda leaf: Companded() if leaf.is_signed else codec  # noqa: E731
    tx = quantize_state(optax.scale_by_adam(0.9, 0.75), fixed(5, 4), codec=choice)
    updates, _ = jax.jit(tx.update)({"w": jnp.full((64, 64), 2.0)}, tx.init(params))
    return updates["w"]


def test_state_begins_at_zero():
    np.testing.assert_allclose(first_moments(Logarithmic()), 1, rtol=1e-6)
    # 3 = 0.75 · 1, then 0.25 · 4: an average that begins at one has a larger root.
    assert float(first_moments(Exponents()).max()) < 0.9


# ---------------------------------------------------------------------------------------------------
# 8: codebooks


def codebook(codec, bits, count, scale):
    """The values of a codec's codes."""
    codes = jnp.arange(count, dtype=jnp.uint8)
    padded = jnp.pad(codes, (0, max(0, BLOCK - count)), mode="edge")
    return np.asarray(codec.decode(padded, scale, jnp.int32(bits)))[:count]


@functools.partial(jax.jit, static_argnums=0)
def coded_again(codec, codes, scale, bits, draws):
    return codec.encode(codec.decode(codes, scale, bits), bits, jnp.full(codes.shape, draws))


def returns(codec, bits, codes, scale, draws):
    """Whether what codes and scale stand for is coded as these."""
    found, kept = coded_again(codec, codes, scale, jnp.int32(bits), draws)
    return bool((found == codes).all() and (kept == scale).all())


def codes_of(count, last, seed=0):
    """Blocks in which every code occurs, and in each of them the last one and zero."""
    every = np.resize(np.arange(count), (-(-count // 64), 64))
    others = np.random.default_rng(seed).integers(0, count, (len(every), 62))
    ends = np.tile([0, last], (len(every), 1))
    return jnp.array(np.concatenate([every, others, ends], 1), jnp.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("linear", [1.0, 0.3])
def test_the_signed_codebook_is_symmetric_around_zero(bits, linear):
    count = 2**bits - 1
    values = codebook(Companded(linear), bits, count, jnp.ones(1, jnp.bfloat16))
    assert len(set(values)) == count
    np.testing.assert_array_equal(values, np.sort(values))
    np.testing.assert_array_equal(values, -values[::-1])
    assert values[count // 2] == 0
    np.testing.assert_allclose(values[-1], 1, rtol=1e-6)
    assert 0 not in codebook(Linear(zero=False), bits, 2**bits, jnp.ones(1))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("low", "high"), [(1, 2), (100, 104), (120, 131), (200, 220)])
def test_the_logarithmic_codebook_is_without_zero(bits, low, high):
    values = codebook(Logarithmic(), bits, 2**bits, jnp.array([low, high], jnp.uint8))
    assert len(set(values)) == 2**bits
    np.testing.assert_array_equal(values, np.sort(values))
    assert (values[0], values[-1]) == (2.0 ** (low - 127), 2.0 ** (high - 127))
    assert not codebook(Logarithmic(), bits, 2**bits, jnp.zeros(2, jnp.uint8)).any()
    assert 0 in codebook(Linear(), bits, 2**bits, jnp.ones(1))


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_has_been_decoded_is_encoded_as_it_was(bits):
    """Of stochastic codes, but for draws so near the ends that they ask for float32's last bits."""
    top, mostly = 2**bits - 1, (2**-10, 0.5, 1 - 2**-10)
    for power in (-60, 0, 60):
        scale = jnp.full((1,), 1.5 * 2.0**power, jnp.bfloat16)
        codes = codes_of(top, top - 1)
        for linear in (1.0, 0.3):
            assert returns(Companded(linear), bits, codes, scale, 0.0)
            for draws in mostly:
                assert returns(Companded(linear, stochastic=True), bits, codes, scale, draws)
        for span in {min(span, 2**bits - 2) for span in (2, 5, 8)}:
            scale = jnp.array([power + 120, power + 120 + span], jnp.uint8)
            codes = codes_of(top + 1, top)
            assert returns(Logarithmic(stochastic=False), bits, codes, scale, 0.0)
            for draws in mostly:
                assert returns(Logarithmic(), bits, codes, scale, draws)


def test_truncation_does_not_return_codes():
    scale, codes = jnp.full(1, 0.75), codes_of(256, 255)
    found, _ = coded_again(Linear(truncates=True), codes, scale, jnp.int32(8), 0.0)
    assert (found != codes).any()
    found, _ = coded_again(Linear(), codes, scale, jnp.int32(8), 0.0)
    np.testing.assert_array_equal(found, codes)

"""How the peers store moments: codebooks and rounding to the bit, and what they take."""

import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness.peers import codes
from experiments.harness.peers.codes import Coded, bitsandbytes, decode, eligible, encode, torchao

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others

PEERS = {"torchao 4": torchao(4), "torchao 8": torchao(8), "bitsandbytes": bitsandbytes()}
ROUNDINGS = {
    f"{name} {moment}": (peer, getattr(peer, moment))
    for (name, peer), moment in itertools.product(PEERS.items(), ("mu", "nu"))
}
# Of the float32 values that torchao 0.18 and bitsandbytes 0.50 compute, which agree.
CHECKSUMS = {(8, True): 0x1B137AEB, (8, False): 0xE871278F, (4, True): 0x59B750EA}
every_rounding = pytest.mark.parametrize(
    ("peer", "rounding"), ROUNDINGS.values(), ids=list(ROUNDINGS)
)


def values_of(rounding):
    return np.asarray(rounding.codebook.values, np.float32)


def moment_of(rounding, size, seed=0):
    """Elements of many magnitudes, among them a block of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size) * 10 ** rng.uniform(-6, 0, size)
    x[:256] = 0
    return (x if values_of(rounding)[0] < 0 else np.abs(x)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------
# Codebooks


def test_the_signed_map_of_4_bits_is_as_published():
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    expected = [*(-v for v in reversed(positive)), 0, *positive, 1]
    np.testing.assert_allclose(values_of(torchao(4).mu), expected, rtol=1e-6)


def test_the_linear_map_of_4_bits_is_as_published():
    np.testing.assert_array_equal(values_of(torchao(4).nu), np.arange(1, 17) / 16)


@pytest.mark.parametrize(("bits", "signed"), CHECKSUMS)
def test_dynamic_maps_are_the_peers_own_to_the_last_bit(bits, signed):
    values = codes.dynamic_map(bits, signed)
    assert zlib.crc32(values.astype("<f4").tobytes()) == CHECKSUMS[bits, signed]


@every_rounding
def test_codebooks_are_full_and_rise_to_one(peer, rounding):
    values, thresholds = values_of(rounding), rounding.thresholds
    assert len(values) == 2**peer.bits
    assert (np.diff(values) > 0).all()
    assert values[-1] == 1
    assert thresholds.dtype == np.float32
    assert ((values[:-1] < thresholds) & (thresholds <= values[1:])).all()


@pytest.mark.parametrize(("bits", "smallest"), [(4, 0.0055), (8, 5.5e-7)])
def test_signed_maps_are_symmetric_but_for_one(bits, smallest):
    values = codes.dynamic_map(bits, signed=True)
    zero = list(values).index(0)
    assert zero == 2 ** (bits - 1) - 1
    np.testing.assert_array_equal(values[:zero], -values[zero + 1 : -1][::-1])
    assert values[zero + 1] == pytest.approx(smallest)


def test_the_unsigned_map_of_8_bits_starts_at_zero():
    values = codes.dynamic_map(8, signed=False)
    assert values[0] == 0
    assert values[1] == pytest.approx(3.25e-7)
    assert values[-2] == pytest.approx(0.9964844)


# ---------------------------------------------------------------------------------------------------
# Rounding


@pytest.mark.first(2)
@every_rounding
def test_a_code_is_the_nearest_value(peer, rounding):
    x = moment_of(rounding, 8 * 1024)
    largest = np.abs(x.reshape(-1, peer.block)).max(axis=1)
    scale = np.repeat(np.maximum(largest, np.float32(peer.least_scale)), peer.block)
    found = np.asarray(decode(encode(jnp.asarray(x), peer, rounding), x.shape, peer, rounding))
    x, found, scale = (a[scale > 0].astype(np.float64) for a in (x, found, scale))
    distances = np.abs(x[:, None] - scale[:, None] * values_of(rounding))
    if rounding.keeps_sign:
        distances[np.ix_(x < 0, values_of(rounding) == 0)] = np.inf
    # Up to a tie's rounding in float32.
    assert (np.abs(x - found) - distances.min(axis=1) <= 1e-6 * np.abs(x) + 1e-12 * scale).all()


@every_rounding
def test_what_is_decoded_is_encoded_again_to_the_same(peer, rounding):
    x = moment_of(rounding, 8 * 1024)
    # The largest is positive, as the least value of a signed map is not quite −1.
    x = np.where(np.arange(x.size) % peer.block == 0, 9, x).astype(np.float32)
    coded = encode(jnp.asarray(x), peer, rounding)
    again = encode(decode(coded, x.shape, peer, rounding), peer, rounding)
    np.testing.assert_array_equal(again.codes, coded.codes)
    np.testing.assert_array_equal(again.scale, coded.scale)


def codes_of(peer, rounding, numbers):
    """Codes of numbers in [−1, 1] by themselves: a one stands at the head of each block."""
    rows = -(-len(numbers) // (peer.block - 1))
    blocks = np.zeros((rows, peer.block), np.float32)
    blocks[:, 0] = 1
    blocks[:, 1:].flat[: len(numbers)] = numbers
    codes = np.asarray(encode(jnp.asarray(blocks), peer, rounding).codes)
    if peer.bits == 4:
        codes = np.stack([codes >> 4, codes & 15], axis=-1)
    return codes.reshape(rows, peer.block)[:, 1:].ravel()[: len(numbers)]


@pytest.mark.parametrize("bits", [4, 8])
def test_torchao_rounds_as_its_two_steps_do(bits):
    """Its own rule in NumPy: the value at or below, and up where the rest is half the gap or more."""
    for rounding in (torchao(bits).mu, torchao(bits).nu):
        values, thresholds = values_of(rounding), rounding.thresholds
        near = [thresholds, np.nextafter(thresholds, np.float32(-2)), values]
        x = np.concatenate(near).astype(np.float32)
        low = np.clip(np.searchsorted(values, x, side="right") - 1, 0, None)
        high = np.minimum(low + 1, len(values) - 1)
        up = x - values[low] >= (values[high] - values[low]) * np.float32(0.5)
        expected = np.where(up, high, low)
        np.testing.assert_array_equal(codes_of(torchao(bits), rounding, x), expected)


def test_ties_go_up_at_torchao_and_to_the_even_code_at_bitsandbytes():
    codes = codes_of(torchao(4), torchao(4).nu, [1.5 / 16, 2.5 / 16])
    np.testing.assert_array_equal(codes, [1, 2])
    rounding = bitsandbytes().nu
    values = values_of(rounding)
    middle = (values[1:] + values[:-1]) * np.float32(0.5)
    exact = np.float64(middle) * 2 == np.float64(values[1:]) + np.float64(values[:-1])
    below = np.flatnonzero(exact)[:100]
    assert len(below) > 20
    codes = codes_of(bitsandbytes(), rounding, middle[below])
    np.testing.assert_array_equal(codes, below + below % 2)


def test_bitsandbytes_keeps_the_sign_of_negative_moments_alone():
    tiny = np.array([-1e-9, 1e-9, 0.0, -0.0], np.float32)
    zero = bitsandbytes().mu.zero
    codes = codes_of(bitsandbytes(), bitsandbytes().mu, tiny)
    np.testing.assert_array_equal(codes, [zero - 1, zero, zero, zero - 1])
    np.testing.assert_array_equal(codes_of(torchao(8), torchao(8).mu, tiny), [zero] * 4)


def test_two_codes_of_4_bits_lie_in_a_byte_the_first_in_the_upper_half():
    x = jnp.tile(jnp.float32([1.0, 1 / 16]), 2048)
    np.testing.assert_array_equal(encode(x, torchao(4), torchao(4).nu).codes, np.full(2048, 0xF0))


# ---------------------------------------------------------------------------------------------------
# State


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 64), (True, True, True)),
        ((33, 128), (True, False, True)),
        ((63, 67), (False, False, True)),
        ((4095,), (False, False, False)),
        ((31, 128), (False, False, False)),
        ((), (False, False, False)),
    ],
)
def test_eligible_shapes(shape, expected):
    assert tuple(eligible(shape, peer) for peer in PEERS.values()) == expected


@pytest.mark.long
def test_a_last_block_that_is_not_whole_takes_a_scale_and_no_codes():
    moment = codes.zeros((63, 67), bitsandbytes())
    assert isinstance(moment, Coded)
    assert (moment.codes.nbytes, moment.scale.nbytes) == (63 * 67, 4 * 17)
    x = jnp.linspace(-1, 1, 63 * 67).reshape(63, 67)
    coded = encode(x, bitsandbytes(), bitsandbytes().mu)
    assert jax.tree.map(jnp.shape, coded) == jax.tree.map(jnp.shape, moment)
    found = decode(coded, x.shape, bitsandbytes(), bitsandbytes().mu)
    np.testing.assert_allclose(found, x, atol=0.01)


@pytest.mark.parametrize("name", PEERS)
def test_state_begins_at_zero(name):
    for rounding in (PEERS[name].mu, PEERS[name].nu):
        moment = codes.zeros((64, 64), PEERS[name])
        assert isinstance(moment, Coded)
        assert not np.asarray(decode(moment, (64, 64), PEERS[name], rounding)).any()


@pytest.mark.parametrize("bits", [2, 5, 16, 4.5, True, "4", None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"bits=4 or bits=8; got bits="):
        torchao(bits)

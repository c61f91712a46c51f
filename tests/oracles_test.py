"""Formats against other people's: every code and a million casts of ml_dtypes and gfloat."""

import functools

import gfloat
import gfloat.formats
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gfloat.decode_ndarray import decode_ndarray
from gfloat.round_ndarray import round_ndarray

import jaxquant as jq
from jaxquant import formats

pytestmark = pytest.mark.exhaustive

FLOATS = {
    jq.E4M3: ml_dtypes.float8_e4m3fn,
    jq.Float(4, 3): ml_dtypes.float8_e4m3,
    formats.E4M3FNUZ: ml_dtypes.float8_e4m3fnuz,
    jq.E5M2: ml_dtypes.float8_e5m2,
    formats.E5M2FNUZ: ml_dtypes.float8_e5m2fnuz,
    jq.Float(3, 4): ml_dtypes.float8_e3m4,
    jq.E2M1: ml_dtypes.float4_e2m1fn,
    jq.E2M3: ml_dtypes.float6_e2m3fn,
    jq.E3M2: ml_dtypes.float6_e3m2fn,
    jq.E8M0: ml_dtypes.float8_e8m0fnu,
    jq.FP16: np.float16,
    jq.BF16: ml_dtypes.bfloat16,
}
INTS = {
    jq.Int(1, "unsigned"): ml_dtypes.uint1,
    jq.Int(2, "full"): ml_dtypes.int2,
    jq.Int(2, "unsigned"): ml_dtypes.uint2,
    jq.Int(4, "full"): ml_dtypes.int4,
    jq.Int(4, "unsigned"): ml_dtypes.uint4,
    jq.Int(8, "full"): np.int8,
    jq.Int(8, "unsigned"): np.uint8,
    jq.Int(16, "full"): np.int16,
    jq.Int(16, "unsigned"): np.uint16,
}
# gfloat's format and what its values are to be multiplied with.
GFLOAT = {
    jq.E4M3: (gfloat.formats.format_info_ocp_e4m3, 1),
    jq.E5M2: (gfloat.formats.format_info_ocp_e5m2, 1),
    jq.E2M1: (gfloat.formats.format_info_ocp_e2m1, 1),
    jq.E2M3: (gfloat.formats.format_info_ocp_e2m3, 1),
    jq.E3M2: (gfloat.formats.format_info_ocp_e3m2, 1),
    jq.E8M0: (gfloat.formats.format_info_ocp_e8m0, 1),
    jq.Int(8, "full"): (gfloat.formats.format_info_ocp_int8, 64),
    jq.FP16: (gfloat.formats.format_info_binary16, 1),
    jq.BF16: (gfloat.formats.format_info_bfloat16, 1),
}
SMALLEST_NORMAL = 2.0**-126  # below it this hardware may flush to zero


def codes_of(fmt) -> np.ndarray:
    return np.arange(2**fmt.bits).astype(formats.code_dtype(fmt.bits))


def padded(call, x: np.ndarray) -> np.ndarray:
    """call(x), padded to a power of two so that all formats meet the same compiled operations."""
    size = max(256, 1 << (len(x) - 1).bit_length())
    filled = np.concatenate([x, np.ones(size - len(x), x.dtype)])
    return np.asarray(call(jnp.array(filled)))[: len(x)]


def decoded(fmt) -> np.ndarray:
    return padded(fmt.decode, codes_of(fmt))


def encoded(fmt, x) -> np.ndarray:
    return padded(fmt.encode, np.asarray(x, np.float32))


def rounded_to(fmt, x) -> np.ndarray:
    return padded(lambda x: fmt.round(x, jnp.round), np.asarray(x, np.float32))


def flushed(values: np.ndarray, fmt) -> np.ndarray:
    """bfloat16's subnormals as float32 hardware sees them; E8M0's one subnormal is written bit by bit."""
    if fmt == jq.BF16:
        return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(0, values), values)
    return values


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the last bit, the sign of zero included; a NaN is a NaN."""
    assert found.dtype == expected.dtype == np.float32
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))


def values_of(dtype, bits: int) -> np.ndarray:
    codes = np.arange(2**bits).astype(np.uint8 if bits <= 8 else np.uint16)
    with np.errstate(invalid="ignore"):
        return codes.view(dtype).astype(np.float32)


@functools.cache
def samples(fmt, count: int = 1_000_000) -> np.ndarray:
    """Log-uniform over the grid's range and three binades beyond, with midpoints and special values."""
    rng = np.random.default_rng(0)
    grid = decoded(fmt)
    grid = np.unique(grid[np.isfinite(grid)].astype(np.float64))
    smallest = np.abs(grid[grid != 0]).min()
    low = max(np.log2(smallest) - 3, -126)
    high = min(np.log2(np.abs(grid).max()) + 3, 127.9)
    spread = np.exp2(rng.uniform(low, high, count)) * rng.choice([-1, 1], count)
    midpoints = (grid[1:] + grid[:-1]) / 2
    top = np.abs(grid).max()
    beyond = np.array([1, 1.01, 1.0624, 1.0626, 1.24, 1.26, 2, 100]) * top
    beyond = np.minimum(beyond, np.finfo(np.float32).max)
    special = [0.0, np.inf, np.nan, np.finfo(np.float32).max, SMALLEST_NORMAL]
    positive = np.concatenate([midpoints, grid, beyond, special])
    x = np.concatenate([spread, positive, -positive]).astype(np.float32)
    tiny = (np.abs(x) < SMALLEST_NORMAL) & (x != 0)
    return x[~tiny]


def differences(x, found, expected) -> list:
    """The first few places where an answer is wrong, legibly."""
    return [(x[i], found[i], expected[i]) for i in np.flatnonzero(found != expected)[:8]]


@pytest.mark.parametrize("fmt", [*FLOATS, *INTS], ids=str)
def test_every_code_decodes_to_ml_dtypes_value(fmt):
    dtype = FLOATS.get(fmt, INTS.get(fmt))
    expected = flushed(values_of(dtype, fmt.bits), fmt)
    assert_same_bits(decoded(fmt), expected)
    finite = expected[np.isfinite(expected)]
    assert fmt.max_value == finite.max()
    if fmt != jq.E8M0:  # whose smallest is subnormal in float32
        assert fmt.min_value == finite.min()


@pytest.mark.parametrize("fmt", GFLOAT, ids=str)
def test_every_code_decodes_to_gfloats_value(fmt):
    info, unit = GFLOAT[fmt]
    expected = decode_ndarray(info, codes_of(fmt).astype(np.int64)) * unit
    if fmt != jq.BF16:  # its array version shows the readable one's values
        slow = [gfloat.decode_float(info, int(c)).fval * unit for c in codes_of(fmt)[:256]]
        np.testing.assert_array_equal(slow, expected[:256])
    expected = expected.astype(np.float32)
    if isinstance(fmt, jq.Int):
        expected = expected + np.float32(0)  # an integer has no negative zero
    assert_same_bits(decoded(fmt), flushed(expected, fmt))


@pytest.mark.parametrize("levels", ["symmetric", "full", "unsigned", "midrise"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_int_code_stands_for_its_level(bits, levels):
    if bits == 1 and levels in ("symmetric", "full"):
        with pytest.raises(ValueError, match="2 to 16"):
            jq.Int(bits, levels)
        return
    fmt, codes = jq.Int(bits, levels), np.arange(2**bits)
    signed = np.where(codes < 2 ** (bits - 1), codes, codes - 2**bits)
    expected = {"unsigned": codes, "midrise": 2 * codes + 1 - 2**bits}.get(levels, signed)
    assert_same_bits(decoded(fmt), expected.astype(np.float32))
    on_grid = expected[(expected >= fmt.min_value) & (expected <= fmt.max_value)]
    left_out = 1 if levels == "symmetric" else 0
    assert len(on_grid) == 2**bits - left_out
    assert (on_grid.min(), on_grid.max()) == (fmt.min_value, fmt.max_value)


ALL_INTS = [
    jq.Int(bits, levels)
    for levels in ("symmetric", "full", "unsigned", "midrise")
    for bits in range(2 if levels in ("symmetric", "full") else 1, 9)
]
MAPS = [jq.NF4, jq.DYNAMIC8, formats.UDYNAMIC8, formats.normal_float(3)]


@pytest.mark.parametrize("fmt", [*FLOATS, *INTS, *ALL_INTS, *MAPS], ids=str)
def test_encoding_undoes_decoding(fmt):
    """For every code but NaN's payloads, a symmetric Int's left-out code and bfloat16's subnormals."""
    values, codes = decoded(fmt), codes_of(fmt)
    again = encoded(fmt, values)
    comparable = ~np.isnan(values)
    if isinstance(fmt, jq.Int) and fmt.levels == "symmetric":
        comparable &= values >= fmt.min_value
        assert (~comparable).sum() == 1
    if fmt == jq.BF16:
        comparable &= ~((values == 0) & (codes & 0x7FFF != 0))
    np.testing.assert_array_equal(again[comparable], codes[comparable])
    assert again.dtype == codes.dtype
    # NaN stays NaN, of either sign where there is a sign.
    assert np.isnan(padded(fmt.decode, again)[np.isnan(values)]).all()


@pytest.mark.first(9)
@pytest.mark.parametrize("fmt", [*FLOATS, *ALL_INTS], ids=str)
def test_storing_undoes_loading(fmt):
    values = decoded(fmt)
    low = 0 if fmt == jq.E8M0 else fmt.min_value
    values = values[(values >= low) & (values <= fmt.max_value)]
    stored = fmt.store(jnp.array(values))
    assert stored.dtype == fmt.dtype
    if fmt == jq.E8M0:  # a type of its own, whose subnormal value a cast may flush
        values, stored = values[1:], stored[1:]
    np.testing.assert_array_equal(np.asarray(fmt.load(stored)), values)


@pytest.mark.first(10)
@pytest.mark.parametrize("fmt", FLOATS, ids=str)
def test_encoding_is_ml_dtypes_cast_but_for_saturation(fmt):
    x = samples(fmt)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = x.astype(FLOATS[fmt])
    expected = cast.view(codes_of(fmt).dtype).copy()
    values = cast.astype(np.float32)
    if fmt == jq.E8M0:
        assert np.isnan(values[x <= 0]).all()
    overflow = np.isfinite(x) & ~np.isfinite(values) & (x > 0 if fmt == jq.E8M0 else True)
    assert overflow.any() or FLOATS[fmt] in (
        ml_dtypes.float4_e2m1fn,
        ml_dtypes.float6_e2m3fn,
        ml_dtypes.float6_e3m2fn,
    )
    # The one difference: what is finite stays finite.
    top = np.array(fmt.max_value * np.sign(x[overflow]), np.float32).astype(FLOATS[fmt])
    expected[overflow] = top.view(expected.dtype)
    if fmt in (jq.E2M1, jq.E2M3, jq.E3M2):  # NaN is -0 here, 0 with the NaN's sign there
        expected[np.isnan(x)] = 1 << (fmt.bits - 1)
    if fmt == jq.BF16:
        subnormal = (np.abs(values) < SMALLEST_NORMAL) & (values != 0)
        x, expected = x[~subnormal], expected[~subnormal]
    found = encoded(fmt, x)
    assert not differences(x, found, expected)


@pytest.mark.first(10)
@pytest.mark.parametrize("fmt", [*FLOATS, *ALL_INTS, *MAPS], ids=str)
def test_rounding_is_the_value_of_the_code(fmt):
    x = samples(fmt, 100_000)
    x = x[np.isfinite(x) & (x > 0 if fmt == jq.E8M0 else True)]
    assert not differences(x, rounded_to(fmt, x), padded(fmt.decode, encoded(fmt, x)))


@pytest.mark.parametrize("fmt", GFLOAT, ids=str)
def test_rounding_is_gfloats_saturated(fmt):
    info, unit = GFLOAT[fmt]
    x = samples(fmt, 100_000)
    x = x[~np.isnan(x)]
    if fmt == jq.E8M0:
        x = x[(x > 0) & (x >= SMALLEST_NORMAL)]
    expected = round_ndarray(info, x.astype(np.float64) / unit, sat=True) * unit
    few = np.random.default_rng(1).choice(len(x), 2_000)
    readable = [gfloat.round_float(info, float(x[i]) / unit, sat=True) * unit for i in few]
    np.testing.assert_array_equal(readable, expected[few])
    if fmt == jq.BF16:
        keep = (np.abs(expected) >= SMALLEST_NORMAL) | (x == 0)
        x, expected = x[keep], expected[keep]
    if (
        fmt == jq.E8M0
    ):  # of two neighbours a tie takes the larger here and in ml_dtypes, the even code there
        tie = np.frexp(x)[0] == 0.75
        x, expected = x[~tie], expected[~tie]
    found = rounded_to(fmt, x).astype(np.float64)
    assert not differences(x, found, expected)


@pytest.mark.parametrize("fmt", INTS, ids=str)
def test_int_encoding_is_ml_dtypes_cast_of_clipped_integers(fmt):
    x = samples(fmt)
    with np.errstate(invalid="ignore"):
        whole = np.rint(np.clip(np.nan_to_num(x, nan=0.0), fmt.min_value, fmt.max_value))
        expected = whole.astype(INTS[fmt]).view(codes_of(fmt).dtype)
    mask = codes_of(fmt).dtype.type(2**fmt.bits - 1)
    np.testing.assert_array_equal(encoded(fmt, x), expected & mask)


@pytest.mark.parametrize("fmt", ALL_INTS, ids=str)
def test_int_encoding_is_the_nearest_level(fmt):
    x = samples(fmt, 50_000)
    x = x[np.isfinite(x)]
    levels = np.unique(decoded(fmt).astype(np.float64))
    levels = levels[(levels >= fmt.min_value) & (levels <= fmt.max_value)]
    nearest = np.abs(levels[np.clip(np.searchsorted(levels, x), 0, len(levels) - 1)] - x)
    below = np.abs(levels[np.clip(np.searchsorted(levels, x) - 1, 0, len(levels) - 1)] - x)
    found = decoded(fmt).astype(np.float64)[encoded(fmt, x)]
    # A midrise grid halves x ∓ 1, whose own rounding is a float32's.
    slack = 2.0**-22 * np.abs(x) if fmt.levels == "midrise" else 0
    assert (np.abs(found - x) <= np.minimum(nearest, below) + slack).all()


@pytest.mark.parametrize("fmt", MAPS, ids=str)
def test_a_codebook_takes_the_nearest_of_its_values_and_of_two_the_smaller(fmt):
    x = samples(fmt, 200_000)
    x = x[np.isfinite(x)].astype(np.float64)
    table = np.array(fmt.values)
    np.testing.assert_array_equal(decoded(fmt)[: len(table)], table.astype(np.float32))
    middles = (table[1:] + table[:-1]) / 2
    expected = np.searchsorted(middles, x, side="left")  # a tie is not beyond the middle
    # Where a middle is no float32, what lies within a rounding error of it may go either way.
    gap = np.diff(table)
    place = np.clip(np.searchsorted(middles, x), 0, len(middles) - 1)
    others = np.clip(place - 1, 0, None)
    near = np.zeros(len(x), bool)
    for i in (place, others):
        size = np.maximum(np.abs(table[i]), np.abs(table[i + 1]))
        near |= np.abs(x - middles[i]) <= 2.0**-23 * (size + gap[i])
    np.testing.assert_array_equal(encoded(fmt, x)[~near], expected[~near])
    assert (np.abs(encoded(fmt, x) - expected)[near] <= 1).all()
    assert near.mean() < 0.01
    assert encoded(fmt, [np.nan]) == 0
    np.testing.assert_array_equal(encoded(fmt, [-np.inf, np.inf]), [0, len(table) - 1])


def test_ties_of_a_codebook_go_to_the_smaller_value():
    fmt = jq.Codebook((-3.0, -1.0, 0.0, 4.0))
    np.testing.assert_array_equal(encoded(fmt, [-2.0, -0.5, 2.0]), [0, 1, 2])


@pytest.mark.parametrize("fmt", [jq.E2M1, jq.E2M3, jq.E3M2], ids=str)
def test_nan_of_a_format_without_one_is_minus_zero_whatever_its_sign(fmt):
    found = encoded(fmt, [np.nan, -np.nan])
    np.testing.assert_array_equal(found, [1 << (fmt.bits - 1)] * 2)


@pytest.mark.parametrize("levels", ["symmetric", "full", "unsigned", "midrise"])
def test_ints_cast_nan_to_zero_or_its_neighbour_and_saturate_inf(levels):
    fmt = jq.Int(4, levels)
    found = padded(fmt.decode, encoded(fmt, [np.nan, np.inf, -np.inf]))
    assert abs(found[0]) == (1 if levels == "midrise" else 0)
    np.testing.assert_array_equal(found[1:], [fmt.max_value, fmt.min_value])


def test_block_formats_are_made_as_the_standard_says():
    """OCP's concrete formats: element grid, block size 32, scale grid (gfloat's table)."""
    theirs = {
        "mxfp8": gfloat.formats.format_info_mxfp8_e4m3,
        "mxfp6": gfloat.formats.format_info_mxfp6_e3m2,
        "mxfp4": gfloat.formats.format_info_mxfp4_e2m1,
        "mxint8": gfloat.formats.format_info_mxint8,
    }
    for name, info in theirs.items():
        ours = jq.parse(name)
        assert (ours.size, ours.levels) == (info.k, 1)
        assert GFLOAT[ours.scale][0] == info.stype
        element = jq.Int(8, "full") if name == "mxint8" else ours.element
        assert GFLOAT[element][0] == info.etype

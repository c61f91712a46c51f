"""What holds of every format: laws of the grid, names, types, traced parameters.  Oracles: oracles_test."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import formats

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others

LEVELS = ["symmetric", "full", "unsigned", "midrise"]
INTS = [
    jq.Int(bits, levels)
    for levels in LEVELS
    for bits in range(1, 17)
    if bits > 1 or levels not in ("symmetric", "full")
]
# E8M0 is of its own kind: no zero, no sign.
FLOATS = [
    *(jq.Float(e, m) for e in (2, 3, 5, 8) for m in (1, 3, 7, 10)),
    *(
        jq.Float(e, m, c)
        for e in (2, 3, 5, 7)
        for m in (1, 3, 10)
        for c in ("fn", "fnuz", "finite")
    ),
]
CODEBOOKS = [
    jq.NF4,
    jq.DYNAMIC8,
    formats.UDYNAMIC8,
    formats.dynamic_map(3),
    formats.normal_float(5),
    jq.Codebook((-1.0, 0.0, 0.25, 4.0)),
]
GRIDS = [*INTS, *FLOATS, *CODEBOOKS]
BLOCKS = [
    jq.MXFP8,
    jq.MXFP6,
    jq.MXFP4,
    jq.MXINT8,
    jq.NVFP4,
    jq.Block(jq.INT4, 64, jq.FP16),
    jq.Block(jq.NF4, 64, jq.BF16, levels=2),
    jq.Block(jq.Codebook((-1.0, 0.5, 1.0)), 8, jq.E8M0),
    jq.Block(jq.Int(3, "midrise"), 5, jq.E4M3, levels=2),
]


def grid_of(fmt) -> np.ndarray:
    codes = jnp.arange(2**16).astype(formats.code_dtype(fmt.bits))
    if fmt.bits < 16:
        codes = jnp.minimum(codes, 2**fmt.bits - 1)
    values = np.unique(np.asarray(fmt.decode(codes)))
    return values[(values >= fmt.min_value) & (values <= fmt.max_value)]


def wave(fmt, n: int = 4096) -> jax.Array:
    """Values over the whole range and beyond it, dense near zero."""
    top = min(2 * float(fmt.max_value) + 1, float(np.finfo(np.float32).max))
    x = np.sign(np.linspace(-1, 1, n)) * np.abs(np.linspace(-1, 1, n)) ** 5 * top
    return jnp.array(x, jnp.float32)


# ---- laws of every grid ----


@pytest.mark.parametrize("fmt", GRIDS, ids=str)
def test_rounding_is_onto_the_grid_idempotent_and_monotone(fmt):
    x = wave(fmt)
    once = np.asarray(fmt.round(x, jnp.round))
    np.testing.assert_array_equal(fmt.round(jnp.array(once), jnp.round), once)
    assert (np.diff(once) >= 0).all()
    ends = once[[0, -1]]
    np.testing.assert_array_equal(ends, [fmt.min_value, fmt.max_value])
    if fmt.bits <= 11:
        assert np.isin(once, grid_of(fmt)).all()


@pytest.mark.parametrize("fmt", GRIDS, ids=str)
def test_rounding_takes_the_nearest_value(fmt):
    if fmt.bits > 11:
        pytest.skip("large grids: their laws are those of the small ones")
    x = wave(fmt)
    grid, at = grid_of(fmt).astype(np.float64), np.asarray(x, np.float64)
    place = np.clip(np.searchsorted(grid, at), 1, len(grid) - 1)
    best = np.minimum(np.abs(grid[place] - at), np.abs(grid[place - 1] - at))
    found = np.abs(np.asarray(fmt.round(x, jnp.round), np.float64) - at)
    slack = 2.0**-22 * np.maximum(
        np.abs(at), getattr(fmt, "step", 1) - 1
    )  # midrise subtracts 1 first
    assert (found <= best + slack).all()


@pytest.mark.parametrize("fmt", GRIDS, ids=str)
def test_storage_and_codes_keep_grid_values(fmt):
    grid = fmt.round(wave(fmt), jnp.round)
    stored = fmt.store(grid)
    assert stored.dtype == fmt.dtype
    np.testing.assert_array_equal(fmt.load(stored), grid)
    codes = fmt.encode(grid)
    assert codes.dtype == formats.code_dtype(fmt.bits)
    assert int(codes.max()) < 2**fmt.bits
    np.testing.assert_array_equal(fmt.decode(codes), grid)


@pytest.mark.parametrize("fmt", GRIDS, ids=str)
def test_symmetric_grids_are_symmetric(fmt):
    if fmt.min_value != -fmt.max_value or fmt in CODEBOOKS:
        return
    x = jnp.concatenate([wave(fmt), jnp.arange(1.0, 65.0) / 2, jnp.array([1e-9, 1e-30])])
    np.testing.assert_array_equal(fmt.round(-x, jnp.round), -fmt.round(x, jnp.round))


def test_binary_is_the_sign():
    x = jnp.array([-3.0, -1.0, -1e-3, -1e-9, -1e-30, 1e-30, 1e-9, 0.5, 2.0])
    np.testing.assert_array_equal(jq.BINARY.round(x, jnp.round), jnp.sign(x))


@pytest.mark.parametrize("fmt", GRIDS, ids=str)
def test_nan_stays_nan_and_infinities_saturate(fmt):
    found = np.asarray(fmt.round(jnp.array([jnp.nan, jnp.inf, -jnp.inf]), jnp.round))
    if not isinstance(fmt, jq.Codebook):  # whose rounding is a table's index
        assert np.isnan(found[0])
    np.testing.assert_array_equal(found[1:], [fmt.max_value, fmt.min_value])


@pytest.mark.parametrize("fmt", INTS, ids=str)
def test_ints_have_all_their_levels(fmt):
    grid = grid_of(fmt)
    assert len(grid) == 2**fmt.bits - (fmt.levels == "symmetric")
    np.testing.assert_array_equal(np.diff(grid), fmt.step)
    assert (0 in grid) == (fmt.levels != "midrise")
    assert (fmt.min_value == -fmt.max_value) == (fmt.levels in ("symmetric", "midrise"))


@pytest.mark.parametrize("fmt", FLOATS, ids=str)
def test_floats_are_dense_to_their_mantissa(fmt):
    """Between powers of two lie 2^m steps, and below the smallest normal the same step goes on to zero."""
    if fmt.bits > 16 or fmt.exponent_bits == 8:
        return
    grid = grid_of(fmt).astype(np.float64)
    positive = grid[grid > 0]
    exponents = np.floor(np.log2(positive))
    steps = np.diff(positive)
    lowest = 2 - 2 ** (fmt.exponent_bits - 1) - (fmt.convention == "fnuz")
    expected = 2.0 ** (np.maximum(exponents[:-1], lowest) - fmt.mantissa_bits)
    np.testing.assert_array_equal(steps, expected)
    assert positive[0] == 2.0 ** (lowest - fmt.mantissa_bits)


def test_nothing_is_lost_between_conventions():
    """How many finite codes each convention has, zero counted once and twice."""
    for e, m in ((2, 1), (3, 2), (4, 3), (5, 2)):
        codes = jnp.arange(2 ** (1 + e + m), dtype=jnp.uint8)
        finite = {
            c: int(jnp.isfinite(jq.Float(e, m, c).decode(codes)).sum())
            for c in ("ieee", "fn", "fnuz", "finite")
        }
        total = 2 ** (1 + e + m)
        assert finite == {
            "ieee": total - 2 * 2**m,
            "fn": total - 2,
            "fnuz": total - 1,
            "finite": total,
        }


# ---- well-known grids ----


def test_well_known_ranges():
    tops = {
        jq.E4M3: 448,
        jq.Float(4, 3): 240,
        formats.E4M3FNUZ: 240,
        jq.E5M2: 57344,
        formats.E5M2FNUZ: 57344,
        jq.E2M1: 6,
        jq.E2M3: 7.5,
        jq.E3M2: 28,
        jq.FP16: 65504,
        jq.BF16: float(jnp.finfo(jnp.bfloat16).max),
        jq.E8M0: 2.0**127,
        jq.NF4: 1,
        jq.BINARY: 1,
        jq.TERNARY: 1,
    }
    assert {fmt: fmt.max_value for fmt in tops} == tops


def test_bfloat16_is_exact_down_to_its_smallest_normal_value():
    x = (np.linspace(1, 2, 1000) * 2.0 ** np.arange(-126, 127)[:, None]).astype(np.float32)
    expected = x.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(jq.BF16.round(jnp.array(x), jnp.round), expected)
    np.testing.assert_array_equal(jq.BF16.round(jnp.zeros(2), jnp.round), 0.0)


def test_dynamic_maps_are_symmetric_but_for_one_and_share_tens():
    values = np.array(formats.dynamic_map(8).values)
    assert len(values) == 256
    np.testing.assert_array_equal(-values[values < 0][::-1], values[values > 0][:-1])
    assert values[-1] == 1
    unsigned = np.array(formats.dynamic_map(8, signed=False).values)
    assert (len(unsigned), unsigned[0], unsigned[-1]) == (256, 0, 1)
    for bits in range(2, 9):
        for signed in (True, False):
            assert formats.dynamic_map(bits, signed).bits == bits


def test_normal_floats_are_evenly_likely_quantiles():
    from scipy.stats import norm

    np.testing.assert_allclose(formats.normal_float(4).values, jq.NF4.values, atol=1e-4)
    for bits in range(2, 9):
        values = np.array(formats.normal_float(bits).values)
        assert len(values) == 2**bits
        assert {values[0], 0.0, values[-1]} == {-1.0, 0.0, 1.0}
        offset = (1 - 1 / (2 * (2**bits - 1)) + 1 - 1 / (2 * 2**bits)) / 2
        likely = norm.cdf(values * norm.ppf(offset))
        for half in (likely[values >= 0], likely[values <= 0]):
            np.testing.assert_allclose(np.diff(half), np.diff(half).mean(), rtol=1e-3)


# ---- array types ----


def test_array_types():
    assert jq.Int(4).dtype == jq.Int(2).dtype == jq.Int(1, "midrise").dtype == jnp.int4
    assert (jq.Int(5).dtype, jq.Int(8, "full").dtype, jq.Int(9).dtype) == (
        jnp.int8,
        jnp.int8,
        jnp.int16,
    )
    assert (jq.Int(4, "unsigned").dtype, jq.Int(16, "unsigned").dtype) == (jnp.uint8, jnp.uint16)
    assert (jq.E4M3.dtype, jq.E5M2.dtype) == (jnp.float8_e4m3fn, jnp.float8_e5m2)
    assert (jq.FP16.dtype, jq.BF16.dtype, jq.E8M0.dtype) == (
        jnp.float16,
        jnp.bfloat16,
        jnp.float8_e8m0fnu,
    )
    # Codes, where JAX has no type.
    assert (jq.E2M1.dtype, jq.E3M2.dtype, jq.E5M6.dtype) == (jnp.uint8, jnp.uint8, jnp.uint16)
    assert (jq.NF4.dtype, jq.Codebook(tuple(range(300))).dtype) == (jnp.uint8, jnp.uint16)


@pytest.mark.parametrize("fmt", [jq.Float(8, 10), jq.Float(8, 9)], ids=str)
def test_codes_hold_every_float(fmt):
    """Up to 8 + 10 + 1 bits: wider than uint16."""
    grid = fmt.round(jnp.array([1.0, -1.5, 3.140625, 1e30]), jnp.round)
    stored = fmt.store(grid)
    np.testing.assert_array_equal(fmt.load(stored), grid)
    np.testing.assert_array_equal(fmt.decode(fmt.encode(grid)), grid)


# ---- traced parameters ----


@pytest.mark.parametrize("levels", LEVELS)
def test_traced_ints_are_the_static_ones_in_one_trace(levels):
    chex.clear_trace_counter()
    x = jnp.concatenate([jnp.linspace(-600, 600, 4001), jnp.array([-1e6, -40000.5, 1e6])])
    counted = chex.assert_max_traces(n=1)(
        lambda b, x: (jq.Int(b, levels).round(x, jnp.round), *ends(jq.Int(b, levels)))
    )
    at = jax.jit(counted)
    for bits in range(2, 17):
        fmt = jq.Int(bits, levels)
        rounded, low, high = at(jnp.int32(bits), x)
        np.testing.assert_array_equal(rounded, fmt.round(x, jnp.round))
        assert (float(low), float(high)) == (fmt.min_value, fmt.max_value)


@pytest.mark.parametrize("convention", ["ieee", "fn", "fnuz", "finite"])
def test_traced_floats_are_the_static_ones_in_one_trace(convention):
    chex.clear_trace_counter()
    x = jnp.array(
        np.sign(np.linspace(-1, 1, 5001)) * np.exp2(np.linspace(-40, 40, 5001)), jnp.float32
    )
    counted = chex.assert_max_traces(n=1)(
        lambda e, m, x: (
            jq.Float(e, m, convention).round(x, jnp.round),
            *ends(jq.Float(e, m, convention)),
        )
    )
    at = jax.jit(counted)
    for e in range(2, 9 if convention == "ieee" else 8):
        for m in (1, 3, 7, 10):
            fmt = jq.Float(e, m, convention)
            rounded, low, high = at(jnp.int32(e), jnp.int32(m), x)
            np.testing.assert_array_equal(rounded, fmt.round(x, jnp.round), err_msg=str(fmt))
            assert (float(low), float(high)) == (fmt.min_value, fmt.max_value)


def ends(fmt):
    return jnp.float32(fmt.min_value), jnp.float32(fmt.max_value)


def test_traced_codebooks_are_the_static_ones():
    at = jax.jit(lambda v, x: jq.Codebook(v).round(x, jnp.round))
    for fmt in (jq.NF4, formats.UDYNAMIC8):
        values = jnp.array(fmt.values, jnp.float32)
        np.testing.assert_array_equal(at(values, wave(fmt)), fmt.round(wave(fmt), jnp.round))


def test_formats_can_be_stacked_and_mapped_over():
    stacked = jax.tree.map(lambda *b: jnp.stack(b), *(jq.Int(jnp.float32(b)) for b in (3, 4, 8)))
    found = jax.vmap(lambda fmt: fmt.max_value)(stacked)
    np.testing.assert_array_equal(found, [3, 7, 127])


@pytest.mark.parametrize(
    "fmt",
    [
        jq.Int(jnp.int32(4)),
        jq.Float(jnp.int32(4), 3, "fn"),
        jq.Codebook(jnp.array([0.0, 1.0])),
    ],
    ids=["int", "float", "codebook"],
)
def test_traced_formats_have_no_array_type_and_say_so(fmt):
    for call in (lambda: fmt.dtype, lambda: jq.quantize(jnp.ones(4), jq.Quantizer(fmt))):
        with pytest.raises(ValueError, match="fake_quant"):
            call()
    assert jnp.isfinite(jq.fake_quant(jnp.ones(4), jq.Quantizer(fmt))).all()
    assert str(fmt)  # a name may be long but it is no error
    assert repr(fmt)


# ---- pytrees ----


@pytest.mark.parametrize("fmt", [*GRIDS[::5], *BLOCKS, jq.E8M0], ids=str)
def test_static_formats_are_hashable_leafless_trees(fmt):
    leaves, tree = jax.tree.flatten(fmt)
    assert leaves == []
    again = jax.tree.unflatten(tree, leaves)
    assert again == fmt
    assert hash(again) == hash(fmt)


def test_leaves_are_the_traced_parameters():
    assert len(jax.tree.leaves(jq.Int(jnp.float32(4)))) == 1
    mixed = jq.Float(jnp.int32(4), 3, "fn")
    assert len(jax.tree.leaves(mixed)) == 1
    rebuilt = jax.tree.unflatten(jax.tree.structure(mixed), jax.tree.leaves(mixed))
    assert (rebuilt.mantissa_bits, rebuilt.convention) == (3, "fn")
    assert len(jax.tree.leaves(jq.Block(jq.Int(jnp.int32(4)), 32, jq.E8M0))) == 1


# ---- names ----


@pytest.mark.parametrize("fmt", [*GRIDS, *BLOCKS, jq.E8M0], ids=str)
def test_parse_is_the_inverse_of_str(fmt):
    again = jq.parse(str(fmt))
    assert again == fmt
    assert type(again) is type(fmt)
    assert str(again) == str(fmt)


def test_no_two_formats_share_a_name():
    names = [str(fmt) for fmt in {*GRIDS, *BLOCKS, jq.E8M0}]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            " ",
            "int",
            "int0",
            "int1",
            "int17",
            "int04",
            "int-4",
            "int4 ",
            " int4",
            "INT4",
            "int4.0",
        ),
        *("uint4full", "uint0", "uint17", "int4unsigned", "int4symmetric", "int1full4", "int٤"),
        *("e4", "m3", "e4m", "em3", "e0m3", "e9m3", "e1m3", "e4m0", "e4m11", "e4m3fnz", "e4m3ieee"),
        *(
            "e8m0",
            "e8m1fnu",
            "e5m10",
            "e8m7",
            "e8m3fn",
            "e04m3",
            "E4M3",
            "e4m3 fn",
            "e10m2",
            "fp32",
        ),
        *("codebook()", "codebook(1)", "codebook(1.0,0.0)", "codebook(a,b)", "codebook(0,1)"),
        *("codebook(0.0,nan)", "codebook(0.0,inf)", "codebook(0.0,0.0)", "codebook(-1.0, 1.0)"),
        *(
            "block(int4,64,fp16)",
            "block(int4,0,fp16,1)",
            "block(int4,64,fp16,3)",
            "block(,1,fp16,1)",
        ),
        *("block(int4,064,fp16,1)", "block(mxfp4,32,e8m0fnu,1)", "block(int4,64,mxfp4,1)"),
        *(
            "block(e2m1finite,32,e8m0fnu,1)",
            "block(block(int4,2,fp16,1),64,fp16,1)",
            "nf4\n",
            "int4\n",
        ),
        *("nvfp5", "mxfp", "nf", "dynamic", "dynamic4", "bfloat16", "float16", "int4\x00"),
        *(None, 4, 4.0, b"int4", ["int4"], jq.INT4),
    ],
    ids=repr,
)
def test_a_bad_name_is_a_value_error(name):
    with pytest.raises(
        ValueError, match=r"no format is named|takes|is written|name is|numbers between"
    ):
        jq.parse(name)


def test_parse_is_the_only_door_for_strings():
    for call in (
        lambda: jq.Quantizer("int8"),
        lambda: jq.Block("int8", 32, jq.E8M0),
        lambda: jq.Block(jq.INT8, 32, "e8m0fnu"),
        lambda: jq.Int("8"),
        lambda: jq.Float("4", "3"),
        lambda: jq.Codebook("nf4"),
    ):
        with pytest.raises(ValueError, match=r"takes|format is"):
            call()


# ---- misuse ----


@pytest.mark.parametrize(
    "bits", [0, -1, 17, 1.5, 33, "4", True, None, [4], object(), np.float32(4)]
)
@pytest.mark.parametrize("levels", LEVELS)
def test_impossible_bits_are_named(bits, levels):
    with pytest.raises(
        ValueError, match=("2" if levels in ("symmetric", "full") else "1") + " to 16"
    ):
        jq.Int(bits, levels)


def test_other_misuse_of_ints_is_named():
    with pytest.raises(ValueError, match="2 to 16"):
        jq.Int(1)
    with pytest.raises(ValueError, match="levels"):
        jq.Int(4, "signed")
    with pytest.raises(ValueError, match="scalar"):
        jq.Int(jnp.arange(3))
    with pytest.raises(ValueError, match="scalar"):
        jq.Int(jnp.bool_(True))
    assert jq.Int(np.int64(4)) == jq.Int(4)


@pytest.mark.parametrize(
    "parameters",
    [(0, 3), (1, 3), (9, 3), (4, 0), (4, 11), (4.5, 3), ("4", 3), (4, None), (True, 3), (4, -1)],
)
@pytest.mark.parametrize("convention", ["ieee", "fn", "fnuz", "finite"])
def test_impossible_floats_are_named(parameters, convention):
    with pytest.raises(ValueError, match="Float takes"):
        jq.Float(*parameters, convention)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jq.Float(4, 3, "nan"), "convention"),
        (lambda: jq.Float(4, 3, None), "convention"),
        (lambda: jq.Float(8, 7, "finite"), "'ieee' only"),
        (lambda: jq.Float(8, 3, "fnuz"), "'ieee' only"),
        (lambda: jq.Float(4, 3, "fnu"), r"Float\(8, 0, 'fnu'\) only"),
        (lambda: jq.Float(jnp.int32(8), 0, "fnu"), r"only"),
        (lambda: jq.Float(jnp.arange(2), 3), "scalar"),
        (lambda: jq.Codebook((1.0,)), "2 to 65536"),
        (lambda: jq.Codebook(()), "2 to 65536"),
        (lambda: jq.Codebook((0.0, 0.0)), "rising"),
        (lambda: jq.Codebook((1.0, 0.0)), "rising"),
        (lambda: jq.Codebook((0.0, np.nan)), "rising"),
        (lambda: jq.Codebook((0.0, np.inf)), "finite"),
        (lambda: jq.Codebook((0.0, 1e39)), "finite"),
        (lambda: jq.Codebook((1.0, 1.0 + 1e-9)), "rising"),  # the same float32
        (lambda: jq.Codebook(4), "Codebook takes"),
        (lambda: jq.Codebook(jnp.ones((2, 2))), "one row"),
        (lambda: jq.Block(jq.E2M1, 0, jq.E8M0), "size"),
        (lambda: jq.Block(jq.E2M1, 1.5, jq.E8M0), "size"),
        (lambda: jq.Block(jq.E2M1, True, jq.E8M0), "size"),
        (lambda: jq.Block(jq.E2M1, 16, jq.E8M0, levels=3), "levels"),
        (lambda: jq.Block(jq.MXFP4, 16, jq.E8M0), "element"),
        (lambda: jq.Block(jq.E2M1, 16, jq.MXFP4), "scale"),
        (lambda: jq.Block(jq.Int, 16, jq.E8M0), "element"),
        (lambda: jq.Block(jq.E2M1, 16, jq.Float(jnp.int32(5), 2)), "fake_quant"),
        (lambda: formats.dynamic_map(1), "2 to 8"),
        (lambda: formats.dynamic_map(9), "2 to 8"),
        (lambda: formats.normal_float(1), "2 to 8"),
        (lambda: formats.normal_float("4"), "2 to 8"),
        (lambda: jq.Quantizer(jq.MXFP4, 16), "granularity"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

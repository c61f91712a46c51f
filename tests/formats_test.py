import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxquant as jq

REFERENCES = {
    jq.Float(4, 3, "nan"): ml_dtypes.float8_e4m3fn,
    jq.Float(4, 3): ml_dtypes.float8_e4m3,
    jq.Float(5, 2): ml_dtypes.float8_e5m2,
    jq.Float(3, 4): ml_dtypes.float8_e3m4,
    jq.Float(2, 1, "none"): ml_dtypes.float4_e2m1fn,
    jq.Float(2, 3, "none"): ml_dtypes.float6_e2m3fn,
    jq.Float(3, 2, "none"): ml_dtypes.float6_e3m2fn,
}


def finite_values(dtype) -> np.ndarray:
    bits = 8 if np.dtype(dtype).itemsize == 1 else 16
    if hasattr(ml_dtypes, "finfo"):
        bits = ml_dtypes.finfo(dtype).bits
    values = np.arange(2**bits).astype(np.uint8 if bits <= 8 else np.uint16).view(dtype)
    values = values.astype(np.float32)
    return np.unique(values[np.isfinite(values)])


@pytest.mark.parametrize("fmt", REFERENCES, ids=str)
def test_every_value_of_the_reference_is_on_the_grid(fmt):
    values = finite_values(REFERENCES[fmt])
    np.testing.assert_array_equal(fmt.round(jnp.array(values), jnp.round), values)
    assert fmt.max_value == values.max()


@pytest.mark.parametrize("fmt", REFERENCES, ids=str)
def test_rounding_agrees_with_the_reference_cast(fmt):
    rng = np.random.default_rng(0)
    values = finite_values(REFERENCES[fmt])
    midpoints = (values[1:] + values[:-1]) / 2
    spread = np.exp(rng.uniform(-12, np.log(fmt.max_value), 100_000)) * rng.choice([-1, 1], 100_000)
    x = np.concatenate([midpoints, spread, [0.0, -0.0]]).astype(np.float32)
    expected = x.astype(REFERENCES[fmt]).astype(np.float32)
    np.testing.assert_array_equal(fmt.round(jnp.array(x), jnp.round), expected)


def test_bfloat16_and_float16_are_floats_like_the_others():
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    for fmt, dtype in ((jq.BF16, jnp.bfloat16), (jq.FP16, jnp.float16)):
        expected = x.astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(fmt.round(jnp.array(x), jnp.round), expected)


def test_bfloat16_is_exact_down_to_its_smallest_normal_value():
    x = (np.linspace(1, 2, 1000) * 2.0 ** np.arange(-126, 127)[:, None]).astype(np.float32)
    expected = x.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(jq.BF16.round(jnp.array(x), jnp.round), expected)
    np.testing.assert_array_equal(jq.BF16.round(jnp.zeros(2), jnp.round), 0.0)


@pytest.mark.parametrize("bits", range(2, 17))
def test_int_grid_is_symmetric_and_saturates(bits):
    top = 2 ** (bits - 1) - 1
    grid = jnp.arange(-top, top + 1, dtype=jnp.float32)
    np.testing.assert_array_equal(jq.Int(bits).round(grid, jnp.round), grid)
    ends = jq.Int(bits).round(jnp.array([-1e9, 1e9]), jnp.round)
    np.testing.assert_array_equal(ends, [-top, top])
    assert np.iinfo(jq.Int(bits).dtype).max >= top


def test_traced_parameters_give_the_static_grid():
    x = jnp.linspace(-600, 600, 4001)
    for bits in range(2, 17):
        assert float(jq.Int(jnp.int32(bits)).max_value) == jq.Int(bits).max_value
        traced = jax.jit(lambda b, x: jq.Int(b).round(x, jnp.round))(jnp.float32(bits), x)
        np.testing.assert_array_equal(traced, jq.Int(bits).round(x, jnp.round))
    for e, m, reserved in ((4, 3, "nan"), (5, 2, "ieee"), (2, 1, "none"), (8, 7, "ieee")):
        at = jax.jit(lambda e, m, x, r=reserved: jq.Float(e, m, r).round(x, jnp.round))
        expected = jq.Float(e, m, reserved).round(x, jnp.round)
        np.testing.assert_array_equal(at(e, m, x), expected)


@pytest.mark.parametrize("bits", [0, -1, 1, 1.5, 33, "4", True, None, [4], object()])
def test_impossible_bits_are_named(bits):
    with pytest.raises(ValueError, match="2 to 16"):
        jq.Int(bits)


def test_formats_can_be_stacked_and_mapped_over():
    stacked = jax.tree.map(lambda *b: jnp.stack(b), *(jq.Int(jnp.float32(b)) for b in (3, 4, 8)))
    found = jax.vmap(lambda fmt: fmt.max_value)(stacked)
    np.testing.assert_array_equal(found, [3, 7, 127])


@pytest.mark.parametrize("parameters", [(0, 3), (9, 3), (4, 0), (4, 11), (4.5, 3)])
def test_impossible_floats_are_named(parameters):
    with pytest.raises(ValueError, match="Float takes"):
        jq.Float(*parameters)
    with pytest.raises(ValueError, match="reserved"):
        jq.Float(4, 3, "fn")
    with pytest.raises(ValueError, match="'ieee' only"):
        jq.Float(8, 7, "none")


def test_traced_and_unstorable_formats_have_no_array_type():
    with pytest.raises(ValueError, match="fake_quant"):
        jax.jit(lambda b: jq.quantize(jnp.ones(4), jq.Quantizer(jq.Int(b))).qvalue)(4)
    with pytest.raises(ValueError, match="no array type"):
        _ = jq.E2M1.dtype
    with pytest.raises(ValueError, match="scalar"):
        jq.Int(jnp.arange(3))


def test_formats_are_pytrees_whose_leaves_are_their_traced_parameters():
    assert jax.tree.leaves(jq.Int(4)) == []
    assert jax.tree.leaves(jq.Float(4, 3, "nan")) == []
    assert len(jax.tree.leaves(jq.Int(jnp.float32(4)))) == 1
    mixed = jq.Float(jnp.int32(4), 3, "nan")
    assert len(jax.tree.leaves(mixed)) == 1
    rebuilt = jax.tree.unflatten(jax.tree.structure(mixed), jax.tree.leaves(mixed))
    assert (rebuilt.mantissa_bits, rebuilt.reserved) == (3, "nan")
    assert hash(jq.Int(4)) == hash(jq.Int(4))

"""What is at the ends of float32, beyond it in float64, and of several types; parameters known beforehand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import calibration, estimators
from jaxquant.operations.ragged import RaggedDot

pytestmark = pytest.mark.exhaustive  # minutes, once in CI

TOP = float(np.finfo(np.float32).max)
DIMS = (((1,), (0,)), ((), ()))
RNG = np.random.default_rng(0)
QUANTIZERS = {
    "int8": jq.Quantizer(jq.INT8, "channel"),
    "e4m3": jq.Quantizer(jq.E4M3, "channel"),
    "nf4": jq.Quantizer(jq.NF4, 32),
    "mxfp4": jq.Quantizer(jq.MXFP4),
}


@pytest.fixture
def x64():
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


# ---- float64


@pytest.mark.first(1)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_float64_beyond_float32_saturates(name, x64):
    """As documented: as float32's largest, and what is too small for float32 as zero."""
    x = RNG.normal(size=(5, 64))
    x[0, 3], x[1, 3], x[2, 3], x[3] = 1e300, -1e39, TOP * (1 + 1e-9), 1e-300
    quantizer = QUANTIZERS[name]
    found = jq.fake_quant(jnp.array(x), quantizer)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, jq.dequantize(jq.quantize(jnp.array(x), quantizer)))
    clipped = np.clip(x, -TOP, TOP).astype(np.float32)
    np.testing.assert_array_equal(found, jq.fake_quant(jnp.array(clipped), quantizer))
    np.testing.assert_allclose(found[:3, 3], np.clip(x, -TOP, TOP)[:3, 3], rtol=1e-6)
    np.testing.assert_array_equal(found[3], 0)


def test_float64_inf_and_nan_stay_loud(x64):
    for bad in (np.inf, -np.inf, np.nan):
        x = np.ones((2, 64))
        x[0, 5] = bad
        found = jq.fake_quant(jnp.array(x), QUANTIZERS["int8"])
        assert jnp.isnan(found[0]).all()
        np.testing.assert_allclose(found[1], 1, rtol=1e-6)


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["w8a8", "int8_train", "fp8_train", "w4a16", "nf4", "mxfp8"])
def test_float64_products_beyond_float32_are_right(name, x64):
    """Operands within float32, sums and gradients beyond it."""
    x, w = jnp.full((4, 64), 1e30), jnp.full((64, 8), -1e30)
    y, pull = jax.vjp(lambda x, w: jq.recipe(name)(x, w, DIMS), x, w)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, -64e60, rtol=0.1)
    dx, dw = pull(jnp.full(y.shape, 1e10))
    np.testing.assert_allclose(dx, -8e40, rtol=0.1)
    np.testing.assert_allclose(dw, 4e40, rtol=0.1)
    assert (dx.dtype, dw.dtype) == (np.float64, np.float64)


# ---- float32's ends


@pytest.mark.first(2)
@pytest.mark.parametrize("fmt", [jq.INT8, jq.Int(4, "midrise"), jq.BINARY, jq.NF4], ids=str)
@pytest.mark.parametrize("estimator", [estimators.straight_through, estimators.clipped])
@pytest.mark.parametrize("find", [calibration.absmax, calibration.gaussian])
def test_a_rotation_near_the_top_is_finite(fmt, estimator, find):
    quantizer = jq.Quantizer(fmt, "channel", find, estimator=estimator, hadamard=32)
    signs = RNG.choice([-1, 1], (4, 64)).astype(np.float32)
    signs[0], signs[1, 5:] = 1, 0
    for size in (3e38, TOP):
        x = jnp.array(signs * np.float32(size))
        found, pull = jax.vjp(lambda x: jq.fake_quant(x, quantizer), x)
        np.testing.assert_array_equal(found, jq.dequantize(jq.quantize(x, quantizer)))
        assert jnp.isfinite(found).all()
        assert jnp.isfinite(pull(jnp.ones_like(x))[0]).all()
    # Where it fits, the size changes nothing.
    x = jnp.array(RNG.normal(size=(4, 64)), jnp.float32)
    unit = 2.0**124
    np.testing.assert_array_equal(
        jq.fake_quant(x * unit, quantizer) / unit, jq.fake_quant(x, quantizer)
    )


def test_the_rms_of_the_largest_is_right():
    x = jnp.array([[3e38, -3e38], [TOP, 0]], jnp.float32)
    found = np.asarray(
        calibration.rms(x, (1,))[:, 0], np.float64
    )  # 1e-38 would be flushed in float32
    np.testing.assert_allclose(found, [3e38, TOP / 2**0.5], rtol=1e-6)


def test_a_normals_range_at_the_top_is_finite():
    x = jnp.full((2, 64), TOP)
    found = jq.fake_quant(x, jq.Quantizer(jq.Int(4, "midrise"), calibration=calibration.gaussian))
    np.testing.assert_allclose(np.asarray(found, np.float64), TOP, rtol=1e-6)


# ---- types of results

TYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
RECIPES = [
    "int8_train",
    "fp8_train",
    "mxfp4",
    "nvfp4",
    "nf4",
    "quest4",
    "w8a8",
    "w4a16",
    "w4a16g32",
]


@pytest.mark.first(2)
@pytest.mark.parametrize("name", RECIPES)
def test_results_have_the_types_that_lax_gives(name):
    dot = jq.recipe(name)
    stored = dot.forward.rhs
    shape = (64, 64)
    for left, right in itertools.product(TYPES, TYPES):
        x, w = jax.ShapeDtypeStruct(shape, left), jax.ShapeDtypeStruct(shape, right)
        for preferred in (None, jnp.float32, jnp.bfloat16) if left != right else (None,):
            options = {"preferred_element_type": preferred}

            def of(dot, x, w, options=options):
                return dot(x, w, DIMS, **options)

            expected = jax.eval_shape(lambda *a, of=of: of(jax.lax.dot_general, *a), x, w).dtype
            found = {
                "dot": jax.eval_shape(lambda *a, of=of: of(dot, *a), x, w),
                "stored": jax.eval_shape(
                    lambda x, w, of=of: of(dot, x, jq.quantize(w, stored, 0)), x, w
                ),
            }
            assert {k: v.dtype for k, v in found.items()} == dict.fromkeys(found, expected)
        gradients = jax.eval_shape(
            jax.grad(lambda x, w: dot(x, w, DIMS).astype(jnp.float32).sum(), (0, 1)), x, w
        )
        assert [g.dtype for g in gradients] == [left, right]
        with jax.numpy_dtype_promotion("standard"):
            ours, theirs = (
                jax.eval_shape(lambda x, w, e=e: e("ab,bc->ac", x, w), x, w)
                for e in (lambda *a: jq.einsum(*a, dot), jnp.einsum)
            )
            assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("name", ["int8_train", "fp8_train", "w8a8"])
def test_ragged_results_have_the_types_that_lax_gives(name):
    dot = jq.recipe(name)
    ragged = RaggedDot(dot.forward, dot.dlhs, dot.drhs)
    for left, right in itertools.product(TYPES, TYPES):
        shapes = ((8, 64), left), ((2, 64, 8), right), ((2,), jnp.int32)
        arguments = [jax.ShapeDtypeStruct(*s) for s in shapes]
        expected, found = (jax.eval_shape(f, *arguments) for f in (jax.lax.ragged_dot, ragged))
        assert found.dtype == expected.dtype


def test_values_of_two_types_are_multiplied_as_exactly_as_lax_does():
    """The codebook's values keep the wider type's bits."""
    x = jnp.array(RNG.normal(size=(8, 64)), jnp.bfloat16)
    w = jnp.array(RNG.normal(size=(64, 8)), jnp.float32)
    found = jq.recipe("nf4")(x, w, DIMS)
    values = np.asarray(jq.fake_quant(w, jq.recipe("nf4").forward.rhs, 0), np.float64)
    expected = np.asarray(x.astype(jnp.float32), np.float64) @ values
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# ---- parameters whose numbers are known


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jq.Int(jnp.int32(0)), r"bits from 2 to 16.*Array\(0"),
        (lambda: jq.Int(jnp.int32(17)), r"bits from 2 to 16.*Array\(17"),
        (lambda: jq.Int(jnp.float32(0.5), "midrise"), "bits from 1 to 16"),
        (lambda: jq.Int(jnp.float32(jnp.nan)), "bits from 2 to 16"),
        (lambda: jq.Int(jnp.int32(1)), "bits from 2 to 16"),
        (lambda: jq.Float(jnp.int32(9), 3), "exponent_bits from 2 to 8"),
        (lambda: jq.Float(4, jnp.int32(0)), "mantissa_bits from 1 to 10"),
        (lambda: jq.Float(4, jnp.float32(2.5)), "a whole number"),
        (lambda: jq.Float(jnp.int32(8), 3, "fn"), "exponent_bits 8 with convention 'ieee' only"),
        (lambda: jq.Codebook(jnp.array([1.0, 0.0])), "rising values"),
        (lambda: jq.Codebook(jnp.array([0.0, 0.0, 1.0])), "rising values"),
        (lambda: jq.Codebook(jnp.array([0.0, jnp.nan])), "rising values"),
        (lambda: jq.Codebook(jnp.array([0.0, jnp.inf])), "rising values"),
    ],
)
def test_arrays_whose_numbers_are_known_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_arrays_whose_numbers_are_known_and_right_are_taken():
    for make in (
        lambda: jq.Int(jnp.int32(16)),
        lambda: jq.Int(jnp.float32(4.5)),
        lambda: jq.Int(jnp.int32(1), "midrise"),
        lambda: jq.Float(jnp.int32(8), jnp.int32(7)),
        lambda: jq.Codebook(jnp.array([-1.0, 0.0, 2.0], jnp.bfloat16)),
    ):
        assert len(jax.tree.leaves(make())) >= 1


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("make", "value"),
    [
        (jq.Int, jnp.int32(17)),
        (lambda bits: jq.Float(bits, 3), jnp.int32(1)),
        (jq.Codebook, jnp.array([1.0, 0.0])),
    ],
)
def test_nothing_raises_inside_jit(make, value):
    def apply(value):
        return jq.fake_quant(jnp.ones(4), jq.Quantizer(make(value)))

    for transform in (jax.jit, jax.vmap):
        argument = value[None] if transform is jax.vmap else value
        assert transform(apply)(argument).shape[-1] == 4

"""Products of a few rows with stored weights: their sums, their bits, and that no float weights are made."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.numerics.packing import nibble_words, nibbles, pack_bits
from jaxquant.operations.integers import values_in
from jaxquant.operations.product import product

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others

DIMS = (((1,), (0,)), ((), ()))
SHAPES = [(20, 8), (96, 13), (1408, 24)]  # in fours; a last byte that is not full; several sums


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def quantized(weight, dot, axes: int | tuple[int, ...] = 0) -> jq.QArray:
    """A weight as a product stores it."""
    assert dot.forward.rhs is not None
    return jq.quantize(weight, dot.forward.rhs, axes)


# ---- numbers


@pytest.mark.long
@pytest.mark.parametrize(("rows", "bits"), [(1, 2), (4, 4), (1, 8), (5, 4)])
def test_sums_and_equal_bits(rows, bits):
    """Against NumPy's sums; stored, packed and quantized within the program are the same to the bit."""
    dot = jq.recipe(f"w{bits}a16")
    run = jax.jit(lambda x, w: dot(x, w, DIMS))
    for terms, columns in SHAPES:
        x, weight = normal(rows, terms), normal(terms, columns, seed=1)
        stored = quantized(weight, dot)
        out = np.asarray(run(x, weight))
        np.testing.assert_array_equal(run(x, stored), out)
        np.testing.assert_array_equal(run(x, stored.pack()), out)
        exact = np.asarray(x, np.float64) @ np.asarray(jq.dequantize(stored), np.float64)
        sizes = np.abs(np.asarray(x, np.float64)) @ np.abs(jq.dequantize(stored))
        # Rounded at most once an addition or product, and there are fewer in a row than terms.
        assert np.all(np.abs(out - exact) <= terms * 2.0**-24 * sizes)


@pytest.mark.parametrize("fmt", [jq.Int(8, "unsigned"), jq.Int(4, "midrise"), jq.Int(3, "full")])
def test_every_kind_of_integer(fmt):
    dot = jq.DotGeneral(jq.Operands(None, jq.Quantizer(fmt, "channel"), "native"))
    x, weight = normal(2, 32), normal(32, 24, seed=1)
    stored = quantized(weight, dot)
    out = jax.jit(lambda x, w: dot(x, w, DIMS))(x, stored.pack())
    exact = np.asarray(x, np.float64) @ np.asarray(jq.dequantize(stored), np.float64)
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.first(1)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_rows_are_summed_in_float32(dtype):
    dot = jq.recipe("w4a16")
    x, weight = normal(1, 256).astype(dtype), normal(256, 16, seed=1).astype(dtype)
    stored = quantized(weight, dot)
    out = jax.jit(lambda x, w: dot(x, w, DIMS))(x, stored.pack())
    assert out.dtype == dtype
    integers = np.asarray(stored.qvalue.astype(jnp.int32), np.float64)
    exact = np.asarray(x, np.float64) @ integers * np.asarray(stored.scale, np.float64)
    np.testing.assert_array_equal(out, jnp.asarray(exact, jnp.float32).astype(dtype))


def test_more_axes_in_any_order():
    """Two axes summed over, which the left operand has the other way round, and two that stay."""
    dot = jq.recipe("w4a16")
    x, weight = normal(1, 8, 3, 4), normal(4, 8, 5, 6, seed=1)
    dims = (((3, 1), (0, 1)), ((), ()))
    stored = quantized(weight, dot, (0, 1))
    out = jax.jit(lambda x, w: dot(x, w, dims))(x, stored.pack())
    exact = np.einsum("abcd,dbef->acef", x, jq.dequantize(stored))
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.first(1)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_words_hold_every_code(bits):
    codes = jnp.arange(2**bits, dtype=jnp.uint8)
    row = jnp.concatenate([codes, codes[::-1], codes[:3]])
    found = nibbles(nibble_words(pack_bits(row, bits), bits, row.size)[..., None]).reshape(-1)
    signed = np.asarray(row, np.int32) - (np.asarray(row) >= 2 ** (bits - 1)) * 2**bits
    np.testing.assert_array_equal(found[: row.size], signed)


# ---- transformations


def test_gradients_of_one_row_are_those_of_the_usual_product():
    """Straight-through, of the quantized weight, whichever way the forward product takes."""
    dot = jq.recipe("w4a16")
    x, weight = normal(1, 64), normal(64, 32, seed=1)
    value, gradients = jax.jit(
        jax.value_and_grad(lambda x, w: jnp.sum(dot(x, w, DIMS) ** 2), (0, 1))
    )(x, weight)
    fake = jq.fake_quant(weight, dot.forward.rhs, 0)
    out = x @ fake
    np.testing.assert_allclose(value, jnp.sum(out**2), rtol=1e-5)
    np.testing.assert_allclose(gradients[0], 2 * out @ fake.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients[1], 2 * x.T @ out, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_under_vmap_and_scan():
    dot = jq.recipe("w4a16")
    x, weights = normal(3, 1, 32), normal(3, 32, 32, seed=1)
    stored = jax.vmap(lambda w: quantized(w, dot).pack())(weights)
    each = [dot(x[i], jax.tree.map(lambda a, i=i: a[i], stored), DIMS) for i in range(3)]
    mapped = jax.jit(jax.vmap(lambda x, w: dot(x, w, DIMS)))(x, stored)
    np.testing.assert_allclose(mapped, jnp.stack(each), rtol=1e-5, atol=1e-5)
    last, _ = jax.lax.scan(lambda x, w: (dot(x, w, DIMS), None), x[0], stored)
    expected = x[0]
    for i in range(3):
        expected = dot(expected, jax.tree.map(lambda a, i=i: a[i], stored), DIMS)
    np.testing.assert_allclose(last, expected, rtol=1e-4, atol=1e-4)


# ---- models


class Decoder(nnx.Module):
    """Linears of several kinds with elementwise work between them, as a decoder's step has."""

    def __init__(self, dtype, rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.norm = nnx.LayerNorm(64, **options)
        self.up = nnx.Linear(64, 96, **options)
        self.heads = nnx.LinearGeneral(96, (4, 13), **options)
        self.out = nnx.LinearGeneral((4, 13), 64, axis=(-2, -1), **options)
        self.head = nnx.Einsum("btd,dk->btk", (64, 50), (50,), **options)

    def __call__(self, x):
        y = self.heads(nnx.gelu(self.up(self.norm(x))))
        return self.head(x + self.out(y * jax.nn.sigmoid(y)))


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("tokens", "dtype", "recipe"),
    [
        (1, jnp.float32, "w8a16"),
        (4, jnp.float32, "w3a16"),
        (1, jnp.bfloat16, "w4a16"),
    ],
)
def test_frozen_logits_are_the_quantized_ones(tokens, dtype, recipe):
    with jax.numpy_dtype_promotion("standard"):
        model = jq.nnx.quantize(Decoder(dtype, nnx.Rngs(0)), {".*": recipe})
        run = nnx.jit(lambda model, x: model(x))
        x = normal(1, tokens, 64).astype(dtype)
        np.testing.assert_array_equal(run(jq.nnx.freeze(model), x), run(model, x))


# ---- what is computed


# Of the compiler that this was made for: jax 0.7.1's writes some of them out.
@pytest.mark.exhaustive
def test_few_rows_write_no_weights_in_floating_point():
    weight = normal(256, 512)
    for recipe in ("w8a16", "w4a16"):
        stored = quantized(weight, jq.recipe(recipe))
        stored = stored.pack() if recipe == "w4a16" else stored
        run = jax.jit(lambda x, w: product(x, w, DIMS))
        few, many = (run.lower(normal(n, 256), stored).compile().as_text() for n in (4, 5))
        assert few
        assert many
        assert _largest_written(few) <= 4 * 256 * 512 // 16, recipe
        assert "dot_general" not in few, recipe
        assert "dot_general" in many, recipe


@pytest.mark.long
def test_one_layers_words_are_held_at_a_time():
    dot, layers = jq.recipe("w4a16"), 8
    stored = [quantized(normal(256, 256, seed=i), dot).pack() for i in range(layers)]

    @jax.jit
    def run(x, stored):
        for weight in stored:
            x = jax.nn.gelu(dot(x, weight, DIMS))
        return x

    memory = run.lower(normal(1, 256), stored).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < layers // 2 * 256 * 256 // 2


def _largest_written(text: str) -> int:
    """Elements of the largest float32 array that a program's kernels write."""
    entry = text[text.index("ENTRY") :]
    written = re.findall(r"= f32\[([\d,]+)\]\S* (?:fusion|convert|multiply)\(", entry)
    return max((int(np.prod([int(n) for n in shape.split(",")])) for shape in written), default=0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(
    "fmt", [jq.INT4, jq.INT8, jq.Int(8, "unsigned"), jq.Int(7, "midrise"), jq.Int(3, "full")]
)
def test_a_direct_cast_has_the_bits_of_one_by_way_of_float32(fmt, dtype):
    stored = jq.quantize(normal(64, 32), jq.Quantizer(fmt, "channel"), axis=0)
    direct, by_way = values_in(stored, dtype), fmt.load(stored.qvalue).astype(dtype)
    np.testing.assert_array_equal(np.asarray(direct), np.asarray(by_way))
    assert direct.dtype == by_way.dtype

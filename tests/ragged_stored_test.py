"""Raw experts in few bits: `RaggedDot` multiplies stored weights, and a frozen mixture has the same bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.nnx.modules import read

RNG = np.random.default_rng(0)
ROWS, K, N, EXPERTS = 96, 256, 192, 4
LHS: Any = RNG.normal(size=(ROWS, K)).astype(np.float32)
RHS: Any = (RNG.normal(size=(EXPERTS, K, N)) / np.sqrt(K)).astype(np.float32)
SIZES: Any = np.array(
    [40, 0, 33, 20], np.int32
)  # one expert without rows, three rows without an expert
G: Any = RNG.normal(size=(ROWS, N)).astype(np.float32)
RECIPES = ["w8a8", "w4a8", "w8a16", "w4a16", "w4a16g16", "w4a8g128", "nf4", "nf4dq", "fp8_train"]
RECIPES += ["int8_train", "mxfp4", "nvfp4", "w8a8-token", "quest4"]
# Bits a weight with everything counted: codes, scales, and the table of a codebook.
BITS = {
    "w8a8": 8.13,
    "w4a16": 4.13,
    "w4a16g16": 6.01,
    "nf4": 4.51,
    "nf4dq": 4.13,
    "fp8_train": 8.01,
}


def operation(name: str) -> jq.RaggedDot:
    dot = jq.recipe(name)
    return jq.RaggedDot(dot.forward, dot.dlhs, dot.drhs)


def stored(name: str, packed: bool = True) -> jq.QArray:
    found = jq.quantize(jnp.array(RHS), jq.recipe(name).forward.rhs, 1)
    return found.pack() if packed else found


def exactly(lhs, rhs, sizes=SIZES) -> np.ndarray:
    """The product in float64, in NumPy."""
    out, start = np.zeros((lhs.shape[0], rhs.shape[2])), 0
    for weight, size in zip(np.asarray(rhs, np.float64), sizes, strict=True):
        rows = slice(start, start + size)
        out[rows] = np.asarray(lhs, np.float64)[rows] @ weight
        start += size
    return out


def inside(x) -> np.ndarray:
    return np.where(np.arange(len(x))[:, None] < SIZES.sum(), x, 0)


@pytest.mark.long
@pytest.mark.parametrize("name", RECIPES)
def test_stored_experts_are_those_that_the_product_quantizes(name):
    dot, lhs = jq.recipe(name), inside(LHS)
    run = jax.jit(operation(name))
    found = run(LHS, stored(name), SIZES)
    np.testing.assert_array_equal(found, run(LHS, jnp.array(RHS), SIZES))
    # Of the values that both stand for, in NumPy, and of the numbers themselves.
    left = lhs if dot.forward.lhs is None else jq.fake_quant(jnp.array(lhs), dot.forward.lhs, 1)
    values = jq.dequantize(jq.quantize(jnp.array(RHS), dot.forward.rhs, 1))
    expected = exactly(left, values)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    error = np.linalg.norm(found - exactly(LHS, RHS)) / np.linalg.norm(exactly(LHS, RHS))
    least, most = (
        (0.001, 0.02) if name in ("w8a16", "w8a8-token", "w8a8", "int8_train") else (0.02, 0.2)
    )
    assert least < error < most


def test_eight_bits_are_the_integers_product():
    right = stored("w8a8", packed=False)
    left = jq.quantize(jnp.array(inside(LHS)), jq.recipe("w8a8").forward.lhs, 1)
    sums, start = np.zeros((ROWS, N), np.int64), 0
    scales = np.ones((ROWS, N), np.float32)
    for e, size in enumerate(SIZES):
        rows = slice(start, start + size)
        sums[rows] = np.asarray(left.qvalue[rows], np.int64) @ np.asarray(right.qvalue[e], np.int64)
        scales[rows] = right.scale[e]
        start += size
    expected = sums.astype(np.float32) * np.asarray(left.scale) * scales
    text = jax.jit(operation("w8a8")).lower(LHS, right, SIZES).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert all("xi8>" in line and "xi32>" in line for line in lines)
    np.testing.assert_allclose(operation("w8a8")(LHS, right, SIZES), expected, rtol=1e-6)


@pytest.mark.first(4)
@pytest.mark.parametrize("name", RECIPES)
def test_activations_before_stored_experts_are_trained(name):
    """As over weights that are quantized in the call."""

    def pull(rhs):
        dot = operation(name)
        return jax.jit(lambda x: jax.vjp(lambda x: dot(x, rhs, SIZES), x)[1](G)[0])

    found = pull(stored(name))(LHS)
    np.testing.assert_allclose(found, pull(jnp.array(RHS))(LHS), rtol=1e-5, atol=1e-5)
    exact = exactly(inside(G), np.swapaxes(RHS, 1, 2))
    assert np.linalg.norm(found - exact) < 0.2 * np.linalg.norm(exact)


@pytest.mark.long
def test_half_precision_rows():
    for name in ("w4a16g16", "nf4", "w4a16", "w8a8"):
        rows = jnp.array(LHS, jnp.bfloat16)
        weights = jnp.array(RHS, jnp.bfloat16)
        held = jq.quantize(weights, jq.recipe(name).forward.rhs, 1).pack()
        run = jax.jit(operation(name))
        assert run(rows, held, SIZES).dtype == jnp.bfloat16
        np.testing.assert_array_equal(run(rows, held, SIZES), run(rows, weights, SIZES))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: operation("w8a8")(LHS, stored("w4a16"), SIZES), "rhs is stored as int4"),
        (
            lambda: jq.RaggedDot(jq.Operands(jq.Quantizer(jq.INT8), None, "native"))(
                LHS, stored("nf4"), SIZES
            ),
            r"do not vary along k; got scales \(4, 4, 192\) of \(4, 256, 192\)",
        ),
        (
            lambda: jq.RaggedDot(
                drhs=None, dlhs=jq.Operands(jq.Quantizer(jq.INT8), None, "native")
            )(LHS, stored("w4a16g16"), SIZES),
            "do not vary along k",
        ),
        (lambda: operation("mxfp8_train"), "rhs of dlhs|lhs of dlhs"),
    ],
)
def test_what_cannot_be_multiplied_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Mixture(nnx.Module):
    """Tokens sorted by their expert, and raw weights by groups of rows."""

    def __init__(self, rngs, transposed=False):
        self.table = nnx.Embed(64, K, rngs=rngs)
        self.router = nnx.Linear(K, EXPERTS, use_bias=False, rngs=rngs)
        shape = (EXPERTS, N, K) if transposed else (EXPERTS, K, N)
        self.up = nnx.Param(jax.random.normal(rngs.params(), shape) / K**0.5)
        self.down = nnx.Param(jax.random.normal(rngs.params(), (EXPERTS, N, K)) / N**0.5)
        self.bias = nnx.Param(jnp.zeros(N))
        self.transposed = transposed

    def __call__(self, tokens):
        x = self.table(tokens).reshape(-1, K)
        scores = self.router(x)
        expert = jnp.argmax(scores, -1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=EXPERTS).astype(jnp.int32)
        up = jnp.swapaxes(self.up[...], 1, 2) if self.transposed else self.up[...]
        y = nnx.relu(jax.lax.ragged_dot(x[order], up, sizes) + self.bias[...])
        y = jax.lax.ragged_dot(y, self.down[...], sizes)[jnp.argsort(order)]
        return self.table.attend(x + y * jax.nn.softmax(scores).max(-1, keepdims=True))


TOKENS = jnp.arange(48).reshape(2, 24) % 64


def loss(model):
    logits, targets = model(TOKENS), TOKENS.reshape(-1) // 2
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def run(model, tokens):
    return nnx.jit(lambda model, tokens: model(tokens))(model, tokens)


TRAINED = ["w8a8", "w4a16g16", "int8_train", "fp8_train", "nf4"]
SHORT = [("w8a8", False), ("nf4", False), ("w4a16g16", True)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "transposed"),
    [
        pytest.param(name, turned, marks=() if (name, turned) in SHORT else pytest.mark.long)
        for name in TRAINED
        for turned in (False, True)
    ],
)
def test_a_mixture_of_raw_experts_goes_all_the_way(name, transposed, tmp_path):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        model = Mixture(nnx.Rngs(0), transposed)
        low = jq.nnx.quantize(model, {".*": name})
        exact = run(Mixture(nnx.Rngs(0), transposed), TOKENS)
        error = jnp.linalg.norm(run(low, TOKENS) - exact) / jnp.linalg.norm(exact)
        assert 0 < error < 0.3
        optimizer = nnx.Optimizer(low, optax.adam(1e-3), wrt=nnx.Param)

        @nnx.jit
        def step(low, optimizer):
            value, gradients = nnx.value_and_grad(loss)(low)
            optimizer.update(low, gradients)
            return value

        losses = [float(step(low, optimizer)) for _ in range(20)]
        assert losses[-1] < 0.9 * losses[0]
        frozen = jq.nnx.freeze(low, TOKENS)
        found = run(frozen, TOKENS)
        np.testing.assert_array_equal(found, run(low, TOKENS))
        jq.nnx.save(tmp_path / "model", frozen)
        loaded = jq.nnx.load(tmp_path / "model", Mixture(nnx.Rngs(1), transposed))
        np.testing.assert_array_equal(run(loaded, TOKENS), found)
        program = jq.serving.load(jq.serving.export(frozen, TOKENS))
        np.testing.assert_array_equal(program(TOKENS), found)
        table = jq.nnx.coverage(model, {".*": name}, TOKENS)
        assert table.quantized == 1
        for weight in (read(frozen.up), read(frozen.down)):
            assert weight.bits_per_element < {"int8_train": 8.13, **BITS}[name] + 0.1


def test_bits_are_what_is_stored():
    for name, bits in BITS.items():
        held = stored(name, packed=name != "fp8_train")
        assert held.bits_per_element == pytest.approx(bits, abs=0.01)

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import rounding

MATMUL = (((1,), (0,)), ((), ()))
RNG = np.random.default_rng(0)
LHS = jnp.array(RNG.normal(size=(8, 64)), jnp.float32)
RHS = jnp.array(RNG.normal(size=(64, 16)), jnp.float32)


def product(lhs, rhs, arithmetic) -> jq.DotGeneral:
    return jq.DotGeneral(jq.Operands(lhs, rhs, arithmetic))


@st.composite
def products(draw):
    """Operands of any rank with their dimension numbers, as lax takes them."""
    sizes = st.sampled_from([1, 3, 4])
    batch, contract = (draw(st.lists(sizes, max_size=2)) for _ in range(2))
    contract = contract or [3]
    operands, dims = [], []
    for _ in range(2):
        free = draw(st.lists(sizes, max_size=2))
        shape = batch + contract + free
        order = draw(st.permutations(range(len(shape))))
        where = [list(order).index(i) for i in range(len(shape))]
        shape = [shape[i] for i in order]
        dims.append((where[len(batch) : len(batch) + len(contract)], where[: len(batch)]))
        seed = draw(st.integers(0, 99))
        operands.append(jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32))
    (lhs_contract, lhs_batch), (rhs_contract, rhs_batch) = dims
    return *operands, ((lhs_contract, rhs_contract), (lhs_batch, rhs_batch))


@hypothesis.given(products(), st.sampled_from(["tensor", "channel"]), st.integers(2, 8))
@hypothesis.settings(max_examples=20, deadline=None)
def test_native_equals_simulated_to_accumulation_error(operands, granularity, bits):
    lhs, rhs, dims = operands
    quantizer = jq.Quantizer(jq.Int(bits), granularity)
    native = product(quantizer, quantizer, "native")(lhs, rhs, dims)
    simulated = product(quantizer, quantizer, "simulated")(lhs, rhs, dims)
    scale = np.abs(lhs).max() * np.abs(rhs).max() * 25
    np.testing.assert_allclose(native, simulated, rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_native_product_is_numpys_integer_product(granularity):
    quantizer = jq.Quantizer(jq.INT8, granularity)
    qlhs, qrhs = jq.quantize(LHS, quantizer, 1), jq.quantize(RHS, quantizer, 0)
    integers = np.asarray(qlhs.qvalue, np.int32) @ np.asarray(qrhs.qvalue, np.int32)
    expected = integers.astype(np.float32) * np.asarray(qlhs.scale) * np.asarray(qrhs.scale)
    found = product(quantizer, quantizer, "native")(LHS, RHS, MATMUL)
    np.testing.assert_array_equal(found, expected)


def test_native_multiplies_eight_bit_operands():
    quantizer = jq.Quantizer(jq.INT8)
    dot = product(quantizer, quantizer, "native")
    text = jax.jit(lambda a, b: dot(a, b, MATMUL)).lower(LHS, RHS).as_text()
    (line,) = [line for line in text.splitlines() if "dot_general" in line]
    assert "(tensor<8x64xi8>, tensor<64x16xi8>) -> tensor<8x16xi32>" in line


@pytest.mark.parametrize("arithmetic", ["simulated", "native"])
def test_gradients_are_those_of_the_quantized_operands(arithmetic):
    quantizer = jq.Quantizer(jq.INT4, "channel")
    dot = product(quantizer, quantizer, arithmetic)
    g = jnp.array(RNG.normal(size=(8, 16)), jnp.float32)
    _, pull = jax.vjp(lambda a, b: dot(a, b, MATMUL), LHS, RHS)
    dlhs, drhs = pull(g)
    np.testing.assert_allclose(dlhs, g @ jq.fake_quant(RHS, quantizer, 0).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(drhs, jq.fake_quant(LHS, quantizer, 1).T @ g, rtol=1e-5, atol=1e-5)


def test_native_keeps_eight_bit_residuals():
    quantizer = jq.Quantizer(jq.INT8)
    dot = product(quantizer, quantizer, "native")
    _, pull = jax.vjp(lambda a, b: dot(a, b, MATMUL), LHS, RHS)
    saved = [leaf.dtype for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) > 1]
    assert saved == [jnp.int8, jnp.int8]


def test_accumulation_cannot_overflow():
    assert jq.recipe("w8a8")(jnp.ones((1, 133_000)), jnp.ones((133_000, 1)), MATMUL) == 133_000
    with pytest.raises(ValueError, match=r"134000 terms.*overflow int32"):
        jq.recipe("w8a8")(jnp.ones((1, 134_000)), jnp.ones((134_000, 1)), MATMUL)


def test_nan_is_loud_in_native_arithmetic():
    lhs = jnp.ones((2, 4)).at[0, 1].set(jnp.nan)
    assert jnp.isnan(jq.recipe("w8a8")(lhs, jnp.ones((4, 2)), MATMUL)).all()


def test_signature_is_laxs():
    dot = jq.recipe("w8a8")
    assert dot(LHS, RHS, MATMUL, preferred_element_type=jnp.bfloat16).dtype == jnp.bfloat16
    assert dot(LHS.astype(jnp.bfloat16), RHS.astype(jnp.bfloat16), MATMUL).dtype == jnp.bfloat16
    assert dot(LHS, RHS, [[[1], [0]], [[], []]], precision="highest", out_sharding=None).shape == (
        8,
        16,
    )
    plain = jq.DotGeneral()(LHS, RHS, MATMUL)
    np.testing.assert_array_equal(plain, jax.lax.dot_general(LHS, RHS, MATMUL))
    assert hash(jq.recipe("w8a8")) == hash(jq.recipe("w8a8"))
    assert jq.recipe("w8a8") == jq.recipe("w8a8")


def test_bits_are_data_in_a_simulated_product():
    traces = []

    @jax.jit
    def run(bits):
        traces.append(bits)
        quantizer = jq.Quantizer(jq.Int(bits), "channel")
        return product(quantizer, quantizer, "simulated")(LHS, RHS, MATMUL)

    for bits in range(2, 10):
        fixed = jq.Quantizer(jq.Int(bits), "channel")
        expected = product(fixed, fixed, "simulated")(LHS, RHS, MATMUL)
        np.testing.assert_allclose(run(jnp.float32(bits)), expected, rtol=1e-6, atol=1e-6)
    assert len(traces) == 1


INT8 = jq.Quantizer(jq.INT8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jq.Operands(arithmetic="fast"), "simulated.*native"),
        (lambda: jq.Operands(INT8, None, "native"), "rhs"),
        (lambda: jq.Operands(jq.INT8), "lhs"),
        (lambda: jq.Operands(INT8, jq.Quantizer(jq.Int(12)), "native"), "at most 8 bits"),
        (lambda: jq.Operands(INT8, jq.Quantizer(jq.E4M3), "native"), "at most 8 bits"),
        (lambda: jq.Operands(INT8, jq.Quantizer(jq.INT8, 32), "native"), "blocks of 32"),
        (lambda: jq.Operands(jq.Quantizer(jq.INT8, rounding=rounding.stochastic)), "stochastic"),
        (lambda: jq.DotGeneral(INT8), "Operands"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

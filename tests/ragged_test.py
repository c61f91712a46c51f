import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import rounding
from jaxquant.operations.ragged import RaggedDot

MATMUL = (((1,), (0,)), ((), ()))
RNG = np.random.default_rng(0)
LHS = jnp.array(RNG.normal(size=(9, 16)), jnp.float32)
RHS = jnp.array(RNG.normal(size=(3, 16, 5)), jnp.float32)
G = jnp.array(RNG.normal(size=(9, 5)), jnp.float32)
# Groups of one length, an empty group, rows left over, and nothing at all.
GROUPS = [(4, 0, 5), (2, 3, 1), (0, 0, 0)]

CHANNEL, TENSOR = jq.Quantizer(jq.INT8, "channel"), jq.Quantizer(jq.INT8)
STOCHASTIC = jq.Quantizer(jq.INT8, "channel", rounding=rounding.stochastic)


def native(quantizer=CHANNEL, gradient=None) -> RaggedDot:
    return RaggedDot(jq.Operands(quantizer, quantizer, "native"), gradient, gradient)


def slices(sizes):
    ends = np.cumsum([0, *sizes])
    return [slice(i, j) for i, j in itertools.pairwise(ends)]


def by_group(lhs, rhs, sizes, dot):
    """The product of each group by itself, zeros for the rows left over."""
    out = np.zeros((lhs.shape[0], rhs.shape[2]), np.float32)
    for group, rows in enumerate(slices(sizes)):
        if rows.stop > rows.start:
            out[rows] = dot(lhs[rows], rhs[group], MATMUL)
    return out


def gradients(dot, sizes, lhs=LHS, rhs=RHS, g=G):
    _, pull = jax.vjp(lambda a, b: dot(a, b, jnp.array(sizes)), lhs, rhs)
    return pull(g)


@pytest.mark.first(1)
@pytest.mark.parametrize("sizes", GROUPS)
def test_native_is_the_groups_products(sizes):
    found = native()(LHS, RHS, jnp.array(sizes))
    dot = jq.DotGeneral(jq.Operands(CHANNEL, CHANNEL, "native"))
    np.testing.assert_array_equal(found, by_group(LHS, RHS, sizes, dot))


def test_weights_only_and_one_scale_for_all():
    sizes = (4, 0, 5)
    weights = jq.DotGeneral(jq.Operands(None, CHANNEL, "native"))
    found = RaggedDot(weights.forward)(LHS, RHS, jnp.array(sizes))
    np.testing.assert_allclose(found, by_group(LHS, RHS, sizes, weights), rtol=1e-5, atol=1e-6)
    lhs, rhs = jq.fake_quant(LHS, TENSOR), jq.fake_quant(RHS, TENSOR)
    expected = by_group(lhs, rhs, sizes, jax.lax.dot_general)
    found = native(TENSOR)(LHS, RHS, jnp.array(sizes))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", GROUPS)
@pytest.mark.parametrize("arithmetic", ["simulated", "native"])
def test_float_gradients_are_those_of_the_quantized_operands(sizes, arithmetic):
    dot = RaggedDot(jq.Operands(CHANNEL, CHANNEL, arithmetic))
    lhs, rhs = jq.fake_quant(LHS, CHANNEL, 1), jq.fake_quant(RHS, CHANNEL, 1)
    expected = gradients(jax.lax.ragged_dot, sizes, lhs, rhs)
    for found, wanted in zip(gradients(dot, sizes), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("sizes", GROUPS)
def test_native_gradients_are_integer_products_with_carried_scales(sizes):
    dlhs, drhs = gradients(native(CHANNEL, jq.Operands(CHANNEL, None, "native")), sizes)
    inside = np.arange(9)[:, None] < sum(sizes)
    lhs, g = np.where(inside, LHS, 0), np.where(inside, G, 0)
    left, right = jq.quantize(jnp.array(lhs), CHANNEL, 1), jq.quantize(RHS, CHANNEL, 1)
    expected_lhs, expected_rhs = np.zeros_like(LHS), np.zeros_like(RHS)
    columns = jq.quantize(jnp.array(g * np.asarray(left.scale)), CHANNEL, 0)
    for group, rows in enumerate(slices(sizes)):
        carried = jq.quantize(jnp.array(g[rows] * np.asarray(right.scale[group])), CHANNEL, 1)
        q = np.asarray(carried.qvalue, np.int64) @ np.asarray(right.qvalue[group], np.int64).T
        expected_lhs[rows] = q.astype(np.float32) * np.asarray(carried.scale)
        q = np.asarray(left.qvalue[rows], np.int64).T @ np.asarray(columns.qvalue[rows], np.int64)
        expected_rhs[group] = q.astype(np.float32) * np.asarray(columns.scale)
    np.testing.assert_array_equal(dlhs, expected_lhs)
    np.testing.assert_array_equal(drhs, expected_rhs)


@pytest.mark.parametrize("arithmetic", ["simulated", "native"])
def test_gradients_with_operands_quantized_anew(arithmetic):
    sizes, backward = (4, 0, 4), jq.Operands(CHANNEL, CHANNEL, arithmetic)
    dlhs, drhs = gradients(RaggedDot(jq.Operands(), backward, backward), sizes)
    inside = np.arange(9)[:, None] < sum(sizes)
    g = jnp.where(inside, G, 0)
    rhs = jq.fake_quant(RHS, CHANNEL, 2)
    lhs = jq.fake_quant(jnp.where(inside, LHS, 0), CHANNEL, 0)
    expected, _ = gradients(jax.lax.ragged_dot, sizes, LHS, rhs, jq.fake_quant(g, CHANNEL, 1))
    np.testing.assert_allclose(dlhs, expected, rtol=1e-5, atol=1e-5)
    _, expected = gradients(jax.lax.ragged_dot, sizes, lhs, RHS, jq.fake_quant(g, CHANNEL, 0))
    np.testing.assert_allclose(drhs, expected, rtol=1e-5, atol=1e-5)


def test_rows_left_over_take_no_part():
    sizes = (2, 3, 1)
    dot = native(TENSOR, jq.Operands(TENSOR, None, "native"))
    junk = LHS.at[7].set(jnp.inf), RHS, G.at[8].set(jnp.nan)
    clean = LHS.at[6:].set(0), RHS, G.at[6:].set(0)
    np.testing.assert_array_equal(
        dot(*junk[:2], jnp.array(sizes)), dot(*clean[:2], jnp.array(sizes))
    )
    for found, wanted in zip(
        gradients(dot, sizes, *junk), gradients(dot, sizes, *clean), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_nan_is_loud_in_its_group():
    out = native()(LHS, RHS.at[1, 0, 2].set(jnp.nan), jnp.array([2, 3, 1]))
    expected = np.zeros((9, 5), bool)
    expected[2:5, 2] = True
    np.testing.assert_array_equal(jnp.isnan(out), expected)


@pytest.mark.parametrize("quantizer", [CHANNEL, STOCHASTIC])
def test_operands_and_residuals_have_eight_bits(quantizer):
    dot = native(CHANNEL, jq.Operands(quantizer, None, "native"))
    _, pull = jax.vjp(lambda a, b: dot(a, b, jnp.array([4, 0, 5])), LHS, RHS)
    saved = {leaf.shape: leaf.dtype for leaf in jax.tree.leaves(pull) if hasattr(leaf, "dtype")}
    assert (saved[LHS.shape], saved[RHS.shape]) == (jnp.int8, jnp.int8)

    def step(sizes):
        out, pull = jax.vjp(lambda a, b: dot(a, b, sizes), LHS, RHS)
        return out, *pull(G)

    run, sizes = jax.jit(step), jnp.array([4, 0, 5])
    text = run.lower(sizes).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 3
    assert all(line.count("xi8>") == 2 and "xi32>" in line for line in products)
    for first, again in zip(run(sizes), run(sizes), strict=True):
        np.testing.assert_array_equal(first, again)


def test_types_and_hashes():
    dot = native()
    half = dot(LHS.astype(jnp.bfloat16), RHS.astype(jnp.bfloat16), jnp.array([4, 0, 5]))
    assert half.dtype == jnp.bfloat16
    train = native(CHANNEL, jq.Operands(CHANNEL, None, "native"))
    operands = (LHS.astype(jnp.bfloat16), RHS.astype(jnp.bfloat16), G.astype(jnp.bfloat16))
    assert {x.dtype for x in gradients(train, (4, 0, 5), *operands)} == {jnp.dtype(jnp.bfloat16)}
    sizes = jnp.array([4, 0, 5])
    assert dot(LHS, RHS, sizes, preferred_element_type=jnp.bfloat16).dtype == jnp.bfloat16
    assert hash(dot) == hash(native())
    np.testing.assert_array_equal(RaggedDot()(LHS, RHS, sizes), jax.lax.ragged_dot(LHS, RHS, sizes))
    float8 = RaggedDot(jq.Operands(*[jq.Quantizer(jq.E4M3)] * 2, "native"))
    simulated = RaggedDot(jq.Operands(*[jq.Quantizer(jq.E4M3)] * 2))
    expected = simulated(LHS, RHS, sizes)
    np.testing.assert_allclose(float8(LHS, RHS, sizes), expected, rtol=1e-5, atol=1e-5)


def test_accumulation_cannot_overflow():
    with pytest.raises(ValueError, match=r"134000 terms.*overflow int32"):
        native()(jnp.ones((1, 134_000)), jnp.ones((1, 134_000, 1)), jnp.array([1]))


SIZES = jnp.array([4, 0, 5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RaggedDot(CHANNEL), "Operands"),
        (lambda: native(jq.Quantizer(jq.INT8, 8)), "lhs of forward.*8"),
        (
            lambda: RaggedDot(jq.Operands(), jq.Operands(None, jq.Quantizer(jq.MXFP8))),
            "rhs of dlhs",
        ),
        (lambda: native(jq.Quantizer(jq.INT8, hadamard=8)), "hadamard 8"),
        (lambda: native(jq.Quantizer(jq.Int(8, "unsigned"))), "zero point"),
        (
            lambda: native(jq.Quantizer(jq.INT8, calibration=jq.calibration.minmax))(
                LHS, RHS, SIZES
            ),
            "zero point",
        ),
        (lambda: native()(LHS, RHS, SIZES, group_offset=jnp.array([0])), "group_offset"),
        (lambda: native()(LHS[0], RHS, SIZES), r"lhs.*\(m, k\).*\(16,\)"),
        (lambda: native()(LHS, RHS[0], SIZES), r"rhs.*\(g, k, n\)"),
        (lambda: native()(LHS, RHS[:2], SIZES), "agree"),
        (lambda: native()(LHS, RHS, jnp.ones(3)), "integers.*float32"),
        (lambda: native()(jq.quantize(LHS, CHANNEL), RHS, SIZES), "lhs.*QArray"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

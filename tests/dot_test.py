import dataclasses
import functools
import os
import re
import subprocess
import sys

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import calibration, estimators, rounding
from jaxquant.operations.integers import integer_dot
from jaxquant.operations.product import product as multiply

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


def numpy_product(lhs, rhs, dims) -> np.ndarray:
    """The product by NumPy, in the types of its operands."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dims
    letters = iter("abcdefghijklmnop")
    names = [next(letters) for _ in range(lhs.ndim)]
    paired = dict(zip((*rhs_contract, *rhs_batch), (*lhs_contract, *lhs_batch), strict=True))
    other = [names[paired[a]] if a in paired else next(letters) for a in range(rhs.ndim)]
    free = [n for a, n in enumerate(names) if a not in (*lhs_contract, *lhs_batch)]
    out = [names[a] for a in lhs_batch] + free + [n for n in other if n not in names]
    return np.einsum(f"{''.join(names)},{''.join(other)}->{''.join(out)}", lhs, rhs)


def integers(x, seed=0) -> jax.Array:
    """Integers of ±127 in x's shape, 127 among them, so that their scale is 1."""
    values = np.random.default_rng(seed).integers(-127, 128, x.shape).astype(np.float32)
    values.flat[0] = 127
    return jnp.array(values)


@pytest.mark.exhaustive
@pytest.mark.long
@hypothesis.given(products(), st.integers(0, 99))
@hypothesis.settings(max_examples=25, deadline=None)
def test_integer_products_are_numpys_forward_and_in_both_gradients(operands, seed):
    lhs, rhs, dims = operands
    lhs, rhs = integers(lhs, seed), integers(rhs, seed + 1)
    int8 = jq.Quantizer(jq.INT8)
    gradient = jq.Operands(int8, None, "native")
    dot = jq.DotGeneral(jq.Operands(int8, int8, "native"), gradient, gradient)
    shape = jax.eval_shape(lambda a, b: jax.lax.dot_general(a, b, dims), lhs, rhs)
    g = integers(shape, seed + 2)

    def both_ways(dot_general, lhs, rhs, g):
        out, pull = jax.vjp(lambda a, b: dot_general(a, b, dims), lhs, rhs)
        return out, *pull(g)

    out, dlhs, drhs = jax.jit(functools.partial(both_ways, dot))(lhs, rhs, g)
    int32 = [np.asarray(x, np.int32) for x in (lhs, rhs, g)]
    np.testing.assert_array_equal(out, numpy_product(int32[0], int32[1], dims))
    # The transposes of NumPy's product itself, by its linearity in each operand.
    highest = functools.partial(jax.lax.dot_general, precision="highest")
    _, *expected = jax.jit(functools.partial(both_ways, highest))(lhs, rhs, g)
    for found, float_product in zip((dlhs, drhs), expected, strict=True):
        assert np.abs(float_product).max() < 2**24  # where float32 counts exactly
        np.testing.assert_array_equal(found, float_product)
    found = integer_dot(lhs.astype(jnp.int8), rhs.astype(jnp.int8), dims)
    np.testing.assert_array_equal(found, numpy_product(int32[0], int32[1], dims))


def test_integer_products_are_exact_where_float32_would_not_be():
    rng = np.random.default_rng(0)
    lhs, rhs = (jnp.array(rng.integers(100, 128, s), jnp.int8) for s in ((4001, 3), (4001, 5)))
    found = integer_dot(lhs, rhs, (((0,), (0,)), ((), ())))
    expected = np.asarray(lhs, np.int64).T @ np.asarray(rhs, np.int64)
    assert expected.max() > 2**24
    np.testing.assert_array_equal(found, expected)


@pytest.mark.exhaustive
@pytest.mark.long
@hypothesis.given(products(), st.sampled_from(["tensor", "channel"]), st.integers(2, 8))
@hypothesis.settings(max_examples=12, deadline=None)
def test_native_equals_simulated_to_accumulation_error(operands, granularity, bits):
    lhs, rhs, dims = operands
    quantizer = jq.Quantizer(jq.Int(bits), granularity)
    native = product(quantizer, quantizer, "native")(lhs, rhs, dims)
    simulated = product(quantizer, quantizer, "simulated")(lhs, rhs, dims)
    scale = np.abs(lhs).max() * np.abs(rhs).max() * 25
    np.testing.assert_allclose(native, simulated, rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.first(1)
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


LHS3 = jnp.array(RNG.normal(size=(2, 32, 64)), jnp.float32)
RHS3 = jnp.array(RNG.normal(size=(64, 96)), jnp.float32)
DIMS3 = (((2,), (0,)), ((), ()))
ALL_NATIVE = {
    "int8": jq.recipe("int8_train"),
    "fp8": jq.recipe("fp8_train"),
    "mxfp8": jq.recipe("mxfp8_train"),
    "w4a8": jq.recipe("w4a8"),
    "w8a8": jq.recipe("w8a8"),
    "asymmetric": jq.DotGeneral(
        jq.Operands(
            jq.Quantizer(jq.Int(8, "unsigned"), "channel", calibration.minmax),
            jq.Quantizer(jq.Int(4, "full"), "channel", calibration.minmax),
            "native",
        )
    ),
    "midrise": jq.DotGeneral(
        jq.Operands(*[jq.Quantizer(jq.Int(3, "midrise"), "channel")] * 2, "native")
    ),
    "blocks": jq.DotGeneral(
        jq.Operands(jq.Quantizer(jq.INT8, 32), jq.Quantizer(jq.INT4, 16), "native")
    ),
    "tiles": jq.DotGeneral(
        jq.Operands(jq.Quantizer(jq.INT8, "channel"), jq.Quantizer(jq.INT8, (16, 8)), "native")
    ),
    "MXFP8": jq.DotGeneral(jq.Operands(*[jq.Quantizer(jq.MXFP8)] * 2, "native")),
    "rotated": jq.DotGeneral(
        jq.Operands(*[jq.Quantizer(jq.INT8, "channel", hadamard=32)] * 2, "native")
    ),
    "weights alone": jq.recipe("w4a16"),
    "weights in blocks": jq.recipe("w4a16g32"),
    "nf4": jq.recipe("nf4"),
    "activations alone": jq.DotGeneral(jq.Operands(jq.Quantizer(jq.INT8), None, "native")),
}


@functools.partial(jax.jit, static_argnums=0)
def run(dot: jq.DotGeneral, lhs, rhs, gradient):
    """A product and its gradients."""
    out, pull = jax.vjp(lambda a, b: dot(a, b, DIMS3), lhs, rhs)
    return out, *pull(gradient)


def simulated(dot: jq.DotGeneral) -> jq.DotGeneral:
    """The same products, multiplied in float; gradients rounded to nearest."""

    def change(operands):
        if operands is None:
            return None
        return dataclasses.replace(operands, arithmetic="simulated")

    return jq.DotGeneral(change(dot.forward), change(dot.dlhs), change(dot.drhs))


def to_nearest(dot: jq.DotGeneral) -> jq.DotGeneral:
    def change(operands):
        if operands is None or operands.lhs is None:
            return operands
        lhs = dataclasses.replace(operands.lhs, rounding=rounding.nearest)
        return dataclasses.replace(operands, lhs=lhs)

    return jq.DotGeneral(dot.forward, change(dot.dlhs), change(dot.drhs))


@pytest.mark.first(2)
@pytest.mark.parametrize("name", ALL_NATIVE)
def test_native_and_simulated_are_the_same_product(name):
    native = to_nearest(ALL_NATIVE[name])
    g = jnp.array(np.random.default_rng(5).normal(size=(2, 32, 96)), jnp.float32)
    out, *gradients = run(native, LHS3, RHS3, g)
    expected, *expected_gradients = run(jq.DotGeneral(simulated(native).forward), LHS3, RHS3, g)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=2e-4)
    # A gradient that is quantized too errs by its own rounding, and no more.
    tolerance = 0.002 if native.dlhs is None else {"int8": 0.02, "fp8": 0.1, "mxfp8": 0.1}[name]
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert found.shape == wanted.shape
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error < tolerance


def test_a_carried_scale_is_the_scale_of_the_kept_operand():
    """∂lhs of int8_train, by hand: g · s, quantized by row, times the stored integers."""
    dot = to_nearest(jq.recipe("int8_train"))
    out, pull = jax.vjp(lambda a, b: dot(a, b, MATMUL), LHS, RHS)
    g = jnp.array(RNG.normal(size=out.shape), jnp.float32)
    weights = jq.quantize(RHS, jq.Quantizer(jq.INT8, "channel"), 0)
    carried = jq.quantize(g * weights.scale, jq.Quantizer(jq.INT8, "channel"), 1)
    expected = np.asarray(carried.qvalue, np.int32) @ np.asarray(weights.qvalue, np.int32).T
    np.testing.assert_array_equal(pull(g)[0], expected.astype(np.float32) * carried.scale)


def test_stochastic_gradients_are_unbiased_over_steps_and_repeat():
    dot = jq.recipe("int8_train")

    @jax.jit
    def gradient(scale):  # another scale, another key, the same gradient otherwise
        _, pull = jax.vjp(lambda a, b: dot(a, b, MATMUL), LHS, RHS)
        return pull(jnp.ones((8, 16)) * scale * 0.3 * jnp.linspace(0.1, 1, 16)[None])[1] / scale

    draws = np.stack([gradient(1 + i / 400) for i in range(400)])
    np.testing.assert_array_equal(gradient(1.0), draws[0])
    assert np.std(draws, axis=0).min() > 0
    kept = jq.fake_quant(LHS, jq.Quantizer(jq.INT8, "channel"), 1)
    exact = np.asarray(kept).T @ (np.ones((8, 16)) * 0.3 * np.linspace(0.1, 1, 16))
    deviation = np.abs(draws.mean(0) - exact) / (draws.std(0) / 20)
    assert np.mean(deviation < 2) > 0.9
    assert deviation.max() < 5


def test_a_gradients_own_quantizer_gets_the_operand_as_it_was():
    """Quantized once along each sum, never twice: here the forward's grid is too coarse to hide it."""
    coarse, fine = jq.Quantizer(jq.INT2, "channel"), jq.Quantizer(jq.INT8, "channel")
    out, pull = jax.vjp(
        lambda a, b: jq.DotGeneral(jq.Operands(coarse, coarse), jq.Operands(None, fine))(
            a, b, MATMUL
        ),
        LHS,
        RHS,
    )
    expected = jnp.ones_like(out) @ jq.fake_quant(RHS, fine, 1).T
    np.testing.assert_allclose(pull(jnp.ones_like(out))[0], expected, rtol=1e-5, atol=1e-5)


def test_scalars_and_empty_operands_are_multiplied_too():
    scalars = (((), ()), ((), ()))
    for name in ("w8a8", "int8_train"):
        dot = jq.recipe(name)
        out, pull = jax.vjp(lambda a, b, d=dot: d(a, b, scalars), jnp.float32(3), jnp.float32(-2))
        np.testing.assert_allclose([out, *pull(jnp.float32(1))], [-6, -2, 3], rtol=1e-2)
        empty = dot(jnp.zeros((0, 4)), jnp.ones((4, 2)), MATMUL)
        assert empty.shape == (0, 2)
        np.testing.assert_array_equal(dot(jnp.zeros((2, 0)), jnp.zeros((0, 3)), MATMUL), 0)


def test_traced_bits_in_gradients_are_data_too():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def gradients(bits):
        quantizer = jq.Quantizer(jq.Int(bits), "channel")
        operands = jq.Operands(quantizer, quantizer)
        dot = jq.DotGeneral(operands, operands, operands)
        return jax.grad(lambda a, b: jnp.sum(dot(a, b, MATMUL) ** 2), (0, 1))(LHS, RHS)

    exact = jax.grad(lambda a, b: jnp.sum((a @ b) ** 2), (0, 1))(LHS, RHS)
    errors = [
        np.linalg.norm(gradients(jnp.float32(b))[0] - exact[0]) for b in (2, 3, 4, 6, 8, 10, 12)
    ]
    assert errors == sorted(errors, reverse=True)


def test_learned_steps_get_their_gradient_through_a_product():
    def loss(step):
        quantizer = jq.Quantizer(
            jq.INT4, "channel", calibration.Step(step), estimator=estimators.lsq
        )
        return jnp.sum(jq.DotGeneral(jq.Operands(None, quantizer))(LHS, RHS, MATMUL) ** 2)

    step = jnp.full((16,), 0.2)
    gradient = jax.jit(jax.grad(loss))(step)
    assert gradient.shape == (16,)
    assert (gradient != 0).all()


def test_stored_operands_are_multiplied_as_they_are():
    weights = jq.quantize(RHS, jq.Quantizer(jq.INT4, "channel"), 0)
    dot = jq.recipe("w4a16")
    expected = dot(LHS, RHS, MATMUL)
    np.testing.assert_array_equal(dot(LHS, weights, MATMUL), expected)
    np.testing.assert_array_equal(dot(LHS, weights.pack(), MATMUL), expected)
    w4a8 = jq.recipe("w4a8")
    np.testing.assert_array_equal(w4a8(LHS, weights, MATMUL), w4a8(LHS, RHS, MATMUL))
    gradient = jax.grad(lambda x: jnp.sum(dot(x, weights, MATMUL)))(LHS)
    np.testing.assert_allclose(gradient[0], jq.dequantize(weights).sum(1), rtol=1e-4)
    with pytest.raises(ValueError, match="stored as int4"):
        jq.recipe("w8a8")(LHS, weights, MATMUL)


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "name",
    [
        *("w8a8", "w4a16", "int8_train", "nf4", "w4a8g32"),
        pytest.param("mxfp8_train", marks=pytest.mark.long),
    ],
)
def test_a_stored_operand_gives_the_other_its_gradient(name):
    dot = jq.recipe(name)

    def loss(x, w):
        return jnp.sum(dot(x, w, DIMS3) ** 2)

    rhs = RHS3[:, :32]
    stored = jq.quantize(rhs, dot.forward.rhs, 0)
    if name == "mxfp8_train":  # whose gradient quantizes the weights anew, from what is there
        assert jnp.isfinite(jax.grad(loss)(LHS3, stored)).all()
        return
    np.testing.assert_array_equal(jax.grad(loss)(LHS3, stored), jax.grad(loss)(LHS3, rhs))


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["w8a8", "int8_train", "w4a16"])
def test_second_derivatives_are_refused_and_never_zero(name):
    dot = jq.recipe(name)
    for power in (1, 2):

        def slope(w, power=power):
            return jnp.sum(jax.grad(lambda x: jnp.sum(dot(x, w, MATMUL) ** power))(LHS))

        with pytest.raises(ValueError, match="second derivatives"):
            jax.grad(slope)(RHS)
    # What computes first derivatives twice over is none.
    remat = jax.checkpoint(lambda x: jnp.sum(dot(x, RHS, MATMUL) ** 2))
    plain = jax.grad(lambda x: jnp.sum(dot(x, RHS, MATMUL) ** 2))(LHS)
    np.testing.assert_allclose(jax.jit(jax.grad(remat))(LHS), plain, rtol=1e-5, atol=1e-5)


_SHARD_MAP = """
import jax, jax.numpy as jnp, numpy as np, jaxquant as jq
from jax.sharding import Mesh, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()), ("d",))
rng = np.random.default_rng(0)
x, w = (jnp.array(rng.normal(size=s), jnp.float32) for s in ((64, 64), (64, 32)))
for name in ("w4a16", "nf4", "mxfp8_train"):
    dot = lambda x, w: jq.recipe(name)(x, w, (((1,), (0,)), ((), ())))
    parts = jax.shard_map(dot, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
    found, expected = (
        jax.jit(jax.grad(lambda x, w: jnp.mean(f(x, w) ** 2), (0, 1)))(x, w) for f in (parts, dot)
    )
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
print("same")
"""


@pytest.mark.long
def test_shard_map_sums_the_gradient_of_a_replicated_operand():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", _SHARD_MAP],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "same", done.stderr[-3000:]


_PARTS = """
import re, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P
import jaxquant as jq
from jaxquant.operations import integers

integers._most_terms = lambda lhs, rhs: 300  # as if int32 held no more: 8 parts of the 2048 terms
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
x, g = (jax.random.normal(jax.random.key(i), (16, 128, n)) for i, n in enumerate((6, 24)))

def gradient(x, g):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jq.recipe("w8a8")(x, g, (((0, 1), (0, 1)), ((), ())))

expected = jax.jit(gradient)(x, g)
rows = NamedSharding(mesh, P(("data", "fsdp")))
for spec in (P(), P(None, "fsdp"), P("fsdp", "data"), P(None, ("data", "fsdp"))):
    step = jax.jit(gradient, in_shardings=(rows, rows), out_shardings=NamedSharding(mesh, spec))
    np.testing.assert_array_equal(step(x, g), expected)
text = step.lower(x, g).compile().as_text()
moved = [line for line in text.splitlines() if re.search(r"= \\S+ all-(reduce|gather)\\(", line)]
assert "all-to-all" in text, text
assert not any("6,24]" in line for line in moved), moved
print("same")
"""


@pytest.mark.long
@pytest.mark.exhaustive
def test_parts_of_a_long_sum_are_added_up_alike_on_every_layout():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", _PARTS],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def readers(compiled: str, argument: str) -> list[str]:
    """The instructions of a compiled program's entry that read an argument."""
    entry = compiled[compiled.index("ENTRY") :]
    (name,) = re.findall(rf"(%[\w.]+) = [^=]*parameter\(\d+\), .*op_name=\"{argument}\"", entry)
    return [line for line in entry.splitlines() if f"{name}," in line or f"{name})" in line]


def passes(compiled: str, argument: str, size: int) -> float:
    """How often an argument of so many elements is read: where half of it is made integers, half a time."""
    total = 0.0
    for line in readers(compiled, argument):
        result = re.search(r"= (\w+)\[([\d,]*)\]", line)
        assert result is not None
        elements = np.prod([int(n) for n in result[2].split(",") if n])
        total += 0.5 if result[1] in ("s8", "s32") and elements == size // 2 else 1
    return total


@pytest.mark.parametrize("name", ["w8a8", "int8_train", "w4a16"])
def test_a_quantized_product_adds_one_pass_over_each_operand(name):
    """One pass finds the ranges; the other, which quantizes, takes the place of the product's own."""
    dot = jq.recipe(name)
    a, b = jnp.ones((256, 512)), jnp.ones((512, 128))
    compiled = jax.jit(lambda lhs, rhs: dot(lhs, rhs, MATMUL)).lower(a, b).compile().as_text()
    plain = jax.jit(lambda lhs, rhs: jax.lax.dot_general(lhs, rhs, MATMUL)).lower(a, b).compile()
    for argument in ("lhs", "rhs"):
        size = {"lhs": a.size, "rhs": b.size}[argument]
        assert passes(plain.as_text(), argument, size) == 1
        assert passes(compiled, argument, size) <= 2


def test_gradients_add_one_pass_for_each_of_their_products():
    dot = jq.recipe("int8_train")
    a, b, g = jnp.ones((256, 512)), jnp.ones((512, 128)), jnp.ones((256, 128))

    def both_ways(lhs, rhs, gradient):
        out, pull = jax.vjp(lambda a, b: dot(a, b, MATMUL), lhs, rhs)
        return out, pull(gradient)

    compiled = jax.jit(both_ways).lower(a, b, g).compile().as_text()
    # Two products each; in float they read their operands once.
    assert passes(compiled, "gradient", g.size) <= 4
    assert passes(compiled, "lhs", a.size) <= 3
    assert passes(compiled, "rhs", b.size) <= 3


def test_accumulation_cannot_overflow():
    for terms in (133_000, 134_000, 500_000):  # all products 127², the largest
        assert jq.recipe("w8a8")(jnp.ones((1, terms)), jnp.ones((terms, 1)), MATMUL) == terms
    prime = 134_033  # no parts of one size
    with pytest.raises(ValueError, match=r"134033 terms.*overflow int32"):
        jq.recipe("w8a8")(jnp.ones((1, prime)), jnp.ones((prime, 1)), MATMUL)


@pytest.mark.long
@pytest.mark.parametrize("calibrate", [calibration.absmax, calibration.minmax])
def test_a_sum_of_parts_is_the_sum(calibrate):
    """A weight's gradient over 3 · 60,000 rows: one contracting axis does not divide by 2, the other does."""
    lhs = jax.random.normal(jax.random.key(0), (3, 60_000, 2))
    rhs = 1 + jax.random.normal(jax.random.key(1), (3, 60_000, 5))
    dims = (((0, 1), (0, 1)), ((), ()))
    quantizer = jq.Quantizer(jq.INT8, "channel", calibration=calibrate)
    stored = [jq.quantize(x, quantizer, axis=(0, 1)) for x in (lhs, rhs)]
    values = [np.asarray(jq.dequantize(x), np.float64) for x in stored]
    expected = np.einsum("abk,abn->kn", *values)
    np.testing.assert_allclose(multiply(*stored, dims), expected, rtol=3e-5, atol=1e-1)


@pytest.mark.skipif(
    not hasattr(jax.sharding, "use_abstract_mesh"), reason="this JAX says no mesh while it traces"
)
@pytest.mark.parametrize(("devices", "parts"), [(1, 4), (8, 8), (3, 6), (32, 4)])
def test_devices_of_the_mesh_add_up_parts_of_their_own(devices, parts):
    """24 · 20,000 terms need four parts; 24 does not divide into 32."""
    shape = jax.ShapeDtypeStruct((24, 20_000, 2), jnp.float32)
    dims = (((0, 1), (0, 1)), ((), ()))
    # Newer versions of JAX take an axis for explicit unless they are told.
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((devices,), ("data",), axis_types=auto)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(lambda a, b: jq.recipe("w8a8")(a, b, dims))(shape, shape)
    assert f"i8[{parts},{24 // parts},20000,2]" in str(traced)


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
        (lambda: jq.Operands(None, None, "native"), "lhs, rhs or both"),
        (lambda: jq.Operands(jq.INT8), "lhs"),
        (lambda: jq.Operands(INT8, jq.Quantizer(jq.Int(12)), "native"), "at most 8 bits"),
        (lambda: jq.Operands(INT8, jq.Quantizer(jq.E4M3), "native"), "at most 8 bits"),
        (
            lambda: jq.Operands(INT8, jq.Quantizer(jq.Int(8, "midrise")), "native"),
            "midrise at most 7",
        ),
        (lambda: jq.Operands(INT8, jq.Quantizer(jq.Int(jnp.int32(8))), "native"), "traced"),
        (lambda: jq.Operands(INT8, jq.Quantizer(jq.INT8, hadamard=8), "native"), "same hadamard"),
        (
            lambda: jq.Operands(INT8, jq.Quantizer(jq.INT8, estimator=estimators.lsq), "native"),
            "straight-through gradient",
        ),
        (
            lambda: jq.DotGeneral(jq.Operands(jq.Quantizer(jq.INT8, rounding=rounding.stochastic))),
            "lhs of forward rounds stochastically",
        ),
        (
            lambda: jq.DotGeneral(
                jq.Operands(INT8, jq.Quantizer(jq.INT8, 32), "native"),
                jq.Operands(INT8, None, "native"),
            ),
            "give dlhs an rhs quantizer",
        ),
        (lambda: jq.DotGeneral(dlhs=INT8), "dlhs is an Operands"),
        (lambda: jq.DotGeneral(INT8), "Operands"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

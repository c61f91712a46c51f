import itertools

import flax.linen
import flax.nnx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import rounding
from jaxquant.operations.conv import ConvGeneralDilated

RNG = np.random.default_rng(0)
NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
LHS = jnp.array(RNG.normal(size=(4, 6, 5, 4)), jnp.float32)
RHS = jnp.array(RNG.normal(size=(3, 2, 4, 6)), jnp.float32)
CHANNEL, TENSOR = jq.Quantizer(jq.INT8, "channel"), jq.Quantizer(jq.INT8)
STOCHASTIC = jq.Quantizer(jq.INT8, "channel", rounding=rounding.stochastic)


def conv(forward=CHANNEL, gradient=None, arithmetic="native") -> ConvGeneralDilated:
    return ConvGeneralDilated(jq.Operands(forward, forward, arithmetic), gradient, gradient)


def call(function, **options):
    """A function of lhs and rhs with the other arguments as given."""
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC} | options
    return lambda lhs, rhs: function(lhs, rhs, **options)


def loop(lhs, rhs, strides, padding, lhs_dilation, rhs_dilation, feature_groups, batch_groups):
    """A convolution of NumPy integers term by term, NCHW; only the definition."""
    n, _, *space = lhs.shape
    features, inputs, *taps = rhs.shape
    spread = np.zeros(
        (*lhs.shape[:2], *[(s - 1) * d + 1 for s, d in zip(space, lhs_dilation, strict=True)]),
        np.int64,
    )
    spread[:, :, :: lhs_dilation[0], :: lhs_dilation[1]] = lhs
    wide = np.pad(spread, [(0, 0), (0, 0), *[(max(p, 0), max(q, 0)) for p, q in padding]])
    cut = [
        slice(max(-p, 0), size - max(-q, 0))
        for (p, q), size in zip(padding, wide.shape[2:], strict=True)
    ]
    wide = wide[:, :, *cut]
    extent = [(k - 1) * d + 1 for k, d in zip(taps, rhs_dilation, strict=True)]
    out_space = [(w - e) // s + 1 for w, e, s in zip(wide.shape[2:], extent, strides, strict=True)]
    out = np.zeros((n // batch_groups, features, *out_space), np.int64)
    for o, y, x in itertools.product(range(features), *map(range, out_space)):
        group = o // (features // (feature_groups * batch_groups))
        rows = slice(0, n)
        channels = slice(0, inputs)
        if feature_groups > 1:
            channels = slice(group * inputs, (group + 1) * inputs)
        if batch_groups > 1:
            rows = slice(group * (n // batch_groups), (group + 1) * (n // batch_groups))
        place = [
            slice(at * s, at * s + e, d)
            for at, s, e, d in zip((y, x), strides, extent, rhs_dilation, strict=True)
        ]
        out[:, o, y, x] = (wide[rows, channels, *place] * rhs[o]).sum((1, 2, 3))
    return out


def loop_gradients(lhs, rhs, g, *args):
    """Both gradients of Σ g · loop(lhs, rhs), an element at a time: it is linear in each operand."""
    gradients = []
    for x, other in (
        (lhs, lambda unit: loop(unit, rhs, *args)),
        (rhs, lambda unit: loop(lhs, unit, *args)),
    ):
        gradient = np.zeros(x.shape, np.int64)
        for index in np.ndindex(*x.shape):
            unit = np.zeros(x.shape, np.int64)
            unit[index] = 1
            gradient[index] = (other(unit) * g).sum()
        gradients.append(gradient)
    return gradients


@st.composite
def convolutions(draw):
    """Shapes as NCHW and OIHW, and the arguments of a convolution."""
    groups = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 1)]))
    feature_groups, batch_groups = groups
    pairs = st.tuples(*[st.integers(1, 2)] * 2)
    lhs_dilation, rhs_dilation, strides = draw(pairs), draw(pairs), draw(pairs)
    options = ["explicit"] if max(lhs_dilation) > 1 else ["explicit", "SAME", "VALID"]
    padding = draw(st.sampled_from(options))
    if padding == "explicit":
        padding = draw(st.sampled_from([((1, 2), (0, 1)), ((0, 0), (2, 0)), ((-1, 1), (1, -1))]))
    lhs = (2 * batch_groups, 2 * feature_groups, 5, 4)
    rhs = (2 * feature_groups * batch_groups, 2, *draw(st.sampled_from([(1, 1), (3, 2), (2, 1)])))
    numbers = draw(st.sampled_from([NHWC, NCHW]))
    return lhs, rhs, strides, padding, lhs_dilation, rhs_dilation, numbers, groups


def integers(shape) -> np.ndarray:
    """Integers that INT8 holds as they are: each group's largest is ±127, so that its scale is 1."""
    x = RNG.integers(-9, 10, shape)
    x[RNG.random(shape) < 0.1] = 127
    x.reshape(-1)[0] = 127
    return x


@hypothesis.given(convolutions())
@hypothesis.settings(max_examples=12, deadline=None)
def test_native_is_the_integer_convolution_forward_and_backward(case):
    lhs_shape, rhs_shape, strides, padding, lhs_dilation, rhs_dilation, numbers, groups = case
    pairs = padding
    if isinstance(padding, str):
        extent = [(k - 1) * d + 1 for k, d in zip(rhs_shape[2:], rhs_dilation, strict=True)]
        pairs = jax.lax.padtype_to_pads(lhs_shape[2:], extent, strides, padding)
    args = (strides, pairs, lhs_dilation, rhs_dilation, *groups)
    lhs, rhs = integers(lhs_shape), integers(rhs_shape)
    expected = loop(lhs, rhs, *args)
    hypothesis.assume(expected.size > 0)
    g = integers(expected.shape)

    def transposed(x, spec, to):
        return np.transpose(x, [spec.index(c) for c in to])

    def back(x, spec, to):
        return transposed(np.asarray(x), to, spec)

    function = conv(TENSOR, jq.Operands(TENSOR, None, "native"))
    run = call(
        function,
        window_strides=strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=numbers,
        feature_group_count=groups[0],
        batch_group_count=groups[1],
    )

    @jax.jit
    def step(lhs, rhs, g):
        out, pull = jax.vjp(run, lhs, rhs)
        return out, *pull(g)

    found = step(
        *(
            jnp.array(transposed(x, spec, to), jnp.float32)
            for x, spec, to in zip((lhs, rhs, g), NCHW, numbers, strict=True)
        )
    )
    found = [
        back(found[0], NCHW[2], numbers[2]),
        back(found[1], NCHW[0], numbers[0]),
        back(found[2], NCHW[1], numbers[1]),
    ]
    for x, y in zip(found, (expected, *loop_gradients(lhs, rhs, g, *args)), strict=True):
        np.testing.assert_array_equal(x, y)


GROUPED = [
    ({}, LHS, RHS),
    ({"window_strides": (2, 1), "padding": ((1, 0), (2, 2)), "rhs_dilation": (1, 2)}, LHS, RHS),
    ({"feature_group_count": 2, "window_strides": (1, 2)}, LHS, RHS[:, :, :2]),
    ({"batch_group_count": 2, "padding": "VALID"}, LHS, RHS),
]


@pytest.mark.first(1)
@pytest.mark.parametrize(("options", "lhs", "rhs"), GROUPED)
def test_scales_find_their_places(options, lhs, rhs):
    """Native and simulated arithmetic agree, whatever element of the batch or feature a scale is of."""
    lhs = lhs * np.float32([1, 10, 100, 1000]).reshape(4, 1, 1, 1)
    rhs = rhs * np.float32(3.0 ** np.arange(6)).reshape(1, 1, 1, 6)
    plain = call(jax.lax.conv_general_dilated, **options)
    g = jnp.array(RNG.normal(size=plain(lhs, rhs).shape), jnp.float32)
    left, right = jq.fake_quant(lhs, CHANNEL, (1, 2, 3)), jq.fake_quant(rhs, CHANNEL, (0, 1, 2))
    expected = (plain(left, right), *jax.vjp(plain, left, right)[1](g))
    for function in (conv(), conv(arithmetic="simulated")):
        out, pull = jax.vjp(call(function, **options), lhs, rhs)
        for found, wanted in zip((out, *pull(g)), expected, strict=True):
            close(found, wanted)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6 * float(np.abs(wanted).max()))


@pytest.mark.first(1)
@pytest.mark.parametrize(("options", "lhs", "rhs"), GROUPED)
@pytest.mark.parametrize("anew", [False, True])
def test_native_gradients_carry_scales(options, lhs, rhs, anew):
    """Against the float gradients of what each gradient's product quantizes."""
    plain = call(jax.lax.conv_general_dilated, **options)
    out = plain(lhs, rhs)
    g = jnp.array(RNG.normal(size=out.shape), jnp.float32)
    by_batch, by_feature = (1, 2, 3), (0, 1, 2)
    function = conv(CHANNEL, jq.Operands(CHANNEL, CHANNEL if anew else None, "native"))
    dlhs, drhs = jax.vjp(call(function, **options), lhs, rhs)[1](g)
    if anew:
        right, left = jq.fake_quant(rhs, CHANNEL, (0, 1, 3)), jq.fake_quant(lhs, CHANNEL, (0, 1, 2))
        for_lhs, for_rhs = (
            jq.fake_quant(g, CHANNEL, by_batch),
            jq.fake_quant(g, CHANNEL, by_feature),
        )
    else:
        right, left = jq.quantize(rhs, CHANNEL, by_feature), jq.quantize(lhs, CHANNEL, by_batch)
        # Group by group of the batch, each output feature is made of its own group's elements.
        rows = np.asarray(left.scale)[:, 0, 0, 0]
        n = options.get("batch_group_count", 1)
        rows = np.repeat(rows.reshape(n, -1).T, 6 // n, axis=1)[:, None, None, :]
        columns = np.asarray(right.scale)
        for_lhs = jq.fake_quant(g * columns, CHANNEL, by_batch) / columns
        for_rhs = jq.fake_quant(g * rows, CHANNEL, by_feature) / rows
        right, left = jq.dequantize(right), jq.dequantize(left)
    close(dlhs, jax.vjp(plain, lhs, right)[1](for_lhs)[0])
    close(drhs, jax.vjp(plain, left, rhs)[1](for_rhs)[1])


def test_simulated_gradients_are_those_of_quantized_gradients():
    e5m2 = jq.Quantizer(jq.E5M2)
    function = conv(CHANNEL, jq.Operands(e5m2), "simulated")
    plain = call(jax.lax.conv_general_dilated)
    g = jnp.array(RNG.normal(size=plain(LHS, RHS).shape), jnp.float32)
    left, right = jq.fake_quant(LHS, CHANNEL, (1, 2, 3)), jq.fake_quant(RHS, CHANNEL, (0, 1, 2))
    expected = jax.vjp(plain, left, right)[1](jq.fake_quant(g, e5m2))
    for found, wanted in zip(jax.vjp(call(function), LHS, RHS)[1](g), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", [CHANNEL, STOCHASTIC])
def test_operands_and_residuals_have_eight_bits(gradient):
    function = call(conv(CHANNEL, jq.Operands(gradient, None, "native")))

    def step(lhs, rhs):
        out, pull = jax.vjp(function, lhs, rhs)
        return out, *pull(out)

    _, pull = jax.vjp(function, LHS, RHS)
    saved = [
        x.dtype for x in jax.tree.leaves(pull) if getattr(x, "shape", ()) in (LHS.shape, RHS.shape)
    ]
    assert saved == [jnp.int8, jnp.int8]
    lines = jax.jit(step).lower(LHS, RHS).as_text().splitlines()
    products = [line for line in lines if "stablehlo.convolution" in line]
    assert len(products) == 3
    assert all(line.count("xi8>") == 2 and "xi32>" in line for line in products)


def test_weights_only_and_stored_operands():
    weights = jq.Operands(None, jq.Quantizer(jq.INT4, "channel"), "native")
    plain = call(jax.lax.conv_general_dilated)
    right = jq.quantize(RHS, weights.rhs, (0, 1, 2))
    expected = plain(LHS, jq.dequantize(right))
    function = call(ConvGeneralDilated(weights))
    close(function(LHS, RHS), expected)
    np.testing.assert_array_equal(function(LHS, right), function(LHS, RHS))
    close(call(ConvGeneralDilated())(LHS, right), expected)
    stored = jq.quantize(RHS, CHANNEL, (0, 1, 2))
    np.testing.assert_array_equal(call(conv())(LHS, stored), call(conv())(LHS, RHS))
    asymmetric = jq.Quantizer(jq.INT8, "channel", jq.calibration.minmax)
    zeros = jq.quantize(RHS, asymmetric, (0, 1, 2))
    close(
        call(ConvGeneralDilated(jq.Operands(TENSOR, None)))(LHS, zeros),
        plain(jq.fake_quant(LHS, TENSOR), jq.dequantize(zeros)),
    )


def test_float8_and_types():
    e4m3 = jq.Quantizer(jq.E4M3)
    close(call(conv(e4m3))(LHS, RHS), call(conv(e4m3, arithmetic="simulated"))(LHS, RHS))
    half = LHS.astype(jnp.bfloat16), RHS.astype(jnp.bfloat16)
    assert call(conv())(*half).dtype == jnp.bfloat16
    function = call(
        conv(CHANNEL, jq.Operands(CHANNEL, None, "native")), preferred_element_type=jnp.float32
    )
    out, pull = jax.vjp(function, *half)
    assert [x.dtype for x in (out, *pull(out))] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    assert hash(conv()) == hash(conv())


def test_bits_are_data_in_a_simulated_convolution():
    traces = []

    @jax.jit
    def run(bits):
        traces.append(bits)
        return call(conv(jq.Quantizer(jq.Int(bits), "channel"), arithmetic="simulated"))(LHS, RHS)

    for bits in (2, 4, 8):
        fixed = conv(jq.Quantizer(jq.Int(bits), "channel"), arithmetic="simulated")
        close(run(jnp.float32(bits)), call(fixed)(LHS, RHS))
    assert len(traces) == 1


def test_flax_layers_take_it():
    function = conv(CHANNEL, jq.Operands(CHANNEL, None, "native"))
    layer = flax.nnx.Conv(
        4, 6, (3, 2), use_bias=False, conv_general_dilated=function, rngs=flax.nnx.Rngs(0)
    )
    expected = call(function)(LHS, layer.kernel[...])
    np.testing.assert_allclose(layer(LHS), expected, rtol=1e-6, atol=1e-6)
    linen = flax.linen.Conv(6, (3, 2), use_bias=False, conv_general_dilated=function)
    parameters = {"params": {"kernel": layer.kernel[...]}}
    np.testing.assert_allclose(linen.apply(parameters, LHS), expected, rtol=1e-6, atol=1e-6)


def test_nothing_put_out_has_no_gradient():
    function = call(conv(CHANNEL, jq.Operands(CHANNEL, None, "native")), padding="VALID")
    out, pull = jax.vjp(function, LHS[:, :2], RHS)
    assert out.size == 0
    for gradient in pull(out):
        assert not gradient.any()


def test_accumulation_cannot_overflow():
    with pytest.raises(ValueError, match=r"134000 terms.*overflow int32"):
        conv()(jnp.ones((1, 134_000, 1)), jnp.ones((1, 134_000, 1)), (1,), "VALID")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: ConvGeneralDilated(CHANNEL), "Operands"),
        (lambda: conv(jq.Quantizer(jq.INT8, 4)), "'tensor' or 'channel'.*lhs of forward.*4"),
        (lambda: conv(jq.Quantizer(jq.MXFP8), arithmetic="simulated"), "granularity 32"),
        (lambda: conv(jq.Quantizer(jq.INT8, (2, 2))), r"\(2, 2\)"),
        (lambda: conv(jq.Quantizer(jq.INT8, hadamard=4)), "hadamard 4"),
        (lambda: conv(CHANNEL, jq.Operands(None, jq.Quantizer(jq.INT8, 4))), "rhs of dlhs"),
        (lambda: conv(jq.Quantizer(jq.Int(12))), "at most 8 bits"),
        (lambda: conv(jq.Quantizer(jq.Int(8, "unsigned"))), "zero point"),
        (
            lambda: conv(jq.Quantizer(jq.E4M3), jq.Operands(jq.Quantizer(jq.E5M2), None, "native")),
            "one float8",
        ),
        (lambda: conv(STOCHASTIC), "stochastic"),
        (
            lambda: call(conv(jq.Quantizer(jq.INT8, "tensor", jq.calibration.minmax)))(LHS, RHS),
            "zero point",
        ),
        (lambda: call(conv(), lhs_dilation=(2, 1))(LHS, RHS), "'SAME'.*pairs"),
        (lambda: call(conv(), window_strides=(1,))(LHS, RHS), "window_strides.*2 axes"),
        (lambda: call(conv())(LHS, jq.quantize(RHS, CHANNEL, 0)), "rhs has scales.*axis 3"),
        (lambda: call(conv())(LHS, jq.quantize(RHS, jq.Quantizer(jq.INT4))), "stored as int4"),
    ],
)
def test_misuse_is_named(run, message):
    with pytest.raises(ValueError, match=message):
        run()

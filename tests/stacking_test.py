"""Layers that `nnx.vmap` stacks along any axis, beside each of them quantized by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.nnx.modules import read
from jaxquant.numerics.stacking import candidate_axes
from jaxquant.numerics.stored import Stored

pytestmark = pytest.mark.exhaustive  # minutes, once in CI

LAYERS = 3
RUN = nnx.jit(lambda model, x: model(x))


class Block(nnx.Module):
    """Layers no two of whose sizes are the number of blocks."""

    def __init__(self, rngs):
        options = {"use_bias": False, "rngs": rngs}
        self.up = nnx.Linear(64, 128, **options)
        self.heads = nnx.LinearGeneral(128, (2, 32), **options)
        self.join = nnx.Einsum("btnh,nhd->btd", (2, 32, 64), rngs=rngs)

    def __call__(self, x):
        return x + self.join(nnx.relu(self.heads(nnx.gelu(self.up(x)))))


class Convolution(nnx.Module):
    def __init__(self, rngs):
        mask = jnp.ones((5, 64, 64)).at[0].set(0)
        self.conv = nnx.Conv(64, 64, (5,), mask=mask, rngs=rngs)

    def __call__(self, x):
        return x + self.conv(x)


class Table(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(80, 64, rngs=rngs)

    def __call__(self, x):
        return self.table(jnp.argmax(self.table.attend(x), -1))


class Stack(nnx.Module):
    """Blocks, or other layers that give what they take, stacked along an axis and scanned."""

    def __init__(self, axis, layer=Block):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=axis)
        def make(rngs):
            return layer(rngs)

        self.axis, self.layers = axis, make(nnx.Rngs(0))

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, self.axis), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        return run(x, self.layers)


def alone(model, layer):
    """The layers of a stack as modules of their own."""
    graphdef, stacked = nnx.graphdef(layer(nnx.Rngs(0))), nnx.state(model.layers)
    cut = lambda i: jax.tree.map(lambda x: jnp.take(x, i, model.axis), stacked)  # noqa: E731
    return [nnx.merge(graphdef, cut(i)) for i in range(LAYERS)]


def inputs():
    return jax.random.normal(jax.random.key(1), (2, 6, 64))


def weights(model):
    """Weights, and learned steps, by path."""
    state = nnx.to_flat_state(nnx.state(model, (nnx.Param, jq.nnx.Stored)))
    return {"/".join(map(str, path)): operand(read(variable)) for path, variable in state}


def operand(held):
    """A weight as its products take it: of stored layers, with these along leading axes."""
    return held.operand if isinstance(held, Stored) else held


def part(whole, i, axis):
    return jax.tree.map(lambda x: jnp.take(x, i, axis), whole)


def check(model, recipe, layer=Block):
    """Outputs and stored weights are those of the layers one by one, and frozen bits the quantized ones."""
    x = inputs()
    quantized = jq.nnx.quantize(model, {".*": recipe})
    if "lsq" in recipe:
        jq.nnx.calibrate(quantized, [x])
    frozen = jq.nnx.freeze(quantized)
    found = RUN(quantized, x)
    np.testing.assert_array_equal(RUN(frozen, x), found)
    layers = [jq.nnx.quantize(one, {".*": recipe}) for one in alone(model, layer)]
    stored, expected = weights(frozen.layers), x
    for i, one in enumerate(layers):
        for path, module in list(nnx.iter_graph(one)) if "lsq" in recipe else ():
            if hasattr(module, "kernel_step"):
                steps = functools.reduce(getattr, path, quantized.layers)
                np.testing.assert_array_equal(read(steps.kernel_step)[i], read(module.kernel_step))
                module.kernel_input_step = jq.nnx.StepSize(read(steps.kernel_input_step)[i])
        for path, own in weights(jq.nnx.freeze(one)).items():
            if isinstance(own, jq.QArray):
                mine = part(stored[path], i, 0)
                assert (mine.shape, mine.bits_per_element) == (own.shape, own.bits_per_element)
                np.testing.assert_array_equal(mine.qvalue, own.qvalue)
                np.testing.assert_array_equal(mine.scale, own.scale)
        expected = one(expected)
    # An activation on the boundary of two values may fall to either side, in one program and in another.
    error = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
    assert error < (1e-5 if "a16" in recipe else 1e-2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("axis", "recipe"), [(1, "w4a8"), (2, "w8a16"), (2, "w4a4-lsq"), (-1, "w3a16")]
)
def test_stacked_layers_are_quantized_each_by_itself(axis, recipe):
    check(Stack(axis), recipe)


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("layer", "axis"), [(Convolution, 1), (Convolution, -1), (Convolution, 0), (Table, 1)]
)
def test_convolutions_with_masks_and_tables(layer, axis):
    check(Stack(axis, layer), "w4a16", layer)


class Narrow(nnx.Module):
    """As many inputs as there are layers, so that the biases tell where they are stacked."""

    def __init__(self, rngs):
        self.down = nnx.Linear(64, LAYERS, rngs=rngs)
        self.up = nnx.Linear(LAYERS, 64, rngs=rngs)

    def __call__(self, x):
        return x + self.up(self.down(x))


class Heads(nnx.Module):
    """As many heads as there are layers, so that another layer tells where these are stacked."""

    def __init__(self, rngs):
        options = {"use_bias": False, "rngs": rngs}
        self.query = nnx.LinearGeneral(64, (LAYERS, 16), **options)
        self.out = nnx.LinearGeneral((LAYERS, 16), 64, axis=(-2, -1), **options)
        self.up = nnx.Linear(64, 64, **options)

    def __call__(self, x):
        return x + self.up(self.out(self.query(x)))


@pytest.mark.long
@pytest.mark.parametrize(("layer", "axis"), [(Narrow, 1), (Narrow, -1), (Heads, 1), (Heads, 0)])
def test_sizes_that_leave_several_axes(layer, axis):
    check(Stack(axis, layer), "w8a16", layer)


class Square(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(LAYERS, LAYERS, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


@pytest.mark.long
def test_where_nothing_tells_the_axis_another_is_an_error_and_no_number():
    x = inputs()[..., :LAYERS]
    for recipe in ("w8a16", "w4a4-lsq"):
        quantized = jq.nnx.quantize(Stack(0, Square), {".*": recipe})
        if recipe != "w8a16":
            jq.nnx.calibrate(quantized, [x])
        frozen = jq.nnx.freeze(quantized)
        np.testing.assert_array_equal(RUN(frozen, x), RUN(quantized, x))
    for axis in (1, -1):
        quantized = jq.nnx.quantize(Stack(axis, Square), {".*": "w8a16"})
        with pytest.raises(ValueError, match=r"layers/linear/kernel.*freeze with this call"):
            RUN(jq.nnx.freeze(quantized), x)
        np.testing.assert_array_equal(RUN(jq.nnx.freeze(quantized, x), x), RUN(quantized, x))
        learned = jq.nnx.quantize(Stack(axis, Square), {".*": "w4a4-lsq"}, x)
        jq.nnx.calibrate(learned, [x])
        np.testing.assert_array_equal(RUN(jq.nnx.freeze(learned, x), x), RUN(learned, x))


class Nested(nnx.Module):
    """Two stacks of layers that are stacked along an axis of their own."""

    def __init__(self, seed=0):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            @nnx.split_rngs(splits=LAYERS)
            @nnx.vmap(in_axes=0, out_axes=1)
            def inner(rngs):
                return nnx.Linear(64, 64, use_bias=False, rngs=rngs)

            return inner(rngs)

        self.layers = make(nnx.Rngs(seed))

    def __call__(self, x):
        inner = nnx.scan(lambda x, one: one(x), in_axes=(nnx.Carry, 1), out_axes=nnx.Carry)
        return nnx.scan(inner, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


@pytest.mark.long
def test_stacks_of_stacks(tmp_path):
    model, x = Nested(), inputs()
    quantized = jq.nnx.calibrate(jq.nnx.quantize(model, {".*": "w4a8"}), [x])
    frozen = jq.nnx.freeze(quantized)
    kernel, expected = read(model.layers.kernel), x
    assert kernel.shape == (2, 64, LAYERS, 64)
    for i in range(2):
        for j in range(LAYERS):
            rounded = jq.fake_quant(kernel[i, :, j], jq.Quantizer(jq.INT4, "channel"), axis=0)
            stored = jax.tree.map(lambda a, i=i, j=j: a[i, j], operand(read(frozen.layers.kernel)))
            np.testing.assert_array_equal(jq.dequantize(stored), rounded)
            expected = jq.fake_quant(expected, jq.Quantizer(jq.INT8), axis=-1) @ rounded
    found = RUN(frozen, x)
    np.testing.assert_array_equal(found, RUN(quantized, x))
    assert jnp.linalg.norm(found - expected) < 2e-2 * jnp.linalg.norm(expected)
    jq.nnx.save(tmp_path / "model", frozen)
    np.testing.assert_array_equal(RUN(jq.nnx.load(tmp_path / "model", Nested(1)), x), found)
    rotated = jq.nnx.quantize(
        model, {".*": "w4a4-quest"}
    )  # layers on both sides of what is rotated
    np.testing.assert_array_equal(RUN(jq.nnx.freeze(rotated), x), RUN(rotated, x))


@pytest.mark.long
@pytest.mark.parametrize(("axis", "recipe"), [(-1, "w3a16"), (1, "w4a4-quest"), (1, "mxfp4")])
def test_stacks_are_saved_and_counted(axis, recipe, tmp_path):
    model, x = Stack(axis), inputs()
    frozen = jq.nnx.freeze(jq.nnx.quantize(model, {".*": recipe}))
    table = jq.nnx.coverage(model, {".*": recipe}, x)
    state = jax.tree.leaves(nnx.state(frozen, jq.nnx.Stored))
    assert table.bytes_after == sum(leaf.nbytes for leaf in state)
    assert sum(row.macs for row in table) == LAYERS * 12 * (64 * 128 + 128 * 64 + 64 * 64)
    jq.nnx.save(tmp_path / "model", frozen)
    loaded = jq.nnx.load(tmp_path / "model", Stack(axis))
    for path, stored in weights(frozen).items():
        again = weights(loaded)[path]
        assert jax.tree.structure(again) == jax.tree.structure(stored)
        jax.tree.map(np.testing.assert_array_equal, again, stored)
    report = jq.quality.compare_weights(model, frozen)
    assert len(report.rows) == 3 * LAYERS
    assert abs(report.worst.gain - 1) < 0.05


class One(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(x))


@pytest.mark.long
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_stacks_are_rounded_after_training_as_their_layers_alone(method):
    model = Stack(1, One)
    seen = [3 * jax.random.normal(jax.random.key(i), (32, 64)) for i in range(2)]
    found = jq.ptq.quantize(model, {".*": "w4a16"}, seen, method, progress=False)
    outputs = RUN(found, seen[0])
    expected = seen[0]
    for i, one in enumerate(alone(model, One)):
        solved = jq.ptq.quantize(one, {".*": "w4a16"}, seen, method, progress=False)
        mine = part(operand(read(found.layers.linear.kernel)), i, 0)
        same = np.asarray(mine.qvalue == read(solved.linear.kernel).qvalue)
        assert same.mean() > 0.99
        seen, expected = [one(x) for x in seen], solved(expected)
    assert jnp.linalg.norm(outputs - expected) < 2e-2 * jnp.linalg.norm(expected)


@pytest.mark.long
def test_ranges_are_each_layers_own():
    model, x = Stack(1), inputs()
    quantized = jq.nnx.calibrate(jq.nnx.quantize(model, {".*": "w8a8"}), [x, x / 2])
    ranges = read(quantized.layers.up.kernel_input_range)
    assert ranges.shape == (LAYERS,)
    expected = [x]
    for one in alone(model, Block)[:-1]:
        expected.append(one(expected[-1]))
    largest = [float(jnp.abs(seen).max()) for seen in expected]
    np.testing.assert_allclose(ranges.reshape(-1)[0], largest[0], rtol=1e-6)
    np.testing.assert_allclose(ranges.reshape(-1), largest, rtol=3e-2)
    np.testing.assert_array_equal(RUN(jq.nnx.freeze(quantized), x), RUN(quantized, x))


class Ensemble(nnx.Module):
    """Layers side by side, each with an input of its own."""

    def __init__(self, axis):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=axis)
        def make(rngs):
            return nnx.Linear(64, 32, use_bias=False, rngs=rngs)

        self.axis, self.layers = axis, make(nnx.Rngs(0))

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(self.axis, 0))(self.layers, x)


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["w8a8", "w4a4-lsq", "int8_train"])
@pytest.mark.parametrize("axis", [0, 1])
def test_layers_side_by_side_have_ranges_of_their_own(recipe, axis):
    """Activations of very different sizes, in one product of all layers."""
    model = Ensemble(axis)
    x = jax.random.normal(jax.random.key(1), (LAYERS, 8, 64))
    x = x * jnp.array([1.0, 100.0, 1e4])[:, None, None]
    quantized = jq.nnx.quantize(model, {".*": recipe}, x)
    for calibrated in (False, True) if recipe == "w8a8" else (recipe == "w4a4-lsq",):
        if calibrated:
            jq.nnx.calibrate(quantized, [x])
        found = RUN(quantized, x)
        for i in range(LAYERS):
            kernel = jnp.take(read(model.layers.kernel), i, axis)
            one = nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(0))
            one.kernel[...] = kernel
            one = jq.nnx.quantize(one, {".*": recipe})
            if calibrated:
                jq.nnx.calibrate(one, [x[i]])
            # A learned step starts at a mean, whose last bits hang on the order of its sum.
            error = 1e-5 if recipe == "w4a4-lsq" else 0
            np.testing.assert_allclose(found[i], RUN(one, x[i]), rtol=error, atol=error * 10.0**i)
        np.testing.assert_array_equal(RUN(jq.nnx.freeze(quantized, x), x), found)


def test_where_layers_may_lie():
    assert candidate_axes((2, 8), (8,)) == [(0,)]
    assert candidate_axes((2, 8), (4,)) == []

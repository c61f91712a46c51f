"""Layers that `nnx.vmap` stacks along any axis, beside each of them quantized by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.nnx.modules import Learned, read, write

LAYERS = 3
RUN = nnx.jit(lambda model, x: model(x))


class Block(nnx.Module):
    """Layers no two of whose sizes are the number of blocks."""

    def __init__(self, rngs):
        options = {"use_bias": False, "rngs": rngs}
        self.up = nnx.Linear(64, 128, **options)
        self.heads = nnx.LinearGeneral(128, (4, 16), **options)
        self.join = nnx.Einsum("btnh,nhd->btd", (4, 16, 64), rngs=rngs)

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
    return {"/".join(map(str, path)): read(variable) for path, variable in state}


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
        for path, module in nnx.iter_graph(one) if "lsq" in recipe else ():
            if isinstance(module, Learned):
                steps = functools.reduce(getattr, path, quantized.layers)
                write(module.lhs_step, part(read(steps.lhs_step), i, model.axis).reshape(()))
                module.calibrated = True
        for path, own in weights(jq.nnx.freeze(one)).items():
            if isinstance(own, jq.QArray):
                mine = part(stored[path], i, model.axis)
                assert (mine.shape, mine.bits_per_element) == (own.shape, own.bits_per_element)
                np.testing.assert_array_equal(mine.qvalue, own.qvalue)
                np.testing.assert_array_equal(mine.scale, own.scale)
        expected = one(expected)
    # An activation on the boundary of two values may fall to either side, in one program and in another.
    error = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
    assert error < (1e-5 if "a16" in recipe else 1e-2)


@pytest.mark.parametrize(
    ("axis", "recipe"), [(1, "w4a8"), (2, "w8a16"), (2, "w4a4-lsq"), (-1, "w3a16")]
)
def test_stacked_layers_are_quantized_each_by_itself(axis, recipe):
    check(Stack(axis), recipe)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxquant as jq


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 16, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.LinearGeneral(32, (2, 4), rngs=rngs)

    def __call__(self, tokens):
        return self.down(nnx.relu(self.up(self.embed(tokens))))


class Convolutional(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)


@pytest.fixture
def model():
    return Model(nnx.Rngs(0))


TOKENS = jnp.arange(10)


def test_every_matrix_product_is_quantized_and_the_model_is_left_alone(model):
    before = model(TOKENS)
    quantized = jq.nnx.quantize(model, {".*": "w2a16"})
    assert isinstance(quantized.up.dot_general, jq.DotGeneral)
    assert isinstance(quantized.down.dot_general, jq.DotGeneral)
    assert not np.allclose(quantized(TOKENS), before, atol=1e-3)
    np.testing.assert_array_equal(model(TOKENS), before)


def test_quantized_layers_compute_with_the_quantized_weights(model):
    quantizer = jq.Quantizer(jq.INT4, "channel")
    quantized = jq.nnx.quantize(model, {".*": "w4a16"})
    model.up.kernel[...] = jq.fake_quant(model.up.kernel[...], quantizer, axis=0)
    model.down.kernel[...] = jq.fake_quant(model.down.kernel[...], quantizer, axis=0)
    model.embed.embedding[...] = jq.fake_quant(model.embed.embedding[...], quantizer, axis=1)
    np.testing.assert_allclose(quantized(TOKENS), model(TOKENS), rtol=1e-6, atol=1e-6)


def test_parameters_are_shared_not_copied(model):
    quantized = jq.nnx.quantize(model, {"up": "w8a8"})
    pointers = [
        [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(m, nnx.Param))]
        for m in (model, quantized)
    ]
    assert pointers[0] == pointers[1]
    quantized.up.kernel[...] = jnp.zeros((16, 32))
    assert model.up.kernel[...].any()


def test_quantized_models_split_merge_jit_and_train(model):
    quantized = jq.nnx.quantize(model, {".*": "w8a8"})
    graphdef, params = nnx.split(quantized)
    assert hash(graphdef) == hash(nnx.graphdef(jq.nnx.quantize(model, {".*": "w8a8"})))
    tx = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def step(params, state):
        def loss(params):
            return jnp.mean((nnx.merge(graphdef, params)(TOKENS) - 1) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(50):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.1 * losses[0]


def test_a_training_step_with_traced_bits_is_traced_once(model):
    graphdef, params = nnx.split(model)
    traces = []

    @jax.jit
    def gradient(params, bits):
        traces.append(bits)

        def loss(params):
            dot = jq.DotGeneral(jq.Operands(rhs=jq.Quantizer(jq.Int(bits), "channel")))
            return jnp.mean(jq.nnx.quantize(nnx.merge(graphdef, params), {".*": dot})(TOKENS) ** 2)

        return jax.value_and_grad(loss)(params)

    losses = {float(gradient(params, jnp.float32(bits))[0]) for bits in range(2, 10)}
    assert len(losses) == 8
    assert len(traces) == 1


def test_quantizing_again_replaces_the_recipe(model):
    twice = jq.nnx.quantize(jq.nnx.quantize(model, {".*": "w2a16"}), {".*": "w8a16"})
    np.testing.assert_array_equal(twice(TOKENS), jq.nnx.quantize(model, {".*": "w8a16"})(TOKENS))


def test_stacked_layers_have_scales_of_their_own():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return nnx.Linear(8, 8, rngs=rngs)

    def apply(layers, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, layers
        )

    layers, x = stack(nnx.Rngs(0)), jnp.ones((2, 8))
    expected = x
    for kernel, bias in zip(layers.kernel[...], layers.bias[...], strict=True):
        rounded = jq.fake_quant(kernel, jq.Quantizer(jq.INT4, "channel"), axis=0)
        expected = expected @ rounded + bias[None]
    found = apply(jq.nnx.quantize(layers, {".*": "w4a16"}), x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_misuse_is_named(model):
    own = nnx.Linear(4, 4, dot_general=lambda *args, **kwargs: None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="dot_general of its own"):
        jq.nnx.quantize(nnx.Sequential(own), {".*": "w8a8"})
    with pytest.raises(ValueError, match=r"'encoder' is unused.*embed, up"):
        jq.nnx.quantize(model, {"encoder": "w8a8"})
    with pytest.raises(ValueError, match="conv is a Conv"):
        jq.nnx.quantize(Convolutional(nnx.Rngs(0)), {".*": "w8a8"})
    with pytest.raises(ValueError, match="leaves weights in float"):
        jq.nnx.quantize(model, {"embed": "w16a8"})
    with pytest.raises(ValueError, match="no Linear"):
        jq.nnx.quantize(nnx.RMSNorm(4, rngs=nnx.Rngs(0)), {".*": "w8a8"})


def test_none_leaves_a_layer_in_float():
    quantized = jq.nnx.quantize(Convolutional(nnx.Rngs(0)), [("conv", None), (".*", "w8a8")])
    assert isinstance(quantized.head.dot_general, jq.DotGeneral)

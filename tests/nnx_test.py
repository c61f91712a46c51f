import dataclasses
import gc

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

    def __call__(self, x):
        return self.head(self.conv(x))


@pytest.fixture
def model():
    return Model(nnx.Rngs(0))


TOKENS = jnp.arange(10)


def test_every_matrix_product_is_quantized_and_the_model_is_left_alone(model):
    before = model(TOKENS)
    quantized = jq.nnx.quantize(model, {".*": "w2a16"})
    assert type(quantized.up).__name__ == "Linear"
    assert isinstance(quantized, Model)
    assert type(model) is Model
    assert type(model.up) is nnx.Linear
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
    with pytest.raises(ValueError, match=r"'encoder' is unused.*embed.*up"):
        jq.nnx.quantize(model, {"encoder": "w8a8"})
    images, tokens = jnp.ones((1, 8, 8, 3)), TOKENS
    convolutional = Convolutional(nnx.Rngs(0))
    for rules, message in (
        ({"conv": "w4a16g8"}, r"conv/kernel.* cannot take w4a16g8: .*granularity 8"),
        ({".*": "w4a16g8"}, r"\('conv/kernel', None\) before the others leaves it in float"),
    ):
        with pytest.raises(ValueError, match=message):
            jq.nnx.quantize(convolutional, rules)(images)
    with pytest.raises(ValueError, match=r"granularity 32 does not divide") as error:
        jq.nnx.quantize(model, {"embed|up": "w4a16g32"})(tokens)
    assert {line.split()[0] for line in str(error.value).split("\n")} == {
        "embed/embedding",
        "up/kernel",
    }  # all at once
    with pytest.raises(ValueError, match="leaves weights in float"):
        jq.nnx.quantize(model, {"embed": "w16a8"})(tokens)
    with pytest.raises(ValueError, match="has no weight to quantize"):
        jq.nnx.quantize(nnx.RMSNorm(4, rngs=nnx.Rngs(0)), {".*": "w8a8"})
    frozen = jq.nnx.freeze(jq.nnx.quantize(model, {"up": "w8a8"}))
    with pytest.raises(ValueError, match="up/kernel is frozen already"):
        jq.nnx.quantize(frozen, {".*": "w8a8"})
    left = jq.nnx.quantize(convolutional, {".*": "w4a16g4"}, on_unsupported="float")(images)
    np.testing.assert_allclose(
        left, jq.nnx.quantize(convolutional, {"head": "w4a16g4"})(images), rtol=1e-6
    )


def test_a_product_of_ones_own_is_reached_where_slots_were_taken():
    def own(lhs, rhs, numbers, **options):
        return 2 * jax.lax.dot_general(lhs, rhs, numbers, **options)

    layers = [
        nnx.Linear(16, 16, dot_general=f, rngs=nnx.Rngs(0)) for f in (own, jax.lax.dot_general)
    ]
    doubled, plain = (
        jq.nnx.quantize(layer, {".*": "w4a16"})(jnp.ones((2, 16))) for layer in layers
    )
    np.testing.assert_allclose(doubled, 2 * plain, rtol=1e-6)
    up = nnx.ConvTranspose(4, 4, (3, 3), rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    error = jq.nnx.quantize(up, {".*": "w8a8"})(images) - up(images)
    assert 0 < float(jnp.linalg.norm(error)) < 0.02 * float(jnp.linalg.norm(up(images)))


def test_none_leaves_a_layer_in_float():
    model, images = Convolutional(nnx.Rngs(0)), jnp.ones((1, 8, 8, 3))
    quantized = jq.nnx.quantize(model, [("conv", None), (".*", "w8a8")])
    np.testing.assert_array_equal(quantized.conv(images), nnx.jit(model.conv)(images))
    assert (quantized.head(model.conv(images)) != model(images)).any()


def test_quantizing_copies_no_parameters(model):
    """What is alive afterwards is what was alive before, but for learned steps."""
    jq.nnx.quantize(model, {".*": "w8a8"})
    gc.collect()  # or what other tests left goes in between
    before = sum(x.nbytes for x in jax.live_arrays())
    quantized = jq.nnx.quantize(model, {".*": "w8a8"})
    assert sum(x.nbytes for x in jax.live_arrays()) == before
    del quantized


def test_learned_steps_are_parameters_that_train(model):
    quantized = jq.nnx.quantize(model, {"up|down": "w4a4-lsq"})
    with pytest.raises(ValueError, match=r"no start yet.*calibrate"):
        quantized(TOKENS)
    jq.nnx.calibrate(quantized, [TOKENS])
    graphdef, params = nnx.split(quantized)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: jnp.mean((nnx.merge(graphdef, p)(TOKENS) - 1) ** 2))(params)

    steps = nnx.to_pure_dict(gradient(params))["up"]
    assert steps["kernel_step"].shape == (1, 32)
    assert steps["kernel_input_step"].shape == ()
    assert steps["kernel_step"].any()
    assert steps["kernel_input_step"] != 0
    start = nnx.to_pure_dict(params)["up"]
    kernel = np.asarray(model.up.kernel[...])
    expected = 2 * np.abs(kernel).mean(0, keepdims=True) / 7**0.5
    np.testing.assert_allclose(start["kernel_step"], expected, rtol=1e-5)


def test_learned_steps_of_groups_start_from_each_groups_own_mean(model):
    recipe = jq.recipe("w4a16-lsq")
    weights = dataclasses.replace(recipe.forward.rhs, granularity=8)
    recipe = dataclasses.replace(recipe, forward=dataclasses.replace(recipe.forward, rhs=weights))
    quantized = jq.nnx.quantize(model, {"up": recipe})
    kernel = np.asarray(model.up.kernel[...])
    groups = np.abs(kernel).reshape(-1, 8, kernel.shape[1]).mean(1)
    expected = 2 * groups / 7**0.5
    assert expected.shape[0] > 1
    np.testing.assert_allclose(quantized.up.kernel_step[...], expected, rtol=1e-5)
    expected = np.asarray(quantized(TOKENS))
    np.testing.assert_array_equal(np.asarray(jq.nnx.freeze(quantized)(TOKENS)), expected)


def test_calibration_fixes_ranges_to_the_largest_seen_or_their_mean(model):
    batches = [TOKENS[:5], TOKENS[5:]]
    largest = [float(jnp.abs(model.embed(t)).max()) for t in batches]
    rules = {"up": "w8a8"}
    fixed = jq.nnx.calibrate(jq.nnx.quantize(model, rules), batches)
    found = jq.nnx.read(fixed.up.kernel_input_range)
    np.testing.assert_allclose(found, max(largest), rtol=1e-6)
    mean = jq.nnx.calibrate(jq.nnx.quantize(model, rules), batches, decay=1)
    found = jq.nnx.read(mean.up.kernel_input_range)
    np.testing.assert_allclose(found, np.mean(largest), rtol=1e-6)
    with pytest.raises(ValueError, match="no activations have a range to calibrate"):
        jq.nnx.calibrate(fixed, batches)
    with pytest.raises(ValueError, match="at least one batch"):
        jq.nnx.calibrate(jq.nnx.quantize(model, rules), [])
    linear = jq.nnx.quantize(nnx.Sequential(model.up), {".*": "w8a8"})
    with pytest.raises(ValueError, match="batch 1 of the calibration data holds a NaN"):
        jq.nnx.calibrate(linear, [jnp.ones((2, 16)), jnp.full((2, 16), jnp.nan)])
    with pytest.raises(ValueError, match="decay must be a number from 0 to 1"):
        jq.nnx.calibrate(linear, [jnp.ones((2, 16))], decay=2)


def test_coverage_lists_every_product_of_the_model(model):
    def own(model, tokens):
        return model(tokens) @ jnp.ones((4, 4))

    rules = [("up", "w4a16"), ("down", None), (".*", "w8a16")]
    table = jq.nnx.coverage(model, rules, TOKENS)
    assert {row.path: (row.recipe, row.macs) for row in table} == {
        "embed/embedding": ("w8a16", 0),  # rows are looked up, and nothing is multiplied
        "up/kernel": ("w4a16", 10 * 16 * 32),
        "down/kernel": ("float", 10 * 32 * 8),
    }
    assert table.quantized == 2 / 3
    assert table.shares == {"by rule": 1 / 3}
    assert table.unread == ("down/bias", "up/bias")
    assert (table["up"].bytes_before, table["up"].bytes_after) == (2048, 256 + 128)
    assert "up" in str(table)
    assert "w4a16" in str(table)
    frozen = jq.nnx.coverage(jq.nnx.freeze(jq.nnx.quantize(model, rules)), None, TOKENS)
    assert frozen["up"].bytes_after == frozen["up"].bytes_before == 256 + 128

    class Outside(nnx.Module):
        def __init__(self):
            self.inner = model

        def __call__(self, tokens):
            return own(self.inner, tokens)

    *_, other = jq.nnx.coverage(Outside(), {".*": "w8a8"}, TOKENS)
    assert (other.kind, other.macs) == ("dot", 10 * 2 * 4 * 4)
    assert other.source.startswith("nnx_test.py:")
    assert other.reason == "products of two activations, which no rule takes"


@pytest.mark.parametrize("x", [jnp.ones((2, 3)), None, "text"])
def test_inputs_that_do_not_fit_are_named(x):
    with pytest.raises(ValueError, match="inputs do not fit the model"):
        jq.nnx.coverage(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), {".*": "w8a8"}, x)


@pytest.mark.first(1)
@pytest.mark.parametrize("recipe", ["w4a16g16", "mxfp4", "nvfp4", "nf4dq"])
@pytest.mark.parametrize("layer", [nnx.Conv, nnx.ConvTranspose])
def test_blocks_of_convolutions_lie_along_input_channels(layer, recipe):
    model = layer(64, 8, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 6, 6, 64))
    run = nnx.jit(lambda m, x: m(x))
    quantized = jq.nnx.quantize(model, {".*": recipe})
    found = run(quantized, images)
    forward = jq.recipe(recipe).forward
    before = nnx.clone(model)
    before.kernel[...] = jq.fake_quant(model.kernel[...], forward.rhs, axis=(0, 1, 2))
    x = images if forward.lhs is None else jq.fake_quant(images, forward.lhs, axis=3)
    np.testing.assert_allclose(found, run(before, x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(run(jq.nnx.freeze(quantized), images), found)


def test_fp8_trains_convolutions_and_blocks_of_gradients_are_named():
    model = nnx.Conv(16, 16, (3,), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 8, 16))
    gradient = nnx.jit(nnx.grad(lambda m: (m(x) ** 2).mean()))
    found, exact = (
        gradient(m).kernel[...] for m in (jq.nnx.quantize(model, {".*": "fp8_train"}), model)
    )
    assert 0 < jnp.linalg.norm(found - exact) < 0.1 * jnp.linalg.norm(exact)
    with pytest.raises(ValueError, match="gradients are not quantized in blocks"):
        jq.nnx.quantize(nnx.Conv(32, 8, (3,), rngs=nnx.Rngs(0)), {".*": "mxfp8_train"})(
            jnp.ones((1, 8, 32))
        )

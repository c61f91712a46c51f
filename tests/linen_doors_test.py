"""What people write in Linen around Flax's layers: trained, frozen, saved and served, with the same bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxquant as jq
from jaxquant import linen

pytestmark = [pytest.mark.usefixtures("as_users_compute"), pytest.mark.exhaustive]
RECIPES = ["w8a8", "w4a16g16", "int8_train", "fp8_train", "nf4"]
D, H, VOCAB = 64, 4, 50
KEY, TOKENS = jax.random.key(0), jnp.arange(12).reshape(2, 6)
normal = nn.initializers.normal(0.1)


class Scaled(nn.Embed):
    """An Embed with a call of its own, as Flax's gemma has."""

    def __call__(self, inputs):
        return super().__call__(inputs) * self.features**0.5


class RawAttention(nn.Module):
    """Raw einsums, weights on the left, and a head tied by hand."""

    @nn.compact
    def __call__(self, tokens):
        embed = Scaled(VOCAB, D, name="embed")
        x = embed(tokens)
        q, k, v = (
            jnp.einsum("hdk,btd->bhtk", self.param(name, normal, (H, D, D // H)), x)
            for name in "qkv"
        )
        weights = jax.nn.softmax(jnp.einsum("bhtk,bhsk->bhts", q, k) * (D // H) ** -0.5)
        mixed = jnp.einsum("bhts,bhsk->bhtk", weights, v)
        x = x + jnp.einsum("bhtk,hkd->btd", mixed, self.param("o", normal, (H, D // H, D)))
        return x @ embed.embedding.T


class Recurrent(nn.Module):
    """LSTM cells within a scan, as in Flax's sst2."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, D, name="embed")(tokens)
        x = nn.RNN(nn.OptimizedLSTMCell(D, name="cell"), name="rnn")(x)
        return nn.Dense(VOCAB, name="head")(x)


class Pictures(nn.Module):
    """Convolutions that go down and up again, with running statistics, as in a U-Net."""

    @nn.compact
    def __call__(self, tokens, train=False):
        x = nn.Embed(VOCAB, D, name="embed")(tokens)[..., None]
        x = nn.relu(nn.BatchNorm(not train)(nn.Conv(D, (3, 3), strides=2, name="down")(x)))
        x = nn.ConvTranspose(8, (3, 3), strides=(2, 2), name="up")(x)
        return nn.Dense(VOCAB, name="head")(x.reshape(2, 6, -1))


class Experts(nn.Module):
    """Raw weights of experts in a batched product, and by groups of rows."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, D, name="embed")(tokens)
        shares = jax.nn.softmax(nn.Dense(4, use_bias=False, name="router")(x))
        up, down = self.param("up", normal, (4, D, D)), self.param("down", normal, (4, D, D))
        y = nn.relu(jnp.einsum("btd,edf->ebtf", x, up))
        y = jnp.einsum("ebtf,efd->ebtd", y, down)
        return nn.Dense(VOCAB, name="head")(jnp.einsum("ebtd,bte->btd", y, shares))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(D, use_bias=False, name="up")(x)
        return x + nn.Dense(D, use_bias=False, name="down")(nn.gelu(y)), None


class Stacked(nn.Module):
    """Layers under nn.scan and nn.remat, stacked along an axis."""

    axis: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, D, name="embed")(tokens)
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            {"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return nn.Dense(VOCAB, name="head")(layers(name="layers")(x, None)[0])


MODELS = {
    "raw attention": RawAttention(),
    "recurrent": Recurrent(),
    "pictures": Pictures(),
    "experts": Experts(),
    **{f"stacked {axis}": Stacked(axis) for axis in (0, 1, 2)},
}
LONG = functools.partial(pytest.param, marks=pytest.mark.long)


def trained(quantized, train):
    """Variables after 20 steps of Adam, with which the loss is lower."""
    variables = quantized.init(KEY, TOKENS)
    mutable = [name for name in variables if name != "params"]
    tx = optax.adam(3e-3)

    @jax.jit
    def step(variables, state):
        def loss(params):
            given = {**variables, "params": params}
            y, changed = quantized.apply(given, TOKENS, mutable=mutable, **train)
            return optax.softmax_cross_entropy_with_integer_labels(y, TOKENS).mean(), changed

        (value, changed), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(gradients, state)
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, **changed, "params": params}, state, value

    state, losses = tx.init(variables["params"]), []
    for _ in range(20):
        variables, state, value = step(variables, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    return variables


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        (LONG if recipe != RECIPES[i % len(RECIPES)] else pytest.param)(name, recipe)
        for i, name in enumerate(MODELS)
        for recipe in RECIPES
    ],
)
def test_models_go_from_rules_to_serving_with_the_same_bits(tmp_path, name, recipe):
    module = MODELS[name]
    quantized = linen.quantize(module, {".*": recipe}, on_unsupported="float")
    variables = trained(quantized, {"train": True} if name == "pictures" else {})
    table = linen.coverage(module, {".*": recipe}, TOKENS, variables=variables)
    for row in (row for row in table if not row.is_quantized):
        is_attention = row.path == "" and name in ("raw attention", "experts")  # takes an a8
        is_narrow = recipe in ("w4a16g16", "nf4") and row.path in ("o", "down/kernel")
        assert "two activations" in row.reason if is_attention else is_narrow, row
        assert is_attention or "are not a whole number of blocks" in row.reason, row

    serve = jax.jit(quantized.apply)
    expected, floats = serve(variables, TOKENS), module.apply(variables, TOKENS)
    error = jnp.linalg.norm(expected - floats) / jnp.linalg.norm(floats)
    assert 0 < error < (0.3 if recipe in ("w4a16g16", "nf4") else 0.08)

    frozen = linen.freeze(quantized, variables, TOKENS)
    assert sum(x.nbytes for x in jax.tree.leaves(frozen["params"])) < (
        0.45 * sum(x.nbytes for x in jax.tree.leaves(variables["params"]))
    )
    np.testing.assert_array_equal(serve(frozen, TOKENS), expected)
    linen.save(tmp_path / "model", quantized, frozen, TOKENS)
    loaded, served = linen.load(tmp_path / "model", module, TOKENS)
    np.testing.assert_array_equal(jax.jit(loaded.apply)(served, TOKENS), expected)
    program = jq.serving.load(jq.serving.export(loaded.apply, TOKENS, weights=served))
    np.testing.assert_array_equal(program(TOKENS), expected)


@pytest.mark.long
def test_calibrated_layers_of_a_stack_have_ranges_of_their_own():
    module = Stacked(1)
    quantized = linen.quantize(module, {".*": "w8a8"})
    variables = quantized.init(KEY, TOKENS)
    params = variables["params"]
    calibrated = linen.calibrate(quantized, variables, [TOKENS, TOKENS + 20])
    ranges = calibrated["quantization"]["layers"]["up"]["kernel_input_range"]
    # The largest of what the first layer is given, over both batches.
    table = jq.fake_quant(params["embed"]["embedding"], jq.Quantizer(jq.INT8, "channel"), 1)
    seen = jnp.max(jnp.abs(jnp.stack([table[TOKENS], table[TOKENS + 20]])))
    assert ranges.shape == (3,)
    np.testing.assert_allclose(ranges[0], seen, rtol=1e-6)
    frozen = linen.freeze(quantized, calibrated, TOKENS)
    serve = jax.jit(quantized.apply)
    np.testing.assert_array_equal(serve(frozen, TOKENS), serve(calibrated, TOKENS))


def test_nothing_of_floats_is_shared_with_programs_that_flax_keeps():
    """A root under nn.jit, whose program Flax keeps by the module and knows of no quantization."""
    module = nn.jit(nn.Dense)(8)
    x = jax.random.normal(KEY, (4, D))
    variables = module.init(KEY, x)
    before = module.apply(variables, x)
    found = linen.quantize(module, {".*": "w2a16"}).apply(variables, x)
    assert not np.allclose(found, before, atol=1e-2)
    np.testing.assert_array_equal(module.apply(variables, x), before)
    kernel = jq.fake_quant(variables["params"]["kernel"], jq.Quantizer(jq.Int(2), "channel"), 0)
    np.testing.assert_allclose(found, x @ kernel, rtol=1e-5, atol=1e-5)


def test_everything_that_is_refused_is_named_at_once():
    quantized = linen.quantize(Recurrent(), {".*": "w4a16g24"})
    with pytest.raises(ValueError, match="24") as refused:
        quantized.init(KEY, TOKENS)
    named = [path for path in ("embed", "cell", "head") if path in str(refused.value)]
    assert named == ["embed", "cell", "head"]
    kept = linen.quantize(Recurrent(), {".*": "w4a16g24"}, on_unsupported="float")
    variables = kept.init(KEY, TOKENS)
    np.testing.assert_allclose(
        kept.apply(variables, TOKENS), Recurrent().apply(variables, TOKENS), rtol=1e-6, atol=1e-6
    )


def test_names_with_slashes_are_frozen():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("a/b", normal, (D, 8))

    x = jax.random.normal(KEY, (4, D))
    variables = Named().init(KEY, x)
    quantized = linen.quantize(Named(), {".*": "w8a8"})
    frozen = linen.freeze(quantized, variables, x)
    assert isinstance(frozen["params"]["a/b"], jq.QArray)
    np.testing.assert_array_equal(quantized.apply(frozen, x), quantized.apply(variables, x))
    with pytest.raises(ValueError, match="hold no weight"):
        linen.coverage(Named(), {".*": "w8a8"}, x, variables={})

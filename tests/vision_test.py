import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.harness.data import images
from experiments.harness.models import vision
from experiments.harness.training import train

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others


@pytest.fixture(scope="module")
def pixels():
    return jax.random.uniform(jax.random.key(1), (3, 28, 28, 1))


def make(**changes) -> vision.ViT:
    return vision.ViT(vision.sized("tiny", **({"layers": 1} | changes)), nnx.Rngs(0))


def logits_of(model, pixels) -> jax.Array:
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, pixels)


def parameters(model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(("name", "expected"), [("tiny", 1e5), ("small", 4e5), ("base", 1.6e6)])
def test_sizes_are_counted_and_near_what_they_are_meant_to_be(name, expected):
    config = vision.SIZES[name]
    model = nnx.eval_shape(lambda: vision.ViT(config, nnx.Rngs(0)))
    width = config.width
    biases = config.layers * (5 * width + config.hidden)
    norms = (2 * config.layers + 1) * 2 * width
    ends = (config.patch**2 + 1 + config.tokens) * width + (width + 1) * config.classes
    assert parameters(model) == config.block_parameters + biases + norms + ends
    assert abs(parameters(model) / expected - 1) < 0.2


def test_modules_have_the_paths_that_rules_name():
    config = vision.sized("tiny", layers=2)
    model = nnx.eval_shape(lambda: vision.ViT(config, nnx.Rngs(0)))
    found = nnx.to_flat_state(nnx.state(model, nnx.Param))
    paths = {"/".join(map(str, path[:-1])) for path, _ in found if path[-1] == "kernel"}
    per_block = {f"attention/{n}" for n in ("query", "key", "value", "out")} | {
        "mlp/up",
        "mlp/down",
    }
    blocks = {f"blocks/{i}/{name}" for i in range(2) for name in per_block}
    assert paths == blocks | {"patches", "head"}


def layer_norm(x, module):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-6)
    return scaled * np.asarray(module.scale[...]) + np.asarray(module.bias[...])


def linear(x, module):
    return x @ np.asarray(module.kernel[...]) + np.asarray(module.bias[...])


def reference(model, pixels, patch):
    """The same model written with NumPy in float64, one image and one head at a time."""
    logits = []
    for image in np.asarray(pixels, np.float64):
        side = image.shape[0] // patch
        cut = [
            (2 * image - 1)[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].ravel()
            for i in range(side)
            for j in range(side)
        ]
        kernel = np.asarray(model.patches.kernel[...])
        x = np.stack(cut) @ kernel.reshape(-1, kernel.shape[-1])
        x = x + np.asarray(model.patches.bias[...])
        if model.token is not None:
            x = np.concatenate([np.asarray(model.token[...]), x])
        x = x + np.asarray(model.positions[...])
        for block in model.blocks:
            attention, size = block.attention, block.attention.head_size
            y = layer_norm(x, block.attention_norm)
            q, k, v = (linear(y, m) for m in (attention.query, attention.key, attention.value))
            outputs = []
            for start in range(0, q.shape[1], size):
                head = slice(start, start + size)
                scores = np.exp(q[:, head] @ k[:, head].T / np.sqrt(size))
                outputs.append(scores / scores.sum(1, keepdims=True) @ v[:, head])
            x = x + linear(np.concatenate(outputs, 1), attention.out)
            hidden = linear(layer_norm(x, block.mlp_norm), block.mlp.up)
            cubic = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
            x = x + linear(0.5 * hidden * (1 + np.tanh(cubic)), block.mlp.down)
        x = layer_norm(x, model.norm)
        logits.append(linear(x[0] if model.token is not None else x.mean(0), model.head))
    return np.stack(logits)


@pytest.mark.first(1)
@pytest.mark.parametrize(("pooling", "patch"), [("mean", 4), ("token", 7)])
def test_logits_agree_with_numpy(pixels, pooling, patch):
    model = make(layers=2, pooling=pooling, patch=patch)
    leaves, treedef = jax.tree.flatten(nnx.state(model, nnx.Param))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    nnx.update(
        model, jax.tree.unflatten(treedef, noisy)
    )  # else biases are zero, norms the identity
    np.testing.assert_allclose(logits_of(model, pixels), reference(model, pixels, patch), atol=2e-4)


def test_attention_goes_through_its_function(pixels):
    model = make()
    before = logits_of(model, pixels)
    shapes = []

    def spy(query, key, value, **options):
        shapes.append((query.shape, key.shape, value.shape))
        return jax.nn.dot_product_attention(query, key, value, **options)

    for block in model.blocks:
        block.attention.attention_fn = spy
    np.testing.assert_array_equal(logits_of(model, pixels), before)
    assert shapes == [((3, 49, 3, 16),) * 3]
    for block in model.blocks:
        block.attention.attention_fn = lambda query, key, value: jnp.zeros_like(query)
    assert not np.array_equal(logits_of(model, pixels), before)


def test_positions_tell_patches_apart(pixels):
    model = make(layers=1)
    moved = jnp.roll(pixels, 4, axis=1)  # the same patches elsewhere
    assert not np.allclose(logits_of(model, moved), logits_of(model, pixels), atol=1e-4)
    model.positions[...] = jnp.zeros_like(model.positions[...])
    np.testing.assert_allclose(logits_of(model, moved), logits_of(model, pixels), atol=1e-4)


@pytest.mark.long
def test_bfloat16_computes_in_bfloat16_and_keeps_parameters_in_float32(pixels):
    model = make(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote their scale by themselves
        x = model.blocks[0](jnp.ones((1, 2, 48), jnp.bfloat16))
        logits = logits_of(model, pixels)
    assert x.dtype == jnp.bfloat16
    full = logits_of(make(), pixels)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, full, atol=0.05)
    assert not np.array_equal(logits, full)


@pytest.mark.long
def test_a_small_model_learns_digits():
    digits = images.load("digits")
    model = make(layers=1, width=24, heads=2, hidden=48, image=8, patch=2)
    graphdef, params = nnx.split(model)
    loss = vision.classification_loss(graphdef)
    tx = train.adamw()

    @jax.jit
    def step(params, state, batch):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(gradients, state, params, learning_rate=1e-2)
        return optax.apply_updates(params, updates), state, value

    batches, state = images.train_batches(digits, 64, seed=0), tx.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole steps
        for _ in range(250):
            params, state, value = step(params, state, next(batches))
    logits = logits_of(nnx.merge(graphdef, params), digits.test.pixels)
    assert float(value) < 1.0
    assert (np.argmax(logits, -1) == digits.test.labels).mean() > 0.8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vision.sized("huge"), "tiny, small, base; got 'huge'"),
        (lambda: vision.sized("tiny", layers=0), "layers is at least 1; got 0"),
        (lambda: vision.sized("tiny", heads=5), "width 48 is not a multiple of 5"),
        (lambda: vision.sized("tiny", patch=5), "28 × 28 cannot be cut into patches of 5"),
        (lambda: vision.sized("tiny", pooling="max"), "'mean' or 'token'; got 'max'"),
        (lambda: vision.sized("tiny", dtype="float16"), "float16"),
        (
            lambda: vision.ViT(vision.SIZES["tiny"], nnx.Rngs(0))(jnp.zeros((1, 8, 8, 1))),
            r"takes images of \(28, 28, 1\); got \(8, 8, 1\)",
        ),
    ],
)
def test_bad_models_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Frozen NNX models: packed integers whose products equal the quantized model's bit for bit."""

import gc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.nnx.modules import read


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 64, rngs=rngs, decode=False)
        self.up = nnx.Linear(64, 64, rngs=rngs)
        self.down = nnx.Einsum("btd,dk->btk", (64, 64), bias_shape=(64,), rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Transformer(nnx.Module):
    """Blocks that are scanned over, and a head tied to the embedding."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 64, rngs=rngs)

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Block(rngs)

        self.blocks = make(rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        return self.embed.attend(run(self.blocks, self.embed(tokens)))


class Images(nnx.Module):
    """A convolution, a grouped and a masked one, in bfloat16."""

    def __init__(self, rngs):
        mask = jnp.ones((3, 3, 8, 8)).at[0].set(0)
        options = {"dtype": jnp.bfloat16, "rngs": rngs}
        self.first = nnx.Conv(1, 8, (3, 3), strides=2, **options)
        self.grouped = nnx.Conv(8, 8, (3, 3), feature_group_count=4, **options)
        self.masked = nnx.Conv(8, 8, (3, 3), mask=mask, **options)
        self.norm = nnx.BatchNorm(8, use_running_average=False, rngs=rngs)
        self.head = nnx.LinearGeneral((4, 4, 8), (2, 5), axis=(1, 2, 3), **options)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.masked(self.grouped(self.first(x)))))
        return self.head(x)


@pytest.fixture(autouse=True)
def usual_promotion():
    """Flax's own normalisation mixes types, as users' models do."""
    with jax.numpy_dtype_promotion("standard"):
        yield


MODELS = {
    "transformer": (Transformer, jnp.arange(24).reshape(2, 12) % 50),
    "images": (Images, jax.random.normal(jax.random.key(0), (4, 8, 8, 1))),
}
RUN = nnx.jit(lambda model, x: model(x))


def make(name):
    """A model none of whose parameters is zero, as biases are at first, or one, as norms' scales are."""
    cls, x = MODELS[name]
    graphdef, params, rest = nnx.split(cls(nnx.Rngs(0)), nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        p + 0.1 * jax.random.normal(k, p.shape, p.dtype) for p, k in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, moved), rest), x


def trained(model, x, steps=20):
    """A few steps of quantization-aware training, all in one program."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optax.sgd(5e-4, momentum=0.9)

    @jax.jit
    def run(params):
        def loss(params):
            out = nnx.merge(graphdef, params, rest, copy=True)(x)
            return jnp.mean((out.astype(jnp.float32) - 1) ** 2)

        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = tx.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        return params, losses

    params, losses = run(params)
    assert losses[-1] < losses[0]
    return nnx.merge(graphdef, params, rest)


@pytest.mark.long
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("transformer", {".*attention": "a8kv8", ".*": "w8a8"}),
        pytest.param("transformer", {".*": "w4a16"}, marks=pytest.mark.long),
        ("transformer", {"embed": "w8a16", ".*": "w4a4-lsq"}),
        pytest.param(
            "transformer", {".*attention": "kv4", ".*": "w4a4-quest"}, marks=pytest.mark.long
        ),
        ("transformer", {"embed": None, ".*": "w4a16g32"}),
        pytest.param("transformer", {"embed": None, ".*": "mxfp4"}, marks=pytest.mark.long),
        ("images", {".*": "w8a8"}),
        ("images", {".*": "w3a16"}),
    ],
)
def test_train_freeze_serve(name, rules):
    """Bits are equal after training too, compiled and not, and no optimizer sees what is stored."""
    model, x = make(name)
    quantized = jq.nnx.quantize(model, rules)
    if any("lsq" in str(value) for value in rules.values()):
        jq.nnx.calibrate(quantized, [x])
    quantized = trained(quantized, x)
    frozen = jq.nnx.freeze(quantized)
    np.testing.assert_array_equal(RUN(frozen, x), RUN(quantized, x))
    stored = nnx.state(frozen, jq.nnx.Stored)
    assert stored
    assert not nnx.state(quantized, jq.nnx.Stored)
    floats = nnx.state(frozen, nnx.Param)
    assert all(jnp.issubdtype(p.dtype, jnp.floating) for p in jax.tree.leaves(floats))
    table = jq.nnx.coverage(frozen, None, x)
    assert all(row.macs for row in table if row.kind != "lookup")
    attention = [row for row in table if row.path == "blocks/attention"]
    floats = any("attention" in rule for rule in rules) is False
    assert table.quantized == 1 or (floats and len(attention) == 2) or rules.get("embed", 1) is None


@pytest.mark.long
def test_calibrated_ranges_are_kept():
    model, x = make("transformer")
    quantized = jq.nnx.calibrate(jq.nnx.quantize(model, {".*": "w8a8"}), [x[:, :4]])
    frozen = jq.nnx.freeze(quantized)
    np.testing.assert_array_equal(RUN(frozen, x), RUN(quantized, x))
    ranges = read(quantized.blocks.up.kernel_input_range)
    assert ranges.shape == (2,)  # one for each of the scanned blocks
    assert not np.array_equal(RUN(frozen, x), RUN(jq.nnx.quantize(model, {".*": "w8a8"}), x))


def test_weights_take_exactly_their_bits():
    model = jq.nnx.freeze(
        jq.nnx.quantize(nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(0)), {".*": "w3a16"})
    )
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(x.nbytes for x in leaves) == 64 * 32 * 3 // 8 + 4 * 32


@pytest.mark.long
@pytest.mark.parametrize("donate", [False, True])
def test_freezing_holds_one_layer_at_a_time(donate, monkeypatch):
    """Live buffers at their peak: above the model's own, one layer, where the floats are given up."""
    gc.collect()
    others = [id(x) for x in jax.live_arrays()]  # of other tests, whatever they keep

    def live():
        return sum(x.nbytes for x in jax.live_arrays() if id(x) not in others)

    layers = [nnx.Linear(256, 256, use_bias=False, rngs=nnx.Rngs(i)) for i in range(6)]
    model = jq.nnx.quantize(nnx.Sequential(*layers), {".*": "w8a8"})
    del layers
    gc.collect()
    peaks, own = [], live()
    from jaxquant.functions import freezing

    store = freezing.stored_operand

    def watched(*args):
        stored = jax.block_until_ready(store(*args))
        peaks.append(live())
        return stored

    monkeypatch.setattr(freezing, "stored_operand", watched)
    frozen = jq.nnx.freeze(model, donate=donate)
    largest, stored = 256 * 256 * 4, 256 * 256 + 256 * 4
    assert len(peaks) == 6
    if donate:
        assert max(peaks) - own <= largest
        assert live() < own / 3
        with pytest.raises(RuntimeError, match="deleted"):
            model(jnp.ones((1, 256)))
    else:  # the floats stay, so what is added is the frozen model itself
        assert max(peaks) - own <= 6 * stored
        model(jnp.ones((1, 256)))
    chex.assert_shape(frozen(jnp.ones((1, 256))), (1, 256))


def test_misuse_is_named():
    model, _x = make("transformer")
    with pytest.raises(ValueError, match="a quantized model is wanted"):
        jq.nnx.freeze(model)
    frozen = jq.nnx.freeze(jq.nnx.quantize(model, {".*": "w8a8"}))
    with pytest.raises(ValueError, match="frozen already"):
        jq.nnx.freeze(frozen)
    with pytest.raises(ValueError, match="frozen already"):
        jq.nnx.quantize(frozen, {".*": "w4a16"})
    learned = jq.nnx.quantize(model, {"blocks/up": "w4a4-lsq"})
    with pytest.raises(ValueError, match="no start yet"):
        jq.nnx.freeze(learned)
    traced = jq.DotGeneral(jq.Operands(rhs=jq.Quantizer(jq.Int(jnp.float32(4)))))
    with pytest.raises(ValueError, match=r"blocks/up/kernel.* cannot be frozen.*traced"):
        jq.nnx.freeze(jq.nnx.quantize(model, {"blocks/up": traced}))


def test_tokens_beyond_the_table_are_nan_frozen_or_not():
    model, _ = make("transformer")
    quantized = jq.nnx.quantize(model, {"embed": "w8a16"}).embed
    frozen = jq.nnx.freeze(quantized)
    tokens = jnp.array([0, 49, 50, -1, -51])
    found = frozen(tokens)
    np.testing.assert_array_equal(found, quantized(tokens))
    assert jnp.isnan(found).all(1).tolist() == [False, False, True, False, True]


@pytest.mark.long
def test_rows_of_a_stored_table():
    table = jq.quantize(jax.random.normal(jax.random.key(0), (10, 32)), jq.Quantizer(jq.INT4, 16))
    rows = jnp.array([[3, 0], [9, -1]])
    np.testing.assert_array_equal(jq.dequantize(table[rows]), jq.dequantize(table)[rows])
    np.testing.assert_array_equal(jq.dequantize(table.pack()[rows]), jq.dequantize(table)[rows])
    tensor = jq.quantize(jnp.ones((4, 8)), jq.Quantizer(jq.INT8))
    assert tensor[jnp.array([1])].shape == (1, 8)
    assert table[...] is table
    with pytest.raises(ValueError, match="array of integers"):
        table[1:2]
    assert read(nnx.Param(table)) is not None

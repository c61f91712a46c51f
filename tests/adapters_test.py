"""Low-rank adapters beside weights in few bits: they train as over a bfloat16 base, merge and are saved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.nnx.modules import read

pytestmark = [pytest.mark.usefixtures("as_users_compute"), pytest.mark.exhaustive]
VOCAB, D = 50, 64


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(1, D, decode=False, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(D, 4 * D, rngs=rngs)
        self.down = nnx.Linear(4 * D, D, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(D, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class LM(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x)


@functools.partial(jax.jit, static_argnums=(1, 2))
def text(seed, shape, factor):
    """Each token mostly follows from the one before by a rule, another for each factor."""
    key, noise, other = jax.random.split(jax.random.key(seed), 3)
    first = jax.random.randint(key, shape[:1], 0, VOCAB)
    is_noise = jax.random.bernoulli(noise, 0.2, shape)
    others = jax.random.randint(other, shape, 0, VOCAB)

    def step(token, x):
        token = jnp.where(x[0], x[1], (factor * token + 7) % VOCAB)
        return token, token

    return jax.lax.scan(step, first, (is_noise.T, others.T))[1].T


def loss(model, tokens):
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def trained(model, steps, seed, factor, wrt):
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=wrt)

    @nnx.jit
    def step(model, optimizer, tokens):
        diff = nnx.DiffState(0, wrt)
        value, gradients = nnx.value_and_grad(loss, argnums=diff)(model, tokens)
        optimizer.update(model, gradients)
        return value

    for i in range(steps):
        step(model, optimizer, text(1000 * seed + i, (16, 33), factor))
    held_out = text(10**6 + seed, (256, 33), factor)
    return float(nnx.jit(loss)(model, held_out))


def bits(model):
    """Bits a weight of all that is stored."""
    held = jax.tree.leaves(nnx.state(model, jq.nnx.Stored))
    weights = sum(np.prod(x.shape) for _, x in stored(model))
    return 8 * sum(x.nbytes for x in held) / weights


def stored(model):
    found = nnx.to_flat_state(nnx.state(model, jq.nnx.Stored))
    return [(path, read(x)) for path, x in found]


@pytest.mark.long
def test_adapters_over_four_bits_train_as_over_bfloat16():
    """Three seeds, paired: a base of one task, adapted to another."""
    ratios = []
    for seed in range(3):
        base = LM(nnx.Rngs(seed))
        trained(base, 200, seed, 3, nnx.Param)
        graphdef, state = nnx.split(base)
        half = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
        few = jq.nnx.freeze(
            jq.nnx.quantize(half, {"blocks/.*": "nf4dq"}), text(0, (16, 33), 3)[:, :-1]
        )
        assert bits(few) <= 4.6
        before = [np.asarray(x) for x in jax.tree.leaves(nnx.state(few, jq.nnx.Stored))]
        losses = []
        for model in (half, few):
            start = float(nnx.jit(loss)(model, text(10**6 + seed, (256, 33), 5)))
            model = jq.nnx.add_lora(model, "blocks/.*", rank=8, alpha=16, rngs=nnx.Rngs(seed))
            same = float(nnx.jit(loss)(model, text(10**6 + seed, (256, 33), 5)))
            assert same == pytest.approx(start, rel=1e-3)
            losses.append(trained(model, 300, seed, 5, nnx.LoRAParam))
            assert losses[-1] < 0.8 * start
        after = [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, jq.nnx.Stored))]
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)
        ratios.append(losses[1] / losses[0])
    assert np.mean(ratios) < 1.02
    assert max(ratios) < 1.04


def adapted(recipe="nf4dq", rank=4):
    model = jq.nnx.quantize(LM(nnx.Rngs(0)), {"blocks/.*": recipe})
    model = jq.nnx.add_lora(
        jq.nnx.freeze(model), "blocks/.*(up|down|query)", rank=rank, rngs=nnx.Rngs(1)
    )
    for _, module in nnx.iter_graph(model):
        for name, x in list(vars(module).items()) if isinstance(module, nnx.Module) else ():
            if str(name).endswith("_lora_b"):
                x[...] = 0.1 * jax.random.normal(jax.random.key(2), x.shape)
    return model


@pytest.mark.long
def test_the_product_beside_is_what_it_says():
    model = adapted()
    up, x = model.blocks[0].up, jax.random.normal(jax.random.key(0), (3, D))
    plain = jq.nnx.freeze(jq.nnx.quantize(LM(nnx.Rngs(0)), {"blocks/.*": "nf4dq"})).blocks[0].up(x)
    beside = x @ read(up.kernel_lora_a) @ read(up.kernel_lora_b)
    np.testing.assert_allclose(up(x), plain + beside, rtol=1e-5, atol=1e-5)


def test_merged_and_saved(tmp_path):
    model, tokens = adapted(), text(0, (16, 33), 3)[:, :-1]
    run = nnx.jit(lambda m, x: m(x))
    expected = run(model, tokens)
    merged = jq.nnx.merge_lora(model)
    assert type(merged) is LM
    assert not jax.tree.leaves(nnx.state(merged, (jq.nnx.Stored, nnx.LoRAParam)))
    np.testing.assert_allclose(run(merged, tokens), expected, rtol=1e-3, atol=1e-3)
    jq.nnx.save(tmp_path / "model", model)
    loaded = jq.nnx.load(tmp_path / "model", LM(nnx.Rngs(5)))
    np.testing.assert_array_equal(run(loaded, tokens), expected)


class Tied(nnx.Module):
    """Two layers with one weight, and one of their own."""

    def __init__(self, rngs):
        self.up = nnx.Linear(D, D, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(D, D, rngs=rngs)
        self.again = nnx.Linear(D, D, use_bias=False, rngs=rngs)
        self.again.kernel = self.up.kernel

    def __call__(self, x):
        return self.again(nnx.relu(self.down(self.up(x))))


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16g16", "nf4dq", "fp8_train", "nvfp4", "w4a8-lsq"])
def test_a_frozen_model_is_trained_on_with_all_its_weights(recipe, tmp_path):
    x = jax.random.normal(jax.random.key(0), (32, D))
    low = jq.nnx.quantize(Tied(nnx.Rngs(0)), {".*": recipe})
    if recipe.endswith("lsq"):
        jq.nnx.calibrate(low, [x])
    run = nnx.jit(lambda model, x: model(x))
    frozen = jq.nnx.freeze(low, x)
    jq.nnx.save(tmp_path / "model", frozen)
    model = jq.nnx.unfreeze(jq.nnx.load(tmp_path / "model", Tied(nnx.Rngs(1))))
    np.testing.assert_array_equal(run(model, x), run(frozen, x))
    assert model.up.kernel is model.again.kernel
    assert not jax.tree.leaves(nnx.state(model, jq.nnx.Stored))
    # LSQ starts at steps of 2 · 0.8 σ / √7, whose rounding is σ · 0.6 / √12; the others' are finer.
    most = 0.2 if recipe.endswith("lsq") else 0.15
    for name in ("up", "down"):
        kernel, before = (getattr(m, name).kernel[...] for m in (model, low))
        assert 0 < jnp.linalg.norm(kernel - before) < most * jnp.linalg.norm(before)
    optimizer, losses = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param), []
    for _ in range(20):
        value, gradients = nnx.jit(nnx.value_and_grad(lambda m: ((m(x) - x) ** 2).mean()))(model)
        optimizer.update(model, gradients)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    again = jq.nnx.freeze(model, x)
    np.testing.assert_array_equal(run(again, x), run(model, x))
    assert bits(again) == bits(frozen)


def test_ranges_that_follow_from_the_values_are_found_anew():
    """QuEST's: what is decoded is rounded once more, by about as much."""
    x = jax.random.normal(jax.random.key(0), (32, D))
    low = jq.nnx.quantize(Tied(nnx.Rngs(0)), {".*": "w4a4-quest"})
    frozen = jq.nnx.freeze(low, x)
    found, expected = (nnx.jit(lambda m, x: m(x))(m, x) for m in (jq.nnx.unfreeze(frozen), frozen))
    assert 0 < jnp.linalg.norm(found - expected) < 0.3 * jnp.linalg.norm(expected)


def test_a_weight_in_several_places_is_merged_in_all_of_them():
    x = jax.random.normal(jax.random.key(0), (32, D))
    frozen = jq.nnx.freeze(jq.nnx.quantize(Tied(nnx.Rngs(0)), {".*": "nf4"}), x)
    assert jax.tree.leaves(nnx.state(frozen, jq.nnx.Stored))
    merged = jq.nnx.merge_lora(jq.nnx.add_lora(frozen, "down", rank=2, rngs=nnx.Rngs(1)))
    assert merged.up.kernel is merged.again.kernel
    run = nnx.jit(lambda model, x: model(x))
    np.testing.assert_allclose(run(merged, x), run(frozen, x), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_what_is_not_frozen_or_has_no_adapters_is_named():
    model = LM(nnx.Rngs(0))
    add = lambda *args, **options: jq.nnx.add_lora(*args, rngs=nnx.Rngs(1), **options)  # noqa: E731
    for call, message in (
        (lambda: add(model, "nothing", rank=4), "'nothing' matches no weight"),
        (lambda: add(model, rank=0), "rank must be an integer"),
        (lambda: add(adapted(), "blocks/.*up", rank=4), "has adapters already"),
        (lambda: jq.nnx.merge_lora(jq.nnx.quantize(model, {".*": "w8a8"})), "has no adapters"),
        (lambda: jq.nnx.unfreeze(model), "a frozen model is wanted; this LM has no stored weight"),
        (lambda: jq.nnx.unfreeze(3), "an NNX model is wanted"),  # pyright: ignore
        (lambda: add(nnx.Conv(8, 8, (3,), rngs=nnx.Rngs(0)), rank=4), "matches no weight"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


class Raw(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.w = nnx.Param(jnp.eye(8))

    def __call__(self, x):
        return self.layer(x) @ self.w[...]


def test_no_adapter_is_lost_when_some_cannot_be_merged():
    x = jnp.ones((2, 8))
    adapted = jq.nnx.add_lora(Raw(), ".*", x, rank=2, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"w have adapters, .* give them"):
        jq.nnx.merge_lora(adapted)
    merged = jq.nnx.merge_lora(adapted, x)
    assert jnp.allclose(merged(x), adapted(x), atol=1e-5)
    with pytest.raises(ValueError, match="Raw has no adapters"):
        jq.nnx.merge_lora(Raw())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": float("nan")}, "alpha must be a number that is finite; got nan"),
        ({"alpha": "8"}, "alpha must be a number that is finite; got '8'"),
        ({"rngs": 0}, "rngs are nnx.Rngs with a stream for params; got 0"),
        ({"rngs": nnx.Rngs(dropout=0)}, "rngs are nnx.Rngs with a stream for params"),
        ({"modules": jnp.ones((2, 8))}, "modules is a regular expression, before any inputs"),
    ],
)
def test_what_no_adapter_can_be_made_of_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        jq.nnx.add_lora(Raw(), **{"rank": 2, "rngs": nnx.Rngs(1), **change})

"""What people write around Flax's layers: reached by the engine, trained, frozen, and the same bits then."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from by_hand import by_hand
from flax import nnx

import jaxquant as jq
from jaxquant.nnx.modules import read

pytestmark = [pytest.mark.usefixtures("as_users_compute"), pytest.mark.exhaustive]
RECIPES = ["w8a8", "w4a16g16", "int8_train", "fp8_train", "nf4"]
D, H, K, VOCAB, LAYERS = 64, 4, 16, 50, 3
TOKENS = jnp.arange(12).reshape(2, 6)


def param(rngs, *shape):
    return nnx.Param(0.1 * jax.random.normal(rngs.params(), shape))


class Scaled(nnx.Embed):
    """An Embed with a call of its own, as Flax's gemma has."""

    def __call__(self, inputs, out_sharding=None):
        return super().__call__(inputs, out_sharding) * jnp.sqrt(1.0 * self.features)


class RawAttention(nnx.Module):
    """Raw einsums, as in qwen3: weights on the left, rotated queries and keys."""

    def __init__(self, rngs):
        self.table = Scaled(VOCAB, D, rngs=rngs)
        self.q, self.k, self.v = (param(rngs, H, D, K) for _ in range(3))
        self.o = param(rngs, H, K, D)

    def __call__(self, tokens):
        x = self.table(tokens)
        q, k, v = (jnp.einsum("hdk,btd->bhtk", w[...], x) for w in (self.q, self.k, self.v))
        angle = jnp.arange(tokens.shape[1])[:, None] / jnp.arange(1, K + 1)
        q, k = q * jnp.cos(angle), k * jnp.cos(angle)
        weights = jax.nn.softmax(jnp.einsum("bhtk,bhsk->bhts", q, k) / K**0.5)
        x = x + jnp.einsum("bhtk,hkd->btd", jnp.einsum("bhts,bhsk->bhtk", weights, v), self.o[...])
        return jnp.dot(x, self.table.embedding[...].T)


class StateSpace(nnx.Module):
    """Scans and einsums of activations, and a head tied by hand, as in mamba2."""

    def __init__(self, rngs):
        self.embedding = param(rngs, VOCAB, D)
        self.into = nnx.Linear(D, 3 * D, use_bias=False, rngs=rngs)
        self.decay = nnx.Param(jnp.ones(D))

    def __call__(self, tokens):
        x = self.embedding[...].at[tokens].get()
        u, b, c = jnp.split(self.into(x), 3, axis=-1)
        scores = jnp.einsum("btd,bsd->bts", c, b) * jnp.tril(jnp.ones((6, 6)))
        y = jnp.einsum("bts,bsd->btd", scores, u) * jax.nn.sigmoid(self.decay[...])
        return y @ self.embedding[:].T


class Recurrent(nnx.Module):
    """An LSTM cell within a scan, as in sst2."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        self.cell = nnx.OptimizedLSTMCell(D, D, rngs=rngs)
        self.head = nnx.Linear(D, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        carry = (jnp.zeros((2, D)), jnp.zeros((2, D)))
        step = nnx.scan(
            lambda cell, c, x: cell(c, x), in_axes=(None, nnx.Carry, 1), out_axes=(nnx.Carry, 1)
        )
        return self.head(step(self.cell, carry, x)[1])


class Pictures(nnx.Module):
    """Convolutions that go down and up again, with running statistics, as in a U-Net."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        self.down = nnx.Conv(1, D, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.up = nnx.ConvTranspose(D, 8, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(8 * D, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.norm(self.down(self.embed(tokens)[..., None]))
        x = self.up(nnx.relu(x))
        return self.head(x.reshape(2, 6, -1))


class Experts(nnx.Module):
    """Raw weights of experts: in a batched product, and by groups of rows."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        self.router = nnx.Linear(D, 4, use_bias=False, rngs=rngs)
        self.up, self.down = param(rngs, 4, D, 2 * D), param(rngs, 4, 2 * D, D)

    def __call__(self, tokens):
        x = self.embed(tokens)
        shares = jax.nn.softmax(self.router(x))
        y = jnp.einsum("btd,edf->ebtf", x, self.up[...])
        y = jnp.einsum("ebtf,efd->ebtd", nnx.relu(y), self.down[...])
        return self.embed.attend(jnp.einsum("ebtd,bte->btd", y, shares))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, 2 * D, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(2 * D, D, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


class Stacked(nnx.Module):
    """Layers that nnx.vmap stacks along an axis, under nnx.scan and nnx.remat."""

    def __init__(self, rngs, axis):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=axis)
        def make(rngs):
            return Block(rngs)

        self.embed, self.axis = nnx.Embed(VOCAB, D, rngs=rngs), axis
        self.blocks = make(nnx.Rngs(1))

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, self.axis), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        return self.embed.attend(run(self.embed(tokens), self.blocks))


MODELS = {
    "raw_attention": RawAttention,
    "state_space": StateSpace,
    "recurrent": Recurrent,
    "pictures": Pictures,
    "experts": Experts,
}


def made(name):
    return MODELS[name](nnx.Rngs(0))


def run(model, *inputs):
    return nnx.jit(lambda model, *inputs: model(*inputs))(model, *inputs)


def trained(model, steps=20):
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    targets = (TOKENS + 1) % VOCAB

    @nnx.jit
    def step(model, optimizer):
        loss = lambda m: optax.softmax_cross_entropy_with_integer_labels(m(TOKENS), targets).mean()  # noqa: E731
        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    return [float(step(model, optimizer)) for _ in range(steps)]


def served(model, frozen, tmp_path):
    """A frozen model's results, which are the same bits from a folder and from an exported program."""
    found = run(frozen, TOKENS)
    jq.nnx.save(tmp_path / "model", frozen)
    loaded = jq.nnx.load(tmp_path / "model", model)
    assert (run(loaded, TOKENS) == found).all()
    program = jq.serving.load(jq.serving.export(loaded, TOKENS))
    assert (program(TOKENS) == found).all()
    return found


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "recipe",
    [r if r in ("w8a8", "nf4") else pytest.param(r, marks=pytest.mark.long) for r in RECIPES],
)
@pytest.mark.parametrize("name", MODELS)
def test_models_go_from_rules_to_training_to_frozen_and_served(name, recipe, tmp_path):
    model = made(name)
    exact = run(made(name), TOKENS)
    low = jq.nnx.quantize(model, {".*": recipe}, on_unsupported="float")
    first = run(low, TOKENS)
    error = float(jnp.linalg.norm(first - exact) / jnp.linalg.norm(exact))
    assert 0 < error < {"w8a8": 0.05, "int8_train": 0.05, "fp8_train": 0.12}.get(recipe, 0.35)
    losses = trained(low)
    assert losses[-1] < 0.9 * losses[0]
    low.eval()
    frozen = jq.nnx.freeze(low, TOKENS)
    start = made(name)
    start.eval()
    assert (served(start, frozen, tmp_path) == run(low, TOKENS)).all()
    table = jq.nnx.coverage(model, {".*": recipe}, TOKENS)
    assert all(row.is_quantized or row.reason for row in table)
    if recipe in ("w8a8", "int8_train"):
        weights = [row for row in table if row.path.split("/")[-1] not in ("", "table")]
        assert weights


@pytest.mark.first(1)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    "recipe",
    [r if r in ("w8a8", "w4a16g16") else pytest.param(r, marks=pytest.mark.long) for r in RECIPES],
)
def test_stacked_layers_freeze_along_every_axis(axis, recipe, tmp_path):
    low = jq.nnx.quantize(Stacked(nnx.Rngs(0), axis), {".*": recipe})
    beside = jq.nnx.quantize(Stacked(nnx.Rngs(0), 0), {".*": recipe})
    assert (run(low, TOKENS) == run(beside, TOKENS)).all()
    exact = run(Stacked(nnx.Rngs(0), 0), TOKENS)
    assert 0 < jnp.linalg.norm(run(low, TOKENS) - exact) < 0.35 * jnp.linalg.norm(exact)
    losses = trained(low)
    assert losses[-1] < 0.9 * losses[0]
    frozen = jq.nnx.freeze(low, TOKENS)
    assert (served(Stacked(nnx.Rngs(0), axis), frozen, tmp_path) == run(low, TOKENS)).all()


@dataclasses.dataclass(frozen=True)
class Config:
    """One that is not hashed, as gemma3's with its list of kinds of layers."""

    kinds: list[str]


class Configured(nnx.Module):
    """Settings in a config with a list, and pictures of three channels, which no block of 16 divides."""

    def __init__(self, rngs):
        self.config = Config(["full", "sliding"])
        self.patches = nnx.Conv(3, D, (2, 2), strides=(2, 2), padding="VALID", rngs=rngs)
        self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in self.config.kinds])

    def __call__(self, pixels):
        x = self.patches(pixels)
        for kind, layer in zip(self.config.kinds, self.layers, strict=True):
            x = x + jnp.tanh(layer(x)) * (1 if kind == "full" else 0.5)
        return x.mean((1, 2))


@pytest.mark.long
def test_settings_that_are_not_hashed_and_products_left_in_float_all_the_way(tmp_path):
    """What cannot take its recipe, and stays in float by on_unsupported, does so in a loaded model too."""
    pixels = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    model = Configured(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"patches/kernel .* cannot take w4a16g16"):
        jq.nnx.quantize(model, {".*": "w4a16g16"})(pixels)
    low = jq.nnx.quantize(model, {".*": "w4a16g16"}, on_unsupported="float")
    expected = run(low, pixels)
    difference = jnp.linalg.norm(expected - run(model, pixels))
    assert 0 < difference < 0.2 * jnp.linalg.norm(run(model, pixels))
    frozen = jq.nnx.freeze(low, pixels)
    assert (run(frozen, pixels) == expected).all()
    for each in (frozen, low):
        jq.nnx.save(tmp_path / type(each).__name__ / str(id(each)), each)
        loaded = jq.nnx.load(
            tmp_path / type(each).__name__ / str(id(each)), Configured(nnx.Rngs(1))
        )
        assert (run(loaded, pixels) == expected).all()
        assert (run(jq.nnx.add_lora(loaded, rank=2, rngs=nnx.Rngs(0)), pixels) == expected).all()


@pytest.mark.long
def test_stock_layers_have_the_bits_that_they_have_by_hand():
    class Stock(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(H, D, decode=False, rngs=rngs)
            self.general = nnx.LinearGeneral((D,), (H, K), rngs=rngs)
            self.back = nnx.Einsum("bthk,hkd->btd", (H, K, D), (D,), rngs=rngs)
            self.conv = nnx.Conv(D, D, (3,), rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = x + self.attention(x)
            return self.embed.attend(self.conv(x + self.back(self.general(x))))

    for recipe in ("w8a8", "w4a16", "int8_train"):
        model = Stock(nnx.Rngs(0))
        own = by_hand(model, {"": recipe})
        by_trace = jq.nnx.quantize(model, {".*": recipe})
        assert (run(own, TOKENS) == run(by_trace, TOKENS)).all()
        gradients = [
            nnx.jit(nnx.grad(lambda m: (m(TOKENS) ** 2).sum()))(m) for m in (own, by_trace)
        ]
        for a, b in zip(
            *(jax.tree.leaves(nnx.state(g, nnx.Param)) for g in gradients), strict=True
        ):
            assert (a == b).all()
        frozen = run(jq.nnx.freeze(by_trace, TOKENS), TOKENS)
        assert (frozen == run(own, TOKENS)).all()


def test_what_a_call_changes_is_written_to_the_model():
    model = made("pictures")
    low = jq.nnx.quantize(model, {"head|embed": "w8a8"})
    before = low.norm.mean[...]
    low(TOKENS)
    eager = low.norm.mean[...]
    assert (eager != before).any()
    run(low, TOKENS)
    assert (low.norm.mean[...] != eager).any()
    assert (model.norm.mean[...] == before).all()


def test_parts_of_a_model_are_quantized_by_themselves():
    model = made("recurrent")
    low = jq.nnx.quantize(model, {"head": "w4a16"})
    x = jax.random.normal(jax.random.key(0), (2, D))
    assert (low.head(x) == jq.nnx.quantize(model.head, {".*": "w4a16"})(x)).all()
    assert (low.head(x) != model.head(x)).any()
    assert type(model.head) is nnx.Linear
    assert isinstance(low.head, nnx.Linear)


def test_methods_caches_and_random_streams():
    attention = nnx.MultiHeadAttention(H, D, dropout_rate=0.5, rngs=nnx.Rngs(0))
    low = jq.nnx.quantize(attention, {".*": "w8a8"})
    x = jax.random.normal(jax.random.key(0), (2, 6, D))
    a, b = (low(x, decode=False, deterministic=False) for _ in range(2))
    assert (a != b).any()
    low.init_cache((2, 6, D))
    step = functools.partial(low, decode=True, deterministic=True)
    parts = jnp.concatenate([step(x[:, i : i + 1]) for i in range(6)], axis=1)
    mask = nnx.make_causal_mask(jnp.ones((2, 6)))
    whole = jq.nnx.quantize(attention, {".*": "w8a8"})(
        x, mask=mask, decode=False, deterministic=True
    )
    assert int(read(low.cache_index)) == 6  # pyright: ignore
    assert float(jnp.abs(parts - whole).max()) < 0.05 * float(jnp.abs(whole).max())


def test_intermediates_come_out():
    class Sown(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(D, 2 * D, rngs=rngs)

        def __call__(self, x):
            y = self.up(x)
            self.sow(nnx.Intermediate, "seen", y)
            return y

    low = jq.nnx.quantize(Sown(nnx.Rngs(0)), {".*": "w8a8"})
    y = low(jnp.ones((1, D)))
    first = low(jnp.ones((1, D)))
    again = low(jnp.zeros((1, D)))
    for found, expected in zip(read(vars(low)["seen"]), (y, first, again), strict=True):
        assert (found == expected).all()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"nothing": "w8a8"}, "nothing has such a path"),
        ({".*": "w8a8", "head": "w4a16"}, "earlier rules took"),
        ({".*": "no"}, "no"),
    ],
)
def test_rules_that_fit_nothing_are_named_before_any_call(rules, message):
    with pytest.raises(ValueError, match=message):
        jq.nnx.quantize(made("recurrent"), rules)


def test_no_model_and_no_input_are_named():
    with pytest.raises(ValueError, match="an NNX model is wanted; got int"):
        jq.nnx.quantize(3, {".*": "w8a8"})  # pyright: ignore
    with pytest.raises(ValueError, match="no weight to quantize"):
        jq.nnx.quantize(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), {".*": "w8a8"})
    with pytest.raises(ValueError, match="a quantized model is wanted"):
        jq.nnx.freeze(made("experts"), TOKENS)


class Plainly(nnx.Module):
    """A parameter that is multiplied as a variable, by integers too."""

    def __init__(self, rngs):
        self.first, self.second = param(rngs, 8, D), param(rngs, D, 4)

    def __call__(self, x):
        return jax.nn.relu(x @ self.first) @ self.second


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "int8_train"])
def test_integers_by_weights_and_variables_as_arrays_are_quantized_and_frozen(recipe):
    model = Plainly(nnx.Rngs(0))
    counts = jnp.arange(-16, 16, dtype=jnp.int8).reshape(4, 8)
    low = jq.nnx.quantize(model, {".*": recipe})
    assert jq.nnx.coverage(model, {".*": recipe}, counts).quantized == 1
    found, floats = run(low, counts), run(low, counts.astype(jnp.float32))
    assert (found == floats).all()
    assert (
        0 < jnp.linalg.norm(found - run(model, counts)) < 0.2 * jnp.linalg.norm(run(model, counts))
    )
    frozen = jq.nnx.freeze(low, counts)
    assert (run(frozen, counts) == found).all()
    tuned = jq.ptq.quantize(model, {".*": "w8a8"}, [counts.astype(jnp.float32)], progress=False)
    assert run(tuned, counts).shape == (4, 4)


def test_solutions_of_linear_equations_stay_in_float_and_are_named():
    w = {"a": jnp.eye(8) + 0.1, "b": jnp.arange(32.0).reshape(8, 4)}
    f = lambda w, x: x @ jnp.linalg.inv(w["a"]) @ w["b"]  # noqa: E731
    x = jnp.arange(16.0).reshape(2, 8)
    found = jq.functions.quantize(f, {"b": "w8a8"})(w, x)
    assert 0 < jnp.linalg.norm(found - f(w, x)) < 0.03 * jnp.linalg.norm(f(w, x))
    with pytest.raises(ValueError, match="it is within"):
        jq.functions.quantize(f, {".*": "w8a8"})(w, x)

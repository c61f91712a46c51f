"""Subclasses of Flax's layers with methods of their own, and code that reads weights itself."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxquant as jq
from jaxquant import linen
from jaxquant.nnx.modules import read

pytestmark = pytest.mark.exhaustive  # minutes, once in CI

RUN = nnx.jit(lambda model, *inputs: model(*inputs))
TOKENS = jnp.arange(12).reshape(2, 6) % 80


class Embedder(nnx.Embed):
    """As gemma's: rows are scaled by √d, and logits softly capped."""

    def __init__(self, *args, cap=30.0, **options):
        super().__init__(*args, **options)
        self.cap = cap

    def __call__(self, tokens):
        return super().__call__(tokens) * self.features**0.5

    def attend(self, x):
        return self.cap * jnp.tanh(super().attend(x) / self.cap)


class Doubled(nnx.Linear):
    def __call__(self, x, factor=2.0):
        return factor * super().__call__(x)


class Model(nnx.Module):
    def __init__(self, rngs=None):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.embed = Embedder(80, 64, cap=20.0, rngs=rngs)
        self.up = Doubled(64, 64, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(jnp.tanh(self.up(self.embed(tokens))))


def rounded(model, recipe):
    """The float model with its weights quantized beforehand."""
    model = nnx.clone(model)
    quantizer = jq.recipe(recipe).forward.rhs
    model.embed.embedding[...] = jq.fake_quant(model.embed.embedding[...], quantizer, axis=1)
    model.up.kernel[...] = jq.fake_quant(model.up.kernel[...], quantizer, axis=0)
    return model


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["w8a16", "w4a16"])
def test_a_subclass_keeps_its_own_methods(recipe, tmp_path):
    model = Model()
    quantized = jq.nnx.quantize(model, {".*": recipe})
    expected = RUN(rounded(model, recipe), TOKENS)
    found = RUN(quantized, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    frozen = jq.nnx.freeze(quantized)
    np.testing.assert_array_equal(RUN(frozen, TOKENS), found)
    assert isinstance(frozen.embed, Embedder)
    assert frozen.embed.cap == 20.0
    jq.nnx.save(tmp_path / "model", frozen)
    loaded = jq.nnx.load(tmp_path / "model", nnx.eval_shape(Model))
    np.testing.assert_array_equal(RUN(loaded, TOKENS), found)


def test_a_quantized_subclass_is_copied_split_and_pickled():
    quantized = jq.nnx.quantize(Model(), {".*": "w8a8"})
    again = jq.nnx.quantize(Model(), {".*": "w8a8"})
    assert nnx.graphdef(quantized) == nnx.graphdef(again)
    cls = type(quantized.embed)
    assert cls.__name__ == "Embedder"
    for other in (copy.deepcopy(quantized), nnx.clone(quantized)):
        assert type(other.embed) is cls
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert type(jq.nnx.quantize(quantized, {".*": "w4a16"}).embed) is cls


class OwnLinear(nnx.Linear):
    def __call__(self, x):
        return x @ self.kernel[...]


class OwnGeneral(nnx.LinearGeneral):
    def __call__(self, x):
        return jnp.tensordot(x, self.kernel[...], ((-2, -1), (0, 1)))


class OwnEinsum(nnx.Einsum):
    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.kernel[...])


class OwnConv(nnx.Conv):
    def __call__(self, x):
        numbers = ("NWC", "WIO", "NWC")
        kernel = self.kernel[...]
        return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=numbers)


class OwnRows(nnx.Embed):
    def __call__(self, tokens):
        return self.embedding[...][tokens] * 8.0


class OwnHead(nnx.Embed):
    def attend(self, x):
        return x @ self.embedding[...].T


class PastSuper(nnx.Embed):
    def __call__(self, tokens):
        return nnx.Embed.__call__(self, tokens)


class OwnAttention(nnx.MultiHeadAttention):
    def __call__(self, x):
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", self.query(x), self.key(x)), axis=-1)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, self.value(x)))


RNGS = nnx.Rngs(0)
X = jax.random.normal(jax.random.key(3), (2, 6, 64))
# What each makes, which of its methods, an input, and what its weight is summed over.
OWN = {
    "OwnLinear": (lambda: OwnLinear(64, 64, rngs=RNGS), "__call__", X, 0),
    "OwnGeneral": (
        lambda: OwnGeneral((4, 16), 64, axis=(-2, -1), rngs=RNGS),
        "__call__",
        X.reshape(2, 6, 4, 16),
        (0, 1),
    ),
    "OwnEinsum": (lambda: OwnEinsum("btd,dk->btk", (64, 64), rngs=RNGS), "__call__", X, 0),
    "OwnConv": (lambda: OwnConv(64, 64, (3,), rngs=RNGS), "__call__", X, (0, 1)),
    "OwnRows": (lambda: OwnRows(80, 64, rngs=RNGS), "__call__", TOKENS, 1),
    "OwnHead": (lambda: OwnHead(80, 64, rngs=RNGS), "attend", X, 1),
    "PastSuper": (lambda: PastSuper(80, 64, rngs=RNGS), "__call__", TOKENS, 1),
}


@pytest.mark.first(1)
@pytest.mark.parametrize("name", OWN)
def test_a_method_of_ones_own_is_reached_whatever_it_does(name):
    """Its products are those of the weight quantized beforehand, and frozen they have the same bits."""
    make, method, inputs, axes = OWN[name]
    model = make()
    run = nnx.jit(lambda m, x: getattr(m, method)(x))
    weight = "embedding" if isinstance(model, nnx.Embed) else "kernel"
    quantized = jq.nnx.quantize(nnx.Sequential(model), {".*": "w4a16"}).layers[0]
    found = run(quantized, inputs)
    before = nnx.clone(model)
    rounded = jq.fake_quant(read(getattr(model, weight)), jq.recipe("w4a16").forward.rhs, axis=axes)
    getattr(before, weight)[...] = rounded
    np.testing.assert_allclose(found, run(before, inputs), rtol=1e-4, atol=1e-4)
    assert jnp.abs(found - run(model, inputs)).max() > 1e-3
    call = lambda m, x: getattr(m, method)(x)  # noqa: E731
    np.testing.assert_array_equal(run(jq.nnx.freeze(quantized, inputs, call=call), inputs), found)
    table = jq.nnx.coverage(quantized, None, inputs, call=call)
    assert [row.reason for row in table] == [""]


def test_attention_of_ones_own_is_reached():
    model = OwnAttention(2, 64, rngs=RNGS)
    rules = [("query|key|value|out", "w8a8"), ("", "a8")]
    table = jq.nnx.coverage(model, rules, X)
    assert table.quantized == 1
    assert {row.recipe for row in table} == {"w8a8", "a8"}
    found, exact = RUN(jq.nnx.quantize(model, rules), X), RUN(model, X)
    assert 0 < jnp.linalg.norm(found - exact) < 0.05 * jnp.linalg.norm(exact)


def test_stacked_layers_with_a_method_of_their_own_are_reached():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=1)
    def stack(rngs):
        return OwnLinear(64, 64, rngs=rngs)

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = stack(nnx.Rngs(0))

        def __call__(self, x):
            return nnx.scan(lambda x, one: one(x), in_axes=(nnx.Carry, 1), out_axes=nnx.Carry)(
                x, self.layers
            )

    quantized, expected = jq.nnx.quantize(Stack(), {".*": "w8a16"}), X
    kernel = read(quantized.layers.kernel)
    for i in range(3):
        quantizer = jq.recipe("w8a16").forward.rhs
        expected = expected @ jq.fake_quant(kernel[:, i], quantizer, axis=0)
    np.testing.assert_allclose(RUN(quantized, X), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(RUN(jq.nnx.freeze(quantized, X), X), RUN(quantized, X))


class Scaled(nnx.Linear):
    """Multiplies by a weight that it has changed."""

    def __call__(self, x):
        return self.dot_general(x, self.kernel[...] * 2, (((x.ndim - 1,), (0,)), ((), ())))


class Regularized(nnx.Linear):
    def __call__(self, x):
        return super().__call__(x) + jnp.sum(self.kernel[...] ** 2)


def test_a_weight_is_stored_as_its_layer_changes_it():
    model, x = Scaled(64, 64, rngs=nnx.Rngs(0)), jnp.ones((2, 64))
    quantized = jq.nnx.quantize(nnx.Sequential(model), {".*": "w8a16"})
    np.testing.assert_allclose(quantized(x), model(x), rtol=2e-2, atol=2e-2)
    for frozen in (jq.nnx.freeze(quantized), jq.nnx.freeze(quantized, x)):
        np.testing.assert_array_equal(RUN(frozen, x), RUN(quantized, x))


def test_a_weight_that_its_own_layer_reads_is_named_when_it_is_frozen():
    model, x = Regularized(64, 64, rngs=nnx.Rngs(0)), jnp.ones((2, 64))
    quantized = jq.nnx.quantize(nnx.Sequential(model), {".*": "w8a16"})
    np.testing.assert_allclose(quantized(x), model(x), rtol=2e-2, atol=2e-2)
    for inputs in ((), (x,)):
        with pytest.raises(
            ValueError,
            match=r"layers/0/kernel is stored.*overriding_test\.py:\d+.*\('layers/0/kernel', None\)",
        ):
            jq.nnx.freeze(quantized, *inputs)


# ---------------------------------------------------------------------------------------------------
# Frozen weights that other code reads


class Tied(nnx.Module):
    """A head that reads the table itself, as `how` says."""

    def __init__(self, how):
        self.embed, self.how = nnx.Embed(80, 64, rngs=nnx.Rngs(0)), nnx.static(how)

    def __call__(self, tokens):
        return self.how(self.embed.embedding, self.embed(tokens))


READS = {
    ".T": lambda table, x: x @ table.T,
    "value": lambda table, x: x @ table[...].T,
    "operator @": lambda table, x: table[...] @ x.mT,
    "operator +": lambda table, x: table + 1,
    "right @": lambda table, x: x @ table[...],
    "NumPy": lambda table, x: np.ones((2, 80), np.float32) @ table[...],
    "einsum": lambda table, x: jnp.einsum("btd,vd->btv", x, table[...]),
    "variable": lambda table, x: jnp.dot(x, table),
    "rows": lambda table, x: table[TOKENS] * 8,
    "index": lambda table, x: table[0],
    "astype": lambda table, x: table[...].astype(jnp.bfloat16),
    "asarray": lambda table, x: jnp.asarray(table[...]),
    "np.asarray": lambda table, x: np.asarray(table[...]),
    "at": lambda table, x: table[...].at[0].set(0),
}


# Of these the table is multiplied, or rows are taken of it by integers of the input.
MULTIPLIED = {".T", "value", "operator @", "einsum"}


@pytest.mark.parametrize("how", READS)
def test_a_table_that_is_read_directly_is_multiplied_or_named(how):
    x = TOKENS if how != "right @" else TOKENS[:, :1]
    model = Tied(READS[how])
    quantized = jq.nnx.quantize(model, {".*": "w4a16"})
    if how in ("right @", "variable", "np.asarray"):  # which no model can do
        with pytest.raises((TypeError, jax.errors.TracerArrayConversionError)):
            RUN(quantized, x)
        return
    if how in MULTIPLIED:
        for frozen in (jq.nnx.freeze(quantized), jq.nnx.freeze(quantized, x)):
            np.testing.assert_array_equal(RUN(frozen, x), RUN(quantized, x))
        assert jq.nnx.coverage(model, {".*": "w4a16"}, x).quantized == 1
        return
    message = r"embed/embedding is stored.*\('embed/embedding', None\)"
    with pytest.raises(ValueError, match=message):
        jq.nnx.freeze(quantized, x)
    with pytest.raises(ValueError, match=message):
        RUN(jq.nnx.freeze(quantized), x)


def test_an_array_that_is_nobodys_says_how_to_get_one():
    stored = jq.quantize(jnp.ones((2, 64)), jq.Quantizer(jq.INT8))
    with pytest.raises(ValueError, match=r"QArray is no array.*\.T; jaxquant\.dequantize"):
        _ = stored.T
    assert not hasattr(stored, "nothing_of_arrays")
    assert not hasattr(stored, "reshape")
    assert jax.tree.structure(copy.deepcopy(stored)) == jax.tree.structure(stored)


# ---------------------------------------------------------------------------------------------------
# Weights of several layers


class Shared(nnx.Module):
    """A table that rows are taken of, and that a layer of its own multiplies by."""

    def __init__(self, seed=0, held=False):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(80, 64, rngs=rngs)
        self.head = nnx.Einsum("btd,vd->btv", (80, 64), rngs=rngs)
        self.head.kernel = self.embed.embedding
        if held:
            self.table = self.embed.embedding

    def __call__(self, tokens):
        return self.head(self.embed(tokens))


def held(model):
    """Bytes of the arrays that a model holds, each once."""
    arrays = jax.tree.leaves(nnx.state(model))
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in arrays}.values())


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16"])
def test_a_shared_weight_is_stored_once(recipe, tmp_path):
    model = Shared()
    quantized = jq.nnx.quantize(model, {".*": recipe})
    frozen = jq.nnx.freeze(quantized)
    assert frozen.head.kernel is frozen.embed.embedding
    stored = 80 * 64 * int(recipe[1]) // 8 + 80 * 4
    assert held(frozen) == stored
    np.testing.assert_array_equal(RUN(frozen, TOKENS), RUN(quantized, TOKENS))
    for table in (jq.nnx.coverage(frozen), jq.nnx.coverage(model, {".*": recipe})):
        assert table.bytes_after == stored
    jq.nnx.save(tmp_path / "model", frozen)
    assert (tmp_path / "model" / "arrays.safetensors").stat().st_size < stored + 1000
    loaded = jq.nnx.load(tmp_path / "model", Shared(seed=1))
    assert loaded.head.kernel is loaded.embed.embedding
    assert held(loaded) == stored
    np.testing.assert_array_equal(RUN(loaded, TOKENS), RUN(frozen, TOKENS))


def test_a_shared_weight_goes_by_the_names_of_all_its_places():
    with pytest.raises(ValueError, match="'head' is unused: earlier rules took embed/embedding"):
        jq.nnx.coverage(Shared(), {"embed": "w8a8", "head": None}, TOKENS)  # one weight, one recipe
    for rules in ({"embed": "w8a8"}, {"head": "w8a8"}):
        table = jq.nnx.coverage(Shared(), rules, TOKENS)
        assert [(row.path, row.recipe) for row in table] == [("embed/embedding", "w8a8")] * 2
    model = jq.nnx.quantize(Shared(held=True), {"head": "w8a8"})
    frozen = jq.nnx.freeze(model, TOKENS)
    assert frozen.table is frozen.embed.embedding is frozen.head.kernel
    np.testing.assert_array_equal(RUN(frozen, TOKENS), RUN(model, TOKENS))


def test_post_training_quantization_stores_a_shared_weight_once():
    found = jq.ptq.quantize(Shared(), {".*": "w4a16"}, [TOKENS], "rtn", progress=False)
    assert found.head.kernel is found.embed.embedding
    expected = read(jq.nnx.freeze(jq.nnx.quantize(Shared(), {".*": "w4a16"})).embed.embedding)
    np.testing.assert_array_equal(read(found.head.kernel).qvalue, expected.qvalue)
    with pytest.raises(ValueError, match=r"embed and head share one weight.*method 'gptq'"):
        jq.ptq.quantize(Shared(), {".*": "w4a16"}, [TOKENS], "gptq", progress=False)


# ---------------------------------------------------------------------------------------------------
# Linen


class LinenEmbedder(nn.Embed):
    def __call__(self, tokens):
        return super().__call__(tokens) * 8.0

    def attend(self, x):
        return jnp.tanh(super().attend(x))


class LinenRows(nn.Embed):
    def __call__(self, tokens):
        return self.embedding[tokens] * 8.0


class LinenHead(nn.Embed):
    def attend(self, x):
        return x @ self.embedding.T


class LinenDense(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", self.kernel_init, (x.shape[-1], self.features))


class LinenModel(nn.Module):
    embed: type
    dense: type = nn.Dense
    is_direct: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = self.embed(80, 64, name="embed")
        x = self.dense(64, name="up")(embed(tokens))
        return x @ embed.embedding.T if self.is_direct else embed.attend(x)


def test_linen_subclasses_keep_their_own_methods():
    module = LinenModel(LinenEmbedder)
    variables = module.init(jax.random.key(0), TOKENS)
    quantized = linen.quantize(module, {".*": "w8a16"})
    found, expected = (m.apply(variables, TOKENS) for m in (quantized, module))
    assert jnp.linalg.norm(found - expected) < 0.02 * jnp.linalg.norm(expected)
    frozen = linen.freeze(quantized, variables, TOKENS)
    np.testing.assert_array_equal(quantized.apply(frozen, TOKENS), found)


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("embed", "dense", "is_direct"),
    [
        (LinenRows, nn.Dense, False),
        (LinenHead, nn.Dense, False),
        (nn.Embed, LinenDense, False),
        (nn.Embed, nn.Dense, True),
    ],
)
def test_linen_methods_of_ones_own_are_quantized_and_frozen(embed, dense, is_direct, tmp_path):
    module = LinenModel(embed, dense, is_direct=is_direct)
    variables = module.init(jax.random.key(0), TOKENS)
    quantized = linen.quantize(module, {".*": "w8a16"})
    assert linen.coverage(module, {".*": "w8a16"}, TOKENS, variables=variables).quantized == 1
    found, expected = (m.apply(variables, TOKENS) for m in (quantized, module))
    assert 0 < jnp.linalg.norm(found - expected) < 0.02 * jnp.linalg.norm(expected)
    frozen = linen.freeze(quantized, variables, TOKENS)
    np.testing.assert_array_equal(quantized.apply(frozen, TOKENS), found)
    linen.save(tmp_path / "model", quantized, frozen, TOKENS)
    loaded, served = linen.load(tmp_path / "model", module, TOKENS)
    np.testing.assert_array_equal(loaded.apply(served, TOKENS), found)

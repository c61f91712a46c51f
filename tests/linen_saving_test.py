"""Linen models all the way: quantized, trained, frozen, saved, loaded and served, with the same bits."""

import json
import re
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from linen_models import KEY, MLP, MODELS, Transformer, normal

import jaxquant as jq
from jaxquant import linen

CHAIN = [
    ("mlp", {"heads": "w8a8", ".*": "w4a16"}, "safetensors"),
    ("cnn", {"head": None, ".*": "w8a8"}, "orbax"),
    ("resnet", {".*": "w8a8"}, "safetensors"),
    ("transformer", {".*attention": "a8kv4", ".*": "w4a8"}, "safetensors"),
    pytest.param("scan", {".*": "w8a8-token"}, "safetensors", marks=pytest.mark.long),
]


def trained(quantized, x, train):
    """Variables after 20 steps, with which the loss is lower."""
    variables = jax.jit(quantized.init)(KEY, x)
    mutable = [name for name in variables if name != "params"]

    @jax.jit
    def step(variables):
        def loss(params):
            y, state = quantized.apply({**variables, "params": params}, x, mutable=mutable, **train)
            return jnp.mean((y - 1) ** 2), state

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates = jax.tree.map(lambda g: -0.005 * g, gradients)
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, **state, "params": params}, value

    losses = []
    for _ in range(20):
        variables, value = step(variables)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    return variables


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("name", "rules", "format"), CHAIN, ids=["mlp", "cnn", "resnet", "transformer", "scan"]
)
def test_quantize_train_calibrate_freeze_save_load_serve(tmp_path, name, rules, format):
    module, x = MODELS[name]
    quantized = linen.quantize(module, rules)
    variables = trained(quantized, x, {"train": True} if name == "resnet" else {})
    if name in ("cnn", "resnet"):
        variables = linen.calibrate(quantized, variables, [x, 2 * x])
    expected = jax.jit(quantized.apply)(variables, x)
    assert not np.array_equal(expected, jax.jit(module.apply)(variables, x))

    frozen = linen.freeze(quantized, variables, x)
    linen.save(tmp_path / "model", quantized, frozen, x, format=format)
    loaded, served = linen.load(tmp_path / "model", module, x)
    np.testing.assert_array_equal(jax.jit(loaded.apply)(served, x), expected)
    assert jax.tree.map(lambda a: a.dtype, served) == jax.tree.map(lambda a: a.dtype, frozen)

    program = jq.serving.load(jq.serving.export(loaded.apply, x, weights=served))
    np.testing.assert_array_equal(program(x), expected)

    card = jq.artifacts.load_card(tmp_path / "model")
    assert [pattern for pattern, _ in card.rules] == list(rules)
    assert {row["path"] for row in card.coverage["rows"]} >= set(stored(frozen))
    assert (card.calibration is not None) == ("quantization" in frozen)


def stored(variables):
    is_stored = lambda x: isinstance(x, jq.QArray)  # noqa: E731
    found = jax.tree.leaves_with_path(variables["params"], is_leaf=is_stored)
    return ["/".join(k.key for k in path) for path, leaf in found if is_stored(leaf)]


@pytest.mark.long
def test_what_is_loaded_trains_on(tmp_path):
    x = normal(5, 32)
    quantized = linen.quantize(MLP(), {".*": "w8a8"})
    variables = quantized.init(KEY, x)
    linen.save(tmp_path / "model", quantized, variables, x)
    loaded, again = linen.load(tmp_path / "model", MLP(), x)
    gradients = [
        jax.grad(lambda v, q=q: jnp.sum(q.apply(v, x) ** 2))(v)
        for q, v in ((quantized, variables), (loaded, again))
    ]
    jax.tree.map(np.testing.assert_array_equal, *gradients)


@pytest.mark.long
def test_rules_that_are_objects_come_back(tmp_path):
    x = normal(5, 32)
    dot = jq.DotGeneral(jq.Operands(None, jq.Quantizer(jq.NF4, 32)))
    quantized = linen.quantize(MLP(), [(re.compile("(?i)UP"), dot), (".*", jq.recipe("w8a8"))])
    variables = quantized.init(KEY, x)
    frozen = linen.freeze(quantized, variables, x)
    linen.save(tmp_path / "model", quantized, frozen, x)
    loaded, served = linen.load(tmp_path / "model", MLP(), x)
    assert loaded.rules == (("(?i)UP", dot), (".*", jq.recipe("w8a8")))
    np.testing.assert_array_equal(loaded.apply(served, x), quantized.apply(variables, x))


class Smaller(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((2, 32), name="heads")(nn.relu(nn.Dense(64, name="up")(x)))


class Wider(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128, name="up")(x))
        return nn.DenseGeneral(8, axis=(-2, -1), name="down")(
            nn.DenseGeneral((2, 32), name="heads")(x)
        )


class Typed(nn.Module):
    """Layers, some of them within transforms, that compute in given types."""

    hidden: Any = None
    norm: Any = None
    head: Any = None
    parameters: Any = jnp.float32

    def setup(self):
        self.up = nn.jit(nn.Dense)(16, dtype=self.hidden)
        self.scale = nn.remat(nn.LayerNorm)(dtype=self.norm)
        self.heads = [nn.Dense(4, dtype=self.head, param_dtype=self.parameters) for _ in range(2)]

    def __call__(self, x):
        x = self.scale(self.up(x)).astype(jnp.float32)
        return sum(head(x).astype(jnp.float32) for head in self.heads)


@pytest.mark.long
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        ({"hidden": jnp.bfloat16}, {}, "up has dtype None here, and was saved with bfloat16"),
        ({}, {"norm": "bfloat16"}, "scale has dtype bfloat16 here, and was saved with None"),
        ({}, {"head": jnp.bfloat16}, r"heads_0 has dtype .* \(and 1 more differ\)"),
    ],
)
@jax.numpy_dtype_promotion("standard")  # which a layer without a type of its own goes by
def test_a_module_that_computes_in_other_types_is_an_error(tmp_path, saved, here, message):
    x = normal(5, 32)
    quantized = linen.quantize(Typed(**saved), {"up|heads.*": "w8a8"})
    variables = quantized.init(KEY, x)
    frozen = linen.freeze(quantized, variables, x)
    linen.save(tmp_path / "model", quantized, frozen, x)
    with pytest.raises(ValueError, match=message):
        linen.load(tmp_path / "model", Typed(**here), x)
    loaded, served = linen.load(tmp_path / "model", Typed(**saved), x)
    np.testing.assert_array_equal(loaded.apply(served, x), quantized.apply(frozen, x))
    other = Typed(**saved, parameters=jnp.bfloat16)  # whose arrays are the folder's
    loaded, served = linen.load(tmp_path / "model", other, x)
    np.testing.assert_array_equal(loaded.apply(served, x), quantized.apply(frozen, x))


def test_folders_of_before_types_were_noted_are_read(tmp_path):
    x = normal(5, 32)
    quantized = linen.quantize(nn.Dense(8), {".*": "w8a8"})
    variables = quantized.init(KEY, x)
    linen.save(tmp_path / "model", quantized, variables, x)
    tree, card = jq.artifacts.load(tmp_path / "model")
    before = {name: part for name, part in tree.items() if name != "types"}
    jq.artifacts.save(tmp_path / "before", before, card)
    loaded, again = linen.load(tmp_path / "before", nn.Dense(8), x)
    np.testing.assert_array_equal(loaded.apply(again, x), quantized.apply(variables, x))


def test_misuse_is_named(tmp_path):
    x = normal(5, 32)
    quantized = linen.quantize(MLP(), {".*": "w8a8"})
    variables = quantized.init(KEY, x)
    linen.save(tmp_path / "model", quantized, variables, x)
    with pytest.raises(ValueError, match="exists already"):
        linen.save(tmp_path / "model", quantized, variables, x)
    with pytest.raises(ValueError, match=r"what jaxquant\.linen\.quantize made"):
        linen.save(tmp_path / "other", MLP(), variables, x)
    flagged = linen.quantize(MLP(), {re.compile(".*", re.IGNORECASE): "w8a8"})
    with pytest.raises(ValueError, match="is compiled with flags"):
        linen.save(tmp_path / "other", flagged, variables, x)
    with pytest.raises(ValueError, match=r"flax\.linen\.Module"):
        linen.load(tmp_path / "model", Transformer, x)
    with pytest.raises(ValueError, match="is missing"):
        linen.load(tmp_path / "nothing", MLP(), x)
    jq.artifacts.save(tmp_path / "tree", {"bias": jnp.ones(3)}, jq.artifacts.Card.empty())
    with pytest.raises(ValueError, match="not of a Linen model"):
        linen.load(tmp_path / "tree", MLP(), x)
    for other, message in (
        (nn.Dense(8), "lacks the module's params/bias"),
        (Smaller(), "has what the module does not: params/down"),
        (Wider(), r"has shape \(128, 2, 32\) in the module, and was saved with \(64, 2, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            linen.load(tmp_path / "model", other, x)
    card = json.loads((tmp_path / "model" / "card.json").read_text())
    (tmp_path / "model" / "card.json").write_text(json.dumps({**card, "version": 99}))
    with pytest.raises(ValueError, match="of version 99; this is version 1"):
        linen.load(tmp_path / "model", MLP(), x)


def resaved(folder, change):
    """The folder's tree changed, and saved again."""
    tree, card = jq.artifacts.load(folder)
    shutil.rmtree(folder)
    jq.artifacts.save(folder, change(tree), card)


class Named(nn.Module):
    layer: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name=self.layer)(x)


X3 = np.zeros(3, np.float32)


def with_pattern(pattern):
    def change(tree):
        rule = tree["rules"][0] | {"pattern": np.frombuffer(pattern, np.uint8)}
        return tree | {"rules": {0: rule}}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_pattern(b"(a)\\1"), "which is not matched in a rule of a file"),
        (with_pattern(b"a" * 2000), "has 2000 letters"),
        (with_pattern(b"(" * 900 + b")" * 900), "letters|deep"),
        (with_pattern(b"\xff"), "can't decode byte"),
        (lambda t: t | {"rules": {0: {"pattern": np.zeros((2, 2), np.uint8)}}}, "bytes in line"),
        (lambda t: t | {"rules": {1: t["rules"][0]}}, "holds no rules, each with an expression"),
        (lambda t: t | {"rules": {0: {}}}, "holds no rules, each with an expression"),
        (lambda t: t | {"rules": X3}, "holds no rules, each with an expression"),
        (lambda t: t | {"rules": {0: t["rules"][0] | {"value": X3}}}, "maps to a recipe"),
        (lambda t: t | {"variables": X3}, "is not of a Linen model"),
        (lambda t: t | {"types": np.frombuffer(b"[" * 100_000, np.uint8)}, "nests deeper than 100"),
        (lambda t: t | {"types": np.frombuffer(b'{"a": 3}', np.uint8)}, "names and types"),
    ],
)
def test_a_folder_with_other_rules_or_types_is_an_error(tmp_path, change, message):
    module, x = nn.Dense(8), normal(2, 64)
    quantized = linen.quantize(module, {".*": "w8a8"})
    linen.save(tmp_path / "model", quantized, quantized.init(KEY, x), x)
    resaved(tmp_path / "model", change)
    with pytest.raises(ValueError, match=message):
        linen.load(tmp_path / "model", module, x)


def test_an_expression_of_a_folder_runs_in_bounded_time(tmp_path):
    module, x = Named("a" * 40), normal(2, 64)
    quantized = linen.quantize(module, {".*": "w8a8"})
    linen.save(tmp_path / "model", quantized, quantized.init(KEY, x), x)
    resaved(tmp_path / "model", with_pattern(b"(a+)+b"))
    loaded, variables = linen.load(tmp_path / "model", module, x)
    start = time.monotonic()
    with pytest.raises(ValueError, match="is unused: nothing has such a path"):
        loaded.apply(variables, x)
    assert time.monotonic() - start < 60  # Python's would take 2^40 steps


def test_what_could_not_be_loaded_is_not_written(tmp_path):
    x = normal(2, 64)
    quantized = linen.quantize(Named("aa"), {r"(a)\1": "w8a8"})
    with pytest.raises(ValueError, match="which is not matched in a rule of a file"):
        linen.save(tmp_path / "model", quantized, quantized.init(KEY, x), x)
    assert not list(tmp_path.iterdir())

"""Models that are no Flax modules, from rules to training, to frozen parameters, a folder, and a program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant.numerics.stored import Stored

pytestmark = pytest.mark.usefixtures("as_users_compute")

RECIPES = ["w8a8", "w4a16g16", "int8_train", "fp8_train", "nf4"]
D, F, VOCAB, LAYERS = 64, 128, 50, 2
TOKENS = jnp.arange(12).reshape(2, 6)


def array(key, *shape):
    return 0.12 * jax.random.normal(jax.random.key(key), shape)


def plain(w, tokens):
    """Haiku's names, layers under scan, rows of experts, and a head tied by hand."""
    x = w["table"][tokens]

    def layer(x, w):
        y = jax.nn.gelu(jnp.einsum("df,btd->btf", w["mlp/~/up"]["w"], x) + w["mlp/~/up"]["b"])
        return x + y @ w["down"].T, None

    x = jax.lax.scan(jax.checkpoint(layer), x, w["layers"])[0].reshape(-1, D)
    x = x + jax.lax.ragged_dot(x, w["experts"], jnp.array([5, 0, 7]))
    return (x @ w["table"].T).reshape(*tokens.shape, VOCAB)


PARAMETERS = {
    "table": array(0, VOCAB, D),
    "layers": {
        "mlp/~/up": {"w": array(1, LAYERS, D, F), "b": jnp.zeros((LAYERS, F))},
        "down": array(2, LAYERS, D, F),
    },
    "experts": array(3, 3, D, D),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    weight: jax.Array
    bias: jax.Array | None = None

    def __call__(self, x):
        y = self.weight @ x
        return y if self.bias is None else y + self.bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """As Equinox's: modules of one example within vmap, with functions and settings among the leaves."""

    embedding: jax.Array
    layers: list[Linear]
    head: Linear
    activation: Callable[..., Any]
    rate: float = 0.5

    def __call__(self, tokens):
        x = self.embedding[tokens]
        for layer in self.layers:
            x = x + self.activation(jax.vmap(jax.vmap(layer))(x))
        return jax.vmap(jax.vmap(self.head))(x)


def equinox_like(seed=0):
    layers = [Linear(array(seed + 1 + i, D, D), jnp.zeros(D)) for i in range(LAYERS)]
    head = Linear(array(seed + 8, VOCAB, D))
    return Model(array(seed, VOCAB, D), layers, head, jax.nn.relu)


def zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros_like(x) if isinstance(x, jax.Array) else x, tree)


MODELS = {
    "plain": (plain, PARAMETERS),
    "equinox_like": (lambda model, tokens: model(tokens), equinox_like()),
}


def trained(low, parameters, steps=20):
    """The parameters after some steps of Adam, and the losses; functions among the leaves stay apart."""
    leaves, structure = jax.tree.flatten(parameters)
    is_array = [isinstance(x, jax.Array) for x in leaves]

    def joined(arrays):
        rest = iter(arrays)
        whole = [next(rest) if i else x for x, i in zip(leaves, is_array, strict=True)]
        return jax.tree.unflatten(structure, whole)

    def loss(arrays):
        logits = low(joined(arrays), TOKENS)
        targets = (TOKENS + 1) % VOCAB
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    tx = optax.adam(3e-3)

    @jax.jit
    def step(arrays, state):
        value, gradients = jax.value_and_grad(loss)(arrays)
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(arrays, updates), state, value

    arrays: Any = [x for x in leaves if isinstance(x, jax.Array)]
    state, losses = tx.init(arrays), []
    for _ in range(steps):
        arrays, state, value = step(arrays, state)
        losses.append(float(value))
    return joined(arrays), losses


@pytest.mark.first(1)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_any_function_goes_from_rules_to_training_to_frozen_and_served(name, recipe, tmp_path):
    function, parameters = MODELS[name]
    rules = {".*": recipe}
    table = jq.functions.coverage(function, rules, parameters, TOKENS)
    assert table.quantized == 1
    low = jq.functions.quantize(function, rules)
    exact = function(parameters, TOKENS)
    error = float(jnp.linalg.norm(low(parameters, TOKENS) - exact) / jnp.linalg.norm(exact))
    assert 0 < error < {"w8a8": 0.05, "int8_train": 0.05, "fp8_train": 0.12}.get(recipe, 0.35)
    parameters, losses = trained(low, parameters)
    assert losses[-1] < 0.9 * losses[0]
    frozen = jq.functions.freeze(function, rules, parameters, TOKENS)
    held = [x for x in jax.tree.leaves(frozen, is_leaf=is_stored) if is_stored(x)]
    assert len(held) == 4
    found = run(low, parameters)
    np.testing.assert_array_equal(run(low, frozen), found)
    jq.functions.save(tmp_path / "model", frozen)
    loaded = jq.functions.load(tmp_path / "model", zeros(parameters))
    assert sum(x.nbytes for x in held) == sum(
        x.nbytes for x in jax.tree.leaves(loaded, is_leaf=is_stored) if is_stored(x)
    )
    np.testing.assert_array_equal(run(low, loaded), found)
    arrays, call = split(low, loaded)
    program = jq.serving.load(jq.serving.export(call, TOKENS, weights=arrays))
    np.testing.assert_array_equal(program(TOKENS), found)


def is_stored(x):
    return isinstance(x, Stored)


def split(low, tree):
    """The arrays of a tree, and the function of them and tokens."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]

    def call(arrays, tokens):
        whole = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            whole[i] = x
        return low(jax.tree.unflatten(structure, whole), tokens)

    return [leaves[i] for i in places], call


def run(low, tree):
    arrays, call = split(low, tree)
    return jax.jit(call)(arrays, TOKENS)


def test_what_a_folder_does_not_fit_is_named(tmp_path):
    function, parameters = MODELS["plain"]
    frozen = jq.functions.freeze(function, {".*": "w4a16"}, parameters, TOKENS)
    jq.functions.save(tmp_path / "model", frozen)
    abstract = jax.eval_shape(lambda: parameters)
    loaded = jq.functions.load(tmp_path / "model", abstract)
    assert loaded["layers"]["mlp/~/up"]["w"].bits_per_element == 4.5
    for change, message in (
        ({"more": jnp.zeros(3)}, "lacks the parameter more"),
        (
            {"table": jnp.zeros((VOCAB + 1, D))},
            r"table has shape \(51, 64\) here, and was saved with",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            jq.functions.load(tmp_path / "model", parameters | change)
    fewer = {name: x for name, x in parameters.items() if name != "experts"}
    with pytest.raises(ValueError, match="has what the parameters do not: experts"):
        jq.functions.load(tmp_path / "model", fewer)
    with pytest.raises(ValueError, match="'a/b'"):
        jq.functions.save(tmp_path / "other", {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}})
    with pytest.raises(ValueError, match="a part of another one's"):
        jq.functions.save(tmp_path / "other", {"a/b": jnp.ones(2), "a": jnp.ones(2)})
    jq.artifacts.save(tmp_path / "tree", {"w": jnp.ones(2)}, jq.artifacts.Card.empty())
    with pytest.raises(ValueError, match="is not of a function's parameters"):
        jq.functions.load(tmp_path / "tree", parameters)


def test_a_tree_that_is_one_array(tmp_path):
    product = lambda w, x: x @ w  # noqa: E731
    frozen = jq.functions.freeze(product, {".*": "nf4"}, array(0, D, F), jnp.ones((1, D)))
    jq.functions.save(tmp_path / "model", frozen)
    loaded = jq.functions.load(tmp_path / "model", jnp.zeros((D, F)))
    assert isinstance(loaded, Stored)
    low = jq.functions.quantize(product, {".*": "nf4"})
    np.testing.assert_array_equal(
        low(loaded, jnp.ones((1, D))), low(array(0, D, F), jnp.ones((1, D)))
    )

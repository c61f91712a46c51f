"""What the doors refuse, and in how many words: parts of weights, deep models, results that are no arrays."""

import enum

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import DenyList

import jaxquant as jq

pytestmark = pytest.mark.usefixtures("as_users_compute")

X = jax.random.normal(jax.random.key(0), (2, 48))


class Normalized(nnx.Module):
    """A weight made of two parameters, as weight normalization makes it."""

    def __init__(self):
        self.v = nnx.Param(jax.random.normal(jax.random.key(1), (48, 8)))
        self.g = nnx.Param(jnp.ones(8))

    def __call__(self, x):
        return x @ (self.v[...] * self.g[...] / jnp.linalg.norm(self.v[...], axis=0))


class Two(nnx.Module):
    def __init__(self):
        self.first = Normalized()
        self.last = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.last(self.first(x))


ALONE = "made of first/g and first/v, and rule 'first/v' names first/v alone"


@pytest.mark.parametrize(
    "rules",
    [
        {"first/v": "w8a8", ".*": "w4a16"},
        {"first/v": "w8a8", "last": "w8a8"},
        {"first/v": "w8a8", "first": None, "last": "w8a8"},
    ],
)
def test_a_rule_that_names_a_part_of_a_weight_is_refused_with_the_rule_that_mends_it(rules):
    with pytest.raises(ValueError, match=ALONE) as error:
        jq.nnx.quantize(Two(), rules)(X)
    assert "a rule ('first', 'w8a8') quantizes it" in str(error.value)
    found = jq.nnx.coverage(Two(), rules, X)
    assert (found["first"].recipe, found["last"].recipe) == ("float", rules.get("last", "w4a16"))
    assert ALONE in found["first"].reason
    left = jq.nnx.quantize(Two(), {**rules, "first/v": "w8a8"}, on_unsupported="float")
    only = jq.nnx.quantize(Two(), {"last": rules.get("last", "w4a16")})
    np.testing.assert_array_equal(left(X), only(X))


@pytest.mark.parametrize(
    ("rules", "recipe"),
    [
        ({"first": "w8a8", "first/v": "w4a16", "last": "w8a8"}, "w8a8"),
        ({"first/.*": None, ".*": "w8a8"}, "w8a8"),  # says nothing of what they make together
        ({".*": "w8a8"}, "w8a8"),
    ],
)
def test_of_a_weight_made_of_several_an_earlier_rule_on_the_whole_counts(rules, recipe):
    if "first/v" in rules:
        with pytest.raises(ValueError, match="earlier rules took first/v"):
            jq.nnx.quantize(Two(), rules)
        rules = {name: x for name, x in rules.items() if name != "first/v"}
    assert jq.nnx.coverage(Two(), rules, X)["first"].recipe == recipe


def test_plain_functions_and_linen_refuse_a_part_alone_too():
    def model(w, x):
        return x @ jnp.concatenate([w["q"], w["k"]], axis=1)

    w = {"q": jnp.ones((48, 4)), "k": jnp.ones((48, 4))}
    with pytest.raises(ValueError, match="made of k and q, and rule 'q' names q alone"):
        jq.functions.quantize(model, {"q": "w8a8"})(w, X)

    class Joined(nn.Module):
        @nn.compact
        def __call__(self, x):
            made = nn.initializers.normal()
            q, k = (self.param(name, made, (48, 4)) for name in ("q", "k"))
            return nn.Dense(4)(x @ jnp.concatenate([q, k], axis=1))

    with pytest.raises(ValueError, match=r"made of k and q, and rule '[kq]' names [kq] alone"):
        jq.linen.quantize(Joined(), {"k": "w8a8"}).init(jax.random.key(0), X)


class Deep(nnx.Module):
    def __init__(self, depth):
        self.layers = nnx.List([nnx.Linear(48, 48, rngs=nnx.Rngs(i)) for i in range(depth)])
        self.head = nnx.Linear(48, 30, rngs=nnx.Rngs(0))

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_layers_that_are_alike_are_refused_in_one_line_whose_rule_mends_all():
    with pytest.raises(ValueError, match="cannot take") as error:
        jq.nnx.quantize(Deep(28), {".*": "w4a16g36"})(X)
    lines = str(error.value).splitlines()
    assert [line.split(" (")[0] for line in lines] == ["layers/*/kernel ×28", "head/kernel"]
    assert (
        "a rule ('layers/[0-9]+/kernel', None) before the others leaves them in float" in lines[0]
    )
    mended = {"layers/[0-9]+/kernel": None, "head/kernel": None, ".*": "w4a16g36"}
    with pytest.raises(ValueError, match="earlier rules took"):  # both mends leave nothing
        jq.nnx.quantize(Deep(28), mended)
    mended = {"layers/[0-9]+/kernel": None, ".*": "w8a8"}
    assert jq.nnx.quantize(Deep(28), mended)(X).shape == (2, 30)


def test_what_cannot_be_frozen_is_named_once_for_layers_that_are_alike():
    def model(w, x):
        return [x @ layer["up"] for layer in w["layers"]], w

    w = {"layers": [{"up": jnp.ones((48, 8))}] * 5}
    with pytest.raises(ValueError, match=r"in the result.*4 more such lines") as error:
        jq.functions.freeze(model, {".*": "w8a8"}, w, X)
    assert str(error.value).count("stored in few bits") == 1


class Kind(enum.Enum):
    PLAIN = "plain"


class Named(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(48, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return {"y": self.up(x), "name": "up", "kind": Kind.PLAIN, "depth": 3}

    def label(self):
        return "named"

    def settings(self):
        return object()

    def both(self, x):
        return self.up(x), object()


def test_text_among_a_models_results_is_returned_as_it_is():
    model = jq.nnx.quantize(Named(), {".*": "w8a8"})
    for result in (model(X), model(X)):  # traced, and then from what was compiled
        assert (result["name"], result["kind"], result["depth"]) == ("up", Kind.PLAIN, 3)
    assert jax.vmap(lambda x: model(x)["y"])(X[None]).shape == (1, 2, 8)
    assert model.label() == "named"
    assert type(model.settings()) is object

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(x), "dense"

    quantized = jq.linen.quantize(Linen(), {".*": "w8a8"})
    assert quantized.apply(quantized.init(jax.random.key(0), X), X)[1] == "dense"
    function = jq.functions.quantize(lambda w, x: (x @ w["w"], "dot"), {".*": "w8a8"})
    assert function({"w": jnp.ones((48, 8))}, X)[1] == "dot"


def test_objects_beside_products_are_refused_with_where_they_are():
    with pytest.raises(ValueError, match=r"text alone; got a object at result\[0\]\[1\]: register"):
        jq.nnx.quantize(Named(), {".*": "w8a8"}).both(X)


class WithStatistics(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(32)(x))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(8)(x)


@pytest.mark.parametrize(
    "mutable",
    [
        True,
        "batch_stats",
        ["batch_stats"],
        {"batch_stats"},
        DenyList("params"),
        DenyList(["params"]),
    ],
)
def test_every_filter_of_linens_names_what_is_mutable(mutable):
    module = WithStatistics()
    variables = module.init(jax.random.key(0), X)
    quantized = jq.linen.quantize(module, {".*": "w8a8"})
    result = quantized.apply(variables, X, mutable=mutable)
    expected = module.apply(variables, X, mutable=mutable)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    frozen = jq.linen.freeze(quantized, variables, X, mutable=mutable)
    if mutable is True:
        with pytest.raises(ValueError, match=r"kernel is stored in few bits.*in the result"):
            quantized.apply(frozen, X, mutable=True)
    else:
        served = quantized.apply(frozen, X, mutable=mutable)
        np.testing.assert_array_equal(served[0], result[0])


def test_a_module_that_is_quantized_is_not_quantized_again():
    quantized = jq.linen.quantize(nn.Dense(8), {".*": "w8a8"})
    with pytest.raises(ValueError, match=r"quantized already; give its own, quantized.module"):
        jq.linen.quantize(quantized, {".*": "w4a16"})

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


@pytest.mark.first(1)
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


def test_a_weight_that_a_jitted_function_takes_part_in_is_frozen_with_the_same_bits():
    quantized = jq.nnx.quantize(Two(), {".*": "w8a8"})  # jnp.linalg.norm is one
    expected = Two()(X)
    assert jnp.linalg.norm(quantized(X) - expected) < 0.03 * jnp.linalg.norm(expected)
    frozen = jq.nnx.freeze(quantized, X)
    run = nnx.jit(lambda model, x: model(x))
    np.testing.assert_array_equal(run(frozen, X), run(quantized, X))


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
    with pytest.raises(ValueError, match=r"text alone; got object at result\[0\]\[1\]: register"):
        jq.nnx.quantize(Named(), {".*": "w8a8"}).both(X)


class WithStatistics(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(32)(x))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(8)(x)


@pytest.mark.first(1)
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


class Counting(nnx.Module):
    """Changes attributes that are no variables, and makes variables when it is first called."""

    def __init__(self):
        self.up = nnx.Linear(48, 48, rngs=nnx.Rngs(0))
        self.calls = 0
        self.names = ()
        self.cache = nnx.data(None)
        self.last = nnx.data(None)

    def __call__(self, x):
        self.calls += 1
        self.names = (*self.names, f"call {self.calls}")
        if self.cache is None:
            self.cache = nnx.Cache(jnp.zeros_like(x))
        self.cache[...] += x
        y = self.up(x) * self.calls + self.cache[...]
        self.last = nnx.data(y)
        return y


class Both(nnx.Module):
    def __init__(self):
        self.first, self.last = Counting(), Counting()

    def __call__(self, x):
        return self.last(self.first(x))


@pytest.mark.first(1)
@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit])
@pytest.mark.parametrize("cls", [Counting, Both])
def test_attributes_that_a_call_changes_are_written_to_the_quantized_model(cls, transform):
    plain, quantized = cls(), jq.nnx.quantize(cls(), {".*": "w8a8"})
    frozen = jq.nnx.freeze(jq.nnx.quantize(cls(), {".*": "w8a8"}), X)
    call = transform(lambda model, x: model(x))
    for _ in range(3):
        expected, found, served = plain(X), call(quantized, X), call(frozen, X)
        assert jnp.linalg.norm(found - expected) < 0.03 * jnp.linalg.norm(expected)
        np.testing.assert_array_equal(served, found)
    one, other = (m if cls is Counting else m.last for m in (plain, quantized))
    assert (
        (other.calls, other.names) == (one.calls, one.names) == (3, ("call 1", "call 2", "call 3"))
    )
    np.testing.assert_allclose(other.cache[...], one.cache[...], rtol=0.1, atol=0.1)
    np.testing.assert_array_equal(other.last, found)


def test_attributes_that_batches_of_calibration_change_count_from_there():
    model = jq.nnx.quantize(Counting(), {".*": "w8a8"})
    jq.nnx.calibrate(model, [X, X])
    assert model.calls == 0  # calibration works on a copy


class Lazy(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(48, 48, rngs=nnx.Rngs(0))
        self.down = nnx.data(None)

    def __call__(self, x):
        if self.down is None:
            self.down = nnx.Linear(48, 8, rngs=nnx.Rngs(1))
        return self.down(self.up(x))


def test_a_module_that_a_call_makes_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"the call makes down/\w+, within a module.*make that module"
    ):
        jq.nnx.quantize(Lazy(), {".*": "w8a8"})(X)


class WithIntegers(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((48, 8), jnp.int8))
        self.up = nnx.Linear(48, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        dims = (((1,), (0,)), ((), ()))
        return self.up(x) + jax.lax.dot_general(
            x, self.w[...], dims, preferred_element_type=x.dtype
        )


def test_a_rule_that_takes_no_product_of_the_models_call_says_so():
    model = nnx.Sequential(*(nnx.Linear(48, 48, rngs=nnx.Rngs(i)) for i in range(2)))
    quantized = jq.nnx.quantize(model, {"layers/0": "a8", "layers/1": "w8a8"})
    with pytest.warns(UserWarning, match=r"'layers/0' \(a8\) takes no product.*has a weight"):
        quantized(X)
    quantized = jq.nnx.quantize(WithIntegers(), {"w": "w2a8", "up": "w8a8"})
    with pytest.warns(UserWarning, match="takes no product of this call: w .*float32 and int8"):
        quantized(X)


def test_a_rule_on_what_holds_layers_alone_names_the_rule_that_takes_their_weights():
    with pytest.raises(ValueError, match=r"'layers' is unused.*no weight itself.*'layers/\.\*'"):
        jq.nnx.quantize(Deep(2), {"layers": "w8a8"})


def test_a_frozen_function_with_a_weakly_typed_scalar_has_the_same_bits():
    def model(w, x):
        return x @ (w["a"] * w["t"])

    w = {"a": jax.random.normal(jax.random.key(2), (48, 8)), "t": jnp.asarray(2.0)}
    assert w["t"].weak_type
    quantized = jq.functions.quantize(model, {".*": "w8a8"})
    frozen = jq.functions.freeze(model, {".*": "w8a8"}, w, X)
    np.testing.assert_array_equal(quantized(frozen, X), quantized(w, X))
    with pytest.raises(ValueError, match=r"a is frozen.*a quantized model or function alone can"):
        model(frozen, X)


def test_linens_coverage_names_the_place_of_variables():
    variables = nn.Dense(8).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="give variables=variables by name"):
        jq.linen.coverage(nn.Dense(8), {".*": "w8a8"}, variables, X)


class Tied(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(50, 64, rngs=nnx.Rngs(0))
        self.up = nnx.Linear(64, 64, rngs=nnx.Rngs(1))
        self.raw = nnx.Param(jax.random.normal(jax.random.key(3), (64, 64)) / 8)

    def __call__(self, tokens):
        return (self.up(self.embed(tokens)) @ self.raw[...]) @ self.embed.embedding[...].T


def test_adapters_pass_tables_by_and_name_what_they_do_not_reach():
    tokens = jnp.arange(4)
    base = jq.nnx.freeze(jq.nnx.quantize(Tied(), {".*": "nf4dq"}), tokens)
    adapted = jq.nnx.add_lora(base, ".*", tokens, rank=4, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(adapted(tokens), base(tokens))
    paths = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam))}
    assert {"kernel_lora_a", "raw_lora_a"} <= paths
    assert not any("embedding" in path for path in paths)
    with pytest.raises(ValueError, match="rows are taken of embed/embedding too"):
        jq.nnx.add_lora(base, "embed.*|up", tokens, rank=4, rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match="raw get no adapters"):
        jq.nnx.add_lora(base, ".*", rank=4, rngs=nnx.Rngs(0))

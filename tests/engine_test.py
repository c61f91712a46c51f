"""Products found in the trace: every one by name, replaced wherever it stands, and nothing else changed."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import by_hand
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, PartitionSpec

import jaxquant as jq
from jaxquant import functions
from jaxquant.engine import products, walk

pytestmark = [pytest.mark.usefixtures("as_users_compute"), pytest.mark.exhaustive]

D, H, K, F, LAYERS = 16, 4, 8, 32, 3


def array(key, *shape):
    return 0.3 * jax.random.normal(jax.random.key(key), shape)


def plainly(found):
    """Every product by lax's own, which changes no bit."""
    return [
        functools.partial(
            jax.lax.dot_general,
            dimension_numbers=p.settings["dimension_numbers"],
            precision=p.settings["precision"],
            preferred_element_type=p.settings["preferred_element_type"],
        )
        if p.kind == "dot" and not p.unreached
        else None
        for p in found
    ]


def doubled(found):
    """Every product twice as large: what was not replaced shows in the result."""
    return [
        (lambda *xs, same=same: 2 * same(*xs)) if same is not None else None
        for same in plainly(found)
    ]


def of(found):
    return [(p.path, p.weight, p.times) for p in found]


# ---------------------------------------------------------------------------------------------------
# Names


def block(p, x):
    """Plain JAX: weights on either side of an einsum, raw attention with rotary positions, a gated MLP."""
    q, k, v = (jnp.einsum("dhk,btd->bthk", p["attn"][n], x) for n in "qkv")
    angles = jnp.einsum("t,k->tk", jnp.arange(x.shape[1]) * 1.0, jnp.ones(K))
    q, k = (y * p["attn"]["norm"] * jnp.cos(angles)[:, None] for y in (q, k))
    a = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / K**0.5)
    x = x + jnp.einsum("bhts,bshk,hkd->btd", a, v, p["attn"]["o"])
    return x + jax.nn.silu(x @ p["mlp"]["up"]) @ p["mlp"]["down"].T


def transformer(params, tokens):
    x = params["embed"][tokens]
    step = jax.checkpoint(lambda x, p: (block(p, x), None))
    x, _ = jax.lax.scan(step, x, params["layers"])
    return x @ params["embed"].T


def weights():
    n = iter(range(100))
    shapes = {
        "attn": {c: (LAYERS, D, H, K) for c in "qkv"}
        | {"o": (LAYERS, H, K, D), "norm": (LAYERS, K)},
        "mlp": {"up": (LAYERS, D, F), "down": (LAYERS, D, F)},
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    layers = jax.tree.map(lambda s: array(next(n), *s), shapes, is_leaf=is_shape)
    return {"embed": array(99, 20, D), "layers": layers}


TOKENS = jnp.arange(10).reshape(2, 5)


def test_products_go_by_the_parameters_that_feed_them():
    found = products(transformer, weights(), TOKENS)
    attention = ("layers/attn", None, LAYERS)
    assert of(p for p in found if p.path) == [
        ("embed", 0, 1),
        *((f"layers/attn/{n}", 1, LAYERS) for n in "qkv"),
        attention,
        attention,
        ("layers/attn/o", 1, LAYERS),
        ("layers/mlp/up", 1, LAYERS),
        ("layers/mlp/down", 1, LAYERS),
        ("embed", 1, 1),
    ]
    assert [p.probabilities for p in found if p.path == "layers/attn"] == [None, 1]
    assert {p.source.split(":")[0] for p in found} == {"engine_test.py"}
    assert [p.kind for p in found if p.path == "embed"] == ["lookup", "dot"]
    assert next(p for p in found if p.path == "layers/mlp/up").macs == LAYERS * 2 * 5 * D * F


def sometimes(w, row):
    """A product in a cond, which vmap makes a choice of weights that are the same."""
    return jax.lax.cond(row[0] > 0, lambda a, x: x @ a, lambda _, x: x, w["a"], row)


@pytest.mark.parametrize(
    ("function", "path", "weight"),
    [
        (lambda w, x: w["a"].T @ x.T, "a", 0),
        (lambda w, x: x @ (w["a"] / jnp.linalg.norm(w["a"])), "a", 1),
        (lambda w, x: x @ jnp.concatenate([w["a"], w["b"]], 1), "", 1),
        (lambda w, x: x @ w["a"].astype(jnp.bfloat16).astype(jnp.float32), "a", 1),
        (lambda w, x: x @ jnp.where(jnp.eye(D) > 0, 0, w["a"]), "a", 1),
        (lambda w, x: (x + w["a"][0]) @ jnp.ones((D, D)), "a", None),
        (lambda w, x: (x * w["a"][0]) @ w["b"], "b", 1),
        (lambda w, x: w["a"] @ w["b"] @ x.T, "b", 1),
        (lambda w, x: jax.vmap(lambda row: row @ w["a"])(x), "a", 1),
        (lambda w, x: jax.lax.fori_loop(0, 3, lambda _, x: x @ w["a"], x), "a", 1),
        (lambda w, x: jax.vmap(functools.partial(sometimes, w))(x), "a", 1),
        (lambda w, x: x @ (jnp.where(x[0] > 0, 1.0, 0.0)[:, None] * w["a"]), "a", None),
    ],
)
def test_a_weight_is_what_parameters_alone_determine(function, path, weight):
    w = {"a": array(0, D, D), "b": array(1, D, D)}
    found = products(function, w, array(2, 4, D))
    assert (found[0].path, found[0].weight) == (path, weight)


def test_rotary_angles_and_positions_are_no_products_to_quantize():
    found = products(transformer, weights(), TOKENS)
    assert [p.path for p in found if not p.is_quantizable] == [""]
    (whole,) = products(
        lambda w, x: x @ w["i"], {"i": jnp.eye(3, dtype=int)}, jnp.ones((2, 3), int)
    )
    assert not whole.is_quantizable


def test_which_operand_holds_probabilities_is_found():
    w = {"q": array(0, D, D)}
    cases = {
        0: lambda a, v: jax.nn.softmax(a) @ v,
        1: lambda a, v: v @ jax.nn.softmax(a),
        None: lambda a, v: (jax.nn.softmax(a) - 0.1) @ v,
    }
    for wanted, product in cases.items():
        found = products(lambda w, x, product=product: product(x @ w["q"], x), w, array(1, D, D))
        assert found[-1].probabilities == wanted


# ---------------------------------------------------------------------------------------------------
# Wherever a product stands


def by_scan(w, x):
    return jax.lax.scan(
        lambda x, w: (jnp.tanh(x @ w), x.sum()), x, w["stack"], reverse=True, unroll=2
    )


def by_remat(w, x):
    keep = jax.checkpoint_policies.save_only_these_names("kept")
    named = lambda y: checkpoint_name(y, "kept")  # noqa: E731
    return jax.checkpoint(lambda w, x: jnp.sin(named(x @ w) @ w), policy=keep)(w["a"], x)


def by_cond(w, x):
    branches = [lambda x: x @ w["a"], lambda x: x, lambda x: jnp.sin(x @ w["b"])]
    return jax.lax.switch(x.astype(int)[0, 0] % 3, branches, x) + jax.lax.cond(
        x[0, 0] > 0, lambda: x @ w["a"], lambda: x
    )


def by_jit(w, x):
    inner = jax.jit(lambda x, w: jax.jit(jnp.matmul)(x, w))
    return inner(x, w["a"]) + inner(x, w["b"])


def by_vmap(w, x):
    return jax.vmap(lambda w: jax.vmap(lambda row: row @ w)(x))(w["stack"])


def by_nothing(w, x):
    return x @ w["a"] + jax.nn.relu(x) + jax.nn.gelu(x @ w["b"])


WHERE = {f.__name__: f for f in (by_scan, by_remat, by_cond, by_jit, by_vmap, by_nothing)}


def parts():
    return {"a": array(0, D, D), "b": array(1, D, D), "stack": array(2, 4, D, D)}


def compared(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.first(2)
@pytest.mark.parametrize("name", WHERE)
def test_the_same_products_give_the_same_bits_and_gradients(name):
    function, w, x = WHERE[name], parts(), array(3, 6, D)
    same = walk(function, plainly)
    total = lambda f: lambda w, x: sum(y.sum() for y in jax.tree.leaves(f(w, x)))  # noqa: E731
    compared(same(w, x), jax.jit(function)(w, x))
    gradients = [jax.jit(jax.grad(total(f), (0, 1)))(w, x) for f in (same, function)]
    compared(*gradients)
    per_row = [jax.jit(jax.vmap(f, (None, 0)))(w, array(4, 3, 6, D)) for f in (same, function)]
    compared(*per_row)


def test_every_product_is_replaced_wherever_it_stands():
    w, x = parts(), array(3, 6, D)
    twice = lambda w, x: 2 * (x @ w)  # noqa: E731
    a, b = w["a"], w["b"]
    branches = [lambda: twice(a, x), lambda: x, lambda: jnp.sin(twice(b, x))]
    wanted = {
        "by_scan": jax.lax.scan(
            lambda x, w: (jnp.tanh(twice(w, x)), x.sum()), x, w["stack"], reverse=True
        ),
        "by_remat": jnp.sin(twice(a, twice(a, x))),
        "by_cond": jax.lax.switch(x.astype(int)[0, 0] % 3, branches)
        + (twice(a, x) if x[0, 0] > 0 else x),
        "by_jit": twice(a, x) + twice(b, x),
        "by_vmap": jnp.stack([twice(m, x) for m in w["stack"]]),
        "by_nothing": twice(a, x) + jax.nn.relu(x) + jax.nn.gelu(twice(b, x)),
    }
    for name, function in WHERE.items():
        found = walk(function, doubled)(w, x)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), found, wanted[name]
        )


def test_a_while_loop_is_entered_in_its_test_and_its_body():
    def function(w, x):
        small = lambda x: jnp.abs(x @ w["a"]).max() < 50  # noqa: E731
        return jax.lax.while_loop(small, lambda x: x @ w["b"] * 3, x)

    def by_hand(w, x):
        while jnp.abs(2 * x @ w["a"]).max() < 50:
            x = 2 * (x @ w["b"]) * 3
        return x

    w, x = parts(), array(3, 6, D)
    assert [p.path for p in products(function, w, x)] == ["a", "b"]
    np.testing.assert_allclose(walk(function, doubled)(w, x), by_hand(w, x), rtol=1e-5)


def test_what_is_saved_for_gradients_is_as_the_policy_says():
    w, x = parts(), array(3, 6, D)
    programs = [
        str(jax.make_jaxpr(jax.grad(lambda w, f=f: f(w, x).sum()))(w))
        for f in (by_remat, walk(by_remat, plainly))
    ]
    counts = [(p.count("dot_general["), p.count("policy=<function")) for p in programs]
    assert counts[0] == counts[1]


def test_shard_map_is_entered():
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",), axis_types=(AxisType.Auto,))

    def function(w, x):
        spec = PartitionSpec("x")
        body = lambda x, w: jax.lax.psum(x @ w, "x")  # noqa: E731
        specs = {"in_specs": (spec, PartitionSpec()), "out_specs": PartitionSpec()}
        return jax.shard_map(body, mesh=mesh, **specs)(x, w["a"])

    w, x = parts(), array(3, 6, D)
    assert of(products(function, w, x)) == [("a", 1, 1)]
    np.testing.assert_allclose(walk(function, doubled)(w, x), 2 * (x @ w["a"]), rtol=1e-6)


def test_derivatives_of_the_users_own_stay_and_products_in_them_are_named():
    @jax.custom_vjp
    def gate(x):
        return x

    gate.defvjp(lambda x: (x, None), lambda _, g: (7 * g,))

    @jax.custom_vjp
    def hidden(w, x):
        return x @ w

    hidden.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))
    w, x = parts(), array(3, 6, D)
    function = lambda w, x: gate(x @ w["a"])  # noqa: E731
    compared(
        jax.grad(lambda x: walk(function, plainly)(w, x).sum())(x), 7 * jnp.ones((6, D)) @ w["a"].T
    )

    (product,) = products(lambda w, x: hidden(w["a"], x), w, x)
    assert product.path == "a"
    assert "custom_vjp" in product.unreached
    with pytest.raises(
        ValueError, match=r"a \(engine_test.py:\d+\) cannot take w8a8: .*custom_vjp"
    ):
        functions.quantize(lambda w, x: hidden(w["a"], x), {"a": "w8a8"})(w, x)


# ---------------------------------------------------------------------------------------------------
# Calls


def test_it_is_traced_once_for_each_combination_of_shapes_and_constants():
    count = itertools.count()

    def function(w, x, *, mode="up", scale=1.0):
        next(count)
        return x @ w["a"] * (scale if mode == "up" else -scale)

    same, w, x = walk(function, plainly), parts(), array(3, 6, D)
    for _ in range(3):
        same(w, x)
        same(w, x, mode="down")
    assert next(count) == 2
    same(w, x[:2])
    same(w, x, scale=2.0)
    assert next(count) == 5
    np.testing.assert_array_equal(same(w, x, mode="down"), -same(w, x))


def test_constants_of_other_types_and_signs_are_others():
    def function(w, x, given):
        return (
            jnp.full((), given),
            jnp.copysign(1.0, given),
            x @ w["a"] * (2 if given is True else 1),
        )

    same, w, x = walk(function, plainly), parts(), array(3, 6, D)
    for given in (True, 1, 0, 0.0, -0.0, False):
        found, wanted = same(w, x, given), function(w, x, given)
        assert [y.dtype for y in found] == [y.dtype for y in wanted]
        np.testing.assert_allclose(found[1], wanted[1])
        np.testing.assert_allclose(found[2], wanted[2], rtol=1e-5, atol=1e-6)


def test_what_is_padded_or_filled_with_negative_numbers_is_no_probability():
    def padded(w, x):
        scores = jnp.exp(0.1 * (x[:8] @ w["a"]))
        return jax.lax.pad(scores, -3.0, ((0, 0, 0), (0, 2, 0))) @ array(5, D + 2, D)

    def filled(w, x):
        scores = jnp.exp(0.1 * (x[:8] @ w["a"]))
        return scores.at[:, jnp.arange(D + 2)].get(mode="fill", fill_value=-3.0) @ array(
            5, D + 2, D
        )

    for function in (padded, filled):
        found = products(function, parts(), array(3, 10, D))
        assert [p.probabilities for p in found] == [None, None]


def test_values_of_an_outer_trace_may_be_closed_over():
    w, x = parts(), array(3, 6, D)

    @jax.jit
    def outer(scale):
        inner = walk(lambda w, x: scale * (x @ w["a"]), plainly)
        return inner(w, x) + inner(w, x)

    for scale in (1.0, 2.0):
        np.testing.assert_allclose(outer(scale), 2 * scale * (x @ w["a"]), rtol=1e-5, atol=1e-6)


def test_a_format_may_be_traced():
    w, x = parts(), array(3, 6, D)

    @jax.jit
    def loss(bits):
        quantizer = jq.Quantizer(jq.Int(bits), "channel")
        dot = jq.DotGeneral(jq.Operands(quantizer, quantizer))
        return functions.quantize(by_nothing, {"[ab]": dot})(w, x)

    exact = by_nothing(w, x)
    errors = [float(jnp.abs(loss(bits) - exact).max()) for bits in (2, 4, 8)]
    assert errors[0] > 3 * errors[1] > 30 * errors[2] > 0


# ---------------------------------------------------------------------------------------------------
# Quantized

RECIPES = ("w8a8", "w4a16", "w4a16g16", "int8_train", "fp8_train", "nf4", "mxfp8_train", "quest4")


class Stock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.LayerNorm(128, rngs=rngs)
        self.mix = nnx.Einsum("btf,fhk->bthk", (128, 2, 32), (2, 32), rngs=rngs)
        self.down = nnx.LinearGeneral((2, 32), 64, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return x + self.down(jax.nn.gelu(self.mix(self.norm(self.up(x)))))


@pytest.mark.first(2)
@pytest.mark.parametrize("recipe", RECIPES)
def test_stock_layers_have_the_bits_that_they_have_by_hand(recipe):
    model, x = Stock(nnx.Rngs(0)), array(0, 2, 32, 64)
    graphdef, state = nnx.split(model)
    rules = {"up|mix" if recipe in ("w4a16g16", "nf4") else ".*": recipe}
    own = by_hand(
        model, {start: recipe for start in next(iter(rules)).replace(".*", "").split("|")}
    )
    plainly = lambda state, x: nnx.merge(nnx.graphdef(own), state)(x)  # noqa: E731
    by_trace = functions.quantize(
        lambda state, x: nnx.merge(graphdef, state)(x),
        {k.replace("up|mix", "(up|mix)(/kernel/?.*)?"): v for k, v in rules.items()},
    )
    step = lambda f: jax.jit(jax.value_and_grad(lambda s, x: (f(s, x) ** 2).sum(), (0, 1)))  # noqa: E731
    compared(step(by_trace)(state, x), step(plainly)(nnx.state(own), x))


def test_convolutions_and_ragged_products_take_recipes():
    def function(w, x, rows, sizes):
        y = jax.lax.conv_general_dilated(
            x, w["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y, jax.lax.ragged_dot(rows, w["experts"], sizes)

    w = {"conv": array(0, 3, 3, 4, 8), "experts": array(1, 3, D, F)}
    inputs = array(2, 2, 6, 6, 4), array(3, 7, D), jnp.array([3, 0, 4])
    found = products(function, w, *inputs)
    assert of(found) == [("conv", 1, 1), ("experts", 1, 1)]
    assert [p.macs for p in found] == [2 * 6 * 6 * 8 * 3 * 3 * 4, 7 * D * F]
    exact = function(w, *inputs)
    for a, b in zip(functions.quantize(function, {".*": "w8a8"})(w, *inputs), exact, strict=True):
        error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        assert 1e-4 < error < 0.02


@pytest.mark.long
def test_a_whole_transformer_trains_in_few_bits():
    w = weights()
    rules = {"layers/attn": "a8", "embed": None, ".*": "int8_train"}
    low = functions.quantize(transformer, rules)
    exact, found = transformer(w, TOKENS), low(w, TOKENS)
    assert 1e-4 < float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)) < 0.05
    loss = lambda f: lambda w: -jax.nn.log_softmax(f(w, TOKENS))[..., 1].mean()  # noqa: E731
    gradients = [jax.jit(jax.grad(loss(f)))(w) for f in (low, transformer)]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert float((a * b).sum() / jnp.linalg.norm(a) / jnp.linalg.norm(b)) > 0.98


# ---------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("function", "rules", "said"),
    [
        (
            by_nothing,
            {"up": "w8a8"},
            r"rule 'up' is unused: nothing has such a path; the paths are a, b",
        ),
        (by_nothing, {".*": "a8"}, "which has weights, and a8 is for attention"),
        (
            by_nothing,
            {"a": "w8a8", "a|b": "w4a16g7"},
            r"b \(engine_test.py:\d+\) cannot take w4a16g7",
        ),
        (by_nothing, {".*": "w4a4-lsq"}, "cannot take w4a4-lsq"),
        (lambda w, x: x + 1, {".*": "w8a8"}, "has no product of floating-point numbers"),
        (lambda w, x: w["i"] @ w["i"], {".*": "w8a8"}, "has no product of floating-point numbers"),
        (lambda w, x: jax.grad(lambda a: (x @ a).sum())(w["a"]), {".*": "w8a8"}, "takes gradients"),
        (lambda w, x: (x @ w["a"]) @ x.T, {"a": "kv8"}, "which operand has the keys"),
    ],
)
def test_what_is_wrong_is_said_in_one_error(function, rules, said):
    w, x = parts() | {"i": jnp.eye(3, dtype=int)}, array(3, 6, D)
    with pytest.raises(ValueError, match=said):
        functions.quantize(function, rules)(w, x)


def test_arguments_that_cannot_be_taken_are_named():
    class Config:
        __hash__ = None  # as of a dataclass that is not frozen

    w, x = parts(), array(3, 6, D)
    low = functions.quantize(lambda w, x, c=None: x @ w["a"], {"a": "w8a8"})
    with pytest.raises(
        ValueError, match=r"argument \[2\] is neither an array nor hashable; got Config"
    ):
        low(w, x, Config())
    with pytest.raises(ValueError, match="first positional argument"):
        low(w=w, x=x)
    closed = functions.quantize(lambda b, x: x @ w["a"] + b, {".*": "w8a8"})
    with pytest.raises(
        ValueError, match=r"engine_test.py:\d+ the function multiplies by an array of its own"
    ):
        closed(jnp.zeros(D), x)


def test_all_that_cannot_take_its_recipe_is_named_at_once_or_left():
    w, x = parts(), array(3, 6, D)
    rules = {".*": "w4a16g7"}
    with pytest.raises(ValueError, match=r"(?s)a .*\('a', None\).*\n.*b .*\('b', None\)"):
        functions.quantize(by_nothing, rules)(w, x)
    left = functions.quantize(by_nothing, rules, on_unsupported="float")
    compared(left(w, x), jax.jit(by_nothing)(w, x))


@pytest.mark.parametrize(
    "bad",
    [
        lambda: functions.quantize(by_nothing, {}),
        lambda: functions.quantize(3, {".*": "w8a8"}),
        lambda: functions.quantize(by_nothing, {".*": "w8a8"}, on_unsupported="skip"),
    ],
)
def test_bad_settings_are_refused_before_any_call(bad):
    with pytest.raises(ValueError, match=r"got|empty"):
        bad()

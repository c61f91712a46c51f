"""Coverage of any function: products in groups, the share in few bits, and why the rest is not."""

import jax
import jax.numpy as jnp
import pytest
from engine_test import D, F, array
from flax import nnx

import jaxquant as jq


def test_coverage_groups_what_repeats_and_says_why_the_rest_stays_in_float():
    def model(w, x):
        for layer in w["layers"]:
            x = jnp.tanh(x @ layer["up"]) @ layer["down"] + layer["bias"]
        return x @ x.T

    layer = {"up": array(0, D, F), "down": array(1, F, D), "bias": array(2, 1, D)}
    rules = {".*up": "w8a8", ".*down|layers/2": None}
    found = jq.functions.coverage(model, rules, {"layers": [layer] * 3}, array(3, 4, D))
    assert [(r.path, r.count, r.recipe, r.macs) for r in found.groups] == [
        ("layers/*/up", 3, "w8a8", 3 * 4 * D * F),
        ("layers/*/down", 3, "float", 3 * 4 * D * F),
        ("layers/2", 1, "float", 16 * D),
    ]
    assert [r.reason for r in found.groups] == ["", "by rule", "by rule"]
    assert found.quantized == pytest.approx(3 * 4 * D * F / found.macs)
    assert found.unread == tuple(f"layers/{i}/bias" for i in range(3))
    assert {r.source.split(":")[0] for r in found} == {"engine_coverage_test.py"}
    with pytest.raises(ValueError, match="nothing"):
        jq.functions.coverage(model, {"nothing": "w8a8"}, {"layers": [layer]}, array(3, 4, D))


def test_coverage_gives_the_reason_where_quantizing_raises():
    model = lambda w, x: x @ w["a"] @ w["b"]  # noqa: E731
    w = {"a": array(0, D, 10), "b": array(1, 10, D)}
    with pytest.raises(ValueError, match="cannot take") as error:
        jq.functions.quantize(model, {".*": "w4a16g16"})(w, array(2, 4, D))
    reasons = [
        r.reason for r in jq.functions.coverage(model, {".*": "w4a16g16"}, w, array(2, 4, D))
    ]
    assert any(reasons)
    assert all(reason in str(error.value) for reason in reasons)


def test_parameters_that_share_a_path_are_named():
    params = {"a": {"b": jnp.ones((4, 4))}, "a/b": jnp.ones((4, 4))}
    function = lambda p, x: x @ p["a/b"] @ p["a"]["b"]  # noqa: E731
    x = jnp.ones((2, 4))
    for call in (
        lambda: jq.functions.quantize(function, {".*": "w8a8"})(params, x),
        lambda: jq.functions.freeze(function, {".*": "w8a8"}, params, x),
        lambda: jq.functions.coverage(function, {".*": "w8a8"}, params, x),
    ):
        with pytest.raises(ValueError, match="2 have 'a/b'"):
            call()
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        {"a/b": nnx.Linear(4, 4, rngs=rngs), "a": nnx.Dict({"b": nnx.Linear(4, 4, rngs=rngs)})}
    )
    apply = lambda m, x: m["a"]["b"](m["a/b"](x))  # noqa: E731

    class Model(nnx.Module):
        def __init__(self):
            self.layers = model

        def __call__(self, x):
            return apply(self.layers, x)

    with pytest.raises(ValueError, match="2 have 'layers/a/b/bias'"):
        jq.nnx.quantize(Model(), {".*": "w8a8"})(x)


def test_attention_of_one_fused_projection_is_named_by_its_module():
    class Attention(nnx.Module):
        def __init__(self):
            self.qkv = nnx.Param(jax.random.normal(jax.random.key(0), (3, 16, 2, 8)) / 4)

        def __call__(self, x):
            q, k, v = jnp.einsum("btd,cdhk->cbthk", x, self.qkv[...])
            scores = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
            return jnp.einsum("bhts,bshk->bthk", scores, v)

    class Model(nnx.Module):
        def __init__(self):
            self.attention = Attention()

        def __call__(self, x):
            return self.attention(x)

    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    table = jq.nnx.coverage(Model(), {".*attention": "a8", ".*": "w8a8"}, x)
    found = [(row.path, row.recipe) for row in table.rows]
    assert found == [("attention/qkv", "w8a8"), ("attention", "a8"), ("attention", "a8")]
    plain = Model()
    quantized = jq.nnx.quantize(plain, {".*attention": "a8", ".*": "w8a8"})
    error = jnp.linalg.norm(quantized(x) - plain(x)) / jnp.linalg.norm(plain(x))
    assert 0 < error < 0.03

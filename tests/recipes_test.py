import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

import jaxquant as jq
from experiments.harness.training import hlo
from jaxquant.operations.delaying import first_scales, is_delayed, with_ranges
from jaxquant.operations.recipes import RECIPES


def test_recipes_are_what_their_names_say():
    w8a8 = jq.recipe("w8a8").forward
    assert (w8a8.lhs, w8a8.rhs) == (jq.Quantizer(jq.INT8), jq.Quantizer(jq.INT8, "channel"))
    assert w8a8.arithmetic == "native"
    w4a16 = jq.recipe("w4a16").forward
    assert (w4a16.lhs, w4a16.rhs) == (None, jq.Quantizer(jq.INT4, "channel"))
    assert jq.recipe("w3a8g32").forward.rhs == jq.Quantizer(jq.Int(3), 32)
    assert jq.recipe("w16a16") == jq.DotGeneral()


@pytest.mark.first(3)
@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w2a2", "w4a16", "w16a8", "w4a8g8", "w4a16g32"])
def test_recipes_run(name):
    lhs, rhs = jnp.ones((2, 32)), jnp.ones((32, 4))
    found = jq.recipe(name)(lhs, rhs, (((1,), (0,)), ((), ())))
    assert jnp.allclose(found, 32.0)


# How far each recipe's output and gradients may lie from float's, as a share of their norm: a little
# more than what its coarsest grid costs on normal numbers.
SHARES = {
    "int8_train": 0.02,
    "fp8_train": 0.12,
    "fp8_delayed_train": 0.12,
    "mxfp8": 0.08,
    "mxfp6": 0.12,
    "mxfp4": 0.3,
    "mxfp8_train": 0.12,
    "mxfp8_ocp_train": 0.12,
    "nvfp4_train": 0.3,
    "mxfp4_train": 0.4,
    "nvfp4_eden_train": 0.3,
    "nvfp4": 0.3,
    "nf4": 0.2,
    "nf4dq": 0.2,
    "quest4": 0.3,
}


@pytest.mark.first(3)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_recipes_stay_near_the_float_product_forward_and_backward(name, dtype):
    rng = np.random.default_rng(0)
    x, w, g = (
        jnp.array(rng.normal(size=s), dtype) for s in ((2, 128, 64), (64, 128), (2, 128, 128))
    )

    @jax.jit
    def both_ways(x, w, g):
        def run(dot):
            out, pull = jax.vjp(lambda x, w: dot(x, w, (((2,), (0,)), ((), ()))), x, w)
            return out, *pull(g)

        recipe = jq.recipe(name)
        if is_delayed(recipe):  # a grid's largest value is more than these
            recipe = with_ranges(recipe, first_scales(recipe))
        return run(recipe), run(jax.lax.dot_general)

    for found, expected in zip(*both_ways(x, w, g), strict=True):
        assert (found.dtype, found.shape) == (dtype, expected.shape)
        found, expected = (np.asarray(a, np.float32) for a in (found, expected))
        assert np.linalg.norm(found - expected) < SHARES[name] * np.linalg.norm(expected)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_values(name):
    assert hash(jq.recipe(name)) == hash(jq.recipe(name))
    assert jax.tree.leaves(jq.recipe(name)) == []


@pytest.mark.parametrize(
    "name",
    ["int8", "w8", "w8a8g", "W8A8", "w1a8", "w9a8", "w0a8", "w8a33", "w16a8g32", "w4a16g0", 8],
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"recipe|granularity"):
        jq.recipe(name)


# ---- platforms

CELLS = {"int8": {("s8", "s8")}, "simulated": {("f32", "f32"), ("bf16", "bf16")}}
CELLS |= {word: CELLS["simulated"] for word in ("stored", "float")}


@pytest.mark.exhaustive  # older compilers widen int8 before they multiply
@pytest.mark.parametrize("name", ["w8a8", "int8_train", "fp8_train", "w4a16", "nvfp4"])
def test_a_cpu_multiplies_what_the_table_of_platforms_says(name):
    dot, cell = jq.recipe(name), jq.platforms([name]).cells[name]["cpu"]

    def loss(x, w):
        return jnp.sum(dot(x, w, (((1,), (0,)), ((), ()))).astype(jnp.float32) ** 2)

    shapes = (jnp.ones(s, jnp.bfloat16) for s in ((64, 32), (32, 48)))
    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile().as_text()
    assert text is not None
    found = {x.kinds for x in hlo.parse(text).products()}
    assert found <= set().union(*(CELLS[word] for word in cell))
    assert (("s8", "s8") in found) == ("int8" in cell)


def test_the_page_of_recipes_has_the_table_of_platforms():
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert str(jq.platforms()) in page, "print(jq.platforms()) is what docs/recipes.md should say"

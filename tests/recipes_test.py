import jax.numpy as jnp
import pytest

import jaxquant as jq


def test_recipes_are_what_their_names_say():
    w8a8 = jq.recipe("w8a8").forward
    assert (w8a8.lhs, w8a8.rhs) == (jq.Quantizer(jq.INT8), jq.Quantizer(jq.INT8, "channel"))
    assert w8a8.arithmetic == "native"
    w4a16 = jq.recipe("w4a16").forward
    assert (w4a16.lhs, w4a16.rhs) == (None, jq.Quantizer(jq.INT4, "channel"))
    assert jq.recipe("w3a8g32").forward.rhs == jq.Quantizer(jq.Int(3), 32)
    assert jq.recipe("w16a16") == jq.DotGeneral()


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w2a2", "w4a16", "w16a8", "w4a8g8", "w4a16g32"])
def test_recipes_run(name):
    lhs, rhs = jnp.ones((2, 32)), jnp.ones((32, 4))
    found = jq.recipe(name)(lhs, rhs, (((1,), (0,)), ((), ())))
    assert jnp.allclose(found, 32.0)


@pytest.mark.parametrize(
    "name",
    ["int8", "w8", "w8a8g", "W8A8", "w1a8", "w9a8", "w0a8", "w8a33", "w16a8g32", "w4a16g0", 8],
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"recipe|granularity"):
        jq.recipe(name)

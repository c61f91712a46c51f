import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxquant as jq

KEYS = jax.random.split(jax.random.key(0), 4)
QUERY = jax.random.normal(KEYS[0], (2, 6, 4, 16))
KEY, VALUE = (jax.random.normal(k, (2, 6, 2, 16)) for k in KEYS[1:3])
PLAIN = jq.Attention()


def test_without_quantizers_it_is_the_usual_attention():
    bias = jax.random.normal(KEYS[3], (2, 4, 6, 6))
    mask = jax.random.bernoulli(KEYS[3], 0.8, (2, 1, 6, 6)).at[..., 0].set(True)
    for options in ({}, {"is_causal": True}, {"bias": bias}, {"mask": mask}, {"scale": 0.3}):
        expected = jax.nn.dot_product_attention(QUERY, KEY, VALUE, **options)
        np.testing.assert_allclose(PLAIN(QUERY, KEY, VALUE, **options), expected, atol=2e-6)


def test_a_query_that_sees_nothing_gets_zeros():
    mask = jnp.ones((1, 1, 6, 6), bool).at[..., 2, :].set(False)
    assert not PLAIN(QUERY, KEY, VALUE, mask=mask)[:, 2].any()


@pytest.mark.long
def test_products_are_of_integers():
    attention = jq.recipe("a8")
    found = attention(QUERY, KEY, VALUE, is_causal=True)
    expected = PLAIN(QUERY, KEY, VALUE, is_causal=True)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.02
    text = jax.jit(attention).lower(QUERY, KEY, VALUE).as_text()
    assert text.count("xi8>, tensor") >= 2


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.01), (4, 0.2)])
def test_the_cache_holds_what_the_recipe_simulates(bits, limit):
    """Tokens one by one through a cache, and all at once: the same keys and values, and bytes as promised."""
    quantizer = jq.recipe(f"kv{bits}").kv
    cache = jq.KVCache.zeros(2, 8, 2, 16, quantizer)
    assert cache.nbytes == 2 * 2 * 8 * 2 * (16 * bits // 8 + 4)
    attend = jax.jit(lambda cache, q, t: cache.attend(q, t))
    update = jax.jit(lambda cache, k, v, t: cache.update(k, v, t))
    outs = []
    for t in range(6):
        one = slice(t, t + 1)
        cache = update(cache, KEY[:, one], VALUE[:, one], t)
        outs.append(attend(cache, QUERY[:, one], t))
    whole = jq.Attention(kv=quantizer)(QUERY, KEY, VALUE, is_causal=True)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, atol=2e-6)
    stored = jq.dequantize(cache.key)[:, :6]
    np.testing.assert_array_equal(stored, jq.fake_quant(KEY, quantizer, axis=-1))
    error = np.linalg.norm(stored - KEY) / np.linalg.norm(KEY)
    assert 0 < error < limit


def test_several_tokens_enter_the_cache_at_once():
    cache = jq.KVCache.zeros(2, 8, 2, 16).update(KEY, VALUE, 0)
    expected = PLAIN(QUERY, KEY, VALUE, is_causal=True)
    np.testing.assert_allclose(cache.attend(QUERY, 0), expected, atol=2e-6)


def test_it_goes_into_both_apis():
    x = jax.random.normal(KEYS[0], (2, 6, 32))
    layer = nnx.MultiHeadAttention(2, 32, decode=False, rngs=nnx.Rngs(0))
    quantized = jq.nnx.quantize(layer, {"": "a8kv8"})
    assert 0 < float(jnp.abs(quantized(x) - layer(x)).max()) < 0.05
    linen = nn.MultiHeadDotProductAttention(2)
    variables = linen.init(KEYS[1], x)
    found = linen.clone(attention_fn=jq.recipe("a8kv8")).apply(variables, x)
    assert 0 < float(jnp.abs(found - linen.apply(variables, x)).max()) < 0.05


def test_dropout_is_applied_to_probabilities():
    options = {"dropout_rate": 0.5, "deterministic": False, "dropout_rng": KEYS[0]}
    found = PLAIN(QUERY, KEY, VALUE, **options)
    assert not np.allclose(found, PLAIN(QUERY, KEY, VALUE))
    np.testing.assert_array_equal(found, PLAIN(QUERY, KEY, VALUE, **options))


def test_misuse_is_named():
    with pytest.raises(ValueError, match="kv is a Quantizer"):
        jq.Attention(kv=8)
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        PLAIN(QUERY, jnp.ones((2, 6, 3, 16)), jnp.ones((2, 6, 3, 16)))
    with pytest.raises(ValueError, match="does not sow"):
        PLAIN(QUERY, KEY, VALUE, module=object())
    with pytest.raises(ValueError, match="belong to one token"):
        jq.KVCache.zeros(1, 4, 2, 16, jq.Quantizer(jq.INT8))
    with pytest.raises(ValueError, match="6 tokens do not fit a cache of 4"):
        jq.KVCache.zeros(2, 4, 2, 16).update(KEY, VALUE, 0)
    with pytest.raises(ValueError, match="dropout_rng"):
        PLAIN(QUERY, KEY, VALUE, dropout_rate=0.5, deterministic=False)
    for name in ("a9", "kv1", "a1", "kv16"):
        with pytest.raises(ValueError, match="2 to 8"):
            jq.recipe(name)


def test_no_examples_give_no_outputs():
    model = nnx.MultiHeadAttention(2, 32, decode=False, rngs=nnx.Rngs(0))
    for rules in ([("^$", "a8"), (".*", "w8a8")], [("^$", "a8kv4"), (".*", "w4a16")]):
        assert jq.nnx.quantize(model, rules)(jnp.ones((0, 5, 32))).shape == (0, 5, 32)

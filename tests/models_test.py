import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.harness.models import lm

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others


def parameters(model, prefix=""):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("name", lm.SIZES)
def test_sizes_are_what_their_names_say(name):
    config = lm.SIZES[name]
    model = nnx.eval_shape(lambda: lm.LM(config, nnx.Rngs(0)))
    norms = (2 * config.layers + 1) * config.width
    embedding_and_head = 2 * config.vocab_size * config.width
    n = parameters(model) - norms - embedding_and_head
    assert n == config.non_embedding_parameters
    digits, unit = float(name[:-1]), {"k": 1e3, "m": 1e6, "b": 1e9}[name[-1]]
    assert abs(n / (digits * unit) - 1) < 0.16


@pytest.mark.long
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_are_causal(kv_heads):
    config = lm.LMConfig(2, 32, 4, kv_heads, 64)
    model = lm.LM(config, nnx.Rngs(0))
    embedded = jax.random.normal(jax.random.key(0), (1, 8, 32))

    def logits(x):
        for block in model.blocks:
            x = block(x)
        return model.head(model.norm(x))[0]

    influence = jnp.abs(jax.jacobian(logits)(embedded)).sum((1, 2, 4))  # [out, in]
    assert influence.shape == (8, 8)
    assert (np.triu(influence, 1) == 0).all()
    assert (np.tril(influence) != 0)[np.tril_indices(8)].all()


def test_rotation_makes_products_depend_on_distance_alone():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 16)) for i in range(2))
    turned_q, turned_k = (lm.rotate(jnp.tile(x, (1, 12, 1, 1)))[0, :, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in range(4):
        diagonal = np.diagonal(scores, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4)


def test_grouped_queries_share_keys_and_values():
    full, grouped = (lm.LMConfig(1, 32, 4, kv, 64) for kv in (4, 1))
    assert full.non_embedding_parameters - grouped.non_embedding_parameters == 2 * 32 * 24
    logits = lm.LM(grouped, nnx.Rngs(0))(jnp.zeros((2, 5), jnp.int32))
    assert logits.shape == (2, 5, 256)


@pytest.mark.long
def test_bfloat16_computes_in_bfloat16_and_keeps_parameters_in_float32():
    model = lm.LM(lm.sized("3k", dtype="bfloat16"), nnx.Rngs(0))
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote their scale by themselves
        x = model.blocks[0](jnp.ones((1, 2, 12), jnp.bfloat16))
        logits = model(jnp.zeros((1, 2), jnp.int32))
    assert (x.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {
        jnp.dtype("float32")
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lm.sized("9b"), "one of 3k, 10k"),
        (lambda: lm.LMConfig(1, 30, 4, 4, 64), "width 30"),
        (lambda: lm.LMConfig(1, 12, 4, 4, 64), "even size"),
        (lambda: lm.LMConfig(1, 32, 4, 3, 64), "3 kv_heads"),
        (lambda: lm.LMConfig(1, 32, 4, -1, 64), "kv_heads is at least 1"),
        (lambda: lm.sized("3k", dtype="float8"), "float8"),
    ],
)
def test_misuse_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

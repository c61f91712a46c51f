"""Random functions: through the engine they are what they are with quantized products written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant import functions
from jaxquant.engine import products

pytestmark = [pytest.mark.usefixtures("as_users_compute"), pytest.mark.exhaustive]

D, LAYERS, MATRICES = 8, 2, 3
# A scale for each row and column, so that vmap before quantizing or after it is the same.
RECIPE = "w8a8-token"
LEAVES = ("right", "left", "einsum", "einsum left", "cast")
NESTS = ("scan", "remat", "cond", "vmap", "jit", "custom_jvp", "over weights")


@jax.custom_jvp
def bent(x):
    return jnp.tanh(x)


bent.defjvp(lambda primals, tangents: (bent(*primals), 0.5 * tangents[0]))

programs = st.recursive(
    st.tuples(st.sampled_from(LEAVES), st.integers(0, MATRICES - 1)).map(lambda leaf: [leaf]),
    lambda inner: st.lists(
        st.one_of(
            st.tuples(st.sampled_from(LEAVES), st.integers(0, MATRICES - 1)),
            st.tuples(st.sampled_from(NESTS), inner),
        ),
        min_size=1,
        max_size=3,
    ),
    max_leaves=5,
)


def plain(kind, x, w):
    """A product of rows and a matrix, with the matrix on either side."""
    if kind == "left":
        return (w.T @ x.T).T
    if kind == "einsum":
        return jnp.einsum("td,df->tf", x, w)
    if kind == "einsum left":
        return jnp.einsum("df,td->tf", w, x)
    return x @ w


def by_hand(kind, x, w):
    return jq.recipe(RECIPE)(x, w, (((1,), (0,)), ((), ())))


def run(program, product, w, x):
    """A program of rows [T, D], whose products are all `product`'s."""
    inner = functools.partial(run, product=product)
    for kind, what in program:
        if kind in LEAVES:
            matrix = w[f"m{what}"]
            if kind == "cast":
                matrix = matrix.astype(jnp.bfloat16).astype(jnp.float32)
            x = x + jnp.sin(product(kind, x, matrix))
        elif kind == "scan":
            body = lambda x, s, p=what: (inner(p, w={**w, "m0": s}, x=x), None)  # noqa: E731
            x, _ = jax.lax.scan(body, x, w["stack"])
        elif kind == "remat":
            x = jax.checkpoint(lambda w, x, p=what: inner(p, w=w, x=x))(w, x)
        elif kind == "cond":
            x = jax.lax.cond(
                x.sum() > 0, lambda w, x, p=what: inner(p, w=w, x=x), lambda w, x: 0.5 * x, w, x
            )
        elif kind == "vmap":
            x = jax.vmap(lambda x, p=what: inner(p, w=w, x=x))(jnp.stack([x, 2 * x])).mean(0)
        elif kind == "over weights":
            each = jax.vmap(lambda s, p=what, x=x: inner(p, w={**w, "m1": s}, x=x))
            x = each(w["stack"]).mean(0)
        elif kind == "jit":
            x = jax.jit(lambda w, x, p=what: inner(p, w=w, x=x))(w, x)
        else:
            x = bent(inner(what, w=w, x=x))
    return x


def compared(program):
    keys = jax.random.split(jax.random.key(0), MATRICES + 2)
    w = {f"m{i}": 0.5 * jax.random.normal(keys[i], (D, D)) for i in range(MATRICES)}
    w["stack"] = 0.5 * jax.random.normal(keys[-2], (LAYERS, D, D))
    x = jax.random.normal(keys[-1], (4, D))
    function = functools.partial(run, program, plain)
    assert {p.weight for p in products(function, w, x)} <= {0, 1}
    results = []
    for f in (
        functions.quantize(function, {".*": RECIPE}),
        functools.partial(run, program, by_hand),
    ):
        step = jax.jit(jax.value_and_grad(lambda w, x, f=f: (f(w, x) ** 2).sum(), (0, 1)))
        results.append(step(w, x))
    for found, wanted in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(
            found, wanted, rtol=1e-4, atol=1e-4 * float(np.abs(wanted).max())
        )


@pytest.mark.parametrize("count", [15, pytest.param(200, marks=pytest.mark.release)])
def test_random_functions_are_as_if_written_with_quantized_products(count):
    checked = settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )(seed(0)(given(programs)(compared)))
    checked()

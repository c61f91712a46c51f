"""Every optimizer under every policy learns a small problem nearly as well as in full precision."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from optim_test import OPTIMIZERS, problem

from jaxquant.optim import Statistics, adaptive, by_role, even, quantize_state, report, state_bytes

pytestmark = [pytest.mark.long, pytest.mark.exhaustive]

STEPS = 120
BUDGET = 14.0
WIDTHS = {"embedding": 8, "head": 8, "matrix": (6, 5), "vector": None}
# Vectors lie in pages of their own, nearly empty here, and count: 14 bits a number are 5 to 7 of codes.
POLICIES = {
    "by role": by_role(WIDTHS),
    "even": even(BUDGET),
    "felt": adaptive(BUDGET, interval=20),
    "statistics": adaptive(BUDGET, interval=20, score=Statistics()),
}


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def trained(tx):
    """(loss at first, loss at last, state), 120 steps on."""
    params, loss = problem(hidden=256)

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=STEPS))
    (params, state), values = run((params, tx.init(params)))
    return float(values[0]), float(loss(params)), state


@functools.cache
def exact(name):
    return trained(OPTIMIZERS[name])[:2]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns_within_a_twentieth_of_the_first_loss(name, policy):
    first, last = exact(name)
    _, found, state = trained(quantize_state(OPTIMIZERS[name], POLICIES[policy]))
    assert last < 0.75 * first
    assert found < last + 0.05 * first
    rows = [row for row in report(state).rows if not row.reason]
    assert rows
    elements = sum(int(jnp.prod(jnp.array(row.shape))) for row in rows)
    if policy != "by role":
        exact_bytes = sum(x.nbytes for x in jax.tree.leaves(state.exact))
        assert 8 * (state_bytes(state) - exact_bytes) <= BUDGET * elements + 64

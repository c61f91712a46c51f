"""Every optimizer under every policy learns a small problem nearly as well as in full precision."""

import functools

import jax
import jax.numpy as jnp
import pytest
from optim_test import OPTIMIZERS, trained

from jaxquant.optim import (
    LayerStatistics,
    adaptive,
    by_role,
    quantize_state,
    report,
    split,
    state_bytes,
    uniform,
)

pytestmark = pytest.mark.exhaustive

HIDDEN = 256
WIDTHS = {"embedding": 8, "head": 8, "matrix": (6, 5), "vector": None}
# Vectors lie in pages of their own, nearly empty here, and count: 14 bits a number are 5 to 7 of codes.
BUDGET = 14.0
# One of its three states, the sum of gradients, stays unquantized and counts: 20 bits leave the others 14.
MULTI_STEPS_BUDGET = 20.0
POLICIES = {
    "by role": lambda budget: by_role(WIDTHS),
    "uniform": lambda budget: uniform(budget),
    "felt": lambda budget: adaptive(budget, interval=20),
    "statistics": lambda budget: adaptive(budget, interval=20, score=LayerStatistics()),
}


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def exact(name):
    *_, last, values = trained(OPTIMIZERS[name], hidden=HIDDEN)
    return float(values[0]), last


# Every optimizer by one policy, and every policy with Adam; the other pairs are for a release.
PAIRS = [
    pytest.param(
        *(name, policy),
        marks=pytest.mark.long if policy == "felt" or name == "adam" else pytest.mark.release,
    )
    for name in OPTIMIZERS
    for policy in POLICIES
]


@pytest.mark.parametrize(("name", "policy"), PAIRS)
def test_it_learns_within_a_twentieth_of_the_first_loss(name, policy):
    first, last = exact(name)
    budget = MULTI_STEPS_BUDGET if name == "multi_steps" else BUDGET
    tx = quantize_state(OPTIMIZERS[name], POLICIES[policy](budget))
    _, state, found, _ = trained(tx, hidden=HIDDEN)
    assert last < 0.75 * first
    assert found < last + 0.05 * first
    rows = [row for row in report(state).rows if not row.reason]
    assert rows
    elements = sum(int(jnp.prod(jnp.array(row.shape))) for row in rows)
    if policy != "by role":
        exact_bytes = sum(x.nbytes for x in jax.tree.leaves(state.exact))
        assert 8 * (state_bytes(state) - exact_bytes) <= BUDGET * elements + 64


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: split(4.0, roles=["head"]), r"mapping from role to bits; got \['head'\]"),
        (lambda: state_bytes(3), "got the leaf 3"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()

"""Static splits of a budget, codes of one bit, and what adaptive policies can be told."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxquant.optim import (
    LayerStatistics,
    UpdateSensitivity,
    adaptive,
    by_role,
    fixed,
    quantize_state,
    report,
    split,
    state_bytes,
)
from jaxquant.optim.identity import identity
from jaxquant.optim.leaves import find

B1, B2 = 0.9, 0.95
PARAMS = {
    "embed": {"embedding": jnp.ones((256, 64))},
    "up": jnp.ones((128, 128)),
    "head": jnp.ones((64, 256)),
}
ELEMENTS = 2 * sum(x.size for x in jax.tree.leaves(PARAMS))


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def made(policy):
    tx = quantize_state(optax.adam(1e-3, B1, B2), policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few bits
        return tx, tx.init(PARAMS)


def widths(state):
    return {(row.slot, row.path): row.bits for row in report(state).rows if not row.reason}


def steps(tx, state, count):
    update = jax.jit(tx.update)
    for i in range(count):
        keys = jax.random.split(jax.random.key(i), 3)
        leaves, structure = jax.tree.flatten(PARAMS)
        # Layers whose gradients differ in scale and in tails.
        drawn = [
            10.0**-j * jax.random.normal(k, x.shape) ** (2 * j + 1)
            for j, (k, x) in enumerate(zip(keys, leaves, strict=True))
        ]
        _, state = update(jax.tree.unflatten(structure, drawn), state, PARAMS)
    return state


@pytest.mark.parametrize("signed", [0, 1, 2, 3])
def test_signed_states_lead_by_what_is_asked_and_the_budget_holds(signed):
    _, state = made(split(4.25, signed))
    found = widths(state)
    assert 8 * state_bytes(state) <= 4.25 * ELEMENTS
    for path in ("up", "embed/embedding", "head"):
        lead = found["0/mu", path] - found["0/nu", path]
        assert signed <= lead <= signed + 1  # rows that are left go to signed states


def test_a_role_leads_in_both_slots():
    _, state = made(split(4.0, 1, roles={"head": 2}))
    found = widths(state)
    for slot in ("0/mu", "0/nu"):
        assert found[slot, "head"] >= found[slot, "up"] + 1
    assert 8 * state_bytes(state) <= 4.0 * ELEMENTS


def test_second_moments_of_one_bit_train():
    def loss(params):
        return jnp.sum((params["w"] - 0.5) ** 2) / 4096

    def trained(tx):
        params = {"w": jnp.zeros((64, 64))}
        state, step = tx.init(params), jax.jit(tx.update)
        for _ in range(60):
            updates, state = step(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        return float(loss(params))

    adam = optax.adam(3e-2, B1, B2)
    with pytest.warns(UserWarning, match="1 bits"):
        found = trained(quantize_state(adam, fixed(6, 1)))
    assert found < 0.02
    assert trained(adam) < 0.02
    assert loss({"w": jnp.zeros((64, 64))}) == 0.25


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: fixed(1), "bits must be an integer from 2 to 8"),
        (lambda: fixed(4, 0), "second must be an integer from 1 to 8"),
        (lambda: by_role(dict.fromkeys(("embedding", "head", "matrix", "vector"), (1, 1))), "2 to"),
        (lambda: split(4.0, -1), "signed must be"),
        (lambda: split(4.0, 1, roles={"body": 1}), "roles must be among"),
        (lambda: split(4.0, 1, roles={"head": 9}), "roles"),
        (lambda: adaptive(4.0, until=0), "until must be"),
        (lambda: LayerStatistics(factors=("variance",)), "factors must be some of"),
        (lambda: LayerStatistics(factors=()), "factors must be some of"),
    ],
)
def test_what_cannot_be_is_one_error(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_split_that_does_not_fit_names_the_least_budget():
    with pytest.raises(ValueError, match="budget_bits must be at least"):
        made(split(2.3, 3))


def test_widths_stay_from_the_step_that_is_given():
    always, once = (adaptive(4.25, 2, hysteresis=0.0, until=n) for n in (None, 1))
    tables = {}
    for name, policy in (("always", always), ("once", once)):
        tx, state = made(policy)
        first = steps(tx, state, 1)
        tables[name] = [np.asarray(jax.tree.leaves(s.tables)) for s in (first, steps(tx, state, 9))]
    assert (tables["always"][0] == tables["once"][0]).all()
    assert (tables["once"][0] == tables["once"][1]).all()
    assert (tables["always"][0] != tables["always"][1]).any()


def test_decay_is_found_and_persistence_adds_what_it_says():
    leaves, _ = find(optax.adam(1e-3, B1, B2), PARAMS)
    assert {leaf.slot: leaf.decay for leaf in leaves} == {
        "0/mu": pytest.approx(B1),
        "0/nu": pytest.approx(B2),
    }
    scores = []
    for persistence in (False, True):
        tx, state = made(adaptive(4.25, 100, UpdateSensitivity(persistence=persistence)))
        scores.append(steps(tx, state, 1).memory[1][0])
    for plain, lasting in zip(*scores, strict=True):
        more = [np.asarray(b - a) for a, b in zip(plain, lasting, strict=True)]
        for found, decay in zip(more, (B1, B2), strict=True):
            np.testing.assert_allclose(found, -0.5 * np.log2(1 - decay**2), rtol=1e-5)


def test_statistics_within_slots_give_all_slots_the_same_bits():
    means = {}
    for within in (False, True):
        score = LayerStatistics(factors=("rms",), within_slots=within)
        tx, state = made(adaptive(4.25, 2, score, hysteresis=0.0))
        found = widths(steps(tx, state, 9))
        means[within] = {
            slot: np.mean([bits for (own, _), bits in found.items() if own == slot])
            for slot in ("0/mu", "0/nu")
        }
    assert means[True]["0/mu"] == pytest.approx(means[True]["0/nu"], abs=0.2)


def test_what_came_later_is_not_written_where_it_is_not_used():
    plain = identity(made(adaptive(4.25))[1].plan)["adaptation"]
    assert set(plain) == {"interval", "stay", "score"}
    assert set(plain["score"]) == {"kind", "weight", "memory", "reach"}
    other = adaptive(4.25, score=UpdateSensitivity(persistence=True), until=7)
    found = identity(made(other)[1].plan)["adaptation"]
    assert found["until"] == 7
    assert found["score"]["persistence"] is True

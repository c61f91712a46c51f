"""Parameters in bfloat16 without a copy in float32: unbiased, and repeatable.  `sharding_test` has meshes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from conftest import ROOT

from jaxquant.optim import (
    adaptive,
    by_role,
    fixed,
    in_float32,
    load,
    quantize_state,
    save,
    split,
    stochastic_apply,
    uniform,
)

BF16 = jnp.bfloat16
DRAWS = 1_000_000


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def as_float64(x) -> np.ndarray:
    return np.asarray(x, np.float32).astype(np.float64)


@functools.partial(jax.jit, static_argnames="seed")
def applied(params, updates, step, seed=0):
    return stochastic_apply(params, updates, step, seed=seed)


def neighbours(x: float) -> tuple[float, float]:
    """The numbers of bfloat16 around a float64, by NumPy."""
    near = ml_dtypes.bfloat16(x)
    other = np.nextafter(near, ml_dtypes.bfloat16(np.inf if float(near) < x else -np.inf))
    low, high = sorted([float(near), float(other)])
    return low, high


# ---- what it rounds to

PAIRS = [
    (1.0, 1e-3),
    (1.0, -1e-3),
    (-3.0, 0.7),
    (0.125, 2.003),
    (2.0**-60, 2.0**-70),
    (1.9921875, 7e-3),
]


@pytest.mark.parametrize(("p", "u"), PAIRS)
def test_the_mean_is_that_of_the_exact_sum(p, u):
    params = {"w": jnp.full(DRAWS, p, BF16)}
    found = as_float64(applied(params, {"w": jnp.full(DRAWS, u, jnp.float32)}, 3)["w"])
    exact = float(ml_dtypes.bfloat16(p)) + float(np.float32(u))
    low, high = neighbours(exact)
    assert set(np.unique(found)) == {low, high}
    chance = (exact - low) / (high - low)
    spread = (high - low) * np.sqrt(chance * (1 - chance) / DRAWS)
    assert abs(found.mean() - exact) < 5 * spread


def test_sums_that_bfloat16_holds_are_exact():
    p = jnp.arange(-128, 128).astype(BF16)
    found = applied({"w": p}, {"w": jnp.ones(256, jnp.float32)}, 0)["w"]
    assert (as_float64(found) == np.arange(-127, 129)).all()


def test_updates_that_rounding_to_nearest_loses_add_up():
    update = {"w": jnp.full(4096, 1e-4, jnp.float32)}
    nearest = ours = {"w": jnp.ones(4096, BF16)}
    for step in range(200):
        nearest, ours = optax.apply_updates(nearest, update), applied(ours, update, step)
    assert (as_float64(nearest["w"]) == 1).all()
    # A step's variance is at most a quarter of the square of the distance of neighbours, 2^-7.
    assert abs(as_float64(ours["w"]).mean() - 1.02) < 5 * 2**-8 * np.sqrt(200 / 4096)


def test_what_is_not_finite_is_shown():
    p = jnp.asarray([np.nan, np.inf, -np.inf, 1.0, 1.0, np.inf], BF16)
    u = jnp.asarray([1.0, 1.0, 1.0, np.nan, -np.inf, -np.inf], jnp.float32)
    with jax.debug_nans(False):
        found = np.asarray(applied({"w": p}, {"w": u}, 0)["w"], np.float32)
    assert np.isnan(found[[0, 3, 5]]).all()
    assert found[[1, 2, 4]].tolist() == [np.inf, -np.inf, -np.inf]


def test_float32_and_whole_numbers_are_as_optax_computes_them():
    rng = np.random.default_rng(0)
    params: Any = {"w": jnp.asarray(rng.normal(size=64), jnp.float32), "n": jnp.arange(3)}
    params |= {"none": None, "b": jnp.ones(8, BF16)}
    updates = {"w": jnp.asarray(rng.normal(size=64), jnp.float32), "n": jnp.ones(3, jnp.int32)}
    updates |= {"none": None, "b": jnp.zeros(8, jnp.float32)}
    found, wanted = stochastic_apply(params, updates, 0), optax.apply_updates(params, updates)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert found["none"] is None


# ---- what its draws depend on


def test_draws_are_of_the_seed_the_step_and_the_path_alone():
    params = {"a": jnp.ones(4096, BF16), "b": jnp.ones(4096, BF16)}
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 3e-3, jnp.float32), params)
    found = applied(params, updates, 5)
    again = stochastic_apply(params, updates, jnp.int32(5))
    alone = applied({"b": params["b"]}, {"b": updates["b"]}, 5)
    np.testing.assert_array_equal(found["b"], again["b"])
    np.testing.assert_array_equal(found["b"], alone["b"])
    others = found["a"], applied(params, updates, 6)["b"], applied(params, updates, 5, seed=1)["b"]
    # Half of independent draws agree: 4096 of them within five standard deviations.
    p = 3e-3 * 128
    agreeing = p * p + (1 - p) * (1 - p)
    for other in others:
        share = np.mean(as_float64(other) == as_float64(found["b"]))
        assert abs(share - agreeing) < 5 * np.sqrt(agreeing * (1 - agreeing) / 4096)


# ---- what it refuses


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"params": {"w": jnp.ones(4, jnp.float16)}}, r"'w' is float16"),
        ({"params": {"w": jnp.ones(4, jnp.float8_e4m3fn)}}, r"'w' is float8_e4m3fn"),
        ({"updates": {"w": jnp.ones((2, 4))}}, r"'w' is \(4,\) and its update \(2, 4\)"),
        ({"step": 1.0}, r"one integer, the number of the step; got 1\.0"),
        ({"step": True}, "got True"),
        ({"step": jnp.arange(2)}, "one integer"),
        ({"seed": 1.5}, r"seed must be an integer; got 1\.5"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(change, words):
    given: dict[str, Any] = {"params": {"w": jnp.ones(4, BF16)}, "updates": {"w": jnp.ones(4)}}
    given |= {"step": 0, "seed": 0} | change
    with pytest.raises(ValueError, match=words):
        stochastic_apply(given["params"], given["updates"], given["step"], seed=given["seed"])


def test_in_float32_takes_transformations_alone():
    with pytest.raises(ValueError, match="tx must be an optax transformation; got 3"):
        in_float32(3)  # pyright: ignore[reportArgumentType]


# ---- training

POLICIES = {
    "fixed": fixed(5, 4),
    "uniform": uniform(6.0),
    "split": split(6.0, 1),
    "by role": by_role({"embedding": 8, "head": 8, "matrix": (5, 4), "vector": None}),
    "adaptive": adaptive(6.0, interval=5),
}
TARGET = np.random.default_rng(1).normal(size=(256, 256)).astype(np.float32)


def step_of(tx):
    @jax.jit
    def step(params, state, number):
        gradients = jax.grad(lambda p: jnp.mean((p["w"].astype(jnp.float32) - TARGET) ** 2))(params)
        updates, state = tx.update(gradients, state, params)
        return stochastic_apply(params, updates, number), state

    return step


def trained(tx, step, steps, params=None, state=None, first=0):
    params = {"w": jnp.zeros((256, 256), BF16)} if params is None else params
    state = tx.init(params) if state is None else state
    for number in range(first, steps):
        params, state = step(params, state, number)
    return params, state


def loss_of(params) -> float:
    return float(np.mean((as_float64(params["w"]) - TARGET) ** 2))


@pytest.mark.exhaustive
@pytest.mark.parametrize("order", ["inside", "around"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_trains_with_state_of_float32(policy, order):
    adamw = optax.adamw(3e-2)
    tx: Any
    if order == "inside":
        tx = quantize_state(in_float32(adamw), POLICIES[policy])
    else:
        tx = in_float32(quantize_state(adamw, POLICIES[policy]))
    params, state = trained(tx, step_of(tx), 120)
    assert params["w"].dtype == BF16
    assert {str(leaf.dtype) for leaf in state.plan.leaves} == {"float32"}
    plain, _ = trained(in_float32(adamw), step_of(in_float32(adamw)), 120)
    assert loss_of(params) < loss_of(plain) + 0.02
    assert loss_of(plain) < 0.05


@pytest.mark.exhaustive
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    tx: Any = quantize_state(in_float32(optax.adamw(3e-2)), adaptive(6.0, interval=5))
    step = step_of(tx)
    wanted, last = trained(tx, step, 24)
    params, state = trained(tx, step, 12)
    save(tmp_path / "state", state)
    np.save(tmp_path / "w.npy", np.asarray(params["w"]).view(np.uint16))
    w = jnp.asarray(np.load(tmp_path / "w.npy").view(ml_dtypes.bfloat16))
    state = load(tmp_path / "state", tx.init(params))
    found, again = trained(tx, step, 24, {"w": w}, state, first=12)
    np.testing.assert_array_equal(as_float64(found["w"]), as_float64(wanted["w"]))
    assert all(map(np.array_equal, *map(jax.tree.leaves, (again, last))))


def test_multi_steps_is_taken_too():
    tx: Any = in_float32(optax.MultiSteps(optax.adam(1e-2), 2))
    params = {"w": jnp.ones(4, BF16)}
    updates, state = tx.update({"w": jnp.ones(4, BF16)}, tx.init(params), params)
    assert updates["w"].dtype == jnp.float32
    assert state.acc_grads["w"].dtype == jnp.float32


# ---- bytes

ROWS = [
    (jnp.float32, "float32", None),
    (jnp.float32, "`fixed(5, 4)`", fixed(5, 4)),
    (BF16, "float32", None),
    (BF16, "`uniform(5.0)`", uniform(5.0)),
    (BF16, "`fixed(5, 4)`", fixed(5, 4)),
]


def row_of(dtype, name, policy) -> str:
    """A row of the page's table, of the arrays after a step."""
    tx: Any = in_float32(optax.adamw(1e-3))
    tx = tx if policy is None else quantize_state(tx, policy)
    params = {"w": jnp.ones((1024, 2048), dtype)}

    @jax.jit
    def step(params, state):
        gradients = jax.grad(lambda p: jnp.sum(p["w"].astype(jnp.float32) ** 2))(params)
        updates, state = tx.update(gradients, state, params)
        return stochastic_apply(params, updates, 0), gradients, state

    params, gradients, state = step(params, tx.init(params))
    own, more, held = (
        sum(x.nbytes for x in jax.tree.leaves(tree)) / params["w"].size
        for tree in (params, gradients, state)
    )
    found = own, held, own + held, own + held + more
    return f"| {params['w'].dtype} | {name} | " + " | ".join(f"{x:.2f}" for x in found) + " |"


@pytest.mark.exhaustive
def test_the_page_says_the_bytes_of_real_arrays():
    page = (ROOT / "docs/optimizer_state.md").read_text()
    made = [row_of(*row) for row in ROWS]
    assert "\n".join(made) in page, "\n".join(made)

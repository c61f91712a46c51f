"""Small states, few bits, slow momentum: what codes cannot hold stays unquantized, or a warning says so."""

import functools
import warnings
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxquant.optim import (
    Companded,
    adaptive,
    by_role,
    fixed,
    from_optax,
    load,
    quantize_state,
    report,
    save,
    state_bytes,
    to_optax,
    uniform,
)

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others
TX = optax.adamw(1e-2)


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def held(params, policy) -> tuple[Any, list[str]]:
    """(state, warnings)"""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        state = quantize_state(TX, policy).init(params)
    return state, [str(w.message) for w in found]


SMALL = [
    (adaptive(5.0), (64, 64)),
    (uniform(5.0), (64, 64)),
    (adaptive(4.0), (64, 64)),
    (uniform(4.0), (64, 96)),
]
SMALL += [(adaptive(5.0), (96, 96)), (uniform(6.0), (4096,))]


@pytest.mark.parametrize(("policy", "shape"), SMALL)
def test_states_of_few_elements_stay_exact_with_a_warning(policy, shape):
    state, said = held({"w": jnp.ones(shape)}, policy)
    nbytes = 2 * 4 * int(np.prod(shape))
    assert len(said) == 1
    for words in (
        "0/mu/w, 0/nu/w stay unquantized",
        f"{nbytes:,} bytes",
        f"of {policy.budget_bits} bits",
    ):
        assert words in said[0]
    rows = [row for row in report(state).rows if row.shape]
    assert [row.held for row in rows] == ["float32"] * 2
    assert all("too little for codes" in row.reason for row in rows)


def test_a_state_that_stayed_exact_is_updated_as_optax_updates_it(tmp_path):
    params: Any = {"w": jnp.ones((64, 64))}
    gradients = jax.tree.map(lambda p: jnp.cos(jnp.arange(4096.0)).reshape(p.shape), params)
    tx: Any = quantize_state(TX, adaptive(5.0))
    with pytest.warns(UserWarning, match="stay unquantized"):
        state = tx.init(params)
    exact, ours, plain = cast(Any, TX.init(params)), jax.jit(tx.update), jax.jit(TX.update)
    for _ in range(3):
        wanted, exact = plain(gradients, exact, params)
        found, state = ours(gradients, state, params)
        np.testing.assert_allclose(found["w"], wanted["w"], rtol=1e-6)
    np.testing.assert_allclose(to_optax(TX, state, params)[0].nu["w"], exact[0].nu["w"], rtol=1e-6)
    save(tmp_path / "state", state)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (load(tmp_path / "state", state), state))))
    again = from_optax(state, exact)
    assert np.array_equal(to_optax(TX, again, params)[0].mu["w"], exact[0].mu["w"])


@pytest.mark.parametrize("policy", [adaptive(5.0), uniform(4.0), adaptive(6.0)])
@pytest.mark.parametrize("size", [10_240, 16_384, 131_072])
def test_budgets_hold_where_codes_are_wide_enough(policy, size):
    params = {
        "w": jnp.ones((128, size // 128)),
        "v": jnp.ones(200),
        "h": jnp.ones(200, jnp.bfloat16),
    }
    state, said = held(params, policy)
    elements = sum(x.size for x in jax.tree.leaves(TX.init(params)))
    kept = {row.path for row in report(state).rows if "too little" in row.reason}
    widths = {row.slot: row.bits for row in report(state).rows if row.path == "w"}
    is_narrow = bool(widths) and (widths["0/mu"] < 3 or widths["0/nu"] < 2)
    assert [("stay unquantized" in words, "as few as 2 bits" in words) for words in said] == [
        *[(True, False)] * bool(kept),
        *[(False, True)] * is_narrow,
    ]
    if widths:  # or the whole state is small
        assert state_bytes(state) * 8 <= policy.budget_bits * elements
    if size == 131_072:
        assert not kept
        assert not said


@pytest.mark.parametrize(
    ("policy", "bits"),
    [
        (fixed(2), 2),
        (fixed(2, 4), 2),
        (by_role({"embedding": 8, "head": 8, "matrix": (2, 8), "vector": 8}), 2),
        (uniform(2.5), 2),
    ],
)
def test_codes_with_which_training_diverges_are_said(policy, bits):
    _, said = held({"w": jnp.ones((512, 256))}, policy)
    assert len(said) == 1
    assert f"as few as {bits} bits" in said[0]
    assert "momentum needs 3 or more" in said[0]


@pytest.mark.parametrize("policy", [fixed(3, 2), fixed(5, 4), uniform(4.0), adaptive(5.0)])
def test_codes_that_train_are_not_warned_of(policy):
    assert held({"w": jnp.ones((512, 256))}, policy)[1] == []


def test_a_small_budget_is_refused_as_it_was():
    with pytest.raises(ValueError, match=r"budget_bits must be at least \d\.\d\d for this state"):
        held({"w": jnp.ones((64, 64))}, uniform(2.0))


# ---------------------------------------------------------------------------------------------------
# Slow momentum


SLOW = {
    "adam": optax.adam(1e-2, b1=0.99),
    "lion": optax.lion(1e-3),
    "adan": optax.adan(1e-3),
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_momentum_has_six_bits_or_more_and_is_dithered(name):
    params = {"w": jax.ShapeDtypeStruct((512, 256), jnp.float32)}
    init = lambda bits: jax.eval_shape(quantize_state(SLOW[name], fixed(bits, 8)).init, params)  # noqa: E731
    for bits in (4, 5):
        with pytest.raises(
            ValueError, match=rf"which {bits} bits do not follow: give it 6 or more"
        ):
            init(bits)
    codecs = [codec for run in init(6).plan.codecs for codec in run if codec.signed]
    assert codecs
    assert any(codec.stochastic for codec in codecs)


@functools.partial(jax.jit, static_argnums=0)
def around(codec, bits, seed, decay=0.99, steps=400):
    """Mean square distance from an optimum around which gradients change their signs, after Adam's steps."""
    keys = jax.random.split(jax.random.key(seed), 3)
    optimum = jax.random.normal(keys[0], (32, 128))
    slope = jnp.exp(0.5 * jax.random.normal(keys[1], optimum.shape))

    def step(carry, t):
        x, m, v = carry
        g = slope * jnp.tanh(10 * (x - optimum))
        m, v = decay * m + (1 - decay) * g, 0.999 * v + 0.001 * g**2
        x = x - 0.01 * (m / (1 - decay ** (t + 1))) / (jnp.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        if codec is not None:
            draws = jax.random.uniform(jax.random.fold_in(keys[2], t), x.shape)
            m = codec.decode(*codec.encode(m, bits, draws), bits)
        return (x, m, v), None

    start = jnp.zeros(optimum.shape)
    (x, *_), _ = jax.lax.scan(step, (start, start, start), jnp.arange(steps, dtype=jnp.float32))
    return jnp.mean((x - optimum) ** 2)


@pytest.mark.first(1)
@pytest.mark.parametrize("seed", range(3))
def test_slow_momentum_to_nearest_drives_past_an_optimum_and_dithered_does_not(seed):
    exact = float(around(None, 8, seed))
    nearest = [float(around(Companded(), b, seed)) for b in (4, 5)]
    dithered = [float(around(Companded(stochastic=True), b, seed)) for b in (4, 5, 6)]
    assert min(nearest) > 100 * exact
    assert dithered[2] < dithered[1] < dithered[0] < min(nearest) / 20
    assert dithered[1] < 5 * exact

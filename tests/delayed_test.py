import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.numerics.delayed import delayed


@pytest.mark.parametrize("by", ["max", "most_recent"])
@pytest.mark.parametrize("margin", [0, 1])
def test_it_is_the_largest_of_the_steps_before(by, margin):
    init, update = delayed(history=4, margin=margin, by=by)
    amaxes = np.random.default_rng(0).exponential(size=20).astype(np.float32)
    state = init(jq.E4M3)
    assert float(state.value) == 448.0  # a scale of 1
    for t, largest in enumerate(amaxes):
        state = update(state, largest)
        wanted = amaxes[max(0, t - 3) : t + 1].max() if by == "max" else largest
        assert float(state.value) == float(wanted) * 2**margin


@pytest.mark.parametrize("largest", [0.0, np.nan, np.inf])
def test_what_gives_no_range_keeps_the_one_before(largest):
    init, update = delayed(history=1)
    state = update(init(jq.E5M2), jnp.float32(3.0))
    assert float(update(state, jnp.float32(largest)).value) == 3.0


def test_a_step_is_traced_once_and_its_state_quantizes_the_next():
    init, update = delayed(history=8)
    traces = []

    @jax.jit
    def step(state, x):
        traces.append(1)
        quantizer = jq.Quantizer(jq.E4M3, calibration=state.range())
        return update(state, jnp.max(jnp.abs(x))), jq.fake_quant(x, quantizer)

    state, rng = init(jq.E4M3), np.random.default_rng(1)
    for _ in range(4):
        x = jnp.array(rng.normal(size=(4, 16)), jnp.float32)
        before = float(state.value)
        state, values = step(state, x)
        scale = np.float32(before) / np.float32(448)
        exact = np.clip(np.asarray(x) / scale, -448, 448)
        wanted = np.asarray(jq.E4M3.round(jnp.array(exact), jnp.round)) * scale
        np.testing.assert_allclose(values, wanted, rtol=1e-6, atol=1e-7)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"history": 0}, "history"), ({"margin": 0.5}, "whole"), ({"by": "mean"}, "most_recent")],
)
def test_misuse_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        delayed(**options)

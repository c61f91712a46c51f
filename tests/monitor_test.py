"""Statistics of live activations, and alarms."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import quality

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others


def test_statistics_over_batches_are_those_of_the_whole_and_compile_once():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(10, 40, 6)) * np.arange(1, 7)).astype(np.float32)
    ranges = {"scalar": 6.0, "channels": (-np.arange(1.0, 7), np.arange(1.0, 7) * 2)}
    init, update = quality.activation_statistics(ranges)
    traces = []

    @jax.jit
    def step(state, batch):
        traces.append(1)
        return update(state, {"scalar": batch, "channels": batch})

    state = init()
    for batch in x:
        state = step(state, batch)
    assert len(traces) == 1
    whole = update(init(), {"scalar": x.reshape(-1, 6), "channels": x.reshape(-1, 6)})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), state, whole)
    assert float(state["scalar"].saturated) == pytest.approx(np.mean(np.abs(x) > 6), rel=1e-4)
    found = {a.name: a for a in quality.drift(state, ranges).activations}
    assert found["scalar"].ratio == pytest.approx(np.abs(x).max() / 6)
    low, high = x.min((0, 1)), x.max((0, 1))
    expected = max(np.max(low / ranges["channels"][0]), np.max(high / ranges["channels"][1]))
    assert found["channels"].ratio == pytest.approx(expected)
    assert "channels" in str(quality.drift(state, ranges))
    assert json.dumps(quality.drift(state, ranges).to_dict(), allow_nan=False)


def test_a_share_survives_counts_beyond_float32_integers():
    init, update = quality.activation_statistics({"x": 1.0})
    long = {"x": init()["x"]._replace(total=jnp.float32(2**30), saturated=jnp.float32(0.5))}
    for _ in range(64):  # another 2²⁴ values, all within
        long = update(long, {"x": jnp.zeros(2**18)})
    assert float(long["x"].saturated) == pytest.approx(0.5 * 2**30 / (2**30 + 2**24), rel=1e-4)


@pytest.mark.parametrize(
    ("values", "level"),
    [
        ([-1.0, 0.9], "ok"),
        ([-1.05, 0.9] + [0.1] * 99998, "ok"),
        ([-1.5] + [0.1] * 99999, "watch"),  # beyond, though rarely
        ([1.01] * 5 + [0.1] * 995, "watch"),  # 0.5 % saturate
        ([1.01] * 50 + [0.1] * 950, "alarm"),
        ([0.1, 2.5] + [0.1] * 99998, "alarm"),
        ([0.1, -0.2], "watch"),  # over two bits unused
        ([0.5, np.nan], "alarm"),
        ([0.5, np.inf], "alarm"),
        ([np.nan, np.nan], "alarm"),
    ],
)
def test_levels_of_drift(values, level):
    init, update = quality.activation_statistics({"x": 1.0})
    report = quality.drift(update(init(), {"x": jnp.array(values, jnp.float32)}), {"x": 1.0})
    assert report.level == level, report
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_the_worst_comes_first_and_dead_channels_do_not_alarm():
    ranges = {"fine": 1.0, "dead": np.zeros(3), "bad": (0.0, 1.0), "half": np.array([0.0, 1.0])}
    init, update = quality.activation_statistics(ranges)
    live = {
        "fine": jnp.ones(4),
        "dead": jnp.zeros((2, 3), jnp.bfloat16),
        "bad": jnp.array([-0.5, 1.0]),
        "half": jnp.array([[0.0, 0.9]]),
    }
    report = quality.drift(update(init(), live), ranges)
    levels = {a.name: (a.level, a.ratio) for a in report.activations}
    assert report.activations[0].name == "bad"
    assert levels["bad"] == ("alarm", np.inf)  # negative, where nothing negative was calibrated
    assert levels["dead"] == ("ok", 1.0)
    assert levels["half"] == ("ok", pytest.approx(0.9))
    assert quality.drift(update(init(), live), ranges, quality.Alarm(3, 4, 1, 1)).level == "alarm"


def test_misuse_of_drift():
    init, update = quality.activation_statistics({"x": 1.0})
    for ranges, message in (
        ({}, "empty"),
        ({"x": -1.0}, "holds zero"),
        ({"x": (1.0, 2.0)}, "holds zero"),
        ({"x": np.nan}, "finite"),
        ({"x": (1.0,)}, r"magnitude or \(low, high\)"),
        ({"x": "wide"}, r"magnitude or \(low, high\); got 'wide'"),
        (3, "ranges are by name; got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            quality.activation_statistics(ranges)
    with pytest.raises(ValueError, match=r"\['x'\]; got \['y'\]"):
        update(init(), {"y": jnp.ones(3)})
    with pytest.raises(ValueError, match="nothing was seen of 'x'"):
        quality.drift(init(), {"x": 1.0})
    with pytest.raises(ValueError, match="what was calibrated"):
        quality.drift(init(), {"y": 1.0})
    wide = quality.activation_statistics({"x": np.ones(4)})
    with pytest.raises(ValueError, match=r"\(4,\), which does not broadcast with \(2, 3\)"):
        wide[1](wide[0](), {"x": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match="statistics are those of activation_statistics; got 3"):
        quality.drift(3, {"x": 1.0})
    with pytest.raises(ValueError, match="of 'x' are ActivationStatistics; got 3"):
        quality.drift({"x": 3}, {"x": 1.0})
    with pytest.raises(ValueError, match="alarm is an Alarm; got 3"):
        quality.drift(init(), {"x": 1.0}, alarm=3)
    with pytest.raises(ValueError, match="watch_ratio is a number; got 'high'"):
        quality.Alarm(watch_ratio="high")
    with pytest.raises(ValueError, match="ratios rise"):
        quality.Alarm(watch_ratio=3, alarm_ratio=2)
    with pytest.raises(ValueError, match="saturations are shares"):
        quality.Alarm(watch_saturation=0.5, alarm_saturation=0.1)

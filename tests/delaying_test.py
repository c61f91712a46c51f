"""Delayed scaling in whole models: ranges that ride with a function's parameters or an NNX model's."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

import jaxquant as jq
from experiments.harness.models import lm
from experiments.harness.training import delaying, train
from experiments.train import program, running
from jaxquant.nnx import read
from jaxquant.numerics.delayed import delayed_absmax
from jaxquant.operations import training
from jaxquant.operations.delaying import Scales, next_scales

SHAPE = (96, 64, 128)  # rows, terms, columns: each operand has more than 4,096 numbers
RULES = {".*": "fp8_delayed_train"}
TOP = {"e4m3fn": 448.0, "e5m2": 57344.0}


class TransformerEngine:
    """One tensor's delayed scaling by TransformerEngine's published definition, in NumPy.

    Its first place of the history is filled during a step; at the step's end the scale is of the largest of
    all places, the history moves by one place, and the first is zero again.  Of an amax that is zero or not
    finite the scale stays.
    """

    def __init__(self, kind: str, history: int, margin: int, by: str):
        self.dtype, self.top = getattr(ml_dtypes, f"float8_{kind}"), np.float32(TOP[kind])
        self.history, self.scale = np.zeros(history, np.float32), np.float32(1)
        self.margin, self.by = margin, by

    def cast(self, x: np.ndarray) -> np.ndarray:
        """The values of what is stored, by the scale of the steps before."""
        self.history[0] = np.maximum(self.history[0], np.abs(x).max())  # NumPy's keeps NaN
        scaled = np.clip(x * self.scale, -self.top, self.top)
        return scaled.astype(self.dtype).astype(np.float32) / self.scale

    def end_of_step(self) -> None:
        amax = self.history.max() if self.by == "max" else self.history[0]
        self.history = np.roll(self.history, -1)
        self.history[0] = 0
        if np.isfinite(amax) and amax > 0:
            self.scale = self.top / amax / np.float32(2) ** self.margin


def product(w, x, cotangent):
    return jnp.sum((x @ w["up"]) * cotangent)


def operands(step: int) -> tuple[np.ndarray, ...]:
    """Powers of two make a scale's own rounding the same for a product and a division."""
    rng = np.random.default_rng(step)
    m, k, n = SHAPE
    found = [rng.normal(size=s).astype(np.float32) for s in ((m, k), (k, n), (m, n))]
    for x, top in zip(found, 2.0 ** rng.integers(-6, 7, size=3), strict=True):
        x *= np.float32(top) / np.abs(x).max()
    return tuple(found)


@pytest.mark.parametrize(
    ("history", "margin", "by"),
    [(4, 0, "max"), (4, 2, "max"), (3, 1, "most_recent"), (1, 0, "max")],
)
def test_steps_are_transformer_engines(history, margin, by):
    rules = {"up": training.fp8_delayed(history, margin, by)}
    init, update, _ = jq.functions.delayed(product, rules)
    theirs = [TransformerEngine(kind, history, margin, by) for kind in ("e4m3fn", "e4m3fn", "e5m2")]
    step = jax.jit(update)
    x, w, g = operands(0)
    scales = init({"up": w}, x, g)
    for t in range(12):
        x, w, g = operands(t)
        if t in (4, 5):
            x[5, 7] = {4: np.nan, 5: np.inf}[t]
        value, gradient, scales = step(scales, {"up": w}, x, g)
        left, right, back = (own.cast(v) for own, v in zip(theirs, (x, w, g), strict=True))
        if t in (4, 5):
            assert np.isnan(value)
        else:
            left, right, back = (v.astype(np.float64) for v in (left, right, back))
            near = 1e-6 * np.abs(left).T @ np.abs(back)  # of float32's sums
            assert np.all(np.abs(gradient["up"] - left.T @ back) <= near)
            near = 1e-6 * np.sum((np.abs(left) @ np.abs(right)) * np.abs(g))
            assert abs(value - np.sum((left @ right) * g)) <= near
        for own in theirs:
            own.end_of_step()
        ranges = scales["up"].ranges
        for ours, own in zip(ranges, (*theirs, theirs[2]), strict=True):
            np.testing.assert_allclose(own.top / np.asarray(ours.value), own.scale, rtol=1e-7)
            expected = np.roll(own.history, -1)[:-1]  # the place that is to be filled is not kept
            kept = np.where(np.isnan(expected), np.inf, expected)
            np.testing.assert_array_equal(np.asarray(ours.history)[1:], kept)
    assert step._cache_size() == 1


def test_after_a_step_without_numbers_the_range_is_kept_for_as_long_as_it_is_in_the_history():
    init, update, _ = jq.functions.delayed(product, {"up": training.fp8_delayed(3)})
    x, w, g = operands(1)
    scales = init({"up": w}, x, g)
    _, _, scales = update(scales, {"up": w}, x, g)
    before = float(scales["up"].ranges.lhs.value)
    spoiled = x.copy()
    spoiled[-1, -1] = np.nan
    _, _, scales = update(scales, {"up": w}, spoiled, g)
    for later in range(3):
        _, _, scales = update(scales, {"up": w}, 8 * x, g)
        held = float(scales["up"].ranges.lhs.value)
        assert held == (before if later < 2 else 8 * before)


def test_gradients_are_those_of_the_products_own_ranges():
    """By the ranges that absmax finds, the step is `fp8_train`'s to the bit."""
    x, w, g = operands(2)
    init, update, evaluate = jq.functions.delayed(product, {"up": training.fp8_delayed(1)})
    scales = init({"up": w}, x, g)
    _, _, scales = update(scales, {"up": w}, x, g)
    plain = jq.functions.quantize(product, {"up": "fp8_train"})
    value, gradient, _ = update(scales, {"up": w}, x, g)
    expected, wanted = jax.value_and_grad(plain)({"up": w}, x, g)
    assert value == expected == evaluate(scales, {"up": w}, x, g)
    np.testing.assert_array_equal(gradient["up"], wanted["up"])


def layers(w, x):
    return (jax.lax.scan(lambda h, own: (jnp.tanh(h @ own), None), x, w["l"])[0] ** 2).mean()


def test_each_turn_of_a_scan_and_each_matrix_has_its_own_ranges():
    rng = np.random.default_rng(0)
    w = {"l": jnp.array(rng.normal(size=(3, 64, 64)) * [[[1]], [[2]], [[4]]], jnp.float32)}
    x = jnp.array(rng.normal(size=(64, 64)), jnp.float32)
    init, update, _ = jq.functions.delayed(layers, RULES)
    _, _, scales = jax.jit(update)(init(w, x), w, x)
    largest = jnp.abs(w["l"]).max((1, 2))
    np.testing.assert_array_equal(scales["l"].ranges.rhs.value, largest)

    each = lambda w, x: (jnp.einsum("lbi,lij->lbj", x, w["l"]) ** 2).mean()  # noqa: E731
    init, update, _ = jq.functions.delayed(each, RULES)
    x = jnp.stack([x, 3 * x, x])
    _, _, scales = jax.jit(update)(init(w, x), w, x)
    np.testing.assert_array_equal(scales["l"].ranges.rhs.value, largest)
    np.testing.assert_array_equal(scales["l"].ranges.lhs.value, jnp.abs(x).max((1, 2)))


def test_a_product_that_ran_twice_in_a_step_is_nan_and_one_that_did_not_keeps_its_ranges():
    x, w, g = operands(3)
    w = {"up": w}

    def twice(scales, w):
        one = lambda part: update_value(scales, w, part)  # noqa: E731
        return one(x) + one(2 * x)

    init, _, update_value = jq.functions.delayed(lambda w, x: product(w, x, g), RULES)
    scales = init(w, x)
    seen = jax.grad(twice)(scales, w)
    assert float(seen["up"].uses) == 2
    after = next_scales(scales, seen)["up"]
    assert all(np.isnan(own.value) for own in after.ranges)

    def either(scales, w, is_taken):
        one = lambda: update_value(scales, w, x)  # noqa: E731
        return jax.lax.cond(is_taken, one, lambda: jnp.float32(0))

    seen = jax.grad(either)(scales, w, False)
    after = next_scales(scales, seen)
    jax.tree.map(np.testing.assert_array_equal, after, scales)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda w, x: jax.lax.conv(x[None, None], w["l"][None, None], (1, 1), "SAME").sum(),
            "matrix products, and this is a conv",
        ),
        (lambda w, x: ((x @ w["l"]) @ w["l"]).sum(), "l is multiplied several times"),
        (
            lambda w, x: jax.lax.scan(lambda h, _: (h @ w["l"], None), x, length=2)[0].sum(),
            "a scan that has the same weight in each turn",
        ),
    ],
)
def test_products_that_cannot_have_delayed_ranges_are_named(function, message):
    init, _, _ = jq.functions.delayed(function, {"l": "fp8_delayed_train"})
    with pytest.raises(ValueError, match=message):
        init({"l": jnp.eye(64)}, jnp.ones((4, 64)))


def test_what_has_no_state_says_where_to_get_it():
    with pytest.raises(ValueError, match=r"jaxquant.nnx.quantize.*jaxquant.functions.delayed"):
        jq.functions.quantize(product, RULES)({"up": jnp.eye(4)}, jnp.eye(4), jnp.eye(4))
    with pytest.raises(ValueError, match="no product has delayed ranges"):
        jq.functions.delayed(product, {".*": "w8a8"}).init({"up": jnp.eye(4)}, *[jnp.eye(4)] * 2)
    linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    model = jq.nnx.quantize(linear, {".*": "w8a8"})
    with pytest.raises(ValueError, match="this Linear has none"):
        jq.nnx.value_and_grad(lambda m, x: m(x).sum())(model, jnp.eye(4))
    quantizer = jq.Quantizer(jq.E4M3, "channel", calibration=delayed_absmax())
    scheme = jq.DotGeneral(jq.Operands(quantizer, quantizer))
    with pytest.raises(ValueError, match="one range for a tensor"):
        jq.nnx.quantize(linear, {".*": scheme})


# ---------------------------------------------------------------------------------------------------
# NNX


def model_of(scan: bool = False) -> nnx.Module:
    return lm.LM(lm.sized("10k", vocab_size=64, scan=scan), nnx.Rngs(0))


def loss_of(model, tokens):
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def tokens_of(step: int) -> jax.Array:
    return jax.random.randint(jax.random.key(step), (4, 33), 0, 64)


def make_step():
    traces = []

    def loss(model, tokens):
        traces.append(1)
        return loss_of(model, tokens)

    gradient_of = jq.nnx.value_and_grad(loss)

    @nnx.jit
    def step(model, optimizer, tokens):
        value, gradient = gradient_of(model, tokens)
        optimizer.update(model, gradient)
        return value

    return step, traces


@pytest.mark.usefixtures("library_promotion")
@pytest.mark.parametrize("scan", [False, True])
def test_a_model_trains_traced_once_and_resumes_with_the_same_bits(scan):
    def fresh():
        model = jq.nnx.quantize(model_of(scan), {"blocks/.*": training.fp8_delayed(4)})
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    step, traces = make_step()
    model, optimizer = fresh()
    losses = [float(step(model, optimizer, tokens_of(t))) for t in range(3)]
    saved = jax.tree.map(np.asarray, (nnx.state(model), nnx.state(optimizer)))
    losses += [float(step(model, optimizer, tokens_of(t))) for t in range(3, 6)]
    assert len(traces) == 1
    other, its_optimizer = fresh()
    nnx.update(other, saved[0])
    nnx.update(its_optimizer, saved[1])
    again = [float(step(other, its_optimizer, tokens_of(t))) for t in range(3, 6)]
    assert again == losses[3:]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(other), nnx.state(model))
    # What a step leaves is of that step: the weight's range is what the weight was when it was multiplied.
    block = model.blocks if scan else model.blocks[0]
    history = np.asarray(read(block.mlp.up.kernel_delayed).ranges.rhs.history)
    assert np.all(np.diff(history, axis=-1) != 0)
    assert np.all(history > 0)


def test_evaluation_and_a_frozen_model_have_the_ranges_and_change_nothing():
    model = jq.nnx.quantize(model_of(), {"blocks/.*": "fp8_delayed_train"})
    gradient_of = jq.nnx.value_and_grad(loss_of)
    for t in range(2):
        gradient_of(model, tokens_of(t))
    before = jax.tree.map(np.asarray, nnx.state(model, jq.nnx.DelayedScales))
    logits = model(tokens_of(5))
    found = jq.nnx.monitor(loss_of)(model, tokens_of(5))
    assert all(np.isfinite(four.dlhs.sqnr) for four in found.values())
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, jq.nnx.DelayedScales))
    frozen = jq.nnx.freeze(model, tokens_of(5))
    np.testing.assert_array_equal(frozen(tokens_of(5)), logits)
    with pytest.raises(ValueError, match="checkpoint nnx"):
        jq.nnx.save("nowhere", frozen)


def test_a_recipe_without_delayed_ranges_drops_them():
    model = jq.nnx.quantize(model_of(), {"blocks/.*": "fp8_delayed_train"})
    assert nnx.state(model, jq.nnx.DelayedScales)
    assert not nnx.state(jq.nnx.quantize(model, {"blocks/.*": "fp8_train"}), jq.nnx.DelayedScales)


# ---------------------------------------------------------------------------------------------------
# In a trainer of arrays


@pytest.mark.usefixtures("library_promotion")
def test_an_optimizer_passes_over_ranges():
    model = jq.nnx.quantize(model_of(), {"blocks/.*": "fp8_delayed_train"})
    graphdef, params = nnx.split(model)
    tx = delaying.weights_alone(train.adamw())
    apply = delaying.carrying_scales(train.to_nearest)
    state = tx.init(params)
    is_scales = lambda x: isinstance(x, Scales)  # noqa: E731
    assert not any(map(is_scales, jax.tree.leaves(state, is_leaf=is_scales)))
    gradient = jax.grad(lambda p: loss_of(nnx.merge(graphdef, p), tokens_of(0)))(params)
    updates, _ = tx.update(gradient, state, params, learning_rate=1e-3)
    new = apply(params, updates, 0)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    jq.nnx.value_and_grad(loss_of)(model, tokens_of(0))
    wanted = nnx.state(model, jq.nnx.DelayedScales)
    (found,) = (x for x in [nnx.split_state(new, jq.nnx.DelayedScales, ...)[0]])
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    plain = train.adamw().update(
        delaying._weights(gradient), state, delaying._weights(params), learning_rate=1e-3
    )[0]
    expected = optax.apply_updates(delaying._weights(params), plain)
    jax.tree.map(np.testing.assert_array_equal, delaying._weights(new), expected)


def test_scales_are_values_of_their_recipe():
    scales = jq.functions.delayed(product, RULES).init({"up": jnp.eye(4)}, *[jnp.eye(4)] * 2)["up"]
    assert [float(own.value) for own in scales.ranges] == [448.0, 448.0, 57344.0, 57344.0]
    assert dataclasses.asdict(scales.by.lhs) == {"history": 1024, "margin": 0, "by": "max"}


@pytest.mark.usefixtures("library_promotion")
def test_a_training_run_resumes_with_the_same_bits(tmp_path):
    config = program.Config(
        **{"size": "10k", "recipe": "fp8_delayed_train", "steps": 6, "sequence": 32, "batch": 4},
        **{"evaluation_windows": 4, "log_every": 2, "checkpoint_every": 2},
    )
    whole = running.run(config, tmp_path)
    metrics = (tmp_path / "metrics.json").read_text()
    newest = max((tmp_path / "checkpoints").iterdir(), key=lambda p: p.name)
    assert newest.name == "6"
    shutil.rmtree(newest)
    (tmp_path / "metrics.json").unlink()
    assert running.run(config, tmp_path) == whole
    assert (tmp_path / "metrics.json").read_text() == metrics

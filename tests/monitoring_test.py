"""The monitor: what it says of operands and gradients against NumPy, and that nothing else changes."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from experiments.harness.models import lm
from jaxquant.numerics.measuring import Quantized, measure

BLOCK = {"mxfp8_train": 32, "mxfp4": 32, "nvfp4": 16}


def seen(x, quantizer, axes=(1,), key=None):
    """Statistics of one tensor, compiled."""
    run = jax.jit(lambda x: jq.monitoring.of_sums(measure(Quantized(x, quantizer, axes, key))))
    return jax.tree.map(np.asarray, run(jnp.asarray(x)))


def db(x, values) -> float:
    """SQNR by NumPy in float64."""
    x, values = np.asarray(x, np.float64), np.asarray(values, np.float64)
    noise = np.sum((x - values) ** 2)
    return math.inf if noise == 0 else 10 * np.log10(np.sum(x**2) / noise)


def normals(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape, np.float32)


# ---- one tensor


def test_int8_by_hand():
    x = normals(64, 256)
    x[3, :7] = 0
    scale = np.abs(x).max(1, keepdims=True) / 127
    codes = np.round(x / scale)
    found = seen(x, jq.Quantizer(jq.INT8, "channel"))
    assert found.sqnr == pytest.approx(db(x, codes * scale), abs=0.01)
    assert found.saturated == 0
    assert found.underflow == pytest.approx(np.sum((codes == 0) & (x != 0)) / np.sum(x != 0))
    assert found.nonfinite == 0
    assert found.amax == np.abs(x).max()
    expected = np.bincount(np.floor(np.log2(np.abs(x[x != 0]))).astype(int) + 44, minlength=64)
    np.testing.assert_array_equal(found.histogram, expected)


def test_a_known_share_saturates():
    x = normals(128, 64)
    given = jq.calibration.Range(jnp.float32(1.0))
    found = seen(x, jq.Quantizer(jq.INT8, "tensor", given), (0, 1))
    assert found.saturated == pytest.approx(np.mean(np.abs(x) > 1.0))
    assert 0.3 < found.saturated < 0.33  # of normals, beyond one standard deviation
    values = np.clip(np.round(x * 127), -127, 127) / 127
    assert found.sqnr == pytest.approx(db(x, values), abs=0.01)
    assert seen(x, jq.Quantizer(jq.INT8)).saturated == 0  # absmax clips nothing


@pytest.mark.parametrize(
    ("format", "dtype"), [(jq.E4M3, ml_dtypes.float8_e4m3fn), (jq.E5M2, ml_dtypes.float8_e5m2)]
)
def test_fp8_underflows_as_a_cast_does(format, dtype):
    x = normals(64, 128) * 10.0 ** np.random.default_rng(1).uniform(-12, 0, (64, 128))
    x = x.astype(np.float32)
    scale = np.float32(np.abs(x).max() / float(ml_dtypes.finfo(dtype).max))
    values = (x / scale).astype(dtype).astype(np.float32)
    found = seen(x, jq.Quantizer(format))
    assert found.underflow == pytest.approx(np.mean(values == 0), abs=2e-4)  # but for ties
    assert found.underflow > 0.2
    assert found.sqnr == pytest.approx(db(x, values * scale), abs=0.01)
    assert found.saturated == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(1, 4096), (64, 128)])
def test_what_is_not_finite_is_counted(bad, shape):
    x = normals(*shape)
    x[0, :3] = bad
    found = seen(x, jq.Quantizer(jq.INT8, "channel"))
    assert found.nonfinite == pytest.approx(3 / x.size)
    assert np.isnan(found.sqnr)  # its whole group is lost
    assert found.amax == np.abs(x[np.isfinite(x)]).max()
    assert found.histogram.sum() == x.size - 3
    in_float = seen(x, None)
    assert in_float.nonfinite == found.nonfinite
    assert in_float.amax == found.amax


def test_what_stays_in_float_has_no_noise():
    x = normals(64, 64)
    found = seen(x, None)
    assert all(np.isnan(v) for v in (found.sqnr, found.saturated, found.underflow))
    assert found.amax == np.abs(x).max()
    assert found.histogram.sum() == 4096


def test_zeros_and_exact_tensors():
    zeros = seen(np.zeros((64, 64), np.float32), jq.Quantizer(jq.INT8))
    assert np.isnan(zeros.sqnr)
    assert (zeros.saturated, zeros.underflow, zeros.amax) == (0, 0, 0)
    whole = np.round(normals(64, 64, scale=50)).clip(-127, 127)
    whole[0, 0] = 127
    found = seen(whole, jq.Quantizer(jq.INT8))
    assert found.sqnr > 130  # the scale is one, to float32's rounding
    assert found.underflow == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_beyond_float32_are_no_trouble(scale):
    x = normals(64, 64)
    quantizer = jq.Quantizer(jq.INT8, "channel")
    found = seen(x * np.float32(scale), quantizer)
    assert found.sqnr == pytest.approx(seen(x, quantizer).sqnr, abs=0.02)


@pytest.mark.first(2)
@pytest.mark.parametrize(
    "quantizer",
    [
        jq.Quantizer(jq.MXFP8),
        jq.Quantizer(jq.MXFP4),
        jq.Quantizer(jq.NVFP4),
        jq.Quantizer(jq.NF4, 64),
        jq.Quantizer(jq.Int(4), "channel", jq.calibration.minmax),
        jq.Quantizer(jq.Int(3), 32, jq.calibration.percentile(99.0)),
        jq.Quantizer(jq.Int(4, "midrise"), "channel", jq.calibration.gaussian, hadamard=32),
        jq.recipe("int8_train").dlhs.lhs,
    ],
)
def test_noise_is_that_of_fake_quant(quantizer):
    x = normals(64, 128)
    key = jq.rounding.key_of
    found = seen(x, quantizer, (1,), key)
    values = jax.jit(lambda x: jq.fake_quant(x, quantizer, (1,), key))(x)
    assert found.sqnr == pytest.approx(db(x, values), abs=0.02)


@pytest.mark.long
def test_a_traced_precision_is_measured():
    x = normals(64, 128)
    at = jax.jit(lambda b: measure(Quantized(x, jq.Quantizer(jq.Int(b), "channel"), (1,))).noise)
    noise = [float(at(b)) for b in (4, 8)]
    static = [
        float(measure(Quantized(x, jq.Quantizer(jq.Int(b), "channel"), (1,))).noise) for b in (4, 8)
    ]
    np.testing.assert_allclose(noise, static, rtol=1e-5)
    assert noise[0] > 100 * noise[1]


# ---- a function's products


def network(w, x):
    return ((jax.nn.gelu(x @ w["up"]) @ w["down"]) ** 2).mean()


def weights(seed=0):
    return {"up": normals(64, 128, seed=seed) / 8, "down": normals(128, 64, seed=seed + 1) / 11}


def by_hand(w, x, recipe):
    """Operands and incoming gradients of both products, by jax.vjp around each."""
    dot = jq.recipe(recipe)
    dims = (((1,), (0,)), ((), ()))
    taps = {name: jnp.zeros((x.shape[0], w[name].shape[1])) for name in w}

    def loss(taps):
        up = dot(x, w["up"], dims) + taps["up"]
        hidden = jax.nn.gelu(up)
        out = dot(hidden, w["down"], dims) + taps["down"]
        return (out**2).mean(), hidden

    gradients, hidden = jax.grad(loss, has_aux=True)(taps)
    return {"up": (x, w["up"], gradients["up"]), "down": (hidden, w["down"], gradients["down"])}


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["int8_train", "fp8_train", "mxfp8_train", "w8a8", "w4a16g32"])
def test_operands_and_gradients_by_hand(recipe):
    w, x = weights(), normals(64, 64, seed=5)
    monitor = jq.functions.monitor(network, {".*": recipe})
    found = jax.device_get(jax.jit(monitor)(w, x))
    dot = jq.recipe(recipe)
    for name, (left, right, gradient) in jax.jit(functools.partial(by_hand, recipe=recipe))(
        w, x
    ).items():
        own = found[name]
        agree(own.lhs, left, dot.forward.lhs, (1,))
        agree(own.rhs, right, dot.forward.rhs, (0,))
        carried = [gradient, gradient]
        if recipe in (
            "int8_train",
            "fp8_train",
        ):  # scales of what is multiplied again are the gradient's
            other = (
                jq.quantize(right, dot.forward.rhs, 0).scale,
                jq.quantize(left, dot.forward.lhs, 1).scale,
            )
            carried = [gradient * s if s.size > 1 else gradient for s in other]
        pairs = ((own.dlhs, dot.dlhs, 1, 0), (own.drhs, dot.drhs, 0, 1))
        for (statistics, operands, axis, seed), x_ in zip(pairs, carried, strict=True):
            quantizer = None if operands is None else operands.lhs
            agree(statistics, x_, quantizer, (axis,), seed)


def agree(statistics, x, quantizer, axes, seed=0):
    """Statistics against those of the tensor itself by NumPy."""
    key = functools.partial(jq.rounding.key_of, seed=seed)
    x = np.asarray(x)
    assert statistics.amax == pytest.approx(np.abs(x).max(), rel=1e-5)
    assert statistics.histogram.sum() == np.sum(x != 0)
    if quantizer is None:
        assert np.isnan(statistics.sqnr)
        return
    values = np.asarray(jax.jit(lambda x: jq.fake_quant(x, quantizer, axes, key))(x))
    is_stochastic = quantizer.rounding is jq.rounding.stochastic  # an ulp in the scales draws anew
    assert statistics.sqnr == pytest.approx(db(x, values), abs=0.3 if is_stochastic else 0.02)
    lost = np.sum((values == 0) & (x != 0)) / np.sum(x != 0)
    assert statistics.underflow == pytest.approx(lost, abs=0.01 if is_stochastic else 1e-3)


def test_a_gradient_with_a_nan_is_seen():
    w, x = weights(), normals(64, 64)

    def loss(w, x):
        out = x @ w["up"]
        return jnp.where(
            jnp.arange(out.size).reshape(out.shape) == 0, jnp.sqrt(-jnp.abs(out)), out
        ).sum()

    found = jax.jit(jq.functions.monitor(loss, {"up": "int8_train"}))(w, x)["up"]
    assert float(found.lhs.nonfinite) == 0
    assert float(found.dlhs.nonfinite) > 0
    assert np.isnan(found.dlhs.sqnr)


@pytest.mark.long
def test_the_monitored_function_takes_vmap_scan_and_cond():
    w, xs = weights(), normals(3, 64, 64)
    monitor = jq.functions.monitor(network, {".*": "int8_train"})
    each = [jax.jit(monitor)(w, x) for x in xs]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *each)
    mapped = jax.jit(jax.vmap(monitor, in_axes=(None, 0)))(w, xs)
    _, scanned = jax.lax.scan(lambda c, x: (c, monitor(w, x)), 0, xs)
    close = functools.partial(chex.assert_trees_all_close, rtol=2e-3, atol=2e-2)
    strip = lambda tree: jax.tree.map(lambda s: s._replace(histogram=0.0), tree, is_leaf=is_one)  # noqa: E731
    close(strip(mapped), strip(stacked))
    close(strip(scanned), strip(stacked))
    taken = jax.jit(
        lambda p: jax.lax.cond(
            p, monitor, lambda w, x: jax.tree.map(jnp.zeros_like, each[0]), w, xs[0]
        )
    )
    close(strip(taken(True)), strip(each[0]))


def is_one(x):
    return isinstance(x, jq.monitoring.Statistics)


def deep(w, x, wrap=lambda f: f):
    """Layers under a scan, and the same in a Python loop."""
    layer = wrap(lambda x, w: (jax.nn.gelu(x @ w["up"]) @ w["down"], None))
    return jax.lax.scan(layer, x, w)[0].var()


def unrolled(w, x):
    for i in range(3):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], w)
        x = jax.nn.gelu(x @ own["up"]) @ own["down"]
    return x.var()


@pytest.mark.long
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_layers_under_scan_have_statistics_of_their_own(wrap):
    w = jax.tree.map(lambda *a: np.stack(a), *[weights(seed) for seed in (0, 10, 20)])
    w["up"] *= np.float32([1, 2, 4])[:, None, None]
    x = normals(64, 64)
    rules = {".*": "fp8_train"}
    found = jax.jit(jq.functions.monitor(functools.partial(deep, wrap=wrap), rules))(w, x)
    flat = jax.jit(jq.functions.monitor(unrolled, rules))(w, x)
    for name in ("up", "down"):
        for i, own in enumerate((name, f"{name}#2", f"{name}#3")):
            one = jax.tree.map(lambda a, i=i: a[i], found[name])
            assert found[name].lhs.sqnr.shape == (3,)
            for a, b in zip(one, flat[own], strict=True):
                for field in ("sqnr", "saturated", "underflow", "amax"):
                    assert getattr(a, field) == pytest.approx(
                        float(getattr(b, field)), rel=1e-2, abs=1e-3
                    )


def test_a_branch_that_is_not_taken_has_nothing():
    def loss(w, x, p):
        out = jax.lax.cond(p, lambda x: x @ w["up"], lambda x: x @ w["down"].T, x)
        return (out**2).mean()

    monitor = jax.jit(jq.functions.monitor(loss, {".*": "w8a8"}))
    found = monitor(weights(), normals(64, 64), True)
    assert float(found["up"].lhs.sqnr) > 20
    assert all(np.isnan(x) for x in found["down"].lhs[:-1])
    assert float(found["down"].lhs.histogram.sum()) == 0
    assert {row["product"] for row in jq.monitoring.rows(found)} == {"up"}


@pytest.mark.long
def test_convolutions_ragged_products_lookups_and_experts():
    w = {
        "table": normals(32, 64),
        "conv": normals(3, 64, 16, seed=1),
        "experts": normals(4, 16, 32, seed=2),
        "ragged": normals(4, 32, 8, seed=3),
    }

    def loss(w, ids):
        x = w["table"][ids]
        x = jax.lax.conv_general_dilated(
            x, w["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        x = (
            jnp.einsum("bwc,ecd->ebwd", x, w["experts"])
            .reshape(4, -1, 32)
            .transpose(1, 0, 2)
            .reshape(-1, 32)
        )
        sizes = jnp.full(4, x.shape[0] // 4, jnp.int32)
        return (jax.lax.ragged_dot(x, w["ragged"], sizes) ** 2).mean()

    ids = np.random.default_rng(0).integers(0, 32, (4, 64))
    found = jax.jit(jq.functions.monitor(loss, {".*": "int8_train"}))(w, ids)
    assert set(found) == set(w)
    for name, four in found.items():
        assert four.rhs.amax == np.abs(w[name]).max(), name
        for role in ("lhs", "rhs", "dlhs", "drhs")[3 if name == "table" else 0 :]:
            own = getattr(four, role)
            assert own.amax.shape == ()
            assert name == "table" or 25 < own.sqnr < 60, (name, role)
            assert float(own.amax) > 0
    assert np.isnan(found["table"].lhs.amax)  # rows' numbers
    assert np.isnan(found["table"].drhs.sqnr)  # in float


def test_attention_and_its_cache():
    w = {
        "q": normals(64, 64) / 8,
        "k": normals(64, 64, seed=1) / 8,
        "v": normals(64, 64, seed=2) / 8,
    }

    def loss(w, x):
        q, k, v = ((x @ w[name]).reshape(2, 32, 4, 16) for name in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).var()

    found = jq.functions.monitor(loss, {"[qkv]": None, "": "a8kv4"})(w, normals(2, 32, 64))
    assert set(found) == {"activations:qk", "activations:pv"}
    for four in found.values():
        assert 30 < four.lhs.sqnr < 60
        assert 10 < four.rhs.sqnr < 30  # the cache's four bits
        assert np.isnan(four.dlhs.sqnr)
        assert four.dlhs.amax > 0


def test_statistics_do_not_change_the_gradients():
    """The derivative by the parameters beside the taps' is the same."""
    w, x = weights(), normals(64, 64)
    plain = jq.functions.quantize(network, {".*": "int8_train"})
    gradients = jax.jit(jax.grad(plain))(w, x)
    jax.jit(jq.functions.monitor(network, {".*": "int8_train"}))(w, x)
    chex.assert_trees_all_equal(gradients, jax.jit(jax.grad(plain))(w, x))


@pytest.mark.parametrize(
    ("loss", "rules", "words"),
    [
        (network, {".*": None}, "nothing to monitor"),
        (lambda w, x: x @ w["up"], {".*": "w8a8"}, r"a scalar .* got float32\[64, 128\]"),
        (lambda w, x: (network(w, x), 1), {".*": "w8a8"}, "got tuple"),
        (network, {"sideways": "w8a8"}, "sideways"),
        (network, {".*": "w4a16g7"}, "cannot take w4a16g7"),
    ],
)
def test_what_cannot_be_monitored_is_named(loss, rules, words):
    with pytest.raises(ValueError, match=words):
        jq.functions.monitor(loss, rules)(weights(), normals(64, 64))


def test_a_product_in_a_while_loop_is_warned_of():
    def loss(w, x):
        n = jax.lax.while_loop(lambda n: jnp.sum(x @ w["down"].T) * n < 1e3, lambda n: n + 100, 0.0)
        return (x @ w["up"]).var() + n

    with pytest.warns(UserWarning, match="down is within a while loop and not monitored"):
        found = jq.functions.monitor(loss, {".*": "w8a8"})(weights(), np.abs(normals(64, 64)))
    assert set(found) == {"up"}


# ---- NNX


def language_model(recipe="int8_train", **changes):
    config = lm.LMConfig(
        layers=2, width=32, heads=2, kv_heads=2, hidden=64, vocab_size=64, **changes
    )
    return jq.nnx.quantize(lm.LM(config, nnx.Rngs(0)), {"blocks/.*": recipe})


def tokens(seed=0):
    return np.random.default_rng(seed).integers(0, 64, (4, 33)).astype(np.int32)


def next_token(model, batch):
    logits = jax.nn.log_softmax(model(batch[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(logits, batch[:, 1:, None], axis=-1))


def test_a_models_gradients_are_those_of_vjp_by_hand():
    """The gradient that comes to a layer, by nnx.Perturbation's way: added zeros."""
    model = nnx.Linear(64, 128, use_bias=False, rngs=nnx.Rngs(0))
    quantized = jq.nnx.quantize(model, {".*": "fp8_train"})
    x = jnp.asarray(normals(64, 64))
    loss = lambda model, x: (jnp.tanh(model(x)) ** 2).mean()  # noqa: E731
    found = jax.device_get(nnx.jit(jq.nnx.monitor(loss))(quantized, x)["kernel"])
    out, vjp = jax.vjp(lambda y: (jnp.tanh(y) ** 2).mean(), quantized(x))
    del out
    (gradient,) = vjp(jnp.float32(1))
    dot = jq.recipe("fp8_train")
    agree(found.lhs, x, dot.forward.lhs, (1,))
    agree(found.rhs, model.kernel[...], dot.forward.rhs, (0,))
    agree(found.dlhs, gradient, dot.dlhs.lhs, (1,))
    agree(found.drhs, gradient, dot.drhs.lhs, (0,))


@pytest.mark.long
@pytest.mark.usefixtures("library_promotion")
@pytest.mark.parametrize(
    "options", [{}, {"remat": True}, {"scan": True}, {"scan": True, "remat": True}]
)
def test_every_layer_of_a_model(options):
    model = language_model(**options)
    found = nnx.jit(jq.nnx.monitor(next_token))(model, tokens())
    kinds = (
        "attention/query",
        "attention/key",
        "attention/value",
        "attention/out",
        "mlp/gate",
        "mlp/up",
        "mlp/down",
    )
    scanned = {f"blocks/{kind}/kernel" for kind in kinds}
    listed = {f"blocks/{i}/{kind}/kernel" for i in range(2) for kind in kinds}
    assert set(found) == (scanned if "scan" in options else listed)
    for name, four in found.items():
        for own in four:
            assert own.sqnr.shape == ((2,) if "scan" in options else ())
            assert np.all((own.sqnr > 20) & (own.sqnr < 60)), name
            assert np.all(own.saturated == 0)


@pytest.mark.long
@pytest.mark.usefixtures("library_promotion")
def test_a_scanned_model_and_a_listed_one_agree():
    listed, scanned = (
        language_model("fp8_train"),
        language_model("fp8_train", scan=True),
    )  # nothing is drawn
    state = nnx.to_pure_dict(nnx.state(listed, nnx.Param))
    stacked = dict(state) | {
        "blocks": jax.tree.map(lambda *a: jnp.stack(a), *state["blocks"].values())
    }
    whole = nnx.state(scanned, nnx.Param)
    nnx.replace_by_pure_dict(whole, stacked)
    nnx.update(scanned, whole)
    one = nnx.jit(jq.nnx.monitor(next_token))(listed, tokens())
    other = nnx.jit(jq.nnx.monitor(next_token))(scanned, tokens())
    for name, four in other.items():
        for i in range(2):
            for a, b in zip(four, one[name.replace("blocks", f"blocks/{i}")], strict=True):
                assert a.amax[i] == pytest.approx(float(b.amax), rel=1e-3)
                assert a.sqnr[i] == pytest.approx(float(b.sqnr), abs=0.5)


def test_a_monitored_model_does_not_change():
    class Noisy(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.linear = nnx.Linear(64, 64, rngs=rngs)
            self.norm = nnx.BatchNorm(64, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.linear(x)))

    model = jq.nnx.quantize(Noisy(), {".*": "w8a8"})
    before = jax.tree.map(jnp.copy, nnx.state(model))
    found = jq.nnx.monitor(lambda model, x: (model(x) ** 2).mean())(model, normals(64, 64))
    assert set(found) == {"linear/kernel"}
    chex.assert_trees_all_equal(before, nnx.state(model))


def test_a_frozen_base_with_adapters():
    base = jq.nnx.freeze(jq.nnx.quantize(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), {".*": "w4a8"}))
    adapted = jq.nnx.add_lora(base, rank=4, rngs=nnx.Rngs(1))
    found = jq.nnx.monitor(lambda model, x: (model(x) ** 2).mean())(adapted, normals(64, 64))[
        "kernel"
    ]
    assert found.lhs.sqnr > 30
    assert np.isnan(found.rhs.sqnr)  # what is stored has lost nothing more
    assert found.rhs.amax > 0
    assert found.dlhs.amax > 0
    assert np.isnan(found.drhs.amax)  # integers have no gradient


def test_parts_and_methods_and_repeated_calls():
    class Pair(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
            self.down = nnx.Linear(64, 64, rngs=nnx.Rngs(1))

        def encode(self, x):
            return self.up(x)

        def __call__(self, x):
            return self.down(self.encode(x))

    model = jq.nnx.quantize(Pair(), {".*": "w8a8"})
    x = normals(64, 64)
    once = jq.nnx.monitor(lambda m, x: (m.encode(x) ** 2).mean())(model, x)
    assert set(once) == {"up/kernel"}
    twice = jq.nnx.monitor(lambda m, x: (m(x) ** 2).mean() + (m.encode(x) ** 2).mean())(model, x)
    assert twice["up/kernel"].lhs.sqnr == pytest.approx(float(once["up/kernel"].lhs.sqnr), abs=1e-3)
    assert np.isnan(twice["up/kernel"].lhs.amax)  # of two calls, sums do not tell it
    assert twice["down/kernel"].lhs.amax > 0
    assert twice["up/kernel"].lhs.histogram.sum() == 2 * 4096


def test_only_a_quantized_model_is_monitored():
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    loss = lambda model, x: model(x).sum()  # noqa: E731
    with pytest.raises(ValueError, match="a quantized model is wanted; got Linear"):
        jq.nnx.monitor(loss)(model, normals(64, 64))
    with pytest.raises(ValueError, match="nothing to monitor"):
        jq.nnx.monitor(loss)(jq.nnx.quantize(model, {".*": None}), normals(64, 64))
    with pytest.raises(ValueError, match="a scalar"):
        jq.nnx.monitor(lambda m, x: m(x))(jq.nnx.quantize(model, {".*": "w8a8"}), normals(64, 64))
    with pytest.raises(ValueError, match="a loss of a model is wanted; got str"):
        jq.nnx.monitor("loss")  # pyright: ignore


# ---- history and rows


def test_largest_values_against_their_history():
    w, xs = weights(), normals(6, 64, 64) * np.float32([1, 3, 2, 5, 4, 1])[:, None, None]
    monitor = jax.jit(jq.functions.monitor(network, {".*": "w8a8"}))
    init, update = jq.monitoring.history(3)
    state = init(monitor(w, xs[0]))
    ratios = []
    for x in xs:
        state, found = jax.jit(update)(state, monitor(w, x))
        ratios.append(found["up"].lhs)
    amax = np.abs(xs).max((1, 2))
    assert np.isnan(ratios[0].of_largest)
    for i in range(1, 6):
        before = amax[max(0, i - 3) : i]
        assert ratios[i].of_largest == pytest.approx(amax[i] / before.max())
        assert ratios[i].of_median == pytest.approx(amax[i] / np.median(before))
    for bad in (0, -1, True, 2.0):
        with pytest.raises(
            ValueError, match="length of a history must be an integer of at least 1"
        ):
            jq.monitoring.history(bad)


def test_rows_are_json():
    import json

    w = jax.tree.map(lambda *a: np.stack(a), *[weights(seed) for seed in (0, 10, 20)])
    found = jq.functions.monitor(deep, {"up": "w8a16", "down": "w8a8"})(w, normals(64, 64))
    rows = json.loads(json.dumps(jq.monitoring.rows(found), allow_nan=False))
    assert len(rows) == 2 * 3 * 4
    first = next(r for r in rows if (r["product"], r["turn"], r["role"]) == ("up", [1], "lhs"))
    assert first["sqnr"] is None
    assert not first["exact"]
    assert first["amax"] == float(found["up"].lhs.amax[1])
    assert sum(count for _, count in first["histogram"]) == 4096

"""A NaN or an Inf shows: in every range, at sizes where compilers change kernels, and in a step's loss."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant import calibration
from jaxquant.formats import Block, Float
from jaxquant.laws.law import x64
from jaxquant.numerics import reductions
from jaxquant.operations.recipes import RECIPES
from jaxquant.optim import codecs
from jaxquant.ptq import smooth, statistics

# Sizes around 4096, from which on XLA's CPU backend has its reductions computed by a library.
SHAPES = [
    *((64, 63), (64, 64), (128, 128), (1, 4096), (4096, 1), (1, 4095), (1, 4097), (2, 4096)),
    (1024, 1024),
]
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# Processors make NaNs whose sign bit is set.
BAD = (np.nan, -np.float32(np.nan), np.inf, -np.inf)


def places(size: int) -> tuple[int, int, int]:
    return 0, size // 2, size - 1


def spoiled(x, place: int, bad) -> np.ndarray:
    x = np.array(x, np.float32)
    x.reshape(-1)[place] = bad
    return x


def bad_group(bad: np.ndarray, groups: tuple[int, ...]) -> np.ndarray:
    """Which elements share a group, of so many along each axis, with one that is marked."""
    view = bad.reshape([m for n, g in zip(bad.shape, groups, strict=True) for m in (g, n // g)])
    axes = tuple(range(1, view.ndim, 2))
    return np.broadcast_to(view.any(axes, keepdims=True), view.shape).reshape(bad.shape)


def divisor(n: int) -> int:
    """The smallest divisor of n from 4 on; n itself where there is none."""
    return next((d for d in range(4, n) if n % d == 0), n)


def check_groups(function, shape, groups, dtype=jnp.float32, bads=BAD) -> None:
    """function(x) is NaN in the groups that hold a bad element, in all of each, and nowhere else."""
    x = np.random.default_rng(0).normal(size=shape)
    for number, place in enumerate(places(x.size)):
        for bad in bads if number == 1 else bads[:1]:
            given = spoiled(x, place, bad)
            for name, found in function(jnp.asarray(given, dtype)).items():
                wanted = bad_group(~np.isfinite(given), groups[name])
                np.testing.assert_array_equal(np.isnan(found), wanted, f"{name}, {bad} at {place}")


@pytest.mark.first(5)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_bad_element_makes_its_group_nan_and_no_other_at_any_size(shape, dtype):
    m, n = shape
    block, tile = divisor(n), (divisor(n), divisor(m))
    groups = {"tensor": (1, 1), "channel": (m, 1), block: (m, n // block)}
    if m > 1 and n > 1:
        groups[tile] = (m // tile[1], n // tile[0])

    @jax.jit
    def found(x):
        return {str(g): jq.fake_quant(x, jq.Quantizer(jq.INT8, g)) for g in groups}

    check_groups(found, shape, {str(g): n for g, n in groups.items()}, dtype)


def test_a_bad_element_shows_in_float64():
    with x64():
        for axes, groups in (((0, 1), (1, 1)), ((1,), (64, 1))):
            function = jax.jit(
                lambda x, axes=axes: {"": calibration.absmax(x, axes) + jnp.zeros_like(x)}
            )
            check_groups(function, (64, 64), {"": groups}, jnp.float64)


CALIBRATIONS = {
    "absmax": calibration.absmax,
    "minmax": calibration.minmax,
    "gaussian": calibration.gaussian,
    "mse": calibration.mse(4),
    "percentile": calibration.percentile(99),
    "range": calibration.Range(jnp.float32(2.0)),
    "step": calibration.Step(jnp.float32(0.1)),
}


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (8, 4096)], ids=str)
def test_every_calibration_shows_a_bad_element(shape):
    @jax.jit
    def found(x):
        return {
            (name, g): jq.fake_quant(x, jq.Quantizer(jq.INT8, g, calibration=c))
            for name, c in CALIBRATIONS.items()
            for g in ("tensor", "channel")
        }

    groups = {(name, "tensor"): (1, 1) for name in CALIBRATIONS}
    groups |= {(name, "channel"): (shape[0], 1) for name in CALIBRATIONS}
    check_groups(found, shape, groups)


@pytest.mark.parametrize("shape", [(64, 64), (128, 128)], ids=str)
def test_every_kind_of_format_shows_a_bad_element_stored_and_rotated(shape):
    m, n = shape
    formats = (jq.INT4, jq.Int(4, "midrise"), jq.Int(8, "unsigned"), jq.E4M3, jq.E5M2, jq.NF4)
    blocks = (jq.MXFP8, jq.MXFP4, jq.NVFP4, Block(jq.INT8, 16, Float(8, 0, "fnu")))

    @jax.jit
    def found(x):
        quantizers = {str(f): jq.Quantizer(f, "channel") for f in formats}
        quantizers |= {str(b): jq.Quantizer(b) for b in blocks}
        quantizers["rotated"] = jq.Quantizer(jq.INT8, 32, hadamard=32)
        return {k: jq.dequantize(jq.quantize(x, q)) for k, q in quantizers.items()}

    groups = {str(f): (m, 1) for f in formats} | {str(b): (m, n // b.size) for b in blocks}
    check_groups(found, shape, groups | {"rotated": (m, n // 32)})


def test_the_largest_is_numpys_where_all_is_finite():
    x = np.random.default_rng(0).normal(size=(8, 64, 64)).astype(np.float32)
    for axes in ((), (0,), (2,), (0, 1), (1, 2), (0, 1, 2)):
        wanted = np.maximum(x.max(axis=axes, keepdims=True) if axes else x, 0)
        np.testing.assert_array_equal(
            jax.jit(reductions.largest, static_argnums=1)(x, axes), wanted
        )
        low, high = calibration.minmax(jnp.asarray(x), axes)
        np.testing.assert_array_equal(high, wanted)
        np.testing.assert_array_equal(low, -np.maximum((-x).max(axes, keepdims=True), 0) + 0.0)
    np.testing.assert_array_equal(reductions.largest(jnp.zeros((3, 0)), (1,)), np.zeros((3, 1)))
    assert float(reductions.largest(-jnp.ones((64, 64))).squeeze()) == 0
    top = float(jnp.finfo(jnp.float32).max)
    assert float(reductions.largest(jnp.full((64, 64), top)).squeeze()) == top


def test_its_gradient_and_its_batches_are_those_of_a_maximum():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64, 64)), jnp.float32)
    ours, plain = (lambda x: reductions.largest(x).sum(), lambda x: jnp.max(x, initial=0))
    gradients, batches = jax.jit(jax.grad(ours)), jax.jit(jax.vmap(ours))
    np.testing.assert_array_equal(gradients(x), jax.jit(jax.grad(plain))(x))
    np.testing.assert_array_equal(batches(x), x.max((1, 2)))
    spoilt = x.at[1, 5, 5].set(jnp.nan)
    np.testing.assert_array_equal(np.isnan(batches(spoilt)), [False, True, False])


def test_it_compiles_to_one_reduction_on_other_platforms():
    spec = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    function = jax.jit(functools.partial(reductions.largest, axes=(1,)))
    for platform in ("tpu", "cuda", "rocm"):
        text = jax.export.export(function, platforms=[platform])(spec).mlir_module()
        assert text.count("stablehlo.reduce(") == 1


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jaxquant as jq
names = ("tensor", "channel")
find = jax.jit(lambda x: [jq.fake_quant(x, jq.Quantizer(jq.INT8, g)) for g in names])
for kind, spec in ((AxisType.Auto, P("x", None)), (AxisType.Explicit, P(None, "x"))):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        for place in (0, 8192, 16383):
            x = np.ones((128, 128), np.float32)
            x.reshape(-1)[place] = np.nan
            whole, rows = map(np.asarray, find(jax.device_put(x, NamedSharding(mesh, spec))))
            assert np.isnan(whole).all()
            assert np.isnan(rows).all(1).tolist() == [i == place // 128 for i in range(128)]
            assert np.isfinite(rows).all(1).sum() == 127
print("held")
"""


def test_a_group_that_devices_share_shows_it():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", _SHARDED], env=environment, capture_output=True, text=True
    )
    assert "held" in done.stdout, done.stderr


CODECS = [f(stochastic=s) for f in (codecs.Companded, codecs.Logarithmic) for s in (False, True)]


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_no_code_of_optimizer_state_stands_for_a_finite_number_in_place_of_a_bad_one(codec):
    @jax.jit
    def found(x, bits):
        return codec.decode(*codec.encode(x, bits, jnp.full(x.shape, 0.5)), bits).reshape(-1)[5000]

    for bits in (2, 4, 8):
        for bad in BAD[:3]:
            x = jnp.asarray(spoiled(np.ones((64, 128)), 5000, bad))
            # Inf itself may be rounded, stochastically, to the level below it: beyond what survives a step.
            assert not abs(float(found(x, jnp.full(64, bits)))) < 1e37, (bits, bad)


def test_statistics_of_layers_show_it():
    x = jnp.asarray(spoiled(np.ones((64, 64)), 100, np.nan))
    state = jax.jit(statistics.update)(statistics.statistics(64), x)
    assert np.isnan(state.absmax).tolist() == [i == 100 % 64 for i in range(64)]
    fine = jax.jit(statistics.update)(statistics.statistics(64), jnp.ones((64, 64)))
    found = jax.jit(smooth.smoothquant_scale)(x, fine)
    assert np.isnan(found).all()  # each is floored by a share of the largest


def test_running_ranges_show_it_and_keep_it():
    quantizer = jq.Quantizer(jq.INT8)
    init, update = calibration.running(lambda x: jq.calibrate(x, quantizer))
    state = init(jnp.ones((64, 64)))
    for place in (None, 5, None):
        x = (
            jnp.ones((64, 64))
            if place is None
            else jnp.asarray(spoiled(np.ones((64, 64)), 5, -np.inf))
        )
        state = update(state, x)
    assert np.isnan(state.range().value).all()


# ---------------------------------------------------------------------------------------------------
# Whole steps beside float

N = 64
RECIPES = (
    *RECIPES,
    *("w8a8", "w4a16", "w4a16g32", "w4a4g32", "w8a8-token", "w4a4-lsq", "w4a4-quest"),
)


@functools.cache
def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {name: rng.normal(size=(N, N)).astype(np.float32) for name in ("x", "cotangent")}
    return found | {name: rng.normal(size=(N, N)).astype(np.float32) / 8 for name in ("w0", "w1")}


def network(recipe: str | None) -> nnx.Module:
    layers = [nnx.Linear(N, N, use_bias=False, rngs=nnx.Rngs(0)) for _ in range(2)]
    for i, layer in enumerate(layers):
        layer.kernel[...] = jnp.asarray(data()[f"w{i}"])
    model = nnx.Sequential(layers[0], jnp.tanh, layers[1])
    if recipe is not None:
        model = jq.nnx.quantize(model, {".*": recipe})
        if "lsq" in recipe:
            jq.nnx.calibrate(model, [jnp.asarray(data()["x"])])
    return model


def of_this_size(recipe: str) -> str:
    """The recipe, with the Hadamard blocks of EDEN as long as an axis here: its own 128 do not fit."""
    return f"{recipe}-h{N}" if recipe == "nvfp4_eden_train" else recipe


def step(recipe: str | None):
    """From (w0, w1, x, cotangent) to the loss and its gradients by the first three; compiled."""
    graphdef, kernels, rest = nnx.split(network(recipe), lambda path, _: path[-1] == "kernel", ...)

    def loss(w0, w1, x, cotangent):
        params = jax.tree.unflatten(jax.tree.structure(kernels), (w0, w1))
        return jnp.sum(nnx.merge(graphdef, params, rest)(x) * cotangent)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def spoiled_steps(function) -> dict:
    """Whether loss and gradients are finite, of each array with a NaN at each place."""
    found = {}
    for name in ("w0", "w1", "x", "cotangent"):
        for place in places(N * N):
            given = data() | {name: spoiled(data()[name], place, np.nan)}
            loss, gradients = function(*(given[k] for k in ("w0", "w1", "x", "cotangent")))
            found[name, place] = bool(jnp.isfinite(loss)), [np.isnan(g) for g in gradients]
    return found


@functools.cache
def in_float() -> dict:
    return spoiled_steps(step(None))


@pytest.mark.first(4)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_nan_in_a_step_shows_wherever_it_does_in_float(recipe):
    for case, (is_finite, gradients) in spoiled_steps(step(of_this_size(recipe))).items():
        wanted, of_float = in_float()[case]
        assert not wanted, case
        assert not is_finite, case
        for name, ours, theirs in zip(("w0", "w1", "x"), gradients, of_float, strict=True):
            assert not (theirs & ~ours).any(), (case, name)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16"])
def test_a_frozen_model_shows_it(recipe):
    model = network(recipe)
    jq.nnx.freeze(model)
    for place in places(N * N):
        found = nnx.jit(lambda m, x: m(x))(model, jnp.asarray(spoiled(data()["x"], place, np.nan)))
        assert np.isnan(found)[place // N].all()


def test_calibration_refuses_what_becomes_nan_within_the_model():
    model = network("w8a8")
    model.layers[0].kernel[...] = jnp.asarray(spoiled(data()["w0"], 100, np.nan))
    with pytest.raises(ValueError, match="was given a NaN or an Inf on the calibration data"):
        jq.nnx.calibrate(model, [jnp.asarray(data()["x"])])


def convolution(name: str):
    dot = jq.recipe(name)
    conv = jq.ConvGeneralDilated(dot.forward, dot.dlhs, dot.drhs)
    dims = ("NHWC", "HWIO", "NHWC")

    def product(x, w):
        x, w = x.reshape(1, N, N, 1), w.reshape(-1)[:64].reshape(8, 8, 1, 1)
        return conv(x, w, (1, 1), "SAME", dimension_numbers=dims)

    return product


def ragged(name: str):
    dot = jq.recipe(name)
    product, sizes = jq.RaggedDot(dot.forward, dot.dlhs, dot.drhs), np.array([N // 2] * 2, np.int32)
    return lambda x, w: product(x, jnp.stack([w, w]), sizes)


@pytest.mark.first(4)
@pytest.mark.parametrize("recipe", ["int8_train", "w8a8", "w4a16"])
@pytest.mark.parametrize("kind", [convolution, ragged])
def test_convolutions_and_ragged_products_show_it(kind, recipe):
    product = kind(recipe)
    function = jax.jit(
        jax.value_and_grad(lambda x, w, c: jnp.sum(product(x, w) * c), argnums=(0, 1))
    )
    shape = jax.eval_shape(product, data()["x"], data()["w0"]).shape
    given = {"x": data()["x"], "w": data()["w0"], "c": np.ones(shape, np.float32)}
    for name in given:
        for place in places(64):  # within the convolution's kernel, too
            bad = spoiled(given[name], place, np.nan)
            loss, gradients = function(*(given | {name: bad}).values())
            assert np.isnan(loss), (name, place)
            assert name != "c" or all(np.isnan(g).any() for g in gradients), (name, place)


@pytest.mark.parametrize("recipe", ["a8", "kv8", "a8kv8"])
def test_attention_shows_it(recipe):
    rng = np.random.default_rng(0)
    given = {k: rng.normal(size=(1, 64, 4, 64)).astype(np.float32) for k in ("q", "k", "v", "c")}
    attend = jq.recipe(recipe)
    function = jax.jit(
        jax.value_and_grad(lambda q, k, v, c: jnp.sum(attend(q, k, v) * c), argnums=(0, 1, 2))
    )
    for name in given:
        for place in places(given[name].size):
            bad = spoiled(given[name], place, np.nan)
            loss, gradients = function(*(given | {name: bad}).values())
            assert np.isnan(loss), (name, place)
            assert any(np.isnan(g).any() for g in gradients), (name, place)

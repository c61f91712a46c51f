"""The parts of FP4 training, against float64 oracles written from the definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.linalg

import jaxquant as jq
from jaxquant import calibration, rounding
from jaxquant.formats import Block
from jaxquant.numerics.hadamard import hadamard, random_signs
from jaxquant.operations import backward, training
from jaxquant.operations.recipes import RECIPES

DIMS = (((1,), (0,)), ((), ()))
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
RNG = np.random.default_rng(0)


def normals(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def to_e2m1(x):
    """Nearest, ties to the even code."""
    distance = np.abs(np.abs(x)[..., None] - E2M1)
    best = distance.min(-1, keepdims=True)
    even = np.where(distance == best, np.arange(8) % 2, 2).argmin(-1)
    return np.sign(x) * E2M1[even]


def to_e4m3(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def nvfp4(x, tile):
    """NVFP4 of a matrix, in float64: a scale for each tile (m, n)."""
    m, n = tile
    view = np.asarray(x, np.float64).reshape(x.shape[0] // m, m, x.shape[1] // n, n)
    needed = np.abs(view).max((1, 3), keepdims=True) / 6
    tensor = needed.max() / 448
    scale = to_e4m3(needed / tensor) * tensor
    return (to_e2m1(view / np.where(scale > 0, scale, 1)) * scale).reshape(x.shape)


@pytest.mark.parametrize("shape", [(32, 64), (16, 16), (64, 48)])
def test_square_tiles_are_one_grid_for_a_weight_and_its_transpose(shape):
    w = jnp.array(normals(*shape))
    tiles = jq.Quantizer(training.NVFP4_TILES)
    forward, back = jq.quantize(w, tiles, 0), jq.quantize(w, tiles, 1)
    np.testing.assert_array_equal(forward.qvalue, back.qvalue)
    np.testing.assert_array_equal(forward.scale, back.scale)
    turned = jq.dequantize(jq.quantize(w.T, tiles, 0))
    np.testing.assert_array_equal(jq.dequantize(forward), turned.T)
    np.testing.assert_allclose(jq.dequantize(forward), nvfp4(w, (16, 16)), rtol=2e-6, atol=1e-9)


def test_tiles_of_heads_side_by_side_lie_along_the_last_axis_of_either_sum():
    w = jnp.array(normals(32, 2, 16))  # [width, heads, size], summed over the first or the others
    tiles = jq.Quantizer(training.NVFP4_TILES)
    one, other = jq.fake_quant(w, tiles, 0), jq.fake_quant(w, tiles, (1, 2))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("element", ["e2m1finite", "e4m3fn", "e5m2", "e3m2finite", "e2m3finite"])
def test_scales_are_converted_as_their_sources_say(element):
    format = jq.parse(element)
    top = float(format.max_value)
    a = np.concatenate([2.0 ** np.arange(-20, 20), np.exp(RNG.normal(size=4000) * 8)])
    a = np.concatenate([a, np.nextafter(a.astype(np.float32), 0)]).astype(np.float32)
    binade = 2.0 ** np.floor(np.log2(top))
    exact = np.asarray(a, np.float64)
    wanted = {
        "up": 2.0 ** np.ceil(np.log2(exact / top)),
        "down": 2.0 ** np.floor(np.log2(exact / top)),
        "ocp": 2.0 ** np.floor(np.log2(exact)) / binade,
        "quartet": 2.0 ** np.floor(np.log2(exact)) / binade / 0.75,
    }
    for name, scales in wanted.items():
        block = Block(format, 1, jq.E8M0, conversion=name)
        found = jq.quantize(jnp.array(a), jq.Quantizer(block))
        np.testing.assert_allclose(found.float_scale(), scales, rtol=1e-6)
        if name in ("up", "quartet"):
            assert np.all(exact / np.asarray(found.float_scale(), np.float64) <= top * (1 + 1e-6))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("block(e2m1finite,16x16,e4m3fn,2)", training.NVFP4_TILES),
        ("block(e4m3fn,32,e8m0fnu,1,ocp)", training.MXFP8_OCP),
        ("block(e2m1finite,32,e8m0fnu,1,quartet)", training.MXFP4_QUARTET),
        ("block(e2m1finite,16,e4m3fn,2,up)", Block(jq.E2M1, 16, jq.E4M3, 2, "up")),
    ],
)
def test_names_of_blocks(name, block):
    assert str(block) == name
    assert jq.parse(name) == block
    assert str(Block(jq.E2M1, 32, jq.E8M0, conversion="up")) == "mxfp4"


def test_a_tile_and_a_quartet_block_are_stored_and_read_again():
    x = jnp.array(normals(32, 32))
    for block in (training.NVFP4_TILES, training.MXFP4_QUARTET):
        stored = jq.quantize(x, jq.Quantizer(block), 0)
        np.testing.assert_array_equal(
            jq.dequantize(stored), jq.fake_quant(x, jq.Quantizer(block), 0)
        )
        again = jq.storage.from_arrays(*jq.storage.to_arrays({"x": stored}))["x"]
        np.testing.assert_array_equal(jq.dequantize(again), jq.dequantize(stored))


@pytest.mark.parametrize("block", [16, 32, 128])
def test_random_signs_and_a_rotation_leave_a_product_as_it_is(block):
    key = jax.random.key(3)
    x, w = jnp.array(normals(4, 256)), jnp.array(normals(256, 8))
    turned = hadamard(x, block, 1, key), hadamard(w, block, 0, key)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(turned[0] @ turned[1], exact, atol=1e-4)
    signs = np.asarray(random_signs(key, 256))
    matrix = np.kron(np.eye(256 // block), scipy.linalg.hadamard(block)) / np.sqrt(block)
    np.testing.assert_allclose(turned[0], np.asarray(x) * signs @ matrix, atol=1e-5)
    counts = np.mean([random_signs(jax.random.key(i), 64) for i in range(400)], axis=0)
    assert np.abs(counts).max() < 5 / np.sqrt(400)
    assert abs(counts.mean()) < 5 / np.sqrt(400 * 64)


def eden_factor(x, values, block):
    """c of each block of neighbours along the last axis, in float64."""
    x, values = (np.asarray(v, np.float64).reshape(len(x), -1, block) for v in (x, values))
    return (x * x).sum(-1) / (x * values).sum(-1)


def test_eden_keeps_the_inner_product_with_what_it_quantizes():
    x = jnp.array(normals(8, 256))
    plain = jq.Quantizer(jq.E2M1, 16)
    eden = dataclasses.replace(plain, rounding=rounding.Eden(128))
    nearest, corrected = jq.fake_quant(x, plain), jq.fake_quant(x, eden, key=jax.random.key(0))
    factor = np.repeat(eden_factor(x, nearest, 128), 128, axis=-1)
    np.testing.assert_allclose(corrected, np.asarray(nearest) * factor, rtol=1e-5)
    np.testing.assert_allclose(eden_factor(x, corrected, 128), 1, rtol=1e-5)


def test_edens_scales_are_rounded_to_either_neighbour_with_the_right_mean():
    x = jnp.array(normals(2, 128))
    eden = jq.Quantizer(jq.NVFP4, rounding=rounding.Eden(128))
    stored = jax.vmap(lambda key: jq.quantize(x, eden, key=key))(
        jax.random.split(jax.random.key(1), 4000)
    )
    exact = np.abs(np.asarray(x, np.float64)).reshape(2, 8, 16).max(-1) / 6
    tensor = exact.max() / 255.99
    scale = to_e4m3(exact / tensor)
    values = to_e2m1(np.asarray(x, np.float64).reshape(2, 8, 16) / (scale * tensor)[..., None])
    nearest = (values * (scale * tensor)[..., None]).reshape(2, 128)
    wanted = scale * eden_factor(x, nearest, 128)
    found = np.asarray(stored.scale, np.float64)
    np.testing.assert_array_equal(jq.E2M1.load(stored.qvalue[0]), values.reshape(2, 128))
    step = 2.0 ** (np.floor(np.log2(wanted)) - 3)
    assert np.all(np.abs(found - wanted) < step * (1 + 1e-5))
    error = found.std(0) / np.sqrt(4000) + 1e-5 * wanted
    assert np.all(np.abs(found.mean(0) - wanted) < 5 * error)


def test_edens_squared_error_is_less_than_half_of_stochastic_roundings():
    x = jnp.array(normals(64, 1024))
    each = training.nvfp4_eden().dlhs.lhs
    up = Block(jq.E2M1, 16, jq.E4M3, levels=2, conversion="up")
    errors = [
        float(jnp.mean((jq.fake_quant(x, q, key=jax.random.key(0)) - x) ** 2))
        for q in (each, jq.Quantizer(up, rounding=rounding.stochastic))
    ]
    assert errors[0] <= 0.5 * errors[1]
    mxfp4 = jq.Quantizer(training.MXFP4_QUARTET, rounding=rounding.stochastic)
    assert errors[1] < float(jnp.mean((jq.fake_quant(x, mxfp4, key=jax.random.key(0)) - x) ** 2))


def test_nvidias_recipe_is_its_definition():
    """All three products, with gradients to nearest so that nothing but the signs is drawn."""
    dot = training.nvfp4(gradient_rounding=rounding.nearest)
    x, w, g = normals(32, 48), normals(48, 64), normals(32, 64)
    out, pull = jax.vjp(lambda x, w: dot(x, w, DIMS), jnp.array(x), jnp.array(w))
    dlhs, drhs = pull(jnp.array(g))
    weights = nvfp4(w, (16, 16))
    np.testing.assert_allclose(out, nvfp4(x, (1, 16)) @ weights, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dlhs, nvfp4(g, (1, 16)) @ weights.T, rtol=1e-4, atol=1e-4)
    signs = np.asarray(random_signs(backward.gradient_key(jnp.array(g), (0,), 1, 0), 32))
    matrix = np.kron(np.eye(2), scipy.linalg.hadamard(16)) / 4
    turned = [nvfp4(matrix @ (signs[:, None] * v), (16, 1)) for v in (x, g)]
    # A coordinate in the middle of two levels may go either way in float32.
    difference = np.abs(drhs - turned[0].T @ turned[1])
    assert np.mean(difference < 1e-3) > 0.97
    assert np.linalg.norm(difference) < 0.01 * np.linalg.norm(drhs)


def test_quartets_gradients_pass_where_nothing_was_clipped():
    dot = jq.recipe("mxfp4_train")
    x = jnp.zeros((32, 32)).at[:, 0].set(jnp.linspace(-1, 1, 32))
    x = hadamard(x.at[0].set(jnp.array(normals(32)) * 0.1).at[0, 3].set(9.0), 32)
    w = jnp.array(normals(32, 32))
    _, pull = jax.vjp(lambda x: dot(x, w, DIMS), x)
    gradient = np.asarray(hadamard(pull(jnp.ones((32, 32)))[0], 32))
    assert abs(gradient[0, 3]) < 1e-5  # far beyond 6 · 3/4 · rms
    assert np.abs(gradient[0, 4:]).min() > 1e-3


@pytest.mark.parametrize("name", ["nvfp4_train", "mxfp4_train", "nvfp4_eden_train"])
def test_a_step_repeats_exactly_and_another_draws_anew(name):
    dot = jq.recipe(name)
    x, w, g = (jnp.array(normals(*s)) for s in ((128, 128), (128, 128), (128, 128)))

    @jax.jit
    def gradients(g):
        return jax.vjp(lambda x, w: dot(x, w, DIMS), x, w)[1](g)

    for one, again, other in zip(gradients(g), gradients(g), gradients(g * 1.001), strict=True):
        np.testing.assert_array_equal(one, again)
        assert float(jnp.mean(jnp.abs(one - other / 1.001) > 1e-3)) > 0.5


def draws(dot, side, g, w, count):
    """One element of a gradient's product, as often as another row's size makes another key.

    The other row is smaller than the first, so that it changes the draws and not the scales.
    """
    n = len(g)

    def one(word):
        other = jnp.full((n,), 0.01 + 0.1 * jax.random.uniform(word))
        if side == 0:
            rhs = jnp.zeros((16, n)).at[0].set(w)
            pull = jax.vjp(lambda x: dot(x, rhs, DIMS), jnp.zeros((2, 16)))[1]
            return pull(jnp.stack([g, other]))[0][0, 0]
        lhs = jnp.zeros((n, 16)).at[:, 0].set(w)
        pull = jax.vjp(lambda x: dot(lhs, x, DIMS), jnp.zeros((16, 2)))[1]
        return pull(jnp.stack([g, other], 1))[0][0, 0]

    keys = jax.random.split(jax.random.key(0), (count // 4096, 4096))
    return np.asarray(jax.jit(lambda k: jax.lax.map(jax.vmap(one), k))(keys), np.float64).ravel()


def of_gradient(dot, side, **changes):
    """A recipe whose forward is in float, and whose one gradient's product is as it says."""
    operands = dataclasses.replace((dot.dlhs, dot.drhs)[side], **changes)
    gradients = {("dlhs", "drhs")[side]: operands}
    return jq.DotGeneral(jq.Operands(), **gradients)


UNBIASED = {
    "nvfp4_up": (training.nvfp4(tiles=False, conversion="up"), {"rhs": None}, 32),
    "mxfp4_train": (training.mxfp4_quartet(), {}, 32),
    "nvfp4_eden_train": (training.nvfp4_eden(), {}, 128),
}


# A million draws of EDEN take minutes; an eighth of them run with the other long tests.
_MILLION = 2**20
DRAWN = [
    *(pytest.param(name, _MILLION, marks=pytest.mark.long) for name in ("nvfp4_up", "mxfp4_train")),
    pytest.param("nvfp4_eden_train", _MILLION // 8, marks=pytest.mark.long),
    pytest.param("nvfp4_eden_train", _MILLION, marks=pytest.mark.release),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(("name", "count"), DRAWN)
def test_a_whole_gradient_product_is_unbiased_over_a_million_draws(name, count, side):
    dot, changes, n = UNBIASED[name]
    g, w = normals(2, n)
    found = draws(of_gradient(dot, side, **changes), side, jnp.array(g), jnp.array(w), count)
    exact = np.asarray(g, np.float64) @ np.asarray(w, np.float64)
    assert len(np.unique(found)) > 1000
    assert abs(found.mean() - exact) < 5 * found.std() / np.sqrt(count)


def test_nvidias_scales_clip_so_that_its_gradients_are_not_quite_unbiased():
    """A block's largest value lies beyond the grid where its scale is rounded down: a bias that is seen."""
    g = normals(32)
    near, up = (
        draws(
            of_gradient(training.nvfp4(tiles=False, conversion=c), 0, rhs=None),
            0,
            jnp.array(g),
            jnp.array(g),
            2**15,
        )
        for c in ("nearest", "up")
    )
    exact = float(np.asarray(g, np.float64) @ g)
    error = [abs(d.mean() - exact) / (d.std() / np.sqrt(len(d))) for d in (near, up)]
    assert error[0] > 8
    assert error[1] < 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Block(jq.E2M1, (16,), jq.E4M3), "tile"),
        (lambda: Block(jq.E2M1, (16, 0), jq.E4M3), "tile"),
        (lambda: Block(jq.E2M1, 16, jq.E4M3, conversion="ocp"), "E8M0"),
        (lambda: Block(jq.E2M1, 16, jq.E4M3, conversion="floor"), "conversion"),
        (lambda: Block(jq.INT8, 32, jq.E8M0, conversion="ocp"), "Floats"),
        (lambda: Block(jq.E2M1, 32, jq.E8M0, conversion="nearest"), "powers of two"),
        (lambda: Block(jq.E2M1, 32, jq.E8M0, 2, "quartet"), "levels 1"),
        (lambda: rounding.Eden(0), "at least 1"),
        (lambda: rounding.Eden(16, -1.0), "positive"),
        (lambda: calibration.scaled_absmax(0), "share"),
        (lambda: calibration.scaled_rms(float("inf")), "share"),
        (lambda: jq.BackwardOperands(kept="late"), "'original' or 'forward'"),
        (lambda: jq.BackwardOperands(hadamard=12), "power of two"),
        (lambda: jq.BackwardOperands(jq.Quantizer(jq.INT8), arithmetic="native"), "simulated"),
        (lambda: jq.BackwardOperands(jq.Quantizer(jq.INT8, hadamard=16)), "rotated together"),
        (lambda: jq.DotGeneral(jq.BackwardOperands()), "forward is an Operands"),
        (lambda: jq.ConvGeneralDilated(jq.Operands(), jq.BackwardOperands()), "BackwardOperands"),
        (lambda: jq.RaggedDot(jq.Operands(), jq.BackwardOperands()), "BackwardOperands"),
        (
            lambda: jq.quantize(
                jnp.ones((2, 48)),
                jq.Quantizer(jq.NVFP4, rounding=rounding.Eden(32)),
                key=jax.random.key(0),
            ),
            "Eden's block of 32",
        ),
        (
            lambda: jq.quantize(
                jnp.ones((2, 32)), jq.Quantizer(jq.NVFP4, rounding=rounding.Eden(32))
            ),
            "needs a PRNG key",
        ),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_recipes_are_written_and_read_again():
    for name in ("nvfp4_train", "mxfp4_train", "nvfp4_eden_train", "mxfp8_ocp_train"):
        assert (
            jq.specification.from_config(*jq.specification.to_config(RECIPES[name]))
            == RECIPES[name]
        )
    assert jq.recipe("nvfp4_eden_train-h16") == training.nvfp4_eden(16)

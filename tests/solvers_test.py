"""Solvers against float64 arithmetic of another kind: explicit inverses, loops, and the inputs themselves."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import jaxquant as jq
from jaxquant import calibration
from jaxquant.operations import smoothed
from jaxquant.ptq import smooth, solvers, statistics

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others

N, M = 128, 24

QUANTIZERS = {
    "int4 tensor": jq.Quantizer(jq.INT4),
    "int3 channel": jq.Quantizer(jq.Int(3), "channel"),
    "int2 blocks": jq.Quantizer(jq.INT2, 32),
    "int4 tiles": jq.Quantizer(jq.INT4, (16, 8)),
    "midrise mse": jq.Quantizer(jq.Int(3, "midrise"), 64, calibration=calibration.mse(16)),
    "uint3 minmax": jq.Quantizer(jq.Int(3, "unsigned"), 32, calibration=calibration.minmax),
    "int3 rotated": jq.Quantizer(jq.Int(3), 64, hadamard=32),
    "nf4": jq.Quantizer(jq.NF4, 64),
    "mxfp4": jq.Quantizer(jq.MXFP4),
    "nvfp4": jq.Quantizer(jq.NVFP4),
}


def among(*names: str):
    return pytest.mark.parametrize("quantizer", [QUANTIZERS[n] for n in names], ids=names)


battery = among(*QUANTIZERS)
rtn, objective = jax.jit(solvers.rtn), jax.jit(solvers.objective)
fake_quant = jax.jit(jq.fake_quant, static_argnums=2)


def inputs(seed: int, n: int = N, count: int = 512) -> np.ndarray:
    """Correlated inputs whose channels differ in size."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(n, n)) * np.arange(1, n + 1) ** -0.7 * np.exp(rng.normal(size=(n, 1)))
    return (rng.normal(size=(count, n)) @ mix.T).astype(np.float32)


def layer(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """A weight and the Hessian of its inputs."""
    x = inputs(seed)
    weight = np.random.default_rng(seed + 100).normal(size=(N, M)).astype(np.float32)
    return jnp.array(weight), jnp.array(x.T @ x / len(x))


@jax.jit
def load(q: jq.QArray) -> jax.Array:
    return q.element.load(q.qvalue)


def grid_values(q: jq.QArray) -> np.ndarray:
    return np.asarray(load(q), np.float64)


def everywhere(v, shape=(N, M)) -> np.ndarray:
    """One number for each element, of one for each group."""
    v = np.asarray(v, np.float64)
    return np.kron(v, np.ones((shape[0] // v.shape[0], shape[1] // v.shape[1])))


def reference(weight, hessian, quantizer, damping=0.01, order=True) -> np.ndarray:
    """Optimal brain surgery: one channel at a time by the inverse Hessian of those that are left."""
    stored = rtn(weight, quantizer)
    element = stored.element
    grid = np.unique(np.asarray(jax.jit(element.decode)(jnp.arange(2**element.bits)), np.float64))
    grid = grid[np.isfinite(grid) & (grid >= element.min_value) & (grid <= element.max_value)]
    scale = everywhere(stored.float_scale())
    zero = np.zeros((N, M))
    if stored.zero_point is not None:
        zero = everywhere(element.load(stored.zero_point))
    w, h = np.asarray(weight, np.float64).copy(), np.asarray(hessian, np.float64)
    if quantizer.hadamard is not None:
        size = quantizer.hadamard
        turn = np.kron(np.eye(N // size), scipy.linalg.hadamard(size)) / np.sqrt(size)
        w, h = turn @ w, turn @ h @ turn.T
    turns = np.argsort(-np.diag(h), kind="stable") if order else np.arange(N)
    inverse = np.linalg.inv(h + damping * np.mean(np.diag(h)) * np.eye(N))
    found = np.zeros((N, M))
    for i in turns:
        ratio = w[i] / scale[i] + zero[i]
        found[i] = grid[np.abs(ratio[:, None] - grid).argmin(1)]
        error = (w[i] - scale[i] * (found[i] - zero[i])) / inverse[i, i]
        w -= np.outer(inverse[:, i], error)
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return found


@pytest.mark.first(1)
@battery
@pytest.mark.parametrize("order", [True, False], ids=["ordered", "in place"])
def test_gptq_is_optimal_brain_surgery(quantizer, order):
    weight, hessian = layer()
    found = grid_values(solvers.gptq(weight, hessian, quantizer, order=order))
    expected = reference(weight, hessian, quantizer, order=order)
    assert np.mean(found == expected) >= 0.999


@pytest.mark.parametrize("block", [1, 48])
def test_gptqs_block_is_a_matter_of_speed(block):
    weight, hessian = layer()
    quantizer = QUANTIZERS["int3 channel"]
    expected = reference(weight, hessian, quantizer, damping=0.1)
    found = grid_values(solvers.gptq(weight, hessian, quantizer, damping=0.1, block=block))
    assert np.mean(found == expected) >= 0.999


@pytest.mark.first(3)
@battery
def test_gptq_has_quantizes_form_and_scales(quantizer):
    weight, hessian = layer()
    expected = rtn(weight, quantizer)
    found = solvers.gptq(weight, hessian, quantizer)
    chex.assert_trees_all_equal_structs(found, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(*(dataclasses.replace(q, qvalue=0) for q in (found, expected)))


def test_gptq_takes_other_types():
    weight, hessian = layer()
    weight, quantizer = weight.astype(jnp.bfloat16), QUANTIZERS["int3 channel"]
    found = solvers.gptq(weight, hessian, quantizer)
    expected = jq.quantize(weight, quantizer, axis=0)
    chex.assert_trees_all_equal_structs(found, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    assert jq.dequantize(found).dtype == jnp.bfloat16


@battery
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_gptq_of_independent_inputs_is_rounding_to_nearest(quantizer, size):
    if quantizer.hadamard is not None:
        pytest.skip("a rotation leaves the identity so but for rounding")
    weight, _ = layer()
    expected = rtn(weight, quantizer)
    for order in (True, False):
        found = solvers.gptq(weight, size * jnp.eye(N), quantizer, order=order)
        chex.assert_trees_all_equal(found, expected)


@battery
def test_gptq_loses_less_than_rounding_to_nearest(quantizer):
    for seed in range(3):
        weight, hessian = layer(seed)
        nearest = objective(weight, rtn(weight, quantizer), hessian)
        solved = objective(weight, solvers.gptq(weight, hessian, quantizer), hessian)
        assert solved < 0.8 * nearest


def test_gptq_takes_singular_hessians_and_channels_without_inputs():
    weight, _ = layer()
    x = inputs(0, count=16)
    dead = [3, 64, 127]
    x[:, dead] = 0
    hessian = jnp.array(x.T @ x / len(x))
    quantizer = QUANTIZERS["int3 channel"]
    nearest = rtn(weight, quantizer)
    found = solvers.gptq(weight, hessian, quantizer)
    np.testing.assert_array_equal(grid_values(found)[dead], grid_values(nearest)[dead])
    assert objective(weight, found, hessian) < 0.5 * objective(weight, nearest, hessian)
    for damping in (0.0, 0.01):
        nothing = solvers.gptq(weight, jnp.zeros((N, N)), quantizer, damping=damping)
        chex.assert_trees_all_equal(nothing, nearest)


@pytest.mark.parametrize("name", ["int3 channel", "mxfp4", "nvfp4", "uint3 minmax"])
def test_gptq_without_a_solution_decodes_to_nan(name):
    weight, hessian = layer()
    quantizer = QUANTIZERS[name]
    for bad in (hessian.at[5, 5].set(jnp.nan), hessian.at[0, 7].set(jnp.inf), -jnp.eye(N)):
        assert jnp.isnan(jq.dequantize(solvers.gptq(weight, bad, quantizer))).all()
    low_rank = jnp.ones((N, N)) - jnp.eye(N)  # not positive definite, damped too little
    assert jnp.isnan(
        jq.dequantize(solvers.gptq(weight, low_rank + jnp.eye(N) * 0.1, quantizer))
    ).all()


def test_a_group_that_is_lost_takes_no_other_with_it():
    weight, hessian = layer()
    quantizer = QUANTIZERS["int2 blocks"]
    values = jq.dequantize(solvers.gptq(weight.at[40, 3].set(jnp.inf), hessian, quantizer))
    lost = np.zeros((N, M), bool)
    lost[32:64, 3] = True
    np.testing.assert_array_equal(jnp.isnan(values), lost)
    # Other columns never meet it.
    expected = jq.dequantize(solvers.gptq(weight, hessian, quantizer))
    keep = np.arange(M) != 3
    np.testing.assert_array_equal(values[:, keep], expected[:, keep])


def test_gptq_runs_under_vmap_and_within_jit():
    weights, hessians = map(jnp.stack, zip(*(layer(s) for s in range(3)), strict=True))
    solve = functools.partial(solvers.gptq, quantizer=QUANTIZERS["nvfp4"])
    stacked = jax.jit(jax.vmap(solve))(weights, hessians)
    for i in range(3):
        alone = solve(weights[i], hessians[i])
        found = jax.tree.map(lambda v, i=i: v[i], stacked)
        assert np.mean(grid_values(found) == grid_values(alone)) >= 0.999
        np.testing.assert_array_equal(found.scale, alone.scale)


def test_gptq_takes_ranges_that_are_data():
    weight, hessian = layer()
    quantizer = QUANTIZERS["int3 channel"]
    found = jq.calibrate(weight, quantizer, 0)
    fixed = dataclasses.replace(quantizer, calibration=calibration.Range(found))
    chex.assert_trees_all_equal(
        solvers.gptq(weight, hessian, fixed), solvers.gptq(weight, hessian, quantizer)
    )
    zeroed = weight.at[:, 0].set(0)
    chex.assert_trees_all_equal(
        jq.dequantize(solvers.gptq(zeroed, hessian, quantizer))[:, 0], jnp.zeros(N)
    )


def test_statistics_are_sums_over_everything_seen():
    x = inputs(0, n=7, count=60)
    state = statistics.statistics(7)
    step = jax.jit(statistics.update)
    for part in np.split(x.reshape(10, 6, 7), [2, 3], axis=0):
        state = step(state, jnp.array(part))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(state.hessian, exact.T @ exact / 60, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.absmean, np.abs(exact).mean(0), rtol=1e-6)
    np.testing.assert_array_equal(state.absmax, np.abs(x).max(0))
    assert (int(state.count), int(state.nonfinite)) == (60, 0)


def test_statistics_count_what_is_not_finite():
    x = jnp.array(inputs(0, n=4)).at[3, 1].set(jnp.nan).at[5, 2].set(-jnp.inf)
    state = statistics.update(
        statistics.update(statistics.statistics(4), x), x.astype(jnp.bfloat16)
    )
    assert int(state.nonfinite) == 4
    assert int(jnp.isfinite(state.hessian).sum()) == 4  # of the other two channels
    weight = jnp.ones((4, 2))
    assert jnp.isnan(
        jq.dequantize(solvers.gptq(weight, state.hessian, jq.Quantizer(jq.INT4)))
    ).all()


def test_statistics_of_nothing_solve_to_nan():
    empty = statistics.update(statistics.statistics(4), jnp.zeros((0, 4)))
    solved = solvers.gptq(jnp.ones((4, 2)), empty.hessian, jq.Quantizer(jq.INT4))
    assert jnp.isnan(jq.dequantize(solved)).all()


def test_statistics_of_scaled_inputs():
    x = inputs(0)
    scale = np.exp(np.random.default_rng(1).normal(size=N)).astype(np.float32)
    seen = functools.partial(statistics.update, statistics.statistics(N))
    found = smooth.rescale(seen(jnp.array(x)), jnp.array(scale))
    expected = seen(jnp.array(x / scale))
    sizes = np.sqrt(np.outer(*[np.diag(expected.hessian)] * 2))
    np.testing.assert_allclose(found.hessian / sizes, expected.hessian / sizes, atol=1e-5)
    np.testing.assert_allclose(found.absmax, expected.absmax, rtol=1e-6)
    np.testing.assert_allclose(found.absmean, expected.absmean, rtol=1e-5)
    assert (
        smooth.rescale(statistics.statistics(N, hessian=False), jnp.array(scale)).products is None
    )


def test_the_objective_is_the_outputs_mean_squared_error():
    x, (weight, hessian) = inputs(0).astype(np.float64), layer()
    stored = rtn(weight, QUANTIZERS["int2 blocks"])
    error = np.asarray(weight, np.float64) - np.asarray(jq.dequantize(stored), np.float64)
    expected = np.sum((x @ error) ** 2) / len(x)
    assert objective(weight, stored, hessian) == pytest.approx(expected, rel=1e-4)
    assert objective(weight, weight, hessian) == 0


def state_of(seed: int = 0) -> statistics.InputStatistics:
    return statistics.update(statistics.statistics(N), jnp.array(inputs(seed)))


@pytest.mark.first(2)
@among("int3 channel", "uint3 minmax", "int3 rotated", "nvfp4")
def test_activation_aware_scales_lose_least_of_the_grid(quantizer):
    weight, state = layer()[0], state_of()
    scale = smooth.awq_scale(weight, state, quantizer, grid=8)

    def loss(s):
        values = fake_quant(weight * s[:, None], quantizer, 0) / s[:, None]
        return float(objective(weight, values, state.hessian))

    logs = np.log(np.asarray(state.absmean, np.float64))
    logs -= logs.mean()
    losses = [loss(jnp.array(np.exp(a * logs), jnp.float32)) for a in np.linspace(0, 1, 9)]
    assert loss(scale) == pytest.approx(min(losses), rel=2e-3)
    assert loss(scale) <= losses[0]


def test_activation_aware_scales_of_even_inputs_are_ones():
    weight = layer()[0]
    even = statistics.update(statistics.statistics(N), jnp.eye(N))
    np.testing.assert_array_equal(
        smooth.awq_scale(weight, even, QUANTIZERS["int3 channel"]), jnp.ones(N)
    )


def test_activation_aware_scales_help_where_channels_differ():
    weight, state = layer()[0], state_of()
    quantizer = QUANTIZERS["int3 channel"]
    scale = smooth.awq_scale(weight, state, quantizer)
    values = fake_quant(weight * scale[:, None], quantizer, 0) / scale[:, None]
    nearest = objective(weight, rtn(weight, quantizer), state.hessian)
    assert objective(weight, values, state.hessian) < 0.9 * nearest


@pytest.mark.first(2)
@among("int4 tiles", "uint3 minmax", "int3 rotated", "nvfp4")
def test_clipped_ranges_are_never_worse(quantizer):
    weight, hessian = layer()
    found = solvers.awq_clip(weight, hessian, quantizer)
    clipped = dataclasses.replace(quantizer, calibration=found)
    nearest = objective(weight, rtn(weight, quantizer), hessian)
    assert objective(weight, rtn(weight, clipped), hessian) <= nearest
    stored = solvers.gptq(weight, hessian, clipped)
    chex.assert_trees_all_equal_shapes_and_dtypes(stored, rtn(weight, quantizer))


@pytest.mark.parametrize("name", ["int3 channel", "int2 blocks", "int4 tensor"])
def test_clipped_ranges_are_the_best_of_the_grid_in_each_group(name):
    """Whatever groups do to one another: the inputs of two groups are independent here."""
    quantizer = QUANTIZERS[name]
    weight, hessian = layer()
    groups = jq.calibrate(weight, quantizer, 0).shape
    apart = np.kron(np.eye(groups[0]), np.ones((N // groups[0],) * 2))
    hessian = hessian * apart
    found = everywhere(solvers.awq_clip(weight, hessian, quantizer, grid=5).value)
    w, h = np.asarray(weight, np.float64), np.asarray(hessian, np.float64)
    ranges, top = everywhere(jq.calibrate(weight, quantizer, 0)), quantizer.format.max_value

    def losses(r):
        error = w - r / top * np.clip(np.round(w / (r / top)), -top, top)
        each = error * (h @ error)
        rows = each.reshape(groups[0], -1, M).sum(1)
        return rows if groups[1] == M else rows.sum(1, keepdims=True)

    best = np.min([losses(share * ranges) for share in np.linspace(1, 0.5, 6)], axis=0)
    np.testing.assert_allclose(losses(found), best, rtol=1e-4)
    assert (found < ranges).any()


def test_smoothquants_scales():
    weight, state = layer()[0], state_of()
    rows = np.abs(np.asarray(weight, np.float64)).max(1)
    largest = np.abs(inputs(0).astype(np.float64)).max(0)
    for alpha in (0, 0.5, 0.75, 1):
        found = smooth.smoothquant_scale(weight, state, alpha)
        np.testing.assert_allclose(found, largest**alpha / rows ** (1 - alpha), rtol=1e-5)
    # At ½ the two operands' largest magnitudes are the same in every channel.
    scale = np.asarray(smooth.smoothquant_scale(weight, state), np.float64)
    np.testing.assert_allclose(largest / scale, rows * scale, rtol=1e-5)


def test_scales_of_channels_that_are_zero_are_positive_and_finite():
    weight = layer()[0].at[2].set(0)
    x = inputs(0)
    x[:, [2, 9]] = 0
    state = statistics.update(statistics.statistics(N), jnp.array(x))
    nothing = statistics.update(statistics.statistics(N), jnp.zeros((3, N)))
    quantizer = QUANTIZERS["int3 channel"]
    for seen in (state, nothing):
        for scale in (
            smooth.smoothquant_scale(weight, seen),
            smooth.smoothquant_scale(0 * weight, seen),
            smooth.awq_scale(weight, seen, quantizer, grid=4),
        ):
            assert bool(jnp.all(jnp.isfinite(scale) & (scale > 0)))


WEIGHT_AND_INPUTS = {
    "native": jq.recipe("w8a8"),
    "weight only": jq.DotGeneral(jq.Operands(None, jq.Quantizer(jq.INT4, 4), "native")),
    "simulated": jq.DotGeneral(
        jq.Operands(jq.Quantizer(jq.INT8, "channel"), jq.Quantizer(jq.INT4, 4))
    ),
}
NUMBERS = (
    ((2, 1), (1, 0)),
    ((), ()),
)  # lhs (batch, 4, 8), rhs (4, 8, 5), the sum's axes as they come


MATMUL = (((1,), (0,)), ((), ()))


def product_of(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(16, 4, 8)), rng.normal(size=(4, 8, 5))
    scale = np.exp(rng.normal(size=32))
    return tuple(jnp.array(v, jnp.float32) for v in (x, w, scale))  # pyright: ignore


@jax.jit
def apply(dot, x, w):
    return dot(x, w, NUMBERS)


def test_a_smoothed_product_in_floating_point_is_the_product():
    x, w, scale = product_of()
    expected = np.einsum("bij,ijm->bm", np.asarray(x, np.float64), np.asarray(w, np.float64))
    for inner in (jax.lax.dot_general, jq.DotGeneral()):
        found = apply(smoothed.Smoothed(inner, scale), x, w)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.first(1)
@pytest.mark.parametrize("inner", WEIGHT_AND_INPUTS.values(), ids=WEIGHT_AND_INPUTS)
def test_a_smoothed_product_of_a_stored_weight_is_that_of_the_weight(inner):
    """Bit for bit, whether the scales are data or constants of the program."""
    quantizer = inner.forward.rhs
    for seed in range(5):
        x, w, scale = product_of(seed)
        dot = smoothed.Smoothed(inner, scale)
        stored = jq.quantize(smoothed.multiplied(w, scale, (0, 1)), quantizer, NUMBERS[0][1])
        expected = apply(dot, x, stored)
        np.testing.assert_array_equal(apply(dot, x, w), expected)
    constant = jax.jit(lambda x, w: dot(x, w, NUMBERS))
    np.testing.assert_array_equal(constant(x, w), expected)


def test_a_smoothed_product_with_ranges_that_are_constants_is_that_of_the_stored_weight():
    """Two constants in a row: the compiler must not multiply them with each other first."""
    for seed in range(2):
        rng = np.random.default_rng(seed)
        x, w = (jnp.array(rng.normal(size=s), jnp.float32) for s in ((4, 256), (256, 64)))
        scale = jnp.array(np.exp(rng.normal(size=256)), jnp.float32)
        quantizer = jq.Quantizer(jq.Int(8), "channel")
        found = calibration.Range(jq.calibrate(smoothed.multiplied(w, scale, (0,)), quantizer, 0))
        quantizer = dataclasses.replace(quantizer, calibration=found)
        dot = smoothed.Smoothed(jq.DotGeneral(jq.Operands(None, quantizer)), scale)
        stored = jq.quantize(smoothed.multiplied(w, scale, (0,)), quantizer, 0)
        eye = jnp.eye(256)
        of_stored = jax.jit(lambda v, dot=dot, s=stored: dot(v, s, MATMUL))
        of_weight = jax.jit(lambda v, w, dot=dot: dot(v, w, MATMUL))
        np.testing.assert_array_equal(of_weight(eye, w), of_stored(eye))
        np.testing.assert_array_equal(of_weight(x, w), of_stored(x))


@jax.jit
def gradients(dot, x, w, g):
    return jax.grad(lambda x, w: jnp.vdot(dot(x, w, NUMBERS), g), argnums=(0, 1))(x, w)


def test_a_smoothed_product_has_the_straight_through_gradients():
    x, w, scale = product_of()
    for inner in WEIGHT_AND_INPUTS.values():
        dot = smoothed.Smoothed(inner, scale)
        g = jnp.array(np.random.default_rng(9).normal(size=(16, 5)), jnp.float32)
        s = np.asarray(scale).reshape(4, 8)
        rhs = fake_quant(w * s[:, :, None], inner.forward.rhs, (1, 0))
        lhs = x / s[None]
        if inner.forward.lhs is not None:
            lhs = fake_quant(lhs, inner.forward.lhs, (2, 1))
        by_x = np.einsum("bm,ijm->bij", g, rhs) / s
        by_w = np.einsum("bm,bij->ijm", g, lhs) * s[:, :, None]
        found = gradients(dot, x, w, g)
        np.testing.assert_allclose(found[0], by_x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[1], by_w, rtol=1e-4, atol=1e-4)
        stored = jq.quantize(w * s[:, :, None], inner.forward.rhs, (1, 0))
        by_stored = jax.jit(jax.grad(lambda x, q, dot, g: jnp.vdot(dot(x, q, NUMBERS), g)))
        np.testing.assert_allclose(by_stored(x, stored, dot, g), by_x, rtol=1e-4, atol=1e-4)


def test_smoothing_helps_where_few_inputs_are_large():
    x = jnp.array(inputs(0)).at[:, 5].multiply(50.0)
    weight = layer()[0]
    state = statistics.update(statistics.statistics(N), x)
    exact = x @ weight
    errors = [
        float(jnp.mean((jax.jit(lambda dot: dot(x, weight, MATMUL))(dot) - exact) ** 2))
        for dot in (
            jq.recipe("w8a8"),
            smoothed.Smoothed(jq.recipe("w8a8"), smooth.smoothquant_scale(weight, state)),
        )
    ]
    assert errors[1] < 0.5 * errors[0]


def test_a_smoothed_product_is_a_pytree_that_says_its_bytes():
    scale = jnp.ones(8)
    for inner in (jax.lax.dot_general, jq.recipe("w8a8")):
        dot = smoothed.Smoothed(inner, scale)
        assert dot.nbytes == 32
        leaves, tree = jax.tree.flatten(dot)
        assert len(leaves) == 1
        assert jax.tree.unflatten(tree, leaves).dot_general == inner
    stacked = smoothed.Smoothed(jax.lax.dot_general, jnp.ones((3, 8)))
    out = jax.vmap(lambda dot, x, w: dot(x, w, MATMUL))(
        stacked, jnp.ones((3, 2, 8)), jnp.ones((3, 8, 4))
    )
    np.testing.assert_array_equal(out, jnp.full((3, 2, 4), 8.0))


def _gptq(**options):
    return solvers.gptq(
        **{"weight": jnp.ones((4, 2)), "hessian": jnp.eye(4), "quantizer": jq.Quantizer(jq.INT4)}
        | options
    )


def _smoothed(x, w):
    dot = smoothed.Smoothed(jax.lax.dot_general, jnp.ones(4))
    return dot(x, w, MATMUL)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.statistics(0), "channels of at least 1; got 0"),
        (lambda: statistics.statistics(2.0), "channels of at least 1; got 2.0"),
        (
            lambda: statistics.update(statistics.statistics(2), jnp.ones((3, 3))),
            r"shape \(..., 2\)",
        ),
        (lambda: statistics.update(statistics.statistics(2), jnp.ones(2, int)), "int32"),
        (lambda: statistics.statistics(2, hessian=False).hessian, "hessian=True"),
        (lambda: _gptq(weight=jnp.ones((4, 2, 1))), "inputs, outputs"),
        (lambda: _gptq(weight=jnp.ones((4, 2), int)), "floating-point"),
        (lambda: _gptq(hessian=jnp.eye(2)), r"\(4, 4\)"),
        (lambda: _gptq(quantizer="w4a16"), "Quantizer"),
        (lambda: _gptq(quantizer=jq.Quantizer(jq.INT4, 3)), "does not divide"),
        (lambda: _gptq(quantizer=jq.Quantizer(jq.Int(jnp.array(4)))), "Python integers"),
        (
            lambda: _gptq(quantizer=jq.Quantizer(jq.INT4, rounding=jq.rounding.stochastic)),
            "PRNG key",
        ),
        (lambda: _gptq(damping=-0.1), "damping"),
        (lambda: _gptq(block=0), "block"),
        (lambda: solvers.rtn(jnp.ones(4), jq.Quantizer(jq.INT4)), "inputs, outputs"),
        (
            lambda: smooth.awq_scale(
                jnp.ones((4, 2)), statistics.statistics(4, hessian=False), jq.Quantizer(jq.INT4)
            ),
            "no Hessian",
        ),
        (
            lambda: smooth.awq_scale(
                jnp.ones((4, 2)), statistics.statistics(4), jq.Quantizer(jq.INT4), grid=0
            ),
            "grid",
        ),
        (
            lambda: solvers.awq_clip(
                jnp.ones((4, 2)), jnp.eye(4), jq.Quantizer(jq.INT4), least=0.0
            ),
            "least",
        ),
        (
            lambda: solvers.awq_clip(
                jnp.ones((4, 2)),
                jnp.eye(4),
                jq.Quantizer(jq.INT4, calibration=calibration.Step(jnp.float32(1))),
            ),
            "Step",
        ),
        (
            lambda: smooth.smoothquant_scale(jnp.ones((4, 2)), statistics.statistics(4), 1.5),
            "alpha",
        ),
        (
            lambda: smooth.smoothquant_scale(jnp.ones((4, 2)), statistics.statistics(3)),
            "3 channels",
        ),
        (lambda: smoothed.Smoothed("dot", jnp.ones(4)), "dot_general is a function"),
        (lambda: smoothed.Smoothed(jax.lax.dot_general, 2.0), "scale is a floating"),
        (lambda: _smoothed(jnp.ones((2, 3)), jnp.ones((3, 2))), "3 channels"),
        (
            lambda: _smoothed(
                jq.quantize(jnp.ones((2, 4)), jq.Quantizer(jq.INT8)), jnp.ones((4, 2))
            ),
            "stored already",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

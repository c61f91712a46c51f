"""Gradients against the published formulas, written out in NumPy, and against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import jaxquant as jq
from jaxquant import calibration, estimators
from jaxquant.numerics.calibration import Range, Step

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 16)).astype(np.float32)
W = RNG.normal(size=X.shape).astype(np.float32)  # the gradient that arrives


def pulled(x, quantizer, weights=W):
    """(x̂, gradient to x, gradient to the calibration's data) for the incoming gradient `weights`."""

    def loss(x, data):
        q = jq.Quantizer(
            quantizer.format,
            quantizer.granularity if not isinstance(quantizer.format, jq.Block) else None,
            calibration=data,
            rounding=quantizer.rounding,
            estimator=quantizer.estimator,
            hadamard=quantizer.hadamard,
        )
        found = jq.fake_quant(x, q)
        return jnp.sum(found * weights), found

    grads, found = jax.grad(loss, argnums=(0, 1), has_aux=True)(jnp.array(x), quantizer.calibration)
    return np.asarray(found), np.asarray(grads[0]), np.asarray(jax.tree.leaves(grads[1])[0])


ALL = [
    estimators.straight_through,
    estimators.clipped,
    estimators.pact,
    estimators.lsq,
    estimators.trust,
]
GRIDS = [jq.INT4, jq.Int(4, "full"), jq.Int(4, "unsigned"), jq.Int(4, "midrise"), jq.E2M1, jq.NF4]


@pytest.mark.first(1)
@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("fmt", GRIDS, ids=str)
@pytest.mark.parametrize("rotation", [None, 8])
def test_estimators_change_gradients_and_not_values(estimator, fmt, rotation):
    if estimator is estimators.trust and not isinstance(fmt, jq.Int):
        with pytest.raises(ValueError, match="Int"):
            jq.fake_quant(jnp.array(X), jq.Quantizer(fmt, estimator=estimator))
        return
    plain = jq.Quantizer(fmt, "channel", calibration=Range(jnp.float32(1.3)), hadamard=rotation)
    other = jq.Quantizer(
        fmt, "channel", calibration=Range(jnp.float32(1.3)), hadamard=rotation, estimator=estimator
    )
    x = jnp.array(X)
    found, expected = jq.fake_quant(x, other), jq.fake_quant(x, plain)
    exact = estimator is not estimators.lsq  # which gives (q)·s by way of x/s
    compare = np.testing.assert_array_equal if exact else np.testing.assert_allclose
    compare(found, expected, **({} if exact else {"rtol": 1e-6, "atol": 1e-7}))
    np.testing.assert_array_equal(found, jq.dequantize(jq.quantize(x, other)))


@pytest.mark.first(6)
@pytest.mark.parametrize("fmt", [*GRIDS, jq.MXFP4, jq.NVFP4], ids=str)
def test_clipped_passes_what_lies_within_the_grids_range(fmt):
    x = X if not isinstance(fmt, jq.Block) else np.tile(X, 2)
    r = np.float32(1.0)
    quantizer = jq.Quantizer(fmt, calibration=Range(jnp.float32(r)), estimator=estimators.clipped)
    weights = np.ones_like(x)
    _, gradient, to_range = pulled(x, quantizer, weights)
    element = quantizer.element
    scale = r / np.float32(element.max_value)
    if fmt == jq.MXFP4:
        scale = np.float32(2.0 ** np.ceil(np.log2(scale)))
    inside = (x >= element.min_value * scale) & (x <= element.max_value * scale)
    np.testing.assert_array_equal(gradient, inside)
    assert 0 < inside.mean() < 1
    assert (to_range == 0).all()


@pytest.mark.long
def test_clipped_knows_an_asymmetric_range():
    x = np.linspace(-2, 3, 41).astype(np.float32)
    quantizer = jq.Quantizer(
        jq.Int(8, "unsigned"),
        calibration=Range((jnp.float32(-1.0), jnp.float32(2.0))),
        estimator=estimators.clipped,
    )
    _, gradient, _ = pulled(x, quantizer, np.ones_like(x))
    step = 3 / 255
    clear = (np.abs(x + 1) > step) & (
        np.abs(x - 2) > step
    )  # the zero point moves the ends by half a step
    np.testing.assert_array_equal(gradient[clear], ((x > -1) & (x < 2))[clear])


@pytest.mark.parametrize("fmt", [jq.Int(4, "unsigned"), jq.INT4], ids=str)
def test_pact_learns_its_clipping_level_as_published(fmt):
    """Choi et al. 2018, equation 3: ∂y/∂α = 1 where x ≥ α, else 0; on a signed grid −1 where x ≤ −α."""
    alpha = 1.1
    quantizer = jq.Quantizer(fmt, calibration=Range(jnp.float32(alpha)), estimator=estimators.pact)
    _, to_x, to_range = pulled(X, quantizer)
    low = 0.0 if fmt.levels == "unsigned" else -alpha
    np.testing.assert_array_equal(to_x, np.where((low < X) & (alpha > X), W, 0))
    signs = np.where(alpha <= X, 1.0, np.where((low >= X) & (low < 0), -1.0, 0.0))
    np.testing.assert_allclose(to_range, np.sum(signs * W), rtol=1e-5)

    def clip(alpha):  # what PACT is before its rounding: differentiable in α
        return np.sum(np.clip(X.astype(np.float64), 0.0 if low == 0 else -alpha, alpha) * W)

    difference = (clip(alpha + 1e-5) - clip(alpha - 1e-5)) / 2e-5
    np.testing.assert_allclose(to_range, difference, rtol=1e-4)


def test_pact_learns_a_level_for_each_channel():
    alpha = np.array([[0.5], [1.0], [1.5], [9.0]], np.float32)
    quantizer = jq.Quantizer(
        jq.INT4, "channel", calibration=Range(jnp.array(alpha)), estimator=estimators.pact
    )
    _, _, to_range = pulled(X, quantizer)
    beyond = np.where(alpha <= X, W, 0) - np.where(-alpha >= X, W, 0)
    np.testing.assert_allclose(to_range, beyond.sum(1, keepdims=True), rtol=1e-5, atol=1e-6)
    assert to_range[3] == 0


@pytest.mark.first(2)
@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
@pytest.mark.parametrize(
    "fmt", [jq.INT4, jq.Int(3, "full"), jq.Int(4, "unsigned"), jq.Int(8)], ids=str
)
def test_lsq_learns_its_step_as_published(fmt, granularity):
    """Esser et al. 2020, equations 1 to 3 and 5, with the gradient scale of section 2.2."""
    groups = {"tensor": (1, 1), "channel": (4, 1), 4: (4, 4)}[granularity]
    steps = RNG.uniform(0.1, 0.4, groups).astype(np.float32)
    quantizer = jq.Quantizer(
        fmt, granularity, calibration=Step(jnp.array(steps)), estimator=estimators.lsq
    )
    _, to_x, to_step = pulled(X, quantizer)

    def spread(v):
        return np.repeat(np.repeat(v, 4 // groups[0], 0), 16 // groups[1], 1).astype(np.float64)

    v, s = X.astype(np.float64), spread(steps)
    negative, positive = -fmt.min_value, fmt.max_value  # Q_N and Q_P
    ratio = v / s
    away = np.abs(ratio - np.floor(ratio) - 0.5).min()
    assert away > 1e-5, "an element on a rounding boundary: take another seed"
    q = np.clip(np.rint(ratio), -negative, positive)
    within = (-negative < ratio) & (ratio < positive)
    slope = np.where(within, q - ratio, q)  # equation 3
    per_group = X.size // (groups[0] * groups[1])
    g = 1 / np.sqrt(per_group * positive)
    total = (slope * W).reshape(groups[0], 4 // groups[0], groups[1], 16 // groups[1]).sum((1, 3))
    np.testing.assert_allclose(to_step, g * total, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(to_x, np.where(within, W, 0), rtol=3e-7)  # equation 5

    def surrogate(by):  # x̂ with the rounding's residue held: differentiable in the step
        moved = s + spread(by)
        inner = v / moved + np.where(within, q - ratio, 0)
        return (moved * np.where(within, inner, q) * W).reshape(
            groups[0], 4 // groups[0], groups[1], 16 // groups[1]
        )

    h = np.full(groups, 1e-6)
    difference = (surrogate(h) - surrogate(-h)).sum((1, 3)) / 2e-6
    np.testing.assert_allclose(to_step, g * difference, rtol=2e-4, atol=1e-5)


def test_lsq_by_hand():
    """s = 1, four values in one group, Q_P = 7: g = 1/√28."""
    x, weights = np.array([0.3, 1.75, 9.0, -9.0], np.float32), np.ones(4, np.float32)
    quantizer = jq.Quantizer(jq.INT4, calibration=Step(jnp.float32(1)), estimator=estimators.lsq)
    found, to_x, to_step = pulled(x, quantizer, weights)
    np.testing.assert_array_equal(found, [0, 2, 7, -7])
    np.testing.assert_array_equal(to_x, [1, 1, 0, 0])
    np.testing.assert_allclose(to_step, (-0.3 + 0.25 + 7 - 7) / np.sqrt(28), rtol=1e-5)


def test_lsq_learns_a_good_step():
    """Descent on the error from a step four times too wide ends near the best step of normals."""
    x = jnp.array(np.random.default_rng(1).normal(size=4096), jnp.float32)

    @jax.jit
    def descend(step):
        def loss(step):
            q = jq.Quantizer(jq.INT4, calibration=Step(step), estimator=estimators.lsq)
            return jnp.mean((jq.fake_quant(x, q) - x) ** 2)

        return step - 10.0 * jax.grad(loss)(step)

    step = jnp.float32(1.4)
    for _ in range(300):
        step = descend(step)
    best, _ = calibration.optimal_gaussian_range(jq.INT4)
    assert float(step) * 7 == pytest.approx(best, rel=0.05)


@pytest.mark.first(1)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_trust_is_quests_mask_in_hadamard_coordinates(bits):
    """Panferov et al. 2025: gradient H(M ⊙ H g), M = |x̂_h − x_h| ≤ T = α*·RMS/(2^b − 1)."""
    n = 64
    rng = np.random.default_rng(bits)
    x, weights = (rng.normal(size=(8, n)).astype(np.float32) for _ in range(2))
    quantizer = jq.Quantizer(
        jq.Int(bits, "midrise"),
        "channel",
        calibration=calibration.gaussian,
        estimator=estimators.trust,
        hadamard=n,
    )
    gradient = np.asarray(
        jax.grad(lambda x: jnp.sum(jq.fake_quant(x, quantizer) * weights))(jnp.array(x))
    )
    rotation = scipy.linalg.hadamard(n) / np.sqrt(n)
    x_h = x.astype(np.float64) @ rotation
    alpha = {1: 0.7978845587, 2: 1.49353462, 4: 2.51393058}[bits]
    r = alpha * np.sqrt(np.mean(x_h**2, 1, keepdims=True))
    top = 2**bits - 1
    levels = np.arange(-top, top + 1, 2) / top
    nearest = levels[np.abs(x_h[..., None] / r[..., None] - levels).argmin(-1)] * r
    error, threshold = np.abs(nearest - x_h), r / top
    # Within the grid's range every error is at most T, so that only clipped values are masked.
    doubtful = (np.abs(error - threshold) < 1e-3 * threshold) & (np.abs(x_h) > r)
    assert not doubtful.any(), "an element on the mask's edge: take another seed"
    mask = (error <= threshold) | (np.abs(x_h) <= r)
    assert (mask == (np.abs(x_h) <= r + threshold)).all()
    assert 0.5 < mask.mean() < 1
    expected = ((weights @ rotation) * mask) @ rotation
    np.testing.assert_allclose(gradient, expected, atol=2e-5)


def test_straight_through_with_a_rotation_is_straight_through():
    gradient = jax.grad(
        lambda x: jnp.sum(jq.fake_quant(x, jq.Quantizer(jq.INT4, "channel", hadamard=16)) * W)
    )(jnp.array(X))
    np.testing.assert_array_equal(gradient, W)


@pytest.mark.first(2)
@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_have_the_inputs_type_and_are_finite(estimator, dtype):
    x = jnp.array(X, dtype).at[0].set(0).at[1, 0].set(6e4)
    quantizer = jq.Quantizer(jq.INT4, "channel", estimator=estimator)
    gradient = jax.grad(lambda x: jnp.sum(jq.fake_quant(x, quantizer).astype(jnp.float32)))(x)
    assert gradient.dtype == dtype
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("estimator", ALL)
def test_gradients_of_what_shares_no_scale_with_nan_are_finite(estimator):
    x = jnp.array(X).at[0, 0].set(jnp.nan)
    quantizer = jq.Quantizer(jq.INT4, "channel", estimator=estimator)
    gradient = jax.grad(lambda x: jnp.sum(jq.fake_quant(x, quantizer)[1:]))(x)
    assert jnp.isfinite(gradient[1:]).all()
    assert (gradient[1:] != 0).any()

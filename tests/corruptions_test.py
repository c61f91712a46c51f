import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from experiments.harness.data import corruptions
from experiments.harness.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others

RANDOM = sorted(set(CORRUPTIONS) - {"gaussian_blur", "pixelate", "contrast", "brightness"})


def shapes(count: int, side: int = 28) -> np.ndarray:
    """Bright blobs with soft edges and some texture on black, as photographs of things are."""
    rng = np.random.default_rng(0)
    noise = scipy.ndimage.gaussian_filter(rng.normal(size=(count, side, side)), (0, 4, 4))
    texture = scipy.ndimage.gaussian_filter(rng.normal(size=(count, side, side)), (0, 0.7, 0.7))
    blobs = np.clip(0.5 + 10 * noise, 0, 1) * np.clip(0.7 + 0.4 * texture, 0, 1)
    return blobs.astype(np.float32)[..., None]


IMAGES = shapes(60)


@pytest.mark.first(4)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_distortion_rises_with_severity(name):
    distorted = np.stack([corrupt(IMAGES, name, severity) for severity in SEVERITIES])
    assert distorted.dtype == np.float32
    assert distorted.shape == (5, *IMAGES.shape)
    assert distorted.min() >= 0
    assert distorted.max() <= 1
    rms = np.sqrt(np.square(distorted - IMAGES).mean(axis=(1, 2, 3, 4)))
    assert (np.diff(rms) > 0.05 * rms[:-1]).all(), rms
    assert rms[0] > 0.01


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_is_random_follows_from_seed_severity_and_index_alone(name):
    whole = corrupt(IMAGES, name, 3, seed=1)
    np.testing.assert_array_equal(corrupt(IMAGES, name, 3, seed=1), whole)
    order = np.random.default_rng(1).permutation(len(IMAGES))
    reordered = corrupt(IMAGES[order], name, 3, seed=1, indices=order)
    np.testing.assert_allclose(reordered, whole[order], atol=1e-5)
    same = np.repeat(IMAGES[:1], len(IMAGES), axis=0)
    copies = corrupt(same, name, 3)
    other = corrupt(same, name, 3, seed=2)
    if name in RANDOM:
        assert len({copy.tobytes() for copy in np.asarray(copies)}) > 1
        assert not np.array_equal(copies, other)
    else:
        np.testing.assert_array_equal(copies, np.repeat(copies[:1], len(copies), axis=0))
        np.testing.assert_array_equal(copies, other)


def test_images_are_corrupted_alike_in_any_number():
    many = np.concatenate([IMAGES] * 6)  # more than go together
    np.testing.assert_allclose(
        corrupt(many, "rotate", 2)[: len(IMAGES)], corrupt(IMAGES, "rotate", 2), atol=1e-5
    )


def test_severities_are_data_of_one_compiled_program():
    images = shapes(2, 20)
    start = corruptions._corrupt._cache_size()
    for severity in SEVERITIES:
        corrupt(images, "pixelate", severity)
    assert corruptions._corrupt._cache_size() == start + 1


@pytest.mark.first(8)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_other_sizes(name):
    shape = (2, 8, 10, 3)
    images = np.random.default_rng(0).random(shape, np.float32)
    distorted = corrupt(images, name, 5)
    assert distorted.shape == shape
    assert not np.array_equal(distorted, images)


# ---- against other implementations


@pytest.mark.parametrize(("severity", "sigma"), list(enumerate((0.5, 0.8, 1.1, 1.5, 2.0), 1)))
def test_gaussian_blur_is_scipys(severity, sigma):
    expected = scipy.ndimage.gaussian_filter(
        IMAGES, (0, sigma, sigma, 0), mode="nearest", radius=(0, 8, 8, 0)
    )
    np.testing.assert_allclose(corrupt(IMAGES, "gaussian_blur", severity), expected, atol=1e-5)


@pytest.mark.parametrize(("severity", "degrees"), list(enumerate((8, 16, 24, 34, 45), 1)))
def test_rotation_is_scipys_to_either_side(severity, degrees):
    options = {"axes": (1, 2), "reshape": False, "order": 1, "mode": "grid-constant"}
    turned = [scipy.ndimage.rotate(IMAGES, side * degrees, **options) for side in (1, -1)]
    found = np.asarray(corrupt(IMAGES, "rotate", severity))
    errors = [np.abs(found - t).max(axis=(1, 2, 3)) for t in turned]
    np.testing.assert_allclose(np.minimum(*errors), 0, atol=1e-4)
    assert (errors[0] < errors[1]).any()
    assert (errors[0] > errors[1]).any()


@pytest.mark.parametrize(("severity", "distance"), list(enumerate((1.5, 3.0, 4.5, 6.0, 8.0), 1)))
def test_translation_moves_the_centre_of_mass_by_the_distance(severity, distance):
    image = np.zeros((1, 28, 28, 1), np.float32)
    image[:, 12:16, 12:16] = 1
    moved = np.asarray(corrupt(np.repeat(image, 60, axis=0), "translate", severity))[..., 0]
    centres = np.array([scipy.ndimage.center_of_mass(m) for m in moved]) - 13.5
    np.testing.assert_allclose(np.hypot(*centres.T), distance, rtol=1e-3)
    assert (np.abs(centres.mean(axis=0)) < 0.6 * distance).all()


@pytest.mark.parametrize(("severity", "block"), [(2, 2), (4, 4)])
def test_pixelation_is_the_mean_of_blocks(severity, block):
    cells = IMAGES.reshape(-1, 28 // block, block, 28 // block, block).mean(axis=(2, 4))
    expected = cells.repeat(block, axis=1).repeat(block, axis=2)[..., None]
    np.testing.assert_allclose(corrupt(IMAGES, "pixelate", severity), expected, atol=1e-5)


def test_motion_blur_keeps_brightness_and_spreads_along_a_line():
    image = np.zeros((1, 28, 28, 1), np.float32)
    image[:, 14, 14] = 1
    for severity, length in enumerate((2, 4, 6, 8, 10), 1):
        blurred = np.asarray(corrupt(np.repeat(image, 60, axis=0), "motion_blur", severity))
        np.testing.assert_allclose(blurred.sum(axis=(1, 2, 3)), 1, atol=0.15)
        at = np.argwhere(np.ones((28, 28))) - 14
        for one in blurred[..., 0]:
            covariance = np.einsum("n,na,nb->ab", one.ravel() / one.sum(), at, at)
            across, along = np.linalg.eigvalsh(covariance)
            assert across < 0.35  # interpolation alone spreads it so far
            assert along == pytest.approx(length**2 / 12, abs=0.35 + 0.03 * length**2)


def test_contrast_and_brightness_are_their_equations():
    mean = IMAGES.mean(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(
        corrupt(IMAGES, "contrast", 4), mean + 0.2 * (IMAGES - mean), atol=1e-6
    )
    np.testing.assert_allclose(
        corrupt(IMAGES, "brightness", 2), np.minimum(IMAGES + 0.2, 1), atol=1e-6
    )


@pytest.mark.parametrize(("severity", "side"), list(enumerate((6, 9, 12, 15, 18), 1)))
def test_occlusion_hides_one_square(severity, side):
    changed = np.asarray(corrupt(np.zeros_like(IMAGES), "occlusion", severity))[..., 0]
    assert set(np.unique(changed)) == {0, 0.5}
    for hidden in changed == 0.5:
        assert hidden.any(axis=0).sum() == hidden.any(axis=1).sum() == side
        assert hidden.sum() == side**2
    firsts = [np.argwhere(image)[0] for image in changed]
    assert len({tuple(first) for first in firsts}) > 30


# ---- noise has the stated moments


def test_noise_has_its_mean_and_variance():
    image = np.full_like(IMAGES, 0.5)
    count = image.size
    for name, severity, variance in (
        ("gaussian_noise", 1, 0.06**2),
        ("shot_noise", 1, 0.5 / 60),
        ("impulse_noise", 3, 0.1 * 0.25),
    ):
        noise = np.asarray(corrupt(image, name, severity), np.float64) - 0.5
        fourth = np.mean(noise**4) - variance**2
        assert abs(noise.mean()) < 5 * (variance / count) ** 0.5
        assert abs(np.mean(noise**2) - variance) < 5 * (fourth / count) ** 0.5


def test_shot_noise_leaves_black_black_and_impulses_are_black_or_white():
    black = np.zeros_like(IMAGES)
    assert not np.asarray(corrupt(black, "shot_noise", 5)).any()
    grey = np.full_like(IMAGES, 0.3)
    assert set(np.unique(corrupt(grey, "impulse_noise", 5))) == {0, np.float32(0.3), 1}


def test_photons_are_counted_as_scipy_counts_them():
    u = np.linspace(0.0005, 0.9995, 1000, dtype=np.float32)
    for mean in (0.0, 0.1, 3.0, 25.0, 60.0):
        expected = scipy.stats.poisson.ppf(u.astype(np.float64), mean) if mean else 0 * u
        found = corruptions._poisson(jnp.asarray(u), jnp.full(u.shape, mean))
        assert (
            np.asarray(found) == expected
        ).mean() >= 0.999  # a sum in float32 can lie on u itself
        np.testing.assert_allclose(found, expected, atol=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corrupt(IMAGES, "fog", 1), "gaussian_noise, .*; got 'fog'"),
        (lambda: corrupt(IMAGES, "rotate", 6), "severity is one of .*; got 6"),
        (lambda: corrupt(IMAGES[0], "rotate", 1), r"got \[28, 28, 1\]"),
        (lambda: corrupt(IMAGES, "rotate", 1, indices=[1, 2]), "60 images need as many indices"),
    ],
)
def test_bad_requests_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_corruptions_can_be_used_inside_jit():
    image, key = jnp.asarray(IMAGES[0]), jax.random.key(0)
    direct = corruptions.rotate(image, 2, key)
    np.testing.assert_allclose(jax.jit(corruptions.rotate)(image, 2, key), direct, atol=1e-5)

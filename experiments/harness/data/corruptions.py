"""Synthetic corruptions of images at five severities, for accuracy away from the training data.

The kinds are those of Hendrycks & Dietterich 2019, arXiv 1903.12261, section 4, written anew, with
translation and rotation as in Mu & Gilmer 2019, arXiv 1906.02337, and occlusion.  The severities are
this project's own, chosen for grey images of 28 × 28: accuracies here do not compare with those
published for other benchmarks.  Lengths are in 1/28 of the image's side, so that they carry over to
other sizes.

Each corruption takes one image, float32[H, W, C] in [0, 1], a severity 1 … 5 that may be traced, and a
key, and returns an image in [0, 1].  What is random is determined by the seed, the corruption, the
severity and the image's index alone.
"""

import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 28  # lengths below are pixels of an image of this side
_BLUR_RADIUS = 8
_MOTION_STEPS = 13
_GREY = 0.5
_MOST_PHOTONS = 120  # beyond it a mean of 60 has less than 1e-10 left
_TOGETHER = 250  # images corrupted at once: bounds the memory

Corruption = Callable[[jax.Array, jax.Array | int, jax.Array], jax.Array]


def _level(values: tuple[float, ...], severity: jax.Array | int) -> jax.Array:
    return jnp.asarray(values, jnp.float32)[jnp.asarray(severity) - 1]


def _unit(image: jax.Array) -> jax.Array:
    return jnp.clip(image, 0.0, 1.0)


def _pixels(image: jax.Array, length: jax.Array) -> jax.Array:
    return length * (image.shape[0] / _SIDE)


def _range(size: int) -> jax.Array:
    return jnp.arange(size, dtype=jnp.float32)


# ---------------------------------------------------------------------------------------------------
# Noise


def gaussian_noise(image: jax.Array, severity: jax.Array | int, key: jax.Array) -> jax.Array:
    """Returns x + σ · n, n standard normal."""
    sigma = _level((0.06, 0.12, 0.18, 0.26, 0.38), severity)
    return _unit(image + sigma * jax.random.normal(key, image.shape))


def shot_noise(image: jax.Array, severity: jax.Array | int, key: jax.Array) -> jax.Array:
    """Returns poisson(λ · x) / λ: photons counted, λ of them at full brightness."""
    rate = _level((60.0, 25.0, 12.0, 5.0, 3.0), severity)
    return _unit(_poisson(jax.random.uniform(key, image.shape), rate * image) / rate)


def _poisson(u: jax.Array, mean: jax.Array) -> jax.Array:
    """Returns the count whose distribution function first exceeds u; for means up to 60.

    jax.random.poisson, which serves any mean, takes several times as long to compile and to run.
    """

    def add(k, state):
        count, term, total = state
        count = count + (u >= total).astype(jnp.float32)
        term = term * mean / (k + 1).astype(jnp.float32)
        return count, term, total + term

    none = jnp.exp(-mean)
    return jax.lax.fori_loop(0, _MOST_PHOTONS, add, (jnp.zeros_like(u), none, none))[0]


def impulse_noise(image: jax.Array, severity: jax.Array | int, key: jax.Array) -> jax.Array:
    """Makes each pixel black or white with probability p."""
    p = _level((0.03, 0.06, 0.1, 0.17, 0.27), severity)
    u = jax.random.uniform(key, image.shape)
    return jnp.where(u < p, (u < p / 2).astype(jnp.float32), image)


# ---------------------------------------------------------------------------------------------------
# Blur and resolution


def gaussian_blur(image: jax.Array, severity: jax.Array | int, key: jax.Array) -> jax.Array:
    """Returns a normal kernel of standard deviation σ; the border's pixels continue outside."""
    del key
    sigma = _pixels(image, _level((0.5, 0.8, 1.1, 1.5, 2.0), severity))
    offset = _range(2 * _BLUR_RADIUS + 1) - _BLUR_RADIUS
    kernel = jax.nn.softmax(-0.5 * (offset / sigma) ** 2)
    for axis in (0, 1):
        size = image.shape[axis]
        at = jnp.clip(jnp.arange(size)[:, None] + offset.astype(int)[None], 0, size - 1)
        taps = jnp.moveaxis(jnp.take(image, at, axis=axis), axis + 1, -1)
        image = taps @ kernel
    return _unit(image)


def motion_blur(image: jax.Array, severity: jax.Array | int, key: jax.Array) -> jax.Array:
    """Returns the mean over a straight movement of length L in a random direction, centred on the image."""
    length = _pixels(image, _level((2.0, 4.0, 6.0, 8.0, 10.0), severity))
    angle = jax.random.uniform(key, maxval=jnp.pi)
    direction = jnp.stack([jnp.sin(angle), jnp.cos(angle)])
    along = jnp.linspace(-0.5, 0.5, _MOTION_STEPS) * length
    moved = jax.vmap(lambda t: _move(image, jnp.eye(2), t * direction, "nearest"))(along)
    return _unit(moved.mean(axis=0))


def pixelate(image: jax.Array, severity: jax.Array | int, key: jax.Array) -> jax.Array:
    """Replaces each cell of an n × n grid by its mean."""
    del key
    share = _level((0.72, 0.5, 0.36, 0.25, 0.18), severity)

    def averaging(size: int) -> jax.Array:
        cells = jnp.maximum(jnp.round(share * size), 1.0)
        cell = jnp.floor(_range(size) * cells / size)
        same = (cell[:, None] == cell[None, :]).astype(jnp.float32)
        return same / same.sum(axis=1, keepdims=True)

    height, width, _ = image.shape
    return _unit(jnp.einsum("ih,jw,hwc->ijc", averaging(height), averaging(width), image))


# ---------------------------------------------------------------------------------------------------
# Light


def contrast(image: jax.Array, severity: jax.Array | int, key: jax.Array) -> jax.Array:
    """Returns m + c · (x − m), m the image's mean."""
    del key
    mean = image.mean()
    return _unit(mean + _level((0.75, 0.5, 0.35, 0.2, 0.1), severity) * (image - mean))


def brightness(image: jax.Array, severity: jax.Array | int, key: jax.Array) -> jax.Array:
    """Returns x + b."""
    del key
    return _unit(image + _level((0.1, 0.2, 0.3, 0.4, 0.5), severity))


# ---------------------------------------------------------------------------------------------------
# Position


def _move(image: jax.Array, turn: jax.Array, offset: jax.Array, mode: str) -> jax.Array:
    """Moves turn · (p − centre) + centre + offset to p, with linear interpolation between pixels."""
    height, width, _ = image.shape
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])
    at = jnp.stack(jnp.meshgrid(_range(height), _range(width), indexing="ij"), -1)
    at = jnp.einsum("ab,hwb->ahw", turn, at - centre[None, None])
    at = at + (centre + offset)[:, None, None]
    return jnp.stack(
        [map_coordinates(image[..., c], list(at), 1, mode) for c in range(image.shape[-1])], -1
    )


def translate(image: jax.Array, severity: jax.Array | int, key: jax.Array) -> jax.Array:
    """Moved in a random direction; what comes in is black."""
    distance = _pixels(image, _level((1.5, 3.0, 4.5, 6.0, 8.0), severity))
    angle = jax.random.uniform(key, maxval=2 * jnp.pi)
    offset = distance * jnp.stack([jnp.sin(angle), jnp.cos(angle)])
    return _unit(_move(image, jnp.eye(2), offset, "constant"))


def rotate(image: jax.Array, severity: jax.Array | int, key: jax.Array) -> jax.Array:
    """Turned about its centre, to a random side; what comes in is black."""
    angle = jnp.deg2rad(_level((8.0, 16.0, 24.0, 34.0, 45.0), severity))
    angle = jnp.where(jax.random.bernoulli(key), angle, -angle)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.stack([jnp.stack([cos, sin]), jnp.stack([-sin, cos])])
    return _unit(_move(image, turn, jnp.zeros(2), "constant"))


def occlusion(image: jax.Array, severity: jax.Array | int, key: jax.Array) -> jax.Array:
    """A grey square at a random place hides what is behind it."""
    height, width, _ = image.shape
    side = jnp.round(_pixels(image, _level((6.0, 9.0, 12.0, 15.0, 18.0), severity)))
    u = jax.random.uniform(key, (2,))
    hidden = []
    for size, start in ((height, u[0]), (width, u[1])):
        first = jnp.floor(start * (size - side + 1))
        at = _range(size)
        hidden.append((at >= first) & (at < first + side))
    return jnp.where((hidden[0][:, None] & hidden[1][None, :])[..., None], _GREY, image)


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        gaussian_blur,
        motion_blur,
        pixelate,
        contrast,
        brightness,
        translate,
        rotate,
        occlusion,
    )
}


def corrupt(
    images: jax.typing.ArrayLike,
    name: str,
    severity: int,
    seed: int = 0,
    indices: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Returns corrupted copies of images.

    Args:
        images: [N, H, W, C] in [0, 1].
        name: one of `CORRUPTIONS`.
        severity: 1 (least) to 5.
        seed: of what is random.
        indices: int[N], which images of their set these are; 0 … N − 1 where not given.

    Returns:
        float32[N, H, W, C] in [0, 1].

    Raises:
        ValueError: an unknown name or severity, images of another rank, indices of another number.

    >>> images = jnp.linspace(0, 1, 3 * 64).reshape(3, 8, 8, 1)
    >>> noisy = corrupt(images, "gaussian_noise", 3)
    >>> bool((corrupt(images[1:], "gaussian_noise", 3, indices=[1, 2]) == noisy[1:]).all())
    True
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption is one of {', '.join(CORRUPTIONS)}; got {name!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity is one of {SEVERITIES}; got {severity!r}")
    pixels = jnp.asarray(images, jnp.float32)
    if pixels.ndim != 4:
        raise ValueError(f"images are [N, H, W, C]; got {list(pixels.shape)}")
    at = jnp.arange(len(pixels)) if indices is None else jnp.asarray(indices)
    if at.shape != (len(pixels),):
        raise ValueError(f"{len(pixels)} images need as many indices; got {list(at.shape)}")
    return _corrupt(name, pixels, jnp.int32(severity), jax.random.key(seed), at)


@functools.partial(jax.jit, static_argnums=0)
def _corrupt(name: str, images, severity, key, indices) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), severity)

    def one(image_and_index):
        image, index = image_and_index
        return CORRUPTIONS[name](image, severity, jax.random.fold_in(key, index))

    return jax.lax.map(one, (images, indices), batch_size=_TOGETHER)

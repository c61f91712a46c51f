"""Convolutions of integers as sums of matrix products, for GPUs.

    out[n, o, p] = Σ_k Σ_c lhs[n, c, p · stride + k · dilation] · rhs[o, c, k]

cuDNN multiplies 8-bit integers forward in two dimensions and without groups.  With groups its results are
wrong in some channels (openxla/xla issue 49123), and the gradient by the window becomes a convolution of
int32, which it does not have.  The sum over the window's taps k, or over the output's places p where these
are fewer, as in the gradient by the window, is one of matrix products of int8 with int32 sums: exact, so
equal in any order.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.operations.windows import Axes, Window

_UNROLLED = 32  # taps; more are a loop


def integer_convolution(window: Window, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Returns the int32 convolution of two int8 arrays, computed the way that suits the platform.

    The numbers are the same everywhere.

    >>> from jaxquant.operations.windows import window_of
    >>> lhs, rhs = jnp.ones((1, 2, 5), jnp.int8), jnp.ones((2, 1, 3), jnp.int8)
    >>> window = window_of(lhs.shape, rhs.shape, (1,), "VALID", None, None, None, (2, 1))
    >>> integer_convolution(window, lhs, rhs)
    Array([[[3, 3, 3],
            [3, 3, 3]]], dtype=int32)
    """

    def plain(lhs, rhs):
        return window.convolve(lhs, rhs, preferred_element_type=jnp.int32)

    def on_gpu(lhs, rhs):
        return by_products(window, lhs, rhs)

    is_forward = set(window.lhs_dilation) | set(window.rhs_dilation) <= {1}
    is_wide = math.prod(rhs.shape[a] for a in window.rhs_spec[2:]) > math.prod(
        output_space(window, lhs.shape, rhs.shape)
    )
    groups = max(window.feature_groups, window.batch_groups)
    if len(window.strides) == 2 and groups == 1 and is_forward and not is_wide:
        return plain(lhs, rhs)
    return jax.lax.platform_dependent(lhs, rhs, cuda=on_gpu, rocm=on_gpu, default=plain)


def output_space(window: Window, lhs_shape: Axes, rhs_shape: Axes) -> tuple[int, ...]:
    """Returns the output's extents in space."""
    shapes = (np.empty(shape, np.int8) for shape in (lhs_shape, rhs_shape))
    out = jax.eval_shape(window.convolve, *shapes)
    return tuple(out.shape[a] for a in window.out_spec[2:])


def by_products(window: Window, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Returns the int32 convolution of two int8 arrays as a sum of products, or as products side by side."""
    space = output_space(window, lhs.shape, rhs.shape)
    left, right = _grouped(window, lhs, rhs)
    left = _padded(window, left)
    sizes = right.shape[3:]
    groups, batch, features = left.shape[0], left.shape[1], right.shape[1]
    taps, places = math.prod(sizes), math.prod(space)
    shape = (groups, batch, features, *space)
    if not taps or not math.prod(shape):
        return _placed(window, jnp.zeros(shape, jnp.int32))
    if taps <= places:
        result = _sum(taps, shape, lambda k: _tap(window, left, right, space, k))
    else:
        parts = _stack(places, lambda p: _place(window, left, right, space, p))
        result = jnp.moveaxis(parts, 0, -1).reshape(shape)
    return _placed(window, result)


def _grouped(window: Window, lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns lhs [groups, batch, inputs, *space] and rhs [groups, features, inputs, *taps]."""
    left, right = jnp.transpose(lhs, window.lhs_spec), jnp.transpose(rhs, window.rhs_spec)
    groups = max(window.feature_groups, window.batch_groups)
    if window.batch_groups > 1:
        left = left.reshape(groups, -1, *left.shape[1:])
    else:
        left = left.reshape(left.shape[0], groups, -1, *left.shape[2:])
        left = jnp.moveaxis(left, 1, 0)
    return left, right.reshape(groups, -1, *right.shape[1:])


def _padded(window: Window, left: jax.Array) -> jax.Array:
    """Returns lhs with its padding, and zeros between its numbers where it is dilated."""
    space = [
        (low, high, n - 1)
        for (low, high), n in zip(window.padding, window.lhs_dilation, strict=True)
    ]
    return jax.lax.pad(left, jnp.zeros((), left.dtype), [(0, 0, 0)] * 3 + space)


def _indices(number: jax.Array | int, sizes: tuple[int, ...]) -> list[jax.Array | int]:
    """Returns an element's indices from its number in line."""
    found = []
    for n in reversed(sizes):
        found.append(number % n)
        number = number // n
    return found[::-1]


def _cut(x: jax.Array, starts: list, steps: Axes, sizes: tuple[int, ...]) -> jax.Array:
    """Returns `sizes` elements along the axes from the fourth on, `steps` apart."""
    extents = [(n - 1) * step + 1 for n, step in zip(sizes, steps, strict=True)]
    starts = [jnp.asarray(i, jnp.int32) for i in (0, 0, 0, *starts)]
    part = jax.lax.dynamic_slice(x, starts, (*x.shape[:3], *extents))
    return jax.lax.slice(part, [0] * x.ndim, part.shape, (1, 1, 1, *steps))


def _tap(window: Window, left, right, space, number) -> jax.Array:
    """Returns what a tap adds to every place: [groups, batch, features, *space]."""
    at = _indices(number, right.shape[3:])
    starts = [i * n for i, n in zip(at, window.rhs_dilation, strict=True)]
    numbers = _cut(left, starts, window.strides, space)
    tap = _cut(right, at, (1,) * len(at), (1,) * len(at)).reshape(right.shape[:3])
    found = jax.lax.dot_general(
        numbers, tap, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.int32
    )
    return jnp.moveaxis(found, -1, 2)


def _place(window: Window, left, right, space, number) -> jax.Array:
    """Returns the output at a place: [groups, batch, features]."""
    at = _indices(number, space)
    starts = [i * n for i, n in zip(at, window.strides, strict=True)]
    numbers = _cut(left, starts, window.rhs_dilation, right.shape[3:])
    axes = tuple(range(2, left.ndim))
    return jax.lax.dot_general(
        numbers, right, ((axes, axes), ((0,), (0,))), preferred_element_type=jnp.int32
    )


def _sum(count: int, shape: tuple[int, ...], term: Callable) -> jax.Array:
    zeros = jnp.zeros(shape, jnp.int32)
    if count > _UNROLLED:
        return jax.lax.fori_loop(0, count, lambda i, total: total + term(i), zeros)
    return sum(map(term, range(count)), start=zeros)


def _stack(count: int, term: Callable) -> jax.Array:
    if count > _UNROLLED:
        return jax.lax.map(term, jnp.arange(count))
    return jnp.stack([term(i) for i in range(count)])


def _placed(window: Window, result: jax.Array) -> jax.Array:
    """Returns [groups, batch, features, *space] with the output's axes."""
    groups, batch, features, *space = result.shape
    whole = jnp.moveaxis(result, 0, 1).reshape(batch, groups * features, *space)
    return jnp.transpose(whole, [window.out_spec.index(a) for a in range(whole.ndim)])

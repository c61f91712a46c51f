"""Windows of convolutions: which axes, strides and groups they have, forward and towards each gradient."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Window:
    """All that is static in a convolution, as `jax.lax.conv_general_dilated` takes it.

    Attributes:
        strides, padding, lhs_dilation, rhs_dilation: one entry for each axis of space.
        lhs_spec: axes of lhs in the order (batch, features, *space).
        rhs_spec: axes of rhs in the order (output features, input features, *space).
        out_spec: axes of the output in the order (batch, features, *space).
        feature_groups: into how many groups lhs's features and rhs's output features are divided.
        batch_groups: into how many groups lhs's batch and rhs's output features are divided.
    """

    strides: Axes
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: Axes
    rhs_dilation: Axes
    lhs_spec: Axes
    rhs_spec: Axes
    out_spec: Axes
    feature_groups: int
    batch_groups: int

    def convolve(self, lhs: jax.Array, rhs: jax.Array, **options: Any) -> jax.Array:
        return jax.lax.conv_general_dilated(
            lhs,
            rhs,
            self.strides,
            self.padding,
            self.lhs_dilation,
            self.rhs_dilation,
            jax.lax.ConvDimensionNumbers(self.lhs_spec, self.rhs_spec, self.out_spec),
            self.feature_groups,
            self.batch_groups,
            **options,
        )

    def lhs_scale(self, scale: jax.Array, features: int) -> jax.Array:
        """Returns lhs's scales, one or one per element of its batch, in the shape of the output's `features`.

        Output feature o of group o // (features / groups) is made of that group's part of the batch.
        """
        groups = self.batch_groups if scale.size > 1 else 1
        by_feature = scale.reshape(groups, -1).T
        if groups > 1:
            by_feature = jnp.repeat(by_feature, features // groups, axis=1)
        return self._over_output(by_feature)

    def rhs_scale(self, scale: jax.Array) -> jax.Array:
        """Returns scales of rhs, one or one per output feature, as they lie over the output."""
        return self._over_output(scale.reshape(1, -1))

    def _over_output(self, scale: jax.Array) -> jax.Array:
        """Returns scales (batch, features) with the output's axes."""
        ndim = len(self.out_spec)
        return jnp.moveaxis(
            scale.reshape(*scale.shape, *[1] * (ndim - 2)), range(ndim), self.out_spec
        )


def window_of(
    lhs_shape, rhs_shape, strides, padding, lhs_dilation, rhs_dilation, numbers, groups
) -> Window:
    """Returns the arguments of `jax.lax.conv_general_dilated` with their defaults filled in."""
    numbers = jax.lax.conv_dimension_numbers(lhs_shape, rhs_shape, numbers)
    ndim = len(lhs_shape) - 2
    lhs_dilation, rhs_dilation = (
        (1,) * ndim if d is None else tuple(map(int, d)) for d in (lhs_dilation, rhs_dilation)
    )
    strides = tuple(map(int, strides))
    for name, sizes in (
        ("window_strides", strides),
        ("lhs_dilation", lhs_dilation),
        ("rhs_dilation", rhs_dilation),
    ):
        if len(sizes) != ndim:
            raise ValueError(f"{name} has an entry for each of {ndim} axes of space; got {sizes}")
    if isinstance(padding, str):
        if set(lhs_dilation) - {1}:
            raise ValueError(
                f"padding {padding!r} of an lhs dilated by {lhs_dilation} is not defined; "
                "give pairs (low, high)"
            )
        space = [lhs_shape[a] for a in numbers.lhs_spec[2:]]
        taps = _dilated([rhs_shape[a] for a in numbers.rhs_spec[2:]], rhs_dilation)
        padding = jax.lax.padtype_to_pads(space, taps, strides, padding)
    pairs = tuple((int(low), int(high)) for low, high in padding)
    lhs_spec, rhs_spec, out_spec = (tuple(map(int, spec)) for spec in numbers)
    return Window(
        strides,
        pairs,
        lhs_dilation,
        rhs_dilation,
        lhs_spec,
        rhs_spec,
        out_spec,
        feature_groups=int(groups[0]),
        batch_groups=int(groups[1]),
    )


def _dilated(sizes: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [max(0, (n - 1) * d + 1) for n, d in zip(sizes, dilation, strict=True)]


def all_but(axis: int, ndim: int) -> Axes:
    return tuple(a for a in range(ndim) if a != axis)


def towards_lhs(window: Window, lhs_shape: Axes, rhs_shape: Axes, out_shape: Axes) -> Window:
    """Returns the convolution gradient * rhs → ∂lhs.

    Each output element is a sum over the taps of the window; what an input element gets back is the sum
    over the same taps in reverse, of the gradient spread out by the strides.
    """
    space, taps, spread = _dilated_space(window, lhs_shape, rhs_shape, out_shape)
    padding = []
    for (low, _), n, k, g in zip(window.padding, space, taps, spread, strict=True):
        before = k - 1 - low
        padding.append(
            (before, n + k - 1 - g - before)
        )  # so that n elements come out before striding
    return Window(
        strides=window.lhs_dilation,
        padding=tuple(padding),
        lhs_dilation=window.strides,
        rhs_dilation=window.rhs_dilation,
        lhs_spec=window.out_spec,
        rhs_spec=_swapped(window.rhs_spec),
        out_spec=window.lhs_spec,
        # Groups of the batch come out as groups of features, and are put back afterwards.
        feature_groups=max(window.feature_groups, window.batch_groups),
        batch_groups=1,
    )


def towards_rhs(window: Window, lhs_shape: Axes, rhs_shape: Axes, out_shape: Axes) -> Window:
    """Returns the convolution lhs * gradient → ∂rhs: batch and features, and their groups, are exchanged."""
    space, taps, spread = _dilated_space(window, lhs_shape, rhs_shape, out_shape)
    padding = []
    for (low, _), n, k, g in zip(window.padding, space, taps, spread, strict=True):
        padding.append((low, k + g - 1 - n - low))  # so that k taps come out before striding
    return Window(
        strides=window.rhs_dilation,
        padding=tuple(padding),
        lhs_dilation=window.lhs_dilation,
        rhs_dilation=window.strides,
        lhs_spec=_swapped(window.lhs_spec),
        rhs_spec=_swapped(window.out_spec),
        out_spec=_swapped(window.rhs_spec),
        feature_groups=window.batch_groups,
        batch_groups=window.feature_groups,
    )


def _dilated_space(
    window, lhs_shape, rhs_shape, out_shape
) -> tuple[list[int], list[int], list[int]]:
    """Extents in space of lhs, rhs and the output, each with its dilation or stride between the elements."""
    return (
        _dilated([lhs_shape[a] for a in window.lhs_spec[2:]], window.lhs_dilation),
        _dilated([rhs_shape[a] for a in window.rhs_spec[2:]], window.rhs_dilation),
        _dilated([out_shape[a] for a in window.out_spec[2:]], window.strides),
    )


def _swapped(spec: Axes) -> Axes:
    return (spec[1], spec[0], *spec[2:])
